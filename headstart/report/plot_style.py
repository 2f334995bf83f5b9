"""One look for all figures: colours, axes, and SVG that takes the colours of the page around it."""

from __future__ import annotations

import hashlib
import io
import re
from html import escape
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#3b82f6", "#f97316", "#10a37f", "#d946ef", "#ef4444", "#06a5c4", "#8b5cf6", "#a3a012", "#b45309", "#64748b")
GREY = "#8a8f98"
INK = "#1f2328"  # replaced by currentColor in an SVG
WIDTH = 9.2  # inches

# Keyword arguments of a legend to the right of its axes.
SIDE_LEGEND: dict[str, Any] = {
    "bbox_to_anchor": (1.01, 1.0),
    "loc": "upper left",
    "frameon": False,
    "labelcolor": INK,
}


def style_axes(axes: Any, grid: str = "y") -> None:
    """Removes the upper and right border, colours the rest, and draws a faint grid along `grid` ("x" or "y")."""
    axes.spines[["top", "right"]].set_visible(False)
    for spine in axes.spines.values():
        spine.set_color(GREY)
    axes.tick_params(color=GREY, labelcolor=INK)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    axes.title.set_color(INK)
    axes.grid(axis=grid, color=GREY, alpha=0.22, linewidth=0.8)
    axes.set_axisbelow(True)


def inline_svg(figure: Figure | None, label: str) -> Markup | None:
    """The figure as an <svg> element; None for None. It scales with its column and inherits font and text colour.
    `label` is its description for screen readers and must differ between the figures of a page."""
    import matplotlib

    if figure is None:
        return None
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": label}):
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r"font-family: [^;\"]*", "font-family: inherit", text)
    prefix = "f" + hashlib.sha256(label.encode()).hexdigest()[:8]  # ids are global in a page with several figures
    text = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{prefix}-", text)
    start = re.compile(r'<svg[^>]*viewBox="([^"]*)"[^>]*>')
    return Markup(
        start.sub(
            lambda found: (
                f'<svg role="img" aria-label="{escape(label)}" viewBox="{found[1]}" '
                'xmlns:xlink="http://www.w3.org/1999/xlink">'
            ),
            text,
            count=1,
        )
    )
