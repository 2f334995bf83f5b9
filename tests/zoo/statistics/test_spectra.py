"""Singular values against torch's SVD, the edge of noise by counting, alpha against powerlaw and WeightWatcher."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.speed import spectra as benchmark
from zoo.checkpoints.checkpoint import Checkpoint
from zoo.statistics.spectra import (
    marchenko_pastur,
    singular_values,
    spectrum_summary,
    top_singular_values,
    tracy_widom_edge,
)

SIDE, RANK = 768, 48


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def planted(values: Tensor, seed: int = 0) -> Tensor:
    """A square matrix of these singular values."""
    n = len(values)
    left, right = (torch.linalg.qr(draw(n, n, seed=seed + i))[0] for i in (1, 2))
    return (left * values) @ right.mT


index = torch.arange(1, SIDE + 1.0)
MATRICES: dict[str, Callable[[], Tensor]] = {
    "noise": lambda: draw(SIDE, SIDE),  # a flat edge: the hardest for Krylov
    "wide noise": lambda: draw(SIDE, 2000),
    "tall noise": lambda: draw(2000, SIDE),
    "power law": lambda: planted(index**-0.7),
    "steep": lambda: planted(index**-2.0),
    "too steep for float32": lambda: planted(index**-4.0),
    "a cliff": lambda: planted(torch.where(index <= 10, 1.0, 1e-6)),
    "flat": lambda: planted(1 - index / 1e5),
    "low rank and noise": lambda: draw(SIDE, 40) @ draw(40, SIDE, seed=1) / 8 + draw(SIDE, SIDE, seed=2),
    "heavy-tailed entries": lambda: draw(SIDE, SIDE) / draw(SIDE, SIDE, seed=1).abs(),
    "orthogonal": lambda: planted(torch.ones(SIDE)),
    "many equal": lambda: planted(1.0 + (index < RANK * 0.8)),
    "identity": lambda: torch.eye(SIDE),
    "transposed": lambda: draw(SIDE, 900).mT,
    "tiny": lambda: draw(SIDE, SIDE) * 1e-12,
    "bfloat16": lambda: draw(SIDE, SIDE).bfloat16(),
}


@pytest.mark.parametrize("name", MATRICES)
def test_singular_values_are_those_of_an_svd(name: str) -> None:
    matrix = MATRICES[name]()
    expected = torch.linalg.svdvals(matrix.double())
    found = singular_values(matrix)
    assert found.dtype == torch.float64 and found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-7 * expected[0].item())
    top = top_singular_values(matrix, RANK)
    assert top.dtype == torch.float64 and top.shape == (RANK,)
    assert ((top - expected[:RANK]).abs() / expected[:RANK]).max() < 1e-3
    assert top.equal(top_singular_values(matrix, RANK))  # and no state of torch's generator in it
    assert (top.diff() <= 0).all() and (found.diff() <= 0).all()


@pytest.mark.parametrize("name", ["noise", "power law", "flat", "low rank and noise", "orthogonal", "many equal"])
def test_a_krylov_basis_is_what_finds_the_top_of_a_large_matrix(name: str) -> None:
    """Or the test above would compare the Gram matrix with itself: to the last bit it is not the same."""
    matrix = MATRICES[name]()
    assert not top_singular_values(matrix, RANK).equal(singular_values(matrix)[:RANK])


@pytest.mark.parametrize("rank", [10, 40, 60])
def test_ranks_beyond_that_of_the_matrix(rank: int) -> None:
    matrix = torch.zeros(1000, 1000)
    matrix[:, :40] = draw(1000, 40)
    expected = torch.linalg.svdvals(matrix.double())[:rank]
    torch.testing.assert_close(top_singular_values(matrix, rank), expected, rtol=1e-3, atol=1e-6)
    assert not top_singular_values(torch.zeros(1000, 1000), rank).any()


def test_a_rank_above_the_smaller_side_is_cut() -> None:
    assert top_singular_values(draw(20, 30), 64).shape == (20,)


@pytest.mark.parametrize("shape", [(400, 400), (400, 100), (150, 900)])
def test_noise_ends_at_the_marchenko_pastur_edges(shape: tuple[int, int]) -> None:
    low, high = marchenko_pastur(*shape, 0.02)
    found = torch.linalg.svdvals(0.02 * draw(*shape).double())
    assert found[0] == pytest.approx(high, rel=0.02)
    assert found[-1] == pytest.approx(low, abs=0.02 * high)
    assert marchenko_pastur(100, 100, 1.0) == (0.0, 20.0)


@pytest.mark.parametrize("shape", [(50, 50), (80, 40), (150, 20), (10, 60)])
def test_noise_passes_the_tracy_widom_edge_once_in_a_thousand(shape: tuple[int, int]) -> None:
    top = torch.linalg.svdvals(draw(4000, *shape))[:, 0]
    assert 0 <= (top > tracy_widom_edge(*shape, 1.0)).sum() <= 12  # 4 expected; 13 once in 3,000
    width = tracy_widom_edge(*shape, 1.0) - top.mean()
    assert (top > top.mean() + width / 2).sum() > 40  # nor is the edge far away from what noise does


@pytest.mark.parametrize("shape", [(200, 200), (400, 100), (64, 256)])
def test_noise_has_no_outliers_and_planted_spikes_are_found(shape: tuple[int, int]) -> None:
    false = sum(spectrum_summary(0.02 * draw(*shape, seed=seed))["outliers"] for seed in range(40))
    assert false <= 1
    left, right = (torch.linalg.qr(draw(side, 3, seed=side))[0] for side in shape)
    edge = marchenko_pastur(*shape, 1.0)[1]
    spikes = torch.tensor([1.6, 1.8, 2.0]) * edge
    found = spectrum_summary(draw(*shape) + (left * spikes) @ right.mT)
    assert found["outliers"] == 3
    assert found["edge"] > 1.3


def test_numbers_of_a_known_spectrum() -> None:
    values = torch.tensor([3.0, 2.0, *[1.0] * 14])
    found = spectrum_summary(planted(values))
    assert found["rank_max"] == 16
    assert found["norm"] == pytest.approx(math.sqrt(27), rel=1e-5)
    assert found["top"] == pytest.approx(3, rel=1e-5)
    assert found["stable_rank"] == pytest.approx(3, rel=1e-5)
    std = math.sqrt(27) / 16
    assert found["edge"] == pytest.approx(3 / (std * 8), rel=1e-5)


def test_the_exponent_of_a_planted_power_law() -> None:
    """Eigenvalues at the quantiles of a law of density x^-3: alpha is 3, and 5 for the singular values."""
    quantile = (torch.arange(400, dtype=torch.float64) + 0.5) / 400
    found = spectrum_summary(planted((1 - quantile).pow(-1 / 4).float()))
    assert found["alpha"] == pytest.approx(3, abs=0.15)
    assert found["alpha_density_of_singular_values"] == 2 * found["alpha"] - 1
    assert found["alpha_weighted"] == pytest.approx(found["alpha"] * math.log10(found["top"] ** 2))


def test_zero_singular_values_are_left_out_of_the_tail() -> None:
    matrix = draw(60, 20) @ draw(20, 90, seed=1)
    assert spectrum_summary(matrix)["alpha"] == pytest.approx(
        spectrum_summary(torch.linalg.qr(matrix.mT)[1])["alpha"], rel=1e-3
    )
    values = torch.linalg.svdvals(matrix.double())[:20]
    assert spectrum_summary(matrix)["alpha"] == pytest.approx(powerlaw_alpha(values.square()), abs=1e-3)


def test_statistics_that_need_a_larger_matrix_are_none() -> None:
    assert spectrum_summary(draw(8, 30))["alpha"] is None and spectrum_summary(draw(8, 30))["edge"] > 0
    nothing = spectrum_summary(torch.zeros(20, 30))
    assert nothing["edge"] is None and nothing["stable_rank"] is None and nothing["outliers"] == 0
    assert spectrum_summary(torch.eye(30))["alpha"] is None  # one value thirty times


def powerlaw_alpha(values: Tensor) -> float:
    import powerlaw

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return powerlaw.Fit(values.numpy(), parameter_ranges={"alpha": [1.01, 20]}, verbose=0).alpha


def matrices(folder: Path) -> dict[str, Tensor]:
    checkpoint = Checkpoint.open(folder)
    return {name: checkpoint.read(name) for name, entry in checkpoint.entries.items() if len(entry.shape) == 2}


@pytest.mark.parametrize("model", ["stories260K", "babyllama-tok105", "arthur/run2-ep200"])
def test_alpha_is_that_of_powerlaw(shared_data: Path, model: str) -> None:
    found = list(matrices(shared_data / "models" / model).items())[::4]
    assert len(found) > 4
    for name, matrix in found:
        expected = powerlaw_alpha(torch.linalg.svdvals(matrix.double()).square())
        assert spectrum_summary(matrix)["alpha"] == pytest.approx(expected, abs=1e-3), name


@pytest.mark.parametrize("model", ["stories260K", "arthur/run2-ep200"])
def test_alpha_is_that_of_weightwatcher(shared_data: Path, model: str) -> None:
    weightwatcher = pytest.importorskip("weightwatcher", reason="weightwatcher is not installed")
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(shared_data / "models" / model)
    modules = dict(network.named_modules())
    rows = weightwatcher.WeightWatcher(model=network).analyze().to_dict("records")
    assert len(rows) > 15
    for row in rows:
        found = spectrum_summary(modules[row["longname"]].weight.detach())
        assert found["alpha"] == pytest.approx(row["alpha"], abs=1e-3), row["longname"]
        assert found["alpha_weighted"] == pytest.approx(row["alpha_weighted"], abs=1e-2)
        assert found["stable_rank"] == pytest.approx(row["stable_rank"], rel=1e-3)


def test_trained_matrices_have_singular_values_above_noise(shared_data: Path) -> None:
    trained = matrices(shared_data / "models" / "stories260K")
    inner = {name: matrix for name, matrix in trained.items() if "layers" in name}
    found = [spectrum_summary(matrix) for matrix in inner.values()]
    noise = [spectrum_summary(draw(*matrix.shape, seed=i)) for i, matrix in enumerate(inner.values())]
    assert sum(s["outliers"] > 0 for s in found) > 0.8 * len(found)
    assert sum(s["outliers"] > 0 for s in noise) == 0


def test_the_benchmark_is_shown_as_committed_and_the_top_is_five_times_cheaper() -> None:
    figures = json.loads(benchmark.RESULTS.read_text())
    assert benchmark.table(figures["rows"]) in (benchmark.paths.RESULTS / "tables.md").read_text()
    assert (figures["side"], figures["rank"]) == (4096, 256)
    for row in figures["rows"]:
        assert row["error"] < 1e-3 and row["seconds"]["svd"] > 5 * row["seconds"]["top"], row["matrix"]
