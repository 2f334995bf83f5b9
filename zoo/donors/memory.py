"""Modules in memory on both sides of a sampler: as donors of a zoo, and as what is filled."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from zoo.checkpoints.checkpoint import finite
from zoo.donors.store import Chosen, Donor, Zoo
from zoo.errors import NotFinite, UserError, unknown
from zoo.targets.blueprint import Blueprint, to_disk


@dataclass(frozen=True, eq=False)
class ModuleDonor(Donor):
    """A trained module as a donor. Its tensors are those of `Blueprint.from_module`, read from it when asked for; it
    has no files, so that a sampler that keeps its donor's folder cannot be saved."""

    module: nn.Module

    @classmethod
    def of(cls, name: str, module: nn.Module) -> Self:
        digest = hashlib.sha256()
        for key, tensor in sorted(_tensors(module).items()):
            digest.update(f"{key} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        sha256 = digest.hexdigest()
        record = {"source": name, "revision": f"sha256:{sha256}", "license": "unknown", "sha256": sha256, "files": {}}
        return cls(Path(name), {}, {}, (), record, module)

    @property
    def name(self) -> str:
        return str(self.folder)

    @property
    def names(self) -> list[str]:
        return list(self.blueprint.names)

    @property
    def parameters(self) -> int:
        return self.blueprint.parameters

    @cached_property
    def blueprint(self) -> Blueprint:
        return Blueprint.from_module(self.module)

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """As Checkpoint.read: a copy on the CPU. Raises UserError for an unknown name, NotFinite as there."""
        tensors = _tensors(self.module)
        if name not in tensors:
            raise unknown(f"tensor of {self.name}", name, tensors)
        tensor = tensors[name].detach().cpu().clone()
        if not finite(tensor):
            raise NotFinite(f"{self.name}: tensor {name!r} holds NaN or infinity; use another module")
        return tensor if dtype is None else tensor.to(dtype)


def zoo_of(modules: Mapping[str, nn.Module]) -> Zoo:
    """name -> trained module, as a zoo for `Sampler.fit`; sorted by name, like every zoo."""
    return Chosen(Path("memory"), tuple(ModuleDonor.of(name, modules[name]) for name in sorted(modules)))


@torch.no_grad()
def load_into(module: nn.Module, tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Copies what a sampler yields into the module's parameters, in place (cast to their dtype and device); returns
    the names that were filled. The rest keeps what it had. Raises UserError for a name that the module does not have
    as such (transformers fuses some tensors in memory: write a folder and load that) and for another shape."""
    own = dict(module.named_parameters(remove_duplicate=False))
    filled = []
    for name, tensor in tensors:
        if name not in own:
            raise unknown(f"parameter of {type(module).__name__}", name, own)
        if own[name].shape != tensor.shape:
            raise UserError(f"{name}: {tuple(tensor.shape)} does not fit the module's {tuple(own[name].shape)}")
        own[name].copy_(tensor)
        filled.append(name)
    return filled


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    from transformers import PreTrainedModel

    if not isinstance(module, PreTrainedModel):
        return dict(module.named_parameters())
    skipped = {*module.all_tied_weights_keys, *(module._keys_to_ignore_on_save or ())}
    return to_disk(module, {k: t for k, t in module.state_dict().items() if k not in skipped})
