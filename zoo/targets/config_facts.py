"""What transformers says about a config, kept on disk: a later command need not import its modelling code to ask again.

Each answer is a small JSON file, named by a hash of the question, the config, the version of transformers and the
source of this package. A damaged file is ignored and written again. `kept_in` switches this on; the command line does.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from zoo.checkpoints.atomic import replace_file
from zoo.checkpoints.files import read_json
from zoo.errors import UserError
from zoo.limits import MAX_JSON

VARIABLE = "HEADSTART_CACHE"  # names another folder; `off` keeps nothing
MOST_FILES = 512  # the oldest of more are removed
_state: dict[str, Path | None] = {}

T = TypeVar("T")


def default_folder() -> Path | None:
    """The folder that the environment names, else the user's cache folder; None where nothing is to be kept."""
    named = os.environ.get(VARIABLE)
    if named == "off":
        return None
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "headstart"
    return (Path(named) if named else base) / "configs"


@contextlib.contextmanager
def kept_in(folder: Path | None) -> Iterator[None]:
    """Inside, answers are read from this folder and written to it; None: neither."""
    before = _state.get("folder")
    _state["folder"] = folder
    try:
        yield
    finally:
        _state["folder"] = before


def ask(
    question: str,
    config: Mapping[str, Any],
    answer: Callable[[], T],
    encode: Callable[[T], Any] = lambda value: value,
    decode: Callable[[Any], T] = lambda value: value,
) -> T:
    """The answer to a question about a config: from the disk, else by calling `answer`.

    encode, decode: between an answer and a JSON value. What `answer` raises is not kept. A disk that cannot be read or
    written changes nothing.
    """
    folder = _state.get("folder")
    if folder is None:
        return answer()
    try:
        key = json.dumps([question, config, _version()], sort_keys=True)
    except TypeError:  # a config with objects that JSON does not have
        return answer()
    path = folder / f"{question}-{hashlib.sha256(key.encode(errors='surrogatepass')).hexdigest()[:32]}.json"
    with contextlib.suppress(UserError, OSError, KeyError, TypeError, ValueError, AttributeError):
        return decode(read_json(path)["answer"])
    found = answer()
    data = json.dumps({"answer": encode(found)}).encode(errors="surrogatepass")
    if len(data) < MAX_JSON:
        with contextlib.suppress(UserError, OSError):
            folder.mkdir(parents=True, exist_ok=True)
            replace_file(path, data)
            _remove_oldest(folder)
    return found


@functools.cache
def _version() -> str:
    """What an answer depends on besides the config."""
    package = Path(__file__).parents[1]
    sources = [package / "tensors.py", *sorted((package / "targets").glob("*.py"))]
    digest = hashlib.sha256(b"\0".join(path.read_bytes() for path in sources)).hexdigest()
    return f"{importlib.metadata.version('transformers')} {importlib.metadata.version('torch')} {digest}"


def _remove_oldest(folder: Path) -> None:
    files = sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime)
    for path in files[: max(0, len(files) - MOST_FILES)]:
        path.unlink(missing_ok=True)
