"""The report.html of an analysis."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from headstart.report.analysis_data import (
    POWER_LAW,
    Model,
    Results,
    count_pairs,
    count_verdicts,
    is_measured,
    matrices_above_noise,
    median_alpha,
    median_kurtosis,
    smallest_rank,
)
from headstart.report.analysis_findings import (
    NOT_CHECKED,
    headline,
    health_findings,
    health_state,
    introduction,
    nearest_neighbour_sentence,
)
from headstart.report.analysis_sections import describe_donor, donor_sections
from headstart.report.html import Cell, Column, Table, render
from headstart.report.numbers import DASH, or_dash, superscript

SIGNATURES = {
    "std": "standard deviations of the seven projections",
    "clustering": "clusters of the layers by singular values",
}
MAX_LABELLED = 16  # donors; cells of a larger distance table show only colour


@dataclass(frozen=True)
class DistanceCell:
    """A distance between two donors: `text` is scaled, `title` names the donors and the distance."""

    text: str
    title: str = ""
    tint: str = "transparent"


@dataclass(frozen=True)
class DistanceTable:
    """Distances between the signatures of all donors."""

    heading: str
    note: str
    rows: list[tuple[str, list[DistanceCell]]]
    is_dense: bool


def render_analysis(results: Results) -> str:
    """The whole page, from what analysis.json holds."""
    models = results["models"]
    title = next(iter(models)) if len(models) == 1 else f"{len(models)} donors"
    donors = [
        {
            "name": donor["name"],
            "anchor": f"donor-{i}",
            "description": describe_donor(donor),
            "state": health_state(models[donor["name"]]),
            "sections": donor_sections(donor["name"], models[donor["name"]], donor),
        }
        for i, donor in enumerate(results["donors"])
    ]
    return render(
        "analysis.html.j2",
        title=f"headstart: the weights of {title}",
        heading=f"headstart analyze · {title}",
        headline=headline(results),
        introduction=introduction(results),
        donors=donors,
        overview=_overview(results),
        problems=_problems(models),
        distances=list(_distance_tables(results)),
        conditions=_conditions(results),
        command=results["command"],
    )


def _overview(results: Results) -> Table:
    columns = [
        Column("donor", lambda d: Cell(d["name"], link=d["anchor"]), "text"),
        Column("architecture", lambda d: d["architecture"], "text"),
        Column("parameters", "parameters"),
        Column("health", lambda d: Cell(health_state(d["model"]), chip=True), "text"),
        Column("median\nkurtosis", lambda d: or_dash(median_kurtosis(d["model"]), "{:.2f}".format)),
        Column("matrices\nabove noise", lambda d: _above_noise_text(d["model"])),
        Column("median α", lambda d: or_dash(median_alpha(d["model"]), "{:.2f}".format)),
        Column("power laws\nhere / Gaussian\n/ spikes", lambda d: _power_law_counts(d["model"])),
    ]
    donors = [
        donor | {"anchor": f"donor-{i}", "model": results["models"][donor["name"]]}
        for i, donor in enumerate(results["donors"])
    ]
    return Table(columns, donors)


def _above_noise_text(model: Model) -> str:
    above, measured = matrices_above_noise(model)
    return f"{above} of {measured}" if measured else DASH


def _power_law_counts(model: Model) -> str:
    if not is_measured(model["dsv"]):
        return DASH
    rank = smallest_rank(model)
    counts = [count_verdicts(model, rank, null)[POWER_LAW] for null in (None, "gaussian", "spikes")]
    return f"{' / '.join(map(str, counts))} of {count_pairs(model, rank)}"


def _problems(models: dict[str, Model]) -> list[str]:
    """What the health check found, over all donors."""
    found = [f"{name}: {f['text']}" for name, model in models.items() for f in health_findings(model)]
    not_checked = [
        f"{name}: not checked, {model['health']['why']}"
        for name, model in models.items()
        if health_state(model) == NOT_CHECKED
    ]
    return found + not_checked


def _distance_tables(results: Results) -> Iterator[DistanceTable]:
    for kind, found in results["signatures"].items():
        names, distances = found["models"], found["distances"]
        largest = max((x for row in distances for x in row if x is not None), default=0) or 1.0
        digits = 2 - math.floor(math.log10(largest))  # the largest distance has three digits
        yield DistanceTable(
            heading=f"By the {SIGNATURES[kind]}",
            note=f"{nearest_neighbour_sentence(results, kind)} Distances are shown times 10{superscript(digits)}.",
            rows=[
                (f"{a} · {i}", [_distance_cell(a, b, x, largest, digits) for b, x in zip(names, row, strict=True)])
                for i, (a, row) in enumerate(zip(names, distances, strict=True), 1)
            ],
            is_dense=len(names) > MAX_LABELLED,
        )


def _distance_cell(a: str, b: str, distance: float | None, largest: float, digits: int) -> DistanceCell:
    if distance is None or a == b:
        return DistanceCell("" if a == b else DASH)
    return DistanceCell(
        text=f"{distance * 10**digits:.0f}",
        title=f"{a}, {b}: {distance:.3g}",
        tint=f"rgba(16,163,127,{0.6 * (1 - distance / largest):.2f})",
    )


def _conditions(results: Results) -> list[str]:
    donors = results["donors"]
    ranks = ", ".join(map(str, results["ranks"]))
    lines = [
        f"Seed {results['seed']}. Ranks {ranks}. {results['bootstraps']} bootstrap samples for each p-value of a power "
        "law.",
        "A pair of projections gets the verdict power law if two conditions hold. Its goodness of fit is not rejected "
        "(p > 0.1, bootstrap samples of the effective number of independent distances, xmin and α fitted to each). And "
        "no other distribution fits significantly better (likelihood ratios with variances over layers, Holm's "
        "correction over the four alternatives).",
        "Donors of the same shapes are compared with the same random matrices.",
        "Families of distributions are compared on values held out from the fit. Kurtosis uses all values.",
        "Versions: " + ", ".join(f"{name} {version}" for name, version in results["versions"].items()) + ".",
    ]
    if len(donors) == 1:
        donor = donors[0]
        lines.insert(
            0,
            f"{donor['name']}: {donor['architecture']}, {donor['parameters']:,} parameters, licence "
            f"{donor['license']}, revision {donor['revision']}.",
        )
    return lines
