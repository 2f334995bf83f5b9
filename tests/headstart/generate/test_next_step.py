"""The folder, its card and the terminal say how to train the weights on."""

from __future__ import annotations

import json
from pathlib import Path

from headstart import samplers
from headstart.generate.next_step import next_step, next_step_line
from tests.support.commands import invoke
from tests.support.shaken import CONFIGS


def test_every_method_that_fills_language_models_has_a_rate() -> None:
    for method in samplers.described_methods():
        step = next_step(method["name"])
        if method["family"] == "lora" or method["name"] == "conv-covariance":
            continue
        assert step is not None and step["lowest"] <= step["learning_rate"] <= step["highest"], method["name"]
        assert step["measured"].startswith(f"`{method['name']}` on ")


def test_a_method_of_ones_own_has_none() -> None:
    assert next_step("my_package.my_module.MyMethod") is None


def test_the_folder_the_card_and_the_terminal_say_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["llama"]))
    out = tmp_path / "out"
    words = ["generate", "--target", str(tmp_path / "config.json"), "--method", "default", "--out", str(out)]
    result = invoke(*words)
    assert result.exit_code == 0
    step = json.loads((out / "headstart.json").read_text())["next_step"]
    assert step == next_step("default")
    line = next_step_line(step)
    assert line.startswith("train at a learning rate near 0.002 (the best were 0.0006 to 0.006) with a warm-up over 5%")
    assert result.stderr.splitlines()[-1] == f"next: {line}"
    assert line[1:] in (out / "README.md").read_text()
    quiet = invoke(*words[:-1], tmp_path / "quiet", "--quiet")
    assert quiet.stderr == ""
