"""The walk over all architectures finds mixed-up tensors, and its page says what happened."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from baselines.transfer.weight_selection import WeightSelection
from benchmarks.architectures import walk
from benchmarks.architectures.checks import coded_donor, own_shape, random_donor, same_name_values
from benchmarks.architectures.rotary import rotary_pairs
from benchmarks.architectures.table import write_page
from benchmarks.architectures.tiny_configs import NARROW, tiny_config
from headstart import samplers
from zoo.targets import configs
from zoo.targets.blueprint import Blueprint


class Swapped(WeightSelection):
    """A method that exchanges the two norms of a layer, as a map by role alone does."""

    def sample(self, blueprint: Blueprint, seed: int = 0) -> Iterator[tuple[str, Tensor]]:
        tensors = dict(super().sample(blueprint, seed))
        for name, tensor in tensors.items():
            other = name.replace("input_layernorm", "post_attention_layernorm")
            yield name, tensors[other] if other != name else tensor


def test_a_swap_of_two_norms_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    donor = random_donor(tmp_path / "donor", walk.build_model("causal", tiny_config("llama")))
    coded, codes = coded_donor(tmp_path / "coded", donor)
    target = tiny_config("llama", NARROW).to_dict()
    assert same_name_values(WeightSelection(), coded, codes, target).ok
    found = same_name_values(Swapped(), coded, codes, target)
    assert not found.ok and "model.layers.0.input_layernorm.weight has other values" in found.text
    monkeypatch.setattr(samplers, "get", lambda method: Swapped)
    found = own_shape("weight-selection", donor, tmp_path)
    assert not found.ok and found.text.startswith("2 of 21 tensors differ")


def test_the_row_of_an_architecture() -> None:
    row = walk.walk_architecture(("causal", "llama"))
    assert all(cell["ok"] for cell in row["cells"].values())
    assert {row["cells"][f"own {method}"]["text"] for method in walk.OWN_SHAPE} == {"identity"}
    assert row["cells"]["larger net2wider"]["text"] == "same function"
    assert row["cells"]["rotary pairs"]["text"] == "halves"


def test_other_rotary_pairs_than_the_metadata_says_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "NEIGHBOUR_PAIRS", ())
    outcome = rotary_pairs(walk.build_model("causal", tiny_config("helium")))
    assert not outcome.ok and outcome.text == "neighbours and not as its metadata says"


def test_every_language_model_of_transformers_is_walked() -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    pairs = walk.architectures()
    assert {name for kind, name in pairs if kind == "causal"} == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert {("encoder-decoder", "t5"), ("encoder", "distilbert")} <= set(pairs)


def test_the_page_tells_refusals_from_failures() -> None:
    columns = ["rotary pairs"] + [f"own {m}" for m in walk.OWN_SHAPE] + [f"narrower {m}" for m in walk.NARROWER]
    columns += [f"deeper {m}" for m in walk.DEEPER] + [f"larger {m}" for m in walk.LARGER]
    fine: dict[str, Any] = {column: {"ok": True, "text": "identity"} for column in columns}
    refused = {
        "ok": True,
        "text": "refused: pruning: donor 'coded' does not fit the target: the donor (x) has no heads",
    }
    wrong = {"ok": False, "text": "norm has other values"}
    rows: list[walk.Row] = [
        {"kind": "causal", "architecture": "good", "cells": {**fine, "narrower pruning": refused}},
        {"kind": "encoder", "architecture": "bad", "cells": {**fine, "own pruning": wrong}},
        {"kind": "encoder", "architecture": "odd", "reason": "needs timm"},
    ]
    page = write_page(rows, "transformers 5")
    assert "3 architectures, 2 built. Into the own shape 1 of 2 are the identity" in page and "1 failed" in page
    assert "1. the donor has no heads" in page and "**FAILED** norm has other values" in page
    assert "- `odd`: needs timm" in page


def test_the_committed_page_has_no_failure() -> None:
    page = Path(walk.__file__).parents[1] / "results" / "architectures.md"
    text = page.read_text()
    assert "FAILED" not in text.partition("## Causal")[2] and "cells, 0 failed" in text
