"""The denoiser: a small transformer over a model's latents (2212.09748), one token for the model and one per block.

Letters: N models, L blocks, Z size of a latent."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional as F

from autoencoder.field import DEPTH_FEATURES, depth_features
from diffusion.conditions import condition_groups, scaled

TIMES = 32  # Fourier features of the noise level


class LatentDenoiser(ModelMixin, ConfigMixin):
    """Noisy latents, noise level and condition -> velocity.

    latents: sizes of a model's latent and of a block's. Latents are scaled to unit RMS by `scale`. several_families:
    whether the family of a model is part of the condition."""

    CONFIG_KINDS: ClassVar = {
        **dict.fromkeys(("model_latent", "block_latent", "hidden", "layers", "heads"), int),
        "several_families": (None, bool),
    }

    @register_to_config
    def __init__(
        self,
        model_latent: int,
        block_latent: int,
        hidden: int = 128,
        layers: int = 3,
        heads: int = 4,
        several_families: bool = False,
    ) -> None:
        super().__init__()
        self.group_sizes = condition_groups(several_families)
        size = sum(self.group_sizes.values())
        self.read = nn.ModuleDict({"model": nn.Linear(model_latent, hidden), "block": nn.Linear(block_latent, hidden)})
        self.write = nn.ModuleDict({"model": nn.Linear(hidden, model_latent), "block": nn.Linear(hidden, block_latent)})
        self.place = nn.Linear(DEPTH_FEATURES, hidden)
        self.model_place = nn.Parameter(torch.zeros(hidden))
        self.time = nn.Sequential(nn.Linear(2 * TIMES, hidden), nn.SiLU(), nn.Linear(hidden, hidden))
        self.groups = nn.ModuleDict({name: nn.Linear(size, hidden) for name, size in self.group_sizes.items()})
        self.unconditional = nn.Parameter(torch.zeros(hidden))
        self.mix = nn.Sequential(nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, hidden))
        self.blocks = nn.ModuleList(_Block(hidden, heads) for _ in range(layers))
        self.register_buffer("mean", torch.zeros(size))  # of the conditions
        self.register_buffer("inverse", torch.zeros(size))
        self.register_buffer("model_scale", torch.ones(2, model_latent))  # mean and deviation of the latents
        self.register_buffer("block_scale", torch.ones(2, block_latent))
        for write in self.write.values():
            nn.init.zeros_(write.get_parameter("weight"))
            nn.init.zeros_(write.get_parameter("bias"))

    def embed(self, conditions: Tensor) -> Tensor:
        """Conditions [N, size], NaN where unknown -> [N, hidden]."""
        values = scaled(conditions, self.get_buffer("mean"), self.get_buffer("inverse"))
        parts = dict(zip(self.group_sizes, values.split(list(self.group_sizes.values()), dim=-1), strict=True))
        return self.mix(F.silu(sum(self.groups[name](part) for name, part in parts.items())))

    def forward(self, model: Tensor, blocks: Tensor, sigma: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """model [N, Z], blocks [N, L, Z], sigma [N] in [0, 1], condition [N, hidden] -> velocities of both."""
        angle = sigma[:, None] * torch.exp(torch.linspace(0, math.log(200.0), TIMES, device=sigma.device))
        vector = self.time(torch.cat([angle.sin(), angle.cos()], dim=1)) + condition
        places = self.place(depth_features(torch.arange(blocks.shape[1]), blocks.shape[1]).to(blocks))
        x = torch.cat(
            [(self.read["model"](model) + self.model_place)[:, None], self.read["block"](blocks) + places], dim=1
        )
        for block in self.blocks:
            x = block(x, vector)
        return self.write["model"](x[:, 0]), self.write["block"](x[:, 1:])


class _Block(nn.Module):
    """Attention and MLP whose norms are scaled, shifted and gated by the condition (adaLN-zero)."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(hidden, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(hidden, 4 * hidden), nn.GELU(), nn.Linear(4 * hidden, hidden))
        self.norm = nn.LayerNorm(hidden, elementwise_affine=False)
        self.modulation = nn.Linear(hidden, 6 * hidden)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, vector: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(F.silu(vector))[:, None].chunk(6, dim=-1)
        h = self.norm(x) * (1 + scale_a) + shift_a
        x = x + gate_a * self.attention(h, h, h, need_weights=False)[0]
        return x + gate_m * self.mlp(self.norm(x) * (1 + scale_m) + shift_m)
