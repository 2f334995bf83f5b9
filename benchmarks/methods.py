"""Every method on one unseen shape of the embedded zoo, and the tables of the READMEs that follow from it.

    python benchmarks/methods.py --work DIR     trains zoo, autoencoder and diffusion into DIR (once), measures what
                                                fitting and sampling cost, compares all methods, writes methods.json
                                                and the tables; goes on where it was interrupted
    python benchmarks/methods.py --tables       writes the tables again from the committed methods.json

Costs are measured one after another with one thread and nothing else running; the comparison is `headstart compare`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from headstart import methods
from headstart.generate import configure, fit, language_model, versions
from headstart.scores import REFERENCE
from zoo.store import Zoo

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "methods.json"
CONVOLUTIONS = ROOT / "benchmarks" / "convolutions.json"
TARGET = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 256, "hidden_size": 96,
    "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 6,
    "head_dim": 16, "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
STEPS, SEEDS, LRS, SCALES, BATCH = 200, (0, 1, 2), (2e-3, 5e-3, 1.2e-2), (1.0, 2.0, 4.0), 8
# conv-covariance needs convolutions, which no language model of the zoo has; the LoRA methods fill adapters.
ELSEWHERE = {"conv-covariance", *methods.LORA}


def names() -> list[str]:
    return [name for name in methods.METHODS if name not in ELSEWHERE]


def prepare(work: Path) -> dict[str, Path]:
    """The embedded zoo, the models trained on it, the target and the text, as `headstart demo` makes them."""
    from autoencoder.training import train as train_autoencoder
    from diffusion.training import train as train_diffusion
    from zoo.nursery import train as train_zoo
    from zoo.text import reference_corpus, save_byte_tokenizer

    paths = {name: work / name for name in ("zoo", "autoencoder", "diffusion", "target", "corpus.txt")}
    paths["target"].mkdir(parents=True, exist_ok=True)
    (paths["target"] / "config.json").write_text(json.dumps(TARGET, indent=2) + "\n")
    save_byte_tokenizer(paths["target"])
    paths["corpus.txt"].write_bytes(reference_corpus())
    train_zoo(paths["zoo"], "bench")
    if not (paths["diffusion"] / "model_index.json").exists():
        train_autoencoder(paths["zoo"], paths["autoencoder"], resume=True)
        train_diffusion(paths["zoo"], paths["autoencoder"], paths["diffusion"], resume=True, steps=1500)
    return paths


def costs(paths: dict[str, Path]) -> dict[str, dict[str, float]]:
    """method -> seconds to fit, parameters per second to sample, and that over what torch.randn does on the same
    shapes in the same run. Sampling is the median of five, fitting is done once."""
    torch.set_num_threads(1)
    zoo, blueprint = Zoo.open(paths["zoo"]), language_model(paths["target"])
    found = {}
    for name in names():
        cls = methods.get(name)
        given = {"model": str(paths["diffusion"]), "tokenizer": str(paths["target"]), "text": str(paths["corpus.txt"])}
        sampler = configure(cls, **given)
        start = time.perf_counter()
        fit(sampler, zoo if cls.needs or "donor" in cls.__dataclass_fields__ else None, blueprint)
        fitted = time.perf_counter() - start
        seconds, reference = [], []
        for seed in range(5):
            start = time.perf_counter()
            filled = sum(tensor.numel() for _, tensor in sampler.sample(blueprint, seed))
            seconds.append(time.perf_counter() - start)
            start = time.perf_counter()
            for spec in blueprint.specs:
                torch.randn(spec.shape)
            reference.append(time.perf_counter() - start)
        rate, peer = filled / statistics.median(seconds), blueprint.parameters / statistics.median(reference)
        found[name] = {"fit_seconds": fitted, "parameters_per_second": rate, "of_randn": rate / peer}
        print(f"{name:20s} fit {fitted:8.2f} s   {rate / 1e6:8.2f} M parameters/s", flush=True)
    return found


def comparison(paths: dict[str, Path], out: Path) -> dict[str, Any]:
    from headstart.compare import compare

    return compare(
        paths["target"], paths["zoo"], names(), paths["corpus.txt"], steps=STEPS, seeds=SEEDS, lrs=LRS, out=out,
        model=paths["diffusion"], batch_size=BATCH, default_scales=SCALES, tuning_seeds=1,
        command="python benchmarks/methods.py",
    )  # fmt: skip


def record(results: dict[str, Any], cost: dict[str, dict[str, float]], zoo: Path) -> dict[str, Any]:
    """What methods.json keeps."""
    kept = ("lr", "scale", "lrs", "step0_loss", "final_loss", "steps_to_threshold", "speedup", "diverged")
    entries = {}
    for name, entry in results["methods"].items():
        donors = [donor["name"] for donor in entry["donors"]]
        finals = [curve["losses"][-1] for curve in entry["curves"]]
        entries[name] = {key: entry[key] for key in kept} | {"donors": donors, "finals": finals, **cost[name]}
    settings = ("steps", "seeds", "tuning_seeds", "grid", "batch_size", "sequence", "windows", "threshold", "device")
    return {
        "command": "python benchmarks/methods.py",
        "versions": versions() | {"python": platform.python_version()},
        "cores": os.cpu_count(),
        "target": results["target"],
        "corpus": results["corpus"],
        **{key: results[key] for key in settings},
        "donors": [{"name": d.name, "sha256": d.sha256, "loss": d.facts.get("loss")} for d in Zoo.open(zoo).donors],
        "methods": entries,
    }


def benchmark_table(found: dict[str, Any], convolutions: dict[str, Any]) -> str:
    """Every method, the lowest final loss first, and conv-covariance on its own task."""
    rows = [
        "| method | needs | fit, s | sample, M parameters/s (of `randn`) | lr | step 0 | final loss | speed-up |",
        "|---|---|---|---|---|---|---|---|",
    ]

    def final(name: str) -> float:
        mean = found["methods"][name]["final_loss"]["mean"]
        return math.inf if mean is None else mean

    for name in sorted(found["methods"], key=final):
        m = found["methods"][name]
        loss = m["final_loss"]
        ended = "diverged" if loss["mean"] is None else f"{loss['mean']:.3f} ± {loss['std']:.3f}"
        label = f"{name}, tuned (scale {m['scale']:g})" if name == REFERENCE else name
        rate = "–" if m["lr"] is None else f"{m['lr']:g}"
        start = "–" if m["step0_loss"] is None else f"{m['step0_loss']:.2f}"
        end = speed(name, m, found["steps"])
        rows.append(f"| {label} | {needs(name)} | {taken(m)} | {rate} | {start} | {ended} | {end} |")
    other = convolutions["methods"]
    own, peer, tuned = (other[key] for key in ("conv-covariance", "default, scale 1", "default"))
    ended = f"{own['mean']:.3f} (default {peer['mean']:.3f}, with its scale tuned {tuned['mean']:.3f})"
    rows.append(
        f"| conv-covariance, on digits | {needs('conv-covariance')} | {taken(convolutions['cost'])} "
        f"| {own['lr']:g} | – | {ended} | – |"
    )
    return "\n".join(rows)


def taken(m: dict[str, Any]) -> str:
    """Two cells: what fitting and sampling took."""
    return f"{m['fit_seconds']:.2f} | {m['parameters_per_second'] / 1e6:.2g} ({m['of_randn']:.2g})"


def speed(name: str, m: dict[str, Any], budget: int) -> str:
    per_seed, mean, bounds = m["steps_to_threshold"]["per_seed"], m["speedup"]["mean"], m["speedup"]["ci95"]
    if name == REFERENCE:
        return "1"
    if mean is None:
        arrived = sum(steps is not None for steps in per_seed)
        return f"{arrived} of {len(per_seed)} seeds arrive" if arrived else "never arrives"
    if max(per_seed) <= 1:
        return f"≥ {budget}"
    return f"{mean:.2g} ({bounds[0]:.2g} to {bounds[1]:.2g})"


def needs(name: str) -> str:
    return ", ".join(methods.get(name).needs) or "–"


def method_table() -> str:
    """Every method in a line, from what its class says of itself."""
    rows = ["| method | what it does | needs | source | file |", "|---|---|---|---|---|"]
    for name, (module, _) in methods.METHODS.items():
        cls = methods.get(name)
        rows.append(f"| `{name}` | {cls.summary} | {needs(name)} | {cls.reference} | `{module.replace('.', '/')}.py` |")
    return "\n".join(rows)


def placed(text: str, mark: str, table: str) -> str:
    """A README with the table between `<!-- mark -->` and `<!-- /mark -->`."""
    before, _, rest = text.partition(f"<!-- {mark} -->\n")
    _, end, after = rest.partition(f"<!-- /{mark} -->")
    if not end:
        raise SystemExit(f"no <!-- {mark} --> … <!-- /{mark} --> to write to")
    return f"{before}<!-- {mark} -->\n{table}\n<!-- /{mark} -->{after}"


def write_tables() -> None:
    readme, baselines = ROOT / "README.md", ROOT / "baselines" / "README.md"
    table = benchmark_table(json.loads(RESULTS.read_text()), json.loads(CONVOLUTIONS.read_text()))
    readme.write_text(placed(readme.read_text(), "benchmark", table))
    baselines.write_text(placed(baselines.read_text(), "methods", method_table()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder for zoo, models and runs")
    parser.add_argument("--tables", action="store_true", help="only write the tables again")
    arguments = parser.parse_args()
    if not arguments.tables:
        if arguments.work is None:
            parser.error("give --work DIR, or --tables")
        paths = prepare(arguments.work)
        cost = costs(paths)
        found = record(comparison(paths, arguments.work / "comparison"), cost, paths["zoo"])
        RESULTS.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
    write_tables()


if __name__ == "__main__":
    main()
