"""Damaged files from outside: each is accepted, or refused in one line, within the limits, and nothing else happens."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.fuzz.campaign import fuzz
from tests.fuzz.readers import READERS

SECONDS = float(os.environ.get("FUZZ_SECONDS", "0.5"))  # for each reader
SEED = int(os.environ.get("FUZZ_SEED", "0"))

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the worker measures memory through /proc")


@pytest.mark.parametrize("reader", READERS)
def test_damaged_files_are_accepted_or_refused_in_one_line(reader: str, tmp_path: Path) -> None:
    count = fuzz(reader, tmp_path, SEED, SECONDS)
    assert not count.failures, "\n\n".join(map(str, count.failures[:3]))
    assert count.inputs
