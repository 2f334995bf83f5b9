"""Weight selection: a smaller model's initial weights are every n-th of a larger one's (2311.18823)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from baselines.transfer.base import Transfer
from baselines.transfer.gather import fixed_maps, gather_tensors
from baselines.transfer.index_maps import (
    AxisMap,
    IndexMaps,
    even_layers,
    head_maps,
    leading_index,
    multiplicity,
    random_index,
    spread_query_heads,
    uniform_index,
)
from baselines.transfer.sizes import expert_ffn_size
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
    """Selects from a larger donor, axis by axis, with one index set for the residual stream, one per layer for the
    FFN, and whole KV groups. The authors' rule (`uniform`), their variants, and no rescaling are the defaults.

    `random-inconsistent` draws the sets anew for every tensor: their ablation, here to show what coupling is worth.
    Heads shrink in dimension by a whole stride only, whatever the variant, because rotary pairs have frequencies.
    """

    name: ClassVar[str] = "weight-selection"
    family: ClassVar[str] = "selection"
    summary: ClassVar[str] = "every n-th weight of a larger donor, with one index set per hidden space"
    reference: ClassVar[str] = "2311.18823"
    choices: ClassVar[dict[str, tuple[str, ...]]] = CHOICES

    variant: str = option("uniform", "which coordinates: uniform, consecutive, random or random-inconsistent")
    layers: str = option("first", "which layers: first or even (a deeper target always repeats them evenly)")
    rescale: str = option("none", "of what reads a narrower space: none, or sqrt (sqrt of the ratio of the sizes)")
    wider: str = option("refuse", "an axis larger than the donor's: refuse, or repeat (shared out by multiplicity)")

    @property
    def grows(self) -> bool:
        return self.wider == "repeat"

    def sample(self, blueprint: Blueprint, seed: int = 0) -> Iterator[tuple[str, Tensor]]:
        coupled = self._maps(blueprint, seed, "")

        def maps(name: str) -> IndexMaps:
            return self._maps(blueprint, seed, name) if self.variant == "random-inconsistent" else coupled

        yield from gather_tensors(self.source, blueprint, maps, seed, self.name)

    def _maps(self, blueprint: Blueprint, seed: int, name: str) -> IndexMaps:
        """The index maps of the stream (seed, name)."""
        source, target = self.source.blueprint.metadata, blueprint.metadata
        assert source is not None and target is not None
        generator = stream(seed, f"{self.name}/maps/{name}")

        def index(t: int, s: int) -> Tensor:
            if self.variant.startswith("random"):
                return random_index(t, s, generator)
            return leading_index(t, s) if self.variant == "consecutive" and s <= t else uniform_index(t, s)

        def axis(t: int, s: int) -> AxisMap:
            chosen = index(t, s)
            return AxisMap(chosen, self._scale(chosen, t, s))

        tables: dict[str, Any] = fixed_maps(self.source, blueprint, self.rows(blueprint))
        heads, kv_heads, ffn, experts = [], [], [], []
        per_group, wanted = source.heads // source.kv_heads, target.heads // target.kv_heads
        residual = axis(source.width, target.width)
        for _ in range(target.layers):
            groups = index(source.kv_heads, target.kv_heads)
            queries = spread_query_heads(groups, per_group, wanted)
            h, kv = head_maps(source, groups, queries, tables["head_dim"].index)
            heads.append(AxisMap(h.index, self._scale(h.index, source.heads * source.head_dim, len(h.index))))
            kv_heads.append(kv)
            ffn.append(axis(source.ffn, target.ffn))
            if target.experts:
                experts.append(axis(expert_ffn_size(source), expert_ffn_size(target)))
        keep_first = self.layers == "first" and target.layers <= source.layers
        chosen = tuple(range(target.layers)) if keep_first else even_layers(source.layers, target.layers)
        return IndexMaps(chosen, residual, tuple(heads), tuple(kv_heads), tuple(ffn), tuple(experts), **tables)

    def _scale(self, index: Tensor, t: int, s: int) -> Tensor:
        ratio = math.sqrt(t / s) if self.rescale == "sqrt" and s < t else 1.0
        return ratio / multiplicity(index)
