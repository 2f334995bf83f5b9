"""Signatures that distinguish families of models (arXiv 2509.19122): seven standard deviations, and which layers'
spectra cluster together. The paper states neither its normalisation nor its number of clusters."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from scipy.cluster.vq import ClusterError, kmeans2
from torch import Tensor

from zoo.donors.donor import Donor
from zoo.errors import UserError
from zoo.statistics.similarity import PROJECTIONS
from zoo.streams import stream_seed
from zoo.tensors import TensorSpec, split_parts

Signature = Mapping[str, Any]  # projection -> float, or list of floats

CHUNK = 1 << 22  # values that are converted to float64 at a time
RESTARTS = 20  # of K-means; the result with the least spread counts


def std_vector(donor: Donor) -> dict[str, float]:
    """projection -> standard deviation of all its weights in all layers, divided by the sum over projections.

    Our choice: the division, because the scale of a model depends more on its width than on its family. Experts are
    skipped, fused tensors are split, and projections that the architecture lacks are missing. One tensor is read at
    a time. Raises UserError for a donor without recognisable projections, or with constant ones only."""
    sums = []
    for spec in donor.blueprint.specs:
        if has_projection(spec):
            parts = split_parts(spec, donor.read(spec.name, torch.float32))
            sums += [(role, *power_sums(matrix)) for role, matrix in parts.items() if role in PROJECTIONS]
    return std_vector_from_sums(donor.name, sums)


def has_projection(spec: TensorSpec) -> bool:
    """Whether a tensor counts for `std_vector`."""
    return spec.kind == "weight" and spec.expert is None and any(part.role in PROJECTIONS for part in spec.parts)


def power_sums(values: Tensor) -> tuple[int, float, float]:
    """The number of values, their sum and the sum of their squares, added up in float64."""
    total = squares = 0.0
    for chunk in values.flatten().split(CHUNK):
        wide = chunk.double()
        total += wide.sum().item()
        squares += wide.square().sum().item()
    return values.numel(), total, squares


def std_vector_from_sums(name: str, sums: Iterable[tuple[Any, ...]]) -> dict[str, float]:
    """The result of `std_vector` from (role, *`power_sums`) of every matrix. name: of the donor, for errors."""
    totals: dict[str, list[float]] = {}
    for role, *own in sums:
        totals[role] = [a + b for a, b in zip(totals.get(role, [0.0, 0.0, 0.0]), own, strict=True)]
    if not totals:
        raise UserError(f"{name}: has no recognisable projections; use a transformer")
    found = {}
    for role in PROJECTIONS:
        n, total, squares = totals.get(role, [0.0, 0.0, 0.0])
        if n:
            found[role] = math.sqrt(max(squares / n - (total / n) ** 2, 0))
    scale = sum(found.values())
    if scale == 0:
        raise UserError(f"{name}: its projections are constant; use another checkpoint")
    return {role: std / scale for role, std in found.items()}


def clustering_vector(stacks: Mapping[str, Tensor], clusters: int = 3, seed: int = 0) -> dict[str, list[float]]:
    """Clusters the spectra of all layers and projections of a model: projection -> share of its layers in each cluster.

    stacks: projection -> singular values [layers, r] (`zoo.statistics.similarity.singular_value_stacks`). K-means on
    all these vectors; a common scale changes nothing. Our choice: clusters are numbered by the norm of their centre,
    smallest first, so that models can be compared. Our choice: three clusters, which separated the most models out
    of two to seven, on some small models of four to five layers.

    Raises UserError if there are fewer vectors than clusters."""
    roles = [role for role in PROJECTIONS if role in stacks]
    rows = [stacks[role].double() for role in roles]
    vectors = torch.cat(rows).numpy() if rows else np.empty((0, 1))
    if len(np.unique(vectors, axis=0)) < clusters:
        raise UserError(
            f"{len(vectors)} layers and projections are too few for {clusters} clusters; use fewer clusters"
        )
    rng = np.random.default_rng(stream_seed(seed, "signature/clusters"))
    best, labels = math.inf, np.zeros(len(vectors), dtype=int)
    for _ in range(RESTARTS):
        try:
            centres, assigned = kmeans2(vectors, clusters, iter=100, minit="++", missing="raise", seed=rng)
        except ClusterError:  # a cluster lost its last member
            continue
        spread = float(((vectors - centres[assigned]) ** 2).sum())
        if spread < best:
            best, labels = spread, np.argsort(np.argsort(np.linalg.norm(centres, axis=1)))[assigned]
    parts = np.split(labels, np.cumsum([len(r) for r in rows])[:-1])
    return {
        role: (np.bincount(part, minlength=clusters) / len(part)).tolist()
        for role, part in zip(roles, parts, strict=True)
    }


def signature_distances(signatures: Mapping[str, Signature]) -> dict[str, Any]:
    """Cosine distances between models: {models: names, distances: [models][models]}.

    signatures: model -> std_vector or clustering_vector. Distances use the projections that both models have (GPT-2
    has no gate), and are None if there are none."""
    names = list(signatures)
    table = [[_cosine_distance(signatures[a], signatures[b]) for b in names] for a in names]
    return {"models": names, "distances": table}


def _cosine_distance(a: Signature, b: Signature) -> float | None:
    common = [role for role in PROJECTIONS if role in a and role in b]
    if not common:
        return None
    x, y = (np.concatenate([np.atleast_1d(s[role]) for role in common]) for s in (a, b))
    if len(x) != len(y):
        raise UserError("clustering vectors with different numbers of clusters cannot be compared; use the same number")
    # Half the squared distance of unit vectors is 1 - cos, without its cancellation.
    return float(np.square(x / np.linalg.norm(x) - y / np.linalg.norm(y)).sum() / 2)
