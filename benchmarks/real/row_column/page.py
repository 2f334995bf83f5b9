"""The measurements as a page: results/real_row_column.md."""

from __future__ import annotations

import itertools
from statistics import mean, median
from typing import Any

from benchmarks.pages.cells import MISSING, table
from benchmarks.real.models import DONORS, SEQUENCE, WINDOWS
from benchmarks.real.row_column.growth import CASES, DEFAULT, ITSELF, TARGETS, case_key
from benchmarks.real.row_column.laws import HALVES, NEXT, NOISE, PERMUTATIONS, UNITS
from benchmarks.real.row_column.statistics import PATTERN_ROLES, TESTS
from benchmarks.real.row_column.twins import SHAPES, STEPS, TWIN

Facts = dict[str, Any]
LEVEL = 0.05
KINDS = {"neuron": "neurons", "value": "value components"}


def write_page(facts: Facts) -> str:
    """The page. facts: {statistics, laws, growth}, see `benchmarks.real.row_column.__main__.jobs`."""
    return f"""# Rows and columns of real models (2408.08681)

Written by `python -m benchmarks.real.row_column`. In the mean-field picture each unit of a hidden space has a latent
variable that the rows which write it share with the columns which read it. The donors' weights come from 4-bit files.

## Do places matter, by role?

Medians over layers, **here / shuffled**: in the matrix, and with all entries shuffled (199 times, at most 65,536
entries of a matrix). **p**: matrices with p <= {LEVEL:g}; chance gives one in twenty. **thirds**: the ratio to the
shuffled value in the first, middle and last third of the layers.

{_statistics_table(facts.get("statistics", {}))}

![Statistics by layer and role](figures/real_row_column.png)

{_statistics_sentences(facts.get("statistics", {}))}

## Do units that are written strongly get read strongly?

The correlation, over the units of a space, of the norm of what writes a unit with the norm of what reads it. p over
permutations of the units.

{_coupling_table(facts.get("statistics", {}))}

{_coupling_sentences(facts.get("statistics", {}))}

## Correlations of rows within the middle block

![Correlation patterns](figures/real_row_column_patterns.png)

Mean |correlation| of the rows of two groups, times the square root of their length; independent rows give 0.8. Rows of
q and k are in the order of heads, those of up and down in the order of their energy. Below each, the same with
shuffled entries. Blocks in q and k are heads; checks are the halves of a head that the rotary embedding pairs.

{_pattern_sentences(facts.get("statistics", {}))}

{_laws_and_growth(facts)}

## What this does not show

- The two donors differ in data, recipe and architecture, not only in width. A test that rejects one law for both does
  not refute the mean-field picture, which is about widths of one recipe. Only the small twins are that, and their
  training is short.
- Two-sample tests with many units find small differences. Compare E with its values for one donor and itself.
- Losses before training say nothing about training. [real_starts.md](real_starts.md) has the other methods.
"""


def _laws_and_growth(facts: Facts) -> str:
    return f"""## Do two widths share a law?

Two-sample tests of what a rotation leaves of canonical units: norms of gate, up and v, o (width-free), and their
cosines in units of chance. **E**: coefficient of the energy distance, the median over layers; 0 for equal laws, 1 for
laws without spread. **p**: layers with p <= {LEVEL:g} over {PERMUTATIONS} permutations of at most {UNITS} units a side.
**shape only**: norms divided by their median in the layer. Layers are matched by relative depth. Norms of Gemma 3 stand
before a norm, so that only their shape says something. **{TWIN}s** are small Llamas that this script trains on
TinyStories, all for {STEPS} steps of one recipe: {" and ".join(str(width) for width in SHAPES)} wide, with two seeds.

{_law_table(facts.get("laws", {}))}

{_law_sentences(facts.get("laws", {}))}

## Models grown from SmolLM2, before training

`row-column`, nats per token on {WINDOWS * SEQUENCE:,} tokens of held-out WikiText, 30 layers, seed 0. **balanced**
copies units equally often, up to one; **iid** draws them independently. **scale**: the factor of what reads a hidden
space.

{_growth_table(facts.get("growth", {}))}

{_growth_sentences(facts.get("growth", {}))}"""


def _rows(found: Facts) -> list[dict[str, Any]]:
    return [dict(zip(found["columns"], row, strict=True)) for row in found["tensors"]]


def _statistics_table(facts: Facts) -> str:
    rows = []
    for name, found in facts.items():
        tensors = _rows(found)
        for role in dict.fromkeys(row["role"] for row in tensors):
            own = [row for row in tensors if row["role"] == role]
            cells = []
            for test in TESTS:
                here, null = (median(row[key] for row in own) for key in (test, f"{test}_null"))
                significant = sum(row[f"{test}_p"] <= LEVEL for row in own)
                cells += [f"{here:.3f} / {null:.3f}", f"{significant} of {len(own)}", _thirds(own, test)]
            rows.append([DONORS[name].title, role, *cells])
    heads = ["row energies", "p", "thirds", "column energies", "p", "thirds", "row correlation", "p", "thirds"]
    return table(["model", "role", *heads], rows)


def _thirds(rows: list[dict[str, Any]], test: str) -> str:
    if len(rows) < 3:
        return MISSING
    ordered = sorted(rows, key=lambda row: row["layer"])
    cuts = [round(i * len(ordered) / 3) for i in range(4)]
    groups = [ordered[a:b] for a, b in itertools.pairwise(cuts)]
    ratios = [median(row[test] / row[f"{test}_null"] for row in group) for group in groups]
    return ", ".join(f"{ratio:.1f}" for ratio in ratios)


def _statistics_sentences(facts: Facts) -> str:
    sentences = []
    for name, found in facts.items():
        tensors = [row for row in _rows(found) if row["layer"] is not None]
        parts = []
        for test, label in zip(TESTS, ("row energies", "column energies", "row correlations"), strict=True):
            significant = sum(row[f"{test}_p"] <= LEVEL for row in tensors)
            ratio = median(row[test] / row[f"{test}_null"] for row in tensors)
            parts.append(f"{label} in {significant} of {len(tensors)} matrices (median {ratio:.1f} times the shuffled)")
        sentences.append(f"**Does {DONORS[name].title} have structure in its places?** In {', '.join(parts)}.")
    return "\n\n".join(sentences)


def _coupling_table(facts: Facts) -> str:
    rows = []
    for name, found in facts.items():
        keys = dict.fromkeys((space, a, b) for space, _, a, b, _, _ in found["couplings"])
        for space, a, b in keys:
            own = [(value, p) for s, _, x, y, value, p in found["couplings"] if (s, x, y) == (space, a, b)]
            values = [value for value, _ in own]
            rows.append([
                DONORS[name].title, space, f"{a} → {b}", f"{mean(values):+.2f}", f"{min(values):+.2f}",
                f"{max(values):+.2f}", f"{sum(p <= LEVEL for _, p in own)} of {len(own)}",
            ])  # fmt: skip
    return table(["model", "space", "writes → reads", "mean", "least", "largest", "p <= 0.05"], rows)


def _coupling_sentences(facts: Facts) -> str:
    sentences = []
    for name, found in facts.items():
        parts = []
        for space, a in dict.fromkeys((row[0], row[2]) for row in found["couplings"] if row[0] != "residual"):
            own = [(value, p) for s, _, x, _, value, p in found["couplings"] if (s, x) == (space, a)]
            positive = sum(p <= LEVEL and value > 0 for value, p in own)
            negative = sum(p <= LEVEL and value < 0 for value, p in own)
            parts.append(f"{a} {positive} positive and {negative} negative of {len(own)}")
        sentences.append(
            f"**Are writers and readers coupled in {DONORS[name].title}?** Significant: {'; '.join(parts)}."
        )
    return "\n\n".join(sentences)


def _pattern_sentences(facts: Facts) -> str:
    sentences = []
    for name, found in facts.items():
        parts = []
        for role in PATTERN_ROLES:
            pattern = found["patterns"]["roles"][role]["own"]
            size = len(pattern)
            diagonal = mean(pattern[i][i] for i in range(size))
            off = mean(pattern[i][j] for i in range(size) for j in range(size) if i != j)
            parts.append(f"{role} {diagonal:.2f} within and {off:.2f} between")
        sentences.append(f"{DONORS[name].title}, layer {found['patterns']['layer']}, groups: {', '.join(parts)}.")
    return "\n\n".join(sentences)


def _law_table(facts: Facts) -> str:
    rows = []
    for name, found in facts.items():
        cells = []
        for kind in KINDS:
            for variant in ("as_is", "scale_free"):
                entry = found[kind][variant]
                cells += [f"{entry['coefficient']:.3f}", f"{entry['significant']} of {entry['layers']}"]
        rows.append([*name.split(" | "), *cells])
    heads = [f"{label}, {what}" for label in KINDS.values() for what in ("E", "p", "shape only: E", "p")]
    return table(["units of", "and", *heads], rows)


def _law_sentences(facts: Facts) -> str:
    if not facts:
        return ""
    groups: dict[str, list[float]] = {}
    for name, found in facts.items():
        one, other = name.split(" | ")
        kind = other if other in (HALVES, NEXT, NOISE) else _width_relation(one, other)
        groups.setdefault(kind, []).append(mean(found[unit]["scale_free"]["coefficient"] for unit in KINDS))
    labels = {
        HALVES: "two halves of a layer", NEXT: "a layer and the next one", "twin equal": "one recipe, one width",
        "twin other": "one recipe, two widths", "equal": "other recipes, one width",
        "other": "other recipes, two widths", NOISE: "a donor and normal weights",
    }  # fmt: skip
    ranges = {kind: f"{min(values):.3f} to {max(values):.3f}" for kind, values in groups.items()}
    parts = [f"{label} {ranges[kind]}" for kind, label in labels.items() if kind in groups]
    text = f"**Do two widths share a law?** E of the shape, averaged over both kinds of unit: {'; '.join(parts)}."
    if {"twin equal", "twin other"} <= groups.keys():
        more = max(groups["twin other"]) > max(groups["twin equal"])
        text += (
            " Of one recipe, models of different width are "
            + ("farther apart" if more else "no farther apart")
            + " than models of one width and other seeds."
        )
    return text


def _width_relation(one: str, other: str) -> str:
    widths = ["".join(c for c in name.partition("(")[2] if c.isdigit()) for name in (one, other)]
    relation = "equal" if widths[0] == widths[1] else "other"
    return f"twin {relation}" if one.startswith(TWIN) and other.startswith(TWIN) else relation


def _growth_table(facts: Facts) -> str:
    rows = []
    for case in CASES:
        if case_key(case) in facts:
            target, sampling, scale, noise, coupling = case
            loss = facts[case_key(case)]["loss"]
            shown = "not finite" if loss is None else f"{loss:.3f}"
            rows.append([TARGETS[target].about, sampling, *(x or MISSING for x in (scale, noise, coupling)), shown])
    order = list(TARGETS)
    about = [TARGETS[name].about for name in order]
    rows.sort(key=lambda row: about.index(row[0]))
    return table(["target", "sampling", "scale", "noise", "rows and columns", "loss"], rows)


def _growth_sentences(facts: Facts) -> str:
    def loss(*case: str) -> float | None:
        return facts.get(case_key(case), {}).get("loss")

    donor, chance = loss("own", ITSELF), loss("wider", DEFAULT)
    balanced, iid = (loss("wider", kind, "1/multiplicity", "0", "coupled") for kind in ("balanced", "iid"))
    doubled, uncoupled = (
        loss("doubled", "balanced", "1/multiplicity", "0", "coupled"),
        loss("wider", "balanced", "1/multiplicity", "0", "uncoupled"),
    )
    sentences = []
    if donor is not None and doubled is not None:
        sentences.append(
            f"**Does growth that is scaled by multiplicity keep the function?** At twice the width the loss is "
            f"{doubled:.3f}, the donor's is {donor:.3f}."
        )
    if balanced is not None and iid is not None and chance is not None:
        sentences.append(
            f"**Is iid sampling enough on a real model?** At 768 the loss is {iid:.2f} with iid units and "
            f"{balanced:.2f} with balanced ones; the default initialisation has {chance:.2f}."
        )
    if uncoupled is not None:
        sentences.append(
            f"**Does coupling of rows and columns matter?** Without it the loss at 768 is {uncoupled:.2f}."
        )
    return "\n\n".join(sentences)
