"""Configurations in files: `--config run.yaml`, and the records that `headstart run` repeats."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from headstart.config import CONFIGS, MAPPINGS
from headstart.config_values import check_text, comma_list, files_by_name, settings_of
from headstart.terminal import session
from zoo.checkpoints.files import parse_json, read_bytes, read_text
from zoo.checkpoints.yaml_files import parse_yaml
from zoo.errors import UserError
from zoo.limits import MAX_JSON, MAX_YAML

RECORDS = ("headstart.json", "results.json", "analysis.json", "report.json")  # files with a configuration
FLAGS = {"plan": "plan", "quiet": "quiet", "json": "as_json", "resume": "resume"}  # option -> field of Invocation
TIMEOUT = "timeout"  # an option that is no part of a configuration either: results do not depend on it
FILE_VALUES = "headstart.config_file"  # where a command's context keeps what --config holds


def read_options(path: str | Path) -> dict[str, Any]:
    """The configuration in a file, as a mapping: a YAML or JSON file that is one, or a headstart.json, results.json or
    analysis.json that holds one under `config`. A folder stands for the record in it.

    Raises UserError where there is no such file, or no configuration in it."""
    check_text("file of options", str(path), is_name=True)
    path = Path(path)
    if path.is_dir():
        path = next((path / name for name in RECORDS if (path / name).is_file()), path / RECORDS[0])
    if not path.is_file():
        raise UserError(f"{path}: no such file; give a YAML file, a headstart.json or the folder that holds one")
    content = _parse(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: is not a mapping of options; write one option per line, as KEY: VALUE")
    if "config" not in content and "command" in content:
        raise UserError(
            f"{path}: holds no configuration, as an older headstart wrote it; run its command: {content['command']}"
        )
    found = content.get("config", content)
    if not isinstance(found, dict):
        raise UserError(f"{path}: `config` is not a mapping of options; write one option per line, as KEY: VALUE")
    return found


def split_flags(record: Mapping[str, Any], where: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the options of a configuration, how the command runs: plan, quiet, as_json, resume and timeout) of a record."""
    flags = {FLAGS[key]: value for key, value in record.items() if key in FLAGS}
    for key, value in flags.items():
        if not isinstance(value, bool):
            raise UserError(f"{where}: {key} {value}: give true or false")
    if TIMEOUT in record:
        flags[TIMEOUT] = seconds = record[TIMEOUT]
        if isinstance(seconds, bool) or not isinstance(seconds, int | float):
            raise UserError(f"{where}: {TIMEOUT} {seconds}: give a number of seconds")
    return {key: value for key, value in record.items() if key not in FLAGS and key != TIMEOUT}, flags


def read_config_file(ctx: typer.Context, path: str | None) -> str | None:
    """The callback of --config: the file's values become defaults of the command line."""
    if path is None:
        return None
    with session(quiet=True):
        subcommand = _subcommand(ctx)
        options, flags = split_flags(read_options(path), str(path))
        named = options.get("subcommand", subcommand)
        if named != subcommand:
            raise UserError(f"{path}: is a configuration of `{named}`; run it with `headstart {named} --config {path}`")
        values = CONFIGS[subcommand].converted(options, str(path))
        known = {parameter.name for parameter in ctx.command.params}
        for key in flags:
            if key not in known:
                raise UserError(f"{path}: {subcommand} has no option {key.removeprefix('as_')!r}; leave it out")
    ctx.meta[FILE_VALUES] = values
    defaults = {_parameter(name): _as_typed(name, value) for name, value in values.items() if value is not None}
    ctx.default_map = {**(ctx.default_map or {}), **defaults, **flags}
    return path


def merged_options(ctx: typer.Context, subcommand: str) -> dict[str, Any]:
    """The options of a command by field name: from the command line, else from its --config file, else the default."""
    in_file = ctx.meta.get(FILE_VALUES, {})
    options = {}
    for field in dataclasses.fields(CONFIGS[subcommand]):
        name = _parameter(field.name)
        source = ctx.get_parameter_source(name)
        typed = source is not None and source.name == "COMMANDLINE"
        if field.name in MAPPINGS and field.default_factory is dict:
            options[field.name] = {**in_file.get(field.name, {})}
            if typed and field.name == "set":
                options[field.name] |= settings_of(ctx.params[name] or ())
            elif typed:
                options[field.name] |= files_by_name(ctx.params[name] or (), subcommand.startswith("train "))
        elif field.name in in_file and not typed:
            options[field.name] = in_file[field.name]
        else:
            options[field.name] = ctx.params[name]
    return options


def _subcommand(ctx: typer.Context) -> str:
    names: list[str] = []
    level: Any = ctx
    while level.parent is not None:
        names.insert(0, level.info_name)
        level = level.parent
    return " ".join(names)


def _parameter(field: str) -> str:
    """The parameter of a command function that holds a field."""
    return "settings" if field == "set" else field


def _as_typed(name: str, value: Any) -> Any:
    """A value as the command line writes it. `merged_options` uses the value itself."""
    if name in MAPPINGS and isinstance(value, Mapping):
        return [f"{key}={setting}" for key, setting in value.items()]
    if name == "sources":
        return list(value)
    if isinstance(value, bool):
        return value
    if isinstance(value, tuple):
        return comma_list(value)
    return json.dumps(value) if isinstance(value, dict) else str(value)


def _parse(path: Path) -> Any:
    if path.suffix == ".json":
        return parse_json(read_bytes(path, MAX_JSON), str(path))
    return parse_yaml(read_text(path, MAX_YAML), str(path))
