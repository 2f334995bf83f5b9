"""Weight selection: a smaller model's initial weights are every n-th of a larger one's (2311.18823)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from baselines.transfer.base import Transfer
from baselines.transfer.gather import copy_tensors
from baselines.transfer.index_maps import AxisMap, IndexMaps
from baselines.transfer.index_rules import (
    even_layers,
    head_maps,
    leading_index,
    multiplicity,
    random_index,
    spread_query_heads,
    uniform_index,
)
from baselines.transfer.sizes import expert_ffn_size, metadata_pair, shared_ffn_size
from zoo.options import option
from zoo.streams import stream
from zoo.targets.blueprint import Blueprint

CHOICES = {
    "variant": ("uniform", "consecutive", "random", "random-inconsistent"),
    "layers": ("first", "even"),
    "rescale": ("none", "sqrt"),
    "wider": ("refuse", "repeat"),
}


@dataclass(kw_only=True)
class WeightSelection(Transfer):
    """Selects weights of a larger donor, axis by axis (2311.18823).

    There is one set of indices for the residual stream, one per layer for the FFN, and KV groups are selected whole.
    The defaults are the authors': every n-th weight (`uniform`), and no rescaling. `random-inconsistent` is their
    ablation, which draws new sets for every tensor and shows what shared indices are worth. The dimension of a head
    shrinks by a whole stride only, in every variant, so that rotary pairs keep their frequencies.
    """

    name: ClassVar[str] = "weight-selection"
    family: ClassVar[str] = "selection"
    summary: ClassVar[str] = "every n-th weight of a larger donor, with one index set per hidden space"
    reference: ClassVar[str] = "2311.18823"
    choices: ClassVar[dict[str, tuple[str, ...]]] = CHOICES
    how_to_grow: ClassVar[str] = "`--set wider=repeat`, or the method row-column"

    variant: str = option("uniform", "which coordinates: uniform, consecutive, random or random-inconsistent")
    layers: str = option("first", "which layers: first or even (a deeper target always repeats them evenly)")
    rescale: str = option("none", "factor of what reads a narrower space: none, or sqrt (of the ratio of the sizes)")
    wider: str = option(
        "refuse",
        "for a larger axis: refuse, or repeat (copies; the weights that read them are divided among the copies)",
    )

    @property
    def allow_larger(self) -> bool:
        return self.wider == "repeat"

    def sample(self, blueprint: Blueprint, seed: int = 0) -> Iterator[tuple[str, Tensor]]:
        if self.is_copy(blueprint):
            yield from copy_tensors(self.source, blueprint, self.only)
            return
        shared = self._choose_maps(blueprint, seed, "")

        def maps_of(name: str) -> IndexMaps:
            return self._choose_maps(blueprint, seed, name) if self.variant == "random-inconsistent" else shared

        yield from self.gather(blueprint, maps_of, seed)

    def _choose_maps(self, blueprint: Blueprint, seed: int, name: str) -> IndexMaps:
        """The index maps of one tensor. Random variants draw from the stream of (seed, name)."""
        source, target = metadata_pair(self.source, blueprint)
        generator = stream(seed, f"{self.name}/maps/{name}")

        def choose_index(n_source: int, n_target: int) -> Tensor:
            if self.variant.startswith("random"):
                return random_index(n_source, n_target, generator)
            if self.variant == "consecutive" and n_target <= n_source:
                return leading_index(n_source, n_target)
            return uniform_index(n_source, n_target)

        def choose_axis(n_source: int, n_target: int) -> AxisMap:
            index = choose_index(n_source, n_target)
            return AxisMap(index, self._read_scale(index, n_source, n_target))

        fixed: dict[str, Any] = self.fixed_maps(blueprint)
        heads, kv_heads, ffn, experts, shared = [], [], [], [], []
        source_queries, target_queries = source.heads // source.kv_heads, target.heads // target.kv_heads
        residual = choose_axis(source.width, target.width)
        for _ in range(target.layers):
            groups = choose_index(source.kv_heads, target.kv_heads)
            queries = spread_query_heads(groups, source_queries, target_queries)
            h, kv = head_maps(source, groups, queries, fixed["head_dim"].index)
            heads.append(AxisMap(h.index, self._read_scale(h.index, source.heads * source.head_dim, len(h.index))))
            kv_heads.append(kv)
            ffn.append(choose_axis(source.ffn, target.ffn))
            if target.experts:
                experts.append(choose_axis(expert_ffn_size(source), expert_ffn_size(target)))
            if shared_ffn_size(target):
                shared.append(choose_axis(shared_ffn_size(source), shared_ffn_size(target)))
        take_first = self.layers == "first" and target.layers <= source.layers
        layers = tuple(range(target.layers)) if take_first else even_layers(source.layers, target.layers)
        fixed |= {"expert_ffn": tuple(experts), "shared_ffn": tuple(shared)}
        return IndexMaps(layers, residual, tuple(heads), tuple(kv_heads), tuple(ffn), **fixed)

    def _read_scale(self, index: Tensor, n_source: int, n_target: int) -> Tensor:
        """[n_target]: the factor of the columns of matrices that read a hidden space."""
        factor = math.sqrt(n_source / n_target) if self.rescale == "sqrt" and n_target < n_source else 1.0
        return factor / multiplicity(index)
