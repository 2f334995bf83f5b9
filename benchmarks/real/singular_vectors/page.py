"""The measurements as a page: results/real_singular_vectors.md."""

from __future__ import annotations

import itertools
from collections import Counter
from statistics import mean
from typing import Any

from benchmarks.pages.cells import MISSING, table
from benchmarks.real.models import DONORS
from benchmarks.real.singular_vectors.figure import LABELS
from benchmarks.real.singular_vectors.measure import (
    BOOTSTRAPS,
    DEFAULT_INIT,
    INITS,
    OWN,
    PAPER,
    PUBLISHED_EXPONENT,
    SEEDS,
    XMIN_SHARES,
)

Facts = dict[str, Any]
VERDICTS = {"power law": "power law", "not a power law": "none", "undecided": "undecided"}
SIDES = {"a": "singular values of A", "b": "singular values of B", "entries": "entries of A"}
PUBLISHED_PAIRS = (("attn.v", "mlp.gate"), ("mlp.gate", "mlp.up"), ("mlp.gate", "mlp.down"))


def write_page(facts: Facts) -> str:
    """The page. facts: see `benchmarks.real.singular_vectors.__main__.measure_all`."""
    shares = ", ".join(f"{float(share):.0%}" for share in XMIN_SHARES)
    return f"""# Similarity of layers in real models (2509.00046)

Written by `python -m benchmarks.real.singular_vectors`. The distance of two layers is 1 - cos of their r largest
singular values. SmolLM2's smallest projection has 192, so that r = 256 is 192 for it. The donors' weights come from
4-bit files.

## Pairs of projections

28 pairs of the seven projections, each with itself included, by the protocol of Clauset, Shalizi and Newman with
{BOOTSTRAPS} bootstraps and layers as the sampled units. **none**: not a power law. **reference**: the projection with
the most partners that are no power law; a model without any is undifferentiated.

{_pair_table(facts)}

{_pair_sentences(facts)}

## All layers of all projections

The distances between all singular-value vectors of a model, of any two projections and layers. **exponent**: of the
density above xmin, where xmin has the smallest Kolmogorov-Smirnov distance. **share**: of the distances above xmin.
**p**: of the power law, with vectors as the sampled units, and with pairs as if they were independent. The last columns
show the exponent where xmin leaves {shares} of the distances.

{_pooled_table(facts)}

![Distances at r = 16, and exponents by xmin](figures/real_singular_vectors.png)

Stars and dotted lines mark the xmin that the protocol chooses. The dashed line is the paper's exponent.

{_pooled_sentences(facts)}

## Does an adapter show the distances of its reference?

LoRA adapters of rank 16 on SmolLM2, with A and B drawn by `pareto` (`both_compensated`) or by PEFT's default. Distances
are those between matrices of the most common shape, mean of {len(SEEDS)} seeds. **KS**: two-sample Kolmogorov-Smirnov
distance to the reference's distances, both divided by their median. 0 is equal and 1 is disjoint. **larger half**: the
exponent above the median, which does not depend on a choice of xmin. **verdicts**: of the 28 pairs of projections of A,
and how many are those of the reference. The paper's example is known by its groups and exponent only. `nmin` is the
least number of replaced entries, by default 1/384 of them.

{_adapter_table(facts)}

{_adapter_sentences(facts)}

## What this does not show

- Two models, of 18 and 30 layers. LLaMA 3.2 1B, the model of the published exponent, was not measured.
- The paper names no rule for xmin and no test. Another rule gives another exponent from the same distances.
- "Power law" means that nothing contradicts one in at least a quarter of the distances. With 18 to 30 layers the test
  rejects about half of what is none.
- Nothing here says whether such an adapter trains better. [real_adapters.md](real_adapters.md) measures that.
"""


def _pair_table(facts: Facts) -> str:
    rows = []
    for name, by_rank in facts["models"].items():
        for asked, found in by_rank.items():
            for kind, label in LABELS.items():
                counts = Counter(row["verdict"] for row in found[kind]["pairs"])
                grouping = found[kind]["grouping"]
                partners = ", ".join(_short(role) for role in grouping["gaussian"])
                reference = f"{_short(grouping['reference'])}: {partners}" if partners else "undifferentiated"
                rows.append([DONORS[name].title, asked, label, *(str(counts[v]) for v in VERDICTS), reference])
    return table(["model", "r", "matrices", *VERDICTS.values(), "reference: partners"], rows)


def _pair_sentences(facts: Facts) -> str:
    sentences = []
    for name, by_rank in facts["models"].items():
        title = DONORS[name].title
        alike = [rank for rank, found in by_rank.items() if found[OWN]["grouping"]["undifferentiated"]]
        own = [_count(found, OWN) for found in by_rank.values()]
        chance = [max(_count(found, kind) for kind in LABELS if kind != OWN) for found in by_rank.values()]
        laws = [_count(found, OWN, "power law") for found in by_rank.values()]
        laws_by_chance = [max(_count(f, kind, "power law") for kind in LABELS if kind != OWN) for f in by_rank.values()]
        beyond = any(a > b for a, b in zip(own, chance, strict=True))
        where = f"undifferentiated at r = {' and '.join(alike)}" if alike else "differentiated at every r"
        sentences.append(
            f"**Is {title} undifferentiated?** It is {where}. At r = {', '.join(by_rank)} it has "
            f"{', '.join(map(str, own))} pairs that are no power law; random matrices of its shapes have up to "
            f"{', '.join(map(str, chance))}. "
            + ("More than chance gives, at one r at least." if beyond else "So no r shows a difference beyond chance.")
            + f" {', '.join(map(str, laws))} of 28 pairs are power laws; in random matrices at most "
            f"{', '.join(map(str, laws_by_chance))}."
        )
        verdicts = {(r["a"], r["b"]): r["verdict"] for r in by_rank["16"][OWN]["pairs"]} if "16" in by_rank else {}
        kept = [f"{_short(a)} and {_short(b)}" for a, b in PUBLISHED_PAIRS if verdicts.get((a, b)) == "not a power law"]
        sentences.append(
            f"Of the paper's three exceptions (v and gate, gate and up, gate and down), {title} shows "
            f"{', '.join(kept) if kept else 'none'} at r = 16."
        )
    return "\n\n".join(sentences)


def _count(found: Facts, kind: str, verdict: str = "not a power law") -> int:
    return sum(row["verdict"] == verdict for row in found[kind]["pairs"])


def _pooled_table(facts: Facts) -> str:
    rows = []
    for name, by_rank in facts["models"].items():
        for asked, found in by_rank.items():
            for kind, label in LABELS.items():
                p = found[kind]["pooled"]
                rows.append([
                    DONORS[name].title, asked, label, f"{p['n']:,}", f"{p['alpha']:.2f}", f"{p['tail'] / p['n']:.0%}",
                    f"{p['p']:.2f}, {p['p_pairs']:.2f}", p["verdict"], f"{p['skewness']:.1f}",
                    ", ".join(f"{alpha:.2f}" for alpha in p["by_xmin"].values()),
                ])  # fmt: skip
    heads = ["model", "r", "matrices", "distances", "exponent", "share", "p", "verdict", "skewness", "by xmin"]
    return table(heads, rows)


def _pooled_sentences(facts: Facts) -> str:
    sentences = []
    for name, by_rank in facts["models"].items():
        own = {rank: found[OWN]["pooled"] for rank, found in by_rank.items()}
        text = f"**Which exponent has {DONORS[name].title}?** "
        text += ", ".join(f"{p['alpha']:.2f} at r = {rank}" for rank, p in own.items())
        text += f", each for the largest {min(p['tail'] / p['n'] for p in own.values()):.0%} to "
        text += f"{max(p['tail'] / p['n'] for p in own.values()):.0%} of the distances."
        if "16" in own:
            text += f" The paper's {PUBLISHED_EXPONENT} is what {_share_at(own['16'], PUBLISHED_EXPONENT)} at r = 16."
        if all(p["p"] > 0.1 >= p["p_pairs"] for p in own.values()):
            text += " A power law is rejected if pairs count as independent, and not if vectors do."
        sentences.append(text)
    near = [
        f"{DONORS[name].title} at r = {rank}, {LABELS[kind]}: {p['alpha']:.2f} for the largest {p['tail'] / p['n']:.0%}"
        for name, by_rank in facts["models"].items()
        for rank, found in by_rank.items()
        for kind in LABELS
        if kind != OWN and 1.4 < (p := found[kind]["pooled"])["alpha"] < 2.2
    ]
    chance = (
        f"Yes: {'; '.join(near)} of the distances." if near else "Not here: none of their exponents is from 1.4 to 2.2."
    )
    sentences.append(f"**Does chance give exponents near {PUBLISHED_EXPONENT}?** {chance}")
    return "\n\n".join(sentences)


def _share_at(pooled: Facts, exponent: float) -> str:
    """Between which shares above xmin the exponent lies."""
    known = [(float(share), alpha) for share, alpha in pooled["by_xmin"].items()]
    for (more, low), (less, high) in itertools.pairwise(known):
        if low <= exponent < high:
            return f"an xmin that leaves between {less:.0%} and {more:.0%} of the distances gives"
    return "no such xmin gives"


def _adapter_table(facts: Facts) -> str:
    rows = []
    for reference, found in facts.get("adapters", {}).items():
        wanted = found["grouping"]["exponent"]
        for init in INITS:
            for side, label in (
                ("a", "singular values of A"),
                ("b", "singular values of B"),
                ("entries", "entries of A"),
            ):
                own = [found[init][str(seed)][side] for seed in SEEDS]
                if None in own or reference == PAPER:
                    continue
                average = {key: mean(entry[key] for entry in own) for key in ("alpha_of_half", "ks")}
                alphas = ", ".join(f"{entry['alpha']:.1f}" for entry in own)
                rows.append([
                    _title(reference), f"{wanted:.2f}", f"`{init}`", label, alphas, f"{average['alpha_of_half']:.2f}",
                    f"{average['ks']:.2f}", _verdict_cell(facts, reference, init) if side == "a" else MISSING,
                ])  # fmt: skip
        if reference == PAPER:
            rows += [
                [
                    reference,
                    f"{wanted:.2f}",
                    f"`{init}`",
                    SIDES["a"],
                    *[MISSING] * 3,
                    _verdict_cell(facts, reference, init),
                ]
                for init in INITS
            ]
    heads = ["reference", "its exponent", "init", "distances of", "exponent, by seed", "larger half", "KS", "verdicts"]
    return table(heads, rows)


def _verdict_cell(facts: Facts, reference: str, init: str) -> str:
    verdicts = facts["adapters"][reference][init]["verdicts"]
    counts = Counter(verdicts.values())
    text = ", ".join(f"{counts[v]} {short}" for v, short in VERDICTS.items() if counts[v])
    wanted = _wanted(facts, reference)
    return text + (f"; {sum(verdicts[key] == v for key, v in wanted.items())} agree" if wanted else "")


def _wanted(facts: Facts, reference: str) -> dict[str, str]:
    """The verdicts of a reference by pair; the paper's example has none."""
    if reference == PAPER:
        return {}
    return {f"{row['a']} {row['b']}": row["verdict"] for row in facts["models"][reference]["16"][OWN]["pairs"]}


def _adapter_sentences(facts: Facts) -> str:
    sentences = ["**Does a generated adapter show the reference's distances?**"]
    for reference, found in facts.get("adapters", {}).items():
        if reference == PAPER:
            kept = [_exceptions(found[init]["verdicts"]) for init in ("pareto", "pareto, nmin=1")]
            sentences.append(
                f"- {reference}: v, up and down have Gaussian counts, so that their distances to gate should be no "
                f"power law. In the singular values of A, {kept[0]} of these three pairs are none, with `nmin=1` "
                f"{kept[1]}."
            )
            continue
        ks = {
            (init, side): mean(found[init][str(seed)][side]["ks"] for seed in SEEDS)
            for init in INITS
            for side in ("a", "entries")
        }
        nearest = min(INITS, key=lambda init: ks[init, "a"])
        sentences.append(
            f"- {_title(reference)}: the singular values of A are at a KS distance of {ks['pareto', 'a']:.2f} from the "
            f"reference, those of PEFT's default at {ks[DEFAULT_INIT, 'a']:.2f}. `{nearest}` is nearest, at "
            f"{ks[nearest, 'a']:.2f}."
        )
    return "\n".join(sentences)


def _exceptions(verdicts: dict[str, str]) -> int:
    """How many of the paper's exceptions are no power law."""
    return sum(verdicts[f"{a} {b}"] == "not a power law" for a, b in PUBLISHED_PAIRS)


def _title(reference: str) -> str:
    return DONORS[reference].title if reference in DONORS else reference


def _short(role: str) -> str:
    return role.partition(".")[2]
