"""The characterisation of a model by its pairs of projections, and its way through analysis.json."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import combinations_with_replacement

import pytest

from zoo.donors.folder import StandaloneDonor
from zoo.errors import UserError
from zoo.statistics.grouping import Grouping, group_donor, group_projections, read_grouping
from zoo.statistics.similarity import (
    PROJECTIONS,
    compare_projections,
    fit_pooled_distances,
    singular_value_stacks,
)


def rows(*others, verdict="not a power law"):
    """All 28 pairs, power laws but for `others`."""
    pairs = [(a, b) for i, a in enumerate(PROJECTIONS) for b in PROJECTIONS[i:]]
    apart = {frozenset(p) for p in others}
    return [{"a": a, "b": b, "verdict": verdict if frozenset((a, b)) in apart else "power law"} for a, b in pairs]


def test_the_example_of_the_paper():
    found = group_projections(rows(("attn.v", "mlp.gate"), ("mlp.gate", "mlp.up"), ("mlp.gate", "mlp.down")), 16)
    assert found.reference == "mlp.gate"
    assert found.gaussian == ("attn.v", "mlp.up", "mlp.down")
    assert found.pareto == ("attn.q", "attn.k", "attn.o")
    assert not found.undifferentiated


def test_the_first_of_equals_is_the_reference():
    found = group_projections(rows(("mlp.up", "attn.k"), ("attn.v", "mlp.down")), 16)
    assert (found.reference, found.gaussian) == ("attn.k", ("mlp.up",))
    assert found.pareto == ("attn.q", "attn.v", "attn.o", "mlp.gate", "mlp.down")


@pytest.mark.parametrize(
    "found",
    [rows(), rows(("attn.v", "mlp.gate"), verdict="undecided"), rows(("attn.v", "attn.v"))],
    ids=["all power laws", "undecided", "a projection with itself"],
)
def test_without_differences_no_projection_is_singled_out(found):
    assert replace(group_projections(found, 64), undecided=0) == Grouping(64, None, (), PROJECTIONS, True, {})


def test_projections_that_a_model_lacks_are_in_no_group():
    found = [row for row in rows(("attn.q", "mlp.up")) if "mlp.gate" not in (row["a"], row["b"])]
    assert "mlp.gate" not in group_projections(found, 16).pareto


def test_undecided_tests_are_counted_and_reported():
    few = group_projections(rows(*combinations_with_replacement(PROJECTIONS[1:], 2), verdict="undecided"), 16)
    assert few.undifferentiated and few.undecided == 21 and few.n_pairs == 28
    assert "too little data (21 of 28 pairs of projections undecided)" in few.description
    assert "no pair is shown to differ from a power law (0 of 28" in group_projections(rows(), 16).description
    assert "undecided" not in group_projections(rows(("attn.v", "mlp.gate")), 16).description


def test_json_keeps_everything():
    source = {"name": "a", "sha256": "b", "revision": "c", "license": "mit"}
    found = replace(group_projections(rows(("attn.v", "mlp.gate")), 16, source, 2.4366), undecided=3)
    assert found.exponent == 2.44 and "have the exponent 2.44" in found.description
    assert Grouping.from_json(json.loads(json.dumps(found.to_json()))) == found
    old = {key: value for key, value in found.to_json().items() if key != "exponent"}
    assert Grouping.from_json(old) == replace(found, exponent=None)
    assert "exponent" not in Grouping.from_json(old).description


@pytest.mark.parametrize(("alpha", "exponent"), [(None, None), (1.0004, 1.02), (1e9, 20.0), (1.7849, 1.78)])
def test_exponents_are_rounded_and_kept_within_what_counts_can_have(alpha, exponent):
    for pairs in (rows(), rows(("attn.v", "mlp.gate"))):
        assert group_projections(pairs, 16, alpha=alpha).exponent == exponent


def test_group_donor_equals_the_grouping_of_its_comparisons(shared_data):
    donor = StandaloneDonor.open(shared_data / "models" / "stories260K", quiet=True)
    found = group_donor(donor, bootstraps=15)
    assert found.rank == 16
    assert found.source["sha256"] == donor.sha256
    groups = {*found.gaussian, *found.pareto} | ({found.reference} - {None})
    assert groups == {*PROJECTIONS}
    stacks = singular_value_stacks(donor, [16])
    alpha = fit_pooled_distances(stacks, 16)["alpha"]
    assert (
        found.to_json() | {"source": {}}
        == group_projections(compare_projections(stacks, 16, 15), 16, alpha=alpha).to_json()
    )
    assert found.exponent == pytest.approx(alpha, abs=0.005)
    assert group_donor(donor, rank=5000, bootstraps=1).rank == 32  # four key heads of eight rows


def analysis(path, models):
    path.write_text(json.dumps({"models": models}))
    return path


def test_reads_the_grouping_of_an_analysis(tmp_path):
    one, two = group_projections(rows(("attn.v", "mlp.gate")), 16), group_projections(rows(), 64)
    both = {"grouping": {"64": two.to_json(), "16": one.to_json()}, "ranks": {"16": 16, "64": 64, "256": 64}}
    path = analysis(tmp_path / "analysis.json", {"a": both})
    assert read_grouping(path) == one
    assert read_grouping(path, "a", 64) == two
    assert read_grouping(path, "a", 256) == two  # its matrices have no more
    path = analysis(tmp_path / "analysis.json", {"a": both, "b": {"grouping": {"why": "has 2 layers"}}})
    assert read_grouping(path, "a") == one
    for model, rank, message in (
        (None, None, "contains 2 models; choose one as .*#NAME: a, b"),
        ("c", None, "unknown model .*'c'"),
        ("b", None, "b could not be grouped: has 2 layers"),
        ("a", 32, "unknown rank .*'32'"),
    ):
        with pytest.raises(UserError, match=message):
            read_grouping(path, model, rank)


def test_refuses_what_is_no_analysis(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_grouping(tmp_path / "none.json")
    path = tmp_path / "other.json"
    for text in ('{"a": 1}', "[1]", "{", '{"models": {}}'):
        path.write_text(text)
        with pytest.raises(UserError, match=r"other\.json"):
            read_grouping(path)
    for model in ({}, 3, {"grouping": {"16": {"rank": 16}}}, {"grouping": {"x": {}}}):
        with pytest.raises(UserError, match="run `headstart analyze` again"):
            read_grouping(analysis(path, {"a": model}))


@pytest.mark.parametrize(
    "change",
    [
        {"rank": float("inf")}, {"rank": True}, {"rank": 0}, {"rank": None},
        {"reference": "nonsense"}, {"reference": ["mlp.gate"]}, {"reference": None}, {"reference": "attn.v"},
        {"gaussian": "attn.v"}, {"gaussian": [["a"]]}, {"gaussian": []}, {"gaussian": ["attn.v", "attn.v"]},
        {"pareto": None}, {"undifferentiated": "false"}, {"undifferentiated": True}, {"undecided": -1},
        {"exponent": "2"}, {"exponent": True}, {"exponent": 1.0}, {"exponent": float("nan")}, {"exponent": 1e9},
        {"source": []}, {"source": None}, {"source": {"name": "a"}},
        {"source": {"name": "a", "sha256": 3, "revision": "c", "license": "mit"}},
        {"source": {"name": "a\n# b", "sha256": "b", "revision": "c", "license": "mit"}},
    ],
    ids=str,
)  # fmt: skip
def test_refuses_a_damaged_grouping(tmp_path, change):
    good = group_projections(rows(("attn.v", "mlp.gate"), ("attn.q", "mlp.gate")), 16)
    assert good.reference == "mlp.gate"
    path = analysis(tmp_path / "a.json", {"a": {"grouping": {"16": good.to_json() | change}}})
    with pytest.raises(UserError, match=r"damaged .*run `headstart analyze` again") as error:
        read_grouping(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("ranks", [[16], 3, {"16": "64"}, {"16": [16]}], ids=str)
def test_refuses_damaged_ranks(tmp_path, ranks):
    path = analysis(
        tmp_path / "a.json", {"a": {"grouping": {"16": group_projections(rows(), 16).to_json()}, "ranks": ranks}}
    )
    with pytest.raises(UserError, match="ranks of a are damaged"):
        read_grouping(path)
