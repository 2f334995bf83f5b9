"""The report.html of a comparison."""

from __future__ import annotations

from functools import partial
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
from headstart.report.html import Cell, Column, Table, render
from headstart.report.numbers import DASH, count, count_of, format_factor, or_dash, short_revision
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
    return render(
        "comparison.html.j2",
        title="headstart: initialisations compared",
        heading=f"headstart compare · {_adapter_text(results)}{_target_text(results['target'])}",
        headline=headline(results),
        introduction=introduction(results),
        summary=_summary(results),
        loss_figure=inline_svg(plots.loss_curves(results, title=False), "losses"),
        loss_note=(
            f"Mean over {count_of(len(results['seeds']), 'seed')} at each method's best learning rate. Bands reach "
            "from the lowest to the highest seed. The dotted line is the threshold: the mean final loss of the tuned "
            "default. A dot marks where a method crosses it."
        ),
        speedup_figure=inline_svg(plots.speedup_bars(results), "speedups"),
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
    trained = "trained parameters" if "adapter" in results else "parameters of the target"
    return [*items, (f"{results['parameters']:,}", trained)]


def _entries(results: Results) -> list[dict[str, Any]]:
    """The ranked methods, each with its `name`."""
    return [m | {"name": name} for name, m in rank_methods(results)]


def _method_column(results: Results, heading: str = "method") -> Column:
    return Column(heading, lambda m: Cell(m["name"], dot=plots.method_colour(results, m["name"])), "text")


def _score_table(results: Results) -> Table:
    finals = [m["final_loss"]["mean"] for m in results["methods"].values() if m["final_loss"]["mean"] is not None]

    def final_loss(m: dict[str, Any]) -> Cell:
        is_lowest = bool(finals) and m["final_loss"]["mean"] == min(finals)
        return Cell(_mean_with_spread(m["final_loss"]), best=is_lowest)

    columns = [
        _method_column(results),
        Column("speed-up", speedup_text),
        Column(
            "95 %\ninterval", lambda m: or_dash(m["speedup"]["ci95"], lambda ci: " to ".join(map(format_factor, ci)))
        ),
        Column("steps to\nthreshold", lambda m: _steps_text(results, m)),
        Column("final loss\n± sd over seeds", final_loss),
        Column("minus default\n95 %, paired", _difference_text),
        Column("loss at\nstep 0", lambda m: or_dash(m["step0_loss"], "{:.2f}".format)),
        Column("largest\ngradient", lambda m: or_dash(m["max_grad_norm"], "{:.1f}".format)),
    ]
    return Table(columns, _entries(results))


def _threshold_table(results: Results) -> Table | None:
    """Step ratios to the losses that the default has after shares of its steps; None if the default has none."""
    levels: dict[str, Any] = next((m["thresholds"] for m in results["methods"].values() if m["thresholds"]), {})
    if not levels:
        return None
    columns = [
        Column(
            f"to {found['loss']:.3f}, the default's\nat {float(share):.0%} of its steps", partial(_ratio_text, share)
        )
        for share, found in levels.items()
    ]
    others = [m for m in _entries(results) if m["name"] != REFERENCE]
    return Table([_method_column(results), *columns], others)


def _ratio_text(share: str, m: dict[str, Any]) -> str:
    return or_dash(m["thresholds"].get(share), format_step_ratio)


def _learning_rate_table(results: Results) -> Table:
    def loss_cell(rate: float, m: dict[str, Any]) -> Cell:
        return Cell(or_dash(m["lrs"][f"{rate:g}"], "{:.3f}".format, "diverged"), best=rate == m["lr"])

    entries = _entries(results)
    columns = [_method_column(results, "final loss at")]
    if any(m["scale"] not in (None, 1.0) for m in entries):
        columns.append(Column("scale", lambda m: or_dash(m["scale"], "{:g}".format)))
    columns += [Column(f"{rate:g}", partial(loss_cell, rate)) for rate in results["grid"]]
    return Table(columns, entries)


def _method_table(results: Results) -> Table:
    def summary(m: dict[str, Any]) -> str:
        options = ", ".join(f"{key}={value}" for key, value in m["options"].items())
        return m["summary"] + (f" ({options})" if options else "")

    columns = [
        _method_column(results),
        Column("donors", lambda m: str(len(m["donors"])) if m["donors"] else "none"),
        Column("FLOPs to\ntrain them", lambda m: or_dash(m["donor_cost"], "{:.2g}".format, "unknown")),
        Column("time for\none model", lambda m: f"{m['seconds']:.1f} s"),
        Column("distance\nto donors", lambda m: or_dash(m["novelty"], lambda found: f"{found['distance']:.2f}")),
        Column("what it does", summary, "wide"),
    ]
    return Table(columns, _entries(results))


def _donor_table(results: Results) -> Table | None:
    donors = {d["name"]: d for m in results["methods"].values() for d in m["donors"]}
    columns = [
        Column("donor", lambda d: d["name"], "text"),
        Column("licence", lambda d: str(d["license"]), "text"),
        Column("revision", lambda d: Cell(short_revision(d["revision"]), code=True), "text"),
        Column("parameters", lambda d: or_dash(d["parameters"], "{:,}".format)),
        Column("held-out loss\nof its training", lambda d: or_dash(d["loss"], "{:.3f}".format)),
        Column("tokens seen", lambda d: or_dash(d["tokens"], "{:,}".format)),
    ]
    return Table(columns, [d for _, d in sorted(donors.items())]) if donors else None


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
    tuned_over = "all seeds" if tuning == results["seeds"] else "the first seed"
    if len(tuning) > 1 and tuning != results["seeds"]:
        tuned_over = f"the first {len(tuning)} seeds"
    return [
        f"Text: {corpus['name']}, {corpus['tokens']:,} tokens (tokenizer: {corpus['tokenizer']}). The last "
        f"{corpus['held_out']:,} are held out. Every loss on this page is measured on the same {measured:,} of them, "
        f"in windows of {sequence}.",
        f"Training: AdamW, {count_of(steps, 'step')} of {results['batch_size']} × {sequence} tokens, 5 % warm-up, "
        f"cosine decay to a tenth, {_decay_text(results)}, gradients clipped to norm 1. Seed and step alone "
        "determine the batches.",
        _start_text(results),
        f"Learning rate: each method uses the one with the lowest mean final loss over {tuned_over}, all from one "
        "grid.",
        *(
            f"Left out: {name}. It cannot fill this target: {reason.rstrip('.')}."
            for name, reason in results["refused"].items()
        ),
        "Speed-up: the steps of the tuned default divided by the steps after which the interpolated loss curve first "
        "reaches the threshold. Geometric mean over seeds, with Student's t interval on the logarithms.",
    ]


def _start_text(results: Results) -> str:
    """Where each run starts."""
    if "adapter" not in results:
        return (
            "Every seed gets a new initialisation, written by `headstart generate` and read by `from_pretrained`. "
            "Methods without randomness (autoencoder, uniform weight selection) give the same weights each time, and "
            "their runs differ only in the batches. All runs count."
        )
    adapter = results["adapter"]
    return (
        f"Adapters: rank {adapter['rank']}, alpha {adapter['alpha']:g}, modules {', '.join(adapter['targets'])}. Every "
        "seed gets a new adapter, written by `headstart lora` and read by `PeftModel.from_pretrained`. Only A and B "
        "are trained. A method that moves a part of the base into the adapter trains with the base that it changed, so "
        "that all methods start at the loss of the base, but for `both_small` of pareto. Methods without randomness "
        "(pissa, olora, eva, corda, lora_ga) give the same adapter each time, and their runs differ only in the "
        "batches. All runs count."
    )


def _decay_text(results: Results) -> str:
    return "no weight decay" if "adapter" in results else "weight decay 0.1 on matrices"


def _adapter_text(results: Results) -> str:
    return f"LoRA of rank {results['adapter']['rank']} on " if "adapter" in results else ""


def _target_text(config: dict[str, Any]) -> str:
    parts = [str(config.get("model_type", "model"))]
    for label, keys in SIZES.items():
        value = next((config[k] for k in keys if isinstance(config.get(k), int)), None)
        if value is not None:
            parts.append(f"{value:,} {label}")
    return ", ".join(parts)


def _steps_text(results: Results, m: dict[str, Any]) -> str:
    reached = m["steps_to_threshold"]
    if m["name"] == REFERENCE:  # all steps, by the definition of the threshold
        return f"{results['steps']:,}" if reached["per_seed"] else DASH
    if reached["mean"] is not None:
        return count(reached["mean"])
    arrived = sum(c is not None for c in reached["per_seed"])
    return f"{arrived} of {len(reached['per_seed'])} seeds" if arrived else "never"


def _mean_with_spread(stats: dict[str, Any]) -> str:
    if stats["mean"] is None:
        return DASH
    return f"{stats['mean']:.3f}" + (f" ± {stats['std']:.3f}" if stats["std"] is not None else "")


def _difference_text(m: dict[str, Any]) -> str:
    stats = m["difference"]
    if m["name"] == REFERENCE or stats["mean"] is None:
        return DASH
    return f"{stats['mean']:+.3f}" + (f" ± {stats['ci95'][1] - stats['mean']:.3f}" if stats["ci95"] else "")
