"""Scores that a zoo keeps."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from baselines.transfer.shrinking import kept_scores
from baselines.transfer.shrinking.importance import Scores, score_by_weights
from baselines.transfer.shrinking.kept_scores import kept_or_scored
from tests.support.shaken import CONFIGS, build
from zoo.add import add
from zoo.donors.donor import Donor
from zoo.donors.zoo import Zoo


def equal(a: Scores, b: Scores) -> bool:
    tensors = [kept_scores._tensors(scores) for scores in (a, b)]
    return tensors[0].keys() == tensors[1].keys() and all(torch.equal(tensors[0][n], tensors[1][n]) for n in tensors[0])


@pytest.fixture(params=["llama", "gpt2", "mixtral", "gemma3_text"])
def donor(tmp_path: Path, request: pytest.FixtureRequest) -> Donor:
    build(CONFIGS[request.param]).save_pretrained(tmp_path / "donor")
    add([str(tmp_path / "donor")], tmp_path / "zoo", quiet=True, health=False)
    return Zoo.open(tmp_path / "zoo").donors[0]


def test_kept_scores_are_the_scores(donor: Donor, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = score_by_weights(donor)
    assert equal(kept_or_scored(donor, "cpu"), wanted)
    monkeypatch.setattr(kept_scores, "score_by_weights", lambda *given: pytest.fail("scored again"))
    assert equal(kept_or_scored(donor, "cpu"), wanted)


@pytest.mark.parametrize("damage", ["bytes", "missing", "shape", "nan"])
def test_damaged_scores_are_computed_again(
    tmp_path: Path, tiny_llama: Callable[..., Path], damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    add([str(tiny_llama(tmp_path / "llama"))], tmp_path / "zoo", quiet=True, health=False)
    donor = Zoo.open(tmp_path / "zoo").donors[0]
    wanted = kept_or_scored(donor, "cpu")
    (path,) = (tmp_path / "zoo" / "fits").iterdir()
    tensors = load_file(path)
    if damage == "bytes":
        path.write_bytes(path.read_bytes()[:-8])
    elif damage == "missing":
        save_file({name: tensor for name, tensor in tensors.items() if name != "heads"}, path)
    elif damage == "shape":
        save_file(tensors | {"residual": torch.ones(3, dtype=torch.float64)}, path)
    else:
        save_file(tensors | {"residual": torch.full_like(tensors["residual"], torch.nan)}, path)
    with caplog.at_level(logging.WARNING):
        assert equal(kept_or_scored(donor, "cpu"), wanted)
    assert "it is computed again" in caplog.text
    assert equal(kept_scores._read(path, donor), wanted)
