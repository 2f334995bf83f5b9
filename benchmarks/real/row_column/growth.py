"""What `row-column` gives before training, by how it samples units and scales what reads them."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.real.models import RealTarget, held_out_windows, loss_of_folder, target_config
from headstart.config import GenerateConfig
from headstart.generate.generate import generate

DONOR = "smollm2"
TARGETS = {
    target.name: target
    for target in (
        RealTarget("own", "its own shape: 576 wide, 9 heads over 3"),
        RealTarget("wider", "768 wide, 12 heads over 4", {"width": 768, "heads": 12, "kv_heads": 4, "ffn": 2048}),
        RealTarget("doubled", "1152 wide, 18 heads over 6", {"width": 1152, "heads": 18, "kv_heads": 6, "ffn": 3072}),
    )
}
ITSELF, DEFAULT = "the donor itself", "default initialisation"
# (target, sampling, scale, noise, coupling), the most telling first
CASES: tuple[tuple[str, str, str, str, str], ...] = (
    ("own", ITSELF, "", "", ""),
    ("doubled", "balanced", "1/multiplicity", "0", "coupled"),
    ("wider", "balanced", "1/multiplicity", "0", "coupled"),
    ("wider", "iid", "1/multiplicity", "0", "coupled"),
    ("own", "iid", "1/multiplicity", "0", "coupled"),
    ("wider", "balanced", "n/N", "0", "coupled"),
    ("wider", "iid", "n/N", "0", "coupled"),
    ("wider", "balanced", "1/multiplicity", "0", "uncoupled"),
    ("wider", DEFAULT, "", "", ""),
    ("wider", "balanced", "none", "0", "coupled"),
    ("doubled", "iid", "1/multiplicity", "0", "coupled"),
    ("doubled", "balanced", "1/multiplicity", "0.01", "coupled"),
    ("wider", "balanced", "1/multiplicity", "0.01", "coupled"),
)


def case_key(case: tuple[str, ...]) -> str:
    return " | ".join(part for part in case if part)


def measure_growth(case: tuple[str, str, str, str, str], given: argparse.Namespace) -> dict[str, Any]:
    """{loss}: nats per token of held-out WikiText, before any training."""
    target, sampling, scale, noise, coupling = case
    windows = held_out_windows(given.data, given.models, DONOR)
    if sampling == ITSELF:
        return {"loss": loss_of_folder(given.models / DONOR, windows)}
    config = target_config(given.models, DONOR, TARGETS[target])
    options: dict[str, Any] = {"method": "default"} if sampling == DEFAULT else {
        "method": "row-column", "donor": str(given.models / DONOR),
        "set": {"sampling": sampling, "scale": scale, "noise": noise, "coupling": coupling},
    }  # fmt: skip
    with tempfile.TemporaryDirectory(dir=given.work) as scratch:
        out = Path(scratch) / "init"
        generate(GenerateConfig(target=config, seed=0, out=out, **options), quiet=True)
        return {"loss": loss_of_folder(out, windows)}
