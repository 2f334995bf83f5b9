"""The runs as a page: results/vocabulary.md."""

from __future__ import annotations

import json
from importlib.metadata import version
from typing import Any

from benchmarks.vocabulary.measure import BATCH_SIZE, DEFAULT, LRS, METHOD, OWN, SEQUENCE, STEPS
from headstart.report.scores import interval

LABELS = {
    OWN: "the donor itself, with its own tokenizer",
    DEFAULT: "default initialisation",
    "strings": "`strings`: equal strings, the rest drawn",
    "match": "`match`: equal texts and roles, the rest drawn",
    "mean": "`mean` of the pieces",
    "length-weighted": "`length-weighted` mean of the pieces",
    "omp": "`omp`, by spelling",
    "focus": "`focus`, by spelling",
    "omp, model": "`omp`, by the embedding of the tokenizer's own model",
    "focus, model": "`focus`, by the embedding of the tokenizer's own model",
}


def write_page(found: dict[str, dict[str, Any]]) -> str:
    """The page. found: `Run.key` -> what `measure` returns."""
    runs = [(json.loads(key), values) for key, values in found.items()]
    pairs = list(dict.fromkeys(run["pair"] for run, _ in runs))
    tables = [_table(pair, [(run, values) for run, values in runs if run["pair"] == pair]) for pair in pairs]
    rates = " and ".join(f"{lr:g}" for lr in LRS)
    return f"""# Targets with another tokenizer

Written by `python -m benchmarks.vocabulary` with torch {version("torch").partition("+")[0]}. A target has the donor's
shape and another tokenizer. `{METHOD}` fills it; a row is one value of its option `vocabulary`.

- **copied, composed, drawn**: tokens of the target that have the donor's row, a sum of its rows, or a random row.
- **step 0**: nats per byte of held-out text before training. Losses per token cannot be compared between tokenizers.
- **after {STEPS} steps**: nats per token, mean and standard deviation of the seeds, and the same per byte. Each step
  has {BATCH_SIZE} windows of {SEQUENCE} tokens. The learning rate is the better of {rates} on the first seed. A row
  without a deviation has one seed.
- Windows have no token for the start of a text. Gemma expects one, so that its own loss is higher than in use.

{chr(10).join(tables)}"""


def _table(pair: str, runs: list[tuple[dict[str, Any], dict[str, Any]]]) -> str:
    trained = any(run["lr"] is not None for run, _ in runs)
    more = [f"after {STEPS} steps", "per byte", "lr"] if trained else []
    lines = [
        f"## {pair}\n",
        "| " + " | ".join(["start", "copied", "composed", "drawn", "step 0", *more]) + " |",
        "|---" * (5 + len(more)) + "|",
    ]
    for variant, label in LABELS.items():
        own = [(run, values) for run, values in runs if run["variant"] == variant]
        if own:
            lines.append(f"| {label} | " + " | ".join(_cells(own, trained)) + " |")
    return "\n".join([*lines, ""])


def _cells(runs: list[tuple[dict[str, Any], dict[str, Any]]], trained: bool) -> list[str]:
    start = next(values for run, values in runs if run["lr"] is None)
    coverage = start.get("vocabulary") or {}
    cells = [f"{coverage[key]:,}" if coverage else "–" for key in ("copied", "composed", "drawn")]
    cells.append(f"{start['step0'] / start['bytes_per_token']:.2f}")
    if not trained:
        return cells
    tuning = [(run, values) for run, values in runs if run["lr"] in LRS and run["seed"] == 0]
    if not tuning:
        return [*cells, "–", "–", "–"]
    lr = min(tuning, key=lambda pair: pair[1]["final"])[0]["lr"]
    finals = [values["final"] for run, values in runs if run["lr"] == lr]
    score = interval(finals)
    spread = f" ± {score['std']:.2f}" if len(finals) > 1 else ""
    return [*cells, f"{score['mean']:.2f}{spread}", f"{score['mean'] / start['bytes_per_token']:.2f}", f"{lr:g}"]
