"""What a wheel of the project installs."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("zoo", "autoencoder", "diffusion", "baselines", "headstart")


def test_the_archives_are_ready_for_the_package_index(tmp_path: Path) -> None:
    """`python -m build` and `twine check --strict`, on a copy; the wheel holds the five packages and nothing else."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in (*PACKAGES, "tests"):  # tests too: they must not be picked up
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    run = partial(subprocess.run, check=True, capture_output=True, text=True)
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path / "dist"), str(source)])
    archives = sorted(str(path) for path in (tmp_path / "dist").iterdir())
    assert len(archives) == 2
    run([sys.executable, "-m", "twine", "check", "--strict", *archives])
    (wheel,) = (tmp_path / "dist").glob("headstart-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == set(PACKAGES)
    files = {path for package in PACKAGES for path in (ROOT / package).rglob("*") if path.is_file()}
    kinds = (".py", ".typed", ".j2", ".json")
    needed = {str(path.relative_to(ROOT)) for path in files if path.suffix in kinds}
    assert needed <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_import_contracts_hold() -> None:
    """The layers of `[tool.importlinter]`: one way, no cycle, type hints and lazy imports included."""
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
