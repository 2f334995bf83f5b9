"""A zoo of two donors, from the folders src/first and src/second."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from zoo.add import add

Make = Callable[..., Path]


@pytest.fixture
def filled(tmp_path: Path, tiny_llama: Make) -> Path:
    sources = [tiny_llama(tmp_path / "src" / n, seed=i) for i, n in enumerate(("first", "second"))]
    add([str(s) for s in sources], tmp_path / "zoo", quiet=True)
    return tmp_path / "zoo"


@pytest.fixture
def tiny_source(tmp_path: Path, tiny_llama: Make) -> Path:
    return tiny_llama(tmp_path / "source")
