"""The denoiser: the velocity of a mixture over the zoo's units, in closed form, plus a network.

A token is a unit's latent and log-norms (`memory.TokenScale`). The mixture models a unit's token as one of the bank's
tokens plus normal noise of a fixed bandwidth. A learned prior chooses the bank's token, given the unit's condition. The
velocity of this mixture is known in closed form (2310.12395). A network of adaLN-Zero blocks (DiT, 2212.09748) adds a
correction that starts at zero. Without a bank, the network alone is a plain diffusion.

Units are independent given their condition, so the cost is linear in their number. Three things connect them: all units
of a model share a context vector, which is generated first as a token of its own kind; all units of a block or a head
come from the same block or head of the bank; query heads of a group have a partner token.

Letters: N units, M units of the bank, T token size of a kind, H hidden size, X context size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional as F

from diffusion.conditions import FEATURES
from diffusion.memory import Bank

CONTEXT = "context"
KEY_SIZE = 64  # of the queries and keys of the prior
SHARPNESS_SPEED = 5.0  # the prior's sharpness learns this many times faster than the other parameters
KINDS_WITH_PARTNER = ("vocab", "qk", "vo")


def sigma_embedding(sigma: Tensor, size: int) -> Tensor:
    """Sinusoidal embedding of noise levels in [0, 1]: [N] -> [N, size]."""
    half = size // 2
    waves = torch.exp(-math.log(1e4) * torch.arange(half, device=sigma.device) / half)
    angle = 1e3 * sigma[:, None] * waves
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def mixture_velocity(x: Tensor, sigma: Tensor, tokens: Tensor, log_prior: Tensor, bandwidth: float) -> Tensor:
    """E[noise - token | x] for x = (1 - sigma) token + sigma noise, [N, T].

    The token is drawn from a mixture of normals: component i has mean `tokens[i]`, standard deviation `bandwidth` and
    probability softmax(log_prior)_i. x [N, T], sigma [N], tokens [M, T] or [N, M, T], log_prior [N, M]."""
    signal, noise = (1 - sigma)[:, None], sigma[:, None]
    variance = noise.square() + (signal * bandwidth).square()  # of x given its component, [N, 1]
    if tokens.ndim == 2:
        inner, square = x @ tokens.mT, tokens.square().sum(1)
    else:
        inner, square = (tokens @ x.unsqueeze(-1)).squeeze(-1), tokens.square().sum(2)
    likelihood = (signal * inner - 0.5 * signal.square() * square) / variance  # up to a constant in i
    weights = (log_prior + likelihood).softmax(dim=1)  # [N, M]
    mean = weights @ tokens if tokens.ndim == 2 else (weights.unsqueeze(1) @ tokens).squeeze(1)
    return (noise - signal * bandwidth**2) / variance * (x - signal * mean) - mean


@dataclass(frozen=True)
class Candidates:
    """The components of the mixture for N units."""

    tokens: Tensor  # [M, T] or [N, M, T]
    log_prior: Tensor  # [N, M]


def mask_to_group(log_prior: Tensor, required: Tensor | None, group: Tensor | None) -> Tensor:
    """Restricts the prior [N, M] of each unit to the bank's units of its required group; others get -inf.

    A group is a token string, or a head. required: int64 [N], -1 if any group will do. group: int64 [M], of the bank's
    units. None for units without groups."""
    if required is None or group is None:
        return log_prior
    return log_prior.masked_fill((required[:, None] >= 0) & (required[:, None] != group), -math.inf)


class Block(nn.Module):
    """A residual MLP with adaLN-Zero: the condition sets normalisation and gate, and the gate starts at zero."""

    def __init__(self, hidden: int, expand: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden, elementwise_affine=False)
        self.mlp = nn.Sequential(nn.Linear(hidden, expand * hidden), nn.GELU(), nn.Linear(expand * hidden, hidden))
        self.modulation = nn.Sequential(nn.SiLU(), _zero_initialised(nn.Linear(hidden, 3 * hidden)))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(condition).chunk(3, dim=1)  # [N, H] each
        return x + gate * self.mlp(self.norm(x) * (1 + scale) + shift)


class UnitDenoiser(ModelMixin, ConfigMixin):
    """Predicts the velocity of noisy tokens.

    tokens: kind -> T, including `context`. families: architectures in the training data; others share one embedding.
    hidden, blocks, expand: size of the network. bandwidth: standard deviation around the bank's tokens, in RMS of a
    token; None for no bank, which is a plain diffusion."""

    CONFIG_KINDS: ClassVar = {
        "tokens": {str: int}, "families": [str], "hidden": int, "blocks": int, "expand": int,
        "bandwidth": (None, float),
    }  # fmt: skip

    @register_to_config
    def __init__(
        self,
        tokens: dict[str, int],
        families: list[str],
        hidden: int = 192,
        blocks: int = 3,
        expand: int = 2,
        bandwidth: float | None = 0.1,
    ) -> None:
        super().__init__()
        self.index = {kind: i for i, kind in enumerate(tokens)}
        self.family = {name: i + 1 for i, name in enumerate(families)}
        self.read = nn.ModuleDict({k: nn.Linear(size, hidden) for k, size in tokens.items()})
        self.partner = nn.ModuleDict({k: nn.Linear(tokens[k], hidden) for k in KINDS_WITH_PARTNER})
        self.write = nn.ModuleDict({k: _zero_initialised(nn.Linear(hidden, size)) for k, size in tokens.items()})
        self.query = nn.ModuleDict({k: nn.Linear(hidden, KEY_SIZE) for k in tokens})
        self.key = nn.ModuleDict({k: nn.Linear(hidden, KEY_SIZE) for k in tokens})
        self.sharpness = nn.Parameter(torch.tensor(math.log(60.0) / SHARPNESS_SPEED))
        self.kind = nn.Embedding(len(tokens), hidden)
        self.architecture = nn.Embedding(len(families) + 1, hidden)
        self.time = nn.Sequential(nn.Linear(64, hidden), nn.SiLU(), nn.Linear(hidden, hidden))
        self.metadata = nn.Sequential(nn.Linear(FEATURES, hidden), nn.SiLU(), nn.Linear(hidden, hidden))
        self.context = nn.Sequential(nn.Linear(tokens[CONTEXT], hidden), nn.SiLU(), nn.Linear(hidden, hidden))
        self.unconditional = nn.Parameter(torch.zeros(hidden))
        self.trunk = nn.ModuleList(Block(hidden, expand) for _ in range(blocks))
        self.last = nn.LayerNorm(hidden, elementwise_affine=False)
        for embedding in (self.kind, self.architecture):
            nn.init.normal_(embedding.weight, std=0.02)

    def condition_embedding(
        self, kind: str, features: Tensor, family: Tensor, context: Tensor | None, partner: Tensor | None
    ) -> Tensor:
        """Embeds the condition of units, [N, H].

        features [N, FEATURES]; family int64 [N], 0 for an unknown architecture; context [N, X]; partner [N, T], zeros
        for a unit without one."""
        embedding = self.metadata(features) + self.architecture(family)
        if context is not None:
            embedding = embedding + self.context(context)
        if partner is not None and kind in self.partner:
            embedding = embedding + self.partner[kind](partner) * (partner != 0).any(1, keepdim=True)
        return embedding

    def log_prior(self, kind: str, condition: Tensor, bank_condition: Tensor) -> Tensor:
        """Log-probability of each unit of the bank for each condition, up to a constant per row: [N, M].

        The cosine of query and key times a learned sharpness, as in CLIP (2103.00020). condition [N, H],
        bank_condition [M, H]."""
        query = F.normalize(self.query[kind](condition), dim=1)
        key = F.normalize(self.key[kind](bank_condition), dim=1)
        return (SHARPNESS_SPEED * self.sharpness).exp().clamp(max=1000.0) * query @ key.mT

    def bank_embedding(self, kind: str, bank: Bank) -> Tensor:
        """Embeds the conditions of the bank's units, [M, H]."""
        return self.condition_embedding(kind, bank.features, bank.family, bank.context, bank.partners)

    def forward(
        self,
        kind: str,
        x: Tensor,  # [N, T] noisy tokens, (1 - sigma) token + sigma noise
        sigma: Tensor,  # [N]
        condition: Tensor,  # [N, H], from `condition_embedding`
        candidates: Candidates | None = None,
        conditional: Tensor | None = None,  # bool [N]: False drops the condition (classifier-free guidance)
    ) -> Tensor:
        """The velocity noise - token, [N, T]."""
        if conditional is not None:
            condition = torch.where(conditional[:, None], condition, self.unconditional)
        condition = condition + self.time(sigma_embedding(sigma, 64)) + self.kind.weight[self.index[kind]]
        h = self.read[kind](x)
        for block in self.trunk:
            h = block(h, condition)
        velocity = self.write[kind](self.last(h))
        bandwidth = self.config["bandwidth"]
        if candidates is None or bandwidth is None:
            return velocity
        return velocity + mixture_velocity(x, sigma, candidates.tokens, candidates.log_prior, bandwidth)


def _zero_initialised(linear: nn.Linear) -> nn.Linear:
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear
