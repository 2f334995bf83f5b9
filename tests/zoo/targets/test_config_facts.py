"""What is known of a config stays on disk: the same blueprint, without transformers' modelling code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.architectures import EXPERTS, LISTED, UNLISTED
from tests.support.commands import generate
from tests.support.shaken import CONFIGS, donor
from zoo.errors import UserError
from zoo.targets import config_facts
from zoo.targets.blueprint import Blueprint
from zoo.targets.config_facts import ask, default_folder, kept_in

ALL = {**LISTED, **UNLISTED, **EXPERTS}


def never() -> Any:
    raise AssertionError("the answer is on disk")


@pytest.mark.parametrize("name", ALL)
def test_a_blueprint_from_disk_is_the_one_that_was_built(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with kept_in(tmp_path):
        built = Blueprint.from_config(ALL[name])
        monkeypatch.setattr("zoo.targets.blueprint.meta_model", never)
        again = Blueprint.from_config(ALL[name])
    assert again == built and again.metadata == built.metadata
    assert repr(again) == repr(built)  # tuples are tuples


def test_the_second_command_needs_no_modelling_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["llama"]))
    monkeypatch.setattr("zoo.donors.model_checkpoint._blueprints", {})  # of the tests before
    with kept_in(tmp_path / "cache" / "configs"):
        source = donor(tmp_path / "donor", CONFIGS["llama"]).path
        generate(tmp_path / "config.json", "normal", tmp_path / "first", donor=str(source))
    heavy = "transformers.modeling_utils", "transformers.core_model_loading", "torch.distributed.tensor", "scipy.stats"
    code = f"""
import sys
from headstart.cli import app
app(["generate", "--target", "config.json", "--method", "normal", "--donor", "donor", "--out", "second"],
    standalone_mode=False)
print([name for name in {heavy} if name in sys.modules])
"""
    environment = {**os.environ, config_facts.VARIABLE: str(tmp_path / "cache"), "PYTHONPATH": os.getcwd()}
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert found.stdout.splitlines()[-1] == "[]"
    first, second = ((tmp_path / out / "model.safetensors").read_bytes() for out in ("first", "second"))
    assert first == second


@pytest.mark.parametrize("damage", ["", "{}", '{"answer": {"specs": 1}}', '{"answer": {"specs": [], "ties": {}}}'])
def test_a_damaged_file_is_written_again(tmp_path: Path, damage: str) -> None:
    with kept_in(tmp_path):
        built = Blueprint.from_config(LISTED["llama"])
        (file,) = tmp_path.glob("*.json")
        whole = file.read_bytes()
        file.write_text(damage)
        assert Blueprint.from_config(LISTED["llama"]) == built
    assert file.read_bytes() == whole


def test_an_answer_belongs_to_its_question_config_and_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with kept_in(tmp_path):
        assert ask("a", {"x": 1}, lambda: 1) == 1
        assert ask("a", {"x": 1}, never) == 1
        assert ask("a", {"x": 2}, lambda: 2) == 2
        assert ask("b", {"x": 1}, lambda: 3) == 3
        monkeypatch.setattr(config_facts, "_version", lambda: "another")
        assert ask("a", {"x": 1}, lambda: 4) == 4


def test_errors_are_not_kept_and_old_answers_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config_facts, "MOST_FILES", 3)
    with kept_in(tmp_path):
        with pytest.raises(UserError):
            Blueprint.from_config({"model_type": "no such type"})
        assert not list(tmp_path.iterdir())
        for i in range(5):
            ask("a", {"x": i}, lambda: 0)
            os.utime(max(tmp_path.glob("*.json"), key=lambda p: p.stat().st_mtime_ns), (i, i))
        assert len(list(tmp_path.glob("*.json"))) == 3
        assert ask("a", {"x": 4}, never) == 0


def test_a_folder_that_cannot_be_written_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with kept_in(tmp_path / "file" / "folder"):
        assert ask("a", {}, lambda: 5) == 5
    assert ask("a", {}, lambda: 6) == 6  # outside, nothing is kept


def test_the_environment_chooses_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(config_facts.VARIABLE, "off")
    assert default_folder() is None
    monkeypatch.setenv(config_facts.VARIABLE, str(tmp_path))
    assert default_folder() == tmp_path / "configs"
    monkeypatch.delenv(config_facts.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert default_folder() == tmp_path / "cache" / "headstart" / "configs"
