"""Row-column sampling: a model of any width drawn from the rows and columns of one donor (2408.08681)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from baselines.index_maps import Axis, Maps, even_layers, head_axes, multiplicity, random_subset, spread_queries
from baselines.transfer import Transfer, expert_ffn, table_axes, transfer
from zoo.blueprint import Blueprint
from zoo.sampler import option
from zoo.streams import stream
from zoo.tensors import Metadata, TensorSpec

CHOICES = {
    "sampling": ("balanced", "iid"),
    "scale": ("1/multiplicity", "n/N", "sqrt(n/N)", "none"),
    "depth": ("share", "repeat", "stack", "silent"),
}


@dataclass(kw_only=True)
class RowColumn(Transfer):
    """The mean-field limit of a trained layer is a law over pairs (row, column): unit i of the target is unit g(i) of
    the donor, with one map g per hidden space shared by what writes it and what reads it, W'_ij = W_g(i)g(j) / c.
    The published text leaves sampling and c open; they are options here.

    KV groups are drawn whole (K, V and all their query heads), and query heads within them where the group size
    changes. With balanced sampling, c = multiplicity and no noise, a whole-number growth preserves the donor's
    function exactly, and any other growth nearly (a normalisation sees some coordinates more often than others).
    Copies that are equal stay equal in training, hence the noise.
    """

    name: ClassVar[str] = "row-column"
    family: ClassVar[str] = "mean-field"
    summary: ClassVar[str] = "rows and columns of one donor, drawn together per hidden space, to any width and depth"
    reference: ClassVar[str] = "2408.08681"
    choices: ClassVar[dict[str, tuple[str, ...]]] = CHOICES

    sampling: str = option("balanced", "of units: balanced (equally often, up to one) or iid")
    scale: str = option("1/multiplicity", "of what reads a hidden space: 1/multiplicity, n/N, sqrt(n/N) or none")
    noise: float = option(0.01, "normal noise on every matrix, relative to its standard deviation")
    depth: str = option("share", "copies of a layer: share its output, repeat it, stack the list, or silent copies")

    @property
    def grows(self) -> bool:
        return True

    def sample(self, blueprint: Blueprint, seed: int = 0) -> Iterator[tuple[str, Tensor]]:
        maps = self._maps(blueprint, seed)
        shares = self._shares(maps.layers)
        for name, tensor in transfer(self.source, blueprint, lambda _: maps, seed, self.name):
            spec = blueprint[name]
            if spec.layer is not None and shares[spec.layer] != 1.0 and _last_of_block(spec, blueprint):
                tensor = _shrink(tensor, shares[spec.layer], spec, blueprint)
            if tensor.ndim >= 2 and self.noise:
                draws = torch.randn(tensor.shape, generator=stream(seed, f"{self.name}/noise/{name}"))
                tensor = tensor + self.noise * tensor.std() * draws
            yield name, tensor

    def _maps(self, blueprint: Blueprint, seed: int) -> Maps:
        source, target = self.source.blueprint.metadata, blueprint.metadata
        assert source is not None and target is not None
        generator = stream(seed, f"{self.name}/maps")

        def index(t: int, s: int) -> Tensor:
            if self.sampling == "iid":
                return torch.randint(t, (s,), generator=generator).sort().values
            return random_subset(t, s, generator)

        def axis(t: int, s: int) -> Axis:
            chosen = index(t, s)
            return Axis(chosen, self._scale(chosen, t, s))

        tables: dict[str, Any] = table_axes(self.source, blueprint, self.rows(blueprint))
        per_group, wanted = source.heads // source.kv_heads, target.heads // target.kv_heads
        residual = axis(source.width, target.width)
        heads, kv_heads, ffn, experts = [], [], [], []
        for _ in range(target.layers):
            groups = index(source.kv_heads, target.kv_heads)
            h, kv = head_axes(source, groups, spread_queries(groups, per_group, wanted), tables["head_dim"].index)
            heads.append(Axis(h.index, self._scale(h.index, source.heads, target.heads)))
            kv_heads.append(kv)
            ffn.append(axis(source.ffn, target.ffn))
            if target.experts:
                experts.append(axis(expert_ffn(source), expert_ffn(target)))
        layers = self._layers(source, target)
        scale = self._embed_scale(source, target)
        return Maps(
            layers, residual, tuple(heads), tuple(kv_heads), tuple(ffn), tuple(experts), embed_scale=scale, **tables
        )

    def _scale(self, index: Tensor, n: int, N: int) -> Tensor | float:
        """What the readers of a space of n donor units and N target units multiply their columns by."""
        if self.scale == "1/multiplicity":
            return 1 / multiplicity(index)
        return {"n/N": n / N, "sqrt(n/N)": math.sqrt(n / N), "none": 1.0}[self.scale]

    def _embed_scale(self, source: Metadata, target: Metadata) -> float:
        """Gemma multiplies its embeddings by sqrt(width): undone, so that the stream keeps the donor's values."""
        before, after = (float(str(m.extra.get("embed_scale", 1.0))) for m in (source, target))
        return before / after if self.scale == "1/multiplicity" else 1.0

    def _layers(self, source: Metadata, target: Metadata) -> tuple[int, ...]:
        if self.depth == "stack" and target.layers > source.layers:
            return tuple(i % source.layers for i in range(target.layers))
        return even_layers(source.layers, target.layers)

    def _shares(self, layers: tuple[int, ...]) -> list[float]:
        """What each layer of the target writes of its donor layer's output."""
        if self.depth == "share":
            return [1 / Counter(layers)[layer] for layer in layers]
        if self.depth == "silent":
            return [1.0 if layer not in layers[:i] else 0.0 for i, layer in enumerate(layers)]
        return [1.0] * len(layers)


def _last_of_block(spec: TensorSpec, blueprint: Blueprint) -> bool:
    """Whether a tensor has the last word on what its half of a block adds to the stream: the norm after the writer
    where there is one, else the writer."""
    if spec.role == "norm":
        return spec.site in ("attn.out", "mlp.out")
    sites = {"attn.o": "attn.out", "mlp.down": "mlp.out"}
    return spec.role in sites and not blueprint.find("norm", layer=spec.layer, site=sites[spec.role])


def _shrink(tensor: Tensor, share: float, spec: TensorSpec, blueprint: Blueprint) -> Tensor:
    assert blueprint.metadata is not None
    one = 1.0 if spec.role == "norm" and spec.kind == "weight" and blueprint.metadata.extra.get("rms_offset") else 0.0
    return (tensor + one) * share - one
