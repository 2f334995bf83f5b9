"""Modules in memory on both sides of a sampler: as donors, and as targets."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor, nn

from zoo.checkpoints.checkpoint import is_finite
from zoo.donors.zoo import Zoo
from zoo.errors import NotFinite, UserError, unknown
from zoo.targets.blueprint import Blueprint, to_disk


@dataclass(frozen=True, eq=False)
class MemoryDonor(ABC):
    """A donor whose weights are those of a module in memory. It has no files and no tokenizer."""

    module: nn.Module
    name: str
    source: str
    revision: str
    sha256: str
    license: str = "unknown"

    @property
    @abstractmethod
    def blueprint(self) -> Blueprint: ...

    @property
    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Name on disk -> the module's own tensor, or a copy where memory and disk differ (Mixtral's experts)."""

    @property
    def config(self) -> dict[str, Any]:
        return self.blueprint.config or {}

    @property
    def names(self) -> list[str]:
        return list(self.blueprint.names)

    @property
    def parameters(self) -> int:
        return self.blueprint.parameters

    @property
    def facts(self) -> dict[str, Any]:
        return {}

    def vocabulary(self) -> dict[str, int] | None:
        return None

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """A copy of one tensor on the CPU. UserError for an unknown name or the meta device, NotFinite for NaN."""
        tensors = self.tensors
        if name not in tensors:
            raise unknown(f"tensor of {self.name}", name, tensors)
        if tensors[name].is_meta:
            raise UserError(f"{self.name}: {name} is on the meta device; load the weights first")
        tensor = tensors[name].detach().cpu().clone()
        if not is_finite(tensor):
            raise NotFinite(f"{self.name}: tensor {name!r} holds NaN or infinity; use another model")
        return tensor if dtype is None else tensor.to(dtype)


@dataclass(frozen=True, eq=False)
class ModuleDonor(MemoryDonor):
    """A trained module as a donor. Its tensors are those of `Blueprint.from_module`."""

    @classmethod
    def from_module(cls, name: str, module: nn.Module) -> Self:
        digest = hashlib.sha256()
        for key, tensor in sorted(_tensors_on_disk(module).items()):
            digest.update(f"{key} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        sha256 = digest.hexdigest()
        return cls(module, name, source=name, revision=f"sha256:{sha256}", sha256=sha256)

    @cached_property
    def blueprint(self) -> Blueprint:
        return Blueprint.from_module(self.module)

    @property
    def tensors(self) -> dict[str, Tensor]:
        return _tensors_on_disk(self.module)


def zoo_of(modules: Mapping[str, nn.Module]) -> Zoo:
    """The zoo of trained modules {name: module} for `Sampler.fit`, sorted by name like every zoo."""
    return Zoo.of_donors(ModuleDonor.from_module(name, modules[name]) for name in sorted(modules))


@torch.no_grad()
def load_into(module: nn.Module, tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Copies what a sampler yields into a module's parameters, in place, and returns the names that were filled.

    Values are cast to the parameter's dtype and device; the other parameters stay as they are. UserError for a name
    that the module does not have and for another shape. (transformers fuses some tensors in memory: write a folder
    and load that.)
    """
    parameters = dict(module.named_parameters(remove_duplicate=False))
    filled = []
    for name, tensor in tensors:
        if name not in parameters:
            raise unknown(f"parameter of {type(module).__name__}", name, parameters)
        if parameters[name].shape != tensor.shape:
            raise UserError(f"{name}: {tuple(tensor.shape)} does not fit the module's {tuple(parameters[name].shape)}")
        parameters[name].copy_(tensor)
        filled.append(name)
    return filled


def _tensors_on_disk(module: nn.Module) -> dict[str, Tensor]:
    from transformers import PreTrainedModel

    if not isinstance(module, PreTrainedModel):
        return dict(module.named_parameters())
    skipped = {*module.all_tied_weights_keys, *(module._keys_to_ignore_on_save or ())}
    return to_disk(module, {k: t for k, t in module.state_dict().items() if k not in skipped})
