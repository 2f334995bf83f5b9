"""The report.html of a comparison."""

from __future__ import annotations

from typing import Any

from headstart.report import comparison_plots as plots
from headstart.report.comparison_findings import (
    Results,
    caveats,
    format_step_ratio,
    headline,
    introduction,
    rank_methods,
    speedup_text,
)
from headstart.report.html import Cell, Column, Table, number_columns, render, text_columns
from headstart.report.numbers import DASH, count, count_of, factor, or_dash, short_revision
from headstart.report.plot_style import inline_svg
from headstart.report.scores import REFERENCE

# Label on the page -> names of the setting in configs.
SIZES = {
    "layers": ("num_hidden_layers", "n_layer"),
    "wide": ("hidden_size", "n_embd"),
    "heads": ("num_attention_heads", "n_head"),
    "tokens": ("vocab_size",),
}


def render_comparison(results: Results) -> str:
    """The whole page, from what results.json holds."""
    speedups = plots.speedup_bars(results)
    return render(
        "comparison.html.j2",
        title="headstart: initialisations compared",
        heading=f"headstart compare · {_target_text(results['target'])}",
        headline=headline(results),
        introduction=introduction(results),
        summary=_summary(results),
        loss_figure=inline_svg(plots.loss_curves(results, title=False), "losses"),
        loss_note=(
            f"Mean over {count_of(len(results['seeds']), 'seed')} at each method's best learning rate. Bands reach "
            "from the lowest to the highest seed. The dotted line is the threshold: the mean final loss of the tuned "
            "default. A dot marks where a method crosses it."
        ),
        speedup_figure=None if speedups is None else inline_svg(speedups, "speedups"),
        scores=_score_table(results),
        thresholds=_threshold_table(results),
        learning_rate_figure=inline_svg(plots.learning_rate_curves(results), "rates"),
        learning_rates=_learning_rate_table(results),
        methods=_method_table(results),
        donors=_donor_table(results),
        distance_note=_distance_note(results),
        caveats=caveats(results),
        conditions=_conditions(results),
        command=results["command"],
    )


def _summary(results: Results) -> list[tuple[str, str]]:
    finished = [(name, m) for name, m in rank_methods(results) if m["final_loss"]["mean"] is not None]
    fast = [(name, m) for name, m in finished if name != REFERENCE and m["speedup"]["mean"] is not None]
    items = []
    if fast:
        items.append((speedup_text(fast[0][1]), f"largest speed-up: {fast[0][0]}"))
    if finished:
        name, lowest = min(finished, key=lambda item: item[1]["final_loss"]["mean"])
        items.append((f"{lowest['final_loss']['mean']:.3f}", f"lowest final loss: {name}"))
    if results["threshold"] is not None:
        items.append((f"{results['threshold']:.3f}", "final loss of the tuned default"))
    return [*items, (f"{results['parameters']:,}", "parameters of the target")]


def _score_table(results: Results) -> Table:
    table = Table(
        [
            *text_columns("method"),
            *number_columns("speed-up", "95 %\ninterval", "steps to\nthreshold", "final loss\n± sd over seeds"),
            *number_columns("minus default\n95 %, paired", "loss at\nstep 0", "largest\ngradient"),
        ]
    )
    finals = [m["final_loss"]["mean"] for m in results["methods"].values() if m["final_loss"]["mean"] is not None]
    for name, m in rank_methods(results):
        final, reached = m["final_loss"], m["steps_to_threshold"]
        table.rows.append(
            [
                _method_cell(results, name),
                speedup_text(m),
                or_dash(m["speedup"]["ci95"], lambda ci: " to ".join(map(factor, ci))),
                _reference_steps(results) if name == REFERENCE else _steps_text(reached),
                Cell(_mean_with_spread(final), best=bool(finals) and final["mean"] == min(finals)),
                DASH if name == REFERENCE else _difference_text(m["difference"]),
                or_dash(m["step0_loss"], "{:.2f}".format),
                or_dash(m["max_grad_norm"], "{:.1f}".format),
            ]
        )
    return table


def _threshold_table(results: Results) -> Table | None:
    """Step ratios to the losses that the default has after shares of its steps; None if the default has none."""
    levels: dict[str, Any] = next((m["thresholds"] for m in results["methods"].values() if m["thresholds"]), {})
    if not levels:
        return None
    headings = [
        f"to {found['loss']:.3f}, the default's\nat {float(share):.0%} of its steps" for share, found in levels.items()
    ]
    table = Table([*text_columns("method"), *number_columns(*headings)])
    for name, m in rank_methods(results):
        if name != REFERENCE:
            ratios = [or_dash(m["thresholds"].get(share), format_step_ratio) for share in levels]
            table.rows.append([_method_cell(results, name), *ratios])
    return table


def _learning_rate_table(results: Results) -> Table:
    grid = [f"{lr:g}" for lr in results["grid"]]
    table = Table([*text_columns("final loss at"), *number_columns(*grid)])
    for name, m in rank_methods(results):
        scale = f" (scale {m['scale']:g})" if m["scale"] not in (None, 1.0) else ""
        chosen = None if m["lr"] is None else f"{m['lr']:g}"
        cells = [Cell(or_dash(m["lrs"][lr], "{:.3f}".format, "diverged"), best=lr == chosen) for lr in grid]
        table.rows.append([_method_cell(results, name, scale), *cells])
    return table


def _method_table(results: Results) -> Table:
    headings = ("donors", "FLOPs to\ntrain them", "time for\none model", "distance\nto donors")
    table = Table([*text_columns("method"), *number_columns(*headings), Column("what it does", "wide")])
    for name, m in rank_methods(results):
        options = ", ".join(f"{key}={value}" for key, value in m["options"].items())
        table.rows.append(
            [
                _method_cell(results, name),
                str(len(m["donors"])) if m["donors"] else "none",
                or_dash(m["donor_cost"], "{:.2g}".format, "unknown"),
                f"{m['seconds']:.1f} s",
                or_dash(m["novelty"], lambda novelty: f"{novelty['distance']:.2f}"),
                m["summary"] + (f" ({options})" if options else ""),
            ]
        )
    return table


def _donor_table(results: Results) -> Table | None:
    donors = {d["name"]: d for m in results["methods"].values() for d in m["donors"]}
    if not donors:
        return None
    headings = ("parameters", "held-out loss\nof its training", "tokens seen")
    table = Table([*text_columns("donor", "licence", "revision"), *number_columns(*headings)])
    for name, donor in sorted(donors.items()):
        table.rows.append(
            [
                name,
                str(donor["license"]),
                Cell(short_revision(donor["revision"]), code=True),
                f"{donor['parameters']:,}",
                or_dash(donor["loss"], "{:.3f}".format),
                or_dash(donor["tokens"], "{:,}".format),
            ]
        )
    return table


def _distance_note(results: Results) -> str:
    """What the distance to donors means, and for which methods it is missing, one sentence for each reason."""
    without_distance: dict[str, list[str]] = {}
    for name, m in rank_methods(results):
        if m["novelty"] is None and m["donors"]:
            without_distance.setdefault(m["novelty_note"], []).append(name)
    reasons = "".join(f" {', '.join(names)}: {reason}." for reason, names in without_distance.items())
    return (
        "Distance to donors: the relative distance of each matrix to the nearest matrix of the same role and shape in "
        "the donors that the method used; median over matrices. A copy has distance 0, unrelated weights of equal size "
        f"have 1.4. A dash means: no donor, or the reason given here.{reasons}"
    )


def _conditions(results: Results) -> list[str]:
    corpus, steps, sequence = results["corpus"], results["steps"], results["sequence"]
    measured = min(results["windows"] * sequence, corpus["held_out"])
    tuning = results["tuning_seeds"]
    tuned_over = "seeds" if tuning == results["seeds"] else f"the first {count_of(len(tuning), 'seed')}"
    return [
        f"Text: {corpus['name']}, {corpus['tokens']:,} tokens (tokenizer: {corpus['tokenizer']}). The last "
        f"{corpus['held_out']:,} are held out. Every loss on this page is measured on the same {measured:,} of them, "
        f"in windows of {sequence}.",
        f"Training: AdamW, {count_of(steps, 'step')} of {results['batch_size']} × {sequence} tokens, 5 % warm-up, "
        "cosine decay to a tenth, weight decay 0.1 on matrices, gradients clipped to norm 1. Seed and step alone "
        "determine the batches.",
        "Every seed gets a new initialisation, written by `headstart generate` and read by `from_pretrained`. Methods "
        "without randomness (autoencoder, uniform weight selection) give the same weights each time, and their runs "
        "differ only in the batches. All runs count.",
        f"Learning rate: each method uses the one with the lowest mean final loss over {tuned_over}, all from one "
        "grid.",
        *(
            f"Left out: {name}. It cannot fill this target: {reason.rstrip('.')}."
            for name, reason in results["refused"].items()
        ),
        "Speed-up: the steps of the tuned default divided by the steps after which the interpolated loss curve first "
        "reaches the threshold. Geometric mean over seeds, with Student's t interval on the logarithms.",
    ]


def _target_text(config: dict[str, Any]) -> str:
    parts = [str(config.get("model_type", "model"))]
    for label, keys in SIZES.items():
        value = next((config[k] for k in keys if isinstance(config.get(k), int)), None)
        if value is not None:
            parts.append(f"{value:,} {label}")
    return ", ".join(parts)


def _reference_steps(results: Results) -> str:
    """The steps of the default: all of them, by the definition of the threshold."""
    return f"{results['steps']:,}" if results["methods"][REFERENCE]["steps_to_threshold"]["per_seed"] else DASH


def _steps_text(reached: dict[str, Any]) -> str:
    if reached["mean"] is not None:
        return count(reached["mean"])
    arrived = sum(c is not None for c in reached["per_seed"])
    return f"{arrived} of {len(reached['per_seed'])} seeds" if arrived else "never"


def _mean_with_spread(stats: dict[str, Any]) -> str:
    if stats["mean"] is None:
        return DASH
    return f"{stats['mean']:.3f}" + (f" ± {stats['std']:.3f}" if stats["std"] is not None else "")


def _difference_text(stats: dict[str, Any]) -> str:
    if stats["mean"] is None:
        return DASH
    return f"{stats['mean']:+.3f}" + (f" ± {stats['ci95'][1] - stats['mean']:.3f}" if stats["ci95"] else "")


def _method_cell(results: Results, name: str, suffix: str = "") -> Cell:
    return Cell(name + suffix, dot=plots.method_colour(results, name))
