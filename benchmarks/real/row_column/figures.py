"""Figures of row-column statistics: by layer and role, and the correlations of rows within a block."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from benchmarks.real.models import DONORS
from benchmarks.real.row_column.statistics import TESTS
from headstart.report.plot_style import COLOURS, GREY, style_axes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLES = {
    "row_spread": "spread of row energies",
    "column_spread": "spread of column energies",
    "row_correlation": "correlation of rows",
}
SPACES = ("ffn", "query-key", "value", "residual")
PAPER = "#ffffff"


def draw_statistics(facts: dict[str, Any]) -> bytes:
    """A PNG: each statistic divided by its null, and the couplings of each space, by layer. facts: donor -> what
    `measure_statistics` returns."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    names = [name for name in DONORS if name in facts]
    figure = Figure(figsize=(4.8 * len(names), 11.0), layout="constrained", facecolor=PAPER)
    grid = figure.subplots(len(TESTS) + 1, len(names), squeeze=False)
    for column, name in enumerate(names):
        rows = [dict(zip(facts[name]["columns"], row, strict=True)) for row in facts[name]["tensors"]]
        for axes, test in zip(grid[:, column], TESTS, strict=False):
            _draw_test(axes, [row for row in rows if row["layer"] is not None], test)
            axes.set_title(f"{DONORS[name].title}: {TITLES[test]} / shuffled", fontsize=9)
        _draw_couplings(grid[-1, column], facts[name]["couplings"])
        grid[-1, column].set_title(f"{DONORS[name].title}: coupling of writers and readers", fontsize=9)
        grid[-1, column].set_xlabel("layer")
        for axes in grid[:, column]:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in grid[[0, -1], -1]:
        axes.legend(fontsize=7, frameon=False, bbox_to_anchor=(1.01, 1.0), loc="upper left")
    return _png(figure)


def _draw_test(axes: Any, rows: list[dict[str, Any]], test: str) -> None:
    for role, colour in zip(dict.fromkeys(row["role"] for row in rows), COLOURS, strict=False):
        own = sorted((row["layer"], row[test] / row[f"{test}_null"]) for row in rows if row["role"] == role)
        axes.plot(*zip(*own, strict=True), color=colour, label=role, linewidth=1.2)
    axes.axhline(1.0, color=GREY, linestyle="--", linewidth=1)
    axes.set_yscale("log")
    axes.set_yticks((1, 2, 4, 8), ("1", "2", "4", "8"))
    axes.set_ylim(0.8, 9)
    axes.minorticks_off()
    style_axes(axes)


def _draw_couplings(axes: Any, couplings: list[list[Any]]) -> None:
    for space, colour in zip(SPACES, COLOURS, strict=False):
        own = sorted(
            (layer, value)
            for name, layer, a, _, value, _ in couplings
            if name == space and layer is not None and a != "mlp.gate"
        )
        label = "ffn (up)" if space == "ffn" else space
        axes.plot(*zip(*own, strict=True), color=colour, label=label, linewidth=1.2)
    axes.axhline(0.0, color=GREY, linestyle="--", linewidth=1)
    axes.set_ylim(-1, 1)
    style_axes(axes)


def draw_patterns(facts: dict[str, Any]) -> bytes:
    """A PNG: mean |correlation| of groups of rows of four matrices of the middle block, beside shuffled entries."""
    from matplotlib.figure import Figure

    names = [name for name in DONORS if name in facts]
    roles = list(facts[names[0]]["patterns"]["roles"])
    figure = Figure(figsize=(2.3 * len(roles), 4.2 * len(names)), layout="constrained", facecolor=PAPER)
    grid = figure.subplots(2 * len(names), len(roles), squeeze=False)
    image = None
    for i, name in enumerate(names):
        patterns = facts[name]["patterns"]
        for j, role in enumerate(roles):
            for k, kind in enumerate(("own", "null")):
                axes = grid[2 * i + k, j]
                image = axes.imshow(patterns["roles"][role][kind], cmap="viridis", vmin=0.6, vmax=2.4)
                what = f"layer {patterns['layer']}" if kind == "own" else "shuffled"
                axes.set_title(f"{DONORS[name].title}\n{role}, {what}", fontsize=7)
                axes.set_xticks([]), axes.set_yticks([])
    figure.colorbar(image, ax=grid, shrink=0.4, label="|correlation| of rows x sqrt(length)")
    return _png(figure)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=85)
    return buffer.getvalue()
