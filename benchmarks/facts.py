"""The figures of a benchmark as a JSON file, to which an interrupted call adds when it continues."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from zoo.checkpoints.atomic import replace_file


def read_facts(path: Path) -> dict[str, Any]:
    """The figures in a file; {} before anything is measured."""
    return json.loads(path.read_text()) if path.is_file() else {}


def write_facts(path: Path, facts: dict[str, Any], allow_nan: bool = True) -> None:
    """Replaces a file of figures at once. Raises ValueError for a NaN where `allow_nan` is False."""
    replace_file(path, (json.dumps(facts, indent=1, allow_nan=allow_nan) + "\n").encode())
