"""What each command does with its configuration. The command line and `headstart run` call the same functions."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import typer

from headstart.config import (
    AnalyzeConfig,
    CommandConfig,
    CompareConfig,
    DemoConfig,
    EvaluateConfig,
    GenerateConfig,
    LoraConfig,
    MethodsConfig,
    TrainAutoencoderConfig,
    TrainDiffusionConfig,
    ZooAddConfig,
    ZooListConfig,
    ZooMergeConfig,
    ZooTrainConfig,
    ZooVerifyConfig,
)
from headstart.terminal import cell, print_json, print_records, print_table
from zoo.checkpoints.hub import hub_session
from zoo.donors.layout import MANIFEST
from zoo.errors import UserError, unknown
from zoo.limits import HUB_TIMEOUT
from zoo.parallel.processes import this_process, working_alone


@dataclass(frozen=True)
class Invocation:
    """How a command runs, which its result does not depend on."""

    plan: bool = False
    quiet: bool = False
    as_json: bool = False
    resume: bool = False
    timeout: float = HUB_TIMEOUT  # seconds after which a hub that makes no progress is given up
    command: str | None = None  # the command line, for records


def run_config(config: CommandConfig, invocation: Invocation) -> None:
    """Runs the command of a configuration. Raises UserError for what the user can correct.

    Of several processes, the first one prints. Commands that do not share their work run in the first one only.
    """
    shared = config.subcommand in SHARED_COMMANDS
    if not this_process().is_first:
        if not shared:
            return
        invocation = replace(invocation, quiet=True)
    check_early(config)
    with contextlib.ExitStack() as stack:
        if not shared:
            stack.enter_context(working_alone())
        if config.subcommand in HUB_COMMANDS:
            stack.enter_context(hub_session(invocation.timeout))
        COMMANDS[config.subcommand](config, invocation)


def check_early(config: CommandConfig) -> None:
    """Checks names of methods and the folder of the zoo, before the imports that take seconds."""
    from headstart import samplers

    if isinstance(config, GenerateConfig):
        samplers.check_model_method(config.method)
    if isinstance(config, LoraConfig):
        samplers.check_lora_method(config.method)
    if isinstance(config, CompareConfig):
        for label in config.methods:
            samplers.check_compared_method(label.partition(":")[0], adapters=config.base is not None)
    zoo = getattr(config, "zoo", None)
    if (
        zoo is not None
        and not isinstance(config, ZooAddConfig | ZooMergeConfig | ZooTrainConfig)
        and not (Path(zoo) / MANIFEST).is_file()
    ):
        raise UserError(f"{zoo}: is not a zoo (no {MANIFEST}); fill one with `headstart zoo add` or `zoo train`")


def _generate(config: GenerateConfig, invocation: Invocation) -> None:
    from headstart.generate.generate import generate
    from headstart.generate.next_step import next_step, next_step_line

    result = generate(config, plan=invocation.plan, quiet=invocation.quiet, command=invocation.command)
    _print_result(result, invocation)
    if not isinstance(result, dict) and not invocation.quiet and (step := next_step(config.method)) is not None:
        typer.echo(f"next: {next_step_line(step)}", err=True)


def _lora(config: LoraConfig, invocation: Invocation) -> None:
    from headstart.lora.lora import lora

    result = lora(config, plan=invocation.plan, quiet=invocation.quiet, command=invocation.command)
    _print_result(result, invocation)


def _compare(config: CompareConfig, invocation: Invocation) -> None:
    from headstart.compare.compare import compare

    compare(config, quiet=invocation.quiet, command=invocation.command)
    _print_result(Path(config.out) / "report.html", invocation)


def _analyze(config: AnalyzeConfig, invocation: Invocation) -> None:
    from headstart.analyze.analyze import analyze

    analyze(config, quiet=invocation.quiet, command=invocation.command)
    _print_result(Path(config.out) / "report.html", invocation)


def _evaluate(config: EvaluateConfig, invocation: Invocation) -> None:
    from headstart.evaluate.evaluate import evaluate

    results = evaluate(config, quiet=invocation.quiet, command=invocation.command)
    if invocation.as_json:
        print_json(results)
        return
    rows = [
        [task, metric, cell(scores["samples"]), *("-" if v is None else f"{v:.4f}" for v in value.values())]
        for task, scores in results["tasks"].items()
        for metric, value in scores["metrics"].items()
    ]
    print_table(["task", "metric", "n", "mean", "stderr"], rows)


def _demo(config: DemoConfig, invocation: Invocation) -> None:
    from headstart.demo import demo

    demo(config, quiet=invocation.quiet)


def _methods(config: MethodsConfig, invocation: Invocation) -> None:
    from headstart import samplers

    methods = samplers.described_methods()
    if config.name is not None:
        methods = [method for method in methods if method["name"] == config.name]
        if not methods:
            raise unknown("method", config.name, samplers.METHODS)
    if invocation.as_json:
        print_json(methods)
    elif config.name is not None:
        _print_method(methods[0])
    else:
        for family in dict.fromkeys(method["family"] for method in methods):
            rows = [
                [m["name"], ", ".join(m["needs"]) or "-", m["reference"], m["summary"]]
                for m in methods
                if m["family"] == family
            ]
            print_table(["method", "needs", "reference", "what it does"], rows, title=family)
            typer.echo()
        typer.echo("`headstart methods NAME` lists the options of a method.")


def _print_method(method: dict[str, Any]) -> None:
    typer.echo(f"{method['name']} ({method['family']}): {method['summary']}")
    typer.echo(f"reference: {method['reference']}")
    typer.echo(f"needs: {', '.join(method['needs']) or 'nothing'}\n")
    if not method["options"]:
        typer.echo("It has no options.")
        return
    rows = [[o["name"], str(o["default"]), o["help"]] for o in method["options"]]
    print_table(["option", "default", "meaning"], rows, title="Options (--set NAME=VALUE)")


def _zoo_add(config: ZooAddConfig, invocation: Invocation) -> None:
    from zoo.add import add

    shard = _parse_shard(config.shard)
    rows = add(
        list(config.sources),
        config.zoo,
        revision=config.revision,
        plan=invocation.plan,
        shard=shard,
        quiet=invocation.quiet,
        health=not config.no_health,
    )
    columns = ["name", "state", "health", "revision", "license", "tensors", "read", "download", "write"]
    print_records(columns, rows, invocation.as_json)


def _parse_shard(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit()):
        raise UserError(f"--shard {text}: write it as I/N, such as 0/4")
    return int(index), int(count)


def _zoo_merge(config: ZooMergeConfig, invocation: Invocation) -> None:
    from zoo.filling.merge import merge

    rows = merge(config.sources, config.zoo, plan=invocation.plan, quiet=invocation.quiet)
    print_records(
        ["name", "state", "files", "source", "revision", "license", "tensors", "read", "write"],
        rows,
        invocation.as_json,
    )


def _zoo_train(config: ZooTrainConfig, invocation: Invocation) -> None:
    from zoo.training.embedded_zoo import train_zoo

    train_zoo(config.zoo, config.preset, config.seed, quiet=invocation.quiet, corpora=config.corpus)


def _zoo_list(config: ZooListConfig, invocation: Invocation) -> None:
    from zoo.donors.index import list_donors

    columns = ["name", "architecture", "parameters", "tensors", "license", "revision"]
    print_records(columns, list_donors(config.zoo), invocation.as_json)


def _zoo_verify(config: ZooVerifyConfig, invocation: Invocation) -> None:
    from zoo.donors.verify import stray_files, verify
    from zoo.donors.zoo import Zoo

    problems = verify(config.zoo)
    notes = [] if invocation.quiet else stray_files(config.zoo)
    for line in (*notes, *problems):
        typer.echo(line, err=True)
    if problems:
        raise UserError(f"{config.zoo}: {len(problems)} problems, listed above")
    if not invocation.quiet:
        typer.echo(f"{config.zoo}: {len(Zoo.open(config.zoo).donors)} donors are as they were added", err=True)


def _train_autoencoder(config: TrainAutoencoderConfig, invocation: Invocation) -> None:
    from autoencoder.training import AutoencoderTrainConfig, train_autoencoder
    from headstart.devices import torch_device

    train_autoencoder(
        AutoencoderTrainConfig(config.steps, seed=config.seed, corpora=config.corpus, distill=config.distill),
        config.zoo,
        config.out,
        resume=invocation.resume,
        device=torch_device(config.device),
        quiet=invocation.quiet,
        command=config.to_record(),
    )


def _train_diffusion(config: TrainDiffusionConfig, invocation: Invocation) -> None:
    from diffusion.training import DiffusionTrainConfig, train_diffusion
    from headstart.devices import torch_device

    steps = {} if config.steps is None else {"steps": config.steps}
    train_diffusion(
        DiffusionTrainConfig(seed=config.seed, corpora=config.corpus, **steps),
        config.zoo,
        config.autoencoder,
        config.out,
        resume=invocation.resume,
        device=torch_device(config.device),
        quiet=invocation.quiet,
        command=config.to_record(),
    )


def _print_result(result: Path | dict[str, Any], invocation: Invocation) -> None:
    """A plan on stdout, or a note of what was written."""
    if isinstance(result, dict):
        print_json(result)
    elif not invocation.quiet:
        typer.echo(f"wrote {result}", err=True)


COMMANDS: dict[str, Callable[[Any, Invocation], None]] = {
    "generate": _generate,
    "lora": _lora,
    "compare": _compare,
    "analyze": _analyze,
    "evaluate": _evaluate,
    "zoo add": _zoo_add,
    "zoo merge": _zoo_merge,
    "zoo train": _zoo_train,
    "zoo list": _zoo_list,
    "zoo verify": _zoo_verify,
    "train autoencoder": _train_autoencoder,
    "train diffusion": _train_diffusion,
    "demo": _demo,
    "methods": _methods,
}
SHARED_COMMANDS = ("generate", "compare", "analyze", "train autoencoder", "train diffusion")  # by several processes
HUB_COMMANDS = ("generate", "lora", "compare", "analyze", "evaluate", "zoo add")  # that take hub ids: --timeout
