"""The base of the methods that keep the important parts of a larger donor.

Sizes of the target: L layers, d width, K KV groups, G query heads per group, F neurons, E neurons of an expert.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from baselines.calibration import calibration_windows
from baselines.transfer.base import Transfer
from baselines.transfer.donor_choice import has_uniform_layers
from baselines.transfer.index_maps import AxisMap, IndexMaps
from baselines.transfer.index_rules import even_layers, head_maps, uniform_index
from baselines.transfer.shrinking.importance import Scores, top_indices
from baselines.transfer.sizes import expert_ffn_size, metadata_pair, shared_ffn_size
from zoo.options import option
from zoo.targets.blueprint import Blueprint
from zoo.tensors import Metadata
from zoo.training.documents import TextSource

if TYPE_CHECKING:
    from zoo.donors.donor import Donor
    from zoo.donors.zoo import Zoo

log = logging.getLogger(__name__)

SCORED_ROLES = {  # the roles that importance scores need, and an axis of each
    "attn.q": "heads", "attn.k": "kv_heads", "attn.v": "kv_heads", "attn.o": "heads", "mlp.up": "ffn",
    "mlp.down": "ffn",
}  # fmt: skip


@dataclass(frozen=True)
class KeptParts:
    """The donor's parts that a target keeps, int64, in the donor's order."""

    layers: Tensor  # [L]
    residual: Tensor  # [d]
    groups: Tensor  # [L, K]
    queries: Tensor  # [L, K, G], query heads within their group
    ffn: Tensor  # [L, F]
    expert_ffn: Tensor  # [L, E], one set for the experts of a layer; [L, 0] without experts
    shared_ffn: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.int64))  # [L, S], beside experts

    def tensors(self) -> dict[str, Tensor]:
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: tensor for name, tensor in tensors.items() if name != "shared_ffn" or tensor.numel()}


def select_parts(
    scores: Scores, layers: tuple[int, ...], source: Metadata, target: Metadata, by_index: bool = False
) -> KeptParts:
    """The most important parts of every hidden space, in the given layers of the donor.

    by_index: keep every n-th residual coordinate instead of the most important ones.
    """
    groups, queries, ffn, experts, shared = [], [], [], [], []
    shared_scores = scores.shared_ffn if shared_ffn_size(target) else torch.zeros(source.layers, 0)
    group_scores, heads = scores.groups(source.kv_heads), scores.heads.unflatten(1, (source.kv_heads, -1))
    for layer in layers:
        chosen = top_indices(group_scores[layer], target.kv_heads)
        groups.append(chosen)
        queries.append(torch.stack([top_indices(heads[layer, g], target.heads // target.kv_heads) for g in chosen]))
        ffn.append(top_indices(scores.ffn[layer], target.ffn))
        experts.append(top_indices(scores.expert_ffn[layer], expert_ffn_size(target)))
        shared.append(top_indices(shared_scores[layer], shared_ffn_size(target)))
    residual = uniform_index(source.width, target.width) if by_index else top_indices(scores.residual, target.width)
    stacked = [torch.stack(x) for x in (groups, queries, ffn, experts, shared)]
    return KeptParts(torch.tensor(layers), residual, *stacked)


def _has_axis(blueprint: Blueprint, role: str, axis: str) -> bool:
    """Whether a tensor of a role has an axis. (Llama 4's only known neurons are those beside its experts.)"""
    return any(axis in part.axes for _, part in blueprint.find(role))


def drop_middle_layers(n_source: int, n_target: int) -> tuple[int, ...]:
    """The first half of the target's layers, rounded up, from the start of the donor, the others from its end."""
    return (*range((n_target + 1) // 2), *range(n_source - n_target // 2, n_source))


def select_layers(rule: str, influence: Tensor | None, n_source: int, n_target: int) -> tuple[int, ...]:
    """The layers to keep by a rule: `influence` (those that change the stream most), `middle` (drop it) or `even`."""
    if rule == "influence":
        assert influence is not None
        return tuple(top_indices(influence, n_target).tolist())
    return drop_middle_layers(n_source, n_target) if rule == "middle" else even_layers(n_source, n_target)


def spread_ratio(n_source: int, n_target: int) -> float:
    """The factor that keeps the standard deviation of a sum of which only n_target of n_source terms are left."""
    return (n_source / n_target) ** 0.5


@dataclass(kw_only=True)
class Shrinking(Transfer):
    """A transfer that keeps parts of a larger donor by their importance. A subclass implements `_choose_parts`.

    With a text the whole donor is on `device` in float32 while its activations are measured. Without one at most one
    layer is in memory.
    """

    text: str | None = option(None, "text, a folder or a data set to measure importance on; none: weights alone")
    split: str | None = option(None, "split of a data set; none: train")
    text_column: str | None = option(None, "column of a data set; none: text")
    windows: int = option(
        64, "calibration windows of 256 tokens, read from the start of the text", least=1, most=1_000_000
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._kept: KeptParts | None = None

    def extra_mismatches(self, donor: Donor, blueprint: Blueprint) -> list[str]:
        source, target = donor.blueprint.metadata, blueprint.metadata
        assert source is not None and target is not None
        missing = [role for role, axis in SCORED_ROLES.items() if not _has_axis(donor.blueprint, role, axis)]
        if missing:
            return [f"its {', '.join(missing)} are unknown, and importance needs them: use weight-selection"]
        if not has_uniform_layers(donor.blueprint):
            return [f"{source.architecture} has layers of several kinds, which no importance compares"]
        if source.layers < target.layers:
            sizes = f"layers {source.layers} are fewer than the target's {target.layers}"
            return [f"{sizes}: {self.name} only shrinks; use row-column or stacking"]
        return []

    def planned_donors(self, zoo: Zoo | None, blueprint: Blueprint) -> tuple[str, ...]:
        donor = self._choose(zoo, blueprint)
        self._calibration(donor)
        return (donor.name,)

    def fit(self, zoo: Zoo | None, blueprint: Blueprint) -> Self:
        super().fit(zoo, blueprint)
        windows = self._calibration(self.source)
        self._kept = None
        if self.is_copy(blueprint):
            return self
        if windows is not None:
            log.info("%s: calibrated on %d tokens of %s", self.name, windows.numel(), Path(str(self.text)).name)
        self._kept = self._choose_parts(blueprint, windows)
        return self

    def _calibration(self, donor: Donor) -> Tensor | None:
        """The calibration windows, int64 [B, S]; None without a text."""
        if self.text is None:
            return None
        source = TextSource(self.text, self.split, self.text_column)
        return calibration_windows(source, donor, self.tokenizer, self.windows, self.name)

    def _choose_parts(self, blueprint: Blueprint, windows: Tensor | None) -> KeptParts:
        """The parts to keep. windows: int64 [B, S], None without a text."""
        raise NotImplementedError

    @property
    def kept_parts(self) -> KeptParts:
        """The parts that `fit` chose."""
        if self._kept is None:
            raise RuntimeError(f"{self.name}: call fit before sample")
        return self._kept

    def index_maps(self, blueprint: Blueprint, rescale: bool) -> IndexMaps:
        """The index maps of the kept parts.

        rescale: whether matrices that read a space are multiplied by sqrt(n_source / n_target) for what is gone.
        """
        source, target = metadata_pair(self.source, blueprint)
        fixed: dict[str, Any] = self.fixed_maps(blueprint)
        kept = self.kept_parts

        def axis(index: Tensor, n_source: int) -> AxisMap:
            return AxisMap(index, spread_ratio(n_source, len(index)) if rescale and len(index) else 1.0)

        heads, kv_heads = [], []
        for groups, queries in zip(kept.groups, kept.queries, strict=True):
            h, kv = head_maps(source, groups, queries, fixed["head_dim"].index)
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
            shared_ffn=tuple(axis(index, shared_ffn_size(source)) for index in kept.shared_ffn),
            embed_scale=source.embed_scale / target.embed_scale,
            **fixed,
        )

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        values, tensors = super().state()
        return values, tensors | (self._kept.tensors() if self._kept is not None else {})

    def restore(self, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        super().restore(values, tensors)
        kept = {f.name: tensors[f.name] for f in fields(KeptParts) if f.name in tensors}
        self._kept = KeptParts(**kept) if kept else None
