"""What to do with generated weights: the learning rate and warm-up that trained best for such a start."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from headstart import samplers

TABLE = "headstart/generate/learning_rates.json"  # written by `python -m benchmarks.head_start --tables`


def next_step(method: str) -> dict[str, Any] | None:
    """{learning_rate, lowest, highest, warmup, measured} for a method, or for its family where the benchmark did not
    run it; None for a method of one's own. `measured` says where. warmup: a share of the steps."""
    table = json.loads(Path(__file__).with_name("learning_rates.json").read_text())
    found, of = table["methods"].get(method), f"`{method}`"
    if found is None:
        family = next((d["family"] for d in samplers.described_methods() if d["name"] == method), None)
        found, of = table["families"].get(family), f"methods of the family {family}"
    if found is None:
        return None
    smallest, largest = (f"{n / 1e6:.2g}" for n in table["parameters"])
    return {
        "learning_rate": found["rate"],
        "lowest": found["lowest"],
        "highest": found["highest"],
        "warmup": table["warmup"],
        "measured": f"{of} on {found['targets']} targets of {smallest} to {largest} M parameters, "
        f"{table['steps']} steps of {table['batch']} ({table['where']})",
    }


def next_step_line(step: dict[str, Any]) -> str:
    """One sentence for the terminal and the card."""
    rates = f"{step['learning_rate']:g}"
    if step["lowest"] != step["highest"]:
        rates += f" (the best were {step['lowest']:g} to {step['highest']:g})"
    return (
        f"train at a learning rate near {rates} with a warm-up over {step['warmup']:.0%} of the steps; "
        f"measured for {step['measured']}. Larger models usually need a lower rate"
    )
