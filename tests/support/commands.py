"""The commands as Python calls with options as keywords, on the CPU. `settings` are words as after `--set`.

`invoke` runs a command line in this process.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import typer
from click.testing import CliRunner, Result

from headstart.cli import app
from headstart.config import AnalyzeConfig, CompareConfig, EvaluateConfig, GenerateConfig, LoraConfig
from headstart.config_values import settings_of

CPU = {"device": "cpu"}


@functools.cache  # building it takes a tenth of a second
def _command() -> click.Command:
    return typer.main.get_command(app)


def invoke(*words: object) -> Result:
    """Runs `headstart` with these words: its exit code and what it prints."""
    return CliRunner().invoke(_command(), [str(word) for word in words])


def generate(
    target: Any,
    method: str,
    out: Any,
    *,
    settings: Sequence[str] = (),
    plan: bool = False,
    quiet: bool = True,
    **more: Any,
) -> Any:
    """A path, or the plan."""
    from headstart.generate.generate import generate

    config = GenerateConfig(target=target, method=method, out=out, set=settings_of(settings), **CPU | more)
    return generate(config, plan=plan, quiet=quiet)


def lora(
    base: Any, method: str, rank: int, out: Any, *, settings: Sequence[str] = (), plan: bool = False, **more: Any
) -> Any:
    """A path, or the plan."""
    from headstart.lora.lora import lora

    more = {"quiet": True, **CPU, **more}
    quiet = more.pop("quiet")
    config = LoraConfig(base=base, method=method, rank=rank, out=out, set=settings_of(settings), **more)
    return lora(config, plan=plan, quiet=quiet)


def compare(*, quiet: bool = True, command: str | None = None, **options: Any) -> dict[str, Any]:
    """The results."""
    from headstart.compare.compare import compare

    return compare(CompareConfig(**CPU | options), quiet=quiet, command=command)


def analyze(out: str | Path, *, quiet: bool = True, **options: Any) -> dict[str, Any]:
    """The analysis."""
    from headstart.analyze.analyze import analyze

    return analyze(AnalyzeConfig(out=out, **CPU | options), quiet=quiet)


def evaluate(model: str | Path, tasks: Any, *, quiet: bool = True, **options: Any) -> dict[str, Any]:
    """The scores."""
    from headstart.evaluate.evaluate import evaluate

    return evaluate(EvaluateConfig(model=model, tasks=tasks, **CPU | options), quiet=quiet)
