"""Decides which samples of the novelty audit are novel. After 2506.07998.

A sample is novel if it is farther from every donor than tau times the distance between donors: the median over donors
of the distance to the nearest other donor, in canonical coordinates. It is performant if its loss after training is at
most a threshold. It counts if it is both.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any

TAUS = (1.0, 2.0, 3.0, 4.0)


def count_novel(found: Mapping[str, Any], label: str, shape: str, ready: float, trains: float) -> dict[str, Any]:
    """Counts and means over the samples of one label at one shape.

    Returns {n, distinct, loss, rate, trained, distance, mosaic, size, iou, expected, same, ready, performant,
    novel: {tau: n}, both: {tau: n}, beyond: n}. ready: loss before training at most `ready`. rate: the learning rate of
    the lower mean loss after training. performant: loss after training at most `trains`. both: novel and performant.
    beyond: performant, and farther from all donors together than donors are. A loss that is not finite fails both
    thresholds.
    """
    rows = [s for s in found["samples"] if (s["label"], s["shape"]) == (label, shape)]
    apart = found["donors"]["median"]

    def mean_loss(lr: str) -> float:
        ends = [s["trained"][lr] for s in rows]
        return math.inf if None in ends else statistics.fmean(ends)

    lr = min(rows[0]["trained"], key=mean_loss)
    rows = [s | {"trained": s["trained"][lr]} for s in rows]
    performs = [s["trained"] is not None and s["trained"] <= trains for s in rows]
    far = [s["mosaic"] > found["donors"]["mosaic"] for s in rows]
    novel = {f"{tau:g}": [s["distance"] > tau * apart for s in rows] for tau in TAUS}

    def mean(key: str) -> float | None:
        return None if any(s[key] is None for s in rows) else statistics.fmean(s[key] for s in rows)

    return {
        "n": len(rows),
        "distinct": len({s["digest"] for s in rows}),
        "rate": lr,
        **{key: mean(key) for key in ("loss", "trained", "distance", "mosaic")},
        "size": statistics.fmean(statistics.fmean(s["sizes"].values()) for s in rows),
        **{key: mean(f"error_{key}") for key in ("iou", "expected", "same")},
        "ready": sum(s["loss"] is not None and s["loss"] <= ready for s in rows),
        "performant": sum(performs),
        "novel": {tau: sum(flags) for tau, flags in novel.items()},
        "both": {tau: sum(a and b for a, b in zip(flags, performs, strict=True)) for tau, flags in novel.items()},
        "beyond": sum(a and b for a, b in zip(far, performs, strict=True)),
    }
