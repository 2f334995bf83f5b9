"""Figures of a comparison: loss curves, speed-ups, and losses over learning rates."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np

from headstart.report.comparison_findings import Results, speedup_text
from headstart.report.numbers import count_of
from headstart.report.plot_style import COLOURS, GREY, INK, SIDE_LEGEND, WIDTH, style_axes
from headstart.report.scores import REFERENCE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LINE_STYLES = ("-", "--", "-.", ":")  # one for each round through the colours
LINEAR_STEPS = 1.0  # the axis of steps is linear up to here and logarithmic beyond: good starts gain most early
LOSS_TICKS = (0.1, 0.2, 0.5, 1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10, 12, 15, 20, 30, 50)
SPEEDUP_TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
MAX_LARGE_LEGEND = 15  # methods; a longer legend is set in small type


def method_colour(results: Results, method: str) -> str:
    """The colour of a method in every figure and table of the page; grey for the default."""
    others = [name for name in results["methods"] if name != REFERENCE]
    return GREY if method == REFERENCE else COLOURS[others.index(method) % len(COLOURS)]


def loss_curves(results: Results, title: bool) -> Figure:
    """Held-out loss over steps: the mean over seeds, a band from the lowest to the highest, and the threshold."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=_figure_size(5.0, len(results["methods"])), layout="constrained")
    axes = figure.subplots()
    drawn = {name: m for name, m in results["methods"].items() if m["curves"]}
    final_losses = []
    for i, (name, method) in enumerate(drawn.items()):
        curves = np.array([c["losses"] for c in method["curves"]])
        _draw_curve(axes, results, name, curves, i)
        final_losses.append((float(curves.mean(0)[-1]), name))
    _set_loss_scales(axes, results["steps"])
    if results["threshold"] is not None:
        axes.axhline(results["threshold"], color=GREY, linewidth=1, linestyle=":")
        for name, method in drawn.items():
            reached = method["steps_to_threshold"]["mean"]
            if reached is not None and name != REFERENCE:
                colour = method_colour(results, name)
                axes.plot(reached, results["threshold"], "o", color=colour, markersize=6, zorder=5)
    if title:
        seeds = count_of(len(results["seeds"]), "seed")
        axes.set_title(f"Training from {len(drawn)} initialisations, {seeds} each", loc="left")
    _add_loss_legend(axes, final_losses)
    style_axes(axes)
    return figure


def _draw_curve(axes: Axes, results: Results, name: str, curves: np.ndarray, index: int) -> None:
    """curves [seeds, points]."""
    steps = results["methods"][name]["curves"][0]["steps"]
    style = "--" if name == REFERENCE else LINE_STYLES[(max(index - 1, 0) // len(COLOURS)) % len(LINE_STYLES)]
    colour = method_colour(results, name)
    axes.fill_between(steps, curves.min(0), curves.max(0), color=colour, alpha=0.18, linewidth=0)
    axes.plot(steps, curves.mean(0), style, color=colour, linewidth=2, label=name)


def _set_loss_scales(axes: Axes, budget: int) -> None:
    axes.set_xscale("symlog", linthresh=LINEAR_STEPS, linscale=0.35)
    axes.set_xlim(-0.02, budget * 1.02)
    steps = [0, *(t for e in range(7) for t in (10**e, 3 * 10**e) if t < 0.75 * budget), budget]
    axes.set_xticks(steps, [f"{t:,}" for t in steps])
    axes.set_yscale("log")  # final losses differ little compared with the loss at step 0
    low, high = axes.get_ylim()
    losses = [t for t in LOSS_TICKS if low <= t <= high]
    axes.set_yticks(losses, [f"{t:g}" for t in losses])
    axes.minorticks_off()
    axes.set_xlabel("training steps (logarithmic from 1)")
    axes.set_ylabel("held-out loss, nats per token")


def _add_loss_legend(axes: Axes, final_losses: list[tuple[float, str]]) -> None:
    """Names and final losses, in the order of the curves' ends from top to bottom."""
    handles, labels = axes.get_legend_handles_labels()
    ordered = sorted(final_losses, reverse=True)
    legend = axes.legend(
        [handles[labels.index(name)] for _, name in ordered],
        [f"{name}  {loss:.3f}" for loss, name in ordered],
        title="final loss",
        alignment="left",
        fontsize=_legend_size(len(ordered)),
        **SIDE_LEGEND,
    )
    legend.get_title().set_color(INK)


def learning_rate_curves(results: Results) -> Figure | None:
    """Final loss over the learning rates that were tried, one line per method; the chosen rate is filled. None where
    every run diverged."""
    from matplotlib.figure import Figure

    if all(loss is None for method in results["methods"].values() for loss in method["lrs"].values()):
        return None
    figure = Figure(figsize=_figure_size(3.4, len(results["methods"])), layout="constrained")
    axes = figure.subplots()
    for name, method in results["methods"].items():
        points = [(float(lr), loss) for lr, loss in method["lrs"].items() if loss is not None]
        if not points:
            continue
        colour = method_colour(results, name)
        x, y = zip(*sorted(points), strict=True)
        axes.plot(x, y, "--" if name == REFERENCE else "-", color=colour, linewidth=1.6, label=name)
        fills = [colour if lr == method["lr"] else "none" for lr in x]
        axes.scatter(x, y, s=36, color=fills, edgecolors=colour, zorder=4)
    axes.set_xscale("log")
    grid = results["grid"]
    axes.set_xticks(grid, [f"{lr:g}" for lr in grid])
    axes.minorticks_off()
    axes.set_xlabel("peak learning rate (logarithmic)")
    axes.set_ylabel("final held-out loss")
    axes.legend(fontsize=_legend_size(len(results["methods"])), **SIDE_LEGEND)
    style_axes(axes)
    return figure


def speedup_bars(results: Results) -> Figure | None:
    """Speed-ups with their intervals, the fastest on top; None where fewer than two methods have one."""
    from matplotlib.figure import Figure

    speedups = {name: m["speedup"] for name, m in results["methods"].items() if m["speedup"]["mean"] is not None}
    if len(speedups) < 2:
        return None
    ordered = sorted(speedups, key=lambda name: (speedups[name]["mean"], name))
    figure = Figure(figsize=(WIDTH, 0.9 + 0.42 * len(ordered)), layout="constrained")
    axes = figure.subplots()
    for row, name in enumerate(ordered):
        mean, bounds = speedups[name]["mean"], speedups[name]["ci95"]
        axes.barh(row, mean - 1, left=1, height=0.62, color=method_colour(results, name), alpha=0.85)
        if bounds is not None:
            axes.plot(bounds, [row, row], color=INK, linewidth=1.4, solid_capstyle="butt")
        end = (max(mean, 1, (bounds or [0])[-1]), row)
        text = speedup_text(results["methods"][name])
        axes.annotate(text, end, xytext=(6, 0), textcoords="offset points", va="center", color=INK)
    axes.set_yticks(range(len(ordered)), ordered)
    axes.axvline(1, color=GREY, linewidth=1, linestyle=":")
    axes.set_xscale("log")
    ends = [x for speedup in speedups.values() for x in (speedup["mean"], *(speedup["ci95"] or ()))]
    low, high = 0.8 * min(ends), 1.7 * max(ends)
    axes.set_xlim(min(0.8, low), high)
    ticks = [t for t in SPEEDUP_TICKS if low <= t <= high]
    axes.set_xticks(ticks, [f"{t:g}×" for t in ticks])
    axes.minorticks_off()
    axes.set_xlabel("speed-up over the tuned default (logarithmic)")
    style_axes(axes, grid="x")
    return figure


def loss_curves_png(results: Results) -> bytes:
    """The loss curves as a PNG file on white."""
    buffer = io.BytesIO()
    figure = loss_curves(results, title=True)
    figure.savefig(buffer, format="png", dpi=150, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def _figure_size(height: float, methods: int) -> tuple[float, float]:
    """Inches, high enough for a legend of all methods."""
    return WIDTH, max(height, 0.9 + (0.27 if methods <= MAX_LARGE_LEGEND else 0.21) * methods)


def _legend_size(methods: int) -> int:
    return 10 if methods <= MAX_LARGE_LEGEND else 8
