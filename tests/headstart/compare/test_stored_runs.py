"""The files of finished runs: only what the comparison itself wrote is taken up again."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from headstart.compare.compare import _save_array
from headstart.compare.run_files import read_run, run_path
from headstart.compare.settings import Trial, TrialSettings
from zoo.errors import UserError

TRIAL = Trial("default", 0, 1.0, (1e-3,))
DONOR = {"name": "a", "license": None, "revision": None, "parameters": 10, "loss": 2.5, "tokens": 1000}
INIT: dict[str, Any] = {"seconds": 0.1, "donors": [DONOR], "novelty": None, "novelty_note": None}
RUN: dict[str, Any] = {
    "method": "default", "scale": 1.0, "seed": 0, "lr": 1e-3, "steps": [0, 1, 2], "losses": [5.0, 4.0, 3.0],
    "max_grad_norm": 1.5, "diverged": None, "grad_spikes": 0, "activation_rms": {"start": [1.0], "end": [2.0]},
    "init": INIT,
}  # fmt: skip


@pytest.fixture
def settings(tmp_path: Path) -> TrialSettings:
    (tmp_path / "runs").mkdir()
    return TrialSettings(
        target={}, zoo=None, donor=None, model=None, tokenizer=None, text="", method_options={"default": {}}, steps=2,
        batch_size=1, sequence=1, windows=1, device="cpu", threads=1, tokens="", runs=str(tmp_path / "runs"),
        fingerprint={"tokens": "0", "zoo": None, "model": None},
    )  # fmt: skip


def test_a_run_is_read_as_it_was_written(settings: TrialSettings) -> None:
    run_path(settings, TRIAL, 1e-3).write_text(json.dumps(RUN))
    assert read_run(settings, TRIAL, 1e-3) == RUN
    early = RUN | {"steps": [0], "losses": [5.0], "diverged": 1, "activation_rms": {"start": [1.0], "end": None}}
    run_path(settings, TRIAL, 1e-3).write_text(json.dumps(early))
    assert read_run(settings, TRIAL, 1e-3) == early


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        *(({key: {"a": 0}}, f"{key} is {{'a': 0}}; it must be") for key in RUN if not isinstance(RUN[key], dict)),
        ({"init": {"seconds": "1", "donors": []}}, "init: seconds is '1'"),
        ({"init": {"seconds": 1, "donors": [1]}}, "init: donors is"),
        ({"init": INIT | {"novelty": []}}, r"init: novelty is \[\]; it must be"),
        ({"init": INIT | {"novelty": {"matrices": 1, "of": 1}}}, "init: novelty: distance is missing"),
        ({"init": INIT | {"novelty_note": 1}}, "init: novelty_note is 1"),
        ({"init": {key: INIT[key] for key in INIT if key != "novelty"}}, "init: novelty is missing"),
        ({"init": INIT | {"donors": [DONOR | {"tokens": "1B"}]}}, "init: donors: tokens is '1B'"),
        ({"init": INIT | {"donors": [{"name": "a"}]}}, "init: donors: license is missing"),
        ({"activation_rms": {"start": "x"}}, "activation_rms: start is 'x'"),
        ({"seed": 1}, "is a run of another seed"),
        ({"lr": 2e-3}, "is a run of another lr"),
        ({"steps": [0, 1, 3]}, "was not measured at the steps of this comparison"),
        ({"losses": [1.0]}, "was not measured at the steps"),
        ({"losses": [5.0, 4.0, float("nan")]}, "has a value that is NaN or infinite"),
        ({"max_grad_norm": float("inf")}, "has a value that is NaN or infinite"),
    ],
)
def test_any_other_file_is_refused_in_one_line(change: dict[str, Any], problem: str, settings: TrialSettings) -> None:
    path = run_path(settings, TRIAL, 1e-3)
    path.write_text(json.dumps(RUN | change))
    with pytest.raises(UserError, match=problem) as caught:
        read_run(settings, TRIAL, 1e-3)
    assert "remove it and run the same command again" in str(caught.value)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a file to which nothing can be written")
def test_a_full_disk_is_an_error_of_the_system_for_the_tokens_too(tmp_path: Path) -> None:
    tokens = np.arange(5000, dtype=np.int64)
    _save_array(tmp_path / "tokens.npy", tokens)
    assert np.array_equal(np.load(tmp_path / "tokens.npy"), tokens)
    with pytest.raises(OSError) as caught:
        _save_array(Path("/dev/full"), tokens)
    assert caught.value.errno == errno.ENOSPC
