"""GGUF files become donors with the values, the config and the tokenizer that transformers loads from them."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.commands import generate
from tests.support.gguf_files import HEAD, MODELS, TinyModel, write_gguf
from zoo.add import add
from zoo.donors.donor import provenance
from zoo.donors.manifest import GGUF_COLUMN, read_manifest
from zoo.donors.verify import stray_files, verify
from zoo.donors.zoo import Zoo
from zoo.errors import UserError
from zoo.gguf.model import GgufModel, describe_types

TEXTS = ["the king and the hen", "  in a  den\n\twing 12", "é <|user|>the</s>", ""]


def convert(file: Path) -> Path:
    """The folder of the donor that a file becomes, in a zoo beside it."""
    zoo = file.parent / "zoo"
    return zoo / "models" / add([str(file)], zoo, quiet=True)[0]["name"]


def assert_equal_to_transformers(file: Path, donor: Path) -> tuple[Any, Any]:
    """Every tensor of the donor is, bit for bit, the one that transformers loads from the file; encodings are equal."""
    logging.disable(logging.WARNING)
    theirs = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.bfloat16)
    ours = AutoModelForCausalLM.from_pretrained(donor)
    logging.disable(logging.NOTSET)
    expected, found = theirs.state_dict(), ours.state_dict()
    assert ours.dtype == torch.bfloat16 and expected.keys() == found.keys()
    different = [n for n in expected if not torch.equal(expected[n].view(torch.int16), found[n].view(torch.int16))]
    assert not different
    own = AutoTokenizer.from_pretrained(donor)
    other = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    for text in TEXTS:
        assert own(text)["input_ids"] == other(text)["input_ids"]
    assert own.get_vocab() == other.get_vocab() and own.chat_template == other.chat_template
    return theirs, ours


@pytest.mark.parametrize("name", MODELS)
def test_every_layout_equals_what_transformers_loads(tmp_path: Path, name: str) -> None:
    file = write_gguf(tmp_path / f"{name}.gguf", name)
    theirs, ours = assert_equal_to_transformers(file, convert(file))
    stored = json.loads((tmp_path / "zoo" / "models" / name / "config.json").read_text())
    assert stored["dtype"] == "bfloat16" and stored["tie_word_embeddings"] == (
        "output.weight" not in MODELS[name].shapes
    )
    keys = ("hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings", "vocab_size")
    assert [getattr(ours.config, key) for key in keys] == [getattr(theirs.config, key) for key in keys]
    assert (ours.config.bos_token_id, ours.config.eos_token_id, ours.config.pad_token_id) == (1, 2, 2)
    assert ours.generation_config.eos_token_id == 2


def test_what_transformers_forgets_is_in_the_config(tmp_path: Path) -> None:
    """Attention scale and windows of Gemma, which llama.cpp knows and transformers' defaults contradict."""
    pattern = {"attention.sliding_window_pattern": [True, False], "rope.scaling.type": "linear"}
    model = MODELS["gemma3"]
    model = TinyModel("gemma3", {**model.numbers, **pattern, "rope.scaling.factor": 8.0}, model.shapes, "llama")
    config = GgufModel.open([write_gguf(tmp_path / "a.gguf", model)]).blueprint.config
    assert config is not None and config["query_pre_attn_scalar"] == HEAD and config["sliding_window"] == 64
    assert config["layer_types"] == ["sliding_attention", "full_attention"]
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 8.0} and config["rms_norm_eps"] == 1e-6
    two = GgufModel.open([write_gguf(tmp_path / "b.gguf", "gemma2")]).blueprint.config
    assert two is not None and (two["attn_logit_softcapping"], two["final_logit_softcapping"]) == (50.0, 30.0)
    mistral = GgufModel.open([write_gguf(tmp_path / "c.gguf", "mistral")]).blueprint.config
    assert mistral is not None and (mistral["model_type"], mistral["sliding_window"]) == ("mistral", None)


def test_scalings_of_the_rotary_embedding_are_rebuilt_from_their_factors(tmp_path: Path) -> None:
    """Llama 3 and Phi-3 store factors of frequencies as tensors; the model of the rebuilt config has the same ones."""
    import gguf
    import numpy as np
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {
        "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    real = LlamaConfig(hidden_size=256, num_attention_heads=4, rope_parameters={**scaling, "rope_theta": 50000.0})
    frequencies = 50000.0 ** -(torch.arange(0, HEAD, 2) / HEAD)
    factors = (frequencies / ROPE_INIT_FUNCTIONS["llama3"](real, torch.device("cpu"))[0]).numpy().astype(np.float32)

    def with_tensors(path: Path, name: str, tensors: dict[str, Any], numbers: dict[str, Any]) -> GgufModel:
        model = MODELS[name]
        original = gguf.GGUFWriter.write_header_to_file

        def write(self: Any, *arguments: Any) -> None:
            for tensor, values in tensors.items():
                self.add_tensor(tensor, values)
            original(self, *arguments)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gguf.GGUFWriter, "write_header_to_file", write)
            write_gguf(path, TinyModel(model.architecture, {**model.numbers, **numbers}, model.shapes, model.tokenizer))
        return GgufModel.open([path])

    llama = with_tensors(tmp_path / "a.gguf", "llama", {"rope_freqs.weight": factors}, {})
    assert llama.blueprint.config is not None and llama.blueprint.config["rope_scaling"] == scaling
    assert not llama.notes
    other = with_tensors(tmp_path / "b.gguf", "llama", {"rope_freqs.weight": factors[::-1].copy()}, {})
    assert other.blueprint.config is not None and "rope_scaling" not in other.blueprint.config
    assert other.notes == ("its scaling of the rotary embedding (rope_freqs.weight) is not in its config",)
    long = {f"rope_factors_{kind}.weight": factors * n for n, kind in enumerate(("short", "long"), 1)}
    phi = with_tensors(tmp_path / "c.gguf", "phi3", long, {"rope.scaling.original_context_length": 64})
    assert phi.blueprint.config is not None and phi.blueprint.config["original_max_position_embeddings"] == 64
    found = phi.blueprint.config["rope_scaling"]
    assert found["rope_type"] == "longrope" and np.float32(found["long_factor"]).tolist() == (factors * 2).tolist()


def test_what_was_dequantised_is_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metadata = {
        "general.license": "apache-2.0", "general.base_model.count": 1, "general.base_model.0.name": "Tiny",
        "general.base_model.0.repo_url": "https://huggingface.co/org/tiny",
    }  # fmt: skip
    file = write_gguf(tmp_path / "tiny-Q4.gguf", "llama", metadata=metadata)
    zoo = tmp_path / "zoo"
    row = add([str(file)], zoo)[0]
    types = GgufModel.open([file]).types
    text = next(line for line in capsys.readouterr().err.splitlines() if "of a GGUF file" in line)
    assert text.startswith("tiny-Q4: 5 tensors in F32, ") and text.endswith("of a GGUF file, stored as bfloat16")
    assert (row["state"], row["license"], row["tensors"]) == ("added", "apache-2.0", len(types))
    donor = Zoo.open(zoo).donor("tiny-Q4")
    record = provenance(donor)
    assert record["quantisation"] == text.partition(": ")[2] and record["license"] == "apache-2.0"
    assert record["base_models"] == ["https://huggingface.co/org/tiny"]
    rows = read_manifest(zoo).to_pylist()
    assert {r["tensor"]: r[GGUF_COLUMN] for r in rows} == types and {r["dtype"] for r in rows} == {"bfloat16"}
    stored = json.loads((zoo / "models" / "tiny-Q4" / "donor.json").read_text())
    assert stored["gguf"]["types"] == types and row["write"] == sum(f["size"] for f in stored["files"].values())
    assert not donor.quantisation.weights and verify(zoo) == [] and stray_files(zoo) == []


def test_a_zoo_may_hold_donors_of_both_kinds(tmp_path: Path, tiny_llama: Any) -> None:
    file, folder = write_gguf(tmp_path / "b.gguf", "llama"), tiny_llama(tmp_path / "a")
    add([str(folder)], tmp_path / "zoo", quiet=True)
    assert GGUF_COLUMN not in read_manifest(tmp_path / "zoo").column_names
    add([str(file)], tmp_path / "zoo", quiet=True)
    rows = read_manifest(tmp_path / "zoo").to_pylist()
    assert {r["model"]: r[GGUF_COLUMN] is None for r in rows} == {"a": True, "b": False}
    assert verify(tmp_path / "zoo") == []


def test_adding_again_changes_nothing_and_lost_files_come_back(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "a.gguf")
    home = convert(file)
    before = {p.name: p.read_bytes() for p in home.iterdir()}
    plan = add([str(file)], tmp_path / "zoo", plan=True)[0]
    assert (plan["state"], plan["read"], plan["write"]) == ("present", 0, 0)
    assert add([str(file)], tmp_path / "zoo", quiet=True)[0]["state"] == "present"
    (home / "model.safetensors").unlink()
    assert add([str(file)], tmp_path / "zoo", quiet=True)[0]["state"] == "present"
    assert before == {p.name: p.read_bytes() for p in home.iterdir()}
    assert [p.name for p in home.parent.iterdir() if p.is_dir()] == ["a"]


def test_a_plan_writes_nothing(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "a.gguf")
    plan = add([str(file)], tmp_path / "zoo", plan=True)[0]
    assert (plan["name"], plan["state"], plan["read"]) == ("a", "new", file.stat().st_size)
    assert not (tmp_path / "zoo").exists()
    done = add([str(file)], tmp_path / "zoo", quiet=True)[0]
    assert plan["write"] == (tmp_path / "zoo" / "models" / "a" / "model.safetensors").stat().st_size
    assert plan["tensors"] == done["tensors"]


def test_a_killed_conversion_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import zoo.gguf.convert
    from zoo.checkpoints.writer import plan_shards

    monkeypatch.setattr(zoo.gguf.convert, "_shards", lambda m: plan_shards(m.blueprint.specs, torch.bfloat16, "400KB"))
    file = write_gguf(tmp_path / "a.gguf")
    expected = {p.name: p.read_bytes() for p in convert(file).iterdir()}
    shutil.rmtree(tmp_path / "zoo")
    real, calls = GgufModel.read, []

    def interrupted(self: GgufModel, name: str) -> torch.Tensor:
        calls.append(name)
        if len(calls) == 12:
            raise KeyboardInterrupt
        return real(self, name)

    monkeypatch.setattr(GgufModel, "read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(file)
    staging = next(p for p in (tmp_path / "zoo" / "models").iterdir() if p.is_dir())
    kept = sorted(p.name for p in staging.glob("*.safetensors"))
    assert kept and "config.json" not in {p.name for p in staging.iterdir()}
    calls.clear()
    calls.extend(["-"] * 12)
    home = convert(file)
    assert len(calls) - 12 < len(MODELS["llama"].shapes)
    assert expected == {p.name: p.read_bytes() for p in home.iterdir()}


def test_a_split_file_is_read_whole_or_not_at_all(tmp_path: Path) -> None:
    first = write_gguf(tmp_path / "m.gguf", "llama", split=6)
    parts = sorted(tmp_path.glob("m-*.gguf"))
    assert len(parts) == 4 and first == parts[0]
    whole = write_gguf(tmp_path / "whole.gguf", "llama")
    tensors = GgufModel.open(parts)
    expected = GgufModel.open([whole])
    assert all(torch.equal(tensors.read(name), expected.read(name)) for name in expected.blueprint.names)
    assert convert(parts[2]).name == "m"  # any part stands for all
    parts[3].rename(tmp_path / "gone")
    with pytest.raises(UserError, match=r"split into 4 parts, of which 'm-00004-of-00004\.gguf' is missing; add it"):
        add([str(first)], tmp_path / "other", quiet=True)
    shutil.copy(parts[1], parts[3])
    with pytest.raises(UserError, match=r"m-00004-of-00004\.gguf: says that it is part 2 of 4, and its name says 4 of"):
        add([str(first)], tmp_path / "other", quiet=True)
    shutil.copy(parts[1], tmp_path / "alone.gguf")
    with pytest.raises(UserError, match=r"part 2 of 4, and its name says 1 of 1; give all parts under the names"):
        add([str(tmp_path / "alone.gguf")], tmp_path / "other", quiet=True)
    assert not (tmp_path / "other").exists()


def test_a_file_without_a_tokenizer_is_a_donor_without_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_gguf(tmp_path / "a.gguf", "qwen2", metadata={"tokenizer.ggml.model": None})
    add([str(file)], tmp_path / "zoo")
    assert "a: has no tokenizer" in capsys.readouterr().err
    donor = Zoo.open(tmp_path / "zoo").donor("a")
    assert donor.vocabulary() is None and donor.config["vocab_size"] == 320


def test_what_of_a_tokenizer_is_not_carried_over_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metadata = {"tokenizer.ggml.pre": "smollm", "tokenizer.chat_template.to\x1bols": "{{ tools }}"}
    first = write_gguf(tmp_path / "a.gguf", "qwen2", metadata=metadata)
    second = write_gguf(tmp_path / "b.gguf", "qwen2", metadata={"tokenizer.ggml.pre": "qwen2"})
    add([str(first), str(second)], tmp_path / "zoo")
    kept = ("tensors in", "tokenizer", "transformers", "chat template")
    lines = [line for line in capsys.readouterr().err.splitlines() if any(word in line for word in kept)]
    assert lines == [
        f"a: {describe_types(GgufModel.open([first]).types)}",
        "a: transformers does not know how it splits a text into words ('smollm'), and splits as GPT-2",
        "a: its other chat templates (to\\x1bols) are not copied",
        f"b: {describe_types(GgufModel.open([second]).types)}",
    ]


def test_a_link_of_the_hubs_cache_keeps_its_name(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    blob = write_gguf(tmp_path / "x.gguf").rename(tmp_path / "blobs" / "0123")
    link = tmp_path / "snapshot" / "tiny.gguf"
    link.symlink_to(blob)
    row = add([str(link)], tmp_path / "zoo", quiet=True)[0]
    assert (row["name"], row["source"]) == ("tiny", str(link))
    assert add([row["source"]], tmp_path / "zoo", quiet=True)[0]["state"] == "present"


def test_a_gguf_donor_fills_a_target_and_the_record_names_its_types(tmp_path: Path) -> None:
    """Also its tokenizer goes along; `--donor` names the way for a file that is not in a zoo."""
    file = write_gguf(tmp_path / "tiny.gguf", "llama")
    home = convert(file)
    generate(home, "weight-selection", tmp_path / "out", zoo=tmp_path / "zoo")
    record = json.loads((tmp_path / "out" / "headstart.json").read_text())
    assert record["donors"][0]["quantisation"] == describe_types(GgufModel.open([file]).types)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (home / "tokenizer.json").read_bytes()
    assert (tmp_path / "out" / "chat_template.jinja").is_file()
    stored = Zoo.open(tmp_path / "zoo").donor("tiny")
    made = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(made[name].bfloat16(), stored.read(name)) for name in stored.names)
    with pytest.raises(UserError, match=r"tiny\.gguf: a GGUF file becomes a donor with `headstart zoo add FILE\.gguf"):
        generate(home, "normal", tmp_path / "other", donor=str(file))
