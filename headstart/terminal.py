"""What the commands share with the terminal: errors as exit codes, notes on stderr, tables and JSON on stdout."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

import typer

from zoo.errors import UserError
from zoo.parallel.processes import AnotherProcessFailed, this_process
from zoo.targets.config_facts import default_folder, kept_in


@contextlib.contextmanager
def session(quiet: bool, to_continue: str = "the same command again") -> Iterator[None]:
    """Sends notes to stderr and turns errors into exit codes: 2 for what the user can correct, 1 for our own faults,
    130 for an interruption (Ctrl-C, SIGTERM, a closed terminal), after which `to_continue` says what to run. Of several
    processes that share work, one prints the message."""
    # Waiting threads that spin make a step ten times as slow on a busy core. Sleeping costs three per cent on an idle
    # one. torch reads this when it is imported, which the commands do later.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        send_notes_to_stderr(quiet or not this_process().is_first)
        with _interrupted_by_termination(), kept_in(default_folder()):
            yield
            sys.stdout.flush()
    except UserError as error:
        raise _end_with(str(error), 2) from error
    except KeyboardInterrupt as error:
        raise _end_with(f"interrupted; run {to_continue} to continue", this_process().failure_code(130)) from error
    except AnotherProcessFailed as error:
        raise typer.Exit(error.exit_code) from error
    except BrokenPipeError as error:  # as after `| head`; nothing must be flushed at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(0) from error
    except PermissionError as error:
        where = error.filename if isinstance(error.filename, str) else "a file"
        refusal = UserError(f"{where}: permission denied; check its permissions and those of the folders above it")
        raise _end_with(str(refusal), 2) from error
    except typer.Exit:
        raise
    except Exception as error:
        traceback.print_exc()
        with contextlib.suppress(UserError):
            this_process().claim_message()
        raise typer.Exit(1) from error
    finally:
        with contextlib.suppress(UserError):
            this_process().leave()


def _end_with(message: str, code: int) -> typer.Exit:
    """Prints a message, unless another process has ended with one, and returns the exit."""
    with contextlib.suppress(UserError):
        if not this_process().claim_message():
            return typer.Exit(code)
    typer.echo(f"headstart: {message}", err=True)
    return typer.Exit(code)


@contextlib.contextmanager
def _interrupted_by_termination() -> Iterator[None]:
    """Inside, SIGTERM and SIGHUP interrupt as Ctrl-C does, so that temporary files are removed. A second one changes
    nothing: the removal goes on. A signal that is ignored, as under nohup, stays ignored."""

    def interrupt(number: int, frame: object) -> None:
        signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]  # Windows: only one
    if threading.current_thread() is not threading.main_thread():
        numbers = []
    earlier = {number: signal.getsignal(number) for number in numbers}
    try:
        for number, handler in earlier.items():
            if handler == signal.SIG_DFL:
                signal.signal(number, interrupt)
        yield
    finally:
        for number, handler in earlier.items():
            if handler == signal.SIG_DFL:
                signal.signal(number, handler)


def send_notes_to_stderr(quiet: bool) -> None:
    """Shows the messages of our own loggers on stderr, and silences those of the libraries."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    for name in ("zoo", "autoencoder", "diffusion", "baselines", "headstart"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(logging.WARNING if quiet else logging.INFO)


def print_json(value: object) -> None:
    typer.echo(json.dumps(value, indent=2))


def print_records(columns: Sequence[str], records: Sequence[dict[str, Any]], as_json: bool) -> None:
    """Records as JSON, or their `columns` as a table."""
    if as_json:
        print_json(records)
    else:
        print_table(columns, [[cell(record[column]) for column in columns] for record in records])


def cell(value: object) -> str:
    """A value as a cell of a table: - for None, thousands separated by commas."""
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None) -> None:
    """A table on stdout. On a terminal long cells are wrapped to its width; elsewhere a row is one line."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(
        box=None, pad_edge=False, padding=(0, 2, 0, 0), title=title, title_justify="left", header_style="bold"
    )
    for column in header:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(value) for value in row))
    width = None if sys.stdout.isatty() else 10_000
    console = Console(file=sys.stdout, width=width, soft_wrap=False)
    with console.capture() as captured:
        console.print(table)
    typer.echo("\n".join(line.rstrip() for line in captured.get().splitlines()))
