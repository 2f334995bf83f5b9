"""The model card of an adapter: what it is, what made it, and how to load its base."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard

from zoo.cards.card import (
    card_data,
    donors_section,
    grouping_detail,
    how_it_was_made,
    model_card,
    pipeline_tag,
    warnings_section,
)
from zoo.cards.markdown import code_span, escape_markdown

if TYPE_CHECKING:
    from zoo.sampler import Sampler


@dataclass(frozen=True)
class PublishedBase:
    """The base of an adapter as the files of the adapter name it, for readers on other machines."""

    name: str  # a hub id or a folder
    on_hub: bool
    revision: str | None  # of the hub id, where one was given
    model_class: str  # the class of transformers that loads it
    config: Mapping[str, Any] | None

    @property
    def hub_ids(self) -> list[str]:
        return [self.name] if self.on_hub else []


def adapter_card(record: dict[str, Any], method: type[Sampler], base: PublishedBase) -> ModelCard:
    """README.md of an adapter, from the content of headstart.json."""
    details = [*grouping_detail(record), f"Seed {record['seed']}. {_first_step(record)}"]
    sections = [
        _introduction(record, base),
        how_it_was_made(record, method.summary, method.reference, details),
        _use(record, base),
        donors_section(record["donors"]),
        warnings_section(record["donors"]),
    ]
    return model_card(card_data(record["donors"], base.hub_ids, pipeline_tag(base.config), "peft", ["lora"]), sections)


def base_card(record: dict[str, Any], license: str, base: PublishedBase) -> ModelCard:
    """README.md of a changed base."""
    text = f"""# The base of an adapter by {record["method"]}

{code_span(base.name)} with W - scaling B A in place of every weight W that the adapter in the parent folder
adapts. Use it only together with that adapter: a part of the original weights is in the adapter.
"""
    data = card_data([{"license": license}], base.hub_ids, pipeline_tag(base.config), tags=["lora"])
    return model_card(data, [text])


def _introduction(record: dict[str, Any], base: PublishedBase) -> str:
    adapter = record["adapter"]
    targets = escape_markdown(", ".join(adapter["targets"]))
    return f"""# Initial LoRA weights by {record["method"]}

An adapter to start training from, **not a trained one**, for {code_span(base.name)}. It has rank
{adapter["rank"]}, alpha {adapter["alpha"]:g}, {adapter["pairs"]} pairs A, B ({targets}) and {record["parameters"]:,}
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


def _use(record: dict[str, Any], base: PublishedBase) -> str:
    changed = record["changed_base"]
    source = json.dumps("DIR/base" if changed else base.name if base.on_hub else "BASE")
    revision = f", revision={json.dumps(base.revision)}" if base.on_hub and base.revision and not changed else ""
    lines = [
        "## Use", "", "```python", f"from transformers import {base.model_class}", "from peft import PeftModel", "",
        f"base = {base.model_class}.from_pretrained({source}{revision})",
        'model = PeftModel.from_pretrained(base, "DIR", is_trainable=True)', "```", "", "DIR is this folder.",
    ]  # fmt: skip
    if not changed and not base.on_hub:
        lines += [f"BASE is the folder of {code_span(base.name)}; its hash is below."]
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
