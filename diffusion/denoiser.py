"""The denoiser: the exact velocity of a mixture over the zoo's units, whose weights are learned, plus a network.

A token is a unit's latent and log-norms (`memory.TokenScale`). Given its condition, a unit's token is modelled as one
of the bank's, chosen by a learned prior over the bank, plus normal noise of a fixed bandwidth: for that mixture the
flow's velocity is known in closed form (2310.12395). adaLN-Zero blocks (DiT, 2212.09748) add what the mixture lacks:
they start at zero, and alone they are a plain diffusion.

Units are independent given their condition, so the cost is linear in their number. What binds the units of a model is
a context vector that all of them share and that is generated first, as a token of its own kind; those of a block or a
head, that the pipeline chooses one of the bank's for them all; query heads of a group, the partner token.

Letters: N units, M units of the bank, T token size of a kind, H hidden size, X context size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional as F

from diffusion.conditions import FEATURES
from diffusion.memory import Bank

CONTEXT = "context"
KEY_SIZE = 64  # size of the queries and keys of the prior
SHARPNESS_SPEED = 5.0  # how much faster than the other parameters the prior's sharpness is learned
KINDS_WITH_PARTNER = ("vocab", "qk", "vo")  # kinds whose units may have a partner


def sigma_embedding(sigma: Tensor, size: int) -> Tensor:
    """[N] noise levels in [0, 1] -> sinusoids [N, size]."""
    half = size // 2
    waves = torch.exp(-math.log(1e4) * torch.arange(half, device=sigma.device) / half)
    angle = 1e3 * sigma[:, None] * waves
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def mixture_velocity(x: Tensor, sigma: Tensor, tokens: Tensor, log_prior: Tensor, bandwidth: float) -> Tensor:
    """E[noise - token | x] for x = (1 - sigma) token + sigma noise, where token is normal with deviation `bandwidth`
    around row i of `tokens` with probability softmax(log_prior)_i. [N, T].

    x [N, T], sigma [N], tokens [M, T] or [N, M, T], log_prior [N, M]."""
    keep, noise = (1 - sigma)[:, None], sigma[:, None]
    variance = noise.square() + (keep * bandwidth).square()  # of x given its component, [N, 1]
    if tokens.ndim == 2:
        inner, square = x @ tokens.mT, tokens.square().sum(1)
    else:
        inner, square = (tokens @ x.unsqueeze(-1)).squeeze(-1), tokens.square().sum(2)
    likelihood = (keep * inner - 0.5 * keep.square() * square) / variance  # up to a constant in i
    weights = (log_prior + likelihood).softmax(dim=1)  # [N, M]
    mean = weights @ tokens if tokens.ndim == 2 else (weights.unsqueeze(1) @ tokens).squeeze(1)
    return (noise - keep * bandwidth**2) / variance * (x - keep * mean) - mean


@dataclass(frozen=True)
class Candidates:
    """The components of the mixture for N units: tokens [M, T] or [N, M, T], and log-prior [N, M]."""

    tokens: Tensor
    log_prior: Tensor


def mask_to_group(log_prior: Tensor, wanted: Tensor | None, group: Tensor | None) -> Tensor:
    """A token whose string donors have is one of theirs of that string, and a unit of a head is of the head that was
    chosen for it: [N, M] with -inf elsewhere. wanted int64 [N], the group of each unit, -1 where it may be of any;
    group int64 [M], those of the bank. None: units without any."""
    if wanted is None or group is None:
        return log_prior
    return log_prior.masked_fill((wanted[:, None] >= 0) & (wanted[:, None] != group), -math.inf)


class Block(nn.Module):
    """A residual MLP whose normalisation and gate are set by the condition; the gate starts at zero."""

    def __init__(self, hidden: int, expand: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden, elementwise_affine=False)
        self.mlp = nn.Sequential(nn.Linear(hidden, expand * hidden), nn.GELU(), nn.Linear(expand * hidden, hidden))
        self.modulation = nn.Sequential(nn.SiLU(), _zero_initialised(nn.Linear(hidden, 3 * hidden)))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(condition).chunk(3, dim=1)  # [N, H] each
        return x + gate * self.mlp(self.norm(x) * (1 + scale) + shift)


class UnitDenoiser(ModelMixin, ConfigMixin):
    """tokens: {kind: T}, `context` among them; families: the architectures seen in training (others share one
    embedding); hidden, blocks, expand: size of the network; bandwidth: deviation of a unit from the bank's, in units
    of a token's RMS; None: no bank, a plain diffusion."""

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
        """What is known of units, [N, H]: features [N, FEATURES], family int64 [N] (0: never seen), context [N, X],
        partner [N, T] (zeros where there is none)."""
        known = self.metadata(features) + self.architecture(family)
        if context is not None:
            known = known + self.context(context)
        if partner is not None and kind in self.partner:
            known = known + self.partner[kind](partner) * (partner != 0).any(1, keepdim=True)
        return known

    def log_prior(self, kind: str, told: Tensor, bank_told: Tensor) -> Tensor:
        """[N, M]: how likely each unit of the bank is under the conditions, up to a constant per row. Cosine of query
        and key with a learned sharpness, as in CLIP (2103.00020)."""
        query = F.normalize(self.query[kind](told), dim=1)
        key = F.normalize(self.key[kind](bank_told), dim=1)
        return (SHARPNESS_SPEED * self.sharpness).exp().clamp(max=1000.0) * query @ key.mT

    def bank_embedding(self, kind: str, bank: Bank) -> Tensor:
        """[M, H]: the conditions of the bank's units."""
        return self.condition_embedding(kind, bank.features, bank.family, bank.context, bank.partners)

    def forward(
        self,
        kind: str,
        x: Tensor,  # [N, T] noisy tokens, (1 - sigma) token + sigma noise
        sigma: Tensor,  # [N]
        told: Tensor,  # [N, H], from `condition_embedding`
        candidates: Candidates | None = None,
        conditional: Tensor | None = None,  # bool [N]: False drops the condition (classifier-free guidance)
    ) -> Tensor:
        """The velocity noise - token, [N, T]."""
        if conditional is not None:
            told = torch.where(conditional[:, None], told, self.unconditional)
        condition = told + self.time(sigma_embedding(sigma, 64)) + self.kind.weight[self.index[kind]]
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
