"""Mimetic initialisation: attention whose products resemble those of trained models, without a donor."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from torch import Tensor, nn

from baselines.schemes.rules import tensors_of_known_kind
from zoo.errors import UserError
from zoo.linear_algebra import symmetric_eigenvectors
from zoo.options import option
from zoo.sampler import Sampler
from zoo.streams import stream
from zoo.targets.blueprint import Blueprint
from zoo.tensors import TensorSpec, join_parts

if TYPE_CHECKING:
    from zoo.donors.zoo import Zoo

ROLES = ("attn.q", "attn.k", "attn.v", "attn.o")


@dataclass(frozen=True)
class AttentionBlock:
    """One attention block of the target: the tensors that hold its four matrices, and its heads."""

    specs: tuple[TensorSpec, ...]  # fused or not; their parts are attn.q, attn.k, attn.v and attn.o
    width: int  # of the stream that it reads and writes
    heads: int
    kv_heads: int
    head_dim: int
    depth: float  # 0 for the first, 1 for the last


@dataclass(kw_only=True)
class Mimetic(Sampler):
    """Attention whose products resemble those of trained models (2305.09828).

    W_Q W_K^T = qk_alpha Z + qk_beta I per head and W_V W_O = vo_alpha Z + vo_beta I per layer, with Var Z = 1 / width.
    A row x has the query x W_Q, so that q.weight = W_Q^T. MLPs, embeddings, norms and biases keep their default.

    A head holds the best approximation of rank head_dim of its product. Where query heads share keys, the keys are
    those of the group's first head, and the other queries are the best for these keys, M K (K^T K)^-1. V and O are
    one product for the whole layer, of rank kv_heads head_dim; query heads that share values get equal shares of
    their O.

    With rotary embeddings W_Q W_K^T is the product between equal positions; elsewhere a rotation stands between the
    two. Where queries and keys are normalised (Qwen 3) the direction of the products stays, but not their size. The
    paper's sinusoidal position embeddings are left out.

    Cost: an eigendecomposition [width, width] per KV head and one for V and O, in each layer. It takes 0.16 s each at
    width 1024 on one CPU core and grows with the cube; set `device` for wide targets. Nothing cheaper is accurate,
    because the spectrum of Z + I has no gap.
    """

    name: ClassVar[str] = "mimetic"
    family: ClassVar[str] = "scheme"
    summary: ClassVar[str] = "attention whose products Q K and V O are noisy multiples of the identity"
    reference: ClassVar[str] = "2305.09828"
    choices: ClassVar[dict[str, tuple[str, ...]]] = {"vo_depth": ("constant", "flip")}

    qk_alpha: float = option(0.7, "factor of the noise in W_Q W_K^T")
    qk_beta: float = option(0.7, "factor of the identity in W_Q W_K^T")
    vo_alpha: float = option(0.4, "factor of the noise in W_V W_O")
    vo_beta: float = option(-0.4, "factor of the identity in W_V W_O; language models and ViTs differ in its sign")
    vo_depth: str = option("constant", "vo_beta in all layers, or flip: linear to -vo_beta in the last (our choice)")
    heads: int | None = option(
        None, "query heads, for a plain module whose attention is not nn.MultiheadAttention", least=1
    )

    def planned_donors(self, zoo: Zoo | None, blueprint: Blueprint) -> tuple[str, ...]:
        find_attention(self, blueprint)
        return ()

    def fit(self, zoo: Zoo | None, blueprint: Blueprint) -> Self:
        self.planned_donors(zoo, blueprint)
        return self

    def sample(self, blueprint: Blueprint, seed: int = 0) -> Iterator[tuple[str, Tensor]]:
        for block in find_attention(self, blueprint):
            key = next(s.name for s in block.specs if any(p.role == "attn.k" for p in s.parts))
            value = next(s.name for s in block.specs if any(p.role == "attn.v" for p in s.parts))
            parts = self.queries_and_keys(block, stream(seed, f"{self.name}/qk/{key}", self.device))
            parts |= self.values_and_outputs(block, stream(seed, f"{self.name}/vo/{value}", self.device))
            for spec in block.specs:
                yield spec.name, join_parts(spec, parts).cpu()

    def queries_and_keys(self, block: AttentionBlock, generator: torch.Generator) -> dict[str, Tensor]:
        """{attn.q [heads head_dim, width], attn.k [kv_heads head_dim, width]}"""
        queries, keys = [], []
        for _ in range(block.kv_heads):
            product = self._noisy_identity(block.width, self.qk_alpha, self.qk_beta, generator)
            basis, scale = right_singular_vectors(product, block.head_dim)  # [width, r], [r]
            group = [product @ basis]
            for _ in range(block.heads // block.kv_heads - 1):
                # Z times orthonormal columns is as Gaussian as Z: no other [width, width] has to be drawn.
                noise = (
                    torch.randn(basis.shape, generator=generator, device=generator.device).to(self.device)
                    / block.width**0.5
                )
                group.append(self.qk_alpha * noise + self.qk_beta * basis)
            turn = orthonormal_rows(len(scale), block.head_dim, generator).to(self.device)  # [r, head_dim]
            keys.append(basis * scale.sqrt() @ turn)
            queries += [m / scale.sqrt() @ turn for m in group]
        return {"attn.q": torch.cat(queries, dim=1).mT, "attn.k": torch.cat(keys, dim=1).mT}

    def values_and_outputs(self, block: AttentionBlock, generator: torch.Generator) -> dict[str, Tensor]:
        """{attn.v [kv_heads head_dim, width], attn.o [width, heads head_dim]}"""
        share = block.heads // block.kv_heads
        beta = self.vo_beta * (1 - 2 * block.depth if self.vo_depth == "flip" else 1)
        product = self._noisy_identity(block.width, self.vo_alpha, beta, generator)
        basis, scale = right_singular_vectors(product, block.kv_heads * block.head_dim)
        turn = orthonormal_rows(len(scale), block.kv_heads * block.head_dim, generator).to(self.device)
        values = product @ basis / scale.sqrt() @ turn  # [width, kv_heads head_dim]
        outputs = (basis * scale.sqrt() @ turn).unflatten(1, (block.kv_heads, block.head_dim)) / share
        return {"attn.v": values.mT, "attn.o": outputs.repeat_interleave(share, dim=1).flatten(1)}

    def _noisy_identity(self, width: int, alpha: float, beta: float, generator: torch.Generator) -> Tensor:
        noise = torch.randn(width, width, generator=generator, device=generator.device).to(self.device)
        return (alpha / width**0.5) * noise + beta * torch.eye(width, device=self.device)


def right_singular_vectors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The leading right singular vectors [n, r] and values [r] of a matrix [n, n], descending, r = min(rank, n).

    With B the vectors, matrix B B^T is the best approximation of rank r, and the matrix itself for r = n.
    """
    # In float32, rounding errors would turn vectors of close values by 1e-4. Apple's mps has no float64.
    wide = (matrix.cpu() if matrix.device.type == "mps" else matrix).double()
    squares, vectors = symmetric_eigenvectors(wide.mT @ wide)
    rank = min(rank, len(matrix))
    number = torch.finfo(matrix.dtype)
    least = max(number.eps * float(squares[0]), number.tiny)
    return vectors[:, :rank].to(matrix), squares[:rank].clamp(min=least).sqrt().to(matrix)


def orthonormal_rows(rank: int, size: int, generator: torch.Generator) -> Tensor:
    """[rank, size] with orthonormal rows, which cancel in the product.

    The identity where size equals rank. Where heads are larger than the product's rank it is random, so that no row of
    theirs is zero.
    """
    if size == rank:
        return torch.eye(rank)
    return torch.linalg.qr(torch.randn(size, rank, generator=generator, device=generator.device)).Q.mT


def find_attention(sampler: Mimetic, blueprint: Blueprint) -> list[AttentionBlock]:
    """The attention blocks of a target. Raises UserError where there is none, or a plain module has no head count."""
    blocks: dict[str, list[TensorSpec]] = defaultdict(list)
    owners: dict[str, nn.MultiheadAttention] = {}
    for spec, owner in tensors_of_known_kind(blueprint):
        if spec.kind == "weight" and spec.role.startswith("attn."):
            blocks[_attention_path(spec.name)].append(spec)
            if isinstance(owner, nn.MultiheadAttention):
                owners[_attention_path(spec.name)] = owner
    whole = {name: specs for name, specs in blocks.items() if _part_shapes(specs).keys() == set(ROLES)}
    if not whole:
        seen = ", ".join(s.name for specs in blocks.values() for s in specs) or "none"
        raise UserError(
            f"mimetic: no attention of the target has known queries, keys, values and outputs (known: {seen});"
            " give a language model, nn.MultiheadAttention, or projections named q, k, v and proj"
        )
    last = max(1, len(whole) - 1)
    found = []
    for i, (name, specs) in enumerate(whole.items()):
        metadata, owner = blueprint.metadata, owners.get(name)
        heads = metadata.heads if metadata else owner.num_heads if owner else sampler.heads
        if heads is None:
            raise UserError(f"mimetic: the number of heads of {name} is unknown; set heads=N")
        found.append(_describe_attention(name, specs, heads, i / last))
    return found


def _attention_path(name: str) -> str:
    """The path of the attention that a tensor belongs to."""
    parent = name.removesuffix(".weight").rpartition(".")[0]
    inside = re.match(r"(.*att[^.]*)(\.|$)", parent, re.IGNORECASE)
    return inside[1] if inside else parent


def _part_shapes(specs: list[TensorSpec]) -> dict[str, tuple[int, ...]]:
    return {part.role: part.shape for spec in specs for part in spec.parts}


def _describe_attention(name: str, specs: list[TensorSpec], heads: int, depth: float) -> AttentionBlock:
    """One attention block. Raises UserError where its matrices are not those of `heads` heads on one stream."""
    shapes = _part_shapes(specs)
    queries, width = shapes["attn.q"]
    keys, head_dim = shapes["attn.k"][0], queries // heads
    expected = {
        "attn.q": (queries, width),
        "attn.k": (keys, width),
        "attn.v": (keys, width),
        "attn.o": (width, queries),
    }
    if shapes != expected or queries % heads or keys % head_dim or heads % (keys // head_dim):
        sizes = ", ".join(f"{role} {list(shapes[role])}" for role in ROLES)
        raise UserError(f"mimetic: {name} is not attention of {heads} heads within one stream: {sizes}")
    return AttentionBlock(tuple(specs), width, heads, keys // head_dim, head_dim, depth)
