"""A comparison whose products are bfloat16."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from headstart.compare.compare import compare
from headstart.config import CompareConfig
from tests.headstart.compare.test_compare import TARGET
from zoo.errors import UserError


def config(folder: Path, name: str, dtype: str) -> CompareConfig:
    (folder / "config.json").write_text(json.dumps(TARGET))
    (folder / "corpus.txt").write_text("the quick brown fox jumps over the lazy dog " * 60)
    return CompareConfig(
        target=folder / "config.json", corpus=folder / "corpus.txt", out=folder / name, methods=("default",), steps=3,
        seeds=(0,), lrs=(1e-2,), default_scales=(1.0,), batch_size=2, sequence=16, windows=2, workers=1, device="cpu",
        dtype=dtype,
    )  # fmt: skip


def test_bfloat16_is_near_float32_and_not_the_same(tmp_path: Path) -> None:
    runs = {}
    for dtype in ("float32", "bfloat16"):
        compare(config(tmp_path, dtype, dtype), quiet=True)
        results = json.loads((tmp_path / dtype / "results.json").read_text())
        (run,) = (tmp_path / dtype / "runs").iterdir()
        runs[dtype] = json.loads(run.read_text())["losses"]
        assert results["dtype"] == dtype
    exact, rounded = (runs[dtype] for dtype in ("float32", "bfloat16"))
    assert exact != rounded and exact == pytest.approx(rounded, rel=2e-2)
    assert rounded[-1] < rounded[0]


def test_float16_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give float32 or bfloat16"):
        config(tmp_path, "out", "float16")
