"""Access to what analysis.json holds of one donor: matrices, spectra, and verdicts on pairs of projections."""

from __future__ import annotations

from collections import Counter
from statistics import median
from typing import Any

Results = dict[str, Any]
Model = dict[str, Any]  # results["models"][name]

# Verdicts on a pair of projections, as zoo.statistics.goodness gives them.
POWER_LAW, NO_POWER_LAW, UNDECIDED = "power law", "not a power law", "undecided"
NULL_LABELS = {"gaussian": "Gaussian matrices", "spikes": "Gaussian with random spikes"}
ROW_COLUMN_TESTS = {
    "row_spread": "row energies",
    "column_spread": "column energies",
    "row_correlation": "row correlation",
}


def is_measured(part: Any) -> bool:
    """Whether a part was measured; otherwise it is {"why": reason}."""
    return "why" not in part


def matrix_entries(part: dict[str, Any]) -> list[dict[str, Any]]:
    """The entries of `marginals` that are matrices (not gains or biases)."""
    return [t for t in part.get("tensors", {}).values() if len(t["shape"]) > 1]


def matrices_with_kurtosis(model: Model) -> list[dict[str, Any]]:
    return [t for t in matrix_entries(model["marginals"]) if t.get("kurtosis") is not None]


def layer_indices(model: Model) -> set[int]:
    return {t["layer"] for t in matrix_entries(model["marginals"]) if t["layer"] is not None}


def spectrum_entries(model: Model) -> list[dict[str, Any]]:
    """One entry for each matrix; empty where spectra were not measured."""
    return list(model["spectra"].get("tensors", {}).values())


def matrices_above_noise(model: Model) -> tuple[int, int]:
    """(matrices with singular values above the edge of noise, matrices measured)."""
    measured = [t for t in spectrum_entries(model) if t.get("outliers") is not None]
    return sum(t["outliers"] > 0 for t in measured), len(measured)


def noise_alpha(spectrum: dict[str, Any]) -> float | None:
    """The exponent of the random matrix of the same shape."""
    alpha: float | None = spectrum.get("noise", {}).get("alpha")
    return alpha


def alphas_with_noise(model: Model) -> list[tuple[float, float]]:
    """(exponent, exponent of the random matrix) of the matrices that have both."""
    pairs = [(t.get("alpha"), noise_alpha(t)) for t in spectrum_entries(model)]
    return [(alpha, noise) for alpha, noise in pairs if alpha is not None and noise is not None]


def median_kurtosis(model: Model) -> float | None:
    known = [t["kurtosis"] for t in matrices_with_kurtosis(model)]
    return median(known) if known else None


def median_alpha(model: Model) -> float | None:
    known = [t["alpha"] for t in spectrum_entries(model) if t.get("alpha") is not None]
    return median(known) if known else None


def smallest_rank(model: Model) -> str:
    return min(model["dsv"], key=int)


def count_pairs(model: Model, rank: str) -> int:
    return len(model["dsv"][rank]["pairs"])


def count_verdicts(model: Model, rank: str, null: str | None = None) -> Counter[str]:
    """How many pairs of projections get each verdict, in the donor or in a kind of random matrices."""
    found = model["dsv"][rank]
    return Counter(row["verdict"] for row in (found["pairs"] if null is None else found["nulls"][null]))


def is_mostly_undecided(model: Model, rank: str) -> bool:
    """Whether most pairs of projections have too few distances for a verdict."""
    return 2 * count_verdicts(model, rank)[UNDECIDED] > count_pairs(model, rank)
