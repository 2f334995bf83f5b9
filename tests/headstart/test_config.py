"""One configuration: from the command line, Python, YAML and a record, with the same result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from autoencoder.training import AutoencoderTrainConfig
from diffusion.config import DiffusionTrainConfig
from headstart import cli
from headstart.commands import COMMANDS
from headstart.config import (
    CONFIGS,
    AnalyzeConfig,
    CommandConfig,
    CompareConfig,
    DemoConfig,
    EvaluateConfig,
    GenerateConfig,
    LoraConfig,
    MethodsConfig,
    TrainAutoencoderConfig,
    TrainDiffusionConfig,
    ZooAddConfig,
    ZooListConfig,
    ZooMergeConfig,
    ZooTrainConfig,
    ZooVerifyConfig,
    config_of,
)
from headstart.config_file import read_options
from headstart.generate.generate import generate
from tests.headstart.test_cli import headstart
from tests.support.commands import invoke
from tests.support.shaken import CONFIGS as MODELS
from zoo.errors import UserError

EXAMPLES: list[CommandConfig] = [
    GenerateConfig(target="config.json", method="default", out="out", set={"scale": 2.0}, seed=3, dtype="bfloat16"),
    GenerateConfig(target={"model_type": "llama", "rope": {"theta": 1e4}}, method="normal", out=Path("out"), zoo="zoo"),
    LoraConfig(base="base", method="pissa", rank=4, out="out", alpha=2.5, targets=("q_proj", "v_proj")),
    CompareConfig(target="c", methods=("default", "normal:rescale=none"), corpus="t", out="o", lrs=(1e-3,), steps=5),
    AnalyzeConfig(out="out", zoo="zoo", ranks=(4, 8)),
    EvaluateConfig(model="model", tasks=("a.jsonl", "b"), limit=3),
    ZooAddConfig(sources=("org/name@main", "folder"), zoo="zoo", shard="1/4"),
    ZooMergeConfig(sources=("one", "two"), zoo="zoo"),
    ZooTrainConfig(zoo="zoo", preset="specialists", corpus={"plays": "plays.txt", "tales": "a=b"}),
    ZooListConfig(zoo="zoo"),
    ZooVerifyConfig(zoo="zoo"),
    TrainAutoencoderConfig(zoo="zoo", out="out", steps=4, device="cpu", corpus={"all": "t.txt", "plays": "p.txt"}),
    TrainDiffusionConfig(zoo="zoo", autoencoder="a", out="out", corpus={"plays": "a=b"}),
    DemoConfig(quick=True),
    MethodsConfig(name="normal"),
]


def test_every_command_has_a_configuration_and_a_function() -> None:
    assert set(CONFIGS) == set(COMMANDS) == {type(example).subcommand for example in EXAMPLES}


@pytest.mark.parametrize("config", EXAMPLES, ids=lambda c: c.subcommand)
def test_a_configuration_survives_json_and_yaml(config: CommandConfig) -> None:
    record = config.to_record()
    assert record["subcommand"] == config.subcommand
    assert config_of(json.loads(json.dumps(record))) == config
    assert config_of(yaml.safe_load(yaml.safe_dump(record))) == config


@pytest.mark.parametrize("config", EXAMPLES, ids=lambda c: c.subcommand)
def test_the_command_line_of_a_configuration_makes_it_again(
    config: CommandConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Both as words and through --config."""
    import shlex

    seen: list[CommandConfig] = []
    monkeypatch.setattr("headstart.commands.run_config", lambda config, invocation: seen.append(config))
    if not isinstance(getattr(config, "target", None), dict):
        assert invoke(*shlex.split(config.to_command())[1:]).exit_code == 0
        assert seen.pop() == config
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config.to_record()))
    done = invoke(*config.subcommand.split(), "--config", path)
    assert done.exit_code == 0, done.output
    assert seen.pop() == config
    assert invoke("run", path).exit_code == 0
    assert seen.pop() == config


def test_four_ways_to_generate_give_the_same_bytes(tmp_path: Path) -> None:
    target = tmp_path / "config.json"
    target.write_text(json.dumps(MODELS["llama"]))
    options: dict[str, Any] = {"target": str(target), "method": "default", "seed": 5, "set": {"scale": 2.0}}
    generate(GenerateConfig(**options, out=tmp_path / "python", device="cpu"), quiet=True)
    line = ["--target", target, "--method", "default", "--seed", "5", "--set", "scale=2.0", "--device", "cpu"]
    assert headstart("generate", *line, "--out", tmp_path / "line").returncode == 0
    run = tmp_path / "run.yaml"
    run.write_text(yaml.safe_dump(options | {"device": "cpu", "out": str(tmp_path / "yaml")}))
    assert headstart("generate", "--config", run).returncode == 0
    run.write_text(yaml.safe_dump(options | {"subcommand": "generate", "seed": 6, "device": "cuda"}))
    over = ["--out", tmp_path / "over", "--seed", "5", "--device", "cpu", "--quiet"]
    assert headstart("generate", "--config", run, *over).returncode == 0
    assert headstart("run", tmp_path / "line" / "headstart.json", "--out", tmp_path / "again").returncode == 0
    assert headstart("run", tmp_path / "again", "--out", tmp_path / "folder").returncode == 0
    folders = [tmp_path / name for name in ("python", "line", "yaml", "over", "again", "folder")]
    for name in ("model.safetensors", "config.json"):
        assert len({(folder / name).read_bytes() for folder in folders}) == 1
    records = [json.loads((folder / "headstart.json").read_text()) for folder in folders]
    assert len({json.dumps(record["config"] | {"out": ""}) for record in records}) == 1
    assert all(record["options"] == {"scale": 2.0} for record in records)


@pytest.mark.parametrize(("text", "reason"), [
    ("subcommand: compare", "is a configuration of `compare`"),
    ("sed: 3", "unknown option of generate in run.yaml 'sed': did you mean 'seed'?"),
    ("seed: many", "run.yaml: seed many: give a whole number"),
    ("seed: [1, 2]", "run.yaml: seed [1, 2]: give a whole number"),
    ("set: scale", "run.yaml: set scale: give a mapping"),
    ("quiet: perhaps", "run.yaml: quiet perhaps: give true or false"),
    ("timeout: soon", "run.yaml: timeout soon: give a number of seconds"),
    ("timeout: -1", "--timeout -1: give a number of seconds above 0"),
    ("resume: true", "run.yaml: generate has no option 'resume'"),
    ("- seed", "is not a mapping of options"),
    ("device: tpu", "unknown device 'tpu'"),
    ("a: [", "is neither YAML nor JSON"),
    ("seed: 2001-01-01", "run.yaml: seed 2001-01-01: give a whole number"),
    ("set: &a {b: *a}", "the alias 'a' stands for nothing that comes before it"),
])  # fmt: skip
def test_a_wrong_file_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, reason: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(text)
    done = headstart("generate", "--target", "t", "--method", "default", "--out", "o", "--config", "run.yaml")
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("headstart: ") and reason in done.stderr


@pytest.mark.parametrize("subcommand", [{"a": 1}, ["generate"], 3])
def test_a_command_of_another_type_is_refused(subcommand: object) -> None:
    with pytest.raises(UserError, match="unknown subcommand in config"):
        config_of({"subcommand": subcommand})


def test_run_refuses_what_it_cannot_repeat(tmp_path: Path) -> None:
    old = tmp_path / "headstart.json"
    old.write_text(json.dumps({"method": "default", "command": "headstart generate --seed 3", "versions": {}}))
    with pytest.raises(UserError, match=r"holds no configuration, .* run its command: headstart generate --seed 3"):
        read_options(tmp_path)
    missing = headstart("run", tmp_path / "nowhere.yaml")
    assert missing.returncode == 2 and "no such file" in missing.stderr and missing.stderr.count("\n") == 1
    nameless = tmp_path / "run.yaml"
    nameless.write_text("seed: 3")
    assert "names no command" in headstart("run", nameless).stderr
    nameless.write_text("subcommand: generate\nseed: 3")
    assert "generate needs the option 'target'" in headstart("run", nameless).stderr
    nameless.write_text("subcommand: zoo list\nzoo: z")
    assert "zoo list writes no output" in headstart("run", nameless, "--out", "o").stderr


@pytest.mark.parametrize(("make", "reason"), [
    (lambda: LoraConfig(base="b", method="m", rank=0, out="o"), "--rank 0: give at least 1"),
    (lambda: LoraConfig(base="b", method="m", rank=4.5, out="o"), "--rank 4.5: give a whole number"),  # type: ignore[arg-type]
    (lambda: GenerateConfig(target="t", method="m", out="o", dtype="int8"), "dtype 'int8' cannot be written; give"),
    (lambda: AnalyzeConfig(out="o"), "nothing to analyze"),
    (lambda: CompareConfig(target="t", methods=("m",), corpus="c", out="o", seeds=(1, 1)), "--seeds 1,1: give"),
])  # fmt: skip
def test_python_is_checked_as_the_command_line_is(make: Any, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        make()


def test_help_names_the_default_steps_of_the_trainings() -> None:
    assert AutoencoderTrainConfig().with_steps(1).steps == cli.AUTOENCODER_STEPS
    assert AutoencoderTrainConfig().with_steps(3).steps == cli.AUTOENCODER_STEPS + 2 * cli.TEXT_STEPS
    assert AutoencoderTrainConfig(steps=7).with_steps(3).steps == 7
    assert DiffusionTrainConfig().steps == cli.DIFFUSION_STEPS


def test_a_text_to_train_on_may_have_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from headstart.config_values import files_by_name

    monkeypatch.chdir(tmp_path)
    Path("a=b.txt").write_text("a file whose name has an equals sign")
    assert files_by_name(["text.txt", "plays=p.txt"], for_all=True) == {"all": "text.txt", "plays": "p.txt"}
    assert files_by_name(["a=b.txt"], for_all=True) == {"all": "a=b.txt"}
    assert files_by_name(["a=b.txt"]) == {"a": "b.txt"}
    for texts, for_all in ((["one.txt", "two.txt"], True), (["a=one", "a=two"], False)):
        with pytest.raises(UserError, match="twice"):
            files_by_name(texts, for_all)
    for text, for_all in (("text.txt", False), ("=text.txt", True), ("plays=", True)):
        with pytest.raises(UserError, match="write it as NAME=FILE"):
            files_by_name([text], for_all)


def test_the_commands_of_training_pass_their_texts_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from autoencoder import training as autoencoder_training
    from diffusion import training as diffusion_training

    seen: list[tuple[Any, dict[str, Any]]] = []
    for module, name in ((autoencoder_training, "train_autoencoder"), (diffusion_training, "train_diffusion")):
        monkeypatch.setattr(module, name, lambda config, *_, **options: seen.append((config, options)))
    (tmp_path / "manifest.parquet").write_text("")
    shared = [
        "--zoo",
        str(tmp_path),
        "--out",
        "out",
        "--corpus",
        "text.txt",
        "--corpus",
        "plays=p.txt",
        "--device",
        "cpu",
    ]
    for command in (["train", "autoencoder"], ["train", "diffusion", "--autoencoder", "a"]):
        done = invoke(*command, *shared)
        assert done.exit_code == 0, done.output
        config, options = seen[-1]
        assert config.corpora == {"all": "text.txt", "plays": "p.txt"} and options["device"] == "cpu"
        assert options["command"]["corpus"] == {"all": "text.txt", "plays": "p.txt"}
