"""What the diffusion knows of its zoo besides weights: the scale of its tokens, and the mean vocabulary."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from diffusion.views import TokenScale


class ZooStatistics(ModelMixin, ConfigMixin):
    """scales: {kind: {latent, mean, std}}; tokens: the V token strings that the zoo knows; size: token size of a
    vocabulary pair, T; donors: [{name, revision, sha256, license, …}] that the pipeline learned from; best_loss: the
    lowest held-out loss among them, None if unknown.

    `vocabulary` [V, T] holds the mean vocabulary token of every string over the donors."""

    @register_to_config
    def __init__(
        self,
        scales: dict[str, dict[str, Any]],
        tokens: list[str],
        size: int,
        donors: list[dict[str, Any]] | None = None,
        best_loss: float | None = None,
    ) -> None:
        super().__init__()
        self.scales = {k: TokenScale(s["latent"], tuple(s["mean"]), tuple(s["std"])) for k, s in scales.items()}
        self.row = {token: i for i, token in enumerate(tokens)}
        self.register_buffer("vocabulary", torch.zeros(len(tokens), size))

    def lookup(self, tokens: tuple[str, ...]) -> Tensor:
        """[len(tokens), T]: the mean token of each string, zeros for one that the zoo does not know."""
        vocabulary = self.get_buffer("vocabulary")
        index = torch.tensor([self.row.get(token, -1) for token in tokens], device=vocabulary.device)
        return vocabulary[index] * (index >= 0)[:, None]
