"""SECURITY.md states the bounds of zoo/limits.py. `python -m tests.test_security` writes its table."""

from __future__ import annotations

import re
from pathlib import Path

from zoo import limits

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "SECURITY.md"
MARKS = ("<!-- bounds -->\n", "<!-- /bounds -->")
LINE = re.compile(r"(?P<names>[A-Z][A-Z_, ]*[A-Z]) = .*?  # (?P<reason>.+)")


def bounds_table() -> str:
    """One row for each bound of the module: name, value, what it bounds and why."""
    rows = ["| bound | value | of what, and why |", "|---|---|---|"]
    for line in Path(limits.__file__).read_text().splitlines():
        if found := LINE.fullmatch(line):
            for name in found["names"].split(", "):
                value = getattr(limits, name)
                rows.append(f"| `{name}` | {value:,} | {found['reason']} |")
    return "\n".join(rows) + "\n"


def with_table(page: str) -> str:
    """The page with the current table."""
    before, _, rest = page.partition(MARKS[0])
    return before + MARKS[0] + bounds_table() + MARKS[1] + rest.partition(MARKS[1])[2]


def test_the_page_states_every_bound_of_the_module() -> None:
    page = PAGE.read_text()
    assert page == with_table(page), "run `python -m tests.test_security`"
    names = {name for name, value in vars(limits).items() if name.isupper() and isinstance(value, int | float)}
    stated = set(re.findall(r"^\| `([A-Z_]+)` \|", page, re.MULTILINE))
    assert names == stated and len(names) > 40, "every bound has its reason on its own line"


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text()))
