"""What a pipeline keeps of its zoo: the scale of tokens, the mean vocabulary, and a bank of the donors' tokens.

A network that trains for minutes cannot store millions of weights to the precision that an initialisation needs. It can
learn which donor's unit a target's unit should resemble (retrieval-augmented diffusion, 2204.11824). The consequences
for novelty are in `diffusion/README.md`.

Letters: M units of the bank, T token size, X context size, D donors, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from diffusion.conditions import FEATURES, layer_and_head_of_features

MAX_LAYERS = 1 << 16  # upper bound on the layers of a donor


@dataclass(frozen=True)
class TokenScale:
    """Brings tokens of one kind to unit scale. The whole latent has one scale, which keeps its spectrum; each log-norm
    has its own mean and standard deviation."""

    latent: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def to_token(self, latents: Tensor, log_norms: Tensor) -> Tensor:
        """Latents [N, R] and log-norms [N, P] -> tokens [N, T]."""
        mean, std = (torch.tensor(t, device=log_norms.device) for t in (self.mean, self.std))
        return torch.cat([latents / self.latent, (log_norms - mean) / std], dim=1)

    def from_token(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of `to_token`."""
        size = tokens.shape[1] - len(self.mean)
        mean, std = (torch.tensor(t, device=tokens.device) for t in (self.mean, self.std))
        return tokens[:, :size] * self.latent, tokens[:, size:] * std + mean


@dataclass(frozen=True)
class Bank:
    """The donors' units of one kind, with their conditions."""

    tokens: Tensor  # [M, T]
    features: Tensor  # [M, FEATURES]
    family: Tensor  # int64 [M]
    partners: Tensor | None = None  # [M, T]; None for contexts
    context: Tensor | None = None  # [M, X]; None for contexts
    group: Tensor | None = None  # int64 [M]: a token's string (its row in the zoo's vocabulary), or a head
    block: Tensor | None = None  # int64 [M]: a number for each layer of each donor; None if there are no layers

    def _map(self, change: Callable[[Tensor], Tensor]) -> Bank:
        changed: dict[str, Any] = {k: None if t is None else change(t) for k, t in vars(self).items()}
        return Bank(**changed)

    def __getitem__(self, rows: Tensor) -> Bank:
        return self._map(lambda t: t[rows])

    def to(self, device: torch.device | str) -> Bank:
        return self._map(lambda t: t.to(device))


class ZooMemory(ModelMixin, ConfigMixin):
    """What a pipeline keeps of its zoo.

    scales: kind -> {latent, mean, std}. tokens: the V token strings of the zoo. sizes: kind -> [M, T]. context: X.
    donors: [{name, revision, sha256, license, …}] in the training data. best_loss: their lowest held-out loss, None if
    unknown.

    Buffers: `vocabulary` [V, T], the mean vocabulary token of each string over the donors; `contexts` [D, X] with the
    features of their donors; the bank of each kind; the strings of the vocabulary's bank."""

    CONFIG_KINDS: ClassVar = {
        "scales": {str: dict}, "tokens": [str], "sizes": {str: [int]}, "context": int, "donors": [dict],
        "best_loss": (None, float),
    }  # fmt: skip

    @register_to_config
    def __init__(
        self,
        scales: dict[str, dict[str, Any]],
        tokens: list[str],
        sizes: dict[str, list[int]],
        context: int,
        donors: list[dict[str, Any]],
        best_loss: float | None = None,
    ) -> None:
        super().__init__()
        self.scale = {k: TokenScale(s["latent"], tuple(s["mean"]), tuple(s["std"])) for k, s in scales.items()}
        self.row_of_token = {token: i for i, token in enumerate(tokens)}
        self.register_buffer("vocabulary", torch.zeros(len(tokens), sizes["vocab"][1]))
        self.register_buffer("contexts", torch.zeros(len(donors), context))
        self.register_buffer("families", torch.zeros(len(donors), dtype=torch.int64))
        self.register_buffer("features_context", torch.zeros(len(donors), FEATURES))
        for kind, (count, size) in sizes.items():
            self.register_buffer(f"tokens_{kind}", torch.zeros(count, size))
            self.register_buffer(f"partners_{kind}", torch.zeros(count, size))
            self.register_buffer(f"features_{kind}", torch.zeros(count, FEATURES))
            self.register_buffer(f"donor_{kind}", torch.zeros(count, dtype=torch.int64))
        self.register_buffer("strings_vocab", torch.zeros(sizes["vocab"][0], dtype=torch.int64))

    def rows(self, tokens: Sequence[str]) -> Tensor:
        """The row of each string in the zoo's vocabulary, int64 [len(tokens)]; -1 for an unknown string."""
        return torch.tensor([self.row_of_token.get(token, -1) for token in tokens])

    def lookup(self, rows: Tensor) -> Tensor:
        """The mean token of each row, [N, T]; zeros for row -1."""
        vocabulary = self.get_buffer("vocabulary").cpu()
        return vocabulary[rows] * (rows >= 0)[:, None]

    def bank(self, kind: str) -> Bank:
        """The bank of a kind. For the kind `context`: the donors' contexts with the features of their shapes."""
        if kind == "context":
            buffers = (self.get_buffer(name) for name in ("contexts", "features_context", "families"))
            return Bank(*buffers)
        donor = self.get_buffer(f"donor_{kind}")
        bank = Bank(
            tokens=self.get_buffer(f"tokens_{kind}"),
            features=self.get_buffer(f"features_{kind}"),
            partners=self.get_buffer(f"partners_{kind}"),
            family=self.get_buffer("families")[donor],
            context=self.get_buffer("contexts")[donor],
        )
        if kind == "vocab":
            return replace(bank, group=self.get_buffer("strings_vocab"))
        layer, head = layer_and_head_of_features(bank.features)
        return replace(bank, group=None if kind == "neuron" else head, block=donor * MAX_LAYERS + layer)
