"""Values of a command line, a YAML file or a JSON record, converted to the annotated type of an option."""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from zoo.checkpoints.files import parse_json
from zoo.errors import UserError
from zoo.limits import MAX_FILE_NAME, MAX_OPTION, MAX_PATH

CONTROL_CHARACTER = re.compile(r"[\x00-\x1f\x7f-\x9f]")
TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def convert(hint: Any, value: Any, label: str) -> Any:
    """`value` as the type `hint`. `label` names the option in errors.

    A tuple may be a list, or one string with commas. A mapping may be a string that holds a JSON object. Raises
    UserError for a value of another type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return _convert_union(arguments, value, label)
    if origin is tuple:
        items = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
        stripped = [item.strip() if isinstance(item, str) else item for item in items]
        return tuple(convert(arguments[0], item, label) for item in stripped if item != "")
    if origin in (dict, Mapping):
        if isinstance(value, str) and value.lstrip().startswith("{"):
            value = _parse_json(value, label)
        if not isinstance(value, Mapping):
            raise UserError(f"{label} {value}: give a mapping, one KEY: VALUE a line")
        return {str(key): convert(arguments[1], inner, f"{label}.{key}") for key, inner in value.items()}
    return value if hint is Any else _convert_scalar(hint, value, label)


def check_text(label: str, text: str, is_name: bool) -> None:
    """UserError where a text cannot be written to a record, or as a name (of a file, a donor, a method) cannot exist.

    A command line can hold bytes that are not UTF-8, a YAML file any character.
    """
    problem = None
    if any(0xD800 <= ord(c) <= 0xDFFF for c in text):
        problem = "is not UTF-8; give text in UTF-8"
    elif CONTROL_CHARACTER.search(text):
        problem = "holds a control character, such as a line break; leave it out"
    elif len(text) > MAX_OPTION:
        problem = f"is too long; give at most {MAX_OPTION} characters"
    elif is_name and not text.strip():
        problem = "is empty; give a name"
    elif is_name and (len(text) > MAX_PATH or any(len(part.encode()) > MAX_FILE_NAME for part in text.split("/"))):
        problem = f"is too long for a name; give at most {MAX_FILE_NAME} bytes between slashes and {MAX_PATH} in all"
    if problem is not None:
        raise UserError(f"{label} {text[:MAX_FILE_NAME]!r}: {problem}")


def settings_of(assignments: Iterable[str]) -> dict[str, str]:
    """["KEY=VALUE", …] as a mapping. Raises UserError where there is no `=`."""
    pairs = [(text, *text.partition("=")) for text in assignments]
    for text, _, equals, _ in pairs:
        if not equals:
            raise UserError(f"--set {text}: write it as KEY=VALUE")
    return {key: value for _, key, _, value in pairs}


FOR_ALL = "all"  # the name of a text that is given for every donor


def files_by_name(assignments: Iterable[str], for_all: bool = False) -> dict[str, str]:
    """["NAME=FILE", …] of --corpus as a mapping. for_all: whether a file alone stands for every donor.

    Raises UserError where there is no `=`, and for a name given twice."""
    files: dict[str, str] = {}
    for text in assignments:
        check_text("--corpus", text, is_name=True)
        name, equals, file = text.partition("=")
        if for_all and (not equals or Path(text).exists()):
            name, file = FOR_ALL, text
        if not name or not file:
            raise UserError(f"--corpus {text}: write it as NAME=FILE")
        if name in files:
            raise UserError(f"--corpus {text}: the name {name!r} is given twice; give each text a name of its own")
        files[name] = file
    return files


def comma_list(values: Iterable[Any]) -> str:
    """Values as a list option writes them: 0.001,0.003."""
    return ",".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)


def setting_text(value: Any) -> str:
    """A setting as `--set` writes it: true, false and none in lower case."""
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _convert_union(kinds: tuple[Any, ...], value: Any, label: str) -> Any:
    if value is None and type(None) in kinds:
        return None
    known = [kind for kind in kinds if kind is not type(None)]
    has_mapping = any(typing.get_origin(kind) in (dict, Mapping) for kind in known)
    if has_mapping and isinstance(value, str) and value.lstrip().startswith("{"):
        value = _parse_json(value, label)
    matching = [kind for kind in known if isinstance(value, typing.get_origin(kind) or kind)]
    return convert((matching or known)[0], value, label)


def _parse_json(text: str, label: str) -> Any:
    try:
        return parse_json(text, label)
    except UserError as error:
        raise UserError(f"{str(error).partition('; correct')[0]}; give a file or valid JSON") from error


def shown_value(value: Any) -> str:
    """A value in an error. Python writes no whole number of more than 4300 digits."""
    return "a number" if isinstance(value, int) and abs(value) > 10**100 else str(value)


def _convert_scalar(kind: Any, value: Any, label: str) -> Any:
    wrong = UserError(f"{label} {shown_value(value)}: give {TYPE_NAMES.get(kind, kind.__name__)}")
    if kind is bool:
        if isinstance(value, bool):
            return value
        raise wrong
    if value is None or isinstance(value, list | tuple | Mapping) or (isinstance(value, bool) and kind is not str):
        raise wrong
    if kind is int and isinstance(value, float) and not value.is_integer():
        raise wrong
    try:
        return kind(value)
    except (TypeError, ValueError, OverflowError):
        raise wrong from None
