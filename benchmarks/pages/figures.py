"""Figures: final losses of all methods, and how activations grow with depth."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.head_start import tasks
from benchmarks.head_start.results import Entries, rank_methods
from headstart.report.plot_style import GREY, style_axes
from headstart.report.scores import REFERENCE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER, TEXT = "#ffffff", "#1f2328"
ACTIVATION_METHODS = (
    "diffusion", "autoencoder", tasks.RETRIEVAL, *tasks.EARLIER_VERSIONS,
    "sliced", "net2wider", "stacking", "row-column", "normal", "mimetic",
)  # fmt: skip


def draw_figures(scored: Mapping[tasks.Comparison, Entries]) -> dict[str, bytes]:
    """{name: PNG}"""
    draw: dict[str, Callable[[Any], Figure]] = {"head_starts": draw_head_starts, "activations": draw_activations}
    return {name: _png(draw[name](data)) for name, data in figure_data(scored).items()}


def figure_data(scored: Mapping[tasks.Comparison, Entries]) -> dict[str, Any]:
    """{name: what the figure shows}, of the finished comparisons; a figure without any is left out."""
    long = {c: e for c, e in scored.items() if c.budget == "long" and len(e) > 1}
    deeper = [e for c, e in long.items() if (c.task, c.target) == ("A", "deeper")]
    return ({"head_starts": long} if long else {}) | ({"activations": deeper[0]} if deeper else {})


def draw_head_starts(scored: Mapping[tasks.Comparison, Entries]) -> Figure:
    """Methods by comparisons: the final loss minus the default's, blue where it is lower."""
    from matplotlib.figure import Figure

    names = [name for name in rank_methods(scored.values()) if any(name in e for e in scored.values())]
    differences = np.array([[_difference(e, name) for e in scored.values()] for name in names])
    figure = Figure(figsize=(2.6 + 0.75 * len(scored), 1.6 + 0.26 * len(names)), layout="constrained", facecolor=PAPER)
    axes = figure.subplots()
    axes.imshow(differences, cmap="RdBu_r", vmin=-0.8, vmax=0.8, aspect="auto")
    axes.set_yticks(range(len(names)), names, fontsize=8)
    labels = [f"{c.task} {c.target}\n{c.text}" for c in scored]
    axes.set_xticks(range(len(labels)), labels, fontsize=7, rotation=45, ha="right")
    for (i, j), value in np.ndenumerate(differences):
        cell = f"{value:+.2f}" if np.isfinite(value) else "–"
        axes.text(j, i, cell, ha="center", va="center", fontsize=7, color=PAPER if abs(value) > 0.5 else TEXT)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    figure.suptitle(f"Loss after {tasks.BUDGETS['long']} steps,\nminus the tuned default's", fontsize=9)
    return figure


def _difference(entries: Entries, name: str) -> float:
    mean = entries[name]["difference"]["mean"] if name in entries else None
    return math.nan if mean is None else mean


def draw_activations(entries: Entries) -> Figure:
    """Root mean square of the residual stream by depth, before and after training; the default in black."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.2, 3.8), layout="constrained", facecolor=PAPER)
    for axes, when in zip(figure.subplots(1, 2, sharey=True), ("start", "end"), strict=True):
        for name in [*(n for n in ACTIVATION_METHODS if n in entries), REFERENCE]:
            rms = entries[name]["activation_rms"]
            if rms is not None and rms[when] is not None:
                values = rms[when][:-1]  # the last one is measured after the final norm
                style = {"color": TEXT, "linewidth": 2.5} if name == REFERENCE else {}
                axes.plot(range(len(values)), values, marker="o", markersize=3, label=name, **style)
        axes.set_yscale("log")
        axes.set_xlabel("block (0: embedding)")
        axes.set_title("before training" if when == "start" else f"after {tasks.BUDGETS['long']} steps", fontsize=9)
        style_axes(axes)
    axes.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0), labelcolor=TEXT)
    figure.supylabel("RMS of the residual stream", fontsize=9, color=GREY)
    return figure


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    return buffer.getvalue()
