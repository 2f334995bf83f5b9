"""Specialists: donors on texts of their own, three of each run, and the text that a donor learned from."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.head_start.tasks import UNSEEN_TARGETS
from tests.support.commands import invoke
from zoo.checkpoints.files import file_hash
from zoo.donors.verify import verify
from zoo.donors.zoo import Zoo
from zoo.errors import UserError
from zoo.training import embedded_zoo
from zoo.training.cards import donor_card
from zoo.training.corpora import donor_text, library_source, python_reference, split_held_out
from zoo.training.embedded_zoo import train_zoo
from zoo.training.loop import evaluate
from zoo.training.recipes import PRESETS, SpecialistRecipe, specialist_recipes
from zoo.vocabulary import byte_tokens

TALES = SpecialistRecipe(
    16, 1, heads=2, kv_heads=1, head_dim=8, ffn=32, steps=36, lr=2e-2, batch_size=2, corpus="tales"
)
RECIPES = [TALES, replace(TALES, corpus="reference", steps=18)]
NAMES = [f"specialist-tales-w16-l1-h2-kv1-s0-t{step}" for step in (4, 12, 36)]


def contents(zoo: Path) -> dict[str, bytes]:
    """Every file of a zoo, by its path."""
    return {str(p.relative_to(zoo)): p.read_bytes() for p in zoo.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def tales(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of 45,000 bytes without a repeated block."""
    path = tmp_path_factory.mktemp("texts") / "tales.txt"
    path.write_bytes(library_source()[500_000:545_000])
    return path


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory, tales: Path) -> Path:
    path = tmp_path_factory.mktemp("specialists") / "zoo"
    train_zoo(path, RECIPES, workers=1, quiet=True, corpora={"tales": tales})
    return path


def test_a_run_gives_three_donors_with_falling_losses(zoo: Path, tales: Path) -> None:
    from transformers import AutoModelForCausalLM

    opened = Zoo.open(zoo)
    assert len(opened.donors) == 6 and verify(zoo) == []
    training, held_out = split_held_out(tales.read_bytes())
    donors = [opened.donor(name) for name in NAMES]
    for number, (step, donor) in enumerate(zip((4, 12, 36), donors, strict=True), 1):
        facts = donor.facts
        assert (facts["step"], facts["steps"], facts["tokens"]) == (step, 36, step * 2 * 64)
        assert (facts["corpus"], facts["run"]) == ("tales", "specialist-tales-w16-l1-h2-kv1-s0")
        assert (facts["checkpoint"], facts["checkpoints"]) == (number, 3)
        assert facts["corpus_sha256"] == hashlib.sha256(tales.read_bytes()).hexdigest()
        assert facts["training_text_sha256"] == hashlib.sha256(training).hexdigest()
        model = AutoModelForCausalLM.from_pretrained(donor.folder)
        assert facts["loss"] == pytest.approx(evaluate(model, byte_tokens(held_out), 64), abs=1e-4)
    first, second, third = (donor.facts["loss"] for donor in donors)
    assert first > second + 0.1 and second > third + 0.1
    runs = Counter((donor.facts["run"], donor.facts["checkpoints"]) for donor in opened.donors)
    assert set(runs.values()) == {3} and len(runs) == 2


def test_the_last_donor_is_the_model_of_all_steps(zoo: Path, tales: Path, tmp_path: Path) -> None:
    """Writing the earlier ones changes nothing in the training."""
    from zoo.training.loop import reproducible, train_steps

    with reproducible():
        model = embedded_zoo._new_model(TALES)
        for _ in train_steps(model, byte_tokens(split_held_out(tales.read_bytes())[0]), TALES.training):
            pass
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    assert file_hash(tmp_path / "model.safetensors") == file_hash(zoo / "models" / NAMES[2] / "model.safetensors")


def test_an_interrupted_training_resumes(
    zoo: Path, tales: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run that was complete is kept, the other one begins again, and every byte is the same."""
    real, calls = embedded_zoo.train_steps, []

    def interrupted(*args: object) -> object:
        for step in real(*args):  # type: ignore[arg-type]
            calls.append(step.number)
            if len(calls) == 36 + 10:  # between the second and the third donor of the second run
                raise KeyboardInterrupt
            yield step

    monkeypatch.setattr(embedded_zoo, "train_steps", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_zoo(tmp_path / "zoo", RECIPES, workers=1, quiet=True, corpora={"tales": tales})
    staged = {p.name for p in (tmp_path / "zoo" / embedded_zoo.STAGING).iterdir()}
    assert set(NAMES) < staged and len(staged) == 5
    train_zoo(tmp_path / "zoo", RECIPES, workers=1, quiet=True, corpora={"tales": tales})
    assert len(calls) == 36 + 10 + 18
    assert contents(tmp_path / "zoo") == contents(zoo)


def test_a_text_is_not_copied_into_the_zoo_and_its_folder_is_not_named(zoo: Path, tales: Path) -> None:
    text = tales.read_bytes()
    for name, data in contents(zoo).items():
        assert text[5000:5100] not in data and str(tales.parent).encode() not in data, name


def test_the_licence_is_stated_for_embedded_texts_only(zoo: Path) -> None:
    given, embedded = Zoo.open(zoo).donor(NAMES[0]), Zoo.open(zoo).donor("specialist-reference-w16-l1-h2-kv1-s0-t18")
    assert (given.license, embedded.license) == ("not stated (learned from the text tales)", "mit")
    cards = [donor_card(donor.name, donor.facts) for donor in (given, embedded)]
    assert "states no licence for these weights" in cards[0] and "states no licence" not in cards[1]
    assert "checkpoint 1 of 3 of the run `specialist-tales-w16-l1-h2-kv1-s0`" in cards[0]
    assert f"Held-out loss: {given.facts['loss']:.3f} nats per byte" in cards[0]


def test_a_complete_zoo_is_left_alone_and_another_text_is_refused(
    zoo: Path, tales: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(zoo)
    monkeypatch.setattr(embedded_zoo, "train_run", lambda *_: pytest.fail("trained again"))
    train_zoo(zoo, RECIPES, workers=1, quiet=True, corpora={"tales": tales})
    (tmp_path / "other.txt").write_bytes(tales.read_bytes() + b".")
    with pytest.raises(UserError, match="learned another text"):
        train_zoo(zoo, RECIPES, workers=1, quiet=True, corpora={"tales": tmp_path / "other.txt"})
    assert contents(zoo) == before


def test_texts_of_other_formats_are_read(tales: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The text of a JSON lines file is its documents with blank lines in between."""
    documents = tales.read_bytes().decode().split("\n\n")
    (tmp_path / "tales.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in documents if d))
    seen: list[embedded_zoo.TrainingRun] = []
    monkeypatch.setattr(embedded_zoo, "_train_missing", lambda zoo, runs, *_: seen.extend(runs))
    train_zoo(tmp_path / "zoo", RECIPES, quiet=True, corpora={"tales": tmp_path / "tales.jsonl"})
    assert seen[0].text.decode() == "\n\n".join(d for d in documents if d)
    assert seen[1].text == python_reference()


@pytest.mark.parametrize(("words", "reason"), [
    (["--corpus", "tales=tales.txt", "--corpus", "tales=tales.txt"], "the name 'tales' is given twice; give each"),
    (["--corpus", "tales=missing.txt"], "missing.txt: no such file; give a file or a folder of text for the corpus"),
    (["--corpus", "tales=org/name"], "org/name: no such file"),
    (["--corpus", "tales=short.txt"], "short.txt: has 39999 bytes of text, which is too short to train on; give at le"),
    (["--corpus", "tales=image.png"], "image.png: is an image, not text"),
    (["--corpus", "Tales=tales.txt"], "corpus 'Tales': donors are named after it, so use lower-case letters and"),
    (["--corpus", "../x=tales.txt"], "corpus '../x': donors are named after it"),
    (["--corpus", "tales-=tales.txt"], "corpus 'tales-': donors are named after it"),
    (["--corpus", f"{'a' * 41}=tales.txt"], "at most 40 characters"),
    (["--corpus", "source=tales.txt"], "corpus 'source': is the name of an embedded text; choose another name"),
    (["--corpus", "tales.txt"], "--corpus tales.txt: write it as NAME=FILE"),
    (["--corpus", "=tales.txt"], "--corpus =tales.txt: write it as NAME=FILE"),
    (["--corpus", "tales="], "--corpus tales=: write it as NAME=FILE"),
    (["--preset", "demo", "--corpus", "tales=tales.txt"], "--corpus tales: no donor of this preset learns from it"),
])  # fmt: skip
def test_wrong_texts_are_one_line(
    tales: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], reason: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tales.txt").write_bytes(tales.read_bytes())
    Path("short.txt").write_text("a" * 39_999)
    Path("image.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(50_000))
    preset = [] if "--preset" in words else ["--preset", "specialists"]
    done = invoke("zoo", "train", "--zoo", "zoo", *preset, *words)
    assert done.exit_code == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("headstart: ") and reason in done.stderr
    assert not Path("zoo").exists()


def test_a_recipe_without_its_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no text for the corpus 'tales'; give it with --corpus tales=FILE"):
        train_zoo(tmp_path / "zoo", RECIPES, quiet=True)
    assert not (tmp_path / "zoo").exists()


def test_a_training_that_diverges_is_one_line(tales: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="specialist-tales-w16-l1-h2-kv1-s0: training diverged at step 2; give a lower"):
        train_zoo(tmp_path / "zoo", [replace(TALES, lr=1e38)], workers=1, quiet=True, corpora={"tales": tales})
    assert not (tmp_path / "zoo" / "models").exists()


def test_the_preset_trains_every_text_on_the_same_shapes() -> None:
    recipes = specialist_recipes(["reference", "source", "tales"])
    names = [name for recipe in recipes for name in recipe.donor_names.values()]
    assert len(names) == len(set(names)) == 3 * len(recipes)
    shapes = [{(r.width, r.layers, r.heads, r.kv_heads, r.ffn) for r in recipes if r.text_name == text}
              for text in ("reference", "source", "tales")]  # fmt: skip
    assert shapes[0] == shapes[1] == shapes[2] and len(recipes) == 3 * 2 * len(shapes[0])
    assert {r.seed for r in recipes} == {0, 1} and len({r.training.seed for r in recipes}) == len(recipes)
    assert {r.width for r in recipes} >= {48, 128} and {r.layers for r in recipes} >= {2, 6}
    assert any(r.kv_heads < r.heads for r in recipes) and any(r.kv_heads == r.heads for r in recipes)
    keys = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    for target in UNSEEN_TARGETS.values():
        assert tuple(target[key] for key in keys) not in shapes[0]


def test_help_names_every_preset() -> None:
    shown = invoke("zoo", "train", "--help").stdout
    assert all(name in shown for name in PRESETS)


# What a donor learned from


def test_the_text_of_a_donor_has_no_held_out_byte(zoo: Path, tales: Path) -> None:
    opened = Zoo.open(zoo)
    for name, text in (
        (NAMES[2], tales.read_bytes()),
        ("specialist-reference-w16-l1-h2-kv1-s0-t6", python_reference()),
    ):
        found = donor_text(opened.donor(name).facts, {"tales": tales})
        training, held_out = split_held_out(text)
        assert found == training and len(found) + len(held_out) == len(text)
        for start in range(0, len(held_out) - 64, 64):
            assert held_out[start : start + 64] not in found or text.count(held_out[start : start + 64]) > 1


def test_the_text_of_a_donor_is_found_by_its_facts(zoo: Path, tales: Path) -> None:
    facts = Zoo.open(zoo).donor(NAMES[0]).facts
    training = split_held_out(tales.read_bytes())[0]
    assert donor_text(facts, {}) is None and donor_text(facts, {"other": tales}) is None
    assert donor_text(facts, {NAMES[0]: tales}, NAMES[0]) == training
    assert donor_text({}, {"my-model": tales}, "my-model") == training
    assert donor_text({}, {"": tales}) is None and donor_text({"corpus": 3}, {"tales": tales}) is None
    sha = hashlib.sha256(library_source()).hexdigest()
    assert donor_text({"corpus": "source", "corpus_sha256": sha}, {}) == split_held_out(library_source())[0]
    assert donor_text({"corpus": "source"}, {}) is None, "of another origin"


def test_donors_of_older_zoos_have_their_text(tmp_path: Path) -> None:
    reference = python_reference()
    facts: dict[str, Any] = {
        "corpus": "Python language reference (pydoc_data.topics)",
        "corpus_sha256": hashlib.sha256(reference).hexdigest(),
    }
    assert donor_text(facts, {}) == split_held_out(reference)[0]
    with pytest.raises(UserError, match="the text 'reference' of this Python: is not the text that the donor a was"):
        donor_text(facts | {"corpus_sha256": "0" * 64}, {}, "a")
    (tmp_path / "kept.txt").write_bytes(reference)
    assert donor_text(facts, {"reference": tmp_path / "kept.txt"}) == split_held_out(reference)[0]


@pytest.mark.parametrize("key", ["corpus_sha256", "training_text_sha256"])
def test_another_text_than_the_donors_is_refused(zoo: Path, tales: Path, tmp_path: Path, key: str) -> None:
    facts = Zoo.open(zoo).donor(NAMES[0]).facts | {key: "0" * 64}
    with pytest.raises(UserError, match=f"is not the text that the donor {NAMES[0]} was trained on") as caught:
        donor_text(facts, {"tales": tales}, NAMES[0])
    assert len(str(caught.value)) <= 400 and "tales=FILE" in str(caught.value)
