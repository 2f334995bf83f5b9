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
from zoo.checkpoints.quantised import ADVICE, Quantisation, is_code
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

    @property
    def quantisation(self) -> Quantisation:
        return Quantisation()

    def vocabulary(self) -> dict[str, int] | None:
        return None

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """A copy of one tensor on the CPU. UserError for an unknown name or the meta device, NotFinite for NaN."""
        tensors = self.tensors
        if name not in tensors:
            raise unknown(f"tensor of {self.name}", name, tensors)
        if tensors[name].is_meta:
            raise UserError(f"{self.name}: {name} is on the meta device; load the weights first")
        if is_code(tensors[name].dtype) and name in self.blueprint and self.blueprint[name].role != "other":
            raise UserError(f"{self.name}: {name!r} holds {tensors[name].dtype} codes instead of weights; {ADVICE}")
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
    """Copies what a sampler yields into a module's tensors and returns the names that were filled.

    Values are cast to the dtype of the module's tensor, in place and on its device. A tensor on the meta device is
    replaced by one on the CPU, under all names that share it, and the buffers that are not stored (those of rotary
    embeddings) are computed as transformers does. The other parameters stay as they are.

    UserError for a name that the module does not have, for another shape, and for a buffer on the meta device that
    transformers does not compute. (transformers fuses some tensors in memory: write a folder and load that.)
    """
    own = {**dict(module.named_parameters(remove_duplicate=False)), **_stored_buffers(module)}
    names_of: dict[int, list[str]] = {}
    for name, tensor in own.items():
        names_of.setdefault(id(tensor), []).append(name)
    filled = []
    for name, tensor in tensors:
        if name not in own:
            raise unknown(f"parameter of {type(module).__name__}", name, own)
        if own[name].shape != tensor.shape:
            raise UserError(f"{name}: {tuple(tensor.shape)} does not fit the module's {tuple(own[name].shape)}")
        if own[name].is_meta:
            _replace_tensor(module, names_of[id(own[name])], own[name], tensor)
        else:
            own[name].copy_(tensor)
        filled.append(name)
    if any(buffer.is_meta for buffer in module.buffers()):
        _compute_buffers(module)
    return filled


def _stored_buffers(module: nn.Module) -> dict[str, Tensor]:
    """The buffers that a checkpoint contains, by name."""
    buffers = dict(module.named_buffers(remove_duplicate=False))
    return {name: buffers[name] for name in module.state_dict() if name in buffers}


def _replace_tensor(module: nn.Module, names: list[str], old: Tensor, value: Tensor) -> None:
    """Puts a copy of `value` on the CPU in the place of `old`, a tensor on the meta device that has these names."""
    new = value.detach().to("cpu", old.dtype, copy=True)
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(new, requires_grad=old.requires_grad)
    for name in names:
        owner, _, key = name.rpartition(".")
        setattr(module.get_submodule(owner), key, new)


def _compute_buffers(module: nn.Module) -> None:
    """Computes the buffers on the meta device that no checkpoint contains, as `from_pretrained` does.

    UserError for a module that is not a transformers model.
    """
    from transformers import PreTrainedModel

    stored = _stored_buffers(module)
    left = {name: b for name, b in module.named_buffers() if b.is_meta and name not in stored}
    if not left:
        return
    if not isinstance(module, PreTrainedModel):
        raise UserError(f"{next(iter(left))}: is a buffer on the meta device, which is not stored; make it on the CPU")
    for name, buffer in left.items():
        owner, _, key = name.rpartition(".")
        setattr(module.get_submodule(owner), key, torch.empty_like(buffer, device="cpu"))
    # The initialisation of transformers leaves out the modules and tensors with this mark.
    done = [t for t in (*module.parameters(), *stored.values()) if not hasattr(t, "_is_hf_initialized")]
    for tensor in done:
        tensor._is_hf_initialized = True  # type: ignore[attr-defined]
    for submodule in module.modules():
        submodule._is_hf_initialized = False  # type: ignore[assignment]
    module.initialize_weights()
    for tensor in done:
        del tensor._is_hf_initialized  # type: ignore[attr-defined]


def _tensors_on_disk(module: nn.Module) -> dict[str, Tensor]:
    from transformers import PreTrainedModel

    if not isinstance(module, PreTrainedModel):
        return dict(module.named_parameters())
    skipped = {*module.all_tied_weights_keys, *(module._keys_to_ignore_on_save or ())}
    return to_disk(module, {k: t for k, t in module.state_dict().items() if k not in skipped})
