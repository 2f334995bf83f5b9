"""Net2Wider: growth to any larger size that preserves the donor's function (1511.05641, 2110.07143, 2310.07999)."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor

from baselines.transfer.gather import copy_tensors
from baselines.transfer.growth.alibi import alibi_head_maps
from baselines.transfer.growth.base import Growth, changed_layer_kind, has_post_norm, repeated_layers, silence_layers
from baselines.transfer.index_maps import AxisMap, IndexMaps
from baselines.transfer.index_rules import (
    copy_numbers,
    even_layers,
    growth_index,
    head_maps,
    multiplicity,
    read_shares,
    repeated_layer_list,
    spread_query_heads,
)
from baselines.transfer.sizes import changes_alibi_heads, expert_ffn_size, ffn_size, metadata_pair, shared_ffn_size
from zoo.options import option
from zoo.streams import stream
from zoo.targets.blueprint import Blueprint
from zoo.tensors import Metadata, join_parts, split_parts

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
    """Grows a donor to any larger size so that the target computes the donor's function (1511.05641).

    Every hidden space keeps its coordinates and appends copies of random ones (Net2Net; FPI in bert2BERT, 2110.07143).
    The matrices that write a space copy their rows. The matrices that read it share each column among the copies:
    equally, or in random shares (LEMON, 2310.07999), so that copies receive different gradients and separate without
    noise. KV groups grow whole, and query heads within them. Further copies of a layer write nothing at first.

    The residual stream passes norms. With d and D the widths of donor and target, it stays exact as follows:
    - RMSNorm, `residual=copy`, any width: copy k of a coordinate is written with factor a_k and read with b_k, where
      sum a_k^2 = D/d keeps the mean square and sum a_k b_k = 1. Gains are copied.
    - LayerNorm, `residual=copy`, whole factors only: a_k = 1, because the mean must stay as well.
    - `residual=pad`: new coordinates hold the mean of the stream (LayerNorm; average expansion in LEMON) or zero
      (RMSNorm), and everything is written sqrt(D/d) times, which keeps the variance. A norm turns new coordinates
      to zero, so that the columns that read them are free. They are drawn like the layer's others.
    - A tied head cannot have columns of its own. The gain (and shift) of the final norm takes the factor b_k / a_k.

    `noise` and `expansion=aki` (bert2BERT: the rows of copies come from the next layer) make the function differ from
    the donor's. Both are off by default, because random shares already separate the copies.
    """

    name: ClassVar[str] = "net2wider"
    summary: ClassVar[str] = "a wider and deeper model of any size that computes the donor's function"
    reference: ClassVar[str] = "1511.05641"
    choices: ClassVar[dict[str, tuple[str, ...]]] = CHOICES

    shares: str = option(
        "random",
        "how the weights that read a unit are divided among its copies: random (copies separate in training) or equal",
    )
    residual: str = option(
        "auto", "new coordinates of the residual stream: copy, pad, or auto (copy where that is exact)"
    )
    depth: str = option(
        "interleave",
        "where new layers, which start with zero output, go: interleave (after their originals) or stack (at the end)",
    )
    expansion: str = option("fpi", "new rows: fpi (copies), or aki (rows of the next layer; not the donor's function)")
    noise: float = option(
        0.0, "standard deviation of noise on every matrix, relative to its own; above 0 is not exact", least=0.0
    )

    def extra_mismatches(self, donor: Donor, blueprint: Blueprint) -> list[str]:
        source, target = metadata_pair(donor, blueprint)
        found = super().extra_mismatches(donor, blueprint)
        if not found and target.layers > source.layers:
            if has_post_norm(blueprint):
                found.append(
                    f"layers {source.layers} -> {target.layers}: its norms act on the residual stream, so that no layer"
                    " can be silent: keep the depth"
                )
            elif moved := changed_layer_kind(donor, blueprint, self._layers(source, target)):
                other = "stack" if self.depth == "interleave" else "interleave"
                found.append(f"{moved}: try depth={other}")
        if not found and target.norm == "layer" and target.width > source.width:
            width, multiple = f"width {source.width} -> {target.width}", f"a multiple of {source.width}"
            on_stream = any(blueprint.has_norm(site) for site in ("attn.out", "mlp.out", "embed"))
            if self._residual_rule(source, target) == "pad" and on_stream:
                found.append(
                    f"{width}: LayerNorms act on the residual stream, which needs residual=copy and {multiple}"
                )
            elif self.residual == "copy" and target.width % source.width:
                found.append(f"{width}: with LayerNorm, residual=copy takes {multiple}; residual=pad takes any")
        return found

    def fit(self, zoo: Zoo | None, blueprint: Blueprint) -> Self:
        super().fit(zoo, blueprint)
        if blueprint.metadata is None:  # a copy of a donor with the same config
            return self
        source, target = metadata_pair(self.source, blueprint)
        if target.layers > source.layers:
            log.info("%s: %d layers are copies that write nothing at first", self.name, target.layers - source.layers)
        if target.width > source.width:
            rule, n_new = self._residual_rule(source, target), target.width - source.width
            how = {"copy": "copies of random ones", "pad": "free, and the columns that read them are drawn"}[rule]
            log.info("%s: residual=%s: the %d new coordinates of the stream are %s", self.name, rule, n_new, how)
        return self

    def function_differences(self, blueprint: Blueprint) -> list[str]:
        found = super().function_differences(blueprint)
        found += [f"noise={self.noise}"] if self.noise else []
        return found + (["expansion=aki"] if self.expansion == "aki" else [])

    def sample(self, blueprint: Blueprint, seed: int = 0) -> Iterator[tuple[str, Tensor]]:
        tensors = (
            copy_tensors(self.source, blueprint, self.only) if self.is_copy(blueprint) else self._grow(blueprint, seed)
        )
        for name, tensor in tensors:
            if self.noise and tensor.ndim == 2:
                draws = torch.randn(tensor.shape, generator=stream(seed, f"{self.name}/noise/{name}"))
                tensor = tensor + self.noise * tensor.std(correction=min(1, tensor.numel() - 1)) * draws.to(
                    tensor.dtype
                )
            yield name, tensor

    def _grow(self, blueprint: Blueprint, seed: int) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of the grown target, without noise."""
        maps = self._draw_maps(blueprint, seed)
        tensors = self.gather(blueprint, lambda _: maps, seed)
        if self.expansion == "aki":
            tensors = self._use_next_layer(tensors, blueprint, maps, seed)
        yield from silence_layers(tensors, blueprint, repeated_layers(maps.layers))

    def _draw_maps(self, blueprint: Blueprint, seed: int) -> IndexMaps:
        source, target = metadata_pair(self.source, blueprint)
        fixed: dict[str, Any] = self.fixed_maps(blueprint)
        norm_over_heads = self._norm_over_heads()
        heads, kv_heads = [], []
        ffn: list[AxisMap] = []
        experts: list[AxisMap] = []
        shared: list[AxisMap] = []
        for layer in range(target.layers):
            generator = stream(seed, f"{self.name}/layer {layer}")
            share_generator = generator if self.shares == "random" else None
            groups = growth_index(source.kv_heads, target.kv_heads, generator)
            queries = _grow_query_heads(source, target, groups, generator)
            h, kv = (axis.index for axis in head_maps(source, groups, queries, fixed["head_dim"].index))
            h_scale, kv_scale = (_write_amplitude(index) if norm_over_heads else 1.0 for index in (h, kv))
            heads.append(AxisMap(h, read_shares(h, share_generator), h_scale))
            kv_heads.append(AxisMap(kv, 1.0, kv_scale))
            if changes_alibi_heads(source, target):
                heads[-1], kv_heads[-1] = alibi_head_maps(source, target)
            for grown, size in ((ffn, ffn_size), (experts, expert_ffn_size), (shared, shared_ffn_size)):
                if size(target):
                    index = growth_index(size(source), size(target), generator)
                    grown.append(AxisMap(index, read_shares(index, share_generator)))
        return IndexMaps(
            self._layers(source, target),
            self._residual_map(source, target, stream(seed, f"{self.name}/residual")),
            tuple(heads),
            tuple(kv_heads),
            tuple(ffn),
            tuple(experts),
            shared_ffn=tuple(shared),
            embed_scale=source.embed_scale / target.embed_scale,
            **fixed,
        )

    def _norm_over_heads(self) -> bool:
        """Whether queries and keys are normalised over all heads together (OLMo 2), where their mean square counts."""
        return any(part.axes[0] == "heads" for _, part in self.source.blueprint.find("norm", site="q"))

    def _residual_rule(self, source: Metadata, target: Metadata) -> str:
        """The option `residual`, with auto resolved: copy where that is exact, else pad."""
        exact = source.norm == "rms" or target.width % source.width == 0
        return self.residual if self.residual != "auto" else "copy" if exact else "pad"

    def _residual_map(self, source: Metadata, target: Metadata, generator: torch.Generator) -> AxisMap:
        n_source, n_target = source.width, target.width
        if n_source == n_target:
            return AxisMap(torch.arange(n_target))
        if self._residual_rule(source, target) == "pad":
            free = torch.arange(n_target) >= n_source
            amplitude = torch.full((n_target,), math.sqrt(n_target / n_source), dtype=torch.float64)
            written = amplitude.masked_fill(free, 0.0) if source.norm == "rms" else amplitude
            return AxisMap(torch.arange(n_target) % n_source, 1 / amplitude, written, free)
        index = growth_index(n_source, n_target, generator)
        share_generator = generator if self.shares == "random" else None
        if source.norm == "layer":
            return AxisMap(index, read_shares(index, share_generator))
        amplitude = (n_target / n_source * read_shares(index, share_generator)).sqrt()
        return AxisMap(index, read_shares(index, share_generator) / amplitude, amplitude)

    def _layers(self, source: Metadata, target: Metadata) -> tuple[int, ...]:
        if self.depth == "stack":
            return repeated_layer_list(source.layers, target.layers)
        return even_layers(source.layers, target.layers)

    def _use_next_layer(
        self, tensors: Iterator[tuple[str, Tensor]], blueprint: Blueprint, maps: IndexMaps, seed: int
    ) -> Iterator[tuple[str, Tensor]]:
        """Replaces the rows of copies by the same rows of the donor's next layer (the last layer keeps its own)."""
        last = max(maps.layers)
        next_maps = replace(maps, layers=tuple(min(layer + 1, last) for layer in maps.layers))
        next_tensors = self.gather(blueprint, lambda _: next_maps, seed)
        for (name, tensor), (_, next_tensor) in zip(tensors, next_tensors, strict=True):
            spec = blueprint[name]
            if spec.layer is not None and spec.role != "norm":
                parts, next_parts = split_parts(spec, tensor), split_parts(spec, next_tensor)
                for part in spec.parts:
                    own = parts[part.role]
                    if part.axes[0] == "fixed":
                        continue
                    axis = maps.axis(part.axes[0], spec.layer, spec.expert is not None)
                    is_copy = _copied_rows(axis).view(-1, *[1] * (own.ndim - 1))
                    parts[part.role] = torch.where(is_copy, next_parts[part.role], own)
                tensor = join_parts(spec, parts)
            yield name, tensor


def _copied_rows(axis: AxisMap) -> Tensor:
    """[n_target] bool: the coordinates that are a second or later copy, and not free."""
    is_copy = copy_numbers(axis.index) > 0
    return is_copy if axis.free is None else is_copy & ~axis.free


def _write_amplitude(index: Tensor) -> Tensor:
    """[n_target] float64: the factor of each copy when it is written, so that the mean square over the space stays."""
    return (len(index) / (int(index.max()) + 1) / multiplicity(index)).sqrt()


def _grow_query_heads(source: Metadata, target: Metadata, groups: Tensor, generator: torch.Generator) -> Tensor:
    """[K, G]: the query head of the donor, within its KV group, for each query head of the target.

    A group that keeps its size or grows has each head in its place, then random copies. Where groups get smaller, the
    copies of a group share its heads.
    """
    source_queries, target_queries = source.heads // source.kv_heads, target.heads // target.kv_heads
    if target_queries < source_queries:
        return spread_query_heads(groups, source_queries, target_queries)
    return torch.stack([growth_index(source_queries, target_queries, generator) for _ in groups])
