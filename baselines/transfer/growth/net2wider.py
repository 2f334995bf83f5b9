"""Net2Wider: growth to any larger size that preserves the donor's function (1511.05641, 2110.07143, 2310.07999)."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor

from baselines.transfer.gather import fixed_maps, gather_tensors
from baselines.transfer.growth.base import Growth, changed_layer_kind, has_post_norm, repeated_layers, silence_layers
from baselines.transfer.index_maps import (
    AxisMap,
    IndexMaps,
    copy_numbers,
    even_layers,
    growth_index,
    head_maps,
    multiplicity,
    read_shares,
    spread_query_heads,
)
from baselines.transfer.sizes import metadata_pair
from zoo.options import option
from zoo.streams import stream
from zoo.targets.blueprint import Blueprint
from zoo.tensors import Metadata, Part, TensorSpec, join, split

if TYPE_CHECKING:
    from zoo.donors.donor import Donor
    from zoo.donors.zoo import Zoo

log = logging.getLogger(__name__)

CHOICES = {
    "shares": ("random", "equal"),
    "residual": ("auto", "copy", "pad"),
    "depth": ("interleave", "stack"),
    "expansion": ("fpi", "aki"),
}


@dataclass(kw_only=True)
class Net2Wider(Growth):
    """Every hidden space keeps its coordinates and appends copies of random ones (Net2Net; FPI in bert2BERT). What
    writes a space is copied with it; what reads it is shared out among the copies: equally, or in random unequal
    shares (LEMON), so that copies receive different gradients and part without any noise. KV groups grow whole, and
    query heads within them. Further copies of a layer write nothing at first (zero output projections).

    The residual stream goes through norms, and is exact at any width all the same:
    - RMSNorm, `copy`: copies k of a coordinate are written with amplitudes a_k and read with b_k, sum a_k^2 = D/d for
      every coordinate, so that the mean square is what it was, and sum a_k b_k = 1. Gains are copied.
    - LayerNorm, `copy`, at a whole factor only: a_k = 1, because the mean has to stay as well.
    - `pad`: the new coordinates hold the mean of the stream (LayerNorm; LEMON's average expansion) or zero (RMSNorm),
      and everything is written sqrt(D/d) times, so that the variance stays. A norm makes zero of them, so the columns
      of their readers are free: drawn like the layer's others, which tells new coordinates apart.
    - A tied head cannot have columns of its own: the gain (and shift) of the final norm takes b_k / a_k.

    noise and expansion=aki (bert2BERT: the rows of copies come from the layer above) give exactness up. Both are off by
    default: random shares do what noise is for.
    """

    name: ClassVar[str] = "net2wider"
    summary: ClassVar[str] = "a wider and deeper model of any size that computes the donor's function"
    reference: ClassVar[str] = "1511.05641"
    choices: ClassVar[dict[str, tuple[str, ...]]] = CHOICES

    shares: str = option("random", "of what reads copies: random (they part in training) or equal (they stay equal)")
    residual: str = option("auto", "the stream's new coordinates: copy, pad, or auto (copy where that is exact)")
    depth: str = option("interleave", "where silent copies of layers are: interleave (in place) or stack (at the end)")
    expansion: str = option("fpi", "of new rows: fpi (copies), or aki (the layer above's; not the donor's function)")
    noise: float = option(
        0.0, "normal noise on every matrix, relative to its std; above 0 the function is not exact", least=0.0
    )

    def refuses(self, donor: Donor, blueprint: Blueprint) -> list[str]:
        source, target = metadata_pair(donor, blueprint)
        found = super().refuses(donor, blueprint)
        if not found and target.layers > source.layers:
            if has_post_norm(blueprint):
                found.append(
                    f"layers {source.layers} -> {target.layers}: its norms stand on the stream itself, where no"
                    " layer can be silent: keep the depth"
                )
            elif moved := changed_layer_kind(donor, blueprint, self._layers(source, target)):
                other = "stack" if self.depth == "interleave" else "interleave"
                found.append(f"{moved}: try depth={other}")
        if not found and target.norm == "layer" and target.width > source.width:
            width, multiple = f"width {source.width} -> {target.width}", f"a multiple of {source.width}"
            on_stream = any(blueprint.find("norm", site=site) for site in ("attn.out", "mlp.out", "embed"))
            if self._kind(source, target) == "pad" and on_stream:
                found.append(f"{width}: LayerNorms on the stream itself allow residual=copy to {multiple} only")
            elif self.residual == "copy" and target.width % source.width:
                found.append(f"{width}: with LayerNorm, residual=copy takes {multiple}; residual=pad takes any")
        return found

    def fit(self, zoo: Zoo | None, blueprint: Blueprint) -> Self:
        super().fit(zoo, blueprint)
        source, target = metadata_pair(self.source, blueprint)
        if target.layers > source.layers:
            log.info("%s: %d copies of layers write nothing at first", self.name, target.layers - source.layers)
        if target.width > source.width:
            kind = self._kind(source, target)
            does = {"copy": "copies of random ones", "pad": "free: what reads them is drawn"}[kind]
            new = target.width - source.width
            log.info("%s: residual=%s: the %d new coordinates of the stream are %s", self.name, kind, new, does)
        return self

    def inexact(self, blueprint: Blueprint) -> list[str]:
        found = super().inexact(blueprint)
        found += [f"noise={self.noise}"] if self.noise else []
        return found + (["expansion=aki"] if self.expansion == "aki" else [])

    def sample(self, blueprint: Blueprint, seed: int = 0) -> Iterator[tuple[str, Tensor]]:
        maps = self._maps(blueprint, seed)
        tensors = gather_tensors(self.source, blueprint, lambda _: maps, seed, self.name)
        if self.expansion == "aki":
            tensors = self._from_above(tensors, blueprint, maps, seed)
        for name, tensor in silence_layers(tensors, blueprint, repeated_layers(maps.layers)):
            if self.noise and tensor.ndim == 2:
                draws = torch.randn(tensor.shape, generator=stream(seed, f"{self.name}/noise/{name}"))
                tensor = tensor + self.noise * tensor.std(correction=min(1, tensor.numel() - 1)) * draws.to(
                    tensor.dtype
                )
            yield name, tensor

    def _maps(self, blueprint: Blueprint, seed: int) -> IndexMaps:
        source, target = metadata_pair(self.source, blueprint)
        tables: dict[str, Any] = fixed_maps(self.source, blueprint, self.rows(blueprint))
        whole = self._norm_over_heads()
        heads, kv_heads, ffn = [], [], []
        for layer in range(target.layers):
            generator = stream(seed, f"{self.name}/layer {layer}")
            share = generator if self.shares == "random" else None
            groups = growth_index(source.kv_heads, target.kv_heads, generator)
            h, kv = head_maps(
                source, groups, _grow_query_heads(source, target, groups, generator), tables["head_dim"].index
            )
            heads.append(AxisMap(h.index, read_shares(h.index, share), _write_amplitude(h.index) if whole else 1.0))
            kv_heads.append(AxisMap(kv.index, 1.0, _write_amplitude(kv.index) if whole else 1.0))
            index = growth_index(source.ffn, target.ffn, generator)
            ffn.append(AxisMap(index, read_shares(index, share)))
        return IndexMaps(
            self._layers(source, target),
            self._residual(source, target, stream(seed, f"{self.name}/residual")),
            tuple(heads),
            tuple(kv_heads),
            tuple(ffn),
            (),
            embed_scale=source.embed_scale / target.embed_scale,
            **tables,
        )

    def _norm_over_heads(self) -> bool:
        """Whether queries and keys are normed over all heads together (OLMo 2), so that their mean square counts."""
        return any(part.axes[0] == "heads" for _, part in self.source.blueprint.find("norm", site="q"))

    def _kind(self, source: Metadata, target: Metadata) -> str:
        exact = source.norm == "rms" or target.width % source.width == 0
        return self.residual if self.residual != "auto" else "copy" if exact else "pad"

    def _residual(self, source: Metadata, target: Metadata, generator: torch.Generator) -> AxisMap:
        t, s = source.width, target.width
        if t == s:
            return AxisMap(torch.arange(s))
        if self._kind(source, target) == "pad":
            free = torch.arange(s) >= t
            write = torch.full((s,), math.sqrt(s / t), dtype=torch.float64)
            scale = 1 / write
            return AxisMap(
                torch.arange(s) % t, scale, write.masked_fill(free, 0.0) if source.norm == "rms" else write, free
            )
        index = growth_index(t, s, generator)
        share = generator if self.shares == "random" else None
        if source.norm == "layer":
            return AxisMap(index, read_shares(index, share))
        write = (s / t * read_shares(index, share)).sqrt()
        return AxisMap(index, read_shares(index, share) / write, write)

    def _layers(self, source: Metadata, target: Metadata) -> tuple[int, ...]:
        if self.depth == "stack":
            return tuple(i % source.layers for i in range(target.layers))
        return even_layers(source.layers, target.layers)

    def _from_above(
        self, tensors: Iterator[tuple[str, Tensor]], blueprint: Blueprint, maps: IndexMaps, seed: int
    ) -> Iterator[tuple[str, Tensor]]:
        """The rows of copies replaced by the same rows of the donor's next layer (the last one keeps its own)."""
        last = max(maps.layers)
        lifted = replace(maps, layers=tuple(min(layer + 1, last) for layer in maps.layers))
        others = gather_tensors(self.source, blueprint, lambda _: lifted, seed, self.name)
        for (name, tensor), (_, other) in zip(tensors, others, strict=True):
            spec = blueprint[name]
            if spec.layer is not None and spec.role != "norm":
                parts, above = split(spec, tensor), split(spec, other)
                for p in spec.parts:
                    parts[p.role] = _replace_copied_rows(parts[p.role], above[p.role], p, spec, maps)
                tensor = join(spec, parts)
            yield name, tensor


def _replace_copied_rows(own: Tensor, above: Tensor, part: Part, spec: TensorSpec, maps: IndexMaps) -> Tensor:
    axis = maps.axis(part.axes[0], spec.layer)
    new = copy_numbers(axis.index) > 0
    if axis.free is not None:
        new &= ~axis.free
    return torch.where(new.view(-1, *[1] * (own.ndim - 1)), above, own)


def _write_amplitude(index: Tensor) -> Tensor:
    """[s] float64: what copies are written with so that the mean square over the space stays."""
    return (len(index) / (int(index.max()) + 1) / multiplicity(index)).sqrt()


def _grow_query_heads(source: Metadata, target: Metadata, groups: Tensor, generator: torch.Generator) -> Tensor:
    """[K, G] the donor's query head in its group of each of the target's. As many per group or more: each in its
    place, then random ones; fewer: the copies of a group share them out."""
    per_group, wanted = source.heads // source.kv_heads, target.heads // target.kv_heads
    if wanted < per_group:
        return spread_query_heads(groups, per_group, wanted)
    return torch.stack([growth_index(per_group, wanted, generator) for _ in groups])
