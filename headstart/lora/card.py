"""The model card of an adapter: what it is, what made it, and how to load its base."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard, ModelCardData

from headstart.model_card import (
    card_data,
    donors_section,
    grouping_detail,
    how_it_was_made,
    model_card,
    warnings_section,
)

if TYPE_CHECKING:
    from zoo.sampler import Sampler


def adapter_card(record: dict[str, Any], method: type[Sampler], model_class: str, hub_base: str | None) -> ModelCard:
    """README.md of an adapter, from the content of headstart.json. `model_class` loads the base, whose hub id is
    `hub_base`."""
    details = [*grouping_detail(record), f"Seed {record['seed']}. {_first_step(record)}"]
    sections = [
        _introduction(record),
        how_it_was_made(record, method.summary, method.reference, details),
        _use(record, model_class),
        donors_section(record["donors"]),
        warnings_section(record["donors"]),
    ]
    return model_card(card_data(record["donors"], [hub_base] if hub_base else [], "peft", ["lora"]), sections)


def base_card(record: dict[str, Any], license: str) -> ModelCard:
    """README.md of a changed base."""
    text = f"""# The base of an adapter by {record["method"]}

`{record["base"]}` with W - scaling B A in place of every weight W that the adapter in the parent folder adapts. Use it
only together with that adapter: a part of the original weights is in the adapter.
"""
    return model_card(ModelCardData(license=license, library_name="transformers"), [text])


def _introduction(record: dict[str, Any]) -> str:
    adapter = record["adapter"]
    return f"""# Initial LoRA weights by {record["method"]}

An adapter to start training from, **not a trained one**, for `{record["base"]}`. It has rank {adapter["rank"]}, alpha
{adapter["alpha"]:g}, {adapter["pairs"]} pairs A, B ({", ".join(adapter["targets"])}) and {record["parameters"]:,}
parameters.
"""


def _first_step(record: dict[str, Any]) -> str:
    change = record["step0"]["largest_change"]
    if record["changed_base"]:
        return "The adapter with the changed base computes the function of the original, up to rounding."
    if change == 0:
        return "B is zero: before the first step the adapted model computes exactly the function of the base."
    size = "small" if change is None else f"at most {change:.2g} of W"
    return f"Before the first step scaling B A is {size} (Frobenius norms), and the base does not compensate for it."


def _use(record: dict[str, Any], model_class: str) -> str:
    changed = record["changed_base"]
    base = "DIR/base" if changed else record["base"]
    lines = [
        "## Use", "", "```python", f"from transformers import {model_class}", "from peft import PeftModel", "",
        f'base = {model_class}.from_pretrained("{base}")',
        'model = PeftModel.from_pretrained(base, "DIR", is_trainable=True)', "```", "", "DIR is this folder.",
    ]  # fmt: skip
    if changed:
        lines += ["", "## The base is changed", "", *[f"- {changed[key]}" for key in ("what", "train", "convert")]]
    return "\n".join([*lines, ""])


CHANGED_BASE = {
    "what": (
        "This method moves a part of the base into the adapter. `base/` holds the rest: train on it. The adapter fits "
        "that base only. On the original base this part would count twice."
    ),
    "train": (
        "`init_lora_weights` is `true` in adapter_config.json, so that PEFT loads the adapter as it is and does not "
        "subtract the part from the base again. A trained adapter that is saved as usual belongs to `base/` as well."
    ),
    "convert": (
        "`model.save_pretrained(OUT, path_initial_model_for_weight_conversion=DIR)` turns the trained adapter into one "
        "of twice the rank for the original base. DIR must be this folder as it was written, with no slash at the end "
        "of its path. PEFT uses the folder's name as an adapter's name, so it must have no dot and not be `default`. "
        "The converted adapter still names `base/` as its base. Give the original base when you load it, or set "
        "`model.peft_config['default'].base_model_name_or_path` before you save."
    ),
}
