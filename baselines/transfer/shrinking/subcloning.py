"""Weight subcloning: a smaller model from the most active coordinates of a larger one (2312.09299)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from baselines.transfer.gather import gather_tensors
from baselines.transfer.shrinking.base import KeptParts, Shrinking, drop_middle_layers, select_parts
from baselines.transfer.shrinking.calibration import load_model
from baselines.transfer.shrinking.importance import score_by_activations, score_by_weights
from zoo.options import option
from zoo.targets.blueprint import Blueprint


@dataclass(kw_only=True)
class Subcloning(Shrinking):
    """Keeps, of the residual stream and of every layer's neurons, the coordinates with the largest mean |activation|
    on a text (without one: the largest norms, see `importance.by_weights`), whole KV groups likewise by what
    their heads put out, and the layers but those in the middle. What is kept stays in the donor's order.

    Reconstructed: `rescale=sqrt` multiplies the columns of every matrix that reads a space of which s of t coordinates
    are left by sqrt(t / s), which keeps the spread of its outputs if the coordinates weigh alike; a tied head takes
    the factor from the norm before it. What is dead in the donor's FFN or heads weighs nothing: there `none` is exact.
    """

    name: ClassVar[str] = "subcloning"
    family: ClassVar[str] = "selection"
    summary: ClassVar[str] = "the most active coordinates and heads of a larger donor, without its middle layers"
    reference: ClassVar[str] = "2312.09299"
    choices: ClassVar[dict[str, tuple[str, ...]]] = {"rescale": ("sqrt", "none")}

    rescale: str = option("sqrt", "of what reads a narrower space: sqrt (of the ratio of the sizes), or none")

    def _choose_parts(self, blueprint: Blueprint, windows: Tensor | None) -> KeptParts:
        source, target = self.source.blueprint.metadata, blueprint.metadata
        assert source is not None and target is not None
        scores = score_by_weights(self.source, self.device)
        if windows is not None:
            scores = score_by_activations(load_model(self.source, self.device), self.source, windows, scores)
        return select_parts(scores, drop_middle_layers(source.layers, target.layers), source, target)

    def sample(self, blueprint: Blueprint, seed: int = 0) -> Iterator[tuple[str, Tensor]]:
        maps = self.maps(blueprint, rescale=self.rescale == "sqrt")
        yield from gather_tensors(self.source, blueprint, lambda _: maps, seed, self.name)
