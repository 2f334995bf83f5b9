"""The rows of the walk as a page: one line per architecture, and the lines of refusal below."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from benchmarks.architectures.walk import DEEPER, KINDS, LARGER, NARROWER, OWN_SHAPE, Row

HEADINGS = {"causal": "Causal language models", "encoder-decoder": "Encoder-decoders", "encoder": "Encoders"}


def write_page(rows: list[Row], versions: str) -> str:
    """The page benchmarks/results/architectures.md."""
    notes: dict[str, int] = {}
    order = {kind: i for i, kind in enumerate(KINDS)}
    rows = sorted(rows, key=lambda row: (order[row["kind"]], row["architecture"]))
    tables = [_table(kind, [row for row in rows if row["kind"] == kind], notes) for kind in KINDS]
    refusals = "\n".join(f"{number}. {text}" for text, number in notes.items())
    own_shape = ", ".join(f"`{method}`" for method in OWN_SHAPE)
    return f"""# Every architecture, every transfer method

Written by `make walk` with {versions}: a tiny random donor of every language model that transformers can build
(encoder-decoders for speech are left out).

{_summary(rows)}

- **own shape**: the donor into its own config by {own_shape}.
  `identity`: the written file has the donor's tensors, bit for bit.
- **narrower**: half the width, heads and FFN, and half the layers. `by name`: each tensor of the target has only values
  of the donor's tensor of its name, with layer and expert mapped. `n drawn`: tensors that keep the default
  initialisation, which the command says.
- **deeper**: twice the layers, without silent copies. `by name` as above.
- **larger**: twice the width, heads and FFN (`stacking`: twice the layers, with `exact=true`). `same function`: the
  logits are the donor's. `written`: the model needs more inputs than tokens, so that no logits were compared.
- **rotary pairs**: which coordinates of a head the rotary embedding turns together, seen by turning them: `halves` (i
  and i + half) or `neighbours` (2i and 2i + 1), as the metadata says; `none`: no rotary embedding; `not seen`: tensors
  without roles, or a norm of queries and keys that no turn keeps.
- A number is a refusal; its line is below the tables. **FAILED** is a wrong result or a crash.

{chr(10).join(tables)}
## Refusals

{refusals}
"""


def _summary(rows: list[Row]) -> str:
    built = [row for row in rows if "cells" in row]
    own = [row for row in built if all(row["cells"][f"own {method}"]["ok"] for method in OWN_SHAPE)]
    cells = [cell for row in built for cell in row["cells"].values()]
    failed = sum(not cell["ok"] for cell in cells)
    return (
        f"{len(rows)} architectures, {len(built)} built. Into the own shape {len(own)} of {len(built)} are the identity"
        f" by all four methods. {len(cells)} cells, {failed} failed."
    )


def _table(kind: str, rows: list[Row], notes: dict[str, int]) -> str:
    columns = [
        "rotary pairs",
        *(f"narrower {m}" for m in NARROWER),
        *(f"deeper {m}" for m in DEEPER),
        *(f"larger {m}" for m in LARGER),
    ]
    lines = [
        f"## {HEADINGS[kind]}\n",
        "| architecture | own shape | " + " | ".join(column.replace(" ", "<br>") for column in columns) + " |",
        "|---|---|" + "---|" * len(columns),
    ]
    unbuilt = []
    for row in rows:
        if "reason" in row:
            unbuilt.append(f"- `{row['architecture']}`: {row['reason']}")
            continue
        cells = row["cells"]
        own = Counter(_cell(cells[f"own {method}"], notes) for method in OWN_SHAPE)
        texts = ["; ".join(own)]
        texts += [_cell(cells[column], notes) for column in columns]
        lines.append(f"| `{row['architecture']}` | " + " | ".join(texts) + " |")
    if unbuilt:
        lines += ["", "Not built, with the reason that transformers gives:", "", *unbuilt]
    return "\n".join([*lines, ""])


def _cell(cell: dict[str, Any], notes: dict[str, int]) -> str:
    text = cell["text"]
    if not cell["ok"]:
        return f"**FAILED** {text}"
    if not text.startswith(("refused: ", "says ", "no config")):
        named = text.replace("values of the same name", "by name")
        return re.sub(r"(\d+) of \d+ drawn", r"\1 drawn", named).replace(
            "written; no logits from tokens alone", "written"
        )
    return f"[{notes.setdefault(_general(text), len(notes) + 1)}]"


def _general(text: str) -> str:
    """The first reason of a refusal, without what differs between architectures: names and numbers."""
    text = text.removeprefix("refused: ")
    text = re.sub(r"^[a-z0-9-]+: ", "", text)  # the method: it is the column
    text = re.sub(r"donor '\w+' does not fit the target: ", "", text)
    text = re.sub(r"\(\w+\) has", "has", text)
    text = re.sub(r"\((\w+\.)+\w+\)", "(NAME)", text)
    text = re.split(r"; (?=its |the donor|the target)", text)[0]  # the first of several reasons
    return re.sub(r"\b\d+ (tensors|norms)", r"N \1", text)
