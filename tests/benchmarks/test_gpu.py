"""The script for a GPU, with the CPU in its place and small models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from zoo.donors.zoo import Zoo

DONOR = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALLER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 16}


@pytest.fixture
def zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Zoo:
    monkeypatch.setattr(gpu, "DONOR", gpu.DONOR | DONOR | {"num_key_value_heads": 2})
    monkeypatch.setattr(gpu, "SMALLER", SMALLER | {"num_key_value_heads": 1})
    monkeypatch.setattr(gpu, "COMPARED", ("default", "row-column"))
    monkeypatch.setitem(gpu.TARGETS, "stacking", {"num_hidden_layers": 1})
    return gpu.write_donor(tmp_path / "donor")


def test_the_page_names_what_passes_fails_and_is_left_out(zoo: Zoo, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("one and two and three. " * 200)
    rows = [gpu.method_row(name, zoo, text, "cpu") for name in ("normal", "row-column", "stacking")]
    assert [row.get("kind") for row in rows] == ["equal", "equal", None]
    assert "would shrink" in rows[2]["error"]
    compared = gpu.compare_rows(tmp_path, zoo, text, "cpu")
    assert compared[0]["losses"] == compared[2]["losses"] != compared[1]["losses"]
    written = gpu.page("a card", rows, compared, ["sliced"])
    assert "| normal | " in written and "| stacking | fails: UserError" in written and "time: sliced." in written


def test_a_wrong_scale_and_a_wrong_choice_are_differences() -> None:
    draws = {seed: torch.randn(300, 200, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)}
    assert gpu.difference({"a": draws[0]}, {"a": draws[0] * (1 + 1e-6)})[0] == "equal"
    kind, gap = gpu.difference({"a": draws[0]}, {"a": draws[1]})
    assert kind == "drawn" and gap < gpu.SPREAD
    kind, gap = gpu.difference({"a": draws[0]}, {"a": draws[1] * 1.1})
    assert kind == "drawn" and gap > gpu.SPREAD
