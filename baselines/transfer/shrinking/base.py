"""What methods share that keep the important part of a donor: what was kept, the maps that follow, and the interface.

Letters: L layers of the target, s its width, K its KV groups, G query heads per group, F its neurons, E an expert's.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from baselines.transfer.base import Transfer
from baselines.transfer.gather import fixed_maps
from baselines.transfer.index_maps import AxisMap, IndexMaps, even_layers, head_maps, uniform_index
from baselines.transfer.shrinking.calibration import calibration_windows
from baselines.transfer.shrinking.importance import Scores, top_indices
from baselines.transfer.sizes import expert_ffn_size
from zoo.options import option
from zoo.targets.blueprint import Blueprint
from zoo.tensors import Metadata

if TYPE_CHECKING:
    from zoo.donors.donor import Donor
    from zoo.donors.zoo import Zoo

log = logging.getLogger(__name__)

SCORED_ROLES = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.up", "mlp.down")  # what importance is seen from


@dataclass(frozen=True)
class KeptParts:
    """Which of the donor's parts a target consists of, int64, in the donor's order."""

    layers: Tensor  # [L]
    residual: Tensor  # [s]
    groups: Tensor  # [L, K]
    queries: Tensor  # [L, K, G], query heads within their group
    ffn: Tensor  # [L, F]
    expert_ffn: Tensor  # [L, E], one set for the experts of a layer; [L, 0] without experts

    def tensors(self) -> dict[str, Tensor]:
        return {f.name: getattr(self, f.name) for f in fields(self)}


def select_parts(
    scores: Scores, layers: tuple[int, ...], source: Metadata, target: Metadata, by_index: bool = False
) -> KeptParts:
    """The best of every hidden space in the layers chosen; by_index: every n-th residual coordinate instead."""
    groups, queries, ffn, experts = [], [], [], []
    group_scores, heads = scores.groups(source.kv_heads), scores.heads.unflatten(1, (source.kv_heads, -1))
    for layer in layers:
        chosen = top_indices(group_scores[layer], target.kv_heads)
        groups.append(chosen)
        queries.append(torch.stack([top_indices(heads[layer, g], target.heads // target.kv_heads) for g in chosen]))
        ffn.append(top_indices(scores.ffn[layer], target.ffn))
        experts.append(top_indices(scores.expert_ffn[layer], expert_ffn_size(target)))
    residual = uniform_index(source.width, target.width) if by_index else top_indices(scores.residual, target.width)
    stacked = [torch.stack(x) for x in (groups, queries, ffn, experts)]
    return KeptParts(torch.tensor(layers), residual, *stacked)


def drop_middle_layers(t: int, s: int) -> tuple[int, ...]:
    """s of t layers without those in the middle: the first half of them, rounded up, and the last."""
    return (*range((s + 1) // 2), *range(t - s // 2, t))


def select_layers(rule: str, influence: Tensor | None, t: int, s: int) -> tuple[int, ...]:
    """s of t layers by `influence` (the blocks that change the stream most), `middle` or `even`."""
    if rule == "influence":
        assert influence is not None
        return tuple(top_indices(influence, s).tolist())
    return drop_middle_layers(t, s) if rule == "middle" else even_layers(t, s)


def spread_ratio(t: int, s: int) -> float:
    """The factor sqrt(t / s) that keeps the spread of a sum of which s of t terms are left."""
    return (t / s) ** 0.5


@dataclass(kw_only=True)
class Shrinking(Transfer):
    """A transfer that keeps parts of a larger donor by their importance. Subclasses choose (`_choose_parts`). With a
    text the whole donor is held on `device` in float32 while it reads; without one a layer at a time is."""

    text: str | None = option(None, "a UTF-8 file to measure importance on; none: by the weights alone")
    windows: int = option(
        64, "of 256 tokens, the beginning of the text: so much of it is read", least=1, most=1_000_000
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._kept: KeptParts | None = None

    def refuses(self, donor: Donor, blueprint: Blueprint) -> list[str]:
        source, target = donor.blueprint.metadata, blueprint.metadata
        assert source is not None and target is not None
        missing = [role for role in SCORED_ROLES if not donor.blueprint.find(role)]
        if missing:
            return [f"its {', '.join(missing)} are not known, so that no importance is: use weight-selection"]
        if source.layers < target.layers:
            deeper = f"layers {source.layers} are fewer than the target's {target.layers}"
            return [f"{deeper}: {self.name} only shrinks; row-column and stacking go deeper"]
        return []

    def reads(self, zoo: Zoo | None, blueprint: Blueprint) -> tuple[str, ...]:
        donor = self._choose(zoo, blueprint)
        self._calibration(donor)
        return (donor.name,)

    def fit(self, zoo: Zoo | None, blueprint: Blueprint) -> Self:
        super().fit(zoo, blueprint)
        windows = self._calibration(self.source)
        if windows is not None:
            log.info("%s: calibrated on %d tokens of %s", self.name, windows.numel(), Path(str(self.text)).name)
        self._kept = self._choose_parts(blueprint, windows)
        return self

    def _calibration(self, donor: Donor) -> Tensor | None:
        """int64 [B, S], None without text."""
        if self.text is None:
            return None
        return calibration_windows(self.text, donor, self.tokenizer, self.windows, self.name)

    def _choose_parts(self, blueprint: Blueprint, windows: Tensor | None) -> KeptParts:
        raise NotImplementedError

    @property
    def kept(self) -> KeptParts:
        """What `fit` chose."""
        if self._kept is None:
            raise RuntimeError(f"{self.name}: call fit before sample")
        return self._kept

    def maps(self, blueprint: Blueprint, rescale: bool) -> IndexMaps:
        """The index maps of what was kept. rescale: whether readers make up for what is gone, by sqrt(t / s)."""
        source, target = self.source.blueprint.metadata, blueprint.metadata
        assert source is not None and target is not None
        tables: dict[str, Any] = fixed_maps(self.source, blueprint, self.rows(blueprint))
        kept = self.kept

        def axis(index: Tensor, t: int) -> AxisMap:
            return AxisMap(index, spread_ratio(t, len(index)) if rescale and len(index) else 1.0)

        heads, kv_heads = [], []
        for groups, queries in zip(kept.groups, kept.queries, strict=True):
            h, kv = head_maps(source, groups, queries, tables["head_dim"].index)
            heads.append(axis(h.index, source.heads * source.head_dim))
            kv_heads.append(kv)
        return IndexMaps(
            layers=tuple(kept.layers.tolist()),
            residual=axis(kept.residual, source.width),
            heads=tuple(heads),
            kv_heads=tuple(kv_heads),
            ffn=tuple(axis(index, source.ffn) for index in kept.ffn),
            expert_ffn=tuple(axis(index, expert_ffn_size(source)) for index in kept.expert_ffn)
            if target.experts
            else (),
            embed_scale=source.embed_scale / target.embed_scale,
            **tables,
        )

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        values, tensors = super().state()
        return values, tensors | self.kept.tensors()

    def restore(self, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        super().restore(values, tensors)
        self._kept = KeptParts(**{f.name: tensors[f.name] for f in fields(KeptParts)})
