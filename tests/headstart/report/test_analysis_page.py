"""The page of an analysis, from results made by hand."""

from __future__ import annotations

import re
from itertools import combinations_with_replacement
from typing import Any

import pytest

from headstart.report.analysis import render_analysis
from headstart.report.analysis_claims import BEYOND, NOT_BEYOND, NOT_ENOUGH_DATA, count_tests, list_claims
from headstart.report.analysis_findings import headline
from headstart.report.analysis_sections import pairs_to_draw
from tests.support.pages import assert_self_contained, parse_page

DONOR_SECTIONS = [
    "Claims and verdicts", "Health", "Marginal distributions", "Spectra", "Similarity of layers", "Rows and columns",
    "Use as a LoRA reference",
]  # fmt: skip
PROJECTIONS = ("attn.q", "attn.k", "attn.v")
NAME = "<b>donor"


def pair(a: str, b: str, verdict: str) -> dict[str, Any]:
    return {
        "a": a, "b": b, "verdict": verdict, "why": "<i>why", "n": 28, "worth": 7.5, "tail": 20, "alpha": 2.5,
        "alpha_ci95": [2.0, 3.0], "xmin": 0.1, "distance": 0.05, "p": 0.4, "p_pairs": 0.3, "skewness": 1.0,
        "ratios": {"lognormal": {"R": -1.5, "p": 0.2}}, "ccdf": [[0.1, 1.0], [0.5, 0.5], [1.0, 0.1]],
    }  # fmt: skip


def pairs(verdict: str) -> list[dict[str, Any]]:
    return [pair(a, b, verdict) for a, b in combinations_with_replacement(PROJECTIONS, 2)]


def full_model() -> dict[str, Any]:
    """A trained donor of eight layers whose pairs all follow a power law, and no random pair does."""
    matrices = {
        f"<u>{layer}.{role}": {
            "role": role, "layer": layer, "shape": [8, 8], "count": 64, "mean": 0.0, "std": 0.1, "skewness": 0.0,
            "kurtosis": 9.0, "family": "student-t", "tail_index": 3.0, "norm": 1.0, "stable_rank": 2.0, "edge": 1.5,
            "outliers": 2, "alpha": 2.0, "distance": 0.1, "noise": {"outliers": 0, "alpha": 4.0},
        }
        for layer in range(8)
        for role in PROJECTIONS
    }  # fmt: skip
    rows = [
        {"role": role, "row_spread": 0.5, "row_spread_null": 0.1, "row_spread_p": 0.005, "column_spread": 0.2,
         "column_spread_null": 0.2, "column_spread_p": 0.5, "row_correlation": 0.1, "row_correlation_null": 0.1,
         "row_correlation_p": None}
        for role in PROJECTIONS * 4
    ]  # fmt: skip
    coupling = {"space": "<s>ffn", "layer": 0, "a": "mlp.up", "b": "mlp.down", "correlation": 0.5, "p": 0.005}
    nulls = {"gaussian": pairs("not a power law"), "spikes": pairs("undecided")}
    grouping = {"undifferentiated": False, "undecided": 0, "reference": "attn.q", "gaussian": ["attn.k"], "pareto": []}
    return {
        "health": [],
        "marginals": {"tensors": matrices, "shares": {"student-t": 1.0}},
        "spectra": {"tensors": matrices},
        "ranks": {"4": 4, "64": 8},
        "dsv": {"4": {"pairs": pairs("power law"), "nulls": nulls}, "8": {"pairs": pairs("undecided"), "nulls": nulls}},
        "grouping": {"4": grouping, "8": grouping | {"undifferentiated": True, "undecided": 6}},
        "row_column": {"tensors": rows, "couplings": [coupling] * 4},
    }


def minimal_model() -> dict[str, Any]:
    """A donor on which nothing could be measured."""
    parts = ("health", "marginals", "spectra", "dsv", "grouping", "row_column")
    return {part: {"why": f"<i>no {part}."} for part in parts} | {"ranks": {}}


def results_of(**models: dict[str, Any]) -> dict[str, Any]:
    names = {name: f"{NAME} {name}" for name in models}
    donor = {"license": "<i>mit", "revision": "<u>1", "architecture": "<s>llama", "parameters": 1000, "layers": 8}
    table = {"models": [*names.values()], "distances": [[0.0, 0.02], [0.02, 0.0]]}
    return {
        "command": "headstart analyze <zoo>", "versions": {"torch": "2"}, "seed": 0, "ranks": [4, 64], "bootstraps": 10,
        "donors": [donor | {"name": name, "width": None} for name in names.values()],
        "models": {names[key]: model for key, model in models.items()},
        "signatures": {"std": table, "clustering": table} if len(models) == 2 else {},
    }  # fmt: skip


def test_a_fully_measured_donor_has_every_section() -> None:
    results = results_of(full=full_model())
    html = render_analysis(results)
    page = parse_page(html)
    assert_self_contained(html)
    assert page.headings == [*DONOR_SECTIONS, "How it was measured"] and html.count("<svg") == 3
    text = " ".join(page.text)
    assert headline(results) in text and "headstart analyze <zoo>" in text and "Not measured" not in text
    for claim in list_claims(full_model()):
        assert claim.statement in text and claim.measured in text and claim.by_chance in text
    assert "The health check found no problem." in text and "Rank 64 is not available" in text
    assert (
        "top 4 singular values" in text and "Top 8 singular values: 0 power law, 0 not a power law, 6 undecided" in text
    )


def test_a_donor_without_measurements_has_every_section_with_its_reason() -> None:
    html = render_analysis(results_of(minimal=minimal_model()))
    page = parse_page(html)
    assert_self_contained(html)
    assert page.headings == [*DONOR_SECTIONS, "How it was measured"] and html.count("<svg") == 0
    text = " ".join(page.text)
    for part in ("health", "marginals", "spectra", "dsv", "row_column", "grouping"):
        assert f"Not measured: <i>no {part}." in text and f"<i>no {part}.." not in text


def test_several_donors_have_an_overview_and_distances() -> None:
    html = render_analysis(results_of(full=full_model(), minimal=minimal_model()))
    page = parse_page(html)
    assert_self_contained(html)
    general = [
        "Overview", "Health", "Which donors are related", "By the standard deviations of the seven projections",
        "By the clusters of the layers by singular values", "Donor by donor",
    ]  # fmt: skip
    assert page.headings == [*general, *DONOR_SECTIONS, *DONOR_SECTIONS, "How it was measured"]
    text = " ".join(page.text)
    assert "6 / 0 / 0 of 6" in text and "24 of 24" in text and "times 10⁴" in text
    assert f"{NAME} minimal: not checked, <i>no health." in text and text.count("not checked") > 1


def test_names_and_reasons_are_escaped() -> None:
    html = render_analysis(results_of(full=full_model(), minimal=minimal_model()))
    assert not re.search(r"<(b>donor|i>mit|i>why|i>no|u>|s>)", html)
    text = " ".join(parse_page(html).text)
    for hostile in (f"{NAME} full", "<i>why", "<u>0.attn.q", "<s>ffn", "<s>llama"):
        assert hostile in text
    assert "--reference 'analysis.json#<b>donor full'" in text


def test_every_claim_stands_beside_its_null() -> None:
    claims = {c.statement: (c.measured, c.by_chance, c.verdict) for c in list_claims(full_model())}
    law = "Distances between layers follow a power law (top {} singular values)"
    rows = "Rows and columns carry structure beyond the values: {}"
    assert claims["Weights have heavier tails than a normal distribution"] == (
        "24 of 24 matrices; median kurtosis 9.00", "kurtosis 3, if weights were normal", BEYOND,
    )  # fmt: skip
    assert claims["Singular values rise above the edge of noise (Marchenko-Pastur)"] == (
        "24 of 24 matrices", "0 of 24 random matrices of the same shapes", BEYOND,
    )  # fmt: skip
    assert claims["Spectra have heavier tails (a lower α) than noise"][2] == BEYOND
    assert claims[law.format(4)][2] == BEYOND and claims[law.format(8)][2] == NOT_ENOUGH_DATA
    assert claims[rows.format("row energies")] == (
        "12 of 12 matrices", "0.6 of 12, if the entries of each matrix are shuffled", BEYOND,
    )  # fmt: skip
    assert claims[rows.format("column energies")][2] == NOT_BEYOND and rows.format("row correlation") not in claims
    assert claims["Matrices that share a space are coupled: <s>ffn"][0] == "4 of 4 couplings; median correlation +0.50"
    assert list(list_claims(minimal_model())) == []


def test_tests_are_counted() -> None:
    assert count_tests(full_model()) == {
        "kurtosis": 24, "exponents against noise": 24, "power laws": 12, "likelihood ratios": 12,
        "rows and columns": 24, "couplings": 4,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("found", "gaussian", "sentence"),
    [
        (
            "power law",
            "undecided",
            "6 of 6 pairs of projections follow a power law between layers. In random",
        ),
        ("power law", "power law", "say nothing about learning: 6 of 6 pairs of projections follow one, and 6 of 6 do"),
        ("not a power law", "undecided", "No pair of projections follows a power law between layers (0 of 6)."),
        ("undecided", "undecided", "Its 8 layers are too few to test distances between layers for a power law."),
    ],
)
def test_the_headline_compares_power_laws_with_chance(found: str, gaussian: str, sentence: str) -> None:
    model = full_model()
    nulls = {"gaussian": pairs(gaussian), "spikes": pairs("undecided")}
    model["dsv"] = {"4": {"pairs": pairs(found), "nulls": nulls}}
    text = headline(results_of(full=model))
    assert text.startswith(f"{NAME} full is trained: 24 of 24 matrices have singular values above noise.")
    assert sentence in text


def test_published_exceptions_are_drawn_first() -> None:
    rows = [pair(a, b, "undecided") for a in "abcd" for b in "efgh"] + [pair("mlp.gate", "mlp.up", "undecided")]
    for i, row in enumerate(rows):
        row["p"] = i / 100
    drawn = pairs_to_draw(rows)
    assert [row["p"] for row in drawn] == [0.16, 0.15, 0.0, 0.14, 0.01, 0.13]
