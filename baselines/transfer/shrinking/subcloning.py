"""Weight subcloning: a smaller model from the most active coordinates of a larger one (2312.09299)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from baselines.calibration import load_model
from baselines.transfer.gather import copy_tensors
from baselines.transfer.shrinking.base import KeptParts, Shrinking, drop_middle_layers, select_parts
from baselines.transfer.shrinking.importance import score_by_activations
from baselines.transfer.shrinking.kept_scores import kept_or_scored
from baselines.transfer.sizes import metadata_pair
from zoo.options import option
from zoo.targets.blueprint import Blueprint


@dataclass(kw_only=True)
class Subcloning(Shrinking):
    """Keeps the most active residual coordinates and neurons of a larger donor (2312.09299).

    Activity is the mean |activation| on a text, or without a text the norm of weights (`importance.score_by_weights`).
    KV groups are kept whole, by the outputs of their heads. Layers in the middle go. Kept parts stay in their order.

    Our choice: `rescale=sqrt` multiplies the columns of every matrix that reads a narrower space by sqrt(n_source /
    n_target). This keeps the standard deviation of its outputs if all coordinates contribute equally. For a tied head
    the norm before it takes the factor. `none` is exact where the dropped parts of the donor do nothing.
    """

    name: ClassVar[str] = "subcloning"
    family: ClassVar[str] = "selection"
    summary: ClassVar[str] = "the most active coordinates and heads of a larger donor, without its middle layers"
    reference: ClassVar[str] = "2312.09299"
    choices: ClassVar[dict[str, tuple[str, ...]]] = {"rescale": ("sqrt", "none")}

    rescale: str = option("sqrt", "factor of what reads a narrower space: sqrt (of the ratio of the sizes), or none")

    def _choose_parts(self, blueprint: Blueprint, windows: Tensor | None) -> KeptParts:
        source, target = metadata_pair(self.source, blueprint)
        scores = kept_or_scored(self.source, self.device)
        if windows is not None:
            scores = score_by_activations(load_model(self.source, self.device), self.source, windows, scores)
        return select_parts(scores, drop_middle_layers(source.layers, target.layers), source, target)

    def sample(self, blueprint: Blueprint, seed: int = 0) -> Iterator[tuple[str, Tensor]]:
        if self.is_copy(blueprint):
            yield from copy_tensors(self.source, blueprint, self.only)
            return
        maps = self.index_maps(blueprint, rescale=self.rescale == "sqrt")
        yield from self.gather(blueprint, lambda _: maps, seed)
