"""From training runs to numbers: intervals over seeds, steps to a threshold, speed-ups, the tuned learning rate.

A run is a dict {method, scale, seed, lr, steps: [s0, s1, …], losses: [held-out loss at each of them], max_grad_norm,
diverged: step or None, grad_spikes, activation_rms: {start, end}, init: {seconds, donors, novelty, novelty_note}};
`steps` begins with 0.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

REFERENCE = "default"  # the method that every other is compared with
SHARES = (0.25, 0.5, 1.0)  # of the reference's steps, whose losses are thresholds
RunResult = dict[str, Any]  # the dict of one run, described above


def evaluation_points(steps: int, points: int = 12) -> list[int]:
    """Where the held-out loss is measured: step 0, then geometrically (a good start is over its threshold within few
    steps) and evenly (the rest) up to the last step."""
    grid = {0, steps}
    grid |= {round(x) for x in np.geomspace(1, steps, points)}
    grid |= {round(x) for x in np.linspace(0, steps, points)}
    return sorted(grid)


def step_reaching(steps: Sequence[int], losses: Sequence[float], threshold: float | None) -> float | None:
    """The first step at which the linearly interpolated curve reaches the threshold; None if it never does."""
    if threshold is None or not losses:
        return None
    if losses[0] <= threshold:
        return float(steps[0])
    for i in range(1, len(losses)):
        if losses[i] <= threshold:
            share = (losses[i - 1] - threshold) / (losses[i - 1] - losses[i])
            return steps[i - 1] + share * (steps[i] - steps[i - 1])
    return None


def steps_reaching(curves: Sequence[Mapping[str, Any]], losses: Sequence[float]) -> list[float | None]:
    """For each curve, {steps, losses, …}, the step at which it reaches its own one of the losses."""
    return [step_reaching(curve["steps"], curve["losses"], loss) for curve, loss in zip(curves, losses, strict=True)]


def count_gradient_spikes(norms: Sequence[float], window: int = 20, factor: float = 3.0) -> int:
    """Steps whose gradient norm is more than `factor` times the median of the `window` norms before it."""
    before = (norms[i - window : i] for i in range(window, len(norms)))
    return sum(norm > factor * float(np.median(b)) for norm, b in zip(norms[window:], before, strict=True))


def interval(values: Sequence[float]) -> dict[str, Any]:
    """{mean, std, ci95: [low, high]}: Student's t over the values; std and ci95 are None for a single one."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return {"mean": mean, "std": None, "ci95": None}
    from scipy.special import stdtrit  # scipy.stats takes seconds to import

    std = float(np.std(values, ddof=1))
    half = float(stdtrit(len(values) - 1, 0.975)) * std / math.sqrt(len(values))
    return {"mean": mean, "std": std, "ci95": [mean - half, mean + half]}


def speedup(before: Sequence[float | None], now: Sequence[float | None]) -> dict[str, Any]:
    """{mean, ci95} of the steps before over the steps now, seed by seed. Ratios are skewed, so the mean is geometric
    and the interval is Student's t on their logarithms. A start that needs no step at all counts as one step. {None,
    None} unless every seed arrives: an average over those that did would flatter the method."""
    pairs = [(old, new) for old, new in zip(before, now, strict=True) if old is not None and new is not None]
    if len(pairs) < len(now):
        return {"mean": None, "ci95": None}
    logs = interval([math.log(max(old, 1.0) / max(new, 1.0)) for old, new in pairs])
    return {"mean": math.exp(logs["mean"]), "ci95": logs["ci95"] and [math.exp(x) for x in logs["ci95"]]}


def thresholds(runs: Sequence[RunResult], budget: int) -> dict[str, list[float]]:
    """{share of the budget: held-out loss of each run after that share of its steps}: a quarter, half, all."""
    return {f"{s:g}": [float(np.interp(s * budget, r["steps"], r["losses"])) for r in runs] for s in SHARES if runs}


def best_setting(
    runs: Sequence[RunResult],
) -> tuple[tuple[float, float] | None, dict[tuple[float, float], float | None]]:
    """(best, finals): the mean final loss over seeds of each (scale, lr), None where a seed diverged, and the pair
    with the lowest; None if all diverged."""
    finals: dict[tuple[float, float], float | None] = {}
    for key in sorted({(r["scale"], r["lr"]) for r in runs}):
        same = [r for r in runs if (r["scale"], r["lr"]) == key]
        diverged = any(r["diverged"] is not None for r in same)
        finals[key] = None if diverged else float(np.mean([r["losses"][-1] for r in same]))
    usable = {key: loss for key, loss in finals.items() if loss is not None}
    return (min(usable, key=lambda key: usable[key]) if usable else None), finals


def score(
    runs: Sequence[RunResult], budget: int, tuning: Collection[int] | None = None
) -> tuple[float | None, dict[str, dict[str, Any]]]:
    """(threshold, {method: the entry of results.json}), in the order in which the methods first appear. tuning: the
    seeds that learning rate and scale are chosen on, None for all."""
    methods = {name: [r for r in runs if r["method"] == name] for name in dict.fromkeys(r["method"] for r in runs)}
    tuned = {
        name: best_setting([r for r in of if tuning is None or r["seed"] in tuning]) for name, of in methods.items()
    }
    chosen = {
        name: sorted((r for r in of if (r["scale"], r["lr"]) == tuned[name][0]), key=lambda r: r["seed"])
        for name, of in methods.items()
    }
    for name, of in chosen.items():  # at a seed that it was not tuned on: then the method has no result
        if any(r["diverged"] is not None for r in of):
            chosen[name] = []
    reference = [r["losses"][-1] for r in chosen[REFERENCE]]
    threshold = float(np.mean(reference)) if reference else None
    levels = thresholds(chosen[REFERENCE], budget)
    entries = {
        name: _entry(name, of, chosen[name], tuned[name], threshold, reference, budget) for name, of in methods.items()
    }
    first = {at: steps_reaching(chosen[REFERENCE], losses) for at, losses in levels.items()}  # a curve may rise again
    for name, entry in entries.items():  # the default's own curve of the same seed, so that both are paired
        entry["thresholds"] = {}
        for at, losses in levels.items() if chosen[name] else ():
            steps = steps_reaching(chosen[name], losses)
            fast = speedup(first[at], steps)
            entry["thresholds"][at] = {"loss": float(np.mean(losses)), "steps": steps, "ratio": fast}
    return threshold, entries


def _entry(
    name: str,
    runs: Sequence[RunResult],
    best: Sequence[RunResult],
    tuned: tuple[tuple[float, float] | None, dict[tuple[float, float], float | None]],
    threshold: float | None,
    reference: Sequence[float],
    budget: int,
) -> dict[str, Any]:
    key, finals = tuned
    scale, lr = key if key is not None else (None, None)
    losses = [r["losses"][-1] for r in best]
    steps = [step_reaching(r["steps"], r["losses"], threshold) for r in best]
    arrived = [c for c in steps if c is not None]
    nothing = {"mean": None, "std": None, "ci95": None}
    if not best:
        fast: dict[str, Any] = {"mean": None, "ci95": None}
    elif name == REFERENCE:
        fast = {"mean": 1.0, "ci95": None}  # by definition
    else:
        fast = speedup([budget] * len(steps), steps)
    difference = interval([a - b for a, b in zip(losses, reference, strict=True)]) if best and reference else nothing
    init = (best or runs)[0]["init"]
    return {
        "lr": lr,
        "lrs": {f"{rate:g}": loss for (at, rate), loss in finals.items() if at == (1.0 if scale is None else scale)},
        "curves": [{"seed": r["seed"], "steps": r["steps"], "losses": r["losses"]} for r in best],
        "final_loss": interval(losses) if best else nothing,
        "steps_to_threshold": {
            "mean": float(np.mean(arrived)) if best and len(arrived) == len(best) else None,
            "per_seed": steps,
        },
        "speedup": fast,
        "step0_loss": float(np.mean([r["losses"][0] for r in best])) if best else None,
        "max_grad_norm": max((r["max_grad_norm"] for r in best), default=None),
        "grad_spikes": float(np.mean([r["grad_spikes"] for r in best])) if best else None,
        "activation_rms": _mean_activations(best),
        "donors": init["donors"],
        "donor_cost": donor_cost(init["donors"]),
        "seconds": float(np.mean([r["init"]["seconds"] for r in runs])),
        "novelty": init["novelty"],
        "novelty_note": init["novelty_note"],
        "difference": difference,
        "scale": scale,
        "scales": {
            f"{at:g}": {f"{rate:g}": loss for (a, rate), loss in finals.items() if a == at}
            for at in sorted({a for a, _ in finals})
        },
        "diverged": [
            {"lr": r["lr"], "scale": r["scale"], "seed": r["seed"], "step": r["diverged"]}
            for r in runs
            if r["diverged"] is not None
        ],
    }


def _mean_activations(runs: Sequence[RunResult]) -> dict[str, list[float]] | None:
    """{start, end}: root mean square after the embedding and after each block, mean over seeds."""
    if not runs:
        return None
    return {when: np.mean([r["activation_rms"][when] for r in runs], axis=0).tolist() for when in ("start", "end")}


def donor_cost(donors: Sequence[dict[str, Any]]) -> float | None:
    """Floating-point operations that training the donors took, 6 x parameters x tokens each (2001.08361); 0 where
    there are none, None where the tokens of one are unknown."""
    if any(d["tokens"] is None or d["parameters"] is None for d in donors):
        return None
    return float(sum(6 * d["parameters"] * d["tokens"] for d in donors))
