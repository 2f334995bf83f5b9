"""Signatures that tell families of models apart (arXiv 2509.19122): seven standard deviations, and which layers'
spectra cluster together. The paper does not say how it normalises, nor how many clusters it takes: [R] marks ours."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from scipy.cluster.vq import ClusterError, kmeans2
from torch import Tensor

from zoo.donors.donor import Donor
from zoo.errors import UserError
from zoo.statistics.similarity import PROJECTIONS
from zoo.streams import stream_seed
from zoo.tensors import split_parts

Signature = Mapping[str, Any]  # projection -> float, or list of floats

RESTARTS = 20  # of K-means; the tightest clusters count


def std_vector(donor: Donor) -> dict[str, float]:
    """projection -> standard deviation of all its weights in all layers (experts left out, fused tensors split),
    divided by the sum over projections [R]: the scale of a model says more about its width than about its family.
    Projections that the architecture lacks are missing. One tensor is read at a time. Raises UserError for a donor
    with no recognisable projections, or only constant ones."""
    counts, sums, squares = ({role: 0.0 for role in PROJECTIONS} for _ in range(3))
    for spec in donor.blueprint.specs:
        if spec.kind != "weight" or spec.expert is not None or not any(p.role in PROJECTIONS for p in spec.parts):
            continue
        for role, matrix in split_parts(spec, donor.read(spec.name, torch.float32)).items():
            if role in PROJECTIONS:
                counts[role] += matrix.numel()
                sums[role] += matrix.sum(dtype=torch.float64).item()
                squares[role] += matrix.double().square().sum().item()
    if not any(counts.values()):
        raise UserError(f"{donor.name}: has no recognisable projections; signatures are for transformers")
    found = {role: math.sqrt(max(squares[role] / n - (sums[role] / n) ** 2, 0)) for role, n in counts.items() if n}
    total = sum(found.values())
    if total == 0:
        raise UserError(f"{donor.name}: its projections are constant; use another checkpoint")
    return {role: std / total for role, std in found.items()}


def clustering_vector(stacks: Mapping[str, Tensor], clusters: int = 3, seed: int = 0) -> dict[str, list[float]]:
    """stacks: projection -> singular values [layers, r] of one model (`zoo.statistics.similarity.singular_value_stacks`). K-means of
    all these vectors together; the result is projection -> share of its layers in each cluster [clusters]. Clusters
    are numbered by the norm of their centre [R], smallest first, so that those of two models can be compared; a scale
    common to all vectors changes nothing. Three clusters [R] told the most models apart, of two to seven, where that
    was tried: on some small models of four to five layers.

    Raises UserError where there are fewer vectors than clusters."""
    roles = [role for role in PROJECTIONS if role in stacks]
    rows = [stacks[role].double() for role in roles]
    vectors = torch.cat(rows).numpy() if rows else np.empty((0, 1))
    if len(np.unique(vectors, axis=0)) < clusters:
        raise UserError(
            f"{len(vectors)} layers and projections are too few for {clusters} clusters: give fewer clusters"
        )
    rng = np.random.default_rng(stream_seed(seed, "signature/clusters"))
    best, labels = math.inf, np.zeros(len(vectors), dtype=int)
    for _ in range(RESTARTS):
        try:
            centres, given = kmeans2(vectors, clusters, iter=100, minit="++", missing="raise", seed=rng)
        except ClusterError:  # a cluster lost its last member
            continue
        spread = float(((vectors - centres[given]) ** 2).sum())
        if spread < best:
            best, labels = spread, np.argsort(np.argsort(np.linalg.norm(centres, axis=1)))[given]
    parts = np.split(labels, np.cumsum([len(r) for r in rows])[:-1])
    return {
        role: (np.bincount(part, minlength=clusters) / len(part)).tolist()
        for role, part in zip(roles, parts, strict=True)
    }


def signature_distances(signatures: Mapping[str, Signature]) -> dict[str, Any]:
    """model -> std_vector or clustering_vector; -> {models: names, distances: [models][models] cosine distances}, over
    the projections that both have (GPT-2 has no gate); None where they have none in common."""
    names = list(signatures)
    table = [[_cosine_distance(signatures[a], signatures[b]) for b in names] for a in names]
    return {"models": names, "distances": table}


def _cosine_distance(a: Signature, b: Signature) -> float | None:
    common = [role for role in PROJECTIONS if role in a and role in b]
    if not common:
        return None
    x, y = (np.concatenate([np.atleast_1d(s[role]) for role in common]) for s in (a, b))
    if len(x) != len(y):
        raise UserError("clustering vectors of unlike numbers of clusters cannot be compared; take the same number")
    # Half the squared distance of unit vectors is 1 - cos, without its cancellation.
    return float(np.square(x / np.linalg.norm(x) - y / np.linalg.norm(y)).sum() / 2)
