"""Hard-concrete masks over the parts of a Llama-like model, learned under a Lagrangian (2310.06694, after 1712.01312).

The mask z of a part is a draw of a stretched concrete variable, clipped to [0, 1]: with u uniform,
z = clip(1.2 sigmoid((log u - log(1 - u) + a) / T) - 0.1), T = 2/3. Training changes its log-odds a, which start open
and stay between log 0.01 and log 100. With masks of zero and one the masked model is the pruned model.

Letters: L layers, d width, K KV groups, F neurons.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from baselines.calibration import module_holding
from zoo.streams import stream
from zoo.targets.blueprint import Blueprint
from zoo.tensors import Metadata

LOW, HIGH, TEMPERATURE = -0.1, 1.1, 2 / 3
MAX_LOG_ODDS = math.log(100.0)
AXES = ("residual", "groups", "ffn", "layers")

# Architectures whose residual stream is read only through RMSNorms, and whose heads and neurons write by one matrix.
SUPPORTED = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "phi3", "gemma")


class MaskDistribution(nn.Module):
    """The distribution of the masks: log-odds and Lagrange multipliers for every axis that shrinks."""

    def __init__(self, source: Metadata, target: Metadata) -> None:
        super().__init__()
        shapes = {
            "residual": (source.width,),
            "groups": (source.layers, source.kv_heads),
            "ffn": (source.layers, source.ffn),
            "layers": (source.layers,),
        }
        sizes = {"residual": target.width, "groups": target.kv_heads, "ffn": target.ffn, "layers": target.layers}
        self.target = {axis: sizes[axis] / shape[-1] for axis, shape in shapes.items() if sizes[axis] < shape[-1]}
        self.log_odds = nn.ParameterDict({axis: torch.full(shapes[axis], MAX_LOG_ODDS) for axis in self.target})
        self.linear = nn.ParameterDict({axis: torch.zeros(()) for axis in self.target})
        self.quadratic = nn.ParameterDict({axis: torch.zeros(()) for axis in self.target})

    def draw(self, seed: int, name: str) -> dict[str, Tensor]:
        """axis -> masks in [0, 1], of the shape of the log-odds, from the random stream (seed, name)."""
        out = {}
        for axis, odds in self.log_odds.items():
            u = torch.rand(odds.shape, generator=stream(seed, f"{name}/{axis}")).clamp(1e-6, 1 - 1e-6).to(odds.device)
            concrete = torch.sigmoid((u.log() - (1 - u).log() + odds) / TEMPERATURE)
            out[axis] = (concrete * (HIGH - LOW) + LOW).clamp(0, 1)
        return out

    def expected_open(self) -> dict[str, Tensor]:
        """axis -> [] or [L]: the expected share of parts whose mask is not zero."""
        shift = TEMPERATURE * math.log(-LOW / HIGH)
        return {axis: torch.sigmoid(odds - shift).mean(-1) for axis, odds in self.log_odds.items()}

    def penalty(self, progress: float, equality: bool = False) -> Tensor:
        """The Lagrangian: the sum over axes of the mean over layers of l1 g + l2 g^2, with g = min(0, t - e).

        e is the expected share of open parts. t is the share that the target keeps, approached from 1 as `progress`
        goes from 0 to 1. Minimised over the log-odds, maximised over the multipliers l1 and l2. equality: g = t - e,
        which also opens parts where e is too small.
        """
        total = torch.zeros((), device=next(self.parameters()).device)
        for axis, share in self.expected_open().items():
            gap = 1 - min(1.0, progress) * (1 - self.target[axis]) - share
            gap = gap if equality else gap.clamp(max=0)
            total = total + (self.linear[axis] * gap + self.quadratic[axis] * gap.square()).mean()
        return total

    @torch.no_grad()
    def clamp(self) -> None:
        for odds in self.log_odds.values():
            odds.clamp_(-MAX_LOG_ODDS, MAX_LOG_ODDS)


@contextlib.contextmanager
def apply_masks(model: nn.Module, blueprint: Blueprint, masks: Mapping[str, Tensor]) -> Iterator[None]:
    """While it is open, the model runs under the masks that the mapping holds at the time of a forward pass.

    masks: residual [d], groups [L, K], ffn [L, F], layers [L]; an axis that is missing stays open. A norm of the stream
    divides by the number of coordinates that are kept.
    """
    meta = blueprint.metadata
    assert meta is not None
    eps, offset = float(str(meta.extra["norm_eps"])), meta.gain_offset
    per_group = meta.heads // meta.kv_heads * meta.head_dim

    def norm(module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if "residual" not in masks:
            return output
        z = masks["residual"]
        x = args[0] * z
        return (module.weight + offset) * x * torch.rsqrt(x.square().sum(-1, keepdim=True) / z.square().sum() + eps)

    def heads(layer: int) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (args[0] * masks["groups"][layer].repeat_interleave(per_group),) if "groups" in masks else args

        return hook

    def neurons(layer: int) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (args[0] * masks["ffn"][layer],) if "ffn" in masks else args

        return hook

    def block(layer: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            return output * masks["layers"][layer] if "layers" in masks else output

        return hook

    handles = []
    for spec, _ in blueprint.find("norm"):
        if spec.site in ("attn", "mlp", "final"):
            handles.append(module_holding(model, spec.name).register_forward_hook(norm))
    for role, readers in (("attn.o", heads), ("mlp.down", neurons)):
        for spec, _ in blueprint.find(role):
            assert spec.layer is not None
            module = module_holding(model, spec.name)
            handles += [module.register_forward_pre_hook(readers(spec.layer))]
            handles += [module.register_forward_hook(block(spec.layer))]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
