"""Commands in two real processes give what one process gives."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from headstart.analyze.analyze import analyze
from headstart.compare.compare import compare
from headstart.config import AnalyzeConfig, CompareConfig, GenerateConfig
from headstart.devices import torch_device
from headstart.generate.generate import generate
from tests.conftest import make_llama
from tests.headstart.compare.test_compare import TARGET
from tests.support.launched import fork_commands, launch
from zoo.add import add

ANALYZE = ("--ranks", "4,6", "--bootstraps", "5", "--device", "cpu", "--quiet")
GENERATED = ("student-t", "row-column", "gpt2", "default")
COMPARE: dict[str, Any] = {
    "methods": ("default", "scaled-default"), "steps": 2, "seeds": (0, 1), "lrs": (1e-3, 1e-2), "batch_size": 2,
    "sequence": 16, "windows": 2, "workers": 1, "tuning_seeds": 1, "device": "cpu",
}  # fmt: skip


def compare_words(folder: Path, out: Path) -> list[object]:
    """The command line of the comparison."""
    options = {"target": folder / "config.json", "corpus": folder / "corpus.txt", "out": out} | COMPARE
    words: list[object] = ["compare", "--quiet"]
    for name, value in options.items():
        words += [f"--{name.replace('_', '-')}", ",".join(map(str, value)) if isinstance(value, tuple) else value]
    return words


def results_of(folder: Path) -> Any:
    """The results of a comparison without the seconds that it took, and without the command that names its folder."""

    def without(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: without(v) for key, v in value.items() if key not in ("seconds", "command", "config")}
        return [without(v) for v in value] if isinstance(value, list) else value

    return without(json.loads((folder / "results.json").read_text()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes: `analysis-alone` and `comparison-alone`."""
    base = tmp_path_factory.mktemp("processes")
    sizes = {"vocab_size": 10, "hidden_size": 6, "intermediate_size": 10, "num_hidden_layers": 3}
    donor = make_llama(base / "donor", **sizes, num_attention_heads=1, num_key_value_heads=1)
    add([str(donor)], base / "zoo", quiet=True)
    (base / "config.json").write_text(json.dumps(TARGET))
    (base / "corpus.txt").write_text("the quick brown fox jumps over the lazy dog " * 60)
    command = " ".join(["headstart", *map(str, analyze_words(base))])
    settings = {"ranks": (4, 6), "bootstraps": 5, "device": "cpu"}
    analyze(AnalyzeConfig(out=base / "analysis", zoo=base / "zoo", **settings), quiet=True, command=command)
    (base / "analysis").rename(base / "analysis-alone")
    files = {"target": base / "config.json", "corpus": base / "corpus.txt"}
    compare(CompareConfig(out=base / "comparison-alone", **files, **COMPARE), quiet=True)
    shutil.copytree(base / "comparison-alone", base / "resumed")
    for path in sorted((base / "resumed" / "runs").iterdir())[::2]:
        path.unlink()
    return base


def analyze_words(folder: Path) -> list[object]:
    """The command line of the analysis."""
    return ["analyze", "--zoo", folder / "zoo", "--out", folder / "analysis", *ANALYZE]


def generate_words(folder: Path, method: str, out: Path) -> list[object]:
    """The command line that generates a model of the donor's shape in several files of weights."""
    words = ["generate", "--target", folder / "donor", "--method", method, "--zoo", folder / "zoo", "--out", out]
    return [*words, "--max-shard-size", "2KB", "--device", "cpu", "--quiet"]


@pytest.fixture(scope="module")
def printed(folder: Path) -> list[list[dict[str, Any]]]:
    """What two processes print."""
    commands = [
        analyze_words(folder),
        compare_words(folder, folder / "resumed"),
        *(generate_words(folder, method, folder / f"{method}-shared") for method in GENERATED),
    ]
    return fork_commands(2, commands, folder)


def test_an_analysis_by_two_processes_has_the_same_bytes(folder: Path, printed: list[list[dict[str, Any]]]) -> None:
    for process in printed:
        assert process[0] == {"code": 0, "out": "", "err": ""}
    for name in ("analysis.json", "report.html"):
        assert (folder / "analysis" / name).read_bytes() == (folder / "analysis-alone" / name).read_bytes()
    assert not (folder / ".analysis.work").exists()


def test_two_processes_continue_the_comparison_of_one_with_the_same_results(
    folder: Path, printed: list[list[dict[str, Any]]]
) -> None:
    for process in printed:
        assert process[1] == {"code": 0, "out": "", "err": ""}
    assert results_of(folder / "resumed") == results_of(folder / "comparison-alone")
    for path in sorted((folder / "resumed" / "runs").iterdir())[1::2]:
        assert path.read_bytes() == (folder / "comparison-alone" / "runs" / path.name).read_bytes()  # kept
    names = ["losses.png", "report.html", "results.json", "runs"]
    assert sorted(p.name for p in (folder / "resumed").iterdir()) == names


@pytest.mark.parametrize("place", range(len(GENERATED)))
def test_two_processes_generate_the_files_of_one(folder: Path, printed: list[list[dict[str, Any]]], place: int) -> None:
    method = GENERATED[place]
    for process in printed:
        assert process[2 + place] == {"code": 0, "out": "", "err": ""}
    shared, alone = folder / f"{method}-shared", folder / f"{method}-alone"
    words = generate_words(folder, method, alone)
    options = {str(key)[2:].replace("-", "_"): value for key, value in zip(words[1:-1:2], words[2::2], strict=True)}
    generate(GenerateConfig(**options), quiet=True, command="headstart " + " ".join(map(str, words)))
    weights = sorted(path.name for path in alone.glob("*.safetensors"))
    assert len(weights) == 3
    for name in [*weights, "model.safetensors.index.json", "config.json"]:
        assert (shared / name).read_bytes() == (alone / name).read_bytes(), name
    records = [json.loads((path / "headstart.json").read_text()) for path in (shared, alone)]
    assert records[0]["tensors"] == records[1]["tensors"] and records[0]["donors"] == records[1]["donors"]
    assert sorted(p.name for p in shared.iterdir()) == sorted(p.name for p in alone.iterdir())


def test_one_process_prints_and_an_error_ends_both_with_one_line(folder: Path) -> None:
    """Under `accelerate launch`."""
    taken = [word if word != folder / "analysis" else folder / "analysis-alone" for word in analyze_words(folder)]
    commands = [["zoo", "list", "--zoo", folder / "zoo", "--json"], [word for word in taken if word != "--quiet"]]
    first, second = launch(2, commands, folder)
    assert json.loads(first[0]["out"])[0]["name"] == "donor"
    assert second[0] == {"code": 0, "out": "", "err": ""}
    assert (first[1]["code"], second[1]["code"]) == (2, 2)
    line = f"headstart: {folder / 'analysis-alone'}: exists already; give another output folder or remove it\n"
    assert first[1]["err"] + second[1]["err"] == line


def test_each_process_of_a_machine_takes_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    assert torch_device("auto") == "cuda" and taken == []  # alone, the device that is current stays
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    for index in range(3):
        monkeypatch.setenv("LOCAL_RANK", str(index))
        assert torch_device("auto") == torch_device("cuda") == "cuda"
    assert torch_device("cpu") == "cpu"
    assert taken == [0, 0, 1, 1, 0, 0]
