"""The README of an adapter: what it is, what made it, and how PEFT wants its base handled."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from headstart.generate.card import caveats, donors_table, front_matter, link, option_table
from zoo.statistics.grouping import Grouping

if TYPE_CHECKING:
    from zoo.sampler import Sampler


def text(record: dict[str, Any], method: type[Sampler], model_class: str, hub_base: str | None) -> str:
    """README.md from what headstart.json holds; model_class loads the base, hub_base is its id on the hub."""
    sections = [
        front_matter(record["donors"], [hub_base] if hub_base else [], "peft", ["lora"]),
        _body(record, method),
        _use(record, model_class),
        donors_table(record["donors"]),
        caveats(record["donors"]),
    ]
    return "\n".join(section for section in sections if section)


def base_text(record: dict[str, Any], license: str) -> str:
    """README.md of the changed base."""
    return f"""---
library_name: transformers
license: {license}
---
# The base of an adapter by {record["method"]}

`{record["base"]}` with W - scaling B A in the place of every weight W that the adapter in the folder above adapts. It
is no model of its own: without that adapter it is the original less a part of its weights.
"""


def _body(record: dict[str, Any], method: type[Sampler]) -> str:
    adapter, versions = record["adapter"], record["versions"]
    made = ", ".join(f"{name} {version}" for name, version in versions.items())
    pairs = f"{adapter['pairs']} pairs A, B ({', '.join(adapter['targets'])})"
    return f"""# Initial LoRA weights by {record["method"]}

An adapter to start training from, **not a trained one**, for `{record["base"]}`: rank {adapter["rank"]}, alpha
{adapter["alpha"]:g}, {pairs}, {record["parameters"]:,} parameters.

```
{record["command"]}
```

- Method: `{record["method"]}`, {method.summary} ({link(method.reference)}).
{_followed(record["grouping"])}- Seed {record["seed"]}. {_first_step(record)}
- Made with {made}.
{option_table(record["options"])}"""


def _followed(grouping: dict[str, Any] | None) -> str:
    """What was read of the reference, as a line of a list."""
    if grouping is None:
        return ""
    of = f" of {grouping['source']['name']}" if grouping["source"] else ""
    return f"- Characterisation{of} by the top {grouping['rank']} singular values: {Grouping.from_json(grouping).description}.\n"


def _first_step(record: dict[str, Any]) -> str:
    change = record["step0"]["largest_change"]
    if record["changed_base"]:
        return "The adapter with the changed base computes what the original did, up to rounding."
    if change == 0:
        return "B is zero: before the first step the adapted model computes exactly what the base does."
    size = "small" if change is None else f"at most {change:.2g} of W"
    return f"Before the first step scaling B A is {size} (Frobenius norms), and the base is not compensated for it."


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
        "This method moves a part of the base into the adapter. `base/` holds what is left: train on it. The adapter "
        "goes with that base only; on the original base it counts this part twice."
    ),
    "train": (
        "`init_lora_weights` is `true` in adapter_config.json, so that PEFT loads what is here and does not take the "
        "part out of the base once more. A trained adapter that is saved as usual goes with `base/` as well."
    ),
    "convert": (
        "`model.save_pretrained(OUT, path_initial_model_for_weight_conversion=DIR)` turns the trained adapter into one "
        "of twice the rank for the original base. DIR must be this folder as it was written, its path without a slash "
        "at the end; PEFT takes the folder's name for an adapter's, so it must have no dot and not be `default`. The "
        "converted adapter still names `base/` as its base: give the original one when loading it, or set "
        "`model.peft_config['default'].base_model_name_or_path` before saving."
    ),
}
