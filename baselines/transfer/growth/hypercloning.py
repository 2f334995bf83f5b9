"""HyperCloning: a model a whole number of times wider that computes what its donor computes (2409.12903)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from baselines.transfer.gather import copy_tensors
from baselines.transfer.growth.alibi import alibi_head_maps
from baselines.transfer.growth.base import Growth
from baselines.transfer.index_maps import AxisMap, IndexMaps
from baselines.transfer.index_rules import copy_numbers, head_maps, leading_index, multiplicity
from baselines.transfer.sizes import axis_sizes, changes_alibi_heads, expert_ffn_size, metadata_pair, shared_ffn_size
from zoo.options import option
from zoo.streams import stream
from zoo.targets.blueprint import Blueprint
from zoo.tensors import Part, TensorSpec, join_parts, split_parts

if TYPE_CHECKING:
    from zoo.donors.donor import Donor


TILED_AXES = ("width", "ffn", "expert ffn", "shared ffn", "kv_heads", "heads per KV head")


@dataclass(kw_only=True)
class HyperCloning(Growth):
    """Tiles every matrix: tile(n_out, n_in) / n_in, with a whole number n for each axis (2409.12903).

    The axes are width, FFN, KV heads, and query heads per KV head. Embeddings, biases and gains are tiled without the
    division; the head is divided by n (where it is tied, the norm before it). The dimension of a head stays. KV groups
    are tiled whole, or, where their number stays, the query heads inside each group.

    All copies are equal, and stay equal in training without dropout. The paper's code therefore adds noise in pairs: of
    two input blocks one gets +N and the other -N, which cancel because the inputs are equal (an odd last block gets
    none). Their gradients differ, so that the copies separate. The option `noise` does the same. It is the standard
    deviation of N relative to the root mean square of the matrix (their snr_db is -20 log10 noise). Embeddings and head
    get none.
    """

    name: ClassVar[str] = "hypercloning"
    summary: ClassVar[str] = "a donor tiled to a whole number of times its width, computing the same function"
    reference: ClassVar[str] = "2409.12903"

    noise: float = option(
        0.0, "relative noise that cancels in pairs of copies: they separate, the function stays", least=0.0
    )

    def extra_mismatches(self, donor: Donor, blueprint: Blueprint) -> list[str]:
        source, target = metadata_pair(donor, blueprint)
        if found := super().extra_mismatches(donor, blueprint):
            return found
        if target.layers != source.layers:
            found.append(
                f"layers {source.layers} is not the target's {target.layers}: use net2wider for width and depth,"
                " stacking for depth alone"
            )
        uneven = []
        for axis, n_source, n_target in axis_sizes(source, target):
            if axis in TILED_AXES and n_source and n_target % n_source:
                times = max(1, n_target // n_source)
                near = f"{times * n_source} or {(times + 1) * n_source}"
                uneven.append(f"{axis} {n_target} is not a multiple of the donor's {n_source} (use {near})")
        return found + ([f"{', '.join(uneven)}; net2wider takes any size"] if uneven else [])

    def sample(self, blueprint: Blueprint, seed: int = 0) -> Iterator[tuple[str, Tensor]]:
        if self.is_copy(blueprint):
            yield from copy_tensors(self.source, blueprint, self.only)
            return
        maps = self._maps(blueprint)
        for name, tensor in self.gather(blueprint, lambda _: maps, seed):
            spec = blueprint[name]
            if self.noise and spec.layer is not None and tensor.ndim == 2:
                generator = stream(seed, f"{self.name}/noise/{name}")
                parts = split_parts(spec, tensor)
                for p in spec.parts:
                    parts[p.role] = parts[p.role] + self._noise(parts[p.role], p, spec, maps, generator)
                tensor = join_parts(spec, parts)
            yield name, tensor

    def _maps(self, blueprint: Blueprint) -> IndexMaps:
        source, target = metadata_pair(self.source, blueprint)
        fixed: dict[str, Any] = self.fixed_maps(blueprint)

        def tiled(n_source: int, n_target: int) -> AxisMap:
            return AxisMap(leading_index(n_source, n_target), n_source / n_target)

        source_queries, target_queries = source.heads // source.kv_heads, target.heads // target.kv_heads
        groups = leading_index(source.kv_heads, target.kv_heads)
        queries = leading_index(source_queries, target_queries).expand(len(groups), -1)
        heads, kv_heads = head_maps(source, groups, queries, fixed["head_dim"].index)
        heads = AxisMap(heads.index, 1 / multiplicity(heads.index))
        if changes_alibi_heads(source, target):
            heads, kv_heads = alibi_head_maps(source, target)
        n = target.layers
        return IndexMaps(
            tuple(range(n)),
            tiled(source.width, target.width),
            (heads,) * n,
            (kv_heads,) * n,
            (tiled(source.ffn, target.ffn),) * n,
            (tiled(expert_ffn_size(source), expert_ffn_size(target)),) * n if target.experts else (),
            shared_ffn=(tiled(shared, shared_ffn_size(target)),) * n if (shared := shared_ffn_size(source)) else (),
            embed_scale=source.embed_scale / target.embed_scale,
            **fixed,
        )

    def _noise(
        self, matrix: Tensor, part: Part, spec: TensorSpec, maps: IndexMaps, generator: torch.Generator
    ) -> Tensor:
        """[out, in]: noise whose columns cancel in pairs of copies of the same input."""
        if part.axes[1] == "fixed":
            return torch.zeros_like(matrix)
        index = maps.axis(part.axes[1], spec.layer, spec.expert is not None).index
        rank = copy_numbers(index)
        pair, last = rank // 2, multiplicity(index).long() - 1
        sign = (1.0 - 2.0 * (rank % 2)).masked_fill((rank == last) & (rank % 2 == 0), 0.0)
        shape = (len(matrix), int(pair.max()) + 1, int(index.max()) + 1)
        draws = torch.randn(shape, generator=generator)[:, pair, index].to(matrix.dtype)
        return self.noise * matrix.square().mean().sqrt() * sign.to(matrix.dtype) * draws
