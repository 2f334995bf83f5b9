"""What a pipeline keeps of its zoo: the scale of tokens, the mean vocabulary, and a bank of the donors' tokens.

The bank is what makes so small a zoo worth learning from: a network that trains for minutes cannot hold millions of
numbers to the few per cent that an initialisation needs, but it can learn *which* of them a target's unit should be
like (retrieval-augmented diffusion, 2204.11824). `diffusion/README.md` says what that means for novelty.

Letters: M units of the bank, T token size, X context size, D donors, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from diffusion.conditions import FEATURES, layer_and_head_of_features

MAX_LAYERS = 1 << 16  # of a donor


@dataclass(frozen=True)
class TokenScale:
    """How tokens of one kind are brought to unit scale: one scale for the whole latent (its spectrum is kept: it is
    the order of importance), mean and deviation for each log-norm."""

    latent: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def to_token(self, latents: Tensor, log_norms: Tensor) -> Tensor:
        """[N, R], [N, P] -> [N, T]"""
        mean, std = (torch.tensor(t, device=log_norms.device) for t in (self.mean, self.std))
        return torch.cat([latents / self.latent, (log_norms - mean) / std], dim=1)

    def from_token(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """[N, T] -> [N, R], [N, P]"""
        size = tokens.shape[1] - len(self.mean)
        mean, std = (torch.tensor(t, device=tokens.device) for t in (self.mean, self.std))
        return tokens[:, :size] * self.latent, tokens[:, size:] * std + mean


@dataclass(frozen=True)
class Bank:
    """Units of one kind with the conditions under which their donors have them."""

    tokens: Tensor  # [M, T]
    features: Tensor  # [M, FEATURES]
    family: Tensor  # int64 [M]
    partners: Tensor | None = None  # [M, T]; None for contexts
    context: Tensor | None = None  # [M, X]; None for contexts
    group: Tensor | None = None  # int64 [M]: of a token, its string (a row of the zoo's); of Q/K and V/O, the head
    block: Tensor | None = None  # int64 [M]: one number for each layer of each donor; None for what has no layer

    def _each(self, change: Callable[[Tensor], Tensor]) -> Bank:
        changed: dict[str, Any] = {k: None if t is None else change(t) for k, t in vars(self).items()}
        return Bank(**changed)

    def __getitem__(self, rows: Tensor) -> Bank:
        return self._each(lambda t: t[rows])

    def to(self, device: torch.device | str) -> Bank:
        return self._each(lambda t: t.to(device))


class ZooMemory(ModelMixin, ConfigMixin):
    """scales: {kind: {latent, mean, std}}; tokens: the V token strings that the zoo knows; sizes: {kind: [M, T]};
    context: X; donors: [{name, revision, sha256, license, …}] that the pipeline learned from; best_loss: the lowest
    held-out loss among them, None if unknown.

    Buffers: `vocabulary` [V, T], the mean vocabulary token of every string over the donors; `contexts` [D, X]
    with the features of their donors; and the bank of every kind, of tokens with their strings."""

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
        """int64 [len(tokens)]: where a string stands among the zoo's; -1 for one that the zoo does not know."""
        return torch.tensor([self.row_of_token.get(token, -1) for token in tokens])

    def lookup(self, rows: Tensor) -> Tensor:
        """[N, T]: the mean token of each string, zeros for one that the zoo does not know."""
        vocabulary = self.get_buffer("vocabulary").cpu()
        return vocabulary[rows] * (rows >= 0)[:, None]

    def bank(self, kind: str) -> Bank:
        """The bank of a kind; of kind `context`, the donors' contexts and the shapes that they belong to."""
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
