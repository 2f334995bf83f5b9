"""Measurements of real models, on tiny ones: their values, and pages that are written from the committed figures."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import paths
from benchmarks.real.row_column.laws import HALVES, NEXT, Comparison, energy_test, measure_comparison, unit_features
from benchmarks.real.row_column.page import write_page as row_column_page
from benchmarks.real.row_column.statistics import GROUPS, correlation_pattern, measure_statistics
from benchmarks.real.singular_vectors.measure import (
    DEFAULT_INIT,
    OWN,
    PUBLISHED,
    Stacks,
    compare_layers,
    exponents_by_xmin,
    measure_adapters,
)
from benchmarks.real.singular_vectors.page import write_page as singular_vectors_page
from tests.conftest import make_llama
from zoo.donors.folder import StandaloneDonor
from zoo.statistics.power_law import fit_power_law
from zoo.statistics.similarity import pooled_distances
from zoo.units.aligned import read_donor_decoder
from zoo.units.canonical import canonicalise
from zoo.units.gains import fold_gains


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained Llama of five layers whose norms have gains."""
    return make_llama(tmp_path_factory.mktemp("real") / "model", num_hidden_layers=5)


@pytest.mark.parametrize(
    ("name", "write"), [("real_singular_vectors", singular_vectors_page), ("real_row_column", row_column_page)]
)
def test_pages_are_written_from_the_committed_figures(name: str, write: Any) -> None:
    facts = json.loads((paths.RESULTS / f"{name}.json").read_text())
    page = (paths.RESULTS / f"{name}.md").read_text()
    assert write(facts) == page
    for line in page.splitlines():
        if line.startswith("!["):
            assert (paths.RESULTS / line.partition("(")[2].rstrip(")")).is_file()


def test_exponents_above_a_fixed_xmin_are_those_of_maximum_likelihood() -> None:
    values = np.sort((1 - np.random.default_rng(0).random(4000)) ** (-1 / 1.5))
    found = exponents_by_xmin(values)
    assert found["1"] == pytest.approx(2.5, abs=0.1) and found["0.5"] == pytest.approx(2.5, abs=0.15)
    tail = values[2000:]
    assert found["0.5"] == pytest.approx(1 + 2000 / np.log(tail / tail[0]).sum())


def test_layers_of_a_model_and_of_random_matrices_are_compared(model: Path) -> None:
    stacks = Stacks.of_donor(StandaloneDonor.open(model, quiet=True))
    assert stacks.rank(256) == 16 and set(stacks.by_kind) == {OWN, "gaussian", "spikes"}
    found = compare_layers(stacks.by_kind[OWN], 16, bootstraps=5)
    assert len(found["pairs"]) == 28 and found["pooled"]["n"] == 35 * 34 / 2
    values = pooled_distances(stacks.by_kind[OWN], 16).values
    assert found["pooled"]["alpha"] == pytest.approx(fit_power_law(values).alpha)
    assert found["grouping"]["exponent"] == round(found["pooled"]["alpha"], 2)


def test_adapters_are_measured_on_their_own_singular_values(model: Path) -> None:
    stacks = Stacks.of_donor(StandaloneDonor.open(model, quiet=True)).by_kind[OWN]
    found = measure_adapters(model, stacks, PUBLISHED, bootstraps=1, seeds=(0,))
    assert set(found) == {"pareto", "pareto, nmin=1", DEFAULT_INIT}
    for init, entry in found.items():
        assert len(entry["verdicts"]) == 28
        assert (entry["0"]["b"] is None) == (init == DEFAULT_INIT)  # its B is zero
        assert all(0 <= entry["0"][side]["ks"] <= 1 for side in ("a", "entries"))
    spread = {init: entry["0"]["entries"]["median"] for init, entry in found.items()}
    assert spread["pareto"] < 0.99 < spread[DEFAULT_INIT] < 1.05  # independent entries have a cosine of 0


def test_statistics_of_every_matrix_and_the_pattern_of_planted_rows(model: Path) -> None:
    found = measure_statistics(model)
    assert len(found["tensors"]) == 5 * 7 + 1 and found["patterns"]["layer"] == 2
    assert {len(row) for row in found["tensors"]} == {len(found["columns"])} == {11}
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(64, 400, generator=generator)
    free = correlation_pattern(noise, is_sorted=False)
    assert free.shape == (GROUPS, GROUPS) and float(free.mean()) == pytest.approx(math.sqrt(2 / math.pi), abs=0.05)
    noise[:4] += 2 * torch.randn(400, generator=generator)  # the first group has a direction in common
    planted = correlation_pattern(noise, is_sorted=False)
    assert float(planted[0, 0]) > 0.7 * 20 and float(planted[1:, 1:].mean()) == pytest.approx(0.8, abs=0.05)
    assert int(correlation_pattern(noise, is_sorted=True).argmax()) == 0  # it has the most energy


def test_equal_laws_are_told_from_different_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    draw = lambda shift: torch.randn(80, 3, generator=generator) + shift  # noqa: E731
    same = [energy_test(draw(0.0), draw(0.0), 49, generator) for _ in range(20)]
    assert np.mean([coefficient for coefficient, _ in same]) == pytest.approx(0.0, abs=0.01)
    assert sum(p <= 0.1 for _, p in same) <= 6
    apart = energy_test(draw(0.0), draw(3.0), 49, generator)
    assert apart[0] > 0.5 and apart[1] == 0.02


def test_features_of_units_are_those_of_canonical_form(model: Path) -> None:
    """Rotated to the principal axes, with heads and neurons in another order and with other signs."""
    decoder = read_donor_decoder(StandaloneDonor.open(model, quiet=True))
    canonical = canonicalise(decoder).decoder
    folded = fold_gains(decoder)[0]
    for own, other in zip(folded.layers, canonical.layers, strict=True):
        for kind, found in unit_features(own, decoder.metadata).items():
            expected = unit_features(other, decoder.metadata)[kind]
            assert torch.allclose(found.sort(dim=0).values, expected.sort(dim=0).values, rtol=1e-6, atol=1e-8), kind


def test_a_donor_shares_its_law_with_itself(model: Path) -> None:
    halves = measure_comparison(Comparison(model, HALVES))
    assert halves["neuron"]["as_is"]["layers"] == 5 and abs(halves["neuron"]["as_is"]["coefficient"]) < 0.1
    assert measure_comparison(Comparison(model, NEXT))["value"]["scale_free"]["layers"] == 4
