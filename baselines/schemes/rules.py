"""Initialisations by rule: the distribution of a matrix follows from its role and sizes."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from baselines.schemes.default import Default
from zoo.errors import UserError
from zoo.options import option
from zoo.parallel.threads import make_in_order
from zoo.sampler import Sampler
from zoo.streams import stream
from zoo.targets.blueprint import Blueprint
from zoo.tensors import Part, TensorSpec, join_parts

if TYPE_CHECKING:
    from zoo.donors.zoo import Zoo

RESIDUAL_WRITERS = ("attn.o", "mlp.down")  # matrices that write to the residual stream
NORM_LAYERS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
AFFINE_LAYERS = (nn.Linear, _ConvNd, nn.MultiheadAttention)


@dataclass(frozen=True)
class MatrixSlot:
    """A matrix to fill, with all that the rules need. `role` is `other` where a plain module's names do not tell it."""

    role: str
    shape: tuple[int, ...]  # logical: [out, in], [out, in / groups, ...] for a convolution
    width: int  # of the residual stream; the fan-in where there is none
    layer: int
    layers: int
    gated: bool  # the MLPs have a gate
    tied: bool  # the embedding is the head too
    groups: int = 1
    transposed: bool = False  # a transposed convolution: [in, out / groups, ...]


@dataclass(kw_only=True)
class Scheme(Sampler):
    """Fills matrices by a rule. Gains multiply by one, biases and shifts are zero.

    A language model's tensors of unknown role (routers, state-space parameters) keep their default. In a plain module
    the kind of a tensor follows from its layer: linear, convolution, embedding, attention and norm layers are filled,
    others (recurrent layers, bare parameters) keep their default. Matrices that write to a residual stream are known by
    name only (`layers.0.attn.out_proj`); all others follow the rule for matrices that read it.
    """

    family: ClassVar[str] = "scheme"

    @abstractmethod
    def draw(self, slot: MatrixSlot, generator: torch.Generator) -> Tensor | None:
        """A float32 tensor of `slot.shape`, or None for the architecture's default."""

    def planned_donors(self, zoo: Zoo | None, blueprint: Blueprint) -> tuple[str, ...]:
        if not any(True for _ in tensors_of_known_kind(blueprint)):
            raise UserError(
                f"{self.name}: has a rule for none of the target's {len(blueprint.specs)} tensors; use default"
            )
        return ()

    def fit(self, zoo: Zoo | None, blueprint: Blueprint) -> Self:
        self.planned_donors(zoo, blueprint)
        return self

    def sample(self, blueprint: Blueprint, seed: int = 0) -> Iterator[tuple[str, Tensor]]:
        metadata = blueprint.metadata
        layers = metadata.layers if metadata else 1 + max((s.layer or 0 for s in blueprint.specs), default=0)
        gated = bool(blueprint.find("mlp.gate"))
        known = [
            (s, owner) for s, owner in tensors_of_known_kind(blueprint) if self.only is None or s.name in self.only
        ]
        owners = {spec.name: owner for spec, owner in known}

        def make(spec: TensorSpec) -> Tensor | None:
            if spec.kind == "bias" or spec.role == "norm":
                return torch.full(spec.shape, 1.0 - blueprint.offset(spec) if spec.kind == "weight" else 0.0)
            owner = owners[spec.name]
            generator = stream(seed, f"{self.name}/{spec.name}", self.device)
            parts = {}
            for part in spec.parts:
                width = metadata.width if metadata else math.prod(part.shape[1:])
                tied = metadata.tied if metadata else spec.name in blueprint.ties.values()
                tied = tied and part.role == "embed" and part.axes[0] == "vocab"
                groups, transposed = getattr(owner, "groups", 1), isinstance(owner, _ConvTransposeNd)
                slot = MatrixSlot(
                    part.role, part.shape, width, spec.layer or 0, layers, gated, tied, groups, transposed
                )
                parts[part.role] = self.draw(slot, generator)
            filled = {role: tensor for role, tensor in parts.items() if tensor is not None}
            return join_parts(spec, filled).cpu() if len(filled) == len(parts) else None

        yield from make_in_order([spec for spec, _ in known], make)


def tensors_of_known_kind(blueprint: Blueprint) -> Iterator[tuple[TensorSpec, nn.Module | None]]:
    """(spec, owner) of the tensors of known kind; the owner is None for a language model.

    In a plain module the module that owns a tensor gives its role: norm, embed, the parts of torch's fused attention.
    """
    module = blueprint.module
    if module is None or hasattr(module, "save_pretrained"):
        yield from ((spec, None) for spec in blueprint.specs if spec.role not in ("other", "conv"))
        return
    for spec in blueprint.specs:
        owner = module.get_submodule(spec.name.rpartition(".")[0])
        parts = spec.parts
        if isinstance(owner, NORM_LAYERS):
            parts = (replace(parts[0], role="norm"),)
        elif isinstance(owner, (nn.Embedding, nn.EmbeddingBag)):
            parts = (Part("embed", ("vocab", "other"), spec.shape),)
        elif spec.name.endswith("in_proj_weight") and isinstance(owner, nn.MultiheadAttention):
            third = (spec.shape[0] // 3, spec.shape[1])
            parts = tuple(Part(f"attn.{r}", ("heads", "residual"), third) for r in "qkv")
        elif spec.kind == "weight" and isinstance(owner, NonDynamicallyQuantizableLinear):  # torch's out_proj
            parts = (Part("attn.o", ("residual", "heads"), spec.shape),)
        is_affine = isinstance(owner, AFFINE_LAYERS) and (spec.kind == "bias" or len(spec.shape) == 2)
        if is_affine or any(part.role != "other" for part in parts):
            yield replace(spec, parts=parts), owner


@dataclass(kw_only=True)
class GPT2(Scheme):
    """GPT-2's rule: N(0, 0.02), and 0.02 / sqrt(2 L) for what writes to the residual stream of L layers."""

    name: ClassVar[str] = "gpt2"
    summary: ClassVar[str] = "N(0, 0.02), divided by sqrt(2 layers) for what writes to the residual stream"
    reference: ClassVar[str] = "karpathy/nanoGPT"

    std: float = option(0.02, "standard deviation of what does not write to the residual stream", above=0.0)

    def draw(self, slot: MatrixSlot, generator: torch.Generator) -> Tensor:
        std = self.std / math.sqrt(2 * slot.layers) if slot.role in RESIDUAL_WRITERS else self.std
        return std * torch.randn(slot.shape, generator=generator, device=generator.device)


def torchtitan_std(slot: MatrixSlot, std: float) -> tuple[float, float]:
    """(standard deviation, bound) of torchtitan.

    std with absolute bounds of 2, which have no effect in practice. Residual writers, and the ungated half of a gated
    MLP, are divided by sqrt(2 (layer + 1)). The head has d^-1/2 within 3 deviations. Embeddings are N(0, 1), or like
    the head where the two are tied. Our choice: positions like embeddings.
    """
    if slot.role == "head" or slot.tied:
        return slot.width**-0.5, 3 * slot.width**-0.5
    if slot.role == "embed":
        return 1.0, math.inf
    deep = slot.role in RESIDUAL_WRITERS or (slot.role == "mlp.up" and slot.gated)
    return (std / math.sqrt(2 * (slot.layer + 1)) if deep else std), 2.0


def olmo_std(slot: MatrixSlot, std: float) -> tuple[float, float]:
    """(standard deviation, bound) of OLMo's `mitchell`: d^-1/2, cut at 3 deviations.

    Output projections have (2 d (layer + 1))^-1/2 in attention and (2 ffn (layer + 1))^-1/2 in the MLP.
    """
    fan_in = slot.shape[1] if slot.role == "mlp.down" else slot.width
    std = (fan_in * (2 * (slot.layer + 1) if slot.role in RESIDUAL_WRITERS else 1)) ** -0.5
    return std, 3 * std


def olmo2_std(slot: MatrixSlot, std: float) -> tuple[float, float]:
    """(standard deviation, bound) of OLMo 2 (`normal` of OLMo-core): one deviation for all, cut at 3 deviations."""
    return std, 3 * std


RECIPES = {"torchtitan": torchtitan_std, "olmo": olmo_std, "olmo2": olmo2_std}


@dataclass(kw_only=True)
class TruncatedNormal(Scheme):
    """Truncated normals as in three open training codes: `torchtitan`, `olmo` (its `mitchell`) and `olmo2`."""

    name: ClassVar[str] = "truncated-normal"
    summary: ClassVar[str] = "truncated normals of torchtitan, OLMo or OLMo 2, scaled by depth"
    reference: ClassVar[str] = "pytorch/torchtitan, allenai/OLMo"
    choices: ClassVar[dict[str, tuple[str, ...]]] = {"recipe": tuple(RECIPES)}

    recipe: str = option("torchtitan", "whose rule: torchtitan, olmo or olmo2")
    std: float = option(0.02, "standard deviation before the scaling by depth; olmo has d^-1/2 instead", above=0.0)

    def draw(self, slot: MatrixSlot, generator: torch.Generator) -> Tensor:
        std, bound = RECIPES[self.recipe](slot, self.std)
        if math.isinf(bound):
            return std * torch.randn(slot.shape, generator=generator, device=generator.device)
        return nn.init.trunc_normal_(
            torch.empty(slot.shape, device=generator.device), 0.0, std, -bound, bound, generator=generator
        )


@dataclass(kw_only=True)
class ScaledDefault(Default):
    """The architecture's own draws times a scale; smaller than the default is often better (2606.17945).

    Token and position tables and the head may have a scale of their own.
    """

    name: ClassVar[str] = "scaled-default"
    summary: ClassVar[str] = "the architecture's own draws times a scale, embeddings and head times another"
    reference: ClassVar[str] = "2606.17945"

    scale: float = option(0.5, "multiplies weights with two or more dimensions")
    embeddings: float | None = option(None, "multiplies embeddings and head; none: same as scale")

    def multiplier(self, spec: TensorSpec) -> float:
        is_table = spec.kind == "weight" and spec.role in ("embed", "head")
        return self.embeddings if is_table and self.embeddings is not None else super().multiplier(spec)


@dataclass(kw_only=True)
class Identity(Scheme):
    """Residual blocks that add nothing at first: what writes to the stream is zero (`idinit`: `epsilon`).

    The model then starts as its embedding, norm and head.

    zero      ZerO (2110.12661): partial identities, and Hadamard matrices where the dimension grows
    idinit    IDInit (2503.04626): identities repeated along the longer axis, and `noise` on all matrices
    nanochat  karpathy/nanochat: uniform with deviation d^-1/2, embeddings N(0, 1), head N(0, 0.001)

    Our choice: in `idinit` identities also repeat along a longer input, convolutions are matrices over patches, and
    noise is on, because repeated units would stay equal. In `nanochat`, which has no tied table, a tied one is N(0,
    d^-1/2). Embeddings and head of `zero` and `idinit` keep their default: as identities they would give tokens the
    same vector.

    As published, `zero` gives FFN neurons that are copies of each other, because rows of a Hadamard matrix that is
    cut to d columns repeat, and their writer is zero. They stay copies in training. Set `noise` to separate them.
    """

    name: ClassVar[str] = "identity"
    summary: ClassVar[str] = "residual blocks that add nothing at first: IDInit, ZerO, or nanochat's zero projections"
    reference: ClassVar[str] = "2503.04626, 2110.12661, karpathy/nanochat"
    choices: ClassVar[dict[str, tuple[str, ...]]] = {"scheme": ("idinit", "zero", "nanochat")}

    scheme: str = option("idinit", "idinit, zero or nanochat")
    epsilon: float = option(1e-6, "idinit: the diagonal of what writes to the residual stream", least=0.0)
    noise: float | None = option(
        None, "standard deviation of noise on identities; none: 1e-6 for idinit, 0 for zero", least=0.0
    )

    def draw(self, slot: MatrixSlot, generator: torch.Generator) -> Tensor | None:
        if self.scheme == "nanochat":
            return _nanochat_matrix(slot, generator)
        if slot.role in ("embed", "head"):
            return None
        if slot.role in RESIDUAL_WRITERS:
            return torch.zeros(slot.shape) if self.scheme == "zero" else self.epsilon * repeated_identity(*slot.shape)
        noise = self.noise if self.noise is not None else 1e-6 if self.scheme == "idinit" else 0.0
        matrix = (
            _identity_convolution(slot, self.scheme)
            if len(slot.shape) > 2
            else _identity_matrix(self.scheme, *slot.shape)
        )
        if not noise:
            return matrix
        return matrix.to(generator.device) + noise * torch.randn(
            slot.shape, generator=generator, device=generator.device
        )


def _nanochat_matrix(slot: MatrixSlot, generator: torch.Generator) -> Tensor:
    if slot.role in RESIDUAL_WRITERS:
        return torch.zeros(slot.shape)
    if slot.role in ("embed", "head"):
        std = slot.width**-0.5 if slot.tied else 1.0 if slot.role == "embed" else 0.001
        return std * torch.randn(slot.shape, generator=generator, device=generator.device)
    bound = math.sqrt(3 / slot.width)
    return torch.empty(slot.shape, device=generator.device).uniform_(-bound, bound, generator=generator)


def _identity_matrix(scheme: str, rows: int, columns: int) -> Tensor:
    return repeated_identity(rows, columns) if scheme == "idinit" else zero_matrix(rows, columns)


def _identity_convolution(slot: MatrixSlot, scheme: str) -> Tensor:
    """Each group alone. ZerO puts its matrix at the kernel's centre; IDInit fills [out, in x kernel] as a matrix."""
    rows, columns, *kernel = slot.shape
    rows //= slot.groups
    if scheme == "idinit":
        one = repeated_identity(rows, columns * math.prod(kernel)).unflatten(1, (columns, *kernel))
    else:
        centre: tuple[slice | int, ...] = (slice(None), slice(None), *(k // 2 for k in kernel))
        one = torch.zeros(rows, columns, *kernel)
        one[centre] = zero_matrix(columns, rows).mT if slot.transposed else zero_matrix(rows, columns)
    return one.repeat(slot.groups, *(1 for _ in slot.shape[1:]))


def repeated_identity(rows: int, columns: int) -> Tensor:
    """[rows, columns] float32: identities repeated along the longer axis, the last one cut (IDInit)."""
    longest = torch.arange(max(rows, columns))
    matrix = torch.zeros(rows, columns)
    matrix[longest % rows, longest % columns] = 1.0
    return matrix


def zero_matrix(rows: int, columns: int) -> Tensor:
    """[rows, columns] float32: a partial identity, or the corner of a normalised Hadamard matrix of the next power of
    two where rows > columns (Algorithm 1 of 2110.12661, constant as in the authors' code)."""
    if rows <= columns:
        return torch.eye(rows, columns)
    power = math.ceil(math.log2(rows))
    sign = torch.ones(1, 1)
    for _ in range(power):
        top, bottom = torch.cat([sign, sign], dim=1), torch.cat([sign, -sign], dim=1)
        sign = torch.cat([top, bottom])[:rows, :columns]
    return sign / 2 ** (power / 2)
