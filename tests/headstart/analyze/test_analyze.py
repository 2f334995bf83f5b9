"""headstart analyze: trained and untrained donors, interruptions, and invalid input."""

from __future__ import annotations

import json
import re
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from safetensors.torch import load_file, save_file

from headstart.analyze import tensors
from headstart.report.analysis import render_analysis
from headstart.report.analysis_claims import BEYOND, discoveries, kurtosis_p_value, list_claims, probability_of_count
from headstart.report.analysis_data import matrices_above_noise, noise_alpha
from headstart.report.analysis_findings import (
    NOT_CHECKED,
    UNCLEAR,
    UNHEALTHY,
    headline,
    health_state,
    nearest_neighbour_sentence,
)
from tests.conftest import make_llama
from tests.headstart.test_cli import headstart
from tests.support.commands import analyze
from zoo.add import add
from zoo.donors.zoo import Zoo
from zoo.errors import UserError
from zoo.statistics.grouping import read_grouping
from zoo.statistics.spectra import spectrum_summary
from zoo.tensors import split_parts

SMALL: dict[str, Any] = {"ranks": (4, 64), "bootstraps": 10, "quiet": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A zoo of two untrained Llamas, with one layer and with three, and its analysis."""
    base = tmp_path_factory.mktemp("analyze")
    sources = [make_llama(base / name, seed=n, num_hidden_layers=n) for name, n in (("one", 1), ("three", 3))]
    add([str(s) for s in sources], base / "zoo", quiet=True)
    analyze(base / "out", zoo=base / "zoo", **SMALL)
    return base


@pytest.fixture(scope="module")
def untrained(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "out" / "analysis.json").read_text())


@pytest.fixture(scope="module")
def trained(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The analysis of a trained GPT-2 (fused and transposed tensors, no gate)."""
    out = tmp_path_factory.mktemp("trained") / "out"
    return out, analyze(out, donor=str(shared_data / "models" / "makemore-en-a"), **SMALL)


def test_a_zoo_gives_what_the_contract_says(folder: Path, untrained: dict[str, Any]) -> None:
    assert [d["name"] for d in untrained["donors"]] == ["one", "three"]
    assert {"revision", "sha256", "license", "architecture", "parameters"} <= set(untrained["donors"][0])
    assert set(untrained["models"]["three"]) == {
        "health", "marginals", "spectra", "ranks", "dsv", "grouping", "row_column", "signature",
    }  # fmt: skip
    assert sorted(p.name for p in (folder / "out").iterdir()) == ["analysis.json", "report.html"]
    assert not list(folder.glob(".out*"))
    assert untrained["command"].startswith(f"headstart analyze --out {folder / 'out'} --zoo {folder / 'zoo'}")


def test_ranks_above_the_smallest_projection_are_reduced_and_reported(folder: Path, untrained: dict[str, Any]) -> None:
    model = untrained["models"]["three"]
    assert model["ranks"] == {"4": 4, "64": 16}  # two key heads of 8
    assert set(model["dsv"]) == set(model["grouping"]) == {"4", "16"}
    for found in model["dsv"].values():
        assert len(found["pairs"]) == len(found["nulls"]["gaussian"]) == len(found["nulls"]["spikes"]) == 28
        assert {kind: row["n"] for kind, row in found["pooled"].items()} == dict.fromkeys(
            ("own", "gaussian", "spikes"), 21 * 20 / 2
        )
    assert "Rank 64 is not available: the smallest projection has 16" in (folder / "out" / "report.html").read_text()


def test_one_layer_allows_all_parts_but_the_similarity_of_layers(folder: Path, untrained: dict[str, Any]) -> None:
    model = untrained["models"]["one"]
    assert "at least 3 layers" in model["dsv"]["why"] and model["grouping"] == model["dsv"]
    assert len(model["row_column"]["tensors"]) == 8 and len(model["marginals"]["tensors"]) == 11
    assert "std" in model["signature"] and "clustering" not in model["signature"]
    assert "at least 3 layers" in (folder / "out" / "report.html").read_text()


def test_a_tensor_with_nan_is_left_out_and_parts_that_need_it_give_the_reason(tmp_path: Path) -> None:
    file = make_llama(tmp_path / "broken", num_hidden_layers=1) / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(tensors, file, {"format": "pt"})
    model = analyze(tmp_path / "out", donor=str(file.parent), **SMALL)["models"]["broken"]
    assert {"non-finite"} <= {finding["kind"] for finding in model["health"]}
    for part in ("marginals", "spectra"):
        whole = {name for name, t in model[part]["tensors"].items() if "why" not in t}
        assert set(model[part]["tensors"]) - whole == {"model.layers.0.mlp.up_proj.weight"}
    assert "NaN" in model["row_column"]["why"]
    assert "NaN or infinity" in (tmp_path / "out" / "report.html").read_text()


def test_nothing_is_claimed_about_random_matrices(untrained: dict[str, Any]) -> None:
    for model in untrained["models"].values():
        assert "untrained" in {finding["kind"] for finding in model["health"]}
        assert model["marginals"]["shares"]["normal"] > 0.9
        assert [c.statement for c in list_claims(model) if c.verdict == BEYOND] == []
    assert "2 not trained" in headline(untrained)


def test_every_matrix_has_its_own_noise_draw(untrained: dict[str, Any]) -> None:
    tensors = [t for t in untrained["models"]["three"]["spectra"]["tensors"].values() if t.get("alpha") is not None]
    draws = [noise_alpha(t) for t in tensors]
    assert len(tensors) > 20 and None not in draws and len(set(draws)) == len(draws)


def test_noise_is_rarely_called_heavy_tailed() -> None:
    """60 donors with fifteen random matrices in three shapes, each compared with its own draw. At a level of one in a
    hundred, three or more claims have a probability of 0.02."""
    generator = torch.Generator().manual_seed(0)

    def noise(shape: tuple[int, int]) -> dict[str, Any]:
        return spectrum_summary(torch.randn(shape, generator=generator))

    claimed = 0
    for _ in range(60):
        shapes = [(24, 16), (16, 16), (16, 24)] * 5
        tensors = {str(i): {**noise(shape), "shape": shape, "noise": noise(shape)} for i, shape in enumerate(shapes)}
        found = {c.statement: c.verdict for c in list_claims(only_spectra(tensors))}
        claimed += found["Spectra have heavier tails (a lower α) than noise"] == BEYOND
    assert claimed < 3


def only_spectra(tensors: dict[str, Any]) -> dict[str, Any]:
    absent = {"why": "not made"}
    return {"health": [], "marginals": absent, "spectra": {"tensors": tensors}, "dsv": absent, "row_column": absent}


def test_one_small_p_value_among_many_is_no_claim() -> None:
    def verdicts(couplings: dict[str, list[float]]) -> list[str]:
        rows = [{"space": s, "p": p, "correlation": 0.1} for s, values in couplings.items() for p in values]
        model = only_spectra({}) | {"row_column": {"tensors": [], "couplings": rows}}
        return [c.verdict == BEYOND for c in list_claims(model) if "coupled" in c.statement]

    assert verdicts({"ffn": [0.005] * 8, "residual": [0.005, *([0.5] * 5)]}) == [True, False]
    assert verdicts({"ffn": [0.04] * 2 + [0.5] * 40}) == [False]
    uniform = np.random.default_rng(0).integers(1, 201, (300, 20)) / 200
    assert sum(verdicts({"ffn": list(p)}) == [True] for p in uniform) <= 8  # of 300, at one in a hundred


def test_the_state_of_a_donor_follows_from_health_and_spectra(untrained: dict[str, Any]) -> None:
    def state_and_headline(health: Any, above_noise: bool = False) -> tuple[str, str]:
        model = json.loads(json.dumps(untrained["models"]["three"])) | {"health": health}
        for t in model["spectra"]["tensors"].values():
            t["outliers"] = int(above_noise)
        return health_state(model), headline({"models": {"three": model}})

    renewed = {"kind": "untrained", "tensors": [], "text": "layer 2: noise", "whole": False}
    state, sentence = state_and_headline([renewed], True)
    assert state == UNHEALTHY and "three is trained" in sentence
    assert "never" not in sentence and "layer 2: noise" in sentence
    assert "unclear whether three was trained. A problem: layer 2: noise" in state_and_headline([renewed])[1]
    assert state_and_headline([])[0] == UNCLEAR and "is trained" not in state_and_headline([])[1]
    assert state_and_headline({"why": "cannot be read"}, True)[0] == NOT_CHECKED
    assert "could not be checked" in state_and_headline({"why": "cannot be read"}, True)[1]
    assert state_and_headline([renewed | {"whole": True}])[1].startswith("three looks as if it was never trained")


def test_a_trained_donor_is_distinguished_from_noise(trained: tuple[Path, dict[str, Any]]) -> None:
    _, results = trained
    model = results["models"]["makemore-en-a"]
    verdicts = {c.statement: c.verdict for c in list_claims(model)}
    assert model["health"] == [] and headline(results).startswith("makemore-en-a is trained")
    assert verdicts["Singular values rise above the edge of noise (Marchenko-Pastur)"] == BEYOND
    assert verdicts["Rows and columns carry structure beyond the values: row energies"] == BEYOND
    assert verdicts["Matrices that share a space are coupled: ffn"] == BEYOND
    above, measured = matrices_above_noise(model)
    assert above > measured / 2
    assert {row["a"] for row in model["dsv"]["16" if "16" in model["dsv"] else "64"]["pairs"]}.isdisjoint({"mlp.gate"})


def test_fused_tensors_are_summarized_part_by_part(shared_data: Path, trained: tuple[Path, dict[str, Any]]) -> None:
    from zoo.donors.folder import StandaloneDonor

    donor = StandaloneDonor.open(shared_data / "models" / "makemore-en-a", quiet=True)
    spec = next(s for s in donor.blueprint.specs if s.role == "attn.qkv" and s.kind == "weight" and s.layer == 1)
    tensors = trained[1]["models"]["makemore-en-a"]["marginals"]["tensors"]
    for role, matrix in split_parts(spec, donor.read(spec.name, torch.float32)).items():
        summary = tensors[f"{spec.name} [{role}]"]
        assert summary["std"] == pytest.approx(matrix.std(correction=0).item(), rel=1e-5)
        assert (summary["role"], summary["layer"], summary["shape"]) == (role, 1, [64, 64])


def test_lora_reads_its_grouping(trained: tuple[Path, dict[str, Any]], folder: Path) -> None:
    out, results = trained
    grouping = read_grouping(out / "analysis.json")
    assert grouping.to_json() == results["models"]["makemore-en-a"]["grouping"]["4"]
    assert grouping.source["sha256"] == results["donors"][0]["sha256"]
    pooled = results["models"]["makemore-en-a"]["dsv"]["4"]["pooled"]
    assert grouping.exponent == round(pooled["own"]["alpha"], 2)
    page = (out / "report.html").read_text()
    assert f"have the exponent {pooled['own']['alpha']:.2f}, those of random matrices" in page
    with pytest.raises(UserError, match="one could not be grouped"):
        read_grouping(folder / "out" / "analysis.json", "one")


def test_a_tensor_is_read_once_and_gone_before_noise_of_its_size_is_drawn(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    donor = Zoo.open(folder / "zoo").donor("one")
    spec = next(s for s in donor.blueprint.specs if s.role == "embed")
    read: list[weakref.ref[torch.Tensor]] = []
    drawn: list[bool] = []

    def counted_read(name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        tensor = type(donor).read(donor, name, dtype)
        read.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setitem(donor.__dict__, "read", counted_read)
    draw = tensors._noise_spectrum
    monkeypatch.setattr(tensors, "_noise_spectrum", lambda *a: (drawn.append(read[0]() is None), draw(*a))[1])
    found = tensors.measure_tensor(tensors.AnalysisTask(donor, (4,), 2, 0, "cpu"), spec)
    assert len(read) == 1 and drawn == [True]
    assert found["spectra"]["embed"]["noise"]["rank_max"] == min(spec.shape)


def test_an_interrupted_analysis_resumes(folder: Path, untrained: dict[str, Any]) -> None:
    """An edited part in the cache appears in the result of the same command, and not with another seed."""
    out, work = folder / "again", folder / ".again.work"
    options: dict[str, Any] = {**SMALL, "zoo": folder / "zoo", "donor": "one"}
    arguments = ("--zoo", folder / "zoo", "--donor", "one", "--out", out, "--ranks", "4,64", "--bootstraps", "10")
    interrupted = headstart("analyze", *arguments, interrupt=lambda: any(work.glob("tensor-*.json")))
    assert interrupted.returncode == 130 and "the same command again" in interrupted.stderr
    assert not out.exists() and not list(folder.glob(".again.*.partial"))
    (kept,) = work.glob("health-*.json")
    kept.write_text(json.dumps([{"kind": "marked", "tensors": [], "text": "marked"}]))
    shutil.copytree(work, folder / ".other.work")
    found, other = analyze(out, **options), analyze(folder / "other", **options, seed=1)
    assert not list(folder.glob(".*"))
    model, expected = found["models"]["one"], untrained["models"]["one"]
    assert model["health"][0]["kind"] == "marked" and other["models"]["one"]["health"] == expected["health"]
    assert {k: v for k, v in model.items() if k != "health"} == {k: v for k, v in expected.items() if k != "health"}


def test_the_page_is_whole_and_escaped(folder: Path, untrained: dict[str, Any]) -> None:
    text = (folder / "out" / "report.html").read_text()
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    for target in re.findall(r'(?:href="#|url\(#)([^")]+)', text):
        assert target in ids
    assert not re.search(r'(?:src|href)="(?!#)|@import|<script', text)
    hostile = json.loads(json.dumps(untrained).replace('"three"', '"<b>three"'))
    assert "<b>three" not in render_analysis(hostile) and "&lt;b&gt;three" in render_analysis(hostile)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "nothing to analyze"),
        ({"donor": "nowhere"}, "unknown donor"),
        ({"ranks": (0, 16)}, "--ranks 0,16"),
        ({"ranks": (1,)}, "--ranks 1: give at least 2"),
        ({"ranks": ()}, "--ranks"),
        ({"bootstraps": 0}, "--bootstraps 0"),
        ({"out": "zoo"}, "exists already"),
    ],
)
def test_invalid_input_is_refused_before_any_work(folder: Path, options: dict[str, Any], message: str) -> None:
    before = sorted(folder.rglob("*"))
    zoo = folder / "zoo" if options else None
    out = folder / options.get("out", "refused")
    rest = {k: v for k, v in options.items() if k != "out"}
    with pytest.raises(UserError, match=message):
        analyze(out, zoo=zoo, quiet=True, **rest)
    assert sorted(folder.rglob("*")) == before


def test_discoveries_are_those_of_benjamini_and_hochberg() -> None:
    """The k smallest p-values, k the largest number with p_(k) <= level k / m."""

    def by_definition(p_values: list[float], level: float) -> list[bool]:
        passed = [p for k, p in enumerate(sorted(p_values), 1) if p <= level * k / len(p_values)]
        return [p <= max(passed, default=-1.0) for p in p_values]

    rng = np.random.default_rng(0)
    for m in (1, 7, 60):
        for p in ([*rng.random(m), *rng.random(m) ** 6], rng.integers(1, 201, 2 * m) / 201):
            values = [float(x) for x in p]
            assert discoveries([*values, None]) == [*by_definition(values, 0.05), False]
    assert discoveries([]) == [] and discoveries([None]) == [False]


def test_p_values_agree_with_scipy() -> None:
    values = np.random.default_rng(1).standard_normal((400, 2000))
    p = [kurtosis_p_value(k, 2000) for k in scipy.stats.kurtosis(values, axis=1, fisher=False)]
    assert 0.02 < np.mean(np.array(p) < 0.05) < 0.09  # one in twenty of normal samples
    assert kurtosis_p_value(3.5, 2000) < 1e-5
    assert probability_of_count(9, 20, 0.25) == pytest.approx(scipy.stats.binom.sf(8, 20, 0.25))


def test_neighbours_of_the_same_architecture_are_counted() -> None:
    names = ["a", "b", "c", "d"]
    table = [[0, 1, 5, 6], [1, 0, 7, 8], [5, 7, 0, 9], [6, 8, 9, 0]]
    results = {
        "signatures": {"std": {"models": names, "distances": table}},
        "donors": [{"name": n, "architecture": "llama" if n in "ab" else "gpt2"} for n in names],
    }
    # a and b are each other's nearest. c and d are nearest to a. At random: one of three others, four times.
    sentence = nearest_neighbour_sentence(results, "std")
    assert "for 2 of 4 donors" in sentence and "hold for 1.3" in sentence


def test_the_command(tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    donor = tiny_llama(tmp_path / "donor", num_hidden_layers=1)
    arguments = ("analyze", "--donor", donor, "--ranks", "4", "--bootstraps", "2", "--out", tmp_path / "out")
    done = headstart(*arguments)
    assert done.returncode == 0 and done.stdout == "" and f"wrote {tmp_path / 'out' / 'report.html'}" in done.stderr
    again = headstart(*arguments)
    assert again.returncode == 2 and again.stderr.count("\n") == 1 and "exists already" in again.stderr
