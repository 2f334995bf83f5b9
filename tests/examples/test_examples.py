"""The examples run as a user runs them, and their tables say what their text says."""

from __future__ import annotations

import gzip
import importlib.util
import json
import runpy
import struct
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.commands import generate
from zoo.vocabulary import save_byte_tokenizer

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "mean_field_mlp.py"
LORA, REPORT = SCRIPT.with_name("lora_inits.py"), SCRIPT.with_name("lora_report.py")


def script(path: Path = SCRIPT) -> ModuleType:
    """The script as a module, without running it."""
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))  # where it finds the files beside it
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def rows(output: str) -> dict[int, dict[str, str]]:
    """hidden N -> column -> cell."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in output.splitlines() if line.startswith("|")]
    return {int(cells[0]): dict(zip(lines[0], cells, strict=True)) for cells in lines[2:]}


def source_accuracy(output: str) -> float:
    return float(output.partition("accuracy ")[2].split()[0].rstrip("."))


def test_mean_field_mlp_on_digits(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = "--hidden 64 --widths 32 128 --retrain 128 --steps 160 --draws 2"
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *words.split()])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert end.value.code == 0
    output = capsys.readouterr().out
    assert "No --mnist given: this is scikit-learn's digits." in output
    source, table = source_accuracy(output), rows(output)
    assert source > 0.9 and set(table) == {32, 128}
    assert float(table[128]["balanced, n/N"]) == source
    assert all(float(table[n]["balanced, n/N"]) > float(table[n]["uncoupled"]) + 0.2 for n in table)
    assert float(table[128]["uncoupled"]) < 0.3
    assert table[32]["steps from default"] == ""
    sampled, default = (table[128][f"steps from {start}"].split(" / ") for start in ("row-column", "default"))
    assert len(sampled) == len(default) == 3
    for ours, theirs in zip(sampled, default, strict=True):
        assert theirs.startswith(">") or int(ours) < int(theirs)


def test_mean_field_mlp_on_mnist(shared_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = shared_data / "vision" / "mnist.npz"
    small = ["--hidden", "16", "--widths", "32", "--retrain", "--steps", "100", "--draws", "1"]
    assert script().main(["--mnist", str(path), *small]) == 0
    output = capsys.readouterr().out
    assert output.startswith("MNIST, source 784-16-16-10")
    assert source_accuracy(output) > 0.7
    table = rows(output)
    assert float(table[32]["balanced, n/N"]) == source_accuracy(output) > float(table[32]["uncoupled"]) + 0.3


def test_npz_and_idx_files_give_the_same_data(tmp_path: Path) -> None:
    draws = np.random.default_rng(0)
    arrays = {
        "train-images-idx3": draws.integers(0, 256, (7, 28, 28), dtype=np.uint8),
        "train-labels-idx1": draws.integers(0, 10, 7, dtype=np.uint8),
        "t10k-images-idx3": draws.integers(0, 256, (3, 28, 28), dtype=np.uint8),
        "t10k-labels-idx1": draws.integers(0, 10, 3, dtype=np.uint8),
    }
    for stem, array in arrays.items():
        raw = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()
        if stem.endswith("idx3"):
            (tmp_path / f"{stem}-ubyte").write_bytes(raw)
        else:
            (tmp_path / f"{stem}-ubyte.gz").write_bytes(gzip.compress(raw))
    keys = ("x_train", "y_train", "x_test", "y_test")
    x_train, y_train, x_test, y_test = arrays.values()
    np.savez(tmp_path / "mnist.npz", x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)
    example = script()
    for data in (example.load_mnist(tmp_path), example.load_mnist(tmp_path / "mnist.npz")):
        for key, array in zip(keys, arrays.values(), strict=True):
            expected = array.reshape(len(array), -1) / 255 if key.startswith("x") else array
            np.testing.assert_allclose(getattr(data, key).numpy(), expected, rtol=1e-6)


def test_other_files_than_mnist_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, archive, folder = tmp_path / "notes.txt", tmp_path / "other.npz", tmp_path / "folder"
    text.write_text("nothing")
    np.savez(archive, x_train=np.zeros((2, 28, 28), np.uint8), y_train=np.zeros(2, np.uint8))
    folder.mkdir()
    cut = folder / "train-images-idx3-ubyte"
    cut.write_bytes(struct.pack(">BBBB3I", 0, 0, 8, 3, 60000, 28, 28))
    for path, reason in {
        text: "is not an .npz file",
        archive: "has no x_test, y_test",
        tmp_path / "missing.npz": "does not exist",
        folder: "is not in the IDX format, or cut off",
        tmp_path: "has no train-images-idx3-ubyte",
    }.items():
        assert script().main(["--mnist", str(path)]) == 2
        error = capsys.readouterr().err
        assert reason in error and error.count("\n") == 1


def test_lora_inits_in_miniature(shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("peft")
    pytest.importorskip("lm_eval")
    example, work = script(LORA), tmp_path / "work"
    readme = example.README.read_text()
    corpus = tmp_path / "corpus.txt"
    corpus.write_bytes((shared_data / "corpora" / "tinyshakespeare.txt").read_bytes()[:300_000])
    words = ["--data", str(shared_data), "--corpus", str(corpus), "--work", str(work), "--quick"]
    assert example.main(words) == 0
    output = capsys.readouterr().out
    found = json.loads((work / "lora_inits.json").read_text())
    assert found["settings"]["seeds"] == [0, 1] and set(found["inits"]) == {"peft-default", "pareto, A_only"}
    default, pareto = found["inits"].values()
    for entry in (default, pareto):
        assert entry["before"] == [pytest.approx(default["before"][0])] * 2  # B is zero: both begin at the base
        assert entry["loss"]["mean"] == pytest.approx(np.mean(entry["losses"]))
        assert entry["loss"]["mean"] < found["base"]["loss"] - 1
    assert len({*default["losses"], *pareto["losses"]}) == 4
    differences = [p - d for p, d in zip(pareto["losses"], default["losses"], strict=True)]
    assert pareto["difference"]["mean"] == pytest.approx(np.mean(differences))
    assert found["verdict"] in output and "| pareto, A_only | 0.01 |" in output
    assert "reference weight mlp.gate" in " ".join(output.split()) and "| 44 |" in output
    assert example.README.read_text() == readme  # a miniature is not for the README

    rows = (work / "runs.jsonl").read_text().splitlines()
    assert len(rows) == 5 + 5
    (work / "runs.jsonl").write_text("\n".join(rows[:-1]) + "\n" + rows[-1][:40])  # interrupted while writing a line
    assert example.main(words) == 0
    again = json.loads((work / "lora_inits.json").read_text())
    assert len((work / "runs.jsonl").read_text().splitlines()) == 11
    assert {**again, "seconds": 0} == {**found, "seconds": 0}


def test_lora_inits_statistics() -> None:
    from scipy.stats import ttest_rel

    example = script(REPORT)
    draws = np.random.default_rng(0)
    ours, theirs = draws.normal(size=5) - 0.5, draws.normal(size=5)
    cell = example.paired_test(ours, theirs)
    reference = ttest_rel(ours, theirs)
    assert cell["p"] == pytest.approx(reference.pvalue)
    assert cell["ci95"] == pytest.approx(list(reference.confidence_interval()))
    assert cell["d"] == pytest.approx(reference.statistic / np.sqrt(5))
    assert example.paired_test([1.0], [2.0])["p"] is None and example.paired_test([1.0, 1.0], [1.0, 1.0])["p"] == 1.0
    # Holm (1979): smallest times 4, next times 3, …, never decreasing
    corrected = example.holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert corrected == pytest.approx({"d": 0.02, "a": 0.03, "c": 0.06, "b": 0.06})
    assert example.holm({"a": 0.02, "b": None}) == {"a": 0.04, "b": None}
    table = example.published_result()
    assert round(table["fisher_p"], 2) == 0.17
    for row in table["rows"].values():
        assert round(row["right"] / table["questions"], 4) == row["accuracy"]


def figures(shift: float, noise: float) -> dict[str, Any]:
    """What the example writes, where pareto ends `shift` from PEFT's default."""
    example = script(REPORT)
    draws = np.random.default_rng(1)
    default = 3 + 0.05 * draws.normal(size=5)
    entries: dict[str, Any] = {}
    for name in ("peft-default", "pareto, A_only"):
        losses = list(default + (0 if name == "peft-default" else shift + noise * draws.normal(size=5)))
        entries[name] = {
            "method": name.split(",")[0], "lr": 0.01, "edge": False, "losses": losses,
            "loss": example.interval(losses), "accuracies": {"PIQA": [0.5] * 5},
            "accuracy": {"PIQA": example.interval([0.5] * 5)},
        }  # fmt: skip
    example.add_tests(entries, ["PIQA"])
    return {"inits": entries, "settings": {"seeds": [0, 1, 2, 3, 4]}}


def test_verdict_of_lora_inits() -> None:
    verdict = script(REPORT).verdict
    assert verdict(figures(-0.1, 0.01)).startswith(
        "Reshaping helps here: pareto, A_only ends significantly below PEFT's"
    )
    none = verdict(figures(0.0, 0.01))
    assert none.startswith("No gain from reshaping is seen: ") and "over 5 seeds" in none
    assert "No accuracy of a pareto strategy differs significantly" in none
    worse = verdict(figures(0.1, 0.01))
    assert worse.startswith("No gain from reshaping is seen: ")
    assert "pareto, A_only ends significantly above the default" in worse


def test_largest_plausible_gain_of_several_strategies() -> None:
    largest_plausible_gain = script(REPORT).largest_plausible_gain
    # five differences of mean -0.01 and sd 0.02: t(0.975, 4) = 2.7764, and for one of two t(0.9875, 4) = 3.4954
    half = 2.7764 * 0.02 / 5**0.5
    one = {"difference": {"mean": -0.01, "ci95": [-0.01 - half, -0.01 + half]}}
    other = {"difference": {"mean": 0.05, "ci95": [0.05 - half, 0.05 + half]}}
    assert largest_plausible_gain([one], 5) == pytest.approx(0.01 + half)
    assert largest_plausible_gain([one, other], 5) == pytest.approx(0.01 + 3.4954 * 0.02 / 5**0.5, rel=1e-3)
    assert largest_plausible_gain([other], 5) == 0.0


def test_committed_lora_table_matches_its_results() -> None:
    example = script(LORA)
    found = json.loads(example.RESULTS.read_text())
    text = example.README.read_text()
    assert example.fill_mark(text, example.table(found)) == text
    assert example.verdict(found) == found["verdict"]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Generated weights with the byte tokenizer, and a text beside them."""
    folder = tmp_path_factory.mktemp("pretrain")
    target = folder / "target"
    target.mkdir()
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    config = {"model_type": "llama", "vocab_size": 256, "max_position_embeddings": 64, **sizes}
    (target / "config.json").write_text(json.dumps(config | {"bos_token_id": None, "eos_token_id": None}))
    save_byte_tokenizer(target)
    (folder / "text.txt").write_text("".join(f"The cat number {i} sleeps on the mat. \n" for i in range(400)))
    return generate(target, "default", folder / "start")


def test_generated_weights_train_on_and_continue(start: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pretrain = script(SCRIPT.with_name("pretrain.py"))
    out = start.parent / "trained"
    words = [str(start), "--text", str(start.parent / "text.txt"), "--out", str(out), "--sequence", "32"]
    advice = json.loads((start / "headstart.json").read_text())["next_step"]
    trainer = pretrain.main([*words, "--steps", "10"])
    assert trainer.state.global_step == 10
    assert trainer.args.learning_rate == advice["learning_rate"] and trainer.args.warmup_steps == 1
    assert f"learning rate {advice['learning_rate']:g}, warm-up over 5%" in capsys.readouterr().out
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert losses[-1] < losses[0] < 6
    continued = pretrain.main([*words, "--steps", "12", "--lr", "1e-3"])
    assert continued.state.global_step == 12
    first = [entry["step"] for entry in continued.state.log_history if "loss" in entry]
    assert first[:10] == list(range(1, 11))  # the first ten steps are those of the run before
    model = AutoModelForCausalLM.from_pretrained(out)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in trainer.model.parameters())
    assert AutoTokenizer.from_pretrained(out)("cat")["input_ids"] == list(b"cat")


def test_the_padding_token_of_the_tokenizer_reaches_the_config(start: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(start)
    tokenizer.pad_token = "!"
    tokenizer.save_pretrained(start.parent / "padded")
    pretrain = script(SCRIPT.with_name("pretrain.py"))
    words = [str(start), "--text", str(start.parent / "text.txt"), "--out", str(start.parent / "with-padding")]
    pretrain.main([*words, "--steps", "1", "--sequence", "32", "--tokenizer", str(start.parent / "padded")])
    config = json.loads((start.parent / "with-padding" / "config.json").read_text())
    assert config["pad_token_id"] == tokenizer.pad_token_id == ord("!")


def test_too_little_text_is_one_line(start: Path) -> None:
    (start.parent / "short.txt").write_text("a cat")
    words = [str(start), "--text", str(start.parent / "short.txt"), "--out", str(start.parent / "none")]
    with pytest.raises(SystemExit, match="fewer than two blocks of 256 tokens"):
        script(SCRIPT.with_name("pretrain.py")).main(words)
