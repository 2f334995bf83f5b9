"""Pages written by hand with parts that a program writes."""

from __future__ import annotations


def fill_mark(text: str, mark: str, part: str) -> str:
    """The page with `part` between `<!-- mark -->` and `<!-- /mark -->`. SystemExit if the page lacks the marks."""
    before, _, rest = text.partition(f"<!-- {mark} -->\n")
    _, end, after = rest.partition(f"<!-- /{mark} -->")
    if not end:
        raise SystemExit(f"the page has no <!-- {mark} --> … <!-- /{mark} -->; add both lines where the part belongs")
    return f"{before}<!-- {mark} -->\n{part}\n<!-- /{mark} -->{after}"
