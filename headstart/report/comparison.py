"""report.html of a comparison: one page that needs nothing else."""

from __future__ import annotations

from html import escape
from typing import Any

from headstart.compare.scores import REFERENCE
from headstart.report import plots
from headstart.report.comparison_findings import Results, caveats, count, fewer, fold, headline, lead, ranked, times
from headstart.report.page import bullets, document, figure, note, or_dash, table
from headstart.report.page import cards as boxes


def page(results: Results) -> str:
    """The whole page; all text in it is escaped."""
    body = "\n".join(
        [
            f"<h1>headstart compare · {escape(_target(results))}</h1>",
            f'<p class="headline">{escape(headline(results))}</p>',
            f'<p class="lead">{escape(lead(results))}</p>',
            _cards(results),
            "<h2>Loss while training</h2>",
            figure(plots.losses(results, title=False), "losses"),
            note(
                f"Mean over {count(len(results['seeds']), 'seed')} at each method's best learning rate; bands reach "
                "from the lowest to the highest seed. The dotted line is the threshold, the tuned default's mean "
                "final loss; a dot marks where a method crosses it."
            ),
            "<h2>Speed-up</h2>",
            figure(plots.speedups(results), "speedups"),
            _scores(results),
            _thresholds(results),
            "<h2>Learning rates</h2>",
            figure(plots.rates(results), "rates"),
            _rates(results),
            "<h2>Where the weights come from</h2>",
            _origins(results),
            "<h2>What to keep in mind</h2>",
            bullets(caveats(results)),
            "<h2>How it was measured</h2>",
            bullets(_conditions(results)),
            f"<pre>{escape(results['command'])}</pre>" if results["command"] else "",
        ]
    )
    return document("headstart: initialisations compared", body)


def _cards(results: Results) -> str:
    items = [(name, m) for name, m in ranked(results) if m["final_loss"]["mean"] is not None]
    fast = [(name, m) for name, m in items if name != REFERENCE and m["speedup"]["mean"] is not None]
    cards = []
    if fast:
        cards.append((fold(fast[0][1]), f"fastest to the threshold: {fast[0][0]}"))
    if items:
        name, lowest = min(items, key=lambda item: item[1]["final_loss"]["mean"])
        cards.append((f"{lowest['final_loss']['mean']:.3f}", f"lowest final loss: {name}"))
    if results["threshold"] is not None:
        cards.append((f"{results['threshold']:.3f}", "final loss of the tuned default"))
    cards.append((f"{results['parameters']:,}", "parameters of the target"))
    return boxes(cards)


def _scores(results: Results) -> str:
    finals = [m["final_loss"]["mean"] for m in results["methods"].values() if m["final_loss"]["mean"] is not None]
    rows = []
    for name, m in ranked(results):
        final = m["final_loss"]
        rows.append(
            [
                ("text", _name(results, name)),
                ("", fold(m)),
                ("", or_dash(m["speedup"]["ci95"], lambda ci: " to ".join(map(times, ci)))),
                ("", _steps(results, name)),
                ("best" if finals and final["mean"] == min(finals) else "", or_dash(final["mean"] and final, _spread)),
                ("", "–" if name == REFERENCE else _difference(m["difference"])),
                ("", or_dash(m["step0_loss"], "{:.2f}".format)),
                ("", or_dash(m["max_grad_norm"], "{:.1f}".format)),
            ]
        )
    head = (
        "speed-up",
        "95 %\ninterval",
        "steps to\nthreshold",
        "final loss\n± sd over seeds",
        "minus default\n95 %, paired",
    )
    return table([("text", "method"), *(("", h) for h in (*head, "loss at\nstep 0", "largest\ngradient"))], rows)


def _thresholds(results: Results) -> str:
    """Steps of the default over those of each method, to the losses of the default after shares of its steps."""
    levels: dict[str, Any] = next((m["thresholds"] for m in results["methods"].values() if m["thresholds"]), {})
    if not levels:
        return ""
    rows = []
    for name, m in ranked(results):
        if name == REFERENCE:
            continue
        cells = [("", fewer(m["thresholds"][at]) if at in m["thresholds"] else "–") for at in levels]
        rows.append([("text", _name(results, name)), *cells])
    heads = [f"to {found['loss']:.3f}, the default's\nat {float(at):.0%} of its steps" for at, found in levels.items()]
    return note("Steps of the default over steps of the method, seed by seed, to easier and harder losses.") + table(
        [("text", "method"), *(("", head) for head in heads)], rows
    )


def _rates(results: Results) -> str:
    grid = [f"{lr:g}" for lr in results["grid"]]
    rows = []
    for name, m in ranked(results):
        scale = f" (scale {m['scale']:g})" if m["scale"] not in (None, 1.0) else ""
        chosen = None if m["lr"] is None else f"{m['lr']:g}"
        cells = [("best" if lr == chosen else "", or_dash(m["lrs"][lr], "{:.3f}".format, "diverged")) for lr in grid]
        rows.append([("text", _name(results, name) + scale), *cells])
    return table([("text", "final loss at"), *(("", lr) for lr in grid)], rows)


def _origins(results: Results) -> str:
    rows = []
    for name, m in ranked(results):
        options = ", ".join(f"{key}={value}" for key, value in m["options"].items())
        rows.append(
            [
                ("text", _name(results, name)),
                ("", str(len(m["donors"])) if m["donors"] else "none"),
                ("", or_dash(m["donor_cost"], "{:.2g}".format, "unknown")),
                ("", f"{m['seconds']:.1f} s"),
                ("", or_dash(m["novelty"], lambda n: f"{n['distance']:.2f}")),
                ("wide", escape(m["summary"] + (f" ({options})" if options else ""))),
            ]
        )
    head = ("donors", "FLOPs to\ntrain them", "time to\nmake one", "distance\nto donors")
    methods = table([("text", "method"), *(("", h) for h in head), ("wide", "what it does")], rows)
    donors = {d["name"]: d for m in results["methods"].values() for d in m["donors"]}
    if not donors:
        return methods
    lines = [
        [
            ("text", escape(name)),
            ("text", escape(str(d["license"]))),
            ("text", f"<code>{escape(d['revision'].removeprefix('sha256:')[:10])}</code>"),
            ("", f"{d['parameters']:,}"),
            ("", or_dash(d["loss"], "{:.3f}".format)),
            ("", or_dash(d["tokens"], "{:,}".format)),
        ]
        for name, d in sorted(donors.items())
    ]
    named = [*(("text", h) for h in ("donor", "licence", "revision"))]
    counted = [*(("", h) for h in ("parameters", "held-out loss\nof its training", "tokens seen"))]
    below = note(
        "Distance to donors: median over matrices of the relative distance to the nearest matrix of the same role and "
        "shape of a donor that the method used, as stored. 0 is a copy; unrelated weights of equal size are 1.4 apart. "
        "A dash: no donor, or as said here." + "".join(f" {line}." for line in _unmeasured(results))
    )
    return methods + below + table(named + counted, lines)


def _unmeasured(results: Results) -> list[str]:
    """`autoencoder, diffusion: why there is no distance`, one line for each reason."""
    why: dict[str, list[str]] = {}
    for name, m in ranked(results):
        if m["novelty"] is None and m["donors"]:
            why.setdefault(m["novelty_note"], []).append(name)
    return [f"{', '.join(names)}: {note}" for note, names in why.items()]


def _conditions(results: Results) -> list[str]:
    corpus, steps = results["corpus"], results["steps"]
    held = min(results["windows"] * results["sequence"], corpus["held_out"])
    tuning = results["tuning_seeds"]
    tuned = "seeds" if tuning == results["seeds"] else f"the first {count(len(tuning), 'seed')}"
    return [
        f"Text: {corpus['name']}, {corpus['tokens']:,} tokens (tokenizer: {corpus['tokenizer']}). The last "
        f"{corpus['held_out']:,} are held out; every loss on this page is measured on the same {held:,} of them, in "
        f"windows of {results['sequence']}.",
        f"Training: AdamW, {count(steps, 'step')} of {results['batch_size']} × {results['sequence']} tokens, 5 % "
        "warm-up, cosine down to a tenth, weight decay 0.1 on matrices, gradients clipped to norm 1. The batches are a "
        "function of seed and step alone.",
        "Each initialisation is made by `headstart generate` and loaded by `from_pretrained`, anew for every seed. "
        "Methods that draw nothing at random (autoencoder, uniform weight selection) give the same weights each time; "
        "their runs differ by the batches alone. All of them count.",
        f"For each method the learning rate with the lowest mean final loss over {tuned} was taken, of one grid.",
        *(f"Left out: {name}, which refused ({why})." for name, why in results["refused"].items()),
        "Speed-up: the steps of the tuned default over the steps after which the interpolated curve first reaches the "
        "tuned default's mean final loss. Geometric mean over seeds; interval by Student's t on the logarithms.",
    ]


def _target(results: Results) -> str:
    config = results["target"]
    parts = [str(config.get("model_type", "model"))]
    for label, keys in (
        ("layers", ("num_hidden_layers", "n_layer")),
        ("wide", ("hidden_size", "n_embd")),
        ("heads", ("num_attention_heads", "n_head")),
        ("tokens", ("vocab_size",)),
    ):
        value = next((config[k] for k in keys if isinstance(config.get(k), int)), None)
        if value is not None:
            parts.append(f"{value:,} {label}")
    return ", ".join(parts)


def _steps(results: Results, name: str) -> str:
    reached = results["methods"][name]["steps_to_threshold"]
    if name == REFERENCE:
        return f"{results['steps']:,}" if reached["per_seed"] else "–"
    if reached["mean"] is not None:
        return count(reached["mean"], "").strip(" s")
    arrived = sum(c is not None for c in reached["per_seed"])
    return f"{arrived} of {len(reached['per_seed'])} seeds" if arrived else "never"


def _spread(stats: dict[str, Any]) -> str:
    return f"{stats['mean']:.3f}" + (f" ± {stats['std']:.3f}" if stats["std"] is not None else "")


def _difference(stats: dict[str, Any]) -> str:
    if stats["mean"] is None:
        return "–"
    return f"{stats['mean']:+.3f}" + (f" ± {stats['ci95'][1] - stats['mean']:.3f}" if stats["ci95"] else "")


def _name(results: Results, name: str) -> str:
    return f'<span class="dot" style="background:{plots.colour(results, name)}"></span>{escape(name)}'
