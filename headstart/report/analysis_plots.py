"""Figures of an analysis: marginal distributions by role, spectra by layer, distances between layers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from headstart.report.analysis_data import NULL_LABELS, Model, matrices_with_kurtosis, noise_alpha, spectrum_entries
from headstart.report.numbers import superscript
from headstart.report.plot_style import COLOURS, GREY, INK, SIDE_LEGEND, WIDTH, style_axes
from zoo.statistics.similarity import PROJECTIONS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROLES = ("embed", "head", *PROJECTIONS, "conv", "other")  # from top to bottom
ROLE_COLOURS = dict(zip((*PROJECTIONS, "embed", "head"), COLOURS, strict=False))
FAMILY_COLOURS = {
    "normal": GREY,
    "laplace": COLOURS[1],
    "student-t": COLOURS[0],
    "generalized-normal": COLOURS[2],
    "stable": COLOURS[4],
    "mixture": COLOURS[6],
}
NULL_COLOURS = {"gaussian": GREY, "spikes": COLOURS[1]}
TOP_LEGEND: dict[str, Any] = {"loc": "outside upper left", "frameon": False, "labelcolor": INK, "fontsize": 9}


def short_name(projection: str) -> str:
    """`attn.q` -> `q`."""
    return projection.partition(".")[2] or projection


def marginal_figure(model: Model) -> Figure | None:
    """Left: the best-fitting family of the matrices of each role. Right: their kurtosis, in a stronger colour for later
    layers. None where no matrix has a kurtosis."""
    from matplotlib.figure import Figure

    matrices = matrices_with_kurtosis(model)
    roles = [role for role in ROLES if any(t["role"] == role for t in matrices)]
    if not roles:
        return None
    figure = Figure(figsize=(WIDTH, 1.4 + 0.34 * len(roles)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    _draw_families(left, matrices, roles)
    if families := left.get_legend_handles_labels()[0]:  # none where every matrix is too small for a fit
        figure.legend(ncols=len(families), **TOP_LEGEND)
    _draw_kurtosis(right, matrices, roles)
    for axes in (left, right):
        style_axes(axes, grid="x")
        axes.tick_params(axis="y", length=0)
    return figure


def _draw_families(axes: Axes, matrices: list[dict[str, Any]], roles: list[str]) -> None:
    from matplotlib.ticker import MaxNLocator

    families = [*dict.fromkeys([*FAMILY_COLOURS, *(t["family"] for t in matrices if t.get("family"))])]
    start = np.zeros(len(roles))
    for i, family in enumerate(families):
        width = np.array([sum(t["role"] == r and t.get("family") == family for t in matrices) for r in roles])
        if width.any():
            colour = FAMILY_COLOURS.get(family, COLOURS[(i + 3) % len(COLOURS)])
            axes.barh(range(len(roles)), width, left=start, height=0.62, color=colour, alpha=0.85, label=family)
        start += width
    axes.set_yticks(range(len(roles)), roles)
    axes.invert_yaxis()
    axes.set_xlabel("matrices, by family of highest held-out likelihood")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _draw_kurtosis(axes: Axes, matrices: list[dict[str, Any]], roles: list[str]) -> None:
    last_layer = max((t["layer"] for t in matrices if t["layer"] is not None), default=0) or 1
    axes.axvline(3, color=GREY, linewidth=1, linestyle=":")
    for row, role in enumerate(roles):
        for t in matrices:
            if t["role"] == role:
                depth = 1.0 if t["layer"] is None else t["layer"] / last_layer
                colour = ROLE_COLOURS.get(role, GREY)
                axes.plot(t["kurtosis"], row, "o", color=colour, alpha=0.3 + 0.7 * depth, markersize=6)
    _set_number_axis(axes, "x", [t["kurtosis"] for t in matrices] + [3.0])
    axes.set_xlabel("kurtosis (3: normal); pale: first layers, strong: last")


def spectrum_figure(model: Model) -> Figure | None:
    """Left: the largest singular value over the edge of noise. Right: the exponent of the spectrum, and the range of
    exponents of noise. None where no matrix in a layer was measured."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    tensors = [t for t in spectrum_entries(model) if t["layer"] is not None and t.get("edge") is not None]
    roles = [role for role in PROJECTIONS if any(t["role"] == role for t in tensors)]
    if not roles:
        return None
    figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    noise = [alpha for alpha in map(noise_alpha, tensors) if alpha is not None]
    if noise:
        right.axhspan(min(noise), max(noise), color=GREY, alpha=0.22, linewidth=0, label="noise of\nthese shapes")
    left.axhline(1, color=GREY, linewidth=1, linestyle=":")
    for role in roles:
        rows = sorted((t["layer"], t["edge"], t.get("alpha")) for t in tensors if t["role"] == role)
        layers, edges, alphas = zip(*rows, strict=True)
        look: dict[str, Any] = {"color": ROLE_COLOURS[role], "marker": "o", "markersize": 4, "linewidth": 1.6}
        left.plot(layers, edges, **look)
        right.plot(layers, [math.nan if a is None else a for a in alphas], label=role, **look)
    _set_number_axis(left, "y", [t["edge"] for t in tensors] + [1.0])
    exponents = noise + [t["alpha"] for t in tensors if t.get("alpha") is not None]
    if exponents:
        _set_number_axis(right, "y", exponents)
    left.set_title("largest singular value / edge of noise", loc="left", fontsize=10, color=INK)
    right.set_title("exponent α of the eigenvalues of WᵀW", loc="left", fontsize=10, color=INK)
    right.legend(fontsize=9, **SIDE_LEGEND)
    for axes in (left, right):
        axes.set_xlabel("layer")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        style_axes(axes)
    return figure


def distance_figure(model: Model, rank: str, pairs: list[dict[str, Any]]) -> Figure | None:
    """The share of distances at least as large as x, on logarithmic axes: the donor with its fitted power law, and
    both kinds of random matrices. None where no pair has distances."""
    from matplotlib.figure import Figure

    drawn = [row for row in pairs if row.get("ccdf")]
    if not drawn:
        return None
    lines = math.ceil(len(drawn) / 3)
    figure = Figure(figsize=(WIDTH, 0.6 + 2.5 * lines), layout="constrained")
    grid = figure.subplots(lines, 3, squeeze=False, sharey=True).ravel()
    smallest_share = min(share for row in drawn for _, share in row["ccdf"])
    for axes, row in zip(grid, drawn, strict=False):
        _draw_distances(axes, model["dsv"][rank]["nulls"], row)
        _set_decade_axis(axes, "y", 0.6 * smallest_share, 1.5)
        _set_decade_axis(axes, "x", *axes.dataLim.intervalx)
        title = f"{short_name(row['a'])} – {short_name(row['b'])}: {row['verdict']}"
        axes.set_title(title, loc="left", fontsize=10, color=INK)
        style_axes(axes)
    for axes in grid[len(drawn) :]:
        axes.set_visible(False)
    figure.legend(*grid[0].get_legend_handles_labels(), ncols=4, **TOP_LEGEND)
    figure.supxlabel("distance 1 − cos between the singular values of two layers", fontsize=10, color=INK)
    figure.supylabel("share of distances at least as large", fontsize=10, color=INK)
    return figure


def _draw_distances(axes: Axes, nulls: dict[str, list[dict[str, Any]]], row: dict[str, Any]) -> None:
    for kind, colour in NULL_COLOURS.items():
        same_pair = [null for null in nulls[kind] if (null["a"], null["b"]) == (row["a"], row["b"])]
        if same_pair and same_pair[0]["ccdf"]:
            x, share = zip(*same_pair[0]["ccdf"], strict=True)
            axes.plot(x, share, color=colour, linewidth=1.6, alpha=0.8, label=NULL_LABELS[kind])
    x, share = zip(*row["ccdf"], strict=True)
    axes.plot(x, share, "o", color=COLOURS[0], markersize=4, label="this donor")
    if row.get("alpha") is not None:
        ends = np.array([row["xmin"], max(x)])
        law = row["tail"] / row["n"] * (ends / row["xmin"]) ** (1 - row["alpha"])
        axes.plot(ends, law, "-", color=INK, linewidth=1.4, label="fitted power law")


def _set_decade_axis(axes: Axes, axis: str, low: float, high: float) -> None:
    """A logarithmic axis with ticks at powers of ten; on the x axis only some of them where there are many."""
    getattr(axes, f"set_{axis}scale")("log")
    getattr(axes, f"set_{axis}lim")(low / 1.1, high * 1.1)
    exponents = range(math.ceil(math.log10(low / 1.1)), math.floor(math.log10(high * 1.1)) + 1)
    shown = exponents[:: 1 + len(exponents) // 5] if axis == "x" else exponents
    getattr(axes, f"set_{axis}ticks")([10.0**e for e in shown], [f"10{superscript(e)}" for e in shown])
    axes.minorticks_off()


def _set_number_axis(axes: Axes, axis: str, numbers: list[float]) -> None:
    """A logarithmic axis with plain numbers at its ticks. Linear where the numbers lie within a factor of two."""
    low, high = min(numbers), max(numbers)
    margin = (high / max(low, 1e-9)) ** 0.06
    low, high = low / margin, high * margin
    if high < 2 * low:
        return
    getattr(axes, f"set_{axis}scale")("log")
    getattr(axes, f"set_{axis}lim")(low, high)
    steps = (1, 1.5, 2, 3, 5, 7) if high < 20 * low else (1, 3) if high < 3000 * low else (1,)
    ticks = [s * 10**e for e in range(-4, 9) for s in steps if low <= s * 10**e <= high]
    getattr(axes, f"set_{axis}ticks")(ticks, [f"{t:g}" for t in ticks])
    axes.minorticks_off()
