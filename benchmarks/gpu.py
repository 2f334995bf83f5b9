"""Every method and a comparison in bfloat16 on a GPU, checked against the CPU: results/gpu.md. Six minutes at most.

    python -m benchmarks.gpu [--work DIR] [--device cuda] [--minutes 6]

It needs no other file: the donor has random weights with the tails of a trained model. A method passes where its
entries are those of the CPU up to rounding, or, where they are drawn, where each matrix has the mean and deviation of
the CPU's. With `--device cpu` everything is compared with itself, which tests the script.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import paths
from headstart import samplers
from headstart.compare.compare import compare
from headstart.config import CompareConfig
from headstart.generate.sampling import build_sampler, language_model_blueprint
from zoo.checkpoints.writer import write_checkpoint
from zoo.donors.zoo import Zoo, open_standalone
from zoo.sampler import Sampler
from zoo.streams import stream
from zoo.targets.blueprint import Blueprint

PAGE = paths.RESULTS / "gpu.md"
DONOR = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 256, "hidden_size": 768,
    "intermediate_size": 2048, "num_hidden_layers": 4, "num_attention_heads": 12, "num_key_value_heads": 4,
    "max_position_embeddings": 256, "tie_word_embeddings": False,
}  # fmt: skip
SMALLER = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2, "num_attention_heads": 8}
SMALLER |= {"head_dim": 64}
LARGER = {"hidden_size": 1536, "intermediate_size": 4096, "num_attention_heads": 24, "num_key_value_heads": 8}
TARGETS = {"net2wider": LARGER, "hypercloning": LARGER, "stacking": {"num_hidden_layers": 8}}
OPTIONS = {"learned-pruning": {"steps": "20", "windows": "8"}, "mimetic": {}}
SKIPPED = ("conv-covariance", *samplers.LORA_METHODS)  # no convolution in a language model; adapters have no target
COMPARED = ("default", "normal", "weight-selection", "row-column")
STEPS = 10  # of the comparison
EQUAL = 1e-4  # largest difference, in units of the matrix's root mean square, of what is not drawn
SPREAD = 6.0  # standard errors that the moments of drawn matrices may differ by


@dataclass(frozen=True)
class Measured:
    """What one device made."""

    tensors: dict[str, Tensor]
    seconds: float
    gib: float  # peak memory of the device, 0 for the CPU


def write_donor(folder: Path) -> Zoo:
    """A donor with Student-t weights whose rows and columns differ in scale, in bfloat16."""
    blueprint = Blueprint.from_config(DONOR)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for spec in blueprint.specs:
            generator = stream(0, spec.name)
            if len(spec.shape) == 1:
                yield spec.name, 1 + 0.1 * torch.randn(spec.shape, generator=generator)
                continue
            heavy = torch.randn(spec.shape, generator=generator)
            heavy /= torch._standard_gamma(torch.full(spec.shape, 3.0), generator=generator).div(3).sqrt()
            scales = [torch.randn(size, generator=generator).mul(0.3).exp() for size in spec.shape]
            yield spec.name, heavy * scales[0][:, None] * scales[1] / math.sqrt(spec.shape[1])

    write_checkpoint(folder, blueprint, tensors(), torch.bfloat16)
    return open_standalone(folder, quiet=True)


def make(sampler: Sampler, zoo: Zoo, blueprint: Blueprint) -> Measured:
    """Fits and samples; the tensors come to the CPU as they are made."""
    on_gpu = torch.device(sampler.device).type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    tensors = dict(sampler.fit(zoo, blueprint).sample(blueprint, 0))
    seconds = time.perf_counter() - start
    assert all(tensor.device.type == "cpu" for tensor in tensors.values())
    return Measured(tensors, seconds, torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0)


def difference(cpu: dict[str, Tensor], other: dict[str, Tensor]) -> tuple[str, float]:
    """("equal", largest relative difference), or ("drawn", largest difference of moments in standard errors)."""
    assert cpu.keys() == other.keys()
    largest = worst = 0.0
    for name, wanted in cpu.items():
        a, b = wanted.double(), other[name].double()
        largest = max(largest, ((a - b).abs().max() / a.square().mean().sqrt().clamp(min=1e-12)).item())
        if a.ndim > 1:
            worst = max(
                worst, _moment_gap(a.flatten(), b.flatten()), _moment_gap(a.square().flatten(), b.square().flatten())
            )
    return ("equal", largest) if largest <= EQUAL else ("drawn", worst)


def _moment_gap(a: Tensor, b: Tensor) -> float:
    """The difference of two means in standard errors."""
    error = math.sqrt((a.var().item() + b.var().item()) / len(a))
    return abs(a.mean().item() - b.mean().item()) / max(error, 1e-12)


def method_row(name: str, zoo: Zoo, text: Path, device: str) -> dict[str, Any]:
    """{method, cpu, device, ratio, gib, kind, difference, passed}, or {method, error}."""
    blueprint = language_model_blueprint({**DONOR, **TARGETS.get(name, SMALLER)})
    cls, options = samplers.get(name), dict(OPTIONS.get(name, {}))
    given = {"text": str(text)} if "text" in cls.__dataclass_fields__ else {}
    try:
        make(build_sampler(cls, options, device=device, **given), zoo, blueprint)  # the first run loads kernels
        there = make(build_sampler(cls, options, device=device, **given), zoo, blueprint)
        here = make(build_sampler(cls, options, **given), zoo, blueprint)
    except Exception as error:  # a row that fails must not hide the others
        return {"method": name, "error": f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"}
    kind, gap = difference(here.tensors, there.tensors)
    return {"method": name, "cpu": here.seconds, "device": there.seconds, "ratio": here.seconds / there.seconds,
            "gib": there.gib, "kind": kind, "difference": gap, "passed": kind == "equal" or gap < SPREAD}  # fmt: skip


def compare_rows(work: Path, zoo: Zoo, text: Path, device: str) -> list[dict[str, Any]]:
    """The comparison in float32 and bfloat16 on the device and in float32 on the CPU: {where, seconds, losses}."""
    target = work / "config.json"
    target.write_text(json.dumps({**DONOR, **SMALLER}))
    rows = []
    for where, dtype in ((device, "float32"), (device, "bfloat16"), ("cpu", "float32")):
        start, out = time.perf_counter(), work / f"compare-{where}-{dtype}-{len(rows)}"
        config = CompareConfig(
            target=target, corpus=text, out=out, methods=COMPARED, donor=str(zoo.path), steps=STEPS, seeds=(0,),
            lrs=(1e-3,), default_scales=(1.0,), batch_size=8, sequence=64, windows=4, device=where, dtype=dtype,
            workers=1,
        )  # fmt: skip
        compare(config, quiet=True)
        runs = [json.loads(path.read_text()) for path in sorted((out / "runs").iterdir())]
        losses = {run["method"]: run["losses"][-1] for run in runs}
        rows.append({"where": f"{where}, {dtype}", "seconds": time.perf_counter() - start, "losses": losses})
    return rows


def page(card: str, rows: list[dict[str, Any]], compared: list[dict[str, Any]], left: list[str]) -> str:
    """results/gpu.md."""
    lines = [
        f"| {r['method']} | fails: {r['error']} | | | | |"
        if "error" in r
        else f"| {r['method']} | {r['cpu']:.2f} | {r['device']:.2f} | {r['ratio']:.1f} | {r['gib']:.2f} |"
        f" {r['kind']}, {r['difference']:.1e}{'' if r['passed'] else ': **differs**'} |"
        for r in rows
    ]
    trained = [
        " | ".join([f"| {r['where']} | {r['seconds']:.1f}", *(f"{r['losses'].get(m, math.nan):.3f}" for m in COMPARED)])
        + " |"
        for r in compared
    ]
    size = language_model_blueprint({**DONOR, **SMALLER}).parameters / 1e6
    missing = f" Left out for lack of time: {', '.join(left)}." if left else ""
    newline = "\n"
    return f"""# Methods on a GPU

Written by `python -m benchmarks.gpu` on {card}, torch {torch.__version__}. Seconds of fitting and sampling a target of
{size:.0f} M parameters (growth: larger), the second run of the device. *Equal* is the largest difference from the CPU
relative to the matrix's root mean square; *drawn* is the largest difference of means and mean squares, in standard
errors.{missing}

| method | CPU, s | device, s | ratio | device memory, GiB | against the CPU |
|---|---|---|---|---|---|
{newline.join(lines)}

Held-out loss after {STEPS} steps of `compare`:

| where | seconds | {" | ".join(COMPARED)} |
|---|---|{"---|" * len(COMPARED)}
{newline.join(trained)}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=6.0)
    parser.add_argument("--methods", nargs="*")
    parser.add_argument("--page", type=Path, default=PAGE)
    given = parser.parse_args()
    end = time.monotonic() + 60 * given.minutes
    work = given.work or Path(tempfile.mkdtemp())
    shutil.rmtree(work / "donor", ignore_errors=True)
    text = work / "text.txt"
    text.write_text("".join(f"{i} times {j} is {i * j}.\n" for i in range(60) for j in range(60)))
    zoo = write_donor(work / "donor")
    compared = compare_rows(work, zoo, text, given.device)
    known = [m for m in samplers.METHODS if m not in SKIPPED and "model" not in samplers.get(m).needs]
    rows, left = [], []
    for name in given.methods or known:
        if time.monotonic() > end - 30:
            left.append(name)
            continue
        rows.append(method_row(name, zoo, text, given.device))
        print(json.dumps(rows[-1]), flush=True)
    card = torch.cuda.get_device_name() if given.device == "cuda" else "the CPU (a test of the script)"
    given.page.write_text(page(card, rows, compared, left))
    if bad := [r["method"] for r in rows if not r.get("passed")]:
        raise SystemExit(f"differ from the CPU or fail: {', '.join(bad)}")


if __name__ == "__main__":
    main()
