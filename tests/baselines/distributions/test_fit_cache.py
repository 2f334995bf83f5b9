"""Fits that a zoo keeps."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from baselines.distributions.empirical import KDE, Histogram
from baselines.distributions.hybrid import Hybrid
from baselines.distributions.parametric import Normal, StudentT
from baselines.distributions.statistical import Statistical
from zoo.add import add
from zoo.checkpoints.checkpoint import Checkpoint
from zoo.donors.zoo import Zoo, open_standalone
from zoo.targets.blueprint import Blueprint


@pytest.fixture
def filled(tmp_path: Path, tiny_llama: Callable[..., Path]) -> Path:
    add([str(tiny_llama(tmp_path / "llama"))], tmp_path / "zoo", quiet=True)
    return tmp_path / "zoo"


def target_of(zoo: Path, **changes: int) -> Blueprint:
    config = Zoo.open(zoo).donors[0].config
    return Blueprint.from_config({**config, **changes})


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("cls", [Normal, StudentT, Histogram, KDE, Hybrid])
def test_the_second_fit_reads_no_weight_and_draws_the_same(
    filled: Path, cls: type[Statistical], monkeypatch: pytest.MonkeyPatch
) -> None:
    blueprint = target_of(filled)
    first = dict(cls().fit(Zoo.open(filled), blueprint).sample(blueprint, 3))
    monkeypatch.setattr(Checkpoint, "read", lambda *given: pytest.fail("a weight was read"))
    again = cls().fit(Zoo.open(filled), blueprint)
    assert equal(first, dict(again.sample(blueprint, 3))) and again.donors == ("llama",)


def test_another_width_uses_the_fit_and_other_options_do_not(filled: Path) -> None:
    Normal().fit(Zoo.open(filled), target_of(filled))
    Normal().fit(Zoo.open(filled), target_of(filled, intermediate_size=48))
    assert len(list((filled / "fits").iterdir())) == 1
    Normal(granularity="role").fit(Zoo.open(filled), target_of(filled))
    Normal().fit(Zoo.open(filled), target_of(filled, num_hidden_layers=5))
    assert len(list((filled / "fits").iterdir())) == 3


def test_a_donor_of_other_content_is_fitted_anew(filled: Path, tmp_path: Path, tiny_llama: Callable[..., Path]) -> None:
    blueprint = target_of(filled)
    before = dict(Normal().fit(Zoo.open(filled), blueprint).sample(blueprint))
    other = tmp_path / "other"
    add([str(tiny_llama(tmp_path / "x" / "llama", seed=1))], other, quiet=True)
    (filled / "fits").rename(other / "fits")
    assert not equal(before, dict(Normal().fit(Zoo.open(other), blueprint).sample(blueprint)))
    assert len(list((other / "fits").iterdir())) == 2


@pytest.mark.parametrize("damage", [b"", b"{}", b"\xff", None])
def test_a_damaged_fit_is_made_again(filled: Path, damage: bytes | None, caplog: pytest.LogCaptureFixture) -> None:
    blueprint = target_of(filled)
    first = dict(Histogram().fit(Zoo.open(filled), blueprint).sample(blueprint))
    (folder,) = (filled / "fits").iterdir()
    if damage is None:
        (folder / "state.safetensors").unlink()
    else:
        (folder / "sampler.json").write_bytes(damage)
    with caplog.at_level(logging.WARNING):
        assert equal(first, dict(Histogram().fit(Zoo.open(filled), blueprint).sample(blueprint)))
    assert "it is fitted again" in caplog.text
    caplog.clear()
    Histogram().fit(Zoo.open(filled), blueprint)
    assert not caplog.text  # the mended fit replaced the damaged one


def test_a_zoo_that_cannot_be_written_is_used(filled: Path) -> None:
    (filled / "fits").write_text("in the way")
    blueprint = target_of(filled)
    assert dict(Normal().fit(Zoo.open(filled), blueprint).sample(blueprint))


def test_a_part_of_the_target_is_fitted_alone_and_not_kept(filled: Path) -> None:
    blueprint = target_of(filled)
    whole = dict(StudentT().fit(Zoo.open(filled), blueprint).sample(blueprint))
    (folder,) = (filled / "fits").iterdir()
    shares = [frozenset(blueprint.names[::2]), frozenset(blueprint.names[1::2])]
    drawn = {}
    for share in shares:
        sampler = StudentT()
        sampler.only = share
        got = dict(sampler.fit(Zoo.open(filled), blueprint).sample(blueprint))
        assert got.keys() == share
        drawn |= got
    assert equal(whole, {name: drawn[name] for name in whole})
    assert list((filled / "fits").iterdir()) == [folder]


def test_a_donor_outside_a_zoo_keeps_nothing(tmp_path: Path, tiny_llama: Callable[..., Path]) -> None:
    folder = tiny_llama(tmp_path / "llama")
    zoo = open_standalone(folder)
    Normal().fit(zoo, zoo.donors[0].blueprint)
    assert not (folder / "fits").exists()
