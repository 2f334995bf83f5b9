"""The distances between all layers of two real models, beside those of random matrices."""

from __future__ import annotations

import io
from typing import Any

from benchmarks.real.models import DONORS
from benchmarks.real.singular_vectors.measure import NULLS, OWN, PUBLISHED_EXPONENT
from headstart.report.plot_style import COLOURS, GREY, style_axes

LABELS = {OWN: "the model", NULLS[0]: "Gaussian matrices", NULLS[1]: "Gaussian matrices with spikes"}
RANK = "16"


def draw_distances(facts: dict[str, Any]) -> bytes:
    """A PNG. Above: share of distances beyond each; below: the exponent by the share above xmin."""
    from matplotlib.figure import Figure

    names = [name for name in DONORS if RANK in facts["models"].get(name, {})]
    figure = Figure(figsize=(4.6 * len(names), 7.0), layout="constrained", facecolor="#ffffff")
    grid = figure.subplots(2, len(names), squeeze=False)
    for name, upper, lower in zip(names, *grid, strict=True):
        for kind, colour in zip(LABELS, COLOURS, strict=False):
            pooled = facts["models"][name][RANK][kind]["pooled"]
            upper.plot(*zip(*pooled["ccdf"], strict=True), color=colour, label=LABELS[kind], marker=".", markersize=3)
            shares = [float(share) for share in pooled["by_xmin"]]
            lower.plot(shares, list(pooled["by_xmin"].values()), color=colour, label=LABELS[kind], marker="o")
            if kind == OWN:
                upper.axvline(pooled["xmin"], color=colour, linestyle=":", linewidth=1)
                lower.plot(pooled["tail"] / pooled["n"], pooled["alpha"], "*", color=colour, markersize=14)
        lower.axhline(PUBLISHED_EXPONENT, color=GREY, linestyle="--", linewidth=1)
        upper.set(xscale="log", yscale="log", xlim=(1e-6, 1), ylim=(3e-5, 1.5), xlabel="1 - cos")
        upper.set_title(DONORS[name].title, fontsize=10)
        lower.set(xscale="log", ylim=(1, 8), xlabel="share of the distances above xmin")
        lower.invert_xaxis()
        style_axes(upper), style_axes(lower)
    grid[0, 0].set_ylabel("share of the distances beyond")
    grid[1, 0].set_ylabel("exponent above xmin")
    grid[0, 0].legend(fontsize=8, frameon=False, loc="lower left")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90)
    return buffer.getvalue()
