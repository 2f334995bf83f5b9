"""Do the units of two donors share a law? Two-sample tests, beside those of a donor and itself."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.real.row_column.twins import SHAPES, TWIN_SEEDS, train_twins, twin_folder
from zoo.donors.folder import StandaloneDonor
from zoo.streams import stream
from zoo.tensors import Metadata
from zoo.units.aligned import read_donor_decoder
from zoo.units.canonical import balance_layer
from zoo.units.decoder import Layer
from zoo.units.gains import fold_gains

HALVES, NEXT, NOISE, OTHER = "halves", "next layer", "noise", "another donor"
UNITS = 150  # of each sample at most
PERMUTATIONS = 199
NAMES = {
    "smollm2": "SmolLM2 (576 wide)", "gemma3": "Gemma 3 (640)", "stories260K": "stories260K (64)",
    "llama2xs-260K": "llama2xs-260K (64)", "babyllama-tok105": "babyllama (128)",
}  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """Units of a donor, and what they are compared with."""

    one: Path
    kind: str  # HALVES, NEXT, NOISE: with the donor's own or with normal weights of its shape; OTHER: with `other`
    other: Path | None = None
    prepare: Callable[[], None] = lambda: None  # makes the folders that are not there

    @property
    def name(self) -> str:
        second = self.kind if self.other is None else _title(self.other)
        return f"{_title(self.one)} | {second}"


def comparisons(models: Path, data: Path, work: Path) -> Iterator[Comparison]:
    """Of donors of different width, of equal width, and of each with itself. work: for the twins that are trained."""
    smollm2, gemma3 = models / "smollm2", models / "gemma3"
    stories, llama2xs, baby = (data / "models" / name for name in ("stories260K", "llama2xs-260K", "babyllama-tok105"))
    for donor in (smollm2, gemma3, stories, baby):
        yield from (Comparison(donor, kind) for kind in (HALVES, NEXT, NOISE))
    pairs = ((stories, llama2xs), (stories, baby), (llama2xs, baby), (smollm2, baby), (gemma3, smollm2))
    yield from (Comparison(one, OTHER, other) for one, other in pairs)
    narrow, wide = (tuple(twin_folder(work, width, seed) for seed in TWIN_SEEDS) for width in SHAPES)
    twins = ((narrow[0], narrow[1]), (wide[0], wide[1]), (narrow[0], wide[0]), (narrow[1], wide[1]))
    for one, other in twins:
        yield Comparison(one, OTHER, other, partial(train_twins, data, work))


def measure_comparison(comparison: Comparison) -> dict[str, Any]:
    """kind of unit -> {layers, coefficient, significant, of_scale_free: {coefficient, significant}}.

    coefficient: the median over layers of `energy_coefficient`; significant: layers with p <= 0.05. Layers are matched
    by their relative depth. Scale-free: norms are divided by their median in the layer."""
    comparison.prepare()
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for layer, (one, other) in enumerate(_samples(comparison)):
        for unit in one:
            generator = stream(0, f"laws/{comparison.name}/{unit}/{layer}")
            a, b = _chosen(one[unit], other[unit], comparison.kind == HALVES, generator)
            for variant, (x, y) in {"as_is": (a, b), "scale_free": (_scale_free(a), _scale_free(b))}.items():
                results = found.setdefault(unit, {}).setdefault(variant, [])
                results.append(energy_test(x, y, PERMUTATIONS, generator))
    return {
        unit: {
            variant: {
                "layers": len(results),
                "coefficient": median(coefficient for coefficient, _ in results),
                "significant": sum(p <= 0.05 for _, p in results),
            }
            for variant, results in variants.items()
        }
        for unit, variants in found.items()
    }


def unit_features(layer: Layer, metadata: Metadata) -> dict[str, Tensor]:
    """kind of unit -> [n, features]: what a rotation of the stream leaves of the canonical units of a folded block.

    neuron: log norms of gate and up (that of down is equal), and cosines of gate, up and down. value: log norms of v
    and of o of the group's strongest head, and their cosine. Readers are width-free (times sqrt(width)), and cosines
    are in units of chance (times sqrt(width), absolute)."""
    layer, root = balance_layer(layer, metadata), metadata.width**0.5
    assert layer.gate is not None
    gate, up, down = layer.gate * root, layer.up * root, layer.down
    v = layer.v.flatten(0, 1) * root
    heads = layer.o.unflatten(0, (metadata.kv_heads, -1))  # [K, G, h, d]
    strongest = heads.square().sum((2, 3)).argmax(1)
    o = heads[torch.arange(len(heads)), strongest].flatten(0, 1)

    def cosine(x: Tensor, y: Tensor) -> Tensor:
        return torch.nn.functional.cosine_similarity(x, y, dim=1).abs() * root

    return {
        "neuron": torch.stack(
            [_log_norm(gate), _log_norm(up), cosine(gate, up), cosine(gate, down), cosine(up, down)], dim=1
        ),
        "value": torch.stack([_log_norm(v), _log_norm(o), cosine(v, o)], dim=1),
    }


def energy_test(x: Tensor, y: Tensor, permutations: int, generator: torch.Generator) -> tuple[float, float]:
    """(coefficient, p) of two samples [n, k] and [m, k]: is their law the same (Szekely & Rizzo 2013)?

    coefficient: (2 E|X - Y| - E|X - X'| - E|Y - Y'|) / (2 E|X - Y|) with unbiased means, 0 for equal laws and 1 for
    laws without spread. Features are divided by the standard deviation of both samples together."""
    both = torch.cat([x, y]).double()
    both = both / both.std(0).clamp_min(1e-12)
    distances = torch.cdist(both, both)
    n, m = len(x), len(y)
    labels = torch.zeros(permutations + 1, n + m, dtype=torch.float64)
    labels[0, :n] = 1
    for row in labels[1:]:
        row[torch.randperm(n + m, generator=generator)[:n]] = 1
    product = labels @ distances
    within = (product * labels).sum(1)
    between = product.sum(1) - within
    rest = distances.sum() - within - 2 * between
    cross = 2 * between / (n * m)
    coefficient = (cross - within / (n * (n - 1)) - rest / (m * (m - 1))) / cross
    p = (1 + int((coefficient[1:] >= coefficient[0]).sum())) / (1 + permutations)
    return float(coefficient[0]), p


def _title(folder: Path) -> str:
    return NAMES.get(folder.name, folder.name)


def _samples(comparison: Comparison) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """The features of the two sides, layer by layer."""
    one = _layers(comparison.one)
    if comparison.other is not None:
        other = list(_layers(comparison.other))
        first = list(one)
        for i, features in enumerate(first):
            yield features, other[round(i * (len(other) - 1) / (len(first) - 1))]
    elif comparison.kind == HALVES:
        yield from ((features, features) for features in one)
    elif comparison.kind == NEXT:
        yield from itertools.pairwise(one)
    else:
        yield from zip(one, _layers(comparison.one, noise=True), strict=True)


def _layers(folder: Path, noise: bool = False) -> Iterator[dict[str, Tensor]]:
    """The features of every block. noise: of a block with independent normal weights of the same variances."""
    donor = StandaloneDonor.open(str(folder), quiet=True)
    decoder = read_donor_decoder(donor, lazy=True, require=lambda decoder, name: None)
    small = replace(decoder, embed=decoder.embed[:1], head=decoder.head[:1])  # the vocabulary is not looked at
    for index, layer in enumerate(fold_gains(small)[0].layers):
        yield unit_features(_as_noise(layer, index) if noise else layer, decoder.metadata)


def _as_noise(layer: Layer, index: int) -> Layer:
    generator = stream(0, f"laws/noise/{index}")
    names = ("q", "k", "v", "o", "gate", "up", "down")
    tensors = {name: getattr(layer, name) for name in names}
    drawn = {name: torch.randn(t.shape, generator=generator, dtype=t.dtype) * t.std() for name, t in tensors.items()}
    return replace(layer, **drawn)


def _chosen(one: Tensor, other: Tensor, is_halves: bool, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """At most UNITS of both, of two halves of `one` if `is_halves`."""
    order = torch.randperm(len(one), generator=generator)
    if is_halves:
        half = len(one) // 2
        return one[order[:half][:UNITS]], one[order[half:][:UNITS]]
    return one[order[:UNITS]], other[torch.randperm(len(other), generator=generator)[:UNITS]]


def _scale_free(features: Tensor) -> Tensor:
    """Features whose log norms, the first two, have a median of 0."""
    centred = features.clone()
    centred[:, :2] -= centred[:, :2].median(0).values
    return centred


def _log_norm(vectors: Tensor) -> Tensor:
    return vectors.norm(dim=1).clamp_min(1e-12).log()
