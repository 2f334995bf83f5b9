"""Figures of an analysis: values by role, spectra by depth, distances between layers on logarithmic axes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from headstart.report.analysis_findings import Model, matrices, noise_alpha
from headstart.report.plot_style import COLOURS, GREY, INK, style_axes
from zoo.statistics.similarity import PROJECTIONS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROLES = ("embed", "head", *PROJECTIONS, "conv", "other")
COLOUR = dict(zip((*PROJECTIONS, "embed", "head"), COLOURS, strict=False))
FAMILY = {
    "normal": GREY,
    "laplace": COLOURS[1],
    "student-t": COLOURS[0],
    "generalized-normal": COLOURS[2],
    "stable": COLOURS[4],
    "mixture": COLOURS[6],
}
NULL = {"gaussian": (GREY, "Gaussian matrices"), "spikes": (COLOURS[1], "Gaussian with spikes")}
SIDE: dict[str, Any] = {"bbox_to_anchor": (1.01, 1.0), "loc": "upper left", "frameon": False, "labelcolor": INK}


def values(model: Model) -> Figure | None:
    """Left: which law the matrices of each role got; right: their kurtosis, dark dots for deep layers."""
    from matplotlib.figure import Figure

    known = [t for t in matrices(model["marginals"]) if t.get("kurtosis") is not None]
    roles = [role for role in ROLES if any(t["role"] == role for t in known)]
    if not roles:
        return None
    figure = Figure(figsize=(9.2, 1.4 + 0.34 * len(roles)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    families = [f for f in dict.fromkeys([*FAMILY, *(t["family"] for t in known if t.get("family"))])]
    start = np.zeros(len(roles))
    for i, family in enumerate(families):
        width = np.array([sum(t["role"] == r and t.get("family") == family for t in known) for r in roles])
        if width.any():
            colour = FAMILY.get(family, COLOURS[(i + 3) % len(COLOURS)])
            left.barh(range(len(roles)), width, left=start, height=0.62, color=colour, alpha=0.85, label=family)
        start += width
    left.set_yticks(range(len(roles)), roles)
    left.invert_yaxis()
    left.set_xlabel("matrices, by the law of highest held-out likelihood")
    left.xaxis.get_major_locator().set_params(integer=True)
    columns = len(left.get_legend_handles_labels()[0])
    figure.legend(loc="outside upper left", ncols=columns, frameon=False, labelcolor=INK, fontsize=9)
    depths = [t["layer"] for t in known if t["layer"] is not None]
    deepest = max(depths, default=0) or 1
    right.axvline(3, color=GREY, linewidth=1, linestyle=":")
    for row, role in enumerate(roles):
        for t in known:
            if t["role"] == role:
                depth = 1.0 if t["layer"] is None else t["layer"] / deepest
                right.plot(t["kurtosis"], row, "o", color=COLOUR.get(role, GREY), alpha=0.3 + 0.7 * depth, markersize=6)
    _numbers(right, "x", [t["kurtosis"] for t in known] + [3.0])
    right.set_xlabel("kurtosis (normal: 3); the paler, the nearer to the input")
    for axes in (left, right):
        style_axes(axes, grid="x")
        axes.tick_params(axis="y", length=0)
    return figure


def spectra(model: Model) -> Figure | None:
    """Left: the largest singular value over the edge of noise; right: the exponent of the spectrum, and of noise."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    tensors = [t for t in model["spectra"]["tensors"].values() if t["layer"] is not None and t.get("edge") is not None]
    roles = [role for role in PROJECTIONS if any(t["role"] == role for t in tensors)]
    if not roles:
        return None
    figure = Figure(figsize=(9.2, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    noise = [a for a in map(noise_alpha, tensors) if a is not None]
    if noise:
        right.axhspan(min(noise), max(noise), color=GREY, alpha=0.22, linewidth=0, label="noise of\nthese shapes")
    left.axhline(1, color=GREY, linewidth=1, linestyle=":")
    for role in roles:
        rows = sorted((t["layer"], t["edge"], t.get("alpha")) for t in tensors if t["role"] == role)
        x, edge, alpha = zip(*rows, strict=True)
        look: dict[str, Any] = {"color": COLOUR[role], "marker": "o", "markersize": 4, "linewidth": 1.6}
        left.plot(x, edge, **look)
        right.plot(x, [math.nan if a is None else a for a in alpha], label=role, **look)
    _numbers(left, "y", [t["edge"] for t in tensors] + [1.0])
    exponents = noise + [t["alpha"] for t in tensors if t.get("alpha") is not None]
    if exponents:
        _numbers(right, "y", exponents)
    left.set_title("largest singular value / edge of noise", loc="left", fontsize=10, color=INK)
    right.set_title("exponent α of the eigenvalues of WᵀW", loc="left", fontsize=10, color=INK)
    right.legend(fontsize=9, **SIDE)
    for axes in (left, right):
        axes.set_xlabel("layer")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        style_axes(axes)
    return figure


def distances(model: Model, rank: str, pairs: list[dict[str, Any]]) -> Figure | None:
    """How many distances are at least so large, on logarithmic axes: the donor with its fitted power law, and both
    nulls."""
    from matplotlib.figure import Figure

    drawn = [row for row in pairs if row.get("ccdf")]
    if not drawn:
        return None
    lines = math.ceil(len(drawn) / 3)
    figure = Figure(figsize=(9.2, 0.6 + 2.5 * lines), layout="constrained")
    grid = figure.subplots(lines, 3, squeeze=False, sharey=True).ravel()
    for axes, row in zip(grid, drawn, strict=False):
        for kind, (colour, label) in NULL.items():
            nulls = model["dsv"][rank]["nulls"][kind]
            points: list[list[float]] = next((r["ccdf"] for r in nulls if (r["a"], r["b"]) == (row["a"], row["b"])), [])
            if points:
                x, share = zip(*points, strict=True)
                axes.plot(x, share, color=colour, linewidth=1.6, alpha=0.8, label=label)
        x, share = zip(*row["ccdf"], strict=True)
        axes.plot(x, share, "o", color=COLOURS[0], markersize=4, label="this donor")
        if row.get("alpha") is not None:
            ends = np.array([row["xmin"], max(x)])
            law = row["tail"] / row["n"] * (ends / row["xmin"]) ** (1 - row["alpha"])
            axes.plot(ends, law, "-", color=INK, linewidth=1.4, label="fitted power law")
        _decades(axes, "y", 0.6 * min(share for r in drawn for _, share in r["ccdf"]), 1.5)
        _decades(axes, "x", *axes.dataLim.intervalx)
        axes.set_title(f"{short(row['a'])} – {short(row['b'])}: {row['verdict']}", loc="left", fontsize=10, color=INK)
        style_axes(axes)
    for axes in grid[len(drawn) :]:
        axes.set_visible(False)
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=4, frameon=False, labelcolor=INK, fontsize=9)
    figure.supxlabel("distance 1 − cos between the singular values of two layers", fontsize=10, color=INK)
    figure.supylabel("share of distances at least so large", fontsize=10, color=INK)
    return figure


def _decades(axes: Axes, axis: str, low: float, high: float) -> None:
    """A logarithmic axis with ticks at powers of ten, every other or third of them where there are many."""
    getattr(axes, f"set_{axis}scale")("log")
    getattr(axes, f"set_{axis}lim")(low / 1.1, high * 1.1)
    exponents = range(math.ceil(math.log10(low / 1.1)), math.floor(math.log10(high * 1.1)) + 1)
    shown = exponents[:: 1 + len(exponents) // 5] if axis == "x" else exponents
    getattr(axes, f"set_{axis}ticks")([10.0**e for e in shown], [f"10{superscript(e)}" for e in shown])
    axes.minorticks_off()


def superscript(number: int) -> str:
    return str(number).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def short(projection: str) -> str:
    return projection.partition(".")[2] or projection


def _numbers(axes: Axes, axis: str, numbers: list[float]) -> None:
    """A logarithmic axis with style_axes numbers at its ticks, linear where the numbers lie within a factor of two."""
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
