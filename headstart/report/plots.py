"""Figures of a comparison. The SVG ones have no background, and their text takes the colour of the page."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING, Any

import numpy as np

from headstart.compare.scores import REFERENCE
from headstart.report.comparison_findings import count, fold

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#3b82f6", "#f97316", "#10a37f", "#d946ef", "#ef4444", "#06a5c4", "#8b5cf6", "#a3a012", "#b45309", "#64748b")
GREY = "#8a8f98"
INK = "#1f2328"  # replaced by currentColor in an SVG
STYLES = ("-", "--", "-.", ":")

# Log-like in steps from 1 on, with room for step 0: good starts are over their threshold within few steps.
LINTHRESH = 1.0
FEW = 15  # methods whose legend is set in full size
LEGEND: dict[str, Any] = {"bbox_to_anchor": (1.01, 1.0), "loc": "upper left", "frameon": False, "labelcolor": INK}


def colour(results: dict[str, Any], method: str) -> str:
    others = [name for name in results["methods"] if name != REFERENCE]
    return GREY if method == REFERENCE else COLOURS[others.index(method) % len(COLOURS)]


def losses(results: dict[str, Any], title: bool) -> Figure:
    """Held-out loss over steps: the mean over seeds, the band from the lowest to the highest, and the threshold."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=_size(5.0, len(results["methods"])), layout="constrained")
    axes = figure.subplots()
    drawn = {name: m for name, m in results["methods"].items() if m["curves"]}
    ends = []
    for i, (name, method) in enumerate(drawn.items()):
        steps = method["curves"][0]["steps"]
        curves = np.array([c["losses"] for c in method["curves"]])
        style = "--" if name == REFERENCE else STYLES[(max(i - 1, 0) // len(COLOURS)) % len(STYLES)]
        line = colour(results, name)
        axes.fill_between(steps, curves.min(0), curves.max(0), color=line, alpha=0.18, linewidth=0)
        axes.plot(steps, curves.mean(0), style, color=line, linewidth=2, label=name)
        ends.append((float(curves.mean(0)[-1]), name, line))
    axes.set_xscale("symlog", linthresh=LINTHRESH, linscale=0.35)
    budget = results["steps"]
    axes.set_xlim(-0.02, budget * 1.02)
    ticks = [0, *(t for e in range(7) for t in (10**e, 3 * 10**e) if t < 0.75 * budget), budget]
    axes.set_xticks(ticks, [f"{t:,}" for t in ticks])
    axes.set_yscale("log")  # what separates methods at the end is small beside what they start from
    low, high = axes.get_ylim()
    values = [
        t for t in (0.1, 0.2, 0.5, 1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10, 12, 15, 20, 30, 50) if low <= t <= high
    ]
    axes.set_yticks(values, [f"{t:g}" for t in values])
    axes.minorticks_off()
    if results["threshold"] is not None:
        axes.axhline(results["threshold"], color=GREY, linewidth=1, linestyle=":")
        for name, method in drawn.items():
            reached = method["steps_to_threshold"]["mean"]
            if reached is not None and name != REFERENCE:
                axes.plot(reached, results["threshold"], "o", color=colour(results, name), markersize=6, zorder=5)
    axes.set_xlabel("training steps (logarithmic from 1 on)")
    axes.set_ylabel("held-out loss, nats per token")
    if title:
        axes.set_title(
            f"Training from {len(drawn)} initialisations, {count(len(results['seeds']), 'seed')} each", loc="left"
        )
    order = [name for _, name, _ in sorted(ends, reverse=True)]
    handles, labels = axes.get_legend_handles_labels()
    chosen = [handles[labels.index(name)] for name in order]
    texts = [f"{name}  {loss:.3f}" for loss, name, _ in sorted(ends, reverse=True)]
    size = _font(len(texts))
    legend = axes.legend(chosen, texts, title="loss at the end", alignment="left", fontsize=size, **LEGEND)
    legend.get_title().set_color(INK)
    plain(axes)
    return figure


def rates(results: dict[str, Any]) -> Figure:
    """Final loss over the learning rates that were tried, one line per method; the chosen rate is filled."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=_size(3.4, len(results["methods"])), layout="constrained")
    axes = figure.subplots()
    for name, method in results["methods"].items():
        points = [(float(lr), loss) for lr, loss in method["lrs"].items() if loss is not None]
        if not points:
            continue
        line = colour(results, name)
        x, y = zip(*sorted(points), strict=True)
        axes.plot(x, y, "--" if name == REFERENCE else "-", color=line, linewidth=1.6, label=name)
        chosen = [lr == method["lr"] for lr in x]
        axes.scatter(x, y, s=36, color=[line if c else "none" for c in chosen], edgecolors=line, zorder=4)
    axes.set_xscale("log")
    grid = results["grid"]
    axes.set_xticks(grid, [f"{lr:g}" for lr in grid])
    axes.minorticks_off()
    axes.set_xlabel("peak learning rate")
    axes.set_ylabel("final held-out loss")
    axes.legend(fontsize=_font(len(results["methods"])), **LEGEND)
    plain(axes)
    return figure


def speedups(results: dict[str, Any]) -> Figure | None:
    """Bars of the speed-up with its interval, the fastest on top; None where no method has one."""
    from matplotlib.figure import Figure

    ranked = sorted(
        ((m["speedup"]["mean"], name) for name, m in results["methods"].items() if m["speedup"]["mean"] is not None)
    )
    if len(ranked) < 2:
        return None
    figure = Figure(figsize=(9.2, 0.9 + 0.42 * len(ranked)), layout="constrained")
    axes = figure.subplots()
    for row, (mean, name) in enumerate(ranked):
        axes.barh(row, mean - 1, left=1, height=0.62, color=colour(results, name), alpha=0.85)
        bounds = results["methods"][name]["speedup"]["ci95"]
        if bounds is not None:
            axes.plot(bounds, [row, row], color=INK, linewidth=1.4, solid_capstyle="butt")
        axes.text(max(mean, (bounds or [0])[-1]), row, f"  {fold(results['methods'][name])}", va="center", color=INK)
    axes.set_yticks(range(len(ranked)), [name for _, name in ranked])
    axes.axvline(1, color=GREY, linewidth=1, linestyle=":")
    axes.set_xscale("log")
    low = min(min(mean, (results["methods"][name]["speedup"]["ci95"] or [mean])[0]) for mean, name in ranked)
    high = max(max(mean, (results["methods"][name]["speedup"]["ci95"] or [mean])[-1]) for mean, name in ranked)
    axes.set_xlim(min(0.8, low * 0.8), high * 1.7)
    ticks = [t for t in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if low * 0.8 <= t <= high * 1.7]
    axes.set_xticks(ticks, [f"{t:g}×" for t in ticks])
    axes.minorticks_off()
    axes.set_xlabel("times fewer steps than the tuned default needs (logarithmic)")
    plain(axes, grid="x")
    return figure


def losses_png(results: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    losses(results, title=True).savefig(buffer, format="png", dpi=150, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def svg(figure: Figure, label: str) -> str:
    """An inline <svg> that scales with its column, reads `label` to those who cannot see it, and is dark where the
    page is."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": label}):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r"font-family: [^;\"]*", "font-family: inherit", text)
    prefix = re.sub(r"\W", "", label)  # ids are global in a page with several figures
    text = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{prefix}-", text)
    head = re.compile(r'<svg[^>]*viewBox="([^"]*)"[^>]*>')
    return head.sub(
        lambda m: f'<svg role="img" aria-label="{label}" viewBox="{m[1]}" xmlns:xlink="http://www.w3.org/1999/xlink">',
        text,
        count=1,
    )


def _size(height: float, methods: int) -> tuple[float, float]:
    """Inches: high enough for a legend of all methods."""
    return 9.2, max(height, 0.9 + (0.27 if methods <= FEW else 0.21) * methods)


def _font(methods: int) -> int:
    return 10 if methods <= FEW else 8


def plain(axes: Any, grid: str = "y") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    for spine in axes.spines.values():
        spine.set_color(GREY)
    axes.tick_params(color=GREY, labelcolor=INK)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    axes.title.set_color(INK)
    axes.grid(axis=grid, color=GREY, alpha=0.22, linewidth=0.8)
    axes.set_axisbelow(True)
