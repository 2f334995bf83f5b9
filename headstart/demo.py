"""The main job on the embedded zoo: train a zoo, learn its weights, generate for an unseen shape, compare.

Every stage is the command of the same name. It keeps what it has finished, so an interrupted demo continues.
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

from headstart.config import CompareConfig, DemoConfig, GenerateConfig
from headstart.terminal import print_table
from zoo.checkpoints.atomic import is_unused, new_folder, replace_file, work_folder
from zoo.errors import UserError


@dataclass(frozen=True)
class DemoSizes:
    """The sizes of a demo. The target's shape is in no preset of the embedded zoo."""

    preset: str  # of the embedded zoo
    autoencoder: dict[str, Any]  # options of `AutoencoderTrainConfig`
    diffusion: dict[str, Any]  # options of `DiffusionTrainConfig`
    compare_steps: int
    seeds: tuple[int, ...] = (0, 1, 2)
    lrs: tuple[float, ...] = (3e-3, 8e-3)
    default_scales: tuple[float, ...] = (1.0, 4.0)  # 4 gives about 0.8 / sqrt(width), as in the donors
    batch_size: int = 8
    methods: tuple[str, ...] = ("default", "normal", "weight-selection", "row-column", "diffusion")


FULL = DemoSizes(
    preset="demo",
    autoencoder={"steps": 400, "shapes": 48},
    diffusion={"steps": 400, "tuning": 60, "shapes": 48},
    compare_steps=150,
)
QUICK = DemoSizes(
    preset="quick",
    autoencoder={"steps": 50, "warmup": 15, "reconstruction": 30, "shapes": 16},
    diffusion={"steps": 40, "tuning": 6, "shapes": 16},
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


def demo(config: DemoConfig, *, sizes: DemoSizes | None = None, quiet: bool = False) -> dict[str, Any]:
    """Runs everything into `config.out` and prints the table of methods and the path of the report.

    sizes  the sizes of the demo; by default FULL, or QUICK with `config.quick`

    Returns {stage: {seconds, peak_mib}}, the peak of the resident memory of this process and its largest child so far.
    Raises UserError where the folder holds something else."""
    sizes = sizes or (QUICK if config.quick else FULL)
    folders, identity = DemoFolders(Path(config.out)), f"{sizes.preset} {config.seed}\n"
    with work_folder(folders.out, lambda: _check_out(folders, identity)):
        if not folders.mark.exists():
            replace_file(folders.mark, identity.encode())
        return _run_stages(config, sizes, folders, quiet)


def _run_stages(config: DemoConfig, sizes: DemoSizes, folders: DemoFolders, quiet: bool) -> dict[str, Any]:
    _write_target(folders)
    stages = Stages(quiet)
    stages.run("zoo train", lambda: _train_zoo(sizes, folders, config.seed, quiet))
    stages.run("train autoencoder", lambda: _train_autoencoder(sizes, folders, config.seed, quiet))
    stages.run("train diffusion", lambda: _train_diffusion(sizes, folders, config.seed, quiet))
    if not folders.generated.exists():
        stages.run("generate", lambda: _generate(folders, config.seed, quiet))
    results = stages.run("compare", lambda: _compare(sizes, folders, config, quiet))
    _store_stages(folders.out / "demo.json", stages.costs)
    print_table(*comparison_table(results))
    print(f"\n{folders.comparison / 'report.html'}")
    return stages.costs


@dataclass(frozen=True)
class DemoFolders:
    """Where each stage of a demo writes."""

    out: Path

    @property
    def mark(self) -> Path:
        """The file with the demo's preset and seed."""
        return self.out / ".headstart-demo"

    @property
    def zoo(self) -> Path:
        return self.out / "zoo"

    @property
    def autoencoder(self) -> Path:
        return self.out / "autoencoder"

    @property
    def pipeline(self) -> Path:
        return self.out / "diffusion"

    @property
    def target(self) -> Path:
        return self.out / "target"

    @property
    def corpus(self) -> Path:
        return self.out / "corpus.txt"

    @property
    def generated(self) -> Path:
        return self.out / "generated"

    @property
    def comparison(self) -> Path:
        return self.out / "comparison"


@dataclass
class Stages:
    """Runs the stages of a demo and measures them."""

    quiet: bool
    costs: dict[str, dict[str, float]] = field(default_factory=dict)

    def run(self, name: str, work: Callable[[], Any]) -> Any:
        if not self.quiet:
            print(f"\nheadstart {name}", file=sys.stderr)
        start = time.monotonic()
        result = work()
        peak = sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        self.costs[name] = {"seconds": round(time.monotonic() - start, 1), "peak_mib": round(peak / 1024)}
        return result


def _check_out(folders: DemoFolders, identity: str) -> None:
    """Raises UserError where the folder holds something else, or a demo with another identity."""
    if folders.mark.is_file():
        if folders.mark.read_text() != identity:
            raise UserError(f"{folders.out}: holds a demo of another preset or seed; give another --out, or remove it")
    elif not is_unused(folders.out):
        raise UserError(f"{folders.out}: exists and holds no demo; give another --out, or remove it")


def _write_target(folders: DemoFolders) -> None:
    """The config and the tokenizer of the target, and the corpus."""
    from zoo.training.corpora import reference_corpus
    from zoo.vocabulary import save_byte_tokenizer

    if not folders.target.exists():
        with new_folder(folders.target) as folder:
            (folder / "config.json").write_text(json.dumps(TARGET, indent=2) + "\n")
            save_byte_tokenizer(folder)
    if not folders.corpus.exists():
        replace_file(folders.corpus, reference_corpus())


def _train_zoo(sizes: DemoSizes, folders: DemoFolders, seed: int, quiet: bool) -> None:
    from zoo.training.embedded_zoo import train_zoo

    train_zoo(folders.zoo, sizes.preset, seed=seed, quiet=quiet)


def _train_autoencoder(sizes: DemoSizes, folders: DemoFolders, seed: int, quiet: bool) -> None:
    from autoencoder.training import AutoencoderTrainConfig, train_autoencoder

    config = AutoencoderTrainConfig(seed=seed, **sizes.autoencoder)
    train_autoencoder(config, folders.zoo, folders.autoencoder, resume=True, device="cpu", quiet=quiet)


def _train_diffusion(sizes: DemoSizes, folders: DemoFolders, seed: int, quiet: bool) -> None:
    from diffusion.training import DiffusionTrainConfig, train_diffusion

    config = DiffusionTrainConfig(seed=seed, **sizes.diffusion)
    train_diffusion(config, folders.zoo, folders.autoencoder, folders.pipeline, resume=True, device="cpu", quiet=quiet)


def _generate(folders: DemoFolders, seed: int, quiet: bool) -> None:
    from headstart.generate.generate import generate

    config = GenerateConfig(
        target=folders.target,
        method="diffusion",
        out=folders.generated,
        model=folders.pipeline,
        seed=seed,
        device="cpu",
    )
    generate(config, quiet=quiet)


def _compare(sizes: DemoSizes, folders: DemoFolders, demo_config: DemoConfig, quiet: bool) -> dict[str, Any]:
    from headstart.compare.compare import compare

    config = CompareConfig(
        target=folders.target,
        methods=sizes.methods,
        corpus=folders.corpus,
        out=folders.comparison,
        zoo=folders.zoo,
        model=folders.pipeline,
        steps=sizes.compare_steps,
        seeds=sizes.seeds,
        lrs=sizes.lrs,
        default_scales=sizes.default_scales,
        batch_size=sizes.batch_size,
        device="cpu",
    )
    quick = " --quick" if demo_config.quick else ""
    return compare(config, quiet=quiet, command=f"headstart demo{quick} --seed {demo_config.seed}")


def comparison_table(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(header, rows) of a comparison, the fastest method first."""
    from headstart.report.comparison_findings import rank_methods
    from headstart.report.scores import REFERENCE

    rows = []
    for name, entry in rank_methods(results):
        final, steps, speed = entry["final_loss"], entry["steps_to_threshold"]["mean"], entry["speedup"]["mean"]
        if name == REFERENCE:
            steps = results["steps"]  # by definition
        spread = f" ± {final['std']:.3f}" if final["std"] is not None else ""
        rows.append(
            [
                name,
                "–" if entry["lr"] is None else f"{entry['lr']:g}",
                "–" if entry["step0_loss"] is None else f"{entry['step0_loss']:.2f}",
                "diverged" if final["mean"] is None else f"{final['mean']:.3f}{spread}",
                "never" if steps is None else f"{steps:.0f}",
                "–" if speed is None else f"{speed:.1f}x",
            ]
        )
    return ["method", "lr", "step 0", "final loss", "steps to threshold", "speed-up"], rows


def _store_stages(path: Path, costs: dict[str, dict[str, float]]) -> None:
    """Writes demo.json with the longest call of every stage. In a later call, finished stages have nothing to do."""
    from headstart.versions import package_versions

    stages = json.loads(path.read_text())["stages"] if path.is_file() else {}
    for name, entry in costs.items():
        if name not in stages or entry["seconds"] > stages[name]["seconds"]:
            stages[name] = entry
    replace_file(path, (json.dumps({"stages": stages, "versions": package_versions()}, indent=2) + "\n").encode())
