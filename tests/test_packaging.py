"""What a wheel of the project installs."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("zoo", "autoencoder", "diffusion", "baselines", "headstart")


def test_the_wheel_holds_the_five_packages(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    for name in (*PACKAGES, "tests"):  # tests too: they must not be picked up
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        str(source),
    ]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("headstart-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == set(PACKAGES)
    modules = {str(p.relative_to(ROOT)) for package in PACKAGES for p in (ROOT / package).rglob("*.py")}
    assert modules <= set(names)


def test_imports_point_one_way() -> None:
    allowed = {
        "zoo": set(),
        "autoencoder": {"zoo"},
        "baselines": {"zoo"},
        "diffusion": {"zoo", "autoencoder"},
        "headstart": {"zoo", "autoencoder", "baselines", "diffusion"},
    }
    import ast

    for package, may in allowed.items():
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                found = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                found += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                ours = {name.split(".")[0] for name in found} & set(PACKAGES)
                assert ours <= may | {package}, f"{path} imports {ours - may}"
