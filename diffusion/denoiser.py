"""The denoiser: adaLN-Zero blocks (DiT, 2212.09748) over unit tokens, one network for all kinds.

A token is a unit's latent and its log-norms, each block brought to unit scale (`TokenScale`). Units are independent
given their condition, so the cost is linear in their number; what binds the units of a model is a context vector that
all of them share and that the same network generates (kind `context`), and what binds the query heads of a group is
the partner token.

Letters: N units, T token size of a kind, H hidden size, X context size.
"""

from __future__ import annotations

import math

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from diffusion.conditions import FEATURES

CONTEXT = "context"


def sigma_embedding(sigma: Tensor, size: int) -> Tensor:
    """[N] noise levels in [0, 1] -> sinusoids [N, size]."""
    half = size // 2
    waves = torch.exp(-math.log(1e4) * torch.arange(half, device=sigma.device) / half)
    angle = 1e3 * sigma[:, None] * waves
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def _zeroed(linear: nn.Linear) -> nn.Linear:
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


class Block(nn.Module):
    """A residual MLP whose normalisation and gate are set by the condition; the gate starts at zero."""

    def __init__(self, hidden: int, expand: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden, elementwise_affine=False)
        self.mlp = nn.Sequential(nn.Linear(hidden, expand * hidden), nn.GELU(), nn.Linear(expand * hidden, hidden))
        self.modulation = nn.Sequential(nn.SiLU(), _zeroed(nn.Linear(hidden, 3 * hidden)))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(condition).chunk(3, dim=1)  # [N, H] each
        return x + gate * self.mlp(self.norm(x) * (1 + scale) + shift)


class UnitDenoiser(ModelMixin, ConfigMixin):
    """tokens: {kind: T}, `context` among them; families: the architectures seen in training (others share one
    embedding); hidden, blocks, expand: size of the network."""

    @register_to_config
    def __init__(
        self, tokens: dict[str, int], families: list[str], hidden: int = 256, blocks: int = 4, expand: int = 2
    ) -> None:
        super().__init__()
        self.kinds = {kind: i for i, kind in enumerate(tokens)}
        self.family = {name: i + 1 for i, name in enumerate(families)}
        self.read = nn.ModuleDict({k: nn.Linear(size, hidden) for k, size in tokens.items()})
        self.partner = nn.ModuleDict({k: nn.Linear(size, hidden) for k, size in tokens.items() if k != CONTEXT})
        self.write = nn.ModuleDict({k: _zeroed(nn.Linear(hidden, size)) for k, size in tokens.items()})
        self.kind_embedding = nn.Embedding(len(tokens), hidden)
        self.family_embedding = nn.Embedding(len(families) + 1, hidden)
        self.time = nn.Sequential(nn.Linear(64, hidden), nn.SiLU(), nn.Linear(hidden, hidden))
        self.metadata = nn.Sequential(nn.Linear(FEATURES, hidden), nn.SiLU(), nn.Linear(hidden, hidden))
        self.context = nn.Sequential(nn.Linear(tokens[CONTEXT], hidden), nn.SiLU(), nn.Linear(hidden, hidden))
        self.unconditional = nn.Parameter(torch.zeros(hidden))
        self.trunk = nn.ModuleList(Block(hidden, expand) for _ in range(blocks))
        self.last = nn.LayerNorm(hidden, elementwise_affine=False)
        for embedding in (self.kind_embedding, self.family_embedding):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(
        self,
        kind: str,
        x: Tensor,  # [N, T] noisy tokens
        sigma: Tensor,  # [N] noise levels: x = (1 - sigma) token + sigma noise
        features: Tensor,  # [N, FEATURES]
        family: Tensor,  # int64 [N], 0 for an architecture never seen
        context: Tensor | None = None,  # [N, X], for all kinds but `context`
        partner: Tensor | None = None,  # [N, T], zeros where there is none
        conditional: Tensor | None = None,  # bool [N]: False drops metadata and context (classifier-free guidance)
    ) -> Tensor:
        """The velocity noise - token, [N, T]."""
        known = self.metadata(features) + self.family_embedding(family)  # [N, H]
        if context is not None:
            known = known + self.context(context)
        if conditional is not None:
            known = torch.where(conditional[:, None], known, self.unconditional)
        condition = known + self.time(sigma_embedding(sigma, 64)) + self.kind_embedding.weight[self.kinds[kind]]
        h = self.read[kind](x)
        if partner is not None:
            told = self.partner[kind](partner) * (partner != 0).any(1, keepdim=True)
            h, condition = h + told, condition + told
        for block in self.trunk:
            h = block(h, condition)
        return self.write[kind](self.last(h))
