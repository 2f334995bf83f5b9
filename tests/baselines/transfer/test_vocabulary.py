"""Targets with another tokenizer than their donor's: copied, composed and drawn rows, in tied and untied models."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor

from baselines.transfer.row_column import RowColumn
from baselines.transfer.shrinking.sliced import Sliced
from baselines.transfer.vocabulary import token_vectors
from baselines.transfer.weight_selection import WeightSelection
from headstart.config import GenerateConfig
from headstart.generate.generate import generate
from tests.support.shaken import CONFIGS, donor
from tests.zoo.test_vocabularies import byte_level, sentencepiece
from zoo.checkpoints.checkpoint import Checkpoint
from zoo.donors.zoo import Zoo, open_standalone
from zoo.errors import UserError
from zoo.targets.blueprint import Blueprint
from zoo.vocabularies.tokens import read_tokens

N_SOURCE, N_TARGET = 280, 16  # rows of the embeddings: 275 and 13 tokens, and padding


def make_pair(folder: Path, tied: bool) -> tuple[Zoo, Path, Blueprint]:
    """(a Llama with a SentencePiece tokenizer, a byte-level tokenizer, the donor's shape with that tokenizer)."""
    config = CONFIGS["llama"] | {"tie_word_embeddings": tied}
    donor(folder / "donor", config | {"vocab_size": N_SOURCE})
    sentencepiece(folder / "donor")
    zoo = open_standalone(folder / "donor")
    return zoo, byte_level(folder / "target"), Blueprint.from_config(config | {"vocab_size": N_TARGET})


def sample(zoo: Zoo, tokenizer: Path, blueprint: Blueprint, **options: object) -> dict[str, Tensor]:
    sampler = RowColumn(tokenizer=str(tokenizer), noise=0.0, **options)  # type: ignore[arg-type]
    return dict(sampler.fit(zoo, blueprint).sample(blueprint))


@pytest.mark.parametrize("tied", [True, False])
def test_embedding_and_head_are_composed_alike(tmp_path: Path, tied: bool) -> None:
    zoo, tokenizer, blueprint = make_pair(tmp_path, tied)
    got, strings = (sample(zoo, tokenizer, blueprint, vocabulary=rule) for rule in ("mean", "strings"))
    old, new = read_tokens(tmp_path / "donor").ids, read_tokens(tokenizer).ids
    names = [name for name in ("model.embed_tokens.weight", "lm_head.weight") if name in got]
    assert len(names) == 2 - tied
    for name in names:
        table = zoo.donors[0].read(name, torch.float32)
        rows = got[name]
        assert torch.equal(rows[new["Ġthe"]], table[old["▁the"]])
        assert torch.equal(rows[new["<|endoftext|>"]], table[old["</s>"]]), "the same role"
        torch.testing.assert_close(rows[new["Ġthere"]], table[[old["▁the"], old["re"]]].mean(0))
        assert 0.3 < rows[[1, 13, 14, 15]].std() / table.std() < 3, "a mask and padding are drawn like the donor's rows"
        assert torch.equal(strings[name][new["ing"]], table[old["ing"]])
        assert not torch.equal(strings[name][new["Ġthe"]], table[old["▁the"]]), "only equal strings"


def test_sliced_composes_as_the_index_maps_do(tmp_path: Path) -> None:
    zoo, tokenizer, blueprint = make_pair(tmp_path, tied=False)
    head = dict(Sliced(tokenizer=str(tokenizer)).fit(zoo, blueprint).sample(blueprint))["lm_head.weight"]
    plain = Blueprint.from_config(CONFIGS["llama"] | {"tie_word_embeddings": False, "vocab_size": N_SOURCE})
    table = dict(Sliced().fit(zoo, plain).sample(plain))["lm_head.weight"]
    old, new = read_tokens(tmp_path / "donor").ids, read_tokens(tokenizer).ids
    assert torch.equal(head[new["Ġthe"]], table[old["▁the"]])
    torch.testing.assert_close(head[new["here"]], table[[old["he"], old["re"]]].mean(0))


def test_what_is_copied_composed_and_drawn_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_pair(tmp_path, tied=True)
    caplog.set_level(logging.INFO)
    config = CONFIGS["llama"] | {"tie_word_embeddings": True, "vocab_size": N_TARGET}
    options = {"target": config, "method": "row-column", "donor": str(tmp_path / "donor")}
    tokenizer = str(tmp_path / "target")
    out = generate(GenerateConfig(**options, tokenizer=tokenizer, out=tmp_path / "out"), quiet=True)
    line = "9 of 13 tokens are in the donor's vocabulary, 3 are composed of its tokens (mean), 4 rows are drawn"
    assert line in caplog.text and "serves only" not in caplog.text
    record = json.loads((out / "headstart.json").read_text())  # type: ignore[operator]
    assert record["vocabulary"] == {
        "rule": "mean", "tokens": 13, "copied": 9, "composed": 3, "from_bytes": 1, "drawn": 1, "share": 0.8462,
    }  # fmt: skip
    assert Checkpoint.open(tmp_path / "out").read("model.embed_tokens.weight").shape[0] == N_TARGET

    strings = {"vocabulary": "strings"}
    generate(GenerateConfig(**options, tokenizer=tokenizer, set=strings, out=tmp_path / "strings"), quiet=True)
    assert "the donor's vocabulary serves only 31% of the tokens; leave out the option vocabulary" in caplog.text
    own = generate(GenerateConfig(**options | {"target": str(tmp_path / "donor")}, out=tmp_path / "own"), quiet=True)
    assert "vocabulary" not in json.loads((own / "headstart.json").read_text())  # type: ignore[operator]


def test_a_donor_of_another_script_is_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Bytes make up every token, and say nothing of what it means."""
    zoo, tokenizer, blueprint = make_pair(tmp_path, tied=True)
    content = json.loads((tokenizer / "tokenizer.json").read_text())
    chinese = ["ä½ł", "å¥½", "ä¸Ń", "åĽ½", "äºº", "æĺ¯", "æĪĳ", "ä»¬", "ä¸į", "äºĨ", "t"]
    content["model"]["vocab"] = {token: i for i, token in enumerate(["<|endoftext|>", "<|mask|>", *chinese])}
    (tokenizer / "tokenizer.json").write_text(json.dumps(content))
    got = sample(zoo, tokenizer, blueprint)
    assert "serves only 15% of the tokens; choose a donor of the same language and script" in caplog.text
    table = zoo.donors[0].read("model.embed_tokens.weight", torch.float32)
    torch.testing.assert_close(got["model.embed_tokens.weight"][2], table[[b + 3 for b in "你".encode()]].mean(0))


def test_a_model_with_the_targets_tokenizer_compares_tokens(tmp_path: Path) -> None:
    zoo, tokenizer, blueprint = make_pair(tmp_path, tied=True)
    donor(tmp_path / "model", CONFIGS["llama"] | {"vocab_size": 13})
    byte_level(tmp_path / "model")
    embedding = open_standalone(tmp_path / "model").donors[0].read("model.embed_tokens.weight", torch.float32)
    vectors = token_vectors(str(tmp_path / "model"), read_tokens(tokenizer), N_TARGET)
    assert torch.equal(vectors[:13], embedding) and not vectors[13:].any()
    spelled = sample(zoo, tokenizer, blueprint, vocabulary="omp")
    compared = sample(zoo, tokenizer, blueprint, vocabulary="omp", vocabulary_model=str(tmp_path / "model"))
    there = read_tokens(tokenizer).ids["Ġthere"]
    rows = [tensors["model.embed_tokens.weight"][there] for tensors in (spelled, compared)]
    assert not torch.equal(*rows)
    (tmp_path / "model" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="has no tokenizer; give a whole language model"):
        sample(zoo, tokenizer, blueprint, vocabulary="focus", vocabulary_model=str(tmp_path / "model"))


def test_samplers_from_before_there_was_a_rule_match_strings(tmp_path: Path) -> None:
    zoo, tokenizer, blueprint = make_pair(tmp_path, tied=True)
    sampler = WeightSelection(tokenizer=str(tokenizer), vocabulary="strings").fit(zoo, blueprint)
    sampler.save(tmp_path / "saved")
    path = tmp_path / "saved" / "sampler.json"
    content = json.loads(path.read_text())
    content["options"] = {k: v for k, v in content["options"].items() if not k.startswith("vocabulary")}
    path.write_text(json.dumps({k: v for k, v in content.items() if k != "seal"}))
    loaded = WeightSelection.load(tmp_path / "saved")
    assert loaded.vocabulary == "strings"
    name = "model.embed_tokens.weight"
    assert torch.equal(dict(loaded.sample(blueprint))[name], dict(sampler.sample(blueprint))[name])
    assert RowColumn.current_options({"vocabulary": "first"}) == {"vocabulary": "strings"}, "the option of a pool"
    assert RowColumn.current_options({"vocabulary": "omp"}) == {"vocabulary": "omp"}
