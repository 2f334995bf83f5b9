"""generate() on small real models: the folder, its contents, and that it loads."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from headstart.config_values import settings_of
from headstart.generate.sampling import build_sampler
from headstart.samplers import get
from tests.support.commands import generate
from tests.support.shaken import CONFIGS, donor, logits
from zoo.add import add
from zoo.checkpoints.checkpoint import Checkpoint
from zoo.errors import UserError

FAMILIES = ["llama", "qwen3", "gemma3_text", "gpt2"]


def config_file(folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    return path


def smaller(name: str) -> dict[str, Any]:
    if name == "gpt2":
        return CONFIGS[name] | {"n_embd": 16, "n_head": 2, "n_layer": 1}
    return CONFIGS[name] | {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}


def wider(name: str) -> dict[str, Any]:
    if name == "gpt2":
        return CONFIGS[name] | {"n_embd": 48, "n_head": 6, "n_layer": 3}
    return CONFIGS[name] | {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_loads_without_missing_or_unexpected(tmp_path: Path, name: str) -> None:
    zoo = donor(tmp_path / "donor", CONFIGS[name])
    jobs: list[tuple[str, dict[str, Any]]] = [
        ("default", CONFIGS[name]), ("normal", wider(name)), ("weight-selection", smaller(name)),
        ("row-column", wider(name)),
    ]  # fmt: skip
    for method, config in jobs:
        target = config_file(tmp_path / "target", config)
        given = {} if method == "default" else {"donor": str(zoo.path)}
        out = generate(target, method, tmp_path / method, **given)
        assert out == tmp_path / method
        assert torch.isfinite(logits(tmp_path / method)).all()  # loads, with nothing missing or unexpected
        kept = json.loads((tmp_path / method / "config.json").read_text())
        assert kept == config | {"dtype": "float32"}


def test_the_folder_says_what_made_it(tmp_path: Path) -> None:
    donor(tmp_path / "donor", CONFIGS["llama"])
    (tmp_path / "donor" / "README.md").write_text("---\nlicense: mit\n---\n")
    add([str(tmp_path / "donor")], tmp_path / "zoo", quiet=True)
    target = config_file(tmp_path / "target", smaller("llama"))
    generate(target, "weight-selection", tmp_path / "out", zoo=tmp_path / "zoo", seed=3, settings=["layers=even"])
    record = json.loads((tmp_path / "out" / "headstart.json").read_text())
    assert set(record) == {
        "method",
        "options",
        "seed",
        "command",
        "versions",
        "reproducible",
        "device",
        "donors",
        "tensors",
        "parameters",
        "next_step",
        "config",
    }
    assert record["method"] == "weight-selection" and record["seed"] == 3 and record["options"]["layers"] == "even"
    assert record["tensors"] == {"sampled": 21, "defaulted": 0}
    assert record["parameters"] == Checkpoint.open(tmp_path / "out").parameters
    (used,) = record["donors"]
    assert set(used) == {"name", "revision", "sha256", "license"} and used["name"] == "donor"
    assert used["license"] == "mit" and re.fullmatch("[0-9a-f]{64}", used["sha256"])
    assert {"headstart", "torch", "transformers"} <= set(record["versions"])
    assert record["reproducible"] == (
        "same bytes on the same machine with the same versions, kind of device and number of threads; "
        "on other machines equal up to rounding errors"
    )
    assert record["command"].startswith("headstart generate --target ")
    card = (tmp_path / "out" / "README.md").read_text()
    from huggingface_hub import ModelCard

    data = ModelCard(card).data
    assert data.license == "mit" and data.library_name == "transformers" and "headstart" in data.tags
    assert "not a trained model" in card and used["sha256"][:16] in card and str(tmp_path) not in card
    assert f"```\n{record['command'].replace(f'{tmp_path}/target/', '').replace(f'{tmp_path}/', '')}\n```" in card
    assert data.pipeline_tag == "text-generation" and data.base_model is None


def test_what_a_donor_lacks_keeps_the_default(tmp_path: Path) -> None:
    zoo = donor(tmp_path / "donor", CONFIGS["mixtral"])
    target = config_file(tmp_path / "target", CONFIGS["mixtral"])
    for method in ("weight-selection", "normal", "default"):
        generate(target, method, tmp_path / method, donor=None if method == "default" else str(zoo.path), seed=1)
    read = {m: Checkpoint.open(tmp_path / m) for m in ("weight-selection", "normal", "default")}
    records = {m: json.loads((tmp_path / m / "headstart.json").read_text())["tensors"]["defaulted"] for m in read}
    router = "model.layers.1.block_sparse_moe.gate.weight"
    assert records["normal"] == 2  # the routers of two layers, which no law describes
    assert torch.equal(read["normal"].read(router), read["default"].read(router))
    assert records["weight-selection"] == 0
    assert torch.equal(read["weight-selection"].read(router), zoo.donors[0].read(router))
    logits(tmp_path / "normal")


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("method", ["default", "normal", "row-column"])
def test_same_seed_same_bytes_and_other_seed_other_bytes(tmp_path: Path, method: str) -> None:
    zoo = donor(tmp_path / "donor", CONFIGS["llama"])
    target = config_file(tmp_path / "target", wider("llama"))
    given = {} if method == "default" else {"donor": str(zoo.path)}
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        generate(target, method, tmp_path / out, seed=seed, **given)
        torch.manual_seed(99)
    assert weights(tmp_path / "a") == weights(tmp_path / "b") != weights(tmp_path / "c")


@pytest.mark.parametrize("size", ["big", "", "1QB", "-3", "1.5.2GB"])
def test_a_size_of_shards_that_cannot_be_read_is_refused(tmp_path: Path, size: str) -> None:
    target = config_file(tmp_path / "target", CONFIGS["llama"])
    with pytest.raises(UserError, match="give one such as 1GB or 500MB"):
        generate(target, "default", tmp_path / "out", max_shard_size=size)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("asked", "stated", "written"), [
    (None, {}, "F32"), (None, {"dtype": "bfloat16"}, "BF16"), (None, {"torch_dtype": "float16"}, "F16"),
    ("bfloat16", {"dtype": "float32"}, "BF16"),
])  # fmt: skip
def test_dtype_is_the_asked_one_or_the_configs(tmp_path: Path, asked: str, stated: dict, written: str) -> None:
    target = config_file(tmp_path / "target", CONFIGS["llama"] | stated)
    generate(target, "default", tmp_path / "out", dtype=asked)
    header = weights(tmp_path / "out")[8:2000].decode(errors="ignore")
    assert f'"dtype":"{written}"' in header
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "torch_dtype" not in config and config["dtype"] in ("float32", "bfloat16", "float16")


def test_a_dtype_that_cannot_be_written_is_refused_with_its_file(tmp_path: Path) -> None:
    target = config_file(tmp_path / "target", CONFIGS["llama"] | {"dtype": "float64"})
    with pytest.raises(UserError) as caught:
        generate(target, "default", tmp_path / "out")
    advice = "give --dtype float32, bfloat16 or float16"
    assert str(caught.value) == f"{target}: dtype 'float64' cannot be written; {advice}"
    generate(target, "default", tmp_path / "out", dtype="float32")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"
    for stated in ("auto", "float8_e4m3fn", "int8"):
        with pytest.raises(
            UserError, match=rf"config.json: dtype is '{stated}', not a dtype of a model; give float32, bfloat16"
        ):
            generate(config_file(tmp_path / "target", CONFIGS["llama"] | {"dtype": stated}), "default", tmp_path / "no")


def save_tokenizer(folder: Path, word: str) -> None:
    from tokenizers import Tokenizer, models

    vocabulary = {f"{word}{i}": i for i in range(60)}
    Tokenizer(models.WordLevel(vocabulary, unk_token=f"{word}0")).save(str(folder / "tokenizer.json"))


def test_the_tokenizer_is_the_given_one_the_targets_or_the_donors(tmp_path: Path) -> None:
    donor(tmp_path / "donor", CONFIGS["llama"])
    save_tokenizer(tmp_path / "donor", "a")
    target = config_file(tmp_path / "target", wider("llama"))
    given = {"donor": str(tmp_path / "donor")}
    generate(target, "row-column", tmp_path / "from-donor", **given)
    (tmp_path / "given").mkdir()
    save_tokenizer(tmp_path / "given", "a")
    (tmp_path / "given" / "tokenizer_config.json").write_text("{}")
    generate(target, "row-column", tmp_path / "from-given", tokenizer=tmp_path / "given", **given)
    save_tokenizer(tmp_path / "target", "a")
    generate(target, "row-column", tmp_path / "from-target", **given)
    for folder in ("from-donor", "from-given", "from-target"):
        assert (tmp_path / folder / "tokenizer.json").read_bytes() == (
            tmp_path / "donor" / "tokenizer.json"
        ).read_bytes()
    assert (tmp_path / "from-given" / "tokenizer_config.json").exists()
    save_tokenizer(tmp_path / "target", "b")
    with pytest.raises(UserError, match="shares no token"):
        generate(target, "row-column", tmp_path / "none", **given)


def test_a_plan_reads_and_writes_nothing(tmp_path: Path) -> None:
    zoo = donor(tmp_path / "donor", CONFIGS["llama"])
    target = config_file(tmp_path / "target", wider("llama"))
    plan = generate(target, "row-column", tmp_path / "out", donor=str(zoo.path), plan=True)
    assert not (tmp_path / "out").exists() and isinstance(plan, dict)
    assert plan["read"]["tensors"] == 21 and plan["download"]["bytes"] == 0
    assert plan["read"]["bytes"] == 4 * zoo.donors[0].parameters
    generate(target, "row-column", tmp_path / "out", donor=str(zoo.path))
    assert plan["write"]["bytes"] == (tmp_path / "out" / "model.safetensors").stat().st_size


def test_the_nearest_donor_that_fits_is_chosen(tmp_path: Path) -> None:
    for seed, sizes in enumerate(({"num_hidden_layers": 6}, {"hidden_size": 64}, {"num_hidden_layers": 3})):
        donor(tmp_path / f"d{seed}", CONFIGS["llama"] | sizes, seed)
    donor(tmp_path / "other", CONFIGS["qwen3"])
    add([str(tmp_path / name) for name in ("d0", "d1", "d2", "other")], tmp_path / "zoo", quiet=True)
    target = config_file(tmp_path / "target", CONFIGS["llama"])
    generate(target, "weight-selection", tmp_path / "out", zoo=tmp_path / "zoo")
    assert json.loads((tmp_path / "out" / "headstart.json").read_text())["donors"][0]["name"] == "d2"
    generate(target, "weight-selection", tmp_path / "asked", zoo=tmp_path / "zoo", donor="d1")
    assert json.loads((tmp_path / "asked" / "headstart.json").read_text())["donors"][0]["name"] == "d1"
    with pytest.raises(UserError, match=r"unknown donor .* 'd9'"):
        generate(target, "weight-selection", tmp_path / "no", zoo=tmp_path / "zoo", donor="d9")


def test_settings_are_parsed_by_the_type_of_the_option() -> None:
    cls = get("row-column")
    sampler = build_sampler(
        cls, {"noise": "0", "depth": "stack", "donor": "none"}, donor="x", model="not a field", device="cpu"
    )
    assert sampler.options() == cls(noise=0.0, depth="stack").options()
    for setting, reason in {
        "nois=1": "did you mean 'noise'",
        "noise=loud": "give row-column a float",
        "noise": "KEY=VALUE",
        "depth=deep": "unknown depth of row-column",
    }.items():
        with pytest.raises(UserError, match=reason):
            build_sampler(cls, settings_of([setting]))


@pytest.mark.parametrize(("arguments", "reason"), [
    ({"method": "row-column"}, "needs a donor"),
    ({"method": "default", "donor": "somewhere"}, "takes no --donor"),
    ({"method": "row-column", "model": "somewhere"}, "takes no --model"),
    ({"method": "row-column", "donor": "no-such-folder"}, "no such folder"),
    ({"method": "row-column", "zoo": "no-such-zoo"}, "is not a zoo"),
    ({"method": "default", "dtype": "float64"}, "^dtype 'float64' cannot be written; give --dtype float32"),
    ({"method": "default", "tokenizer": "nowhere"}, "nowhere: no tokenizer found"),
    ({"method": "diffusion", "model": "no such/pipe"}, "is neither a folder nor a hub id"),
])  # fmt: skip
def test_what_cannot_work_is_refused_before_any_work(tmp_path: Path, arguments: dict, reason: str) -> None:
    target = config_file(tmp_path / "target", CONFIGS["llama"])
    with pytest.raises(UserError, match=reason):
        generate(target, out=tmp_path / "out", **arguments)
    assert [p.name for p in tmp_path.iterdir()] == ["target"]


@pytest.mark.parametrize("plan", [True, False])
def test_a_model_that_the_hub_does_not_give_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plan: bool
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    target = config_file(tmp_path / "target", CONFIGS["llama"])
    with pytest.raises(UserError, match="nosuch/pipe: is not in the local cache") as caught:
        generate(target, "diffusion", tmp_path / "out", model="nosuch/pipe", plan=plan)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("named", ["LlamaModel", "LlamaForSequenceClassification"])
def test_the_config_of_a_headless_model_is_written_as_a_language_model(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, named: str
) -> None:
    target = config_file(tmp_path / "target", CONFIGS["llama"] | {"architectures": [named]})
    with caplog.at_level("INFO"):
        generate(target, "default", tmp_path / "out")
    assert f"{named} predicts no tokens" in caplog.text
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    logits(tmp_path / "out")
    masked = {"model_type": "bert", "architectures": ["BertForMaskedLM"], "hidden_size": 32, "num_hidden_layers": 1,
              "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 60}  # fmt: skip
    generate(masked, "default", tmp_path / "masked")
    assert json.loads((tmp_path / "masked" / "config.json").read_text())["architectures"] == ["BertForMaskedLM"]
    with pytest.raises(UserError, match="is not a language model"):
        generate(masked | {"model_type": "vit", "architectures": ["ViTModel"]}, "default", tmp_path / "vit")


def test_tensors_that_no_method_models_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    projected = CONFIGS["opt"] | {"word_embed_proj_dim": 16}
    with caplog.at_level("INFO"):
        generate(projected, "gpt2", tmp_path / "out")
    assert "3 tensors have an unknown role" in caplog.text and "model.decoder.project_in.weight" in caplog.text


def test_real_donors_into_a_wider_deeper_llama(tmp_path: Path, shared_data: Path) -> None:
    stories = shared_data / "models" / "stories260K"
    config = json.loads((stories / "config.json").read_text()) | {
        "hidden_size": 96, "num_attention_heads": 12, "num_key_value_heads": 6, "intermediate_size": 256,
        "num_hidden_layers": 8,
    }  # fmt: skip
    target = config_file(tmp_path / "target", config)
    generate(target, "weight-selection", tmp_path / "ws", donor=str(stories), settings=["wider=repeat"])
    generate(target, "row-column", tmp_path / "rc", donor=str(stories))
    for out in ("ws", "rc"):
        assert torch.isfinite(logits(tmp_path / out)).all()
        assert (tmp_path / out / "tokenizer.json").exists()
