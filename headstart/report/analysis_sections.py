"""The sections of an analysis page for one donor, as plain data for the template."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any

from markupsafe import Markup

from headstart.report import analysis_plots as plots
from headstart.report.analysis_claims import FDR_LEVEL, count_significant, list_claims, verdict_rules
from headstart.report.analysis_data import (
    NO_POWER_LAW,
    NULL_LABELS,
    POWER_LAW,
    UNDECIDED,
    Model,
    count_pairs,
    count_verdicts,
    is_measured,
    matrices_above_noise,
    median_alpha,
    noise_alpha,
    smallest_rank,
)
from headstart.report.analysis_findings import grouping_sentences, health_findings
from headstart.report.html import Column, Table
from headstart.report.numbers import DASH, or_dash, shape_text, three_digits
from headstart.report.plot_style import inline_svg
from zoo.statistics.similarity import PROJECTIONS

SHORT_VERDICTS = {POWER_LAW: "power law", NO_POWER_LAW: "not", UNDECIDED: "undecided"}
SIGNS = {POWER_LAW: "✓", NO_POWER_LAW: "✕", UNDECIDED: "?"}
ROW_COLUMN_HEADINGS = {
    "row_spread": "spread of\nrow energy",
    "column_spread": "spread of\ncolumn energy",
    "row_correlation": "|correlation|\nof rows",
}
MAX_DRAWN_PAIRS = 6
# Pairs of projections that follow no power law in arXiv 2509.00046.
PUBLISHED_EXCEPTIONS = (("attn.v", "mlp.gate"), ("mlp.gate", "mlp.up"), ("mlp.gate", "mlp.down"))
STRONGEST_ALPHA, WEAKEST_ALPHA = 1.5, 6.0  # exponents at the ends of the colour scale


@dataclass
class Section:
    """What every section may hold. `reason`: why it was not measured; then the rest is empty."""

    reason: str | None = None
    figure: Markup | None = None
    notes: list[str] = field(default_factory=list)
    table: Table | None = None
    folded: list[tuple[str, Table]] = field(default_factory=list)  # (summary, table), closed at first


@dataclass(frozen=True)
class HeatCell:
    """A pair of projections in a map: colour by exponent, text by verdict."""

    number: str
    verdict: str
    sign: str
    title: str
    tint: str
    is_decided: bool


@dataclass(frozen=True)
class SimilarityMap:
    """The maps of one rank: the donor, and both kinds of random matrices. Cells are None where there is no pair."""

    rank: str
    summary: str
    names: list[str]
    rows: list[tuple[str, list[HeatCell | None]]]
    nulls: list[tuple[str, list[tuple[str, list[HeatCell | None]]]]]
    pairs: Table


def donor_sections(name: str, model: Model, donor: dict[str, Any]) -> dict[str, Any]:
    """section -> its data, for the template `analysis_donor.html.j2`."""
    return {
        "summary": _summary(model, donor),
        "claims": list(list_claims(model)),
        "verdict_rules": verdict_rules(model),
        "health": _health(model),
        "marginals": _marginals(name, model),
        "spectra": _spectra(name, model),
        "similarity": _similarity(name, model),
        "maps": list(_similarity_maps(model)),
        "row_column": _row_column(model),
        "lora": _lora(model),
        "lora_reference": shlex.quote(f"analysis.json#{name}"),
    }


def describe_donor(donor: dict[str, Any], with_size: bool = True) -> str:
    """`492,384 parameters, llama, 4 layers, 96 wide`."""
    words = [f"{donor['parameters']:,} parameters"] if with_size else []
    words.append(str(donor["architecture"]))
    if donor["layers"]:
        words.append(f"{donor['layers']} layers")
    if donor["width"]:
        words.append(f"{donor['width']} wide")
    return ", ".join(words)


def _summary(model: Model, donor: dict[str, Any]) -> list[tuple[str, str]]:
    items = [(f"{donor['parameters']:,}", f"parameters, {describe_donor(donor, with_size=False)}")]
    above, measured = matrices_above_noise(model)
    if measured:
        items.append((f"{above} of {measured}", "matrices with singular values above noise"))
    alpha = median_alpha(model)
    if alpha is not None:
        items.append((f"{alpha:.2f}", "median exponent α of the spectra"))
    if is_measured(model["dsv"]):
        rank = smallest_rank(model)
        count, null = count_verdicts(model, rank)[POWER_LAW], count_verdicts(model, rank, "gaussian")[POWER_LAW]
        items.append((f"{count} of {count_pairs(model, rank)}", f"pairs follow a power law; {null} in random matrices"))
    return items


def _not_measured(part: dict[str, Any]) -> Section:
    return Section(reason=part["why"].rstrip("."))


def _health(model: Model) -> Section:
    if isinstance(model["health"], dict):
        return _not_measured(model["health"])
    found = [finding["text"] for finding in health_findings(model)]
    return Section(notes=found or ["The health check found no problem."])


def _marginals(name: str, model: Model) -> Section:
    part = model["marginals"]
    if not is_measured(part):
        return _not_measured(part)
    section = Section(figure=inline_svg(plots.marginal_figure(model), f"values of {name}"))
    if part["shares"]:
        ranked = sorted(part["shares"].items(), key=lambda item: -item[1])
        shares = ", ".join(f"{family} {share:.0%}" for family, share in ranked)
        section.notes.append(f"The family with the highest held-out likelihood, by share of matrices: {shares}.")
    columns = [
        Column("tensor", lambda t: t["label"], "text"),
        Column("shape", lambda t: shape_text(t["shape"])),
        *(Column(key, key) for key in ("mean", "std", "skewness", "kurtosis")),
        Column("family", lambda t: t.get("family") or t.get("why") or DASH, "text"),
        Column("tail index", "tail_index"),
    ]
    section.folded.append((f"All {len(part['tensors'])} tensors", Table(columns, _labelled(part["tensors"]))))
    return section


def _labelled(tensors: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    return [tensor | {"label": label} for label, tensor in tensors.items()]


def _spectra(name: str, model: Model) -> Section:
    part = model["spectra"]
    if not is_measured(part):
        return _not_measured(part)
    columns = [
        Column("tensor", lambda t: t["label"], "text"),
        Column("shape", lambda t: shape_text(t["shape"])),
        Column("norm", "norm"),
        Column("stable rank", "stable_rank"),
        Column("largest / edge", "edge"),
        Column("above\nthe edge", "outliers"),
        Column("α", "alpha"),
        Column("α of noise", lambda t: three_digits(noise_alpha(t))),
        Column("KS distance", "distance"),
    ]
    return Section(
        figure=inline_svg(plots.spectrum_figure(model), f"spectra of {name}"),
        folded=[(f"All {len(part['tensors'])} matrices", Table(columns, _labelled(part["tensors"])))],
    )


def _similarity(name: str, model: Model) -> Section:
    part = model["dsv"]
    if not is_measured(part):
        return _not_measured(part)
    rank = smallest_rank(model)
    drawn = pairs_to_draw(part[rank]["pairs"])
    section = Section(figure=inline_svg(plots.distance_figure(model, rank, drawn), f"distances of {name}"))
    reduced = [asked for asked, used in model["ranks"].items() if int(asked) != used]
    if reduced:
        section.notes.append(
            f"Rank {' and '.join(reduced)} is not available: the smallest projection has "
            f"{max(model['ranks'].values())} singular values."
        )
    return section


def pairs_to_draw(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The pairs whose distances are drawn: the published exceptions, then the best and worst fits in turn."""
    drawn = [row for row in rows if (row["a"], row["b"]) in PUBLISHED_EXCEPTIONS]
    rest = sorted((row for row in rows if row not in drawn and row.get("p") is not None), key=lambda row: -row["p"])
    while rest and len(drawn) < MAX_DRAWN_PAIRS:
        drawn.append(rest.pop(0))
        if rest and len(drawn) < MAX_DRAWN_PAIRS:
            drawn.append(rest.pop())
    return drawn


def _similarity_maps(model: Model) -> Iterator[SimilarityMap]:
    if not is_measured(model["dsv"]):
        return
    for rank, found in model["dsv"].items():
        counts = count_verdicts(model, rank)
        summary = ", ".join(f"{counts[verdict]} {verdict}" for verdict in (POWER_LAW, NO_POWER_LAW, UNDECIDED))
        names = [p for p in PROJECTIONS if any(p in (row["a"], row["b"]) for row in found["pairs"])]
        yield SimilarityMap(
            rank,
            summary,
            [plots.short_name(p) for p in names],
            _heat_rows(found["pairs"], names),
            [(label, _heat_rows(found["nulls"][kind], names)) for kind, label in NULL_LABELS.items()],
            _pair_table(found["pairs"]),
        )


def _heat_rows(pairs: list[dict[str, Any]], names: list[str]) -> list[tuple[str, list[HeatCell | None]]]:
    rows = {frozenset((row["a"], row["b"])): row for row in pairs}
    return [(plots.short_name(a), [_heat_cell(rows.get(frozenset((a, b))), a, b) for b in names]) for a in names]


def _heat_cell(row: dict[str, Any] | None, a: str, b: str) -> HeatCell | None:
    if row is None:
        return None
    alpha, verdict = row.get("alpha"), row["verdict"]
    return HeatCell(
        number=DASH if alpha is None else f"{alpha:.2f}" if alpha < 9.95 else f"{alpha:.0f}",
        verdict=SHORT_VERDICTS[verdict],
        sign=SIGNS[verdict],
        title=f"{a}, {b}: {verdict}; {row.get('why') or ''}",
        tint=_blue_tint(alpha),
        is_decided=verdict != UNDECIDED,
    )


def _blue_tint(alpha: float | None) -> str:
    """A CSS colour, stronger for a smaller exponent."""
    if alpha is None:
        return "transparent"
    clipped = min(max(alpha, STRONGEST_ALPHA), WEAKEST_ALPHA)
    strength = math.log(WEAKEST_ALPHA / clipped) / math.log(WEAKEST_ALPHA / STRONGEST_ALPHA)
    return f"rgba(59,130,246,{0.06 + 0.5 * strength:.2f})"


def _pair_table(pairs: list[dict[str, Any]]) -> Table:
    alternatives = dict.fromkeys(key for row in pairs for key in row.get("ratios") or {})
    columns = [
        Column("pair", lambda row: f"{plots.short_name(row['a'])} – {plots.short_name(row['b'])}", "text"),
        Column("distances", "n"),
        Column("independent\ndistances", "worth"),
        Column("in tail", "tail"),
        Column("α", "alpha"),
        Column("95 % of α", lambda row: or_dash(row.get("alpha_ci95"), "{0[0]:.2f} to {0[1]:.2f}".format)),
        Column("KS", "distance"),
        Column("p\n(layers)", "p"),
        Column("p\n(pairs)", "p_pairs"),
        Column("skewness", "skewness"),
        *(Column(f"R, p\n{key.replace('_', ' ')}", partial(_ratio_text, key)) for key in alternatives),
        Column("verdict", lambda row: row["verdict"], "text"),
        Column("reason", lambda row: row.get("why") or "", "wide"),
    ]
    return Table(columns, pairs)


def _ratio_text(alternative: str, row: dict[str, Any]) -> str:
    found = (row.get("ratios") or {}).get(alternative)
    if not found or found.get("R") is None:
        return DASH
    return f"{found['R']:+.1f}, {three_digits(found.get('p'))}"


def _row_column(model: Model) -> Section:
    part = model["row_column"]
    if not is_measured(part):
        return _not_measured(part)
    columns = [
        Column("role", lambda row: row["role"], "text"),
        Column("matrices", lambda row: str(len(row["tensors"]))),
    ]
    for test, heading in ROW_COLUMN_HEADINGS.items():
        columns += [
            Column(f"{heading}\nhere / shuffled", partial(_medians_text, test)),
            Column(f"p ≤ {FDR_LEVEL:g}", partial(_significant_text, test)),
        ]
    roles = dict.fromkeys(t["role"] for t in part["tensors"])
    rows = [{"role": role, "tensors": [t for t in part["tensors"] if t["role"] == role]} for role in roles]
    section = Section(table=Table(columns, rows))
    if part["couplings"]:
        summary = f"All {len(part['couplings'])} couplings of matrices that share a space"
        section.folded.append((summary, _coupling_table(part["couplings"])))
    return section


def _medians_text(test: str, row: dict[str, Any]) -> str:
    return " / ".join(f"{median(t[key] for t in row['tensors']):.2f}" for key in (test, f"{test}_null"))


def _significant_text(test: str, row: dict[str, Any]) -> str:
    p_values = [t[f"{test}_p"] for t in row["tensors"] if t.get(f"{test}_p") is not None]
    return f"{count_significant(p_values)} of {len(p_values)}"


def _coupling_table(couplings: list[dict[str, Any]]) -> Table:
    columns = [
        Column("space", lambda c: c["space"], "text"),
        Column("layer", lambda c: c.get("stack", "") + or_dash(c["layer"], str)),
        Column("writes → reads", lambda c: f"{c['a']} → {c['b']}", "text"),
        Column("correlation", "correlation"),
        Column("p", "p"),
    ]
    return Table(columns, couplings)


def _lora(model: Model) -> Section:
    if not is_measured(model["grouping"]):
        return _not_measured(model["grouping"])
    return Section(notes=list(grouping_sentences(model)))
