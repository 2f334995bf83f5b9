"""The command line: `headstart COMMAND`. Heavy imports happen inside the commands, so that --help is quick."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from headstart.terminal import (
    Device,
    Dtype,
    cell,
    command_line,
    print_json,
    print_rows,
    print_table,
    session,
    shard_of,
    torch_device,
    words,
)
from zoo.errors import UserError

# Options that several commands share.
ZooOption = Annotated[Path, typer.Option("--zoo", metavar="DIR", help="The zoo's folder.")]
OutOption = Annotated[Path, typer.Option("--out", metavar="DIR", help="The folder to write; it must not exist.")]
TargetOption = Annotated[str, typer.Option("--target", metavar="CONFIG", help="A config.json, its folder or a hub id.")]
TokenizerOption = Annotated[
    Path | None, typer.Option("--tokenizer", metavar="DIR", help="The target's tokenizer; else target folder, donors.")
]
ModelOption = Annotated[
    str | None, typer.Option("--model", metavar="DIR", help="A trained pipeline or autoencoder: folder or hub id.")
]
SeedOption = Annotated[int, typer.Option("--seed", help="Same seed, same bytes.")]
DeviceOption = Annotated[Device, typer.Option("--device", help="Where to compute.")]
DtypeOption = Annotated[Dtype | None, typer.Option("--dtype", help="Of what is written, else the config's.")]
QuietOption = Annotated[bool, typer.Option("--quiet", help="No progress and no notes on stderr.")]
JsonOption = Annotated[bool, typer.Option("--json", help="JSON on stdout, and nothing else there.")]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Continue an interrupted training in --out.")]
StepsOption = Annotated[int | None, typer.Option("--steps", help="Optimiser steps, else the default.")]

app = typer.Typer(
    help="Initial weights for new language models, learned from the weights of open ones.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
zoo_app = typer.Typer(help="The donors: add, train, list, verify.", no_args_is_help=True)
train_app = typer.Typer(help="Train the autoencoder or the diffusion on a zoo.", no_args_is_help=True)
app.add_typer(zoo_app, name="zoo")
app.add_typer(train_app, name="train")


@app.command(epilog="Example: headstart demo --out demo --quick")
def demo(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where everything goes.")] = Path("demo"),
    quick: Annotated[bool, typer.Option("--quick", help="Two minutes instead of ten.")] = False,
    seed: SeedOption = 0,
    quiet: QuietOption = False,
) -> None:
    """Train a zoo, learn its weights, generate for an unseen shape, compare: everything, on this machine."""
    with session(quiet):
        from headstart.demo import demo as run

        run(out, quick=quick, seed=seed, quiet=quiet)


@app.command("methods", epilog="Example: headstart methods --json")
def list_methods(as_json: JsonOption = False, quiet: QuietOption = False) -> None:
    """List the methods, what each needs and its options."""
    with session(quiet):
        from headstart import samplers

        rows = samplers.describe()
        if as_json:
            print_json(rows)
            return
        print_table(
            ["method", "needs", "reference", "what it does"],
            [[r["name"], ", ".join(r["needs"]) or "-", r["reference"], r["summary"]] for r in rows],
        )
        typer.echo("\nOptions (--set NAME=VALUE):")
        options = [[r["name"], o["name"], str(o["default"]), o["help"]] for r in rows for o in r["options"]]
        print_table(["method", "option", "default", "meaning"], options)


@zoo_app.command("add", epilog="Example: headstart zoo add HuggingFaceTB/SmolLM2-135M ./my-model --zoo zoo")
def zoo_add(
    sources: Annotated[list[str], typer.Argument(metavar="SOURCE...", help="Hub ids (id or id@rev) or folders.")],
    zoo: ZooOption,
    revision: Annotated[str | None, typer.Option(metavar="REV", help="For hub ids without one.")] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Say what would be read and downloaded; do nothing.")] = False,
    shard: Annotated[str, typer.Option(metavar="I/N", help="Only every N-th source, from number I (0, …).")] = "0/1",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Add checkpoints to a zoo. Adding twice changes nothing; an interrupted add resumes."""
    with session(quiet):
        from zoo.add import add

        rows = add(sources, zoo, revision=revision, plan=plan, shard=shard_of(shard), quiet=quiet)
        columns = ["name", "state", "health", "revision", "license", "tensors", "read", "download", "write"]
        print_rows(columns, rows, as_json)


@zoo_app.command("train", epilog="Example: headstart zoo train --zoo zoo --preset demo")
def zoo_train(
    zoo: ZooOption,
    preset: Annotated[str, typer.Option(metavar="NAME", help="Which set of models.")] = "demo",
    seed: SeedOption = 0,
    quiet: QuietOption = False,
) -> None:
    """Train the embedded zoo: tiny Llama-style models on the text that every Python ships."""
    with session(quiet):
        from zoo.training.nursery import train_zoo

        train_zoo(zoo, preset=preset, seed=seed, quiet=quiet)


@zoo_app.command("list", epilog="Example: headstart zoo list --zoo zoo --json")
def zoo_list(zoo: ZooOption, as_json: JsonOption = False, quiet: QuietOption = False) -> None:
    """List the donors of a zoo."""
    with session(quiet):
        from zoo.donors.index import list_donors

        rows = list_donors(zoo)
        print_rows(["name", "architecture", "parameters", "tensors", "license", "revision"], rows, as_json)


@zoo_app.command("verify", epilog="Example: headstart zoo verify --zoo zoo")
def zoo_verify(zoo: ZooOption, quiet: QuietOption = False) -> None:
    """Read every byte of a zoo again and compare it with the manifest."""
    with session(quiet):
        from zoo.donors.verify import stray_files, verify
        from zoo.donors.zoo import Zoo

        found = verify(zoo)
        if not quiet:
            for line in stray_files(zoo):
                typer.echo(line, err=True)
        for line in found:
            typer.echo(line, err=True)
        if found:
            raise UserError(f"{zoo}: {len(found)} problems, listed above")
        if not quiet:
            typer.echo(f"{zoo}: {len(Zoo.open(zoo).donors)} donors are as they were added", err=True)


@train_app.command("autoencoder", epilog="Example: headstart train autoencoder --zoo zoo --out autoencoder")
def train_autoencoder(
    zoo: ZooOption,
    out: OutOption,
    resume: ResumeOption = False,
    steps: StepsOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = Device.auto,
    quiet: QuietOption = False,
) -> None:
    """Train the autoencoder of residual units."""
    with session(quiet, again="the same command with --resume"):
        from autoencoder.training import AutoencoderTrainConfig, train_autoencoder
        from headstart.config import TrainAutoencoderConfig

        config = AutoencoderTrainConfig(seed=seed)
        config = config if steps is None else replace(config, steps=steps)
        on = torch_device(device)
        command = TrainAutoencoderConfig(zoo=str(zoo), out=str(out), steps=steps, seed=seed, device=on).to_record()
        train_autoencoder(config, zoo, out, resume=resume, device=on, quiet=quiet, command=command)


@train_app.command(
    "diffusion", epilog="Example: headstart train diffusion --zoo zoo --autoencoder autoencoder --out diffusion"
)
def train_diffusion(
    zoo: ZooOption,
    autoencoder: Annotated[Path, typer.Option("--autoencoder", metavar="DIR", help="A trained autoencoder.")],
    out: OutOption,
    resume: ResumeOption = False,
    steps: StepsOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = Device.auto,
    quiet: QuietOption = False,
) -> None:
    """Train the latent diffusion."""
    with session(quiet, again="the same command with --resume"):
        from diffusion.training import DiffusionTrainConfig, train_diffusion
        from headstart.config import TrainDiffusionConfig

        config = DiffusionTrainConfig(seed=seed)
        config = config if steps is None else replace(config, steps=steps)
        on = torch_device(device)
        command = TrainDiffusionConfig(
            zoo=str(zoo), autoencoder=str(autoencoder), out=str(out), steps=steps, seed=seed, device=on
        ).to_record()
        train_diffusion(config, zoo, autoencoder, out, resume=resume, device=on, quiet=quiet, command=command)


@app.command(epilog="Example: headstart generate --target config.json --method row-column --zoo zoo --out init")
def generate(
    target: TargetOption,
    method: Annotated[str, typer.Option("--method", metavar="NAME", help="One of `headstart methods`.")],
    out: OutOption,
    zoo: Annotated[Path | None, typer.Option("--zoo", metavar="DIR", help="The zoo's folder.")] = None,
    donor: Annotated[
        str | None, typer.Option("--donor", metavar="NAME", help="A donor; without --zoo a folder or hub id.")
    ] = None,
    model: ModelOption = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="An option of the method; repeatable.")
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Say what would be read and written; do nothing.")] = False,
    tokenizer: TokenizerOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = Device.auto,
    dtype: DtypeOption = None,
    quiet: QuietOption = False,
) -> None:
    """Write initial weights for a config: a folder that `AutoModelForCausalLM.from_pretrained` loads."""
    with session(quiet):
        from headstart.generate.generate import generate as run

        result = run(
            target,
            method,
            out,
            zoo=zoo,
            donor=donor,
            model=model,
            settings=settings or (),
            seed=seed,
            dtype=dtype.value if dtype else None,
            device=torch_device(device),
            plan=plan,
            quiet=quiet,
            command=command_line(),
            tokenizer=tokenizer,
        )
        if plan:
            print_json(result)
        elif not quiet:
            typer.echo(f"wrote {result}", err=True)


@app.command(
    epilog="Example: headstart compare --target config.json --zoo zoo --methods default,row-column "
    "--corpus text.txt --steps 300 --seeds 0,1,2 --lrs 1e-3,3e-3,6e-3 --out comparison"
)
def compare(
    target: TargetOption,
    zoo: ZooOption,
    methods: Annotated[str, typer.Option("--methods", metavar="A,B,...", help="Methods; a variant is NAME:KEY=VALUE.")],
    corpus: Annotated[Path, typer.Option("--corpus", metavar="FILE", help="UTF-8 text to train on.")],
    out: OutOption,
    steps: Annotated[int, typer.Option("--steps", help="Training steps of each run.")] = 300,
    seeds: Annotated[str, typer.Option("--seeds", metavar="0,1,2", help="Seeds, the same for all methods.")] = "0,1,2",
    lrs: Annotated[
        str, typer.Option("--lrs", metavar="A,B,...", help="Learning rates, tuned per method.")
    ] = "1e-3,3e-3,6e-3",
    batch_size: Annotated[int, typer.Option("--batch-size", help="Windows of text per step.")] = 16,
    sequence: Annotated[int, typer.Option("--sequence", help="Tokens per window.")] = 64,
    default_scales: Annotated[
        str, typer.Option("--default-scales", metavar="1,A,...", help="Of the default's std, tuned with its rate.")
    ] = "1,2,4",
    donor: Annotated[str | None, typer.Option("--donor", metavar="NAME", help="For methods that take one.")] = None,
    model: ModelOption = None,
    tokenizer: TokenizerOption = None,
    workers: Annotated[
        int | None,
        typer.Option("--workers", help="Processes of one thread; else one per core, or all threads above 5 M weights."),
    ] = None,
    tuning_seeds: Annotated[
        int | None, typer.Option("--tuning-seeds", metavar="N", help="Tune on the first N seeds only; else on all.")
    ] = None,
    device: DeviceOption = Device.auto,
    keep_going: Annotated[
        bool, typer.Option("--keep-going", help="Leave out methods that refuse the target, and say why.")
    ] = False,
    quiet: QuietOption = False,
) -> None:
    """Train the target from each initialisation, on the same data in the same order, and report."""
    with session(quiet):
        from headstart.compare.compare import compare as run

        run(
            target,
            zoo,
            words("methods", methods, str),
            corpus,
            steps=steps,
            seeds=words("seeds", seeds, int),
            lrs=words("lrs", lrs, float),
            out=out,
            model=model,
            tokenizer=tokenizer,
            donor=donor,
            batch_size=batch_size,
            sequence=sequence,
            default_scales=words("default-scales", default_scales, float),
            device=torch_device(device),
            workers=workers,
            tuning_seeds=tuning_seeds,
            keep_going=keep_going,
            quiet=quiet,
            command=command_line(),
        )
        if not quiet:
            typer.echo(f"wrote {out / 'report.html'}", err=True)


@app.command(epilog="Example: headstart analyze --zoo zoo --donor stories260K --out analysis")
def analyze(
    out: OutOption,
    zoo: Annotated[Path | None, typer.Option("--zoo", metavar="DIR", help="The zoo's folder.")] = None,
    donor: Annotated[
        str | None, typer.Option("--donor", metavar="NAME", help="Only this donor; without --zoo a folder or hub id.")
    ] = None,
    ranks: Annotated[
        str, typer.Option("--ranks", metavar="A,B,...", help="Numbers of singular values that layers are compared by.")
    ] = "16,64,256",
    bootstraps: Annotated[int, typer.Option("--bootstraps", help="Replicates behind each p-value of a fit.")] = 500,
    seed: SeedOption = 0,
    device: DeviceOption = Device.auto,
    quiet: QuietOption = False,
) -> None:
    """Marginals, spectra, similarity of layers, rows and columns, health: what the weights look like, and what not."""
    with session(quiet):
        from headstart.analyze.analyze import analyze as run

        run(
            out,
            zoo=zoo,
            donor=donor,
            ranks=words("ranks", ranks, int),
            bootstraps=bootstraps,
            seed=seed,
            device=torch_device(device),
            quiet=quiet,
            command=command_line(),
        )
        if not quiet:
            typer.echo(f"wrote {out / 'report.html'}", err=True)


@app.command(
    epilog="Example: headstart lora --base HuggingFaceTB/SmolLM2-135M --method pareto --rank 16 "
    "--reference analysis.json --out adapter"
)
def lora(
    base: Annotated[str, typer.Option("--base", metavar="MODEL", help="What is adapted: a folder or a hub id.")],
    method: Annotated[str, typer.Option("--method", metavar="NAME", help="A LoRA method of `headstart methods`.")],
    rank: Annotated[int, typer.Option("--rank", metavar="R", help="Rank of every pair A, B.")],
    out: OutOption,
    reference: Annotated[
        str | None,
        typer.Option("--reference", metavar="MODEL", help="A folder, hub id or analysis.json, for pareto; else base."),
    ] = None,
    alpha: Annotated[
        float | None, typer.Option("--alpha", help="lora_alpha; the rank, so that B A counts once.")
    ] = None,
    targets: Annotated[
        str, typer.Option("--targets", metavar="A,B,...", help="Modules to adapt, or all-linear.")
    ] = "all-linear",
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="An option of the method; repeatable.")
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Say what would be read and written; do nothing.")] = False,
    seed: SeedOption = 0,
    device: DeviceOption = Device.auto,
    dtype: DtypeOption = None,
    quiet: QuietOption = False,
) -> None:
    """Write an initial LoRA adapter: a folder that `PeftModel.from_pretrained` loads."""
    with session(quiet):
        from headstart.lora.lora import lora as run

        result = run(
            base,
            method,
            rank,
            out,
            reference=reference,
            alpha=alpha,
            targets=targets,
            settings=settings or (),
            plan=plan,
            seed=seed,
            device=torch_device(device),
            dtype=dtype.value if dtype else None,
            quiet=quiet,
            command=command_line(),
        )
        if plan:
            print_json(result)
        elif not quiet:
            typer.echo(f"wrote {result}", err=True)


@app.command(
    epilog="Example: headstart evaluate --model init --tasks arc_easy.jsonl,blimp/anaphor_gender_agreement.jsonl"
)
def evaluate(
    model: Annotated[str, typer.Option("--model", metavar="DIR", help="A checkpoint or adapter: folder or hub id.")],
    tasks: Annotated[
        str, typer.Option("--tasks", metavar="A,B,...", help="Names that lm-eval knows, and JSONL files of questions.")
    ],
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Write the JSON here too.")] = None,
    base: Annotated[
        str | None, typer.Option("--base", metavar="MODEL", help="What an adapter adapts, else what it says itself.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", metavar="N", help="Only the first N questions of each.")
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Requests at once.")] = 16,
    seed: SeedOption = 0,
    device: DeviceOption = Device.auto,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Score a checkpoint or an adapter with lm-eval, on its tasks or on local files."""
    with session(quiet):
        from headstart.evaluate.evaluate import evaluate as run

        results = run(
            model,
            words("tasks", tasks, str),
            out=out,
            base=base,
            limit=limit,
            batch_size=batch_size,
            seed=seed,
            device=torch_device(device),
            dtype=dtype.value if dtype else None,
            quiet=quiet,
            command=command_line(),
        )
        if as_json:
            print_json(results)
        else:
            rows = [
                [task, metric, cell(scores["samples"]), *("-" if v is None else f"{v:.4f}" for v in value.values())]
                for task, scores in results["tasks"].items()
                for metric, value in scores["metrics"].items()
            ]
            print_table(["task", "metric", "n", "mean", "stderr"], rows)


def main() -> None:
    """The console command. Exit codes: 0 done, 2 the user can mend it, 1 our fault, 130 interrupted."""
    app(prog_name="headstart")
