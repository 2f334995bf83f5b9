"""The tables of the READMEs: every method in a line, what it costs and what it gives."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.head_start import tasks
from benchmarks.head_start.scored import Entries, Found, plus_minus, ranked
from benchmarks.paths import RESULTS, ROOT
from headstart import samplers
from headstart.compare.scores import REFERENCE

CONVOLUTIONS = RESULTS / "convolutions.json"


def head_starts(found: Found) -> str:
    """What every method costs and gives on the unseen shapes of A after the long budget, as far as it is measured;
    conv-covariance, which fills no language model, on its own task."""
    done = {c.target: e for c, e in found.entries.items() if (c.task, c.budget) == ("A", "long") and not c.methods}
    cost = found.facts.get("cost", {}).get("methods", {})
    if not done:
        return ""
    rows = [
        f"| method | needs | fit, s | sample, M parameters/s (of `randn`) | {' | '.join(done)} |",
        "|---" * (4 + len(done)) + "|",
    ]
    plain = set(tasks.plain())
    for name in [REFERENCE, *(name for name in ranked(done.values()) if name in plain)]:
        label = f"{name}, tuned: loss" if name == REFERENCE else name
        cells = [_final(e, name) for e in done.values()]
        rows.append(f"| {label} | {needs(name)} | {took(cost.get(name, {}))} | {' | '.join(cells)} |")
    other = json.loads(CONVOLUTIONS.read_text())
    own, peer, tuned = (other["methods"][key]["mean"] for key in ("conv-covariance", "default, scale 1", "default"))
    rows.append(
        f"| conv-covariance | {needs('conv-covariance')} | {took(other['cost'])} | on digits: loss {own:.3f}, default "
        f"{peer:.3f}, with its scale tuned {tuned:.3f} |" + " |" * (len(done) - 1)
    )
    return "\n".join(rows)


def _final(entries: Entries, name: str) -> str:
    """The default's final loss, or what another's is above it."""
    if name not in entries:
        return "–"
    if name == REFERENCE:
        return plus_minus(entries[name]["final_loss"])
    gap = entries[name]["difference"]
    return "diverged" if gap["mean"] is None else plus_minus(gap, "+", digits=2)


def took(cost: Mapping[str, Any]) -> str:
    """Two cells: what fitting and sampling took."""
    if "fit_seconds" not in cost:
        return "– | –"
    return f"{cost['fit_seconds']:.2f} | {cost['parameters_per_second'] / 1e6:.2g} ({cost['of_randn']:.2g})"


def needs(name: str) -> str:
    return ", ".join(samplers.get(name).needs) or "–"


def all_methods(found: Found) -> str:
    """What each class says of itself."""
    rows = ["| method | what it does | needs | source | file |", "|---|---|---|---|---|"]
    for name, (module, _) in samplers.METHODS.items():
        cls = samplers.get(name)
        rows.append(f"| `{name}` | {cls.summary} | {needs(name)} | {cls.reference} | `{module.replace('.', '/')}.py` |")
    return "\n".join(rows)


PARTS: tuple[tuple[Path, str, Callable[[Found], str]], ...] = (
    (ROOT / "README.md", "benchmark", head_starts),
    (ROOT / "baselines" / "README.md", "methods", all_methods),
)
