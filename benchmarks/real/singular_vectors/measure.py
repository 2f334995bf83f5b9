"""Distances between the singular values of layers: of a real model, of random matrices, and of adapters."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import ks_2samp
from torch import Tensor

from headstart import samplers
from headstart.analyze.parts import projection_shapes
from zoo.donors.donor import Donor
from zoo.statistics.goodness import assess_power_law
from zoo.statistics.grouping import Grouping, group_projections
from zoo.statistics.power_law import fit_power_law
from zoo.statistics.similarity import (
    compare_projections,
    fit_pooled_distances,
    null_model_stacks,
    pooled_distances,
    singular_value_stacks,
)
from zoo.streams import stream_seed
from zoo.targets.blueprint import Blueprint

RANKS = (16, 64, 256)  # those of the paper
OWN, NULLS = "own", ("gaussian", "spikes")
BOOTSTRAPS = 200
XMIN_SHARES = (1.0, 0.9, 0.75, 0.5, 0.25, 0.1, 0.05)  # of the distances that lie above a fixed xmin
PAIR_COLUMNS = (
    "a", "b", "n", "alpha", "xmin", "tail", "distance", "p", "p_pairs", "worth", "skewness", "verdict", "why",
)  # fmt: skip
SEEDS = (0, 1, 2)  # of adapters
PAPER = "the paper's example"
# Reported for LLaMA 3.2 1B: V and gate, gate and up, gate and down are no power laws; the exponent is 1.78.
PUBLISHED_EXPONENT = 1.78
PUBLISHED = Grouping(
    16, "mlp.gate", ("attn.v", "mlp.up", "mlp.down"), ("attn.q", "attn.k", "attn.o"), False, exponent=PUBLISHED_EXPONENT
)
INITS: dict[str, tuple[str, dict[str, Any]]] = {
    "pareto": ("pareto", {}),
    "pareto, nmin=1": ("pareto", {"nmin": 1}),
    "peft-default": ("peft-default", {}),
}
DEFAULT_INIT = "peft-default"


@dataclass(frozen=True)
class Stacks:
    """The singular values of a donor and of random matrices of its shapes: projection -> [layers, r]."""

    donor: Donor
    by_kind: dict[str, dict[str, Tensor]]

    @classmethod
    def of_donor(cls, donor: Donor, seed: int = 0) -> Stacks:
        """Reads one tensor of the donor at a time. Ranks above its smallest projection are reduced to that."""
        own = singular_value_stacks(donor, RANKS)
        rank = next(iter(own.values())).shape[1]
        nulls = {kind: null_model_stacks(projection_shapes(donor), rank, kind, seed) for kind in NULLS}
        return cls(donor, {OWN: own, **nulls})

    def rank(self, asked: int) -> int:
        """How many singular values are compared where `asked` are wanted."""
        return min(asked, next(iter(self.by_kind[OWN].values())).shape[1])


def compare_layers(stacks: dict[str, Tensor], rank: int, bootstraps: int = BOOTSTRAPS) -> dict[str, Any]:
    """{pairs: one row per pair of projections, pooled: of all vectors, grouping} by the full protocol.

    pooled holds the columns of a pair, ccdf, and `by_xmin`: the exponent above the xmin that leaves each of
    XMIN_SHARES."""
    rows = compare_projections(stacks, rank, bootstraps)
    sample = pooled_distances(stacks, rank)
    rng = np.random.default_rng(stream_seed(0, f"pooled/{rank}"))
    fitted = fit_pooled_distances(stacks, rank)
    pooled = fitted | assess_power_law(sample, bootstraps, rng)
    kept = {key: pooled.get(key) for key in PAIR_COLUMNS if key not in ("a", "b")}
    return {
        "pairs": [{key: row[key] for key in PAIR_COLUMNS} for row in rows],
        "pooled": kept | {"ccdf": fitted["ccdf"], "by_xmin": exponents_by_xmin(sample.values)},
        "grouping": group_projections(rows, rank, alpha=fitted["alpha"]).to_json(),
    }


def exponents_by_xmin(values: NDArray[np.float64]) -> dict[str, float]:
    """Share of the values above xmin -> maximum likelihood exponent of these. values: ascending, positive."""
    found = {}
    for share in XMIN_SHARES:
        tail = values[len(values) - max(2, round(share * len(values))) :]
        found[f"{share:g}"] = tail_exponent(tail)
    return found


def tail_exponent(tail: NDArray[np.float64]) -> float:
    """The maximum likelihood exponent of a power law above the first of these values: ascending, positive."""
    return float(1 + 1 / np.log(tail / tail[0]).mean())


def measure_adapters(
    base: Path,
    stacks: dict[str, Tensor],
    grouping: Grouping,
    bootstraps: int = BOOTSTRAPS,
    seeds: tuple[int, ...] = SEEDS,
) -> dict[str, Any]:
    """init -> {seed -> measurements, verdicts}: what adapters of rank 16 on `base` show on their own A and B.

    stacks, grouping: those of the reference, or PUBLISHED and any stacks. See `measure_adapter`."""
    rank = grouping.rank
    blueprint = Blueprint.from_lora(base, {"r": rank, "target_modules": "all-linear"})
    reference = pooled_distances(stacks, rank).values
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "analysis.json"
        path.write_text(json.dumps({"models": {"reference": {"grouping": {str(rank): grouping.to_json()}}}}))
        for init, (method, options) in INITS.items():
            own = {} if method == DEFAULT_INIT else {
                "reference_model": str(path), "reference_rank": rank, "strategy": "both_compensated"
            }  # fmt: skip
            sampler = samplers.get(method)(**own, **options).fit(None, blueprint)
            for seed in seeds:
                tensors = dict(sampler.sample(blueprint, seed))
                entry = found.setdefault(init, {})
                entry[str(seed)] = measure_adapter(tensors, blueprint, reference)
                if seed == seeds[0]:
                    entry["verdicts"] = _verdicts(adapter_stacks(tensors, blueprint), rank, bootstraps)
    return found


def measure_adapter(tensors: dict[str, Tensor], blueprint: Blueprint, reference: NDArray[np.float64]) -> dict[str, Any]:
    """{a, b: of the singular values of A and of B, entries: of the flattened A}: {alpha, tail (a share), alpha_of_half,
    median, ks}.

    Only matrices of the most common shape count, because singular values of random matrices of different shapes
    differ by the shapes alone. ks: the two-sample Kolmogorov-Smirnov distance between these distances and those of the
    reference, each divided by its median. alpha_of_half: the exponent of the larger half. B is None where it is
    zero."""
    assert blueprint.adapter is not None
    matrices = {
        side: _most_common([tensors[getattr(pair, side)].double() for pair in blueprint.adapter.pairs])
        for side in ("a", "b")
    }
    found: dict[str, Any] = {"entries": _distances_of(matrices["a"].flatten(1), reference)}
    for side, stack in matrices.items():
        found[side] = _distances_of(torch.linalg.svdvals(stack), reference) if stack.any() else None
    return found


def _most_common(matrices: list[Tensor]) -> Tensor:
    """The matrices of the most common shape, [n, rows, columns]; of equally common shapes, those of the first."""
    shapes = [m.shape for m in matrices]
    shape = max(dict.fromkeys(shapes), key=shapes.count)
    return torch.stack([m for m in matrices if m.shape == shape])


def adapter_stacks(tensors: dict[str, Tensor], blueprint: Blueprint) -> dict[str, Tensor]:
    """projection -> singular values [layers, rank] of A of all pairs."""
    assert blueprint.adapter is not None
    stacks: dict[str, list[Tensor]] = {}
    for pair in blueprint.adapter.pairs:
        role = blueprint.adapter.base[pair.weight].parts[0].role
        stacks.setdefault(role, []).append(torch.linalg.svdvals(tensors[pair.a].double()))
    return {role: torch.stack(rows) for role, rows in stacks.items()}


def _distances_of(vectors: Tensor, reference: NDArray[np.float64]) -> dict[str, Any]:
    values = pooled_distances({"vectors": vectors}, vectors.shape[1]).values
    law = fit_power_law(values, 2000)
    ks = ks_2samp(values / np.median(values), reference / np.median(reference)).statistic
    return {
        "alpha": law.alpha,
        "tail": law.tail / len(values),
        "alpha_of_half": tail_exponent(values[len(values) // 2 :]),
        "median": float(np.median(values)),
        "ks": float(ks),
    }


def _verdicts(stacks: dict[str, Tensor], rank: int, bootstraps: int) -> dict[str, str]:
    """`a b` -> verdict of all pairs of projections."""
    rows = compare_projections(stacks, rank, bootstraps)
    return {f"{row['a']} {row['b']}": row["verdict"] for row in rows}
