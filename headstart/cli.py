"""The command line: `headstart COMMAND`.

The parameters of a command function are its options. Its body turns them into the command's configuration, together
with `--config`, and runs that (`run_command`). Heavy imports happen inside the commands, so that --help is quick.
"""

from __future__ import annotations

import dataclasses
import shlex
import sys
from enum import StrEnum
from typing import Annotated, Any

import typer

from headstart import __version__
from headstart.config import (
    CONFIGS,
    AnalyzeConfig,
    CompareConfig,
    DemoConfig,
    EvaluateConfig,
    GenerateConfig,
    LoraConfig,
    TrainAutoencoderConfig,
    TrainDiffusionConfig,
    ZooAddConfig,
    ZooTrainConfig,
    config_of,
)
from headstart.config_file import FLAGS, TIMEOUT, merged_options, read_config_file, read_options, split_flags
from headstart.config_values import comma_list
from headstart.terminal import session
from zoo.errors import UserError
from zoo.limits import HUB_TIMEOUT


class Device(StrEnum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"
    mps = "mps"


class Dtype(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


# Options that several commands share.
ConfigOption = Annotated[
    str | None,
    typer.Option(
        "--config",
        metavar="FILE",
        help="YAML file, or a headstart.json of an earlier run; options given here win.",
        callback=read_config_file,
        is_eager=True,
    ),
]
ZooOption = Annotated[str, typer.Option("--zoo", metavar="DIR", help="The folder of the zoo.")]
OptionalZoo = Annotated[str | None, typer.Option("--zoo", metavar="DIR", help="The folder of the zoo.")]
OutOption = Annotated[str, typer.Option("--out", metavar="DIR", help="The folder to write; it must not exist.")]
TargetOption = Annotated[str, typer.Option("--target", metavar="CONFIG", help="A config.json, its folder or a hub id.")]
TokenizerOption = Annotated[
    str | None,
    typer.Option(
        "--tokenizer", metavar="DIR", help="The target's tokenizer [default: from its folder, else from the donors]."
    ),
]
ModelOption = Annotated[
    str | None, typer.Option("--model", metavar="DIR", help="A trained pipeline or autoencoder: a folder or a hub id.")
]
DonorOption = Annotated[
    str | None, typer.Option("--donor", metavar="NAME", help="A donor of the zoo; without --zoo a folder or a hub id.")
]
TextOption = Annotated[
    str | None,
    typer.Option("--text", metavar="TEXT", help="A sample of the text to train on, for methods with the option text."),
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="An option of the method; repeatable.")
]
SeedOption = Annotated[int, typer.Option("--seed", help="The same seed gives the same bytes.")]
DeviceOption = Annotated[Device, typer.Option("--device", help="auto: a CUDA GPU if one is available, else the CPU.")]
DtypeOption = Annotated[
    Dtype | None, typer.Option("--dtype", help="Number format of the written weights [default: from the config].")
]
ShardSizeOption = Annotated[
    str, typer.Option("--max-shard-size", metavar="SIZE", help="Of the files of weights, such as 1GB or 500MB.")
]
DEFAULT_SCALES = comma_list(CompareConfig.default_scales)
DefaultScalesOption = Annotated[
    str,
    typer.Option(
        "--default-scales", metavar="1,A,...", help="Factors on the default initialisation's standard deviation to try."
    ),
]
QuietOption = Annotated[bool, typer.Option("--quiet", help="Print neither progress nor notes.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON to stdout.")]
TimeoutOption = Annotated[
    float,
    typer.Option("--timeout", metavar="SECONDS", help="Give up a hub that makes no progress for so long."),
]
PlanOption = Annotated[bool, typer.Option("--plan", help="Print what would be read and written, and do nothing.")]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Continue an interrupted training in --out.")]
WorkersOption = Annotated[
    int | None,
    typer.Option("--workers", help="Processes of one thread [default: one per core, or 1 above 5 M weights]."),
]
TuningSeedsOption = Annotated[
    int | None, typer.Option("--tuning-seeds", metavar="N", help="Tune on the first N seeds [default: on all].")
]
CorporaOption = Annotated[
    list[str] | None,
    typer.Option(
        "--corpus",
        metavar="[NAME=]FILE",
        help="Text to train on: a file or folder for all donors, or NAME=FILE for a donor or a text that donors name; "
        "repeatable [default: the donors' own text where it is known, else text that they write].",
    ),
]
ComparedText = Annotated[
    str,
    typer.Option(
        "--corpus",
        metavar="TEXT",
        help="Text to train on: a file of text, JSON lines, Parquet or CSV, a folder, or a hub data set.",
    ),
]
OptionalTarget = Annotated[
    str | None, typer.Option("--target", metavar="CONFIG", help="A config.json, its folder or a hub id.")
]
# Options of `compare` for LoRA adapters.
ComparedBase = Annotated[
    str | None,
    typer.Option("--base", metavar="MODEL", help="Instead of --target: the model whose LoRA adapters are compared."),
]
ComparedRank = Annotated[int | None, typer.Option("--rank", metavar="R", help="With --base: rank of every pair A, B.")]
ComparedReference = Annotated[
    str | None,
    typer.Option(
        "--reference",
        metavar="MODEL",
        help="With --base, for pareto: folder, hub id or analysis.json; or pareto:reference=MODEL [default: base].",
    ),
]
ComparedAlpha = Annotated[float | None, typer.Option("--alpha", help="With --base: lora_alpha [default: the rank].")]
ComparedTargets = Annotated[
    str | None,
    typer.Option("--targets", metavar="A,B,...", help="With --base: modules to adapt [default: all-linear]."),
]
# Defaults of the training configurations, whose packages import torch.
AUTOENCODER_STEPS, TEXT_STEPS, DIFFUSION_STEPS = 4000, 1000, 2000

app = typer.Typer(
    help="Initial weights for new language models, learned from the weights of open ones.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
zoo_app = typer.Typer(help="Add, merge, train, list and verify the donors of a zoo.", no_args_is_help=True)
train_app = typer.Typer(help="Train the autoencoder or the diffusion on a zoo.", no_args_is_help=True)
app.add_typer(zoo_app, name="zoo")
app.add_typer(train_app, name="train")


def main() -> None:
    """The console command. Exit codes: 0 done, 2 the user can correct it, 1 our own fault, 130 interrupted."""
    app(prog_name="headstart")


def run_command(ctx: typer.Context, subcommand: str) -> None:
    """Runs a command with the options in `ctx` and in its --config file."""
    from headstart.commands import Invocation, run_config

    flags: dict[str, Any] = {flag: bool(ctx.params.get(flag)) for flag in FLAGS.values()}
    if TIMEOUT in ctx.params:
        flags[TIMEOUT] = ctx.params[TIMEOUT]
    again = "the same command with --resume" if "resume" in ctx.params else "the same command again"
    with session(flags["quiet"], to_continue=again):
        config = CONFIGS[subcommand].from_options(merged_options(ctx, subcommand))
        typed = None if ctx.params.get("config") else shlex.join(["headstart", *sys.argv[1:]])
        run_config(config, Invocation(**flags, command=typed))


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"headstart {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None: ...


@app.command(epilog="Example: headstart demo --out demo --quick")
def demo(
    ctx: typer.Context,
    out: Annotated[str, typer.Option("--out", metavar="DIR", help="The folder of all results.")] = str(DemoConfig.out),
    quick: Annotated[bool, typer.Option("--quick", help="Two minutes instead of ten.")] = False,
    seed: SeedOption = 0,
    config: ConfigOption = None,
    quiet: QuietOption = False,
) -> None:
    """Train a zoo, learn its weights, generate for an unseen shape and compare, all on this machine."""
    run_command(ctx, "demo")


@app.command("methods", epilog="Example: headstart methods row-column")
def list_methods(
    ctx: typer.Context,
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="A method, to list its options.")] = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """List the methods and what each needs, or the options of one."""
    run_command(ctx, "methods")


@zoo_app.command("add", epilog="Example: headstart zoo add HuggingFaceTB/SmolLM2-135M ./my-model --zoo zoo")
def zoo_add(
    ctx: typer.Context,
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE...", help="Hub ids (id or id@revision), folders, GGUF files (a path, or id:FILE)."
        ),
    ],
    zoo: ZooOption,
    revision: Annotated[str | None, typer.Option(metavar="REV", help="For hub ids without a revision.")] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Print what would be downloaded, and do nothing.")] = False,
    shard: Annotated[
        str, typer.Option(metavar="I/N", help="Only every N-th source, from number I (the first is 0).")
    ] = ZooAddConfig.shard,
    no_health: Annotated[
        bool, typer.Option("--no-health", help="Do not examine the weights for damage; NaN is refused anyway.")
    ] = ZooAddConfig.no_health,
    timeout: TimeoutOption = HUB_TIMEOUT,
    config: ConfigOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Add checkpoints to a zoo. Adding twice changes nothing, and an interrupted add continues."""
    run_command(ctx, "zoo add")


@zoo_app.command("merge", epilog="Example: headstart zoo merge zoo-a zoo-b --zoo zoo")
def zoo_merge(
    ctx: typer.Context,
    sources: Annotated[list[str], typer.Argument(metavar="ZOO...", help="Folders of zoos that were filled apart.")],
    zoo: Annotated[str, typer.Option("--zoo", metavar="DIR", help="The folder of the merged zoo, new or not.")],
    plan: PlanOption = False,
    config: ConfigOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Join zoos into one, each content once. Files are hard-linked where the disk allows it, else copied."""
    run_command(ctx, "zoo merge")


@zoo_app.command("train", epilog="Example: headstart zoo train --zoo zoo --preset demo")
def zoo_train(
    ctx: typer.Context,
    zoo: ZooOption,
    preset: Annotated[
        str, typer.Option(metavar="NAME", help="Which models to train: demo, quick, bench or specialists.")
    ] = ZooTrainConfig.preset,
    corpus: Annotated[
        list[str] | None,
        typer.Option(
            "--corpus",
            metavar="NAME=FILE",
            help="With --preset specialists: a further text, as a file or folder of text, JSON lines, Parquet or CSV; "
            "repeatable.",
        ),
    ] = None,
    seed: SeedOption = 0,
    config: ConfigOption = None,
    quiet: QuietOption = False,
) -> None:
    """Train tiny Llama-style models on the text that every Python ships.

    The preset `specialists` trains models on several texts: Python's language reference, the source code of its
    standard library, and those of --corpus.
    """
    run_command(ctx, "zoo train")


@zoo_app.command("list", epilog="Example: headstart zoo list --zoo zoo --json")
def zoo_list(
    ctx: typer.Context,
    zoo: ZooOption,
    config: ConfigOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """List the donors of a zoo."""
    run_command(ctx, "zoo list")


@zoo_app.command("verify", epilog="Example: headstart zoo verify --zoo zoo")
def zoo_verify(ctx: typer.Context, zoo: ZooOption, config: ConfigOption = None, quiet: QuietOption = False) -> None:
    """Read every byte of a zoo again and compare it with the manifest."""
    run_command(ctx, "zoo verify")


@train_app.command("autoencoder", epilog="Example: headstart train autoencoder --zoo zoo --out autoencoder")
def train_autoencoder(
    ctx: typer.Context,
    zoo: ZooOption,
    out: OutOption,
    corpus: CorporaOption = None,
    resume: ResumeOption = False,
    steps: Annotated[
        int | None,
        typer.Option(
            "--steps",
            help=f"Optimiser steps of the last stage [default: {AUTOENCODER_STEPS}, and {TEXT_STEPS} more for each "
            "further text that the donors learned from].",
        ),
    ] = TrainAutoencoderConfig.steps,
    distill: Annotated[
        bool, typer.Option("--distill", help="Learn from the donors' predictions instead of the text itself.")
    ] = TrainAutoencoderConfig.distill,
    seed: SeedOption = 0,
    device: DeviceOption = Device.auto,
    config: ConfigOption = None,
    quiet: QuietOption = False,
) -> None:
    """Train the autoencoder: donors to latents, and latents to weights of any shape."""
    run_command(ctx, "train autoencoder")


@train_app.command(
    "diffusion", epilog="Example: headstart train diffusion --zoo zoo --autoencoder autoencoder --out diffusion"
)
def train_diffusion(
    ctx: typer.Context,
    zoo: ZooOption,
    autoencoder: Annotated[str, typer.Option("--autoencoder", metavar="DIR", help="A trained autoencoder.")],
    out: OutOption,
    corpus: CorporaOption = None,
    resume: ResumeOption = False,
    steps: Annotated[
        int | None, typer.Option("--steps", help=f"Optimiser steps before the tuning [default: {DIFFUSION_STEPS}].")
    ] = TrainDiffusionConfig.steps,
    seed: SeedOption = 0,
    device: DeviceOption = Device.auto,
    config: ConfigOption = None,
    quiet: QuietOption = False,
) -> None:
    """Train the diffusion of latents, which generates models for a config and a text."""
    run_command(ctx, "train diffusion")


@app.command(epilog="Example: headstart generate --target config.json --method row-column --zoo zoo --out init")
def generate(
    ctx: typer.Context,
    target: TargetOption,
    method: Annotated[str, typer.Option("--method", metavar="NAME", help="One of `headstart methods`.")],
    out: OutOption,
    zoo: OptionalZoo = None,
    donor: DonorOption = None,
    model: ModelOption = None,
    settings: SetOption = None,
    plan: PlanOption = False,
    tokenizer: TokenizerOption = None,
    text: TextOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = Device.auto,
    dtype: DtypeOption = None,
    max_shard_size: ShardSizeOption = GenerateConfig.max_shard_size,
    timeout: TimeoutOption = HUB_TIMEOUT,
    config: ConfigOption = None,
    quiet: QuietOption = False,
) -> None:
    """Write initial weights for a config: a folder that `AutoModelForCausalLM.from_pretrained` loads."""
    run_command(ctx, "generate")


@app.command(
    epilog="Example: headstart compare --target config.json --zoo zoo --methods default,row-column "
    "--corpus text.txt --steps 300 --seeds 0,1,2 --lrs 1e-3,3e-3,6e-3 --out comparison; headstart compare "
    "--base ./model --rank 8 --methods default,pissa,pareto --corpus text.txt --lrs 2e-4,5e-4,1e-3 --out adapters"
)
def compare(
    ctx: typer.Context,
    methods: Annotated[str, typer.Option("--methods", metavar="A,B,...", help="Methods; a variant is NAME:KEY=VALUE.")],
    corpus: ComparedText,
    out: OutOption,
    target: OptionalTarget = None,
    base: ComparedBase = None,
    rank: ComparedRank = CompareConfig.rank,
    reference: ComparedReference = None,
    alpha: ComparedAlpha = CompareConfig.alpha,
    targets: ComparedTargets = None,
    split: Annotated[
        str | None, typer.Option("--split", metavar="NAME", help="The split of a data set [default: train].")
    ] = CompareConfig.split,
    text_column: Annotated[
        str | None, typer.Option("--text-column", metavar="NAME", help="The column of a data set [default: text].")
    ] = CompareConfig.text_column,
    zoo: OptionalZoo = None,
    steps: Annotated[int, typer.Option("--steps", help="Training steps of each run.")] = CompareConfig.steps,
    seeds: Annotated[
        str, typer.Option("--seeds", metavar="0,1,2", help="Seeds, the same for all methods.")
    ] = comma_list(CompareConfig.seeds),
    lrs: Annotated[
        str, typer.Option("--lrs", metavar="A,B,...", help="Learning rates, tuned per method.")
    ] = comma_list(CompareConfig.lrs),
    batch_size: Annotated[
        int, typer.Option("--batch-size", help="Windows of text per step.")
    ] = CompareConfig.batch_size,
    sequence: Annotated[int, typer.Option("--sequence", help="Tokens per window.")] = CompareConfig.sequence,
    windows: Annotated[
        int, typer.Option("--windows", help="Held-out windows at each measurement.")
    ] = CompareConfig.windows,
    default_scales: DefaultScalesOption = DEFAULT_SCALES,
    donor: Annotated[
        str | None, typer.Option("--donor", metavar="NAME", help="The donor, for methods that take one.")
    ] = None,
    model: ModelOption = None,
    tokenizer: TokenizerOption = None,
    text: TextOption = None,
    workers: WorkersOption = CompareConfig.workers,
    tuning_seeds: TuningSeedsOption = CompareConfig.tuning_seeds,
    device: DeviceOption = Device.auto,
    dtype: Annotated[
        Dtype, typer.Option("--dtype", help="Of the products in training; weights and updates stay float32.")
    ] = Dtype.float32,
    keep_going: Annotated[
        bool, typer.Option("--keep-going", help="Leave out methods that refuse the target, and report why.")
    ] = CompareConfig.keep_going,
    timeout: TimeoutOption = HUB_TIMEOUT,
    config: ConfigOption = None,
    quiet: QuietOption = False,
) -> None:
    """Train the target from each initialisation, on the same data in the same order, and report.

    With --base and --rank, LoRA adapters of a model are trained instead, and `default` is PEFT's own initialisation.
    """
    run_command(ctx, "compare")


@app.command(epilog="Example: headstart analyze --zoo zoo --donor stories260K --out analysis")
def analyze(
    ctx: typer.Context,
    out: OutOption,
    zoo: OptionalZoo = None,
    donor: Annotated[
        str | None, typer.Option("--donor", metavar="NAME", help="Only this donor; without --zoo a folder or a hub id.")
    ] = None,
    ranks: Annotated[
        str, typer.Option("--ranks", metavar="A,B,...", help="Numbers of singular values by which layers are compared.")
    ] = comma_list(AnalyzeConfig.ranks),
    bootstraps: Annotated[
        int, typer.Option("--bootstraps", help="Bootstrap samples for each p-value.")
    ] = AnalyzeConfig.bootstraps,
    seed: SeedOption = 0,
    device: DeviceOption = Device.auto,
    timeout: TimeoutOption = HUB_TIMEOUT,
    config: ConfigOption = None,
    quiet: QuietOption = False,
) -> None:
    """Report statistics of weights: distributions, spectra, similarity of layers, rows and columns, health."""
    run_command(ctx, "analyze")


@app.command(
    epilog="Example: headstart lora --base HuggingFaceTB/SmolLM2-135M --method pareto --rank 16 "
    "--reference analysis.json --out adapter"
)
def lora(
    ctx: typer.Context,
    base: Annotated[str, typer.Option("--base", metavar="MODEL", help="The model to adapt: a folder or a hub id.")],
    method: Annotated[str, typer.Option("--method", metavar="NAME", help="A LoRA method of `headstart methods`.")],
    rank: Annotated[int, typer.Option("--rank", metavar="R", help="Rank of every pair A, B.")],
    out: OutOption,
    reference: Annotated[
        str | None,
        typer.Option("--reference", metavar="MODEL", help="Folder, hub id or analysis.json [default: base]."),
    ] = None,
    alpha: Annotated[float | None, typer.Option("--alpha", help="lora_alpha [default: the rank].")] = LoraConfig.alpha,
    targets: Annotated[
        str, typer.Option("--targets", metavar="A,B,...", help="Modules to adapt, or all-linear.")
    ] = comma_list(LoraConfig.targets),
    settings: SetOption = None,
    plan: PlanOption = False,
    seed: SeedOption = 0,
    device: DeviceOption = Device.auto,
    dtype: DtypeOption = None,
    timeout: TimeoutOption = HUB_TIMEOUT,
    config: ConfigOption = None,
    quiet: QuietOption = False,
) -> None:
    """Write an initial LoRA adapter: a folder that `PeftModel.from_pretrained` loads."""
    run_command(ctx, "lora")


@app.command(
    epilog="Example: headstart evaluate --model init --tasks arc_easy.jsonl,blimp/anaphor_gender_agreement.jsonl"
)
def evaluate(
    ctx: typer.Context,
    model: Annotated[str, typer.Option("--model", metavar="DIR", help="A checkpoint or adapter: folder or hub id.")],
    tasks: Annotated[
        str, typer.Option("--tasks", metavar="A,B,...", help="Tasks of lm-eval, and JSONL files of questions.")
    ],
    out: Annotated[str | None, typer.Option("--out", metavar="FILE", help="Also write the JSON to this file.")] = None,
    base: Annotated[
        str | None,
        typer.Option("--base", metavar="MODEL", help="The model of an adapter [default: what its config names]."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", metavar="N", help="Only the first N questions of each task.")
    ] = EvaluateConfig.limit,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Requests at once.")] = EvaluateConfig.batch_size,
    seed: SeedOption = 0,
    device: DeviceOption = Device.auto,
    dtype: DtypeOption = None,
    timeout: TimeoutOption = HUB_TIMEOUT,
    config: ConfigOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Score a checkpoint or an adapter with lm-eval, on its tasks or on local files."""
    run_command(ctx, "evaluate")


@app.command("run", epilog="Example: headstart run init/headstart.json --out again")
def run_record(
    record: Annotated[
        str, typer.Argument(metavar="RECORD", help="A headstart.json, its folder, or YAML that names a subcommand.")
    ],
    out: Annotated[str | None, typer.Option("--out", metavar="DIR", help="Write here instead.")] = None,
    plan: PlanOption = False,
    resume: ResumeOption = False,
    timeout: Annotated[
        float | None,
        typer.Option("--timeout", metavar="SECONDS", help="Give up a hub that makes no progress for so long."),
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Repeat the command that a record or a YAML file holds."""
    from headstart.commands import Invocation, run_config

    with session(quiet):
        options, flags = split_flags(read_options(record), str(record))
        config: Any = config_of(options, str(record))
        if out is not None:
            if "out" not in {field.name for field in dataclasses.fields(config)}:
                raise UserError(f"--out {out}: {config.subcommand} writes no output; leave --out out")
            config = dataclasses.replace(config, out=str(out))
        given = {"plan": plan, "resume": resume, "as_json": as_json, "quiet": quiet}
        flags |= {key: value or flags.get(key, False) for key, value in given.items()}
        if timeout is not None:
            flags[TIMEOUT] = timeout
        run_config(config, Invocation(**flags, command=config.to_command()))
