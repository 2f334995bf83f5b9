"""Tokenizers in every format, chat templates and generation configs: what an output holds, and that it is right."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from headstart.generate import tokenizer_files
from tests.conftest import make_llama
from tests.support.commands import evaluate, generate, lora
from tests.support.shaken import CONFIGS, donor
from zoo import vocabulary
from zoo.add import add
from zoo.checkpoints.checkpoint import Checkpoint
from zoo.donors.folder import StandaloneDonor, ZooDonor
from zoo.donors.zoo import Zoo
from zoo.errors import UserError
from zoo.vocabulary import find_tokenizer, read_vocabulary

TEXT = "The old king spoke of war and of peace; the young king was silent. No crown lasts for ever, said he. " * 40
SENTENCE = "the king spoke of a wörld"
TEMPLATE = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}"


def save_bpe(folder: Path) -> None:
    """vocab.json and merges.txt, as GPT-2 has them."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"])
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.model.save(str(folder))


def save_wordpiece(folder: Path) -> None:
    """vocab.txt, as BERT has it."""
    words = sorted({*TEXT.lower().replace(".", " . ").split(), *"abcdefghijklmnopqrstuvwxyzö"})
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words, *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyzö")]
    (folder / "vocab.txt").write_text("\n".join(pieces) + "\n")


def save_sentencepiece(folder: Path) -> None:
    """tokenizer.model alone, as Llama 2 has it."""
    spm = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    (folder / "text").write_text(TEXT)
    options = {"vocab_size": 300, "model_type": "bpe", "byte_fallback": True, "minloglevel": 2}
    spm.SentencePieceTrainer.train(input=str(folder / "text"), model_prefix=str(folder / "tokenizer"), **options)
    for name in ("text", "tokenizer.vocab"):
        (folder / name).unlink()


KINDS: dict[str, tuple[Callable[[Path], None], str, dict[str, Any], tuple[str, ...]]] = {
    "bpe": (save_bpe, "gpt2", {"n_embd": 48, "n_head": 6}, ("vocab.json", "merges.txt")),
    "wordpiece": (save_wordpiece, "bert", {"hidden_size": 48, "num_attention_heads": 6}, ("vocab.txt",)),
    "sentencepiece": (save_sentencepiece, "llama", {"hidden_size": 48}, ("tokenizer.model",)),
}  # fmt: skip
BERT = {
    "model_type": "bert", "architectures": ["BertForMaskedLM"], "hidden_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "intermediate_size": 64, "max_position_embeddings": 64,
}  # fmt: skip


def slow_donor(folder: Path, kind: str) -> tuple[Path, Path]:
    """(a donor with a tokenizer in an older format, the config of a target of its architecture)."""
    save, architecture, changes, _ = KINDS[kind]
    base = BERT if architecture == "bert" else CONFIGS[architecture]
    donor(folder / "donor", {**base, "vocab_size": 300})
    save(folder / "donor")
    (folder / "target").mkdir()
    (folder / "target" / "config.json").write_text(json.dumps({**base, **changes, "vocab_size": 300}))
    return folder / "donor", folder / "target" / "config.json"


def encoded(folder: Path) -> list[int]:
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return tokenizer(SENTENCE)["input_ids"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_in_an_older_format_reaches_the_output(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    source, target = slow_donor(tmp_path, kind)
    (source / "chat_template.jinja").write_text(TEMPLATE)
    files = {*KINDS[kind][3], "chat_template.jinja"}
    add([str(source)], tmp_path / "zoo", quiet=True)
    method = "weight-selection"
    settings = ["wider=repeat"]
    generate(target, method, tmp_path / "alone", donor=str(source), settings=settings)
    generate(target, method, tmp_path / "zoo-out", zoo=tmp_path / "zoo", settings=settings)
    generate(target, "default", tmp_path / "given", tokenizer=source)
    expected = encoded(source)
    assert len(set(expected)) > 5 and "copied" not in caplog.text and "otherwise" not in caplog.text
    for out in ("alone", "zoo-out", "given"):
        found = {p.name for p in (tmp_path / out).iterdir()}
        assert files <= found
        assert all((tmp_path / out / name).read_bytes() == (source / name).read_bytes() for name in files)
        assert encoded(tmp_path / out) == expected
        assert AutoTokenizer.from_pretrained(tmp_path / out).chat_template == TEMPLATE


@pytest.mark.parametrize("kind", KINDS)
def test_the_vocabulary_of_an_older_format_is_that_of_transformers(tmp_path: Path, kind: str) -> None:
    source, _ = slow_donor(tmp_path, kind)
    expected = AutoTokenizer.from_pretrained(source).get_vocab()
    assert read_vocabulary(source) == read_vocabulary(source / KINDS[kind][3][0]) == expected
    assert find_tokenizer(source, "x") == find_tokenizer(source / KINDS[kind][3][0], "x") == source
    assert find_tokenizer(None, source) == find_tokenizer(None, source / "config.json") == source
    assert StandaloneDonor.open(source, quiet=True).vocabulary() == expected
    add([str(source)], tmp_path / "zoo", quiet=True)
    assert Zoo.open(tmp_path / "zoo").donors[0].vocabulary() == expected


def test_tokens_of_two_older_formats_are_matched_by_string(tmp_path: Path) -> None:
    source, _ = slow_donor(tmp_path, "bpe")
    shutil.copytree(source, tmp_path / "permuted")
    content = json.loads((source / "vocab.json").read_text())
    moved = {token: (row + 7) % len(content) for token, row in content.items()}
    (tmp_path / "permuted" / "vocab.json").write_text(json.dumps(moved))
    generate(tmp_path / "permuted", "weight-selection", tmp_path / "out", donor=str(source))
    before, after = (Checkpoint.open(f).read("transformer.wte.weight") for f in (source, tmp_path / "out"))
    rows = torch.tensor([[content[token], moved[token]] for token in content])
    assert torch.equal(after[rows[:, 1]], before[rows[:, 0]])
    assert not torch.equal(after, before)
    assert json.loads((tmp_path / "out" / "vocab.json").read_text()) == moved


def test_calibration_and_evaluation_read_an_older_format(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    source, target = slow_donor(tmp_path, "bpe")
    (tmp_path / "text.txt").write_text(TEXT * 3)
    smaller = json.loads(target.read_text()) | {"n_embd": 16, "n_head": 2}
    generate(
        smaller, "pruning", tmp_path / "pruned", donor=str(source),
        settings=[f"text={tmp_path / 'text.txt'}", "windows=2"],
    )  # fmt: skip
    assert encoded(tmp_path / "pruned") == encoded(source)
    (tmp_path / "q.jsonl").write_text(json.dumps({"sentence_good": "the king", "sentence_bad": "king the"}) + "\n")
    found = evaluate(source, [str(tmp_path / "q.jsonl")])["tasks"]["q.jsonl"]
    assert found["samples"] == 1 and found["lacking"] == 0


def test_a_sentencepiece_model_needs_its_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source, target = slow_donor(tmp_path, "sentencepiece")
    monkeypatch.setattr(vocabulary, "_is_installed", lambda module: module != "sentencepiece")
    advice = (
        r"tokenizer.model: needs the packages sentencepiece and protobuf: pip install 'headstart\[sentencepiece\]'$"
    )
    with pytest.raises(UserError, match=advice):
        read_vocabulary(source)
    with pytest.raises(UserError, match=advice):
        generate(
            target, "weight-selection", tmp_path / "no", donor=str(source), tokenizer=source,
            settings=["wider=repeat"],
        )  # fmt: skip
    generate(target, "weight-selection", tmp_path / "out", donor=str(source), settings=["wider=repeat"])
    assert "no tokenizer is copied" in caplog.text and "headstart[sentencepiece]" in caplog.text
    assert not list((tmp_path / "out").glob("*token*"))


@pytest.mark.parametrize(
    ("architecture", "stated", "equal"), [("olmo", "TokenizersBackend", True), ("qwen2", None, False)]
)
def test_a_tokenizer_keeps_its_class_beside_another_model(
    tmp_path: Path, architecture: str, stated: str | None, equal: bool, caplog: pytest.LogCaptureFixture
) -> None:
    source, _ = slow_donor(tmp_path, "sentencepiece")
    target = {**CONFIGS["llama"], "model_type": architecture, "vocab_size": 300}
    generate(target, "default", tmp_path / "out", tokenizer=source)
    assert (encoded(tmp_path / "out") == encoded(source)) is equal
    assert ("the tokenizer encodes otherwise in the output" in caplog.text) is not equal
    if stated is not None:
        config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
        assert config == {"tokenizer_class": stated}


def test_chat_templates_are_copied_and_what_is_not_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = slow_donor(tmp_path, "bpe")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    (source / "chat_template.jinja").write_text(TEMPLATE)
    generate(target, "default", tmp_path / "out", tokenizer=source)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == {"default": TEMPLATE, "tool_use": "tools"}
    add([str(source)], tmp_path / "zoo")
    assert "additional_chat_templates/ is not copied" in capsys.readouterr().err
    (source / "chat_template.jinja").unlink()
    (source / "chat_template.jinja").symlink_to("/etc/hostname")
    with pytest.raises(UserError, match=r"chat_template\.jinja: is a link that leads out of its folder"):
        generate(target, "default", tmp_path / "no", tokenizer=source)


def test_the_base_of_an_adapter_has_all_files_of_its_tokenizer(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    source, _ = slow_donor(tmp_path, "sentencepiece")
    (source / "chat_template.jinja").write_text(TEMPLATE)
    lora(source, "pissa", 2, tmp_path / "out")
    assert encoded(tmp_path / "out" / "base") == encoded(source)
    assert (tmp_path / "out" / "base" / "chat_template.jinja").read_text() == TEMPLATE


def test_a_zoo_from_before_knows_its_donors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A donor that was added without its chat template is still the same donor."""
    source, _ = slow_donor(tmp_path, "bpe")
    hidden = {name: (source / name).read_bytes() for name in ("vocab.json", "merges.txt")}
    for name in hidden:
        (source / name).unlink()
    (added,) = add([str(source)], tmp_path / "zoo", quiet=True)
    for name, data in hidden.items():
        (source / name).write_bytes(data)
    capsys.readouterr()
    (planned,) = add([str(source)], tmp_path / "zoo", plan=True)
    (again,) = add([str(source)], tmp_path / "zoo")
    home = tmp_path / "zoo" / "models" / "donor"
    assert [p.name for p in home.parent.glob("[!.]*")] == ["donor"]
    assert planned["state"] == again["state"] == "present" and again["revision"] == planned["revision"]
    assert again["revision"] == added["revision"] == ZooDonor.open(home).revision
    expected = f"donor: was added without merges.txt, vocab.json; remove {home} and add it again to have them"
    assert expected in capsys.readouterr().err
    shutil.rmtree(home)
    add([str(source)], tmp_path / "zoo", quiet=True)
    assert {"merges.txt", "vocab.json"} <= {p.name for p in home.iterdir()}


def test_a_fitted_sampler_from_before_finds_its_donor(tmp_path: Path) -> None:
    from zoo.donors.folder import donor_ref, open_ref

    source = make_llama(tmp_path / "donor")
    ref = donor_ref(StandaloneDonor.open(source, quiet=True))
    (source / "chat_template.jinja").write_text(TEMPLATE)
    assert donor_ref(StandaloneDonor.open(source, quiet=True)) != ref
    assert open_ref(ref, "x").folder == source
    (source / "generation_config.json").write_text("{}")
    with pytest.raises(UserError, match="is not the donor that x was fitted to"):
        open_ref(ref, "x")


GENERATION = {"eos_token_id": [2, 7], "temperature": 0.7, "do_sample": True, "suppress_tokens": [-1]}


def generation_target(folder: Path, **changes: Any) -> Path:
    config = json.loads((folder / "donor" / "config.json").read_text()) | {"hidden_size": 64} | changes
    (folder / "target").mkdir(exist_ok=True)
    (folder / "target" / "config.json").write_text(json.dumps(config))
    return folder / "target" / "config.json"


def generation_config_of(out: Path) -> dict[str, Any] | None:
    path = out / "generation_config.json"
    return json.loads(path.read_text()) if path.exists() else None


def test_the_generation_config_is_that_of_the_target_else_of_the_donor(tmp_path: Path) -> None:
    source = make_llama(tmp_path / "donor")
    (source / "generation_config.json").write_text(json.dumps(GENERATION))
    add([str(source)], tmp_path / "zoo", quiet=True)
    target = generation_target(tmp_path)
    given: dict[str, Any] = {"settings": ["wider=repeat"]}
    generate(target, "weight-selection", tmp_path / "alone", donor=str(source), **given)
    generate(target, "weight-selection", tmp_path / "stored", zoo=tmp_path / "zoo", **given)
    generate(target, "default", tmp_path / "default")
    assert generation_config_of(tmp_path / "alone") == generation_config_of(tmp_path / "stored") == GENERATION
    assert generation_config_of(tmp_path / "default") is None
    (target.parent / "generation_config.json").write_text('{"top_k": 3}')
    for place, name in ((target, "a"), (target.parent, "b")):
        generate(place, "weight-selection", tmp_path / name, donor=str(source), **given)
        assert generation_config_of(tmp_path / name) == {"top_k": 3}
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "alone")
    assert model.generation_config.eos_token_id == [2, 7] and model.generation_config.temperature == 0.7


@pytest.mark.parametrize(("content", "changes", "reason"), [
    (GENERATION, {"eos_token_id": 5}, "its eos_token_id is [2, 7], the target's 5"),
    ({"eos_token_id": 96}, {}, "eos_token_id names token 96, outside the 96 of the target"),
    ({"suppress_tokens": [1, 200]}, {}, "suppress_tokens names token 200, outside the 96 of the target"),
    ({"bad_words_ids": [[1], [2, 300]]}, {}, "bad_words_ids names token 300"),
    ("[]", {}, "holds a list instead of a JSON object"), ("{", {}, "not valid JSON"),
])  # fmt: skip
def test_a_generation_config_that_does_not_fit_is_left_out_and_named(
    tmp_path: Path, content: Any, changes: dict, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    source = make_llama(tmp_path / "donor")
    text = content if isinstance(content, str) else json.dumps(content)
    (source / "generation_config.json").write_text(text)
    target = generation_target(tmp_path, **changes)
    generate(target, "weight-selection", tmp_path / "out", donor=str(source), settings=["wider=repeat"])
    assert generation_config_of(tmp_path / "out") is None
    assert "no generation_config.json is copied" in caplog.text and reason in caplog.text


def test_a_generation_config_belongs_to_its_tokenizer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source, target = slow_donor(tmp_path, "bpe")
    (source / "generation_config.json").write_text('{"eos_token_id": 2}')
    content = json.loads((source / "vocab.json").read_text())
    shutil.copy(source / "merges.txt", target.parent)
    (target.parent / "vocab.json").write_text(json.dumps({t: (i + 7) % len(content) for t, i in content.items()}))
    generate(target, "weight-selection", tmp_path / "other", donor=str(source), settings=["wider=repeat"])
    assert generation_config_of(tmp_path / "other") is None and "belong to another tokenizer" in caplog.text
    (target.parent / "vocab.json").write_text(json.dumps(content))
    generate(target, "weight-selection", tmp_path / "same", donor=str(source), settings=["wider=repeat"])
    assert generation_config_of(tmp_path / "same") == {"eos_token_id": 2}


def test_the_constants_are_the_files_of_transformers() -> None:
    assert tokenizer_files.TOKENIZER_CONFIG in tokenizer_files.TOKENIZER_FILES
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    for kind in ("GPT2", "Bert", "Llama", "T5", "XLMRoberta", "DebertaV2", "Marian"):
        cls = tokenizer_class_from_name(f"{kind}Tokenizer")
        assert cls is not None
        assert set(cls.vocab_files_names.values()) <= {*tokenizer_files.TOKENIZER_FILES, "tokenizer_config.json"}
