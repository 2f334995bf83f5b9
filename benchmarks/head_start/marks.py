"""Pages written by hand around parts that figures write."""

from __future__ import annotations


def placed(text: str, mark: str, part: str) -> str:
    """A page with `part` between `<!-- mark -->` and `<!-- /mark -->`. SystemExit where it has no such place."""
    before, _, rest = text.partition(f"<!-- {mark} -->\n")
    _, end, after = rest.partition(f"<!-- /{mark} -->")
    if not end:
        raise SystemExit(f"no <!-- {mark} --> … <!-- /{mark} --> to write to")
    return f"{before}<!-- {mark} -->\n{part}\n<!-- /{mark} -->{after}"
