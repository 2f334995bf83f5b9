"""Training the autoencoder: what it learns, on which text, and that neither interruptions nor processes change it."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from autoencoder import texts, training
from autoencoder.config import AutoencoderTrainConfig
from autoencoder.donors import (
    LEAST_BASES,
    SHARE,
    base_blocks,
    count_numbers,
    field_numbers,
    field_sizes,
    read_training_donors,
)
from autoencoder.loading import load_autoencoder
from autoencoder.model import new_autoencoder
from autoencoder.objective import (
    Skeletons,
    donor_logits,
    draw_step,
    encode_donor,
    mixed_windows,
    training_shapes,
    written_loss,
)
from autoencoder.report import pca_axes, pca_projection
from autoencoder.sampler import AutoencoderSampler
from tests.support.generators import (
    AUTOENCODER,
    TEXT,
    byte_zoo,
    train_both,
    train_tiny_autoencoder,
    train_tiny_diffusion,
)
from tests.support.launched import fork
from tests.support.tiny import config, make_zoo
from zoo.donors.zoo import Zoo
from zoo.errors import UserError
from zoo.targets.blueprint import Blueprint
from zoo.training.corpora import split_held_out
from zoo.training.resumable import STATE_FILE
from zoo.units.family import PLAIN
from zoo.units.tables import TABLE_ROLES
from zoo.vocabulary import byte_tokens

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return byte_zoo(tmp_path_factory.mktemp("zoo"))


@pytest.fixture(scope="module")
def text(zoo: Zoo) -> Path:
    return zoo.path.parent / "text.txt"


@pytest.fixture(scope="module")
def trained(zoo: Zoo, text: Path) -> Path:
    """`autoencoder` and `pipeline`, trained by one process."""
    folder = zoo.path.parent / "alone"
    train_both(zoo.path, text, folder)
    return folder


@contextmanager
def interrupted_at(trainer: type[Any], step: int) -> Iterator[None]:
    """Ctrl-C comes during a step of a training."""
    real = trainer.train_step

    def stopping(self: Any, at: int) -> None:
        if at == step:
            signal.raise_signal(signal.SIGINT)
        real(self, at)

    with patch.object(trainer, "train_step", stopping), pytest.raises(KeyboardInterrupt):
        yield


def test_behaviour_teaches_the_text_that_the_donors_do_not_know(zoo: Zoo, text: Path, tmp_path: Path) -> None:
    """The donors are random. What is decoded from their latents learns the text, beside mere reconstruction."""
    plain = replace(AUTOENCODER, steps=0, warmup=0, reconstruction=40, noise=0.05)
    rows = []
    for name, settings in (("plain", plain), ("whole", replace(plain, warmup=10, steps=50, batch=8, sequence=32))):
        train_tiny_autoencoder(zoo.path, tmp_path / name, text, settings, command={"subcommand": "train autoencoder"})
        rows.append(json.loads((tmp_path / name / "report.json").read_text()))
    assert rows[0]["config"] == {"subcommand": "train autoencoder"} and rows[0]["texts"] == {"d0": "all", "d1": "all"}
    for donor in ("d0", "d1"):
        before, after = (row["decoded"][donor] for row in rows)
        assert before["error"]["neuron"] < 0.3 and before["error"]["key"] < 0.15  # after one step about 0.9
        assert before["donor_loss"] == after["donor_loss"] > 5.4
        assert before["decoded_loss"] > 5.4 and after["decoded_loss"] < before["decoded_loss"] - 0.2


def test_the_report_counts_what_is_stored(zoo: Zoo, trained: Path) -> None:
    report = json.loads((trained / "autoencoder" / "report.json").read_text())
    model = load_autoencoder(trained / "autoencoder")
    stored = sum(p.numel() for p in model.field.parameters())
    assert report["numbers"]["field"] + report["numbers"]["network"] == stored
    assert report["numbers"]["field"] == field_numbers(model.sizes)
    donors, strings = read_training_donors(zoo, quiet=True)
    assert report["numbers"]["donors"] == sum(count_numbers(d) for d in donors)
    assert model.token_strings == strings and [d["name"] for d in model.config["donors"]] == ["d0", "d1"]


def test_the_pca_of_the_report_keeps_as_many_numbers_and_all_of_them_keep_the_donor(zoo: Zoo) -> None:
    donors, _ = read_training_donors(zoo, quiet=True)
    entries = {t: [d.tokens if t == "token" else d.blocks[t].flatten(0, -3) for d in donors] for t in TABLE_ROLES}
    for share in (0.2, 0.5):
        axes = pca_axes(donors, share)
        kept = sum(a.numel() + len(a) * sum(len(e) for e in entries[t]) for t, a in axes.items())
        assert kept == pytest.approx(share * sum(count_numbers(d) for d in donors), rel=0.05)
    errors = []
    for share in (0.2, 0.5, 9.0):
        found = pca_projection(donors[1], pca_axes(donors, share))
        whole = {"token": donors[1].tokens, **donors[1].blocks}
        errors.append({t: relative_error({"token": found.tokens, **found.blocks}[t], whole[t]) for t in whole})
    assert all(0.05 < b < a < 1 for a, b in zip(errors[0].values(), errors[1].values(), strict=True))
    assert max(errors[2].values()) < 1e-5  # as many axes as coordinates: the narrower donor itself


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def test_the_field_of_a_large_zoo_stores_a_share_of_it(zoo: Zoo) -> None:
    donors, strings = read_training_donors(zoo, quiet=True)
    weights = sum(d.donor.parameters for d in donors)
    small = field_sizes(donors, len(strings))
    assert small.bases == sum(d.shape.layers for d in donors) == 3  # a base for each block, as their texts are unknown
    plays = {"corpus": "plays"}
    with patch.dict(donors[0].donor.facts, plays), patch.dict(donors[1].donor.facts, plays):
        assert field_sizes(donors, len(strings)).bases == donors[0].shape.layers == 2  # of the larger one of their text
    with patch("autoencoder.donors.SMALL_ZOO", 1000):
        large = field_sizes(donors * 20, len(strings))
    assert field_numbers(large) <= SHARE * 20 * weights and large.bases > LEAST_BASES
    with patch("autoencoder.donors.SMALL_ZOO", 1000):
        assert field_sizes(donors, len(strings)).bases == LEAST_BASES
    assert (large.width, large.neurons, large.groups, large.head_dim) == (40, 53, 5, 8)
    first = base_blocks(donors, small)
    assert torch.equal(first[0]["neuron"], donors[0].blocks["neuron"][0])
    assert torch.equal(first[2]["neuron"], donors[1].blocks["neuron"][0])
    assert len(base_blocks(donors, replace(small, bases=1))) == 1


def test_an_interrupted_training_ends_with_the_same_bytes(zoo: Zoo, text: Path, trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "cut"
    for step in (1, 4, 6):  # of the reconstruction, of the second stage, of the third
        with interrupted_at(training._AutoencoderTrainer, step):
            train_tiny_autoencoder(zoo.path, out, text, resume=step > 1)
        assert (out / STATE_FILE).exists()
    with pytest.raises(UserError, match="--resume"):
        train_tiny_autoencoder(zoo.path, out, text)
    with pytest.raises(UserError, match="other settings"):
        train_tiny_autoencoder(zoo.path, out, text, replace(AUTOENCODER, seed=1), resume=True)
    (moved := tmp_path / "moved.txt").write_text(TEXT + "more")
    for other in (None, moved):
        with pytest.raises(UserError, match="other settings"):
            train_tiny_autoencoder(zoo.path, out, other, resume=True)
    moved.write_text(TEXT)
    train_tiny_autoencoder(zoo.path, out, moved, resume=True)  # its content counts, not its place
    assert (out / WEIGHTS).read_bytes() == (trained / "autoencoder" / WEIGHTS).read_bytes()
    found, expected = (json.loads((f / "report.json").read_text()) for f in (out, trained / "autoencoder"))
    assert found == expected
    assert not (out / STATE_FILE).exists()


def assert_same_training(found: Path, expected: Path) -> None:
    """The same losses and weights up to the order of sums."""
    for part, record in (("autoencoder", "report.json"), ("pipeline", "headstart.json")):
        losses = [json.loads((folder / part / record).read_text())["loss"] for folder in (found, expected)]
        assert losses[0] == pytest.approx(losses[1], abs=1e-5), part
        for path in (expected / part).rglob("*.safetensors"):
            one, other = load_file(found / path.relative_to(expected)), load_file(path)
            for name, tensor in other.items():
                torch.testing.assert_close(one[name], tensor, atol=2e-3, rtol=0, msg=f"{part} {name}")


def test_two_processes_train_what_one_trains(zoo: Zoo, text: Path, trained: Path, tmp_path: Path) -> None:
    fork(2, train_both, zoo.path, text, tmp_path)
    assert_same_training(tmp_path, trained)


def test_accumulated_parts_train_what_a_whole_batch_trains(
    zoo: Zoo, text: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    train_both(zoo.path, text, tmp_path)
    assert_same_training(tmp_path, trained)
    with pytest.raises(UserError, match="a batch of 3 windows cannot be shared by 2 processes and accumulated parts"):
        train_tiny_autoencoder(zoo.path, tmp_path / "odd", text, replace(AUTOENCODER, batch=3))


def test_mixed_precision_is_used(
    zoo: Zoo, text: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=False)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    try:
        train_both(zoo.path, text, tmp_path)
    finally:
        AcceleratorState._reset_state(reset_partial_state=False)
    for part, record in (("autoencoder", "report.json"), ("pipeline", "headstart.json")):
        one, other = (json.loads((f / part / record).read_text())["loss"] for f in (tmp_path, trained))
        assert one != other and one == pytest.approx(other, rel=0.03)


def test_a_step_is_a_function_of_the_seed_and_mixes_texts_as_latents(zoo: Zoo) -> None:
    donors, _ = read_training_donors(zoo, quiet=True)
    settings = replace(AUTOENCODER, mixing=1.0, batch=40)
    steps = [draw_step(settings, donors, i) for i in range(30)]
    assert steps == [draw_step(settings, donors, i) for i in range(30)]
    assert {step.shape for step in steps} >= {0, 1, 2} and all(len(step.donors) == 2 for step in steps)
    assert all(len(draw_step(replace(settings, mixing=0.0), donors, i).donors) == 1 for i in range(30))
    step = replace(steps[0], donors=(0, 1), share=0.25)
    windows = mixed_windows([torch.zeros(500).long(), torch.ones(500).long()], step, settings, 0)
    assert (
        windows.shape == (40, 17) and int((windows == 0).all(1).sum()) == 10 and int((windows == 1).all(1).sum()) == 30
    )


def test_early_checkpoints_are_trained_late_and_now_and_then(zoo: Zoo) -> None:
    donors, _ = read_training_donors(zoo, quiet=True)
    settings = AutoencoderTrainConfig(steps=1000, reconstruction=10, warmup=5, early=0.25, early_from=0.5)
    plain = [draw_step(settings, donors, i) for i in range(15, 1015)]
    assert plain == [draw_step(replace(settings, early=0.9), donors, i) for i in range(15, 1015)]  # no early ones
    with patch.dict(donors[1].donor.facts, {"step": 10, "steps": 20}):
        first = [draw_step(settings, donors, i).donors[0] for i in range(15, 1015)]
    with patch.dict(donors[0].donor.facts, {"step": 10, "steps": 20}):
        other = [draw_step(settings, donors, i).donors[0] for i in range(15, 1015)]
    for found, early in ((first, 1), (other, 0)):
        assert set(found[:500]) == {1 - early} and found[500:].count(early) == pytest.approx(125, abs=30)


def test_with_distill_the_donor_is_the_teacher(zoo: Zoo, trained: Path) -> None:
    donors, _ = read_training_donors(zoo, quiet=True)
    model, skeletons, first = load_autoencoder(trained / "autoencoder"), Skeletons(donors), donors[0]
    windows = byte_tokens(TEXT.encode())[:68].view(4, 17)
    latents = encode_donor(model, first)
    arguments = (model.field, latents, first, first.shape, skeletons, windows)
    with torch.no_grad():
        plain, distilled = written_loss(*arguments), written_loss(*arguments, distill=True)
        with patch.dict(first.donor.facts, {"step": 10, "steps": 20}):
            assert written_loss(*arguments) == distilled != plain  # as an early checkpoint
        teacher = donor_logits(first, skeletons, windows).softmax(-1)
    assert float(distilled) >= float(-(teacher * teacher.log()).sum(-1).mean())  # its entropy
    mixing = replace(AUTOENCODER, mixing=1.0)
    assert all(len(draw_step(replace(mixing, distill=True), donors, i).donors) == 1 for i in range(20))


def test_a_large_vocabulary_leaves_room_for_blocks(zoo: Zoo) -> None:
    donors, _ = read_training_donors(zoo, quiet=True)
    many = donors * 12
    weights = sum(d.donor.parameters for d in many)
    with patch("autoencoder.donors.SMALL_ZOO", 1000):
        small, large = field_sizes(many, 40), field_sizes(many, 3000)
    assert small.token_rank == 0 and small.table_rank("token") == 80 > large.table_rank("token") > 0
    assert field_numbers(large) <= SHARE * weights and large.bases > LEAST_BASES
    assert "token_rank" in large.to_json() and "token_rank" not in small.to_json()  # older folders have none


def test_the_text_of_a_donor_is_the_one_given_for_it_then_for_its_text_then_for_all(zoo: Zoo, tmp_path: Path) -> None:
    donors, _ = read_training_donors(zoo, quiet=True)
    files = {}
    for name in ("d0", "plays", "all"):
        files[name] = tmp_path / name
        files[name].write_text(f"the text of {name}. " * 500)
    with patch.dict(donors[1].donor.facts, {"corpus": "plays"}):
        found = texts.read_texts(donors, files, 0)
        assert [t.name for t in found] == ["d0", "plays"]
        assert [t.name for t in texts.read_texts(donors, {"all": files["all"]}, 0)] == ["all", "all"]
    for text in found:
        assert text.sample is not None and torch.equal(text.tokens, byte_tokens(text.sample))
        assert f"the text of {text.name}. ".encode() in text.sample
    files["all"].write_text("short")
    with pytest.raises(UserError, match=r"the text of d0 has 5 tokens; give at least 1024"):
        texts.read_texts(donors, {"all": files["all"]}, 0)


def test_coordinates_tell_known_texts_apart() -> None:
    def text(name: str, sample: bytes, known: bool = True) -> texts.DonorText:
        return texts.DonorText(name, byte_tokens(sample), sample, known)

    fox, code = TEXT.encode(), b"def f(x):\n    return {x: 1}\n" * 200
    read = [text("fox", fox), text("code", code), text("fox", fox), text("written", b"!" * 2000, known=False)]
    a, b, again, unknown = texts.text_coordinates(read, 8)
    assert a is not None and b is not None and again is not None and unknown is None
    assert len(a) == 1 and torch.equal(a, again) and float((a - b).abs()) > 2
    three = torch.stack([a, b, again])
    torch.testing.assert_close((three.mean(0), three.std(0, correction=0)), (torch.zeros(1), torch.ones(1)))
    assert texts.text_coordinates([text("one", fox), text("two", fox)], 8) == [None, None]
    assert texts.text_coordinates([text("one", fox)], 8) == [None]
    long = fox * 40  # texts are compared by their beginnings
    assert texts.text_coordinates([text("one", long), text("two", long + code)], 8) == [None, None]


def test_the_latent_of_a_model_says_its_text(zoo: Zoo, text: Path, tmp_path: Path) -> None:
    (tmp_path / "code.txt").write_text("def f(x):\n    return {x: 1}\n" * 200)
    config = replace(AUTOENCODER, reconstruction=120, warmup=1, steps=1)
    deviation = {}
    for name, second, weight in (
        ("one", text, 1.0),
        ("two", tmp_path / "code.txt", 1.0),
        ("unsaid", tmp_path / "code.txt", 0.0),
    ):
        given = replace(config, text_weight=weight, corpora={"d0": str(text), "d1": str(second)})
        folder = training.train_autoencoder(given, zoo.path, tmp_path / name, quiet=True)
        deviation[name] = float(load_autoencoder(folder).encoder.get_buffer("model_norm")[1, 0])
    assert deviation["one"] < 0.6 and abs(deviation["two"] - 1) < 0.2  # before all numbers get deviation 1
    assert deviation["unsaid"] < 0.6


def test_without_a_text_the_donors_write_one(zoo: Zoo) -> None:
    donors, _ = read_training_donors(zoo, quiet=True)
    with patch.object(texts, "SAMPLED", (4, 20)):
        found, again = (texts.read_texts(donors, {}, 0) for _ in range(2))
        other = texts.read_texts(donors, {}, 1)
    for i, donor in enumerate(donors):
        assert found[i].name == f"sampled from {donor.name}" and len(found[i].tokens) == 4 * 21
        assert int(found[i].tokens.min()) >= 0 and int(found[i].tokens.max()) < 256
        assert torch.equal(found[i].tokens, again[i].tokens) and not torch.equal(found[i].tokens, other[i].tokens)
        assert found[i].sample == bytes(found[i].tokens.tolist())


def test_texts_that_cannot_be_used_are_one_line(zoo: Zoo, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"no donor and no donor's text is called 'poems'; see `headstart zoo list`"):
        training.train_autoencoder(replace(AUTOENCODER, corpora={"poems": "x"}), zoo.path, out, quiet=True)
    with pytest.raises(UserError, match="no such file; give FILE, or NAME=FILE per donor or text"):
        train_tiny_autoencoder(zoo.path, out, tmp_path / "missing")
    words = make_zoo(tmp_path / "words", [dict(hidden_size=24, kv=2)])
    (tmp_path / "text.txt").write_text(TEXT)
    with pytest.raises(UserError, match="d0: has no tokenizer, so that no text can be read for it"):
        train_tiny_autoencoder(words.path, out, tmp_path / "text.txt")
    assert not list(out.glob("*.safetensors"))


def test_a_zoo_may_have_heads_of_several_sizes(tmp_path: Path) -> None:
    mixed = make_zoo(tmp_path, [dict(hidden_size=24, kv=2, head_dim=4), dict(hidden_size=32, kv=2, head_dim=8)])
    donors, strings = read_training_donors(mixed, quiet=False)
    assert [(d.name, d.shape.head_dim) for d in donors] == [("d1", 8), ("d0", 4)]
    sizes = field_sizes(donors, len(strings))
    own, smaller = (base_blocks([d], sizes)[0] for d in donors)
    assert sizes.head_dim == 8 and torch.equal(own["key"], donors[0].blocks["key"][0])
    # A plane of four frequencies takes that of the nearest of two: 0 and 1 the first, 2 and 3 the second.
    assert torch.equal(smaller["key"], donors[1].blocks["key"][0][:, [0, 0, 1, 1, 2, 2, 3, 3]])
    shapes = training_shapes(donors, new_autoencoder(sizes, strings, "llama", [], 0), 20, 0)
    assert {shape.head_dim for shape in shapes[PLAIN]} == {4, 8}
    report = json.loads((train_tiny_autoencoder(mixed.path, tmp_path / "out") / "report.json").read_text())
    assert set(report["decoded"]) == {"d0", "d1"} and all(r["decoded_loss"] < 6 for r in report["decoded"].values())


def test_the_method_decodes_a_donor_at_the_targets_shape(zoo: Zoo, trained: Path, tmp_path: Path) -> None:
    coder = trained / "autoencoder"
    target = Blueprint.from_pretrained_config(config(28, 2, layers=3, vocab_size=256))
    sampler = AutoencoderSampler(model=str(coder)).fit(zoo, target)
    assert sampler.donors == ("d0",)  # of the lowest loss
    assert sampler.planned_donors(zoo, target) == ("d0", "d1")
    first, second = dict(sampler.sample(target, 0)), dict(sampler.sample(target, 1))
    assert {n: tuple(t.shape) for n, t in first.items()} == {s.name: s.shape for s in target.specs}
    assert all(torch.equal(first[name], second[name]) for name in first)  # no random number is drawn
    sampler.save(tmp_path / "fitted")
    loaded = dict(AutoencoderSampler.load(tmp_path / "fitted").sample(target, 0))
    assert all(torch.equal(first[name], loaded[name]) for name in first)
    other = AutoencoderSampler(model=str(coder), donor="d1").fit(zoo, target)
    assert [d["name"] for d in other.provenance(zoo)] == ["d1", "d0"]
    assert not torch.equal(dict(other.sample(target))["lm_head.weight"], first["lm_head.weight"])
    with pytest.raises(UserError, match="unknown donor 'd9'"):
        AutoencoderSampler(model=str(coder), donor="d9").fit(zoo, target)
    with pytest.raises(UserError, match="vocabulary has 50 tokens, the autoencoder's has 256"):
        AutoencoderSampler(model=str(coder)).fit(zoo, Blueprint.from_pretrained_config(config(vocab_size=50)))


def test_diffusion_needs_the_autoencoder_of_its_zoo(trained: Path, tmp_path: Path) -> None:
    other = make_zoo(tmp_path, [dict(hidden_size=24, kv=2)])
    with pytest.raises(UserError, match="has other tokens, heads or families than the autoencoder; train one on this"):
        train_tiny_diffusion(other.path, trained / "autoencoder", tmp_path / "out")


def test_the_default_stages_add_up() -> None:
    settings = AutoencoderTrainConfig()
    assert settings.all_steps == settings.reconstruction + settings.warmup + settings.last_stage
    rates = [training.learning_rates(settings, step) for step in range(settings.all_steps)]
    second = rates[settings.reconstruction : settings.reconstruction + settings.warmup]
    assert all(bases == maps == 0 < network for network, bases, maps in second)  # the second stage keeps the bases
    for i, peak in enumerate((settings.lr, settings.bases_lr, settings.maps_lr)):
        third = [rate[i] for rate in rates[settings.reconstruction + settings.warmup :]]
        assert max(third) == pytest.approx(peak, rel=0.01) and third[-1] < 0.06 * peak


def test_characters_that_the_held_out_parts_cut_are_left_out() -> None:
    text = "žluťoučký kůň, 愛, 😀: x. ".encode() * 2000
    training_text, held = split_held_out(text)
    known = set(text.decode())
    with pytest.raises(UnicodeDecodeError):
        training_text.decode()
    for part in (training_text, held, text[:-1]):
        found = texts.whole_characters(part)
        new = [c for c in found.decode() if c not in known]  # two halves can make a character
        assert len(new) <= len(part) // 4096 and len(part) - len(found) < 6 * (2 + len(part) // 4096)
    assert len(texts.whole_characters(training_text)) < len(training_text)
    latin = "é".encode("latin-1") * 3000
    assert texts.whole_characters(latin) == latin  # its encoding is refused later, in one line
