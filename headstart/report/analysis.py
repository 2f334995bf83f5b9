"""report.html of an analysis: one page that needs nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterable
from html import escape
from statistics import median

from headstart.report.analysis_findings import (
    NOT_CHECKED,
    POWER_LAW,
    Results,
    findings,
    first_rank,
    headline,
    lead,
    matrices,
    relations,
    risen_matrices,
    state,
    verdicts,
)
from headstart.report.analysis_plots import superscript
from headstart.report.analysis_sections import brief, chip, donor
from headstart.report.page import bullets, document, note, table

STYLE = """
h3 { font-size: 1rem; margin: 2rem 0 .25rem; }
h2 + h3, h2 + .note { margin-top: .25rem; }
.chip { display: inline-block; padding: .05rem .55rem; border-radius: 1rem; font-size: .8rem; white-space: nowrap;
  border: 1px solid var(--line); color: var(--soft); }
.chip.good { color: #10a37f; border-color: #10a37f; } .chip.bad { color: #d97706; border-color: #d97706; }
.maps { display: grid; grid-template-columns: minmax(0, 1fr) 16.5rem; gap: 1.5rem; align-items: start; margin: 1rem 0; }
.maps .side { display: grid; gap: 1.25rem; }
@media (max-width: 52rem) { .maps { grid-template-columns: 1fr; } }
.caption { color: var(--soft); font-size: .85rem; margin: 0 0 .35rem; }
table.heat { table-layout: fixed; font-size: .9rem; }
table.heat th, table.heat td { padding: .3rem .1rem; text-align: center; border: 2px solid var(--page);
  line-height: 1.25; overflow: hidden; }
table.heat tbody th { text-align: right; padding-right: .5rem; vertical-align: middle; width: 3rem; }
table.heat thead th:first-child { width: 3rem; }
table.heat td { border-radius: .35rem; }
table.heat td span { display: block; font-size: .68rem; color: var(--soft); }
table.heat td.told span { color: inherit; font-weight: 650; }
.side table.heat { font-size: .78rem; } .side table.heat th { font-size: .58rem; }
.side table.heat th, .side table.heat td { padding: .14rem .05rem; }
.side table.heat tbody th, .side table.heat thead th:first-child { width: 2.3rem; }
table.near { width: auto; font-size: .75rem; } table.near td { width: 1.9rem; min-width: 1.9rem; font-size: .68rem;
  padding: .2rem 0; text-align: center; border: 1px solid var(--page); }
table.near.many td { width: 1.1rem; min-width: 1.1rem; font-size: 0; height: 1.1rem; }
table.near.many thead th { font-size: .6rem; }
table.near th { padding: .1rem .5rem .1rem 0; font-weight: 400; text-align: right; vertical-align: middle; }
table.near thead th { text-align: center; padding: 0; }
details { margin: .75rem 0; }
summary { cursor: pointer; color: var(--soft); }
details.donor { border: 1px solid var(--line); border-radius: .6rem; padding: .9rem 1.1rem; margin: 1rem 0; }
details.donor > summary { color: var(--ink); font-weight: 600; }
details.donor > summary span { color: var(--soft); font-weight: 400; }
a { color: inherit; text-decoration-color: var(--soft); text-underline-offset: .15em; }
.claims .wide { min-width: 9rem; }
.claims th, .claims td { padding-left: .4rem; padding-right: .4rem; }
td.so { white-space: nowrap; text-align: left; }
"""

SIGNATURES = {
    "std": "standard deviations of the seven projections",
    "clustering": "clusters that the layers' singular values fall into",
}
MANY = 16  # donors whose table has numbers


def page(results: Results) -> str:
    """The whole page; all text in it is escaped."""
    models = results["models"]
    about = {d["name"]: d for d in results["donors"]}
    alone = len(models) == 1
    title = next(iter(models)) if alone else f"{len(models)} donors"
    body = [
        f"<style>{STYLE}</style>",
        f"<h1>headstart analyze · {escape(title)}</h1>",
        f'<p class="headline">{escape(headline(results))}</p>',
        f'<p class="lead">{escape(lead(results))}</p>',
    ]
    if not alone:
        body += [_overview(results), *_families(results), "<h2>Donor by donor</h2>"]
    for i, (name, model) in enumerate(models.items()):
        inner = "\n".join(donor(name, model, about[name], alone))
        if alone:
            body.append(inner)
        else:
            summary = f"{escape(name)} <span>· {escape(brief(about[name]))} ·</span> {chip(state(model))}"
            body.append(
                f'<details class="donor"{" open" if i == 0 else ""}><summary>{summary}</summary>\n'
                f'<div id="donor-{i}">{inner}</div></details>'
            )
    body += [
        "<h2>How it was measured</h2>",
        bullets(_conditions(results)),
        f"<pre>{escape(results['command'])}</pre>",
    ]
    return document(f"headstart: the weights of {title}", "\n".join(body))


def _overview(results: Results) -> str:
    rows = []
    for i, (d, model) in enumerate(zip(results["donors"], results["models"].values(), strict=True)):
        risen, whole = risen_matrices(model)
        known = [t["kurtosis"] for t in matrices(model["marginals"]) if t.get("kurtosis") is not None]
        alphas = [t["alpha"] for t in model["spectra"].get("tensors", {}).values() if t.get("alpha") is not None]
        laws = "–"
        if "why" not in model["dsv"]:
            rank = first_rank(model)
            counts = [verdicts(model, rank, null)[POWER_LAW] for null in (None, "gaussian", "spikes")]
            laws = " / ".join(map(str, counts)) + f" of {len(model['dsv'][rank]['pairs'])}"
        rows.append(
            [
                ("text", f'<a href="#donor-{i}">{escape(d["name"])}</a>'),
                ("text", escape(d["architecture"])),
                ("", f"{d['parameters']:,}"),
                ("text", chip(state(model))),
                ("", f"{median(known):.2f}" if known else "–"),
                ("", f"{risen} of {whole}" if whole else "–"),
                ("", f"{median(alphas):.2f}" if alphas else "–"),
                ("", laws),
            ]
        )
    heads = ("median\nkurtosis", "matrices\nabove noise", "median α", "power laws: here /\nGaussian / spikes")
    columns = [("text", "donor"), ("text", "architecture"), ("", "parameters"), ("text", "health")]
    models = results["models"].items()
    troubles = [f"{name}: {f['text']}" for name, model in models for f in findings(model)]
    troubles += [f"{name}: not checked, {m['health']['why']}" for name, m in models if state(m) == NOT_CHECKED]
    return (
        "<h2>Overview</h2>"
        + table([*columns, *(("", h) for h in heads)], rows)
        + (f"<h3>Health</h3>{bullets(troubles)}" if troubles else note("The health check finds nothing wrong."))
    )


def _families(results: Results) -> Iterable[str]:
    if results["signatures"]:
        yield "<h2>Who is related to whom</h2>"
        yield note("Cosine distances between signatures of donors (2509.19122); the darker, the nearer.")
    for kind, found in results["signatures"].items():
        names, distances = found["models"], found["distances"]
        top = max((x for row in distances for x in row if x is not None), default=0) or 1.0
        digits = 2 - math.floor(math.log10(top))  # the largest distance is shown as three digits
        head = "".join(f"<th>{i}</th>" for i in range(1, len(names) + 1))
        lines = []
        for i, (a, row) in enumerate(zip(names, distances, strict=True), 1):
            cells = "".join(_near(a, b, x, top, digits) for b, x in zip(names, row, strict=True))
            lines.append(f"<tr><th>{escape(a)} · {i}</th>{cells}</tr>")
        small = " many" if len(names) > MANY else ""
        yield f"<h3>By the {SIGNATURES[kind]}</h3>"
        yield note(f"{relations(results, kind)} Distances times 10{superscript(digits)}.")
        yield f'<div class="scroll"><table class="near{small}"><thead><tr><th></th>{head}</tr></thead>'
        yield f"<tbody>{''.join(lines)}</tbody></table></div>"


def _near(a: str, b: str, distance: float | None, top: float, digits: int) -> str:
    if distance is None or a == b:
        return f"<td>{'' if a == b else '–'}</td>"
    tint = f"background:rgba(16,163,127,{0.6 * (1 - distance / top):.2f})"
    return f'<td style="{tint}" title="{escape(a)}, {escape(b)}: {distance:.3g}">{distance * 10**digits:.0f}</td>'


def _conditions(results: Results) -> list[str]:
    donors = [
        f"{d['name']}: {d['architecture']}, {d['parameters']:,} parameters, licence {d['license']}, revision "
        f"{d['revision']}"
        for d in results["donors"]
    ]
    return [
        *(donors if len(donors) == 1 else []),
        f"Seed {results['seed']}; {results['bootstraps']} replicates behind each p-value of a power law; "
        f"ranks {', '.join(map(str, results['ranks']))}.",
        "A power law is claimed where its goodness of fit is not rejected (p > 0.1, among replicates of as many "
        "independent values as the layers are worth, xmin and α refitted each time) and no other law fits "
        "significantly better (likelihood ratios with variances over layers, Holm over the four). "
        "Donors of the same shapes share the random matrices that the similarity of their layers is compared with.",
        "The families of values compete on values held out from the fit; kurtosis is that of all values.",
        "Versions: " + ", ".join(f"{k} {v}" for k, v in results["versions"].items()) + ".",
    ]
