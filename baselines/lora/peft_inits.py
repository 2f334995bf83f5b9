"""The initialisations that PEFT has itself, under the interface of all others: the peers of `pareto`.

PEFT's own code makes every pair, through its public interface, on a model of one linear layer: its random numbers come
from the stream (seed, method, module), so that the bytes do not depend on the order, and memory is that of one layer.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from zoo.donors.folder import donor_ref, open_ref
from zoo.errors import UserError
from zoo.linear_algebra import fix_signs, near_equal_groups, rotation_to_reference
from zoo.lora.adapters import LoraSampler, base_donor, base_weight, lora_pairs
from zoo.options import option
from zoo.streams import stream_seed
from zoo.targets.adapters import Pair, require_peft

if TYPE_CHECKING:
    from zoo.donors.donor import Donor
    from zoo.donors.zoo import Zoo
    from zoo.targets.blueprint import Blueprint

FLOAT32_NEAR_EQUAL = 1e-5  # relative difference of singular values that float32 hardly tells apart


@dataclass(kw_only=True)
class PeftInit(LoraSampler):
    """What all of them share. `init` is PEFT's init_lora_weights."""

    @property
    def init(self) -> bool | str:
        raise NotImplementedError

    def fit(self, zoo: Zoo | None, blueprint: Blueprint) -> Self:
        self.check(blueprint)
        require_peft()
        return self

    def sample(self, blueprint: Blueprint, seed: int = 0) -> Iterator[tuple[str, Tensor]]:
        for pair in lora_pairs(blueprint, self.name):
            a, b = initialize_pair(self.init, pair, self.weight(pair), stream_seed(seed, f"{self.name}/{pair.module}"))
            a, b = self.settle_basis(a, b)
            yield pair.a, a
            yield pair.b, b

    def settle_basis(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """A [rank, columns] and B [rows, rank] in a basis that depends on their product alone."""
        return a, b

    def weight(self, pair: Pair) -> Tensor | None:
        """What the pair adapts, [rows, columns], where the initialisation reads it."""
        return None


@dataclass(kw_only=True)
class PeftDefault(PeftInit):
    """init_lora_weights=True: A uniform with standard deviation 1 / sqrt(3 columns) (Kaiming, a = sqrt 5), B = 0."""

    name: ClassVar[str] = "peft-default"
    summary: ClassVar[str] = "PEFT's own LoRA initialisation: A uniform, B zero"
    reference: ClassVar[str] = "2106.09685"

    @property
    def init(self) -> bool:
        return True


@dataclass(kw_only=True)
class Gaussian(PeftInit):
    """init_lora_weights="gaussian": A normal with standard deviation 1 / rank, B = 0."""

    name: ClassVar[str] = "gaussian"
    summary: ClassVar[str] = "PEFT's gaussian: A normal of std 1 / rank, B zero"
    reference: ClassVar[str] = "huggingface/peft"

    @property
    def init(self) -> str:
        return "gaussian"


@dataclass(kw_only=True)
class Orthogonal(PeftInit):
    """init_lora_weights="orthogonal": A and B both random, in orthogonal halves of the space of dimension rank, so that
    B A is zero up to rounding. UserError for an odd rank, which has no halves."""

    name: ClassVar[str] = "orthogonal"
    summary: ClassVar[str] = "PEFT's orthogonal: A and B random in orthogonal subspaces, so that B A = 0"
    reference: ClassVar[str] = "huggingface/peft"

    @property
    def init(self) -> str:
        return "orthogonal"

    def check(self, blueprint: Blueprint) -> tuple[Pair, ...]:
        pairs = super().check(blueprint)
        odd = next((p for p in pairs if p.rank % 2), None)
        if odd is not None:
            raise UserError(f"orthogonal needs an even rank, and {odd.module} has {odd.rank}; give {odd.rank + 1}")
        return pairs


@dataclass(kw_only=True)
class BaseDecomposition(PeftInit):
    """Those that take a part of the base's weights into A and B; the base keeps the rest: `compensated`."""

    needs: ClassVar[tuple[str, ...]] = ("base",)

    _base: Donor | None = field(default=None, init=False, repr=False)

    @property
    def compensated(self) -> bool:
        return True

    @property
    def donors(self) -> tuple[str, ...]:
        return () if self._base is None else (self._base.name,)

    def fit(self, zoo: Zoo | None, blueprint: Blueprint) -> Self:
        super().fit(zoo, blueprint)
        self._base = base_donor(zoo, self.base, self.name)
        return self

    def planned_donors(self, zoo: Zoo | None, blueprint: Blueprint) -> tuple[str, ...]:
        return (base_donor(zoo, self.base, self.name).name,)

    def weight(self, pair: Pair) -> Tensor:
        if self._base is None:
            raise UserError(f"{self.name}: is not fitted; call fit(zoo, blueprint) with a zoo that holds the base")
        return base_weight(self._base, pair).to(self.device)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return ({} if self._base is None else {"base": donor_ref(self._base)}), {}

    def restore(self, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self._base = open_ref(values["base"], self.name) if "base" in values else None


@dataclass(kw_only=True)
class PiSSA(BaseDecomposition):
    """init_lora_weights="pissa": A = sqrt(S) V^T and B = U sqrt(S) of the weight's first singular vectors, over the
    scaling. `niter` is PEFT's "pissa_niter_N", a randomised SVD, which runs on the CPU to draw from its streams."""

    name: ClassVar[str] = "pissa"
    summary: ClassVar[str] = "principal singular vectors of the base in A and B, the rest stays in the base"
    reference: ClassVar[str] = "2404.02948"

    niter: int | None = option(None, "iterations of a fast randomised SVD, else the exact one", least=0)

    @property
    def init(self) -> str:
        return "pissa" if self.niter is None else f"pissa_niter_{self.niter}"

    def settle_basis(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return settle_singular_vectors(a, b)

    def weight(self, pair: Pair) -> Tensor:
        weight = super().weight(pair)
        return weight if self.niter is None else weight.cpu()


@dataclass(kw_only=True)
class OLoRA(BaseDecomposition):
    """init_lora_weights="olora": B the first columns of Q and A the first rows of R of the weight's QR decomposition.
    UserError for Conv1D (GPT-2), whose weights lie transposed: PEFT decomposes them as they lie, so that its A and B
    have each other's shapes."""

    name: ClassVar[str] = "olora"
    summary: ClassVar[str] = "the QR decomposition of the base's weights in A and B, the rest stays in the base"
    reference: ClassVar[str] = "2406.01775"

    @property
    def init(self) -> str:
        return "olora"

    def check(self, blueprint: Blueprint) -> tuple[Pair, ...]:
        pairs = super().check(blueprint)
        lying = next((p for p in pairs if p.transposed), None)
        if lying is not None:
            raise UserError(f"olora: {lying.module} is a Conv1D, which PEFT's olora takes for its transpose; use pissa")
        return pairs


def settle_singular_vectors(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """A [rank, columns] and B [rows, rank], which hold singular vectors, with signs and order fixed by a rule.

    LAPACK leaves the signs, and the basis of near-equal singular values, to rounding errors. The product B A stays the
    same up to rounding."""
    rows, columns = a.double(), b.double()
    for group in near_equal_groups(rows.norm(dim=1) * columns.norm(dim=0), FLOAT32_NEAR_EQUAL):
        if group.stop - group.start > 1:
            turn = rotation_to_reference(rows[group].mT)
            rows[group], columns[:, group] = turn.mT @ rows[group], columns[:, group] @ turn
    rows, columns = settle_signs(rows, columns)
    return rows.to(a.dtype), columns.to(b.dtype)


def settle_signs(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """A [rank, columns] and B [rows, rank] with the sign of each row of A fixed by a rule, and the same product B A."""
    signs = torch.where((fix_signs(a.mT) * a.mT).sum(0) < 0, -1.0, 1.0).to(a.dtype)
    return a * signs[:, None], b * signs


def initialize_pair(
    init: bool | str,
    pair: Pair,
    weight: Tensor | None,
    seed: int,
    attributes: Mapping[str, Any] | None = None,
    **config: Any,
) -> tuple[Tensor, Tensor]:
    """A [rank, columns] and B [rows, rank] as PEFT makes them for one linear layer, float32 on the CPU.

    weight: [rows, columns] on any device; None where `init` does not read it. attributes: what PEFT finds on the layer,
    such as a gradient. config: more options of PEFT's LoraConfig."""
    peft = require_peft()
    linear = nn.Linear(pair.columns, pair.rows, bias=False, device="meta")
    if weight is None:
        linear.to_empty(device="cpu")  # never written, so it takes no memory
    else:
        linear.weight = nn.Parameter(weight, requires_grad=False)
    for name, value in (attributes or {}).items():
        setattr(linear, name, value)
    lora_config = peft.LoraConfig(
        r=pair.rank, lora_alpha=pair.scaling * pair.rank, init_lora_weights=init, target_modules=["layer"], **config
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.default_generator.manual_seed(seed)
        layer = peft.get_peft_model(nn.ModuleDict({"layer": linear}), lora_config).base_model.model["layer"]
    a, b = (part["default"].weight.detach().to("cpu", torch.float32) for part in (layer.lora_A, layer.lora_B))
    return a.contiguous(), b.contiguous()
