"""What the commands share with the terminal: notes on stderr, errors turned into exit codes, lists, tables, JSON."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shlex
import sys
import traceback
from collections.abc import Iterator
from enum import StrEnum
from typing import Any

import typer

from zoo.errors import UserError


class Device(StrEnum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Dtype(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


@contextlib.contextmanager
def session(quiet: bool, again: str = "the same command again") -> Iterator[None]:
    """What every command shares: notes on stderr, and errors turned into exit codes. `again`: what continues it."""
    # Threads that wait by spinning make a step ten times as slow where one core is busy with something else; where
    # none is, sleeping costs three per cent. Read when torch is loaded, which the commands do after this.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    notes(quiet)
    try:
        yield
        sys.stdout.flush()
    except UserError as error:
        typer.echo(f"headstart: {error}", err=True)
        raise typer.Exit(2) from error
    except KeyboardInterrupt as error:
        typer.echo(f"headstart: interrupted; run {again} to continue", err=True)
        raise typer.Exit(130) from error
    except BrokenPipeError as error:  # `| head` has seen enough; nothing is left to be flushed at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(0) from error
    except typer.Exit:
        raise
    except Exception as error:
        traceback.print_exc()
        raise typer.Exit(1) from error


def notes(quiet: bool) -> None:
    """Our own loggers speak to stderr; the libraries' chatter stays off."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    for name in ("zoo", "autoencoder", "diffusion", "baselines", "headstart"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(logging.WARNING if quiet else logging.INFO)


def torch_device(device: Device) -> str:
    """`auto` -> cuda where there is one."""
    import torch

    if device is Device.cuda and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device here; use cpu or auto")
    if device is Device.auto:
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device.value


def shard_of(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit()):
        raise UserError(f"--shard {text}: write it as I/N, such as 0/4")
    return int(index), int(count)


def words(option: str, text: str, kind: type) -> list[Any]:
    """A list written with commas."""
    try:
        return [kind(word.strip()) for word in text.split(",") if word.strip()]
    except ValueError:
        raise UserError(f"--{option} {text}: not a list of {kind.__name__}s with commas") from None


def command_line() -> str:
    return shlex.join(["headstart", *sys.argv[1:]])


def print_json(value: object) -> None:
    typer.echo(json.dumps(value, indent=2))


def print_rows(columns: list[str], rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        print_json(rows)
    else:
        print_table(columns, [[cell(row[column]) for column in columns] for row in rows])


def cell(value: object) -> str:
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else str(value)[:48]


def print_table(header: list[str], rows: list[list[str]]) -> None:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, ["-" * w for w in widths], *rows]:
        typer.echo("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip())
