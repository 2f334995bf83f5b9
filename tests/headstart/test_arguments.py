"""Arguments that no command can take: one line on stderr, exit code 2, nothing written."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from headstart.config import CONFIGS, GenerateConfig, config_of
from headstart.config_values import check_text
from headstart.samplers import check_method
from tests.conftest import make_llama
from tests.support.commands import invoke
from zoo.add import add
from zoo.errors import UserError
from zoo.limits import MAX_MESSAGE

# A working command line of every command. SOURCE and NAME are arguments without an option.
COMMANDS: dict[str, dict[str, str]] = {
    "generate": {"target": "donor", "method": "default", "out": "out", "donor": "donor", "tokenizer": "donor",
                 "zoo": "zoo", "model": "donor"},
    "lora": {"base": "donor", "method": "gaussian", "rank": "2", "out": "out", "reference": "donor",
             "targets": "q_proj"},
    "compare": {"target": "donor", "zoo": "zoo", "methods": "default", "corpus": "text.txt", "out": "out",
                "donor": "donor", "model": "donor", "tokenizer": "donor"},
    "analyze": {"zoo": "zoo", "donor": "donor", "out": "out"},
    "evaluate": {"model": "donor", "tasks": "q.jsonl", "out": "out", "base": "donor"},
    "zoo add": {"SOURCE": "donor", "zoo": "out", "revision": "main", "shard": "0/1"},
    "zoo merge": {"SOURCE": "zoo", "zoo": "out"},
    "zoo train": {"zoo": "out", "preset": "specialists", "corpus": "text=text.txt"},
    "zoo list": {"zoo": "zoo"},
    "zoo verify": {"zoo": "zoo"},
    "train autoencoder": {"zoo": "zoo", "out": "out", "corpus": "text.txt"},
    "train diffusion": {"zoo": "zoo", "autoencoder": "donor", "out": "out", "corpus": "donor=text.txt"},
    "demo": {"out": "out"},
    "methods": {"NAME": "default"},
    "run": {"NAME": "record.json", "out": "out"},
}  # fmt: skip
BAD = {
    "lone surrogate": "a\udcffb", "null": "a\0b", "line break": "a\nb", "escape": "a\x1b[31mb", "empty": "",
    "blank": "  ", "long name": "x" * 300, "long path": "/".join(["y" * 200] * 30), "huge": "z" * 3_000_000,
}  # fmt: skip
SEEDED = [name for name, cls in CONFIGS.items() if hasattr(cls, "seed")]
FILES = ("donor", "zoo", "text.txt", "q.jsonl", "file", "record.json")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    make_llama(folder / "donor", vocab_size=256)
    add([str(folder / "donor")], folder / "zoo", quiet=True)
    (folder / "text.txt").write_text("hello world " * 2000)
    (folder / "q.jsonl").write_text(json.dumps({"sentence_good": "a b", "sentence_bad": "b a"}) + "\n")
    (folder / "file").write_text("x")
    record = {"subcommand": "generate", "target": "donor", "method": "default", "out": "out"}
    (folder / "record.json").write_text(json.dumps({"config": record}))
    return folder


@pytest.fixture(autouse=True)
def at_place(place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(place)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    yield
    assert sorted(os.listdir(place)) == sorted(FILES)  # nothing was written


def words(command: str, options: dict[str, str]) -> list[str]:
    named = [word for key, value in options.items() if key.islower() for word in (f"--{key}", value)]
    return [*command.split(), *(value for key, value in options.items() if key.isupper()), *named]


def refusal(*arguments: str) -> str:
    """The line on stderr of a command that exits with 2."""
    result = invoke(*arguments)
    assert result.exit_code == 2, (result.exit_code, result.output[-2000:], result.exception)
    assert "Traceback" not in result.output and not result.stdout
    lines = [line for line in result.stderr.splitlines() if line.strip() and "%|" not in line]  # no progress bars
    line = lines[-1]
    assert len(line) <= len("headstart: ") + MAX_MESSAGE and line.isprintable()
    assert len(lines) == 1 or lines[0].startswith("Usage:")  # typer's own refusals show the usage first
    return line


@pytest.mark.parametrize(
    ("command", "key"), [(command, key) for command, options in COMMANDS.items() for key in options]
)
def test_a_name_that_cannot_be_is_refused(command: str, key: str) -> None:
    for kind, value in BAD.items():
        line = refusal(*words(command, COMMANDS[command] | {key: value}))
        if key != "rank":  # a number, which typer refuses
            reasons = ["is empty", "too long", "control character", "not UTF-8"]
            if kind in ("empty", "blank"):
                reasons += [
                    "--targets: give",
                    "--methods: give",
                    "--tasks: give",
                    "nothing to add: give",
                    "nothing to merge: give",
                ]
            assert any(reason in line for reason in reasons), (kind, line)


@pytest.mark.parametrize("command", [name for name, options in COMMANDS.items() if "out" in options.values()])
def test_an_output_that_cannot_be_is_refused(command: str) -> None:
    options = COMMANDS[command]
    key = next(key for key, value in options.items() if value == "out")
    alone = {"generate": ("target", "method", "out"), "compare": ("target", "methods", "corpus", "out"),
             "lora": ("base", "method", "rank", "out"), "evaluate": ("model", "tasks", "out"),
             "zoo add": ("SOURCE", "zoo"), "zoo merge": ("SOURCE", "zoo"),
             "zoo train": ("zoo",)}.get(command)  # fmt: skip
    options = {name: value for name, value in options.items() if alone is None or name in alone}
    for out in ("file/x", "file", "/", "/dev/null/x"):
        if (key == "zoo" and out == "/") or (command == "demo" and out == "/"):
            continue
        if command == "evaluate" and out == "file":
            continue  # a results file may be replaced
        line = refusal(*words(command, options | {key: out}))
        if command != "train diffusion":  # which looks at its autoencoder first
            assert out.split("/")[0] in line or out in line


@pytest.mark.parametrize("command", SEEDED)
def test_a_seed_that_torch_does_not_take_is_refused(command: str) -> None:
    for seed in (str(2**64), str(-(2**63) - 1), str(10**400), "9" * 5000, "1.5", "x", "", "nan"):
        assert "seed" in refusal(*words(command, COMMANDS[command]), "--seed", seed)


def test_seeds_at_the_ends_of_the_range_are_taken(tmp_path: Path) -> None:
    for seed in (-(2**63), -1, 2**64 - 1):
        out = tmp_path / str(seed)
        arguments = words("generate", {"target": "donor", "method": "default", "out": str(out), "seed": str(seed)})
        assert invoke(*arguments).exit_code == 0
        assert json.loads((out / "headstart.json").read_text())["seed"] == seed


@pytest.mark.parametrize("setting", ["a\udcff=1", "std=\udcff", "std=a\0b", "std=" + "9" * 200_000, "\n=1", "std"])
def test_a_setting_that_cannot_be_is_refused(setting: str) -> None:
    options = {"target": "donor", "method": "truncated-normal", "out": "out", "set": setting}
    assert "--set" in refusal(*words("generate", options))


@pytest.mark.parametrize("name", [".", "..", ".x", "a..b", "a.", "os.path.", "a b.c", "1.2", "a.1", "-.-"])
def test_a_method_that_names_no_class_is_unknown(name: str) -> None:
    with pytest.raises(UserError, match="unknown method"):
        check_method(name)


def test_a_method_whose_module_fails_is_one_line(place: Path) -> None:
    (place / "broken_module.py").write_text("raise RuntimeError('no\\nway')\n")
    try:
        line = refusal(*words("generate", {"target": "donor", "method": "broken_module.X", "out": "out"}))
    finally:
        (place / "broken_module.py").unlink()
        for cached in (place / "__pycache__").glob("*") if (place / "__pycache__").exists() else ():
            cached.unlink()
        if (place / "__pycache__").exists():
            (place / "__pycache__").rmdir()
    assert "method broken_module.X: cannot be imported (RuntimeError: no" in line


def test_an_empty_name_is_not_the_current_folder() -> None:
    for command, key in (("zoo add", "zoo"), ("zoo list", "zoo"), ("analyze", "out"), ("run", "NAME")):
        assert "is empty; give a name" in refusal(*words(command, COMMANDS[command] | {key: ""}))
    assert "is empty; give a name" in refusal("generate", "--config", "", "--target", "donor")


@pytest.mark.parametrize("value", BAD.values(), ids=list(BAD))
def test_python_and_records_are_checked_as_the_command_line_is(value: str) -> None:
    for make in (GenerateConfig, lambda **options: config_of({"subcommand": "generate", **options})):
        with pytest.raises(UserError) as caught:
            make(target="donor", method="default", out=value)
        assert len(str(caught.value)) <= MAX_MESSAGE and str(caught.value).isprintable()


def test_long_lists_and_unusual_names_are_taken() -> None:
    options: dict[str, Any] = {"target": "donor", "out": "größe/выход 🙂", "set": {"text": "x" * 1000}}
    assert GenerateConfig(method="package.module.Class", **options).out == "größe/выход 🙂"
    check_text("--methods", ",".join(["row-column:noise=0.1"] * 100), is_name=False)
