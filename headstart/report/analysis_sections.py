"""What the page of an analysis says of one donor, section by section."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable
from html import escape
from statistics import median
from typing import Any

from headstart.report import analysis_plots as plots
from headstart.report.analysis_findings import (
    AILING,
    BEYOND,
    LEVEL,
    NOT,
    NOT_BEYOND,
    NOT_TRAINED,
    OPEN,
    POWER_LAW,
    TESTS,
    TRAINED,
    Model,
    advice,
    claims,
    findings,
    first_rank,
    noise_alpha,
    risen_matrices,
    small,
    tests,
    verdicts,
)
from headstart.report.page import bullets, cards, figure, note, or_dash, table
from zoo.statistics.similarity import PROJECTIONS

CHIP = {BEYOND: "good", NOT_BEYOND: "bad", TRAINED: "good", NOT_TRAINED: "bad", AILING: "bad"}
WORD = {POWER_LAW: "power law", NOT: "not", OPEN: "undecided"}
SIGN = {POWER_LAW: "✓", NOT: "✕", OPEN: "?"}
MOST_PAIRS = 6  # whose distances are drawn
TOLD = (("attn.v", "mlp.gate"), ("mlp.gate", "mlp.up"), ("mlp.gate", "mlp.down"))  # no power laws in 2509.00046
STEEP, FLAT = 1.5, 6.0  # exponents at the ends of the colours


def donor(name: str, model: Model, about: dict[str, Any], alone: bool) -> Iterable[str]:
    heading = "h2" if alone else "h3"

    def head(text: str) -> str:
        return f"<{heading}>{escape(text)}</{heading}>"

    yield _cards(model, about, alone)
    yield head("What may be said")
    yield _claims(model)
    yield note(tests(model))
    yield head("Health")
    found = findings(model)
    if isinstance(model["health"], dict):
        yield _absent(model["health"])
    else:
        yield bullets(f["text"] for f in found) if found else note("Nothing is wrong that this check knows of.")
    yield head("Values")
    yield from _values(name, model)
    yield head("Spectra")
    yield from _spectra(name, model)
    yield head("Similarity of layers")
    yield from _similarity(name, model)
    yield head("Rows and columns")
    yield from _rows(model)
    yield head("As a reference for LoRA")
    yield from _lora(name, model)


def _cards(model: Model, about: dict[str, Any], alone: bool) -> str:
    items = [(f"{about['parameters']:,}", f"parameters, {brief(about, size=False)}")]
    risen, whole = risen_matrices(model)
    if whole:
        items.append((f"{risen} of {whole}", "matrices rise above noise"))
    known = [t["alpha"] for t in model["spectra"].get("tensors", {}).values() if t.get("alpha") is not None]
    if known:
        items.append((f"{median(known):.2f}", "median exponent α of the spectra"))
    if "why" not in model["dsv"]:
        rank = first_rank(model)
        count, null = verdicts(model, rank)[POWER_LAW], verdicts(model, rank, "gaussian")[POWER_LAW]
        pairs = len(model["dsv"][rank]["pairs"])
        items.append((f"{count} of {pairs}", f"pairs follow a power law; {null} in random matrices"))
    return cards(items)


def _claims(model: Model) -> str:
    rows = [
        [("wide", escape(c.what)), ("wide", escape(c.here)), ("wide", escape(c.chance)), ("so", chip(c.verdict))]
        for c in claims(model)
    ]
    columns = [("wide", "claim"), ("wide", "here"), ("wide", "by chance alone"), ("text", "so")]
    return f'<div class="claims">{table(columns, rows)}</div>'


def _values(name: str, model: Model) -> Iterable[str]:
    part = model["marginals"]
    if "why" in part:
        yield _absent(part)
        return
    if part["shares"]:
        ranked = sorted(part["shares"].items(), key=lambda item: -item[1])
        words = ", ".join(f"{family} {share:.0%}" for family, share in ranked)
        yield note(f"The law that gives held-out values the highest likelihood, by share of matrices: {words}.")
    yield figure(plots.values(model), escape(f"values of {name}"))
    rows = [
        [
            ("text", escape(label)),
            ("", _size(t)),
            *(("", _number(t.get(key))) for key in ("mean", "std", "skewness", "kurtosis")),
            ("text", escape(t.get("family") or t.get("why") or "–")),
            ("", _number(t.get("tail_index"))),
        ]
        for label, t in part["tensors"].items()
    ]
    heads = ("size", "mean", "std", "skewness", "kurtosis")
    columns = [("text", "tensor"), *(("", h) for h in heads), ("text", "law"), ("", "tail index")]
    yield folded(f"All {len(rows)} tensors", table(columns, rows))


def _spectra(name: str, model: Model) -> Iterable[str]:
    part = model["spectra"]
    if "why" in part:
        yield _absent(part)
        return
    yield figure(plots.spectra(model), escape(f"spectra of {name}"))
    yield note(
        "The edge is the largest singular value that independent entries of the same spread would give "
        "(Marchenko-Pastur). α is the exponent of the density of the eigenvalues of WᵀW, by maximum likelihood with "
        "xmin by the Kolmogorov-Smirnov distance; the grey band is what random matrices of the same shapes get: no "
        "training is needed for an α."
    )
    rows = []
    for label, t in part["tensors"].items():
        rows.append(
            [
                ("text", escape(label)),
                ("", _size(t)),
                *(("", _number(t.get(key))) for key in ("norm", "stable_rank", "edge", "outliers", "alpha")),
                ("", _number(noise_alpha(t))),
                ("", _number(t.get("distance"))),
            ]
        )
    heads = ("size", "norm", "stable rank", "top / edge", "above\nthe edge", "α", "α of noise", "distance\nof the fit")
    yield folded(f"All {len(rows)} matrices", table([("text", "tensor"), *(("", h) for h in heads)], rows))


def _similarity(name: str, model: Model) -> Iterable[str]:
    part = model["dsv"]
    if "why" in part:
        yield _absent(part)
        return
    yield note(
        "Each layer's top singular values of a projection are a vector; the distances 1 − cos between the layers' "
        "vectors of two projections are tested for a power law, by replicates of as many independent values as the "
        "layers are worth. Cells: the exponent α, and the verdict. The small maps are the same study of random "
        "matrices of the same shapes." + _cap(model["ranks"])
    )
    for i, (rank, found) in enumerate(part.items()):
        small = (
            f'<div><p class="caption">{words}</p>{_heat(found["nulls"][kind], small=True)}</div>'
            for kind, words in (("gaussian", "Gaussian matrices"), ("spikes", "Gaussian with random spikes"))
        )
        maps = (
            f'<div class="maps"><div><p class="caption">{escape(name)}, top {rank} singular values</p>'
            f'{_heat(found["pairs"])}</div><div class="side">{"".join(small)}</div></div>'
        )
        pairs = folded(f"All {len(found['pairs'])} pairs", _pairs(found["pairs"]))
        if i == 0:
            signs = "✓ power law, ✕ not a power law, ? undecided. "
            yield maps + note(signs + "The stronger the colour, the smaller α (the heavier the tail).")
            yield figure(plots.distances(model, rank, chosen(found["pairs"])), escape(f"distances of {name}"))
            yield pairs
        else:
            counts = verdicts(model, rank)
            words = ", ".join(f"{counts[v]} {v}" for v in (POWER_LAW, NOT, OPEN))
            yield folded(f"Top {rank} singular values: {words}", maps + pairs)


def _cap(ranks: dict[str, int]) -> str:
    cut = [asked for asked, used in ranks.items() if int(asked) != used]
    if not cut:
        return ""
    return (
        f" Rank {' and '.join(cut)} cannot be had: the smallest projection has {max(ranks.values())} singular values."
    )


def _heat(rows: list[dict[str, Any]], small: bool = False) -> str:
    cells = {frozenset((row["a"], row["b"])): row for row in rows}
    names = [p for p in PROJECTIONS if any(p in (row["a"], row["b"]) for row in rows)]
    head = "".join(f"<th>{escape(plots.short(p))}</th>" for p in names)
    lines = []
    for a in names:
        line = []
        for b in names:
            row = cells.get(frozenset((a, b)))
            if row is None:
                line.append("<td>–</td>")
                continue
            alpha, verdict = row.get("alpha"), row["verdict"]
            number = "–" if alpha is None else f"{alpha:.2f}" if alpha < 9.95 else f"{alpha:.0f}"
            words = f"{a}, {b}: {verdict}; {row.get('why') or ''}"
            inner = SIGN[verdict] if small else f"{number}<span>{WORD[verdict]}</span>"
            told = "" if verdict == OPEN else ' class="told"'
            line.append(f'<td{told} style="{_tint(alpha)}" title="{escape(words)}">{inner}</td>')
        lines.append(f"<tr><th>{escape(plots.short(a))}</th>{''.join(line)}</tr>")
    return f'<table class="heat"><thead><tr><th></th>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table>'


def _tint(alpha: float | None) -> str:
    """Blue, the stronger the smaller the exponent."""
    if alpha is None:
        return ""
    place = (math.log(FLAT) - math.log(min(max(alpha, STEEP), FLAT))) / (math.log(FLAT) - math.log(STEEP))
    return f"background:rgba(59,130,246,{0.06 + 0.5 * place:.2f})"


def _pairs(rows: list[dict[str, Any]]) -> str:
    ratios = list(dict.fromkeys(key for row in rows for key in row.get("ratios") or {}))
    body = []
    for row in rows:
        body.append(
            [
                ("text", escape(f"{plots.short(row['a'])} – {plots.short(row['b'])}")),
                *(("", _number(row.get(key))) for key in ("n", "worth", "tail", "alpha")),
                ("", or_dash(row.get("alpha_ci95"), lambda ci: " to ".join(f"{x:.2f}" for x in ci))),
                *(("", _number(row.get(key))) for key in ("distance", "p", "p_pairs", "skewness")),
                *(("", _ratio((row.get("ratios") or {}).get(key))) for key in ratios),
                ("text", escape(row["verdict"])),
                ("wide", escape(row.get("why") or "")),
            ]
        )
    heads = ["n", "worth", "tail", "α", "95 %", "KS", "p\n(layers)", "p\n(pairs)", "skew"]
    columns = [("text", "pair"), *(("", h) for h in [*heads, *(f"R, p\n{r.replace('_', ' ')}" for r in ratios)])]
    text = (
        "worth: how many independent values the n distances of so few layers are worth. KS: distance of the fit. p: "
        "goodness of fit among replicates of that many independent values, and of n (the published protocol, pairs as "
        "if they were independent). 95 %: of α, with random weights for layers. R: log-likelihood ratio against "
        "another law, negative where the other fits better, with the p-value of its sign."
    )
    return table([*columns, ("text", "verdict"), ("wide", "why")], body) + note(text)


def chosen(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The pairs whose distances are drawn: those that the literature calls no power laws, then the best and the worst
    fits in turn."""
    told = [row for row in rows if (row["a"], row["b"]) in TOLD]
    rest = sorted((row for row in rows if row not in told and row.get("p") is not None), key=lambda row: -row["p"])
    while rest and len(told) < MOST_PAIRS:
        told.append(rest.pop(0))
        if rest and len(told) < MOST_PAIRS:
            told.append(rest.pop())
    return told


def _rows(model: Model) -> Iterable[str]:
    part = model["row_column"]
    if "why" in part:
        yield _absent(part)
        return
    body = []
    for role in dict.fromkeys(t["role"] for t in part["tensors"]):
        of_role = [t for t in part["tensors"] if t["role"] == role]
        line = [("text", escape(role)), ("", str(len(of_role)))]
        for test in TESTS:
            p = [t[f"{test}_p"] for t in of_role if t.get(f"{test}_p") is not None]
            here, null = (median(t[key] for t in of_role) for key in (test, f"{test}_null"))
            line += [("", f"{here:.2f} / {null:.2f}"), ("", f"{small(p)} of {len(p)}")]
        body.append(line)
    columns = [("text", "role"), ("", "matrices")]
    for words in ("spread of row energy", "of column energy", "|correlation| of rows"):
        columns += [("", f"{words}\nhere / shuffled"), ("", f"p ≤ {LEVEL:g}")]
    yield note(
        "Do rows and columns matter, or only the values (2408.08681)? Medians over a role's matrices, beside the same "
        "matrices with their entries shuffled. One matrix in twenty has p ≤ 0.05 by chance; 0.005 is the least p that "
        "199 permutations can give."
    )
    yield table(columns, body)
    couplings = []
    for c in part["couplings"]:
        layer = "–" if c["layer"] is None else str(c["layer"])
        words = f"{c['a']} → {c['b']}"
        couplings.append(
            [
                ("text", escape(c["space"])),
                ("", layer),
                ("text", escape(words)),
                ("", _number(c["correlation"])),
                ("", _number(c["p"])),
            ]
        )
    heads = [("text", "space"), ("", "layer"), ("text", "writes → reads"), ("", "correlation"), ("", "p")]
    if couplings:
        yield folded(f"All {len(couplings)} couplings of matrices that share a space", table(heads, couplings))


def _lora(name: str, model: Model) -> Iterable[str]:
    if "why" in model["grouping"]:
        yield _absent(model["grouping"])
        return
    yield bullets(advice(model))
    yield note(
        "The pairs above decide how `pareto` (2509.00046) perturbs the template of each projection; undecided ones "
        "count as power laws. This file stands in for the donor, so that nobody needs its weights:"
    )
    reference = escape(shlex.quote(f"analysis.json#{name}"))
    yield f"<pre>headstart lora --base MODEL --method pareto --rank 16 --reference {reference} --out adapter</pre>"
    yield note("Whether that helps is a question of its own: the published gain is within the noise of its benchmark.")


def brief(about: dict[str, Any], size: bool = True) -> str:
    words = [f"{about['parameters']:,} parameters"] if size else []
    words.append(str(about["architecture"]))
    if about["layers"]:
        words.append(f"{about['layers']} layers")
    if about["width"]:
        words.append(f"{about['width']} wide")
    return ", ".join(words)


def _has(model: Model, part: str) -> bool:
    return "why" not in model[part]


def _absent(part: dict[str, Any]) -> str:
    return note(f"Absent: {part['why']}.".replace("..", "."))


def chip(word: str) -> str:
    return f'<span class="chip {CHIP.get(word, "")}">{escape(word)}</span>'


def folded(summary: str, inner: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{inner}</details>"


def _ratio(found: dict[str, Any] | None) -> str:
    if not found or found.get("R") is None:
        return "–"
    return f"{found['R']:+.1f}, {_number(found.get('p'))}"


def _size(tensor: dict[str, Any]) -> str:
    return " × ".join(map(str, tensor["shape"]))


def _number(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
