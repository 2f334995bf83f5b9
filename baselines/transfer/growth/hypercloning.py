"""HyperCloning: a model a whole number of times wider that computes what its donor computes (2409.12903)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from baselines.transfer.gather import fixed_maps, gather_tensors
from baselines.transfer.growth.base import Growth
from baselines.transfer.index_maps import AxisMap, IndexMaps, copy_numbers, head_maps, leading_index, multiplicity
from baselines.transfer.sizes import axis_sizes, metadata_pair
from zoo.options import option
from zoo.streams import stream
from zoo.targets.blueprint import Blueprint
from zoo.tensors import Part, TensorSpec, join, split

if TYPE_CHECKING:
    from zoo.donors.donor import Donor


@dataclass(kw_only=True)
class HyperCloning(Growth):
    """Tiles every matrix, tile(n_out, n_in) / n_in, with one whole number n per axis: width, FFN, KV heads, and query
    heads of a KV head. Embeddings, biases and gains are tiled undivided, the head is tiled / n (where it is tied, the
    norm before it is divided). The dimension of a head stays; KV groups are tiled whole, or, where their number stays,
    the query heads inside each.

    All copies are equal and stay equal under training without dropout, so the paper's code adds noise in pairs: of two
    input blocks one gets +N and the other -N, which cancel exactly because the inputs are equal (an odd block stays
    as it is). The gradients of the two still differ, so that copies part. Here too, with `noise`: the spread of N
    relative to the root mean square of the matrix (their snr_db is -20 log10 noise); embeddings and head have none.
    """

    name: ClassVar[str] = "hypercloning"
    summary: ClassVar[str] = "a donor tiled to a whole number of times its width, computing the same function"
    reference: ClassVar[str] = "2409.12903"

    noise: float = option(
        0.0, "relative noise that cancels between pairs of copies: they part, the function stays", least=0.0
    )

    def refuses(self, donor: Donor, blueprint: Blueprint) -> list[str]:
        source, target = metadata_pair(donor, blueprint)
        if found := super().refuses(donor, blueprint):
            return found
        if target.layers != source.layers:
            found.append(
                f"layers {source.layers} is not the target's {target.layers}: use net2wider for both width and depth,"
                " stacking for the depth"
            )
        uneven = []
        for axis, t, s in axis_sizes(source, target):
            if axis in ("width", "ffn", "kv_heads", "heads per KV head") and s % t:
                near = f"{s // t * t} or {(s // t + 1) * t}" if s > t else f"{t} or {2 * t}"
                uneven.append(f"{axis} {t} does not go into the target's {s} a whole number of times ({near} would do)")
        return found + ([f"{', '.join(uneven)}: net2wider takes any size"] if uneven else [])

    def sample(self, blueprint: Blueprint, seed: int = 0) -> Iterator[tuple[str, Tensor]]:
        maps = self._maps(blueprint)
        for name, tensor in gather_tensors(self.source, blueprint, lambda _: maps, seed, self.name):
            spec = blueprint[name]
            if self.noise and spec.layer is not None and tensor.ndim == 2:
                generator = stream(seed, f"{self.name}/noise/{name}")
                parts = split(spec, tensor)
                for p in spec.parts:
                    parts[p.role] = parts[p.role] + self._noise(parts[p.role], p, spec, maps, generator)
                tensor = join(spec, parts)
            yield name, tensor

    def _maps(self, blueprint: Blueprint) -> IndexMaps:
        source, target = metadata_pair(self.source, blueprint)
        tables: dict[str, Any] = fixed_maps(self.source, blueprint, self.rows(blueprint))

        def tiled(t: int, s: int) -> AxisMap:
            return AxisMap(leading_index(t, s), t / s)

        per_group, wanted = source.heads // source.kv_heads, target.heads // target.kv_heads
        groups = leading_index(source.kv_heads, target.kv_heads)
        queries = leading_index(per_group, wanted).expand(len(groups), -1)
        heads, kv_heads = head_maps(source, groups, queries, tables["head_dim"].index)
        heads = AxisMap(heads.index, 1 / multiplicity(heads.index))
        n = target.layers
        return IndexMaps(
            tuple(range(n)),
            tiled(source.width, target.width),
            (heads,) * n,
            (kv_heads,) * n,
            (tiled(source.ffn, target.ffn),) * n,
            (),
            embed_scale=source.embed_scale / target.embed_scale,
            **tables,
        )

    def _noise(
        self, matrix: Tensor, part: Part, spec: TensorSpec, maps: IndexMaps, generator: torch.Generator
    ) -> Tensor:
        """[out, in] whose columns cancel in pairs of copies of one input."""
        index = maps.axis(part.axes[1], spec.layer).index
        rank = copy_numbers(index)
        pair, last = rank // 2, multiplicity(index).long() - 1
        sign = (1.0 - 2.0 * (rank % 2)).masked_fill((rank == last) & (rank % 2 == 0), 0.0)
        shape = (len(matrix), int(pair.max()) + 1, int(index.max()) + 1)
        draws = torch.randn(shape, generator=generator)[:, pair, index].to(matrix.dtype)
        return self.noise * matrix.square().mean().sqrt() * sign.to(matrix.dtype) * draws
