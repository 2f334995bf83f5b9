"""`headstart compare --base`: adapters under every LoRA method, in one table with the same files."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from headstart.compare.inputs import read_inputs
from headstart.compare.run_files import run_path
from headstart.compare.settings import Trial, TrialSettings
from headstart.config import CompareConfig
from tests.conftest import make_llama
from tests.headstart.compare.test_compare import CONTRACT
from tests.support.commands import compare, invoke, lora
from tests.support.pages import assert_self_contained, parse_page
from zoo.errors import UserError
from zoo.training.corpora import python_reference

peft = pytest.importorskip("peft")
SHAPE = {"vocab_size": 256, "num_hidden_layers": 3}
SETTINGS: dict[str, Any] = {
    "rank": 4, "steps": 3, "seeds": [0], "lrs": [1e-2], "batch_size": 2, "sequence": 16, "windows": 4, "workers": 1,
}  # fmt: skip
METHODS = [
    "pissa", "olora", "gaussian", "orthogonal", "eva:windows=4", "corda:windows=4", "lora_ga:windows=4",
    "pareto:bootstraps=5", "pareto:bootstraps=5:strategy=both_compensated",
]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a reference of another shape and vocabulary, and a text."""
    folder = tmp_path_factory.mktemp("adapters")
    make_llama(folder / "base", **SHAPE)
    make_llama(folder / "other", seed=1, vocab_size=64, hidden_size=24, num_attention_heads=3, num_key_value_heads=1)
    (folder / "text.txt").write_bytes(python_reference()[:20_000])
    return folder


def given(place: Path, **options: Any) -> dict[str, Any]:
    return {"base": place / "base", "corpus": place / "text.txt", "methods": ["gaussian"], **SETTINGS} | options


@pytest.fixture(scope="module")
def compared(place: Path) -> Path:
    followed = f"pareto:bootstraps=5:reference={make_llama(place / 'reference', seed=2, num_hidden_layers=4)}"
    compare(**given(place, methods=[*METHODS, followed]), out=place / "out")
    return place / "out"


def test_every_method_starts_at_the_loss_of_the_base(compared: Path, place: Path) -> None:
    """Also where the base was changed: what is trained is the changed base with its adapter."""
    from transformers import AutoModelForCausalLM

    from zoo.training.loop import evaluate
    from zoo.vocabulary import byte_tokens

    results = json.loads((compared / "results.json").read_text())
    tokens = byte_tokens((place / "text.txt").read_bytes())
    base = AutoModelForCausalLM.from_pretrained(place / "base", dtype=torch.float32)
    expected = evaluate(base, tokens[int(len(tokens) * 0.9) :], 16, limit=4)
    assert next(iter(results["methods"])) == "default" and len(results["methods"]) == len(METHODS) + 2
    for name, method in results["methods"].items():
        assert method["step0_loss"] == pytest.approx(expected, abs=2e-6), name
        assert method["final_loss"]["mean"] < expected - 1e-3, name
    ends = {round(method["final_loss"]["mean"], 6) for method in results["methods"].values()}
    assert len(ends) >= len(METHODS), "each method trains its own adapter"


def test_results_and_page_are_those_of_any_comparison(compared: Path, place: Path) -> None:
    results = json.loads((compared / "results.json").read_text())
    for method in results["methods"].values():
        assert set(CONTRACT) <= set(method)
    adapter = {"base": str(place / "base"), "rank": 4, "alpha": 4, "targets": ["all-linear"], "reference": None}
    assert results["adapter"] == adapter and results["target"]["num_hidden_layers"] == 3
    pairs = 3 * (32 + 32 + 2 * (32 + 16) + 32 + 32 + 3 * (32 + 64))  # q, k and v, o, and three of the MLP
    assert results["parameters"] == 4 * pairs
    donors = {name: [d["name"] for d in method["donors"]] for name, method in results["methods"].items()}
    assert donors.pop(next(name for name in donors if "reference=" in name)) == ["reference"]
    assert not any(donors.values()), "the base is no donor: all methods adapt it"
    html = (compared / "report.html").read_text()
    assert_self_contained(html)
    text = " ".join(" ".join(parse_page(html).text).split())
    assert "LoRA of rank 4 on llama" in text and "Only A and B are trained" in text and "no weight decay" in text
    assert "scale of the default" not in text and "headstart generate" not in text
    assert (compared / "losses.png").read_bytes()[:4] == b"\x89PNG"
    command = ["headstart", "compare", "--base", str(place / "base"), "--rank", "4"]
    assert results["command"].split()[: len(command)] == command
    assert CompareConfig.from_record(results["config"]).rank == 4


def test_the_run_is_what_a_user_would_do(compared: Path, place: Path, tmp_path: Path) -> None:
    """headstart lora, PeftModel.from_pretrained and a plain loop of torch end at the same loss, on a frozen base."""
    from transformers import AutoModelForCausalLM

    from zoo.streams import stream_seed
    from zoo.training.loop import evaluate, sample_windows
    from zoo.vocabulary import byte_tokens

    lora(place / "base", "pissa", 4, tmp_path / "adapter", dtype="float32")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter" / "base", dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
    frozen = {name: p.clone() for name, p in model.named_parameters() if "lora_" not in name}
    learned = [p for name, p in model.named_parameters() if "lora_" in name]
    assert [p for p in model.parameters() if p.requires_grad] == learned
    tokens = byte_tokens((place / "text.txt").read_bytes())
    cut = int(len(tokens) * 0.9)
    optimizer = torch.optim.AdamW(learned, betas=(0.9, 0.95), weight_decay=0.0)
    model.train()
    for step, share in enumerate((1.0, 1.0, 0.1)):  # one step of warm-up, then a cosine from the peak to a tenth of it
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * share
        window = sample_windows(tokens[:cut], 2, 16, stream_seed(0, "compare"), step)
        optimizer.zero_grad()
        model(input_ids=window, labels=window).loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
    assert all(torch.equal(frozen[name], p) for name, p in model.named_parameters() if name in frozen)
    (record,) = (compared / "runs").glob("pissa-*.json")
    final = evaluate(model, tokens[cut:], 16, limit=4)
    assert json.loads(record.read_text())["losses"][-1] == pytest.approx(final, abs=1e-5)


def test_a_second_call_trains_nothing_and_methods_can_be_added(place: Path) -> None:
    out = place / "resumed"
    compare(**given(place), out=out)
    before = {p.name: p.stat().st_mtime_ns for p in (out / "runs").iterdir()}
    assert sorted(name.split("-s0")[0] for name in before) == ["gaussian", "peft-default"]
    results = compare(**given(place, methods=["peft-default", "gaussian", "orthogonal"], seeds=[0, 1]), out=out)
    after = {p.name: p.stat().st_mtime_ns for p in (out / "runs").iterdir()}
    assert before.items() <= after.items() and len(after) == 6
    assert list(results["methods"]) == ["default", "gaussian", "orthogonal"], "peft-default is the default"
    assert results["methods"]["orthogonal"]["difference"]["ci95"] is not None


def test_a_run_is_named_after_all_that_it_depends_on(place: Path, tmp_path: Path) -> None:
    """The content of base and reference, not their paths; and what only other methods read changes nothing."""
    make_llama(tmp_path / "moved", **SHAPE)
    make_llama(tmp_path / "another", seed=3, **SHAPE)

    def name(label: str, **options: Any) -> str:
        config = CompareConfig(
            **given(place, methods=["gaussian", "pareto"], device="cpu") | options, out=tmp_path / "o"
        )
        return run_path(read_inputs(config).settings, Trial(label, 0, 1.0, (1e-2,)), 1e-2).name

    plain, followed = name("gaussian"), name("pareto")
    assert name("gaussian", base=tmp_path / "moved") == plain
    for change in ({"base": tmp_path / "another"}, {"rank": 5}, {"alpha": 9.0}, {"targets": ["q_proj"]}):
        assert name("gaussian", **change) != plain
    assert name("gaussian", alpha=4.0) == plain, "alpha is the rank unless it is given"
    reference = {"reference": place / "other"}
    assert name("gaussian", **reference) == plain and name("pareto", **reference) != followed
    label = f"pareto:reference={place / 'other'}"
    own = {"methods": [label]}
    assert name(label, **own) == name("pareto", **reference)


def test_settings_go_through_json_to_other_processes(place: Path, tmp_path: Path) -> None:
    settings = read_inputs(CompareConfig(**given(place, targets=["q_proj"], device="cpu"), out=tmp_path / "o")).settings
    assert TrialSettings.from_json(json.loads(json.dumps(dataclasses.asdict(settings)))) == settings


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"base": None, "rank": None}, "nothing to train: give --target CONFIG for models, or --base MODEL --rank R"),
        ({"target": "config.json"}, "--target and --base: give one of them"),
        ({"rank": None}, "give --rank R as well"),
        ({"base": None, "target": "config.json"}, "--rank 4: is for LoRA adapters; leave it out, or give --base"),
        ({"zoo": "zoo"}, "--zoo zoo: is for models; leave it out, or give --target"),
        ({"donor": "donor"}, "--donor donor: is for models"),
        ({"model": "model"}, "--model model: is for models"),
        ({"default_scales": [1.0, 3.0]}, "--default-scales: is for models"),
        ({"methods": ["normal"]}, "normal fills models, not LoRA adapters: choose from pareto, peft-default"),
        ({"methods": ["pisa"]}, "did you mean 'pissa'"),
        ({"methods": ["loftq"]}, "loftq: replaces the base's weights by 4-bit values"),
        ({"methods": ["pissa:niter"]}, "write a variant as NAME:KEY=VALUE"),
        ({"methods": ["pissa:reference=x"]}, "option of pissa"),
        ({"methods": ["orthogonal"], "rank": 5}, "orthogonal needs an even rank"),
        ({"methods": ["eva"], "rank": 17, "targets": ["q_proj"]}, "eva: rank 17 is above half of 32"),
        ({"methods": ["lora_ga"], "rank": 9}, "lora_ga: rank 9 is above half of 16"),
        ({"rank": 17}, "give at most 16"),
        ({"targets": ["q_prj"]}, "did you mean 'q_proj'"),
        ({"reference": "other"}, "--reference other: no method of --methods follows a model"),
        ({"methods": ["pareto"], "reference": "nowhere.json"}, "nowhere.json: no such file"),
        ({"methods": ["pareto"], "reference": "other"}, "other: distances between layers need at least 3 layers"),
        ({"base": "text.txt"}, "text.txt"),
        ({"sequence": 65}, "positions"),
        ({"corpus": "nowhere.txt"}, "nowhere.txt"),
    ],
)
def test_bad_input_is_refused_before_training(place: Path, tmp_path: Path, change: dict[str, Any], says: str) -> None:
    paths = {"base": place, "reference": place, "corpus": place}
    change = {key: paths[key] / value if key in paths and value is not None else value for key, value in change.items()}
    says = says.replace("--reference other", f"--reference {place / 'other'}")
    options = {key: value for key, value in (given(place) | change).items() if value is not None}
    with pytest.raises(UserError, match=re.escape(says)) as caught:
        compare(**options, out=tmp_path / "out")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_the_command_line(place: Path, tmp_path: Path) -> None:
    words = ["compare", "--base", place / "base", "--rank", 2, "--methods", "gaussian", "--targets", "q_proj,v_proj"]
    words += ["--corpus", place / "text.txt", "--steps", 1, "--seeds", "0", "--lrs", "1e-3", "--batch-size", 1]
    words += ["--sequence", 16, "--windows", 1, "--workers", 1, "--alpha", 4, "--device", "cpu", "--quiet"]
    found = invoke(*words, "--out", tmp_path / "out")
    assert found.exit_code == 0, found.output
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["adapter"]["targets"] == ["q_proj", "v_proj"] and results["adapter"]["alpha"] == 4
    assert results["parameters"] == 3 * 2 * (32 + 32 + 32 + 16)
    wrong = invoke(
        "compare", "--target", place / "base", "--methods", "pissa", "--corpus", "t", "--out", tmp_path / "o"
    )
    assert wrong.exit_code == 2 and "pissa fills LoRA adapters, not models: give --base MODEL" in wrong.stderr
