"""The sizes that keep the code readable: functions, folders and pages."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CODE = ("zoo", "autoencoder", "diffusion", "baselines", "headstart", "benchmarks", "examples", "tests")
MAX_LINES = 60
MAX_PARAMETERS = 8
MAX_FILES = 14  # Python files in one folder of the packages
MAX_PAGE = {"README.md": 120, "BENCHMARKS.md": 150}  # lines
MAX_WIDTH = 100  # characters of a line of these pages


def functions(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    nodes = ast.walk(ast.parse(path.read_text()))
    return [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """How many a caller can give; `self` and `cls` are none."""
    given = function.args
    named = [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs) if a.arg not in ("self", "cls")]
    return len(named) + (given.vararg is not None) + (given.kwarg is not None)


def free_of_the_parameter_limit(path: Path, function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Constructors, the command functions of the command line, and the published peers."""
    inside = path.relative_to(ROOT)
    return (
        function.name == "__init__" or inside == Path("headstart/cli.py") or inside.parts[:2] == ("benchmarks", "peers")
    )


@pytest.mark.parametrize("folder", CODE)
def test_functions_are_short_and_take_few_parameters(folder: str) -> None:
    wrong = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        for function in functions(path):
            where = f"{path.relative_to(ROOT)}:{function.lineno} {function.name}"
            assert function.end_lineno is not None
            if (lines := function.end_lineno - function.lineno + 1) > MAX_LINES:
                wrong.append(f"{where} has {lines} lines")
            if not free_of_the_parameter_limit(path, function) and (count := parameters(function)) > MAX_PARAMETERS:
                wrong.append(f"{where} has {count} parameters")
    assert not wrong, "\n".join(wrong)


def test_folders_hold_about_a_dozen_files() -> None:
    folders = {path.parent for name in CODE[:-1] for path in (ROOT / name).rglob("*.py")}
    counts = {folder: len([p for p in folder.glob("*.py") if p.name != "__init__.py"]) for folder in folders}
    assert not {str(folder.relative_to(ROOT)): n for folder, n in counts.items() if n > MAX_FILES}


@pytest.mark.parametrize("page", MAX_PAGE)
def test_pages_are_short(page: str) -> None:
    lines = (ROOT / page).read_text().splitlines()
    assert len(lines) <= MAX_PAGE[page]
    assert [line for line in lines if len(line) > MAX_WIDTH] == []
