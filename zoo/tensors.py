"""What one tensor of a checkpoint is: its role, what its axes count, and the parts that are fused in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

# What an axis counts. `heads` is heads x head_dim, flattened head by head; `kv_heads` likewise; `shared_ffn` is the
# neurons of an MLP that every token uses beside its experts; `fixed` is coordinates that keep their number and order in
# a transfer (the latent space of DeepSeek's attention); `rank` is the rank of a LoRA pair; `other` is unknown.
AXES = (
    "residual", "heads", "kv_heads", "head_dim", "ffn", "shared_ffn", "vocab", "position", "experts", "fixed", "rank",
    "other",
)  # fmt: skip

# `other`: no method models it. Transfers move it where its axes are known (a router), or copy it whole.

ROLES = (
    "embed", "head", "attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down",
    "norm", "conv", "lora.a", "lora.b", "other",
)  # fmt: skip

# Which normalisation a tensor of role `norm` belongs to. `attn` and `mlp` come before the readers of that block (before
# both in a parallel block), `attn.out` and `mlp.out` after its writer (Gemma 2/3, OLMo 2). `q` and `k` act on projected
# queries and keys. `final` comes before the head, `embed` after the embedding.
NORM_SITES = ("attn", "mlp", "attn.out", "mlp.out", "q", "k", "final", "embed")


@dataclass(frozen=True)
class Part:
    """One logical matrix, bias or gain of a tensor on disk, in torch's orientation [out, in]."""

    role: str  # one of ROLES
    axes: tuple[str, ...]  # of AXES, one per logical axis: ("heads", "residual") for a query projection
    shape: tuple[int, ...]  # one size per axis


@dataclass(frozen=True)
class TensorSpec:
    """One tensor on disk.

    It has several parts where the architecture fuses matrices (GPT-2's c_attn, NeoX's query_key_value, Phi-3's qkv_proj
    and gate_up_proj). `split_parts` and `join_parts` convert between a tensor and its parts. `interleave` is the number
    of groups where heads are fused group by group: NeoX has one per head, Falcon one per KV head.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: tuple[Part, ...]
    layer: int | None = None  # None for tensors outside the blocks
    kind: str = "weight"  # weight | bias
    site: str | None = None  # of NORM_SITES, for norms only
    expert: int | None = None
    transposed: bool = False  # stored as [in, out] (GPT-2's Conv1D)
    interleave: int = 0  # > 0: fused group by group, each group of rows has its share of every part (NeoX, Falcon)

    @property
    def role(self) -> str:
        """The role of the whole tensor: `attn.q`, or `attn.qkv` / `mlp.gate_up` for a fused one."""
        if len(self.parts) == 1:
            return self.parts[0].role
        family, first = self.parts[0].role.split(".")
        rest = [p.role.split(".")[1] for p in self.parts[1:]]
        return f"{family}.{first}{''.join(rest)}" if family == "attn" else f"{family}.{'_'.join([first, *rest])}"

    @property
    def numel(self) -> int:
        """The number of its values."""
        return int(torch.Size(self.shape).numel())


def split_parts(spec: TensorSpec, tensor: Tensor) -> dict[str, Tensor]:
    """A tensor as stored -> {role: logical matrix [out, in]}, views where possible."""
    logical = tensor.mT if spec.transposed and tensor.ndim == 2 else tensor
    if len(spec.parts) == 1:
        return {spec.parts[0].role: logical}
    if spec.interleave:
        shares = [p.shape[0] // spec.interleave for p in spec.parts]
        blocks = logical.unflatten(0, (spec.interleave, -1)).split(shares, dim=1)
        return {p.role: block.flatten(0, 1) for p, block in zip(spec.parts, blocks, strict=True)}
    rows = logical.split([p.shape[0] for p in spec.parts], dim=0)
    return {p.role: r for p, r in zip(spec.parts, rows, strict=True)}


def join_parts(spec: TensorSpec, parts: Mapping[str, Tensor]) -> Tensor:
    """The inverse of `split_parts`: {role: logical matrix} -> the contiguous tensor as stored, in the parts' dtype."""
    ordered = [parts[p.role] for p in spec.parts]
    if len(ordered) == 1:
        logical = ordered[0]
    elif spec.interleave:
        logical = torch.cat([m.unflatten(0, (spec.interleave, -1)) for m in ordered], dim=1).flatten(0, 1)
    else:
        logical = torch.cat(ordered, dim=0)
    return (logical.mT if spec.transposed and logical.ndim == 2 else logical).contiguous()


@dataclass(frozen=True)
class Rotary:
    """Which coordinates of a head a rotary embedding turns in pairs (2104.09864)."""

    size: int  # how many are turned, the first ones; 0 without a rotary embedding
    neighbours: bool = False  # pairs are (0, 1), (2, 3), …; otherwise i and i + size / 2

    def planes(self) -> Tensor:
        """int64 [2, size / 2]: the two coordinates of each pair, from the highest frequency to the lowest."""
        coordinates = torch.arange(self.size)
        return coordinates.unflatten(0, (-1, 2)).T if self.neighbours else coordinates.unflatten(0, (2, -1))


@dataclass(frozen=True)
class Metadata:
    """An architecture in numbers: what the diffusion is conditioned on, and what decides which donors fit a target."""

    architecture: str  # the config's model_type
    layers: int
    width: int  # size of the residual stream
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    tied: bool = False  # head and embedding are one tensor
    norm: str = "rms"  # rms | layer
    rope_theta: float | None = 10000.0  # None: no rotary embedding
    positions: int = 0  # learned positions, 0 for none
    experts: int = 0  # experts per layer, 0 for dense
    extra: Mapping[str, object] = field(default_factory=dict)  # further facts that methods need (activation, …)

    @property
    def layer_sizes(self) -> Mapping[str, tuple[int, ...]]:
        """Fields whose size differs between layers (Gemma 4's head_dim) -> one size per layer; mostly empty."""
        return self.extra.get("layer_sizes", {})  # type: ignore[return-value]

    def at_layer(self, layer: int | None) -> Metadata:
        """The metadata with the sizes of one layer, where layers have sizes of their own."""
        sizes = {
            name: values[layer]
            for name, values in self.layer_sizes.items()
            if layer is not None and layer < len(values)
        }
        return replace(self, **sizes) if sizes else self  # type: ignore[arg-type]

    @property
    def rotary(self) -> Rotary:
        """The coordinates of a head that the rotary embedding turns."""
        if self.rope_theta is None:
            return Rotary(0)
        return Rotary(
            int(str(self.extra.get("rotary_dim", self.head_dim))), bool(self.extra.get("rotary_neighbours", False))
        )

    @property
    def embed_scale(self) -> float:
        """The factor by which the model multiplies its embeddings (Gemma: sqrt(width))."""
        return float(str(self.extra.get("embed_scale", 1.0)))

    @property
    def gain_offset(self) -> float:
        """What the model adds to the stored gain of a norm (Gemma: 1)."""
        return 1.0 if self.extra.get("rms_offset") else 0.0
