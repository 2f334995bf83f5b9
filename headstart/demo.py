"""The main job on the embedded zoo: train a zoo, learn its weights, generate for an unseen shape, compare.

Every stage is the command of the same name, keeps what it has finished, and can be interrupted and run again.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zoo.checkpoints.writer import replace_file
from zoo.errors import UserError


@dataclass(frozen=True)
class Plan:
    """What the demo does in its time. The target's shape is in no preset of the nursery."""

    preset: str  # of the nursery
    autoencoder_steps: int
    diffusion_steps: int
    compare_steps: int
    seeds: tuple[int, ...] = (0, 1, 2)
    lrs: tuple[float, ...] = (3e-3, 8e-3)
    default_scales: tuple[float, ...] = (1.0, 4.0)  # 4: about 0.8 / sqrt(width) here, what the donors started from
    batch_size: int = 8
    methods: tuple[str, ...] = ("default", "normal", "weight-selection", "row-column", "diffusion")
    diffusion: dict[str, Any] = field(default_factory=dict)


FULL = Plan(preset="demo", autoencoder_steps=150, diffusion_steps=1000, compare_steps=150)
QUICK = Plan(
    preset="quick",
    autoencoder_steps=30,
    diffusion_steps=150,
    compare_steps=50,
    seeds=(0, 1, 2),
    lrs=(6e-3,),
)
TARGET = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
}


def demo(
    out: str | Path, quick: bool = False, seed: int = 0, quiet: bool = False, plan: Plan | None = None
) -> dict[str, Any]:
    """Runs everything into `out`, prints the table of methods and the path of the report, and returns what each stage
    took: {stage: {seconds, peak_mib}} (peak resident memory of this process and its largest child so far).

    Raises UserError where `out` holds something else."""
    from autoencoder.training import AutoencoderTrainConfig, train_autoencoder
    from diffusion.training import DiffusionTrainConfig, train_diffusion
    from headstart.compare.compare import compare
    from headstart.generate.generate import generate
    from zoo.training.corpora import reference_corpus
    from zoo.training.nursery import train_zoo
    from zoo.vocabulary import save_byte_tokenizer

    plan = plan or (QUICK if quick else FULL)
    out = Path(out)
    _claim(out, plan, seed)
    zoo, autoencoder, pipeline, target = (out / name for name in ("zoo", "autoencoder", "diffusion", "target"))
    target.mkdir(exist_ok=True)
    (target / "config.json").write_text(json.dumps(TARGET, indent=2) + "\n")
    save_byte_tokenizer(target)
    corpus = out / "corpus.txt"
    if not corpus.exists():
        replace_file(corpus, reference_corpus())

    took: dict[str, dict[str, float]] = {}
    run = _stage(took, quiet)
    run("zoo train", lambda: train_zoo(zoo, plan.preset, seed=seed, quiet=quiet))
    run(
        "train autoencoder",
        lambda: train_autoencoder(
            AutoencoderTrainConfig(seed=seed, steps=plan.autoencoder_steps),
            zoo,
            autoencoder,
            resume=True,
            device="cpu",
            quiet=quiet,
        ),
    )
    run(
        "train diffusion",
        lambda: train_diffusion(
            DiffusionTrainConfig(seed=seed, steps=plan.diffusion_steps, **plan.diffusion),
            zoo,
            autoencoder,
            pipeline,
            resume=True,
            device="cpu",
            quiet=quiet,
        ),
    )
    if not (out / "generated").exists():
        run(
            "generate",
            lambda: generate(target, "diffusion", out / "generated", model=str(pipeline), seed=seed, quiet=quiet),
        )
    results: dict[str, Any] = {}

    def comparison() -> None:
        results.update(
            compare(
                target,
                zoo,
                plan.methods,
                corpus,
                steps=plan.compare_steps,
                seeds=plan.seeds,
                lrs=plan.lrs,
                out=out / "comparison",
                model=pipeline,
                batch_size=plan.batch_size,
                default_scales=plan.default_scales,
                quiet=quiet,
                command=f"headstart demo{' --quick' if quick else ''} --seed {seed}",
            )
        )

    run("compare", comparison)
    _keep(out / "demo.json", took)
    print(table(results))
    print(f"\n{out / 'comparison' / 'report.html'}")
    return took


def table(results: dict[str, Any]) -> str:
    """The comparison as text, the fastest first."""
    from headstart.report.comparison_findings import rank_methods
    from headstart.report.scores import REFERENCE

    rows = [("method", "lr", "step 0", "final loss", "steps to the default's", "speed-up")]
    for name, entry in rank_methods(results):
        final, steps, speed = entry["final_loss"], entry["steps_to_threshold"]["mean"], entry["speedup"]["mean"]
        if name == REFERENCE:
            steps = results["steps"]  # by definition
        spread = f" ± {final['std']:.3f}" if final["std"] is not None else ""
        rows.append(
            (
                name,
                "–" if entry["lr"] is None else f"{entry['lr']:g}",
                "–" if entry["step0_loss"] is None else f"{entry['step0_loss']:.2f}",
                "diverged" if final["mean"] is None else f"{final['mean']:.3f}{spread}",
                "never" if steps is None else f"{steps:.0f}",
                "–" if speed is None else f"{speed:.1f}x",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _claim(out: Path, plan: Plan, seed: int) -> None:
    """Makes `out` this demo's folder. UserError where it holds something else, or another demo."""
    mark = out / ".headstart-demo"
    mine = f"{plan.preset} {seed}\n"
    if mark.is_file():
        if mark.read_text() != mine:
            raise UserError(f"{out}: holds a demo of another preset or seed; give another --out, or remove it")
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists and holds no demo; give another --out, or remove it")
    out.mkdir(parents=True, exist_ok=True)
    mark.write_text(mine)


def _stage(took: dict[str, dict[str, float]], quiet: bool) -> Callable[[str, Callable[[], object]], None]:
    def run(name: str, work: Callable[[], object]) -> None:
        if not quiet:
            print(f"\nheadstart {name}", file=sys.stderr)
        start = time.monotonic()
        work()
        peak = sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        took[name] = {"seconds": round(time.monotonic() - start, 1), "peak_mib": round(peak / 1024)}

    return run


def _keep(path: Path, took: dict[str, dict[str, float]]) -> None:
    """demo.json: of every stage its longest call. A stage that an earlier call finished has nothing left to do."""
    from headstart.versions import package_versions

    stages = json.loads(path.read_text())["stages"] if path.is_file() else {}
    for name, entry in took.items():
        if name not in stages or entry["seconds"] > stages[name]["seconds"]:
            stages[name] = entry
    replace_file(path, (json.dumps({"stages": stages, "versions": package_versions()}, indent=2) + "\n").encode())
