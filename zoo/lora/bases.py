"""The base of an adapter: inside a PEFT model in memory, and on disk with the adapter's change subtracted."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from safetensors import safe_open
from torch import Tensor, nn

from zoo.donors.folder import FolderDonor
from zoo.donors.memory import MemoryDonor
from zoo.errors import UserError
from zoo.lora.adapters import compensated_weight
from zoo.targets.blueprint import Adapter, Blueprint, to_disk
from zoo.targets.roles import assign_roles

if TYPE_CHECKING:
    from peft import PeftModel

BASE_CHANGING_INITS = (
    "pissa",
    "olora",
    "corda",
    "loftq",
    "lora_ga",
)  # values of init_lora_weights that change the base


@dataclass(frozen=True, eq=False)
class PeftBaseDonor(MemoryDonor):
    """The base of a PEFT model under the names that it has on disk, read from the layers that PEFT has wrapped.

    Its provenance has no hash.
    """

    @classmethod
    def from_peft(cls, model: PeftModel) -> Self:
        base = model.get_base_model()
        source = str(getattr(getattr(base, "config", None), "_name_or_path", "") or "base")
        return cls(base, "base", source=source, revision="memory", sha256="")

    @cached_property
    def blueprint(self) -> Blueprint:
        from transformers import PreTrainedModel

        if isinstance(self.module, PreTrainedModel):
            config = copy.deepcopy(self.module.config)
            config.architectures = [type(self.module).__name__]
            return Blueprint.from_pretrained_config(config)
        parameters = unwrapped_parameters(self.module)
        return Blueprint(assign_roles([(name, tuple(t.shape), t.dtype) for name, t in parameters.items()], None))

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Name on disk -> the model's own parameter, or a copy where memory and disk differ (Mixtral's experts)."""
        own: dict[str, Tensor] = unwrapped_parameters(self.module)
        return to_disk(self.module, own) if hasattr(self.module, "save_pretrained") else own  # type: ignore[arg-type]


def refuse_initialized(model: PeftModel, adapter_name: str, compensated: bool) -> None:
    """UserError for an adapter that cannot be initialised any more.

    Its base was changed for it already, an adapter is merged, or another adapter relies on the base that a compensated
    sampler would change.
    """
    from peft.tuners.lora import LoraLayer

    init = str(getattr(model.peft_config[adapter_name], "init_lora_weights", True)).lower()
    if init.startswith(BASE_CHANGING_INITS):
        raise UserError(
            f"the model was made with init_lora_weights={init!r}, which changed its base; make it with True"
        )
    if any(isinstance(layer, LoraLayer) and layer.merged for layer in model.modules()):
        raise UserError("an adapter is merged into the base; unmerge it first")
    others = sorted(set(model.peft_config) - {adapter_name})
    if compensated and others:
        raise UserError(
            f"this method changes the base, and adapter {others[0]!r} relies on it; use a model with one adapter"
        )


def blueprint_as_stored(donor: FolderDonor) -> Blueprint:
    """The donor's blueprint with the dtypes of its tensors on disk. UserError where a tensor is quantised."""
    specs = tuple(replace(spec, dtype=donor.entry(spec.name).dtype) for spec in donor.blueprint.specs)
    odd = next((s for s in specs if not s.dtype.is_floating_point or s.dtype.itemsize < 2), None)
    if odd is not None:
        raise UserError(f"{donor.name}: {odd.name!r} is quantised ({odd.dtype}); give the original model")
    return replace(donor.blueprint, specs=specs)


def compensated_base(
    donor: FolderDonor, adapter: Adapter, adapter_file: Path, device: str
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the donor, with W - scaling B A for the adapted weights; A and B are read from `adapter_file`."""
    pairs = {pair.weight: pair for pair in adapter.pairs}
    with safe_open(adapter_file, framework="pt", device=device) as f:
        for name in donor.blueprint.names:
            tensor, pair = donor.read(name), pairs.get(name)
            if pair is not None:
                tensor = compensated_weight(tensor.to(device), pair, f.get_tensor(pair.a), f.get_tensor(pair.b))
            yield name, tensor


def without_adapters(module: nn.Module) -> nn.Module:
    """The module with the layers of the base in place of those that PEFT has wrapped. It is changed itself."""
    wrapped = [name for name, layer in module.named_modules() if hasattr(layer, "get_base_layer")]
    for name in wrapped:
        layer: Any = module.get_submodule(name)
        module.set_submodule(name, layer.get_base_layer())
    return module


def unwrapped_parameters(module: nn.Module) -> dict[str, Tensor]:
    """The base's parameters by the names that they have without an adapter, shared ones once."""
    return {
        name.replace(".base_layer.", ".").removeprefix("base_layer."): p
        for name, p in module.named_parameters()
        if not any(part.startswith("lora_") for part in name.split("."))
    }
