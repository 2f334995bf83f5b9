"""Initial LoRA weights for a PEFT model in memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from headstart import samplers
from zoo.donors.donor import Donor
from zoo.donors.memory import ModuleDonor
from zoo.donors.zoo import Zoo
from zoo.errors import UserError
from zoo.lora.adapters import LoraSampler, compensated_weight, refuse_tied_weights
from zoo.lora.bases import PeftBaseDonor, refuse_initialized
from zoo.targets.adapters import require_peft
from zoo.targets.blueprint import adapter_blueprint

if TYPE_CHECKING:
    from peft import PeftModel


@torch.no_grad()
def initialize_lora_weights(
    peft_model: PeftModel,
    sampler: LoraSampler | str,
    reference: str | Path | nn.Module | None = None,
    seed: int = 0,
    adapter_name: str = "default",
) -> None:
    """Fills the adapter of a model from `get_peft_model`, in place, as PEFT's own initialize_lora_eva_weights does. The
    values are those of `headstart lora` for the same base, sampler and seed.

    sampler    a LoRA sampler, which is fitted here, or the name of a method
    reference  for samplers that follow another model: as for `headstart lora`, or a module in memory

    A compensated sampler also changes the base's weights in place, to W - scaling B A (computed in float32, rounded to
    their dtype). In that case save the adapter with `save_pretrained(DIR)` before training. Afterwards
    `save_pretrained(OUT, path_initial_model_for_weight_conversion=DIR)` converts the trained adapter to one for the
    original base.

    Raises UserError and changes nothing:
    - the base is quantised, or its weights are on the meta device
    - the adapter is merged, or a variant such as DoRA
    - another adapter, or PEFT's own initialisation, depends on the base's weights
    """
    require_peft()
    if isinstance(sampler, str):
        sampler = samplers.lora_sampler(sampler)()
    base = PeftBaseDonor.from_peft(peft_model)
    blueprint = adapter_blueprint(peft_model, base.blueprint, adapter_name)
    assert blueprint.adapter is not None
    sampler.check(blueprint)
    refuse_initialized(peft_model, adapter_name, sampler.compensated)
    if sampler.compensated:
        refuse_tied_weights(blueprint.adapter)
    donors: list[Donor] = [base]
    if isinstance(reference, nn.Module):
        donors.append(ModuleDonor.from_module("reference", reference))
    if reference is not None:
        sampler = _with_reference(sampler, "reference" if isinstance(reference, nn.Module) else str(reference))
    sampler.fit(Zoo.of_donors(donors), blueprint)
    filled = dict(sampler.sample(blueprint, seed))
    model = peft_model.get_base_model()
    for pair in blueprint.adapter.pairs:
        layer: Any = model.get_submodule(pair.module)
        a, b = (side[adapter_name].weight for side in (layer.lora_A, layer.lora_B))
        a.copy_(filled[pair.a])
        b.copy_(filled[pair.b])
        if sampler.compensated:
            weight = layer.get_base_layer().weight
            weight.copy_(compensated_weight(weight, pair, a, b))


def _with_reference(sampler: LoraSampler, reference: str) -> LoraSampler:
    if not hasattr(sampler, "reference_model"):
        raise UserError(f"{sampler.name} follows no other model: leave reference out")
    return replace(sampler, reference_model=reference)  # type: ignore[call-arg]
