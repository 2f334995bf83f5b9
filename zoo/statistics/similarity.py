"""Similarity of the layers of a donor: cosine distances between their singular values (arXiv 2509.00046).

SV: the largest r singular values of a projection in one layer, descending. MSV: those of all layers, [L, r]. DSV:
1 - cos of all pairs of layers, of one projection or of two."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import eigvalsh_tridiagonal
from scipy.stats import skew
from torch import Tensor

from zoo.donors.donor import Donor
from zoo.errors import UserError, unknown
from zoo.statistics.goodness import DistanceSample, assess_power_law
from zoo.statistics.power_law import MIN_DISTINCT_VALUES, fit_power_law
from zoo.statistics.spectra import top_singular_values
from zoo.streams import stream, stream_seed
from zoo.tensors import TensorSpec, split_parts

PROJECTIONS = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down")
MIN_LAYERS = 3
MIN_DISTANCE = 1e-12  # Our choice: smaller distances are those of a layer to itself.
MOST_BISECTED = 256  # side of a matrix whose singular values are found by bisection
POOLED_CANDIDATES = 2000  # values of xmin to try for all vectors of a model; all of them take minutes for 80 layers
SPIKE_EXPONENT = 0.78  # Pareto exponent of the number of spikes in a matrix of the null model, as published


def singular_value_stacks(
    donor: Donor, ranks: Sequence[int], device: str = "cpu", progress: Callable[[int], None] | None = None
) -> dict[str, Tensor]:
    """projection -> MSV [L, r], float64 on the CPU, layers in ascending order.

    r is the largest of `ranks`, or the smallest side of any of these matrices if that is smaller, because vectors of
    different length have no cosine. Missing are experts, projections that the architecture lacks, and those in fewer
    than three layers. One tensor is read at a time; fused ones are split. progress is called with 1 for every
    tensor.

    Raises UserError for a donor without recognisable projections or with fewer than three layers, before anything is
    read, and for a constant or non-finite matrix."""
    specs = projection_tensors(donor)
    rank = common_rank(specs, ranks)
    found: dict[str, list[Tensor]] = {role: [] for role in PROJECTIONS}
    for spec in specs:
        for role, matrix in split_parts(spec, donor.read(spec.name, torch.float32)).items():
            if role in PROJECTIONS:
                if matrix.min() == matrix.max():
                    raise constant_projection(donor, spec, role)
                found[role].append(top_singular_values(matrix.to(device), rank).cpu())
        if progress is not None:
            progress(1)
    return {role: torch.stack(rows) for role, rows in found.items() if len(rows) >= MIN_LAYERS}


def null_model_stacks(shapes: dict[str, list[tuple[int, int]]], rank: int, kind: str, seed: int) -> dict[str, Tensor]:
    """What `singular_value_stacks` gives for independent random matrices: a null model without learning.

    shapes: projection -> [rows, columns] of each layer. kind `gaussian`: independent normal entries; the singular
    values come from a bidiagonal matrix of chi variables that has the same distribution (Silverstein 1985). kind
    `spikes`: such a matrix plus k spikes of rank one in random directions, k = floor(U^(-1/0.78)) and at most the
    smaller side. Each spike has strength U(1, 4) times sqrt(rows) + sqrt(columns), the edge of the noise."""
    if kind not in NULL_MODELS:
        raise unknown("kind of random matrices", kind, NULL_MODELS)
    found = {}
    for role, sizes in shapes.items():
        rows = [null_model_spectrum(kind, size, rank, seed, (role, layer)) for layer, size in enumerate(sizes)]
        found[role] = torch.stack(rows)
    return found


def null_model_spectrum(kind: str, shape: tuple[int, int], rank: int, seed: int, place: tuple[str, int]) -> Tensor:
    """The largest singular values [rank] of the random matrix that stands for a projection in one layer, float64.

    kind: one of NULL_MODELS. place: the projection and the number of the layer, which name the random stream."""
    role, layer = place
    return NULL_MODELS[kind](*shape, rank, seed, f"similarity/{kind}/{role}/{layer}")


def layer_distances(a: Tensor, b: Tensor | None = None) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """DSV of a [L, r] with b [M, r], or of a with itself (l < m): (values [n], pairs [n, 2] of layers).

    Our choice: distances below 1e-12 are dropped."""
    x = a / a.norm(dim=1, keepdim=True)
    y = x if b is None else b / b.norm(dim=1, keepdim=True)
    # Half the squared distance of unit vectors is 1 - cos, without its cancellation.
    values = 0.5 * (x[:, None] - y[None]).square().sum(-1)
    kept = values >= MIN_DISTANCE
    if b is None:
        kept &= torch.ones_like(kept).triu(1)
    return values[kept].numpy(), kept.nonzero().numpy()


def compare_projections(
    stacks: dict[str, Tensor],
    rank: int,
    bootstraps: int = 200,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> list[dict[str, Any]]:
    """Compares all unordered pairs of projections by their first `rank` singular values, in the order of PROJECTIONS.

    One row per pair: {a, b, n, skewness, ccdf, histogram} and the result of
    `zoo.statistics.goodness.assess_power_law`: {alpha, xmin, tail, distance, p, p_pairs, worth, alpha_ci95, ratios,
    verdict, why}. With fewer than ten distinct distances, all but the last two are None, and `ratios` is empty.
    ccdf: at most 60 of [x, share of distances >= x]. histogram: [left, right, count].

    There is no correction for the number of pairs: of 28 true power laws, one to three may be rejected at p <= 0.1.
    progress is called with 1 for every pair."""
    rows = []
    for a, b in projection_pairs(stacks):
        rows.append(compare_pair(stacks[a], stacks[b], (a, b), rank, bootstraps, seed))
        if progress is not None:
            progress(1)
    return rows


def pooled_distances(stacks: dict[str, Tensor], rank: int) -> DistanceSample:
    """DSV of all pairs of singular-value vectors of a model, of any two projections and layers.

    stacks: projection -> MSV [L, r], of which the first `rank` values count. In `pairs`, vectors are numbered by
    projection, then by layer."""
    vectors = torch.cat([stack[:, :rank] for stack in stacks.values()])
    values = 0.5 * torch.pdist(vectors / vectors.norm(dim=1, keepdim=True)).square()  # 1 - cos, in little memory
    pairs, kept = torch.triu_indices(len(vectors), len(vectors), 1).mT, values >= MIN_DISTANCE
    return DistanceSample.from_unsorted(values[kept].numpy(), pairs[kept].numpy())


def fit_pooled_distances(stacks: dict[str, Tensor], rank: int) -> dict[str, Any]:
    """The power law of `pooled_distances`: {n, skewness, ccdf, histogram, alpha, xmin, tail, distance}, as in the rows
    of `compare_projections`. The last four are None for fewer than ten distinct distances.

    The paper reports an exponent of 1.78 for LLaMA 3.2 1B at rank 16, and no rule for xmin. The exponent depends on
    xmin strongly, so read it with `tail`."""
    sample = pooled_distances(stacks, rank)
    row = _describe_distances(sample.values)
    if len(np.unique(sample.values)) < MIN_DISTINCT_VALUES:
        return row | dict.fromkeys(("alpha", "xmin", "tail", "distance"))
    law = fit_power_law(sample.values, POOLED_CANDIDATES)
    return row | {"alpha": law.alpha, "xmin": law.xmin, "tail": law.tail, "distance": law.distance}


def projection_pairs(roles: Container[str]) -> list[tuple[str, str]]:
    """All unordered pairs of projections, in the order of PROJECTIONS."""
    known = [role for role in PROJECTIONS if role in roles]
    return [(a, b) for i, a in enumerate(known) for b in known[i:]]


def compare_pair(
    one: Tensor, other: Tensor, names: tuple[str, str], rank: int, bootstraps: int, seed: int
) -> dict[str, Any]:
    """The row of two projections in `compare_projections`. one, other: their MSV [L, r] and [M, r]."""
    a, b = names
    values, pairs = layer_distances(one[:, :rank], None if a == b else other[:, :rank])
    if len(one) != len(other):  # then the rows are not the same layers
        pairs = pairs + np.array([0, len(one)])
    rng = np.random.default_rng(stream_seed(seed, f"similarity/{a}/{b}/{rank}"))
    return {"a": a, "b": b} | _compare_distances(DistanceSample.from_unsorted(values, pairs), bootstraps, rng)


def _compare_distances(sample: DistanceSample, bootstraps: int, rng: np.random.Generator) -> dict[str, Any]:
    """The statistics of one pair's distances."""
    row = _describe_distances(sample.values)
    if len(np.unique(sample.values)) < MIN_DISTINCT_VALUES:
        nothing = dict.fromkeys(("alpha", "xmin", "tail", "distance", "p", "p_pairs", "worth", "alpha_ci95"))
        why = f"{row['n']} distances between {sample.layers} layers are too few for a fit"
        return row | nothing | {"ratios": {}, "verdict": "undecided", "why": why}
    return row | assess_power_law(sample, bootstraps, rng)


def _describe_distances(x: NDArray[np.float64]) -> dict[str, Any]:
    """{n, skewness, ccdf, histogram} of distances in ascending order."""
    n = len(x)
    row: dict[str, Any] = {"n": n, "skewness": float(skew(x)) if n > 2 and x[0] < x[-1] else None}
    ccdf_points = np.unique(np.geomspace(1, n, min(n, 60)).astype(int)) if n else np.array([], int)
    row["ccdf"] = [[float(x[n - k]), k / n] for k in ccdf_points[::-1]]  # most points in the tail
    return row | {"histogram": _histogram(x) if n else []}


def _histogram(x: NDArray[np.float64]) -> list[list[float]]:
    counts, edges = np.histogram(x, bins=min(30, max(1, len(x) // 5)))
    return [[float(edges[i]), float(edges[i + 1]), int(count)] for i, count in enumerate(counts)]


def common_rank(specs: Sequence[TensorSpec], ranks: Sequence[int]) -> int:
    """The largest of `ranks`, or the smallest side of a projection in these tensors, if that is smaller."""
    return min(max(ranks), *(min(p.shape) for spec in specs for p in spec.parts if p.role in PROJECTIONS))


def constant_projection(donor: Donor, spec: TensorSpec, role: str) -> UserError:
    """The error for a projection whose values are all the same."""
    what = f"{spec.name!r} ({role})" if len(spec.parts) > 1 else repr(spec.name)
    return UserError(f"{donor.name}: {what} is constant and has no spectrum; use another checkpoint")


def projection_tensors(donor: Donor) -> list[TensorSpec]:
    """The tensors that hold projections, by layer. Raises UserError if there are none or too few layers."""
    found = [
        spec
        for spec in donor.blueprint.specs
        if spec.kind == "weight" and spec.expert is None and spec.layer is not None
        if any(part.role in PROJECTIONS for part in spec.parts)
    ]
    if not found:
        hint = "give a decoder language model, such as a Llama"
        raise UserError(f"{donor.name}: has no recognisable projections (query, key, value, output, MLP); {hint}")
    layers = {spec.layer for spec in found}
    if len(layers) < MIN_LAYERS:
        few = f"{len(layers)} layer{'s' if len(layers) > 1 else ''}"
        raise UserError(f"{donor.name}: distances between layers need at least {MIN_LAYERS} layers, it has {few}")
    return sorted(found, key=lambda spec: -1 if spec.layer is None else spec.layer)


def _gaussian_spectrum(rows: int, columns: int, rank: int, seed: int, name: str) -> Tensor:
    """The largest singular values of a matrix of independent normal entries."""
    rng = np.random.default_rng(stream_seed(seed, name))
    long, short = max(rows, columns), min(rows, columns)
    diagonal = np.sqrt(rng.chisquare(long - np.arange(short)))
    beside = np.sqrt(rng.chisquare(short - 1 - np.arange(short - 1)))
    squares = diagonal**2
    squares[1:] += beside**2
    beside = diagonal[:-1] * beside
    if short <= MOST_BISECTED:
        values = eigvalsh_tridiagonal(squares, beside, select="i", select_range=(short - min(rank, short), short - 1))
    else:
        values = eigvalsh_tridiagonal(squares, beside, lapack_driver="sterf")  # all, in a tenth of the time
    return torch.from_numpy(np.sqrt(np.maximum(values, 0))[::-1][:rank].copy())


def _spiked_spectrum(rows: int, columns: int, rank: int, seed: int, name: str) -> Tensor:
    """The same with random spikes of rank one added."""
    generator = stream(seed, name)
    uniform = 1 - torch.rand(1, generator=generator, dtype=torch.float64).item()
    count = int(min(uniform ** (-1 / SPIKE_EXPONENT), rows, columns))
    strengths = (1 + 3 * torch.rand(count, generator=generator)) * (rows**0.5 + columns**0.5)
    left = torch.nn.functional.normalize(torch.randn(rows, count, generator=generator), dim=0)
    right = torch.nn.functional.normalize(torch.randn(columns, count, generator=generator), dim=0)
    noise = torch.randn(rows, columns, generator=generator)
    return top_singular_values(noise.addmm_(left * strengths, right.mT), rank)


NULL_MODELS = {"gaussian": _gaussian_spectrum, "spikes": _spiked_spectrum}
