"""Comparisons: their numbers against known answers, their files against the contract, their page parsed as HTML."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch

from headstart.report import scores
from headstart.report.comparison import render_comparison
from headstart.report.comparison_findings import caveats, headline
from tests.support.commands import compare
from tests.support.pages import assert_self_contained, parse_page
from zoo.errors import UserError
from zoo.training.corpora import python_reference

TARGET = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 256, "hidden_size": 16,
    "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
    "max_position_embeddings": 64, "tie_word_embeddings": False,
}  # fmt: skip
CONTRACT = (
    "lr", "lrs", "curves", "final_loss", "steps_to_threshold", "speedup", "step0_loss", "max_grad_norm", "donors",
    "donor_cost", "seconds", "novelty",
)  # fmt: skip


def run(
    method: str, seed: int, lr: float, losses: list[float], scale: float = 1.0, diverged: int | None = None
) -> dict:
    init = {"seconds": 1.0, "donors": [], "novelty": None, "novelty_note": "uses no donor"}
    steps = [0, 50, 100][: len(losses)]
    return {
        "method": method, "scale": scale, "seed": seed, "lr": lr, "steps": steps, "losses": losses,
        "max_grad_norm": 1.0 + seed, "diverged": diverged, "init": init, "grad_spikes": seed,
        "activation_rms": {"start": [1.0, 2.0], "end": [1.0, 3.0 + seed]},
    }  # fmt: skip


def test_crossing_is_interpolated_and_the_first() -> None:
    steps = [0, 10, 20, 30]
    assert scores.step_reaching(steps, [5.0, 3.0, 1.0, 0.5], 2.0) == 15.0
    assert scores.step_reaching(steps, [5.0, 3.0, 2.0, 0.5], 2.0) == 20.0
    assert scores.step_reaching(steps, [5.0, 1.0, 3.0, 1.0], 2.0) == 7.5
    assert scores.step_reaching(steps, [1.9, 3.0, 3.0, 1.0], 2.0) == 0.0
    assert scores.step_reaching(steps, [5.0, 4.0, 3.0, 2.1], 2.0) is None
    assert scores.step_reaching(steps, [5.0, 4.0, 3.0, 2.1], None) is None


def test_interval_is_students_t() -> None:
    # 1, 2, 3: sd 1, t(0.975, 2) = 4.30265
    stats = scores.interval([1.0, 2.0, 3.0])
    assert stats["mean"] == 2 and stats["std"] == 1
    assert stats["ci95"] == pytest.approx([2 - 4.30265 / math.sqrt(3), 2 + 4.30265 / math.sqrt(3)], abs=1e-4)
    assert scores.interval([2.0]) == {"mean": 2.0, "std": None, "ci95": None}


def test_speedup_is_geometric_and_needs_every_seed() -> None:
    fast = scores.speedup([100, 100], [10.0, 40.0])
    assert fast["mean"] == pytest.approx(5.0)
    assert fast["ci95"][0] * fast["ci95"][1] == pytest.approx(25.0)  # symmetric about the mean as a ratio
    assert scores.speedup([100, 100], [10.0, None]) == {"mean": None, "ci95": None}
    assert scores.speedup([100, 100], [0.0, 0.0])["mean"] == pytest.approx(100)


def test_evaluation_points_hold_both_ends() -> None:
    for steps in (1, 2, 7, 300, 5000):
        points = scores.evaluation_points(steps)
        assert points[0] == 0 and points[-1] == steps and points == sorted(set(points))
        assert 1 in points and len(points) <= 26


def test_scores_of_synthetic_curves() -> None:
    runs = [
        run("default", 0, 1e-3, [5.0, 4.0, 3.0]), run("default", 1, 1e-3, [5.0, 4.0, 3.2]),
        run("default", 0, 1e-2, [5.0, 3.0, 2.0]), run("default", 1, 1e-2, [5.0, 3.2, 2.2]),
        run("fast", 0, 1e-3, [4.0, 1.1, 1.0]), run("fast", 1, 1e-3, [4.0, 0.2, 1.2]),
        run("fast", 0, 1e-2, [4.0], diverged=3), run("fast", 1, 1e-2, [4.0, 0.5, 0.1]),
        run("slow", 0, 1e-3, [5.0, 4.0, 3.0]), run("slow", 1, 1e-3, [5.0, 4.0, 2.0]),
    ]  # fmt: skip
    threshold, methods = scores.score(runs, budget=100)
    assert list(methods) == ["default", "fast", "slow"]
    assert threshold == pytest.approx(2.1)  # the rate 1e-2 is better for the default
    default, fast, slow = methods.values()
    assert default["lr"] == 1e-2 and default["speedup"] == {"mean": 1.0, "ci95": None}
    assert default["lrs"] == {"0.001": pytest.approx(3.1), "0.01": pytest.approx(2.1)}
    assert fast["lr"] == 1e-3 and fast["lrs"]["0.01"] is None, "a rate at which one seed diverged is not eligible"
    assert fast["diverged"] == [{"lr": 1e-2, "scale": 1.0, "seed": 0, "step": 3}]
    expected = [50 * 1.9 / 2.9, 50 * 1.9 / 3.8]
    assert fast["steps_to_threshold"] == {"mean": pytest.approx(sum(expected) / 2), "per_seed": pytest.approx(expected)}
    assert fast["speedup"]["mean"] == pytest.approx(100 / math.sqrt(expected[0] * expected[1]))
    assert fast["final_loss"]["mean"] == pytest.approx(1.1) and fast["max_grad_norm"] == 2.0
    assert fast["difference"]["mean"] == pytest.approx(-1.0)
    assert fast["grad_spikes"] == 0.5 and fast["activation_rms"] == {"start": [1.0, 2.0], "end": [1.0, 3.5]}
    assert slow["steps_to_threshold"]["per_seed"] == [None, pytest.approx(97.5)]
    assert slow["steps_to_threshold"]["mean"] is None and slow["speedup"]["mean"] is None


def test_steps_to_several_thresholds() -> None:
    runs = [
        run("default", 0, 1e-3, [5.0, 4.0, 3.0]), run("default", 1, 1e-3, [5.0, 4.0, 3.0]),
        run("fast", 0, 1e-3, [4.75, 3.0, 2.0]), run("fast", 1, 1e-3, [4.5, 3.5, 3.25]),
    ]  # fmt: skip
    _, methods = scores.score(runs, budget=100)
    default, fast = (methods[name]["thresholds"] for name in ("default", "fast"))
    assert {at: found["loss"] for at, found in fast.items()} == {"0.25": 4.5, "0.5": 4.0, "1": 3.0}
    assert fast["0.25"]["steps"] == [pytest.approx(50 * 0.25 / 1.75), 0.0]
    assert fast["0.25"]["ratio"]["mean"] == pytest.approx(math.sqrt(25 / (50 * 0.25 / 1.75) * 25))
    assert fast["0.5"]["ratio"]["mean"] == pytest.approx(50 / math.sqrt(50 * 0.75 / 1.75 * 25))
    assert fast["1"]["steps"] == [50.0, None] and fast["1"]["ratio"]["mean"] is None
    assert default["1"]["ratio"]["mean"] == 1.0 and fast["0.5"]["ratio"]["ci95"][0] < 2


def test_a_default_whose_loss_rises_again_has_speed_up_one() -> None:
    """Its loss at half of its steps was reached before; that is where the ratio counts from."""
    runs = [run("default", 0, 1e-3, [5.0, 3.0, 4.0, 2.0]), run("other", 0, 1e-3, [4.0, 3.5, 3.0, 2.0])]
    runs = [r | {"steps": [0, 20, 50, 100]} for r in runs]
    _, methods = scores.score(runs, budget=100)
    default, other = (methods[name]["thresholds"]["0.5"] for name in ("default", "other"))
    assert default["loss"] == 4.0 and default["steps"] == [pytest.approx(10.0)]
    assert default["ratio"]["mean"] == pytest.approx(1.0)
    assert other["ratio"]["mean"] == pytest.approx(10.0), "as if in one step, of ten and not of fifty"


def test_the_default_is_tuned_over_its_scale() -> None:
    runs = [run("default", 0, 1e-3, [5.0, 4.0, 3.0]), run("default", 0, 1e-3, [5.0, 4.0, 2.5], scale=2.0)]
    threshold, methods = scores.score(runs, budget=100)
    assert threshold == 2.5 and methods["default"]["scale"] == 2.0
    assert methods["default"]["scales"] == {"1": {"0.001": 3.0}, "2": {"0.001": 2.5}}


def test_tuned_on_the_first_seeds() -> None:
    runs = [
        run("default", 0, 1e-3, [5.0, 4.0, 3.0]), run("default", 0, 1e-2, [5.0, 4.0, 3.5]),
        run("default", 1, 1e-3, [5.0, 4.0, 3.4]),
        run("wild", 0, 1e-3, [5.0, 4.0, 1.0]), run("wild", 1, 1e-3, [5.0, 4.0], diverged=60),
    ]  # fmt: skip
    threshold, methods = scores.score(runs, 100, tuning=[0])
    assert methods["default"]["lr"] == 1e-3 and methods["default"]["lrs"] == {"0.001": 3.0, "0.01": 3.5}
    assert threshold == pytest.approx(3.2)  # the mean over both seeds
    assert methods["wild"]["final_loss"]["mean"] is None and methods["wild"]["speedup"]["mean"] is None
    assert methods["wild"]["diverged"] == [{"lr": 1e-3, "scale": 1.0, "seed": 1, "step": 60}]


def test_spikes_stand_out_of_the_steps_before() -> None:
    norms = [1.0] * 30 + [5.0] + [1.0] * 30 + [2.9] + [1.0] * 10
    assert scores.count_gradient_spikes(norms) == 1
    assert scores.count_gradient_spikes([2.0**i for i in range(15)]) == 0, "too few steps to say"
    assert scores.count_gradient_spikes([1.0] * 20 + [4.0] * 40) == 10, (
        "a new level is one no longer once it fills half the window"
    )


def test_everything_diverged() -> None:
    runs = [run("default", 0, 1.0, [5.0], diverged=2), run("other", 0, 1.0, [5.0, 4.0, 3.0])]
    threshold, methods = scores.score(runs, budget=100)
    assert threshold is None and methods["default"]["lr"] is None
    assert methods["other"]["steps_to_threshold"]["mean"] is None


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_bytes(python_reference()[:40_000])
    return path


@pytest.fixture(scope="module")
def donors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A zoo of two donors that were trained for a moment, wider and narrower than the target."""
    from zoo.training.embedded_zoo import train_zoo
    from zoo.training.recipes import DonorRecipe

    zoo = tmp_path_factory.mktemp("zoo") / "zoo"
    wide = DonorRecipe(32, 1, heads=4, kv_heads=2, head_dim=8, ffn=64, steps=60, lr=1e-2)
    narrow = DonorRecipe(8, 1, heads=1, kv_heads=1, head_dim=8, ffn=16, steps=5)
    train_zoo(zoo, [wide, narrow], workers=1, quiet=True)
    return zoo


def settings(donors: Path, corpus: Path) -> dict:
    return {
        "target": TARGET, "zoo": donors, "methods": ["default", "weight-selection"], "corpus": corpus, "steps": 12,
        "seeds": [0, 1], "lrs": [1e-3, 1e-2], "donor": "nursery-w32-l1-h4-kv2-s0", "batch_size": 4, "sequence": 32,
        "windows": 8, "workers": 1, "default_scales": [1.0], "quiet": True,
    }  # fmt: skip


@pytest.fixture(scope="module")
def compared(donors: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("compare") / "out"
    compare(out=out, command="headstart compare <made-up>", **settings(donors, corpus))
    return out


def test_files_are_those_of_the_contract(compared: Path) -> None:
    assert sorted(p.name for p in compared.iterdir()) == ["losses.png", "report.html", "results.json", "runs"]
    results = json.loads((compared / "results.json").read_text())
    assert {"target", "corpus", "steps", "seeds", "threshold", "methods"} <= set(results)
    assert list(results["methods"]) == ["default", "weight-selection"]
    for method in results["methods"].values():
        assert set(CONTRACT) <= set(method)
        assert sorted(method["lrs"]) == ["0.001", "0.01"]
        assert [c["seed"] for c in method["curves"]] == [0, 1]
        for curve in method["curves"]:
            assert curve["steps"] == scores.evaluation_points(12) and len(curve["losses"]) == len(curve["steps"])
        finals = [c["losses"][-1] for c in method["curves"]]
        assert method["final_loss"]["mean"] == pytest.approx(sum(finals) / 2)
        assert method["lrs"][f"{method['lr']:g}"] == pytest.approx(min(method["lrs"].values()))
    assert results["threshold"] == results["methods"]["default"]["final_loss"]["mean"]
    selected = results["methods"]["weight-selection"]
    assert [d["name"] for d in selected["donors"]] == ["nursery-w32-l1-h4-kv2-s0"]
    assert selected["donor_cost"] == 6 * selected["donors"][0]["parameters"] * 60 * 4 * 64
    assert selected["step0_loss"] < results["methods"]["default"]["step0_loss"]
    assert (compared / "losses.png").read_bytes()[:4] == b"\x89PNG"


def test_the_run_is_what_a_user_would_do(compared: Path, donors: Path, corpus: Path, tmp_path: Path) -> None:
    """generate, from_pretrained, and a plain loop of torch over the same batches end at the very same loss."""
    from transformers import AutoModelForCausalLM

    from tests.support.commands import generate
    from zoo.streams import stream_seed
    from zoo.training.loop import TrainingConfig as T
    from zoo.training.loop import evaluate, sample_windows
    from zoo.vocabulary import byte_tokens

    generate(TARGET, "default", tmp_path / "init", seed=1, dtype="float32", quiet=True)
    tokens = byte_tokens(corpus.read_bytes())
    learned, held = tokens[: int(len(tokens) * 0.9)], tokens[int(len(tokens) * 0.9) :]
    training = T(12, 1e-2, 4, 32, seed=stream_seed(1, "compare"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "init")
    decayed = [p for p in model.parameters() if p.ndim > 1]
    free = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": free, "weight_decay": 0.0}], betas=(0.9, 0.95)
    )
    for step in range(12):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * max(0, step - 1) / 10)))
        window = sample_windows(learned, 4, 32, training.seed, step)
        # transformers shifts the labels itself: this is the loss of the tokens 1 to 32
        optimizer.zero_grad()
        model(input_ids=window, labels=window).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    final = evaluate(model, held, 32, limit=8)
    torch.set_num_threads(threads)
    (record,) = (compared / "runs").glob("default-s1-lr0.01-*.json")
    assert json.loads(record.read_text())["losses"][-1] == pytest.approx(final, abs=2e-4)


def test_a_second_call_trains_nothing_and_lost_runs_come_back(compared: Path, donors: Path, corpus: Path) -> None:
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in (compared / "runs").iterdir()}
    lost = sorted(before)[0]
    (compared / "runs" / lost).unlink()
    results = compare(out=compared, command="headstart compare <made-up>", **settings(donors, corpus))
    after = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in (compared / "runs").iterdir()}
    assert set(after) == set(before)
    assert {n for n in after if after[n][1] != before[n][1]} == {lost}
    again, first = json.loads(after[lost][0]), json.loads(before[lost][0])
    assert (again["steps"], again["losses"], again["max_grad_norm"]) == (
        first["steps"], first["losses"], first["max_grad_norm"],
    )  # fmt: skip
    assert results["steps"] == 12


def test_two_workers_give_the_same_numbers(compared: Path, donors: Path, corpus: Path, tmp_path: Path) -> None:
    small = settings(donors, corpus) | {"lrs": [1e-2], "methods": ["default"]}
    compare(out=tmp_path / "out", **small | {"workers": 2})
    for path in (tmp_path / "out" / "runs").iterdir():
        ours = json.loads((compared / "runs" / path.name).read_text())  # the same names: the same settings
        assert json.loads(path.read_text())["losses"] == ours["losses"]


def test_report_is_self_contained_and_complete(compared: Path) -> None:
    html = (compared / "report.html").read_text()
    results = json.loads((compared / "results.json").read_text())
    parsed = parse_page(html)
    text = " ".join(parsed.text)
    assert_self_contained(html)
    for name, method in results["methods"].items():
        assert name in text and f"{method['final_loss']['mean']:.3f}" in text
    assert "headstart compare <made-up>" in text, "commands are escaped"
    assert "nursery-w32-l1-h4-kv2-s0" in text and headline(results) in text
    assert html.count("<svg") == 3


def test_report_escapes_and_warns() -> None:
    runs = [run("default", 0, 1e-3, [5.0, 4.0, 3.0]), run("a<b>&c", 0, 1e-3, [2.0, 1.0, 0.5])]
    threshold, methods = scores.score(runs, budget=100)
    for entry in methods.values():
        entry |= {"summary": "<script>alert(1)</script>", "reference": "", "options": {"x": "<i>"}}
    results = {
        "target": TARGET | {"model_type": "<u>"}, "parameters": 10, "threshold": threshold, "methods": methods,
        "corpus": {"name": "<tt>.txt", "sha256": "", "tokens": 1000, "held_out": 100, "tokenizer": "bytes"},
        "steps": 100, "seeds": [0], "tuning_seeds": [0], "refused": {"<b>big": "too <wide>"},
        "grid": [1e-3], "batch_size": 1, "sequence": 8, "windows": 2, "device": "cpu",
        "command": None,
    }  # fmt: skip
    html = render_comparison(results)
    text = " ".join(parse_page(html).text)
    assert "a<b>&c" in text and "<script>alert(1)</script>" in text and "<u>" in text and "<tt>.txt" in text
    assert "Left out: <b>big. It cannot fill this target: too <wide>." in text
    warned = "\n".join(caveats(results))
    assert "One seed" in warned and "Only one learning rate" in warned and "within the first step" in warned
    assert "cannot exclude noise" in headline(results)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"methods": ["default", "weight-selektion"]}, "did you mean 'weight-selection'"),
        ({"seeds": [0, 0]}, "--seeds"),
        ({"lrs": [0.0]}, "--lrs"),
        ({"sequence": 65}, "positions"),
        ({"target": TARGET | {"vocab_size": 2000}}, "--tokenizer"),  # too many for padding
        ({"corpus": Path("nowhere.txt")}, "nowhere.txt"),
        ({"sequence": 0}, "--sequence 0"),
        ({"batch_size": 0}, "--batch-size 0"),
        ({"steps": 0}, "--steps 0"),
        ({"lrs": [math.nan, 1e-3]}, "--lrs"),
        ({"lrs": [-1.0]}, "--lrs"),
        ({"seeds": []}, "--seeds"),
        ({"default_scales": [2.0]}, "--default-scales"),
        ({"target": TARGET | {"model_type": "vit", "architectures": ["ViTModel"]}}, "language model"),
        ({"methods": ["diffusion"], "donor": None, "model": "nosuch pipe"}, "--model nosuch pipe"),
        ({"donor": "nursery-w8-l1-h1-kv1-s0"}, "16"),  # narrower than the target
    ],
)
def test_bad_input_is_refused_before_training(
    donors: Path, corpus: Path, tmp_path: Path, change: dict, says: str
) -> None:
    with pytest.raises(UserError, match=re.escape(says)):
        compare(out=tmp_path / "out", **settings(donors, corpus) | change)
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def pipeline(donors: Path) -> Path:
    from tests.support.generators import train_tiny_autoencoder, train_tiny_diffusion

    made = train_tiny_autoencoder(donors, donors.parent / "autoencoder")
    return train_tiny_diffusion(donors, made, donors.parent / "pipeline")


GPT2 = {
    "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 256, "n_embd": 16, "n_head": 2,
    "n_layer": 1, "n_positions": 64,
}  # fmt: skip


@pytest.mark.parametrize("method", ["diffusion", "autoencoder"])
def test_what_a_trained_model_does_not_fit_is_refused_before_training(
    donors: Path, corpus: Path, pipeline: Path, tmp_path: Path, method: str
) -> None:
    given = settings(donors, corpus) | {"methods": [method], "model": pipeline, "donor": None}
    with pytest.raises(UserError, match="target"):
        compare(out=tmp_path / "out", **given | {"target": GPT2})
    with pytest.raises(UserError, match=r"no such folder|holds no"):
        compare(out=tmp_path / "out", **given | {"model": tmp_path})
    assert not (tmp_path / "out").exists()


def test_other_coordinates_have_no_distance_and_the_page_says_so(
    donors: Path, corpus: Path, pipeline: Path, tmp_path: Path
) -> None:
    small = {"methods": ["default", "diffusion"], "model": pipeline, "donor": None, "steps": 1, "seeds": [0]}
    results = compare(out=tmp_path / "out", **settings(donors, corpus) | small | {"lrs": [1e-3]})
    entry = results["methods"]["diffusion"]
    assert entry["donors"] and entry["novelty"] is None and "canonical form" in entry["novelty_note"]
    text = " ".join(parse_page((tmp_path / "out" / "report.html").read_text()).text)
    assert f"diffusion: {entry['novelty_note']}" in text


def test_tokens_are_matched_by_the_strings_of_the_targets_tokenizer(donors: Path, corpus: Path, tmp_path: Path) -> None:
    """A tokenizer with the donor's tokens in reverse order: a method that goes by ids would start at chance."""
    from zoo.vocabulary import BYTE_VOCAB, byte_tokenizer, save_byte_tokenizer

    save_byte_tokenizer(tmp_path)
    content = json.loads(byte_tokenizer().to_str())
    content["model"]["vocab"] = {token: BYTE_VOCAB - 1 - i for token, i in content["model"]["vocab"].items()}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    small = settings(donors, corpus) | {"steps": 1, "seeds": [0], "lrs": [1e-3]}
    plain = compare(out=tmp_path / "plain", **small)
    other = compare(out=tmp_path / "other", **small | {"tokenizer": tmp_path})
    losses = [r["methods"]["weight-selection"]["step0_loss"] for r in (plain, other)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
    (tmp_path / "config.json").write_text(json.dumps(TARGET))
    (tmp_path / "tokenizer.json").rename(tmp_path / "vocab.json")
    with pytest.raises(UserError, match="the tokenizer cannot be used"):
        compare(out=tmp_path / "slow", **small | {"target": tmp_path})


def test_tuning_on_one_seed_runs_the_others_at_what_was_chosen(donors: Path, corpus: Path, tmp_path: Path) -> None:
    given = settings(donors, corpus) | {"methods": ["normal"], "donor": None, "default_scales": [1.0, 4.0]}
    results = compare(out=tmp_path / "one", **given, tuning_seeds=1)
    normal = results["methods"]["normal"]
    assert [c["seed"] for c in normal["curves"]] == [0, 1] and set(normal["lrs"]) == {"0.001", "0.01"}
    assert len(list((tmp_path / "one" / "runs").glob("default-*"))) == 2 * 2 + 1
    assert len(list((tmp_path / "one" / "runs").glob("normal-*"))) == 2 + 1
    assert "final loss over the first seed, all from one grid" in (tmp_path / "one" / "report.html").read_text()
    with pytest.raises(UserError, match="--tuning-seeds 9"):
        compare(out=tmp_path / "two", **given, tuning_seeds=9)


def test_what_refuses_can_be_left_out(donors: Path, corpus: Path, tmp_path: Path) -> None:
    given = settings(donors, corpus) | {"methods": ["pruning", "normal"], "donor": None, "seeds": [0], "lrs": [1e-2]}
    wide = TARGET | {"hidden_size": 64, "intermediate_size": 96}
    with pytest.raises(UserError):
        compare(out=tmp_path / "all", **given | {"target": wide})
    results = compare(out=tmp_path / "some", **given | {"target": wide}, keep_going=True)
    assert list(results["methods"]) == ["default", "normal"] and list(results["refused"]) == ["pruning"]
    assert "Left out: pruning" in (tmp_path / "some" / "report.html").read_text()
    with pytest.raises(UserError, match="weight-selection"):
        compare(out=tmp_path / "typo", **given | {"methods": ["weight-selektion"]}, keep_going=True)


def test_variants_of_a_method(donors: Path, corpus: Path, tmp_path: Path) -> None:
    small = settings(donors, corpus) | {"seeds": [0], "lrs": [1e-2], "methods": ["default:scale=3"]}
    results = compare(out=tmp_path / "out", **small)
    assert list(results["methods"]) == ["default", "default:scale=3"]
    variant = results["methods"]["default:scale=3"]
    assert variant["options"] == {"scale": "3"}
    assert variant["curves"] != results["methods"]["default"]["curves"]
    with pytest.raises(UserError, match="NAME:KEY=VALUE"):
        compare(out=tmp_path / "out", **small | {"methods": ["default:scale"]})


def test_a_folder_of_something_else_is_left_alone(donors: Path, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="holds no comparison"):
        compare(out=tmp_path, **settings(donors, corpus))
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_the_names_of_runs_stay_so_that_older_comparisons_continue() -> None:
    from headstart.compare.run_files import run_path
    from headstart.compare.settings import Trial, TrialSettings

    labels = {"default": {}, "normal:rescale=none": {"rescale": "none"}, "weight-selection": {}}
    shared = TrialSettings(
        target={"model_type": "llama", "hidden_size": 16}, zoo="z", donor="d", model="m", tokenizer=None, text="t",
        method_options=labels, steps=12, batch_size=4, sequence=32, windows=8, device="cpu", threads=1, tokens="x",
        runs="runs", fingerprint={"tokens": "a", "zoo": "b", "model": "c"},
    )  # fmt: skip
    names = [
        run_path(shared, Trial(label, 1, scale, (1e-3,)), 1e-3).name
        for label, scale in (("default", 2.0), ("normal:rescale=none", 1.0), ("weight-selection", 1.0))
    ]
    assert names == [
        "default-s1-lr0.001-7134b67f7f638afa.json",
        "normal-s1-lr0.001-ba1f39d8ccb956ea.json",
        "weight-selection-s1-lr0.001-7c04a7760de4cb9e.json",
    ]


def test_a_given_text_is_that_of_every_method_that_takes_one(donors: Path, corpus: Path, tmp_path: Path) -> None:
    from headstart.compare import compare as module
    from headstart.compare.inputs import read_inputs
    from headstart.compare.run_files import run_path
    from headstart.compare.settings import Trial
    from headstart.compare.starts import starts_of
    from headstart.config import CompareConfig

    (tmp_path / "text.txt").write_text("another text than the corpus")
    (tmp_path / "config.json").write_text(json.dumps(TARGET))
    shared = {"target": tmp_path / "config.json", "methods": ("default", "sliced"), "corpus": corpus, "zoo": donors}
    names = {}
    for text in (None, tmp_path / "text.txt"):
        config = CompareConfig(**shared, out=tmp_path / "out", text=text, device="cpu")  # type: ignore[arg-type]
        settings = read_inputs(config).settings
        names[text] = [run_path(settings, Trial(label, 0, 1.0, (1e-3,)), 1e-3).name for label in ("default", "sliced")]
    plain, given = names.values()
    assert plain[0] == given[0] and plain[1] != given[1]  # the default takes no text
    with pytest.raises(UserError, match=r"nowhere: no such corpus"):
        read_inputs(CompareConfig(**shared, out=tmp_path / "out", text=tmp_path / "nowhere", device="cpu"))  # type: ignore[arg-type]

    seen: list[dict[str, object]] = []

    def watch(config: CompareConfig, inputs: object) -> object:
        seen.append(starts_of(inputs.settings).method_options("sliced"))  # type: ignore[attr-defined]
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "_list_trials", watch)
        module.compare(config, quiet=True)
    assert seen == [{"text": str(tmp_path / "text.txt")}]
