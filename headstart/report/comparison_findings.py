"""What a comparison found, in words: the headline, and what its own numbers do not show."""

from __future__ import annotations

import math
from typing import Any

from headstart.compare.scores import REFERENCE

Results = dict[str, Any]


def ranked(results: Results) -> list[tuple[str, dict[str, Any]]]:
    """Methods, the fastest first, of equals the one with the lower final loss; then those without a speed-up by final
    loss; those that only diverged last."""

    def place(item: tuple[str, dict[str, Any]]) -> tuple[int, float, float]:
        fast, final = item[1]["speedup"]["mean"], item[1]["final_loss"]["mean"]
        if fast is not None:
            return (0, -round(fast, 6), final)
        return (1, final, 0.0) if final is not None else (2, 0.0, 0.0)

    return sorted(results["methods"].items(), key=place)


def headline(results: Results) -> str:
    """What was fastest, and whether that is more than noise, in one sentence."""
    steps, seeds = results["steps"], len(results["seeds"])
    if results["threshold"] is None:
        return "The default initialisation diverged at every learning rate, so there is nothing to compare with."
    fast = [(name, m) for name, m in ranked(results) if m["speedup"]["mean"] is not None and name != REFERENCE]
    if not fast or fast[0][1]["speedup"]["mean"] <= 1:
        return f"No method reached the tuned default's loss in fewer than its {count(steps, 'step')}."
    name, best = fast[0]
    if starts_below(best):
        bounds = best["difference"]["ci95"]
        if bounds is None:
            verdict = "with one seed, which cannot exclude noise"
        else:
            verdict = f"{'more' if bounds[1] < 0 else 'no more'} than the noise of {seeds} seeds"
        return (
            f"{name} starts below the loss that the tuned default reaches after {count(steps, 'step')}, and ends at "
            f"{best['final_loss']['mean']:.3f} against {results['threshold']:.3f}: {verdict}."
        )
    taken = best["steps_to_threshold"]["mean"]
    first = f"{name} gets in {count(taken, 'step')} where the tuned default gets in {steps:,}"
    bounds = best["speedup"]["ci95"]
    if bounds is None:
        return f"{first}: {times(best['speedup']['mean'])} faster, measured with one seed, which cannot exclude noise."
    verdict = "more than the noise of" if bounds[0] > 1 else "not distinguishable from the noise of"
    return (
        f"{first}: {times(best['speedup']['mean'])} faster (95 % interval {times(bounds[0])} to {times(bounds[1])}), "
        f"{verdict} {seeds} seeds."
    )


def lead(results: Results) -> str:
    """What was done, in two sentences."""
    threshold = results["threshold"]
    reached = "" if threshold is None else f" The tuned default ends at {threshold:.3f} nats per token."
    return (
        f"{len(results['methods'])} initialisations, each trained for {count(results['steps'], 'step')} with "
        f"{count(len(results['seeds']), 'seed')} at the best of {count(len(results['grid']), 'learning rate')} on "
        f"{results['corpus']['name']}, on the same batches in the same order.{reached}"
    )


def caveats(results: Results) -> list[str]:
    """What the data of this very comparison does not show, one paragraph each."""
    return [
        *_about_seeds(results),
        *_about_thresholds(results),
        *_about_rates(results),
        *_about_donors(results),
        f"Every run ends after {count(results['steps'], 'step')}. That says nothing of longer training, over which a "
        "head start may shrink.",
        "The loss at step 0 is shown and decides nothing: what counts is how training goes on from there.",
        "Learning rates were chosen by the same held-out loss that is reported, for every method alike, so all final "
        "losses are slightly optimistic. The threshold is itself a mean over seeds; the intervals leave its error out.",
    ]


def _about_seeds(results: Results) -> list[str]:
    seeds = len(results["seeds"])
    if seeds == 1:
        return ["One seed gives no idea of the spread between runs: use three or more."]
    if seeds < 5:
        return [
            f"With {seeds} seeds an interval is wide and rests on the assumption that runs scatter normally "
            "(Student's t)."
        ]
    return []


def _about_thresholds(results: Results) -> list[str]:
    lines, seeds = [], len(results["seeds"])
    for name, m in results["methods"].items():
        reached = [c for c in m["steps_to_threshold"]["per_seed"] if c is not None]
        if name != REFERENCE and m["curves"] and len(reached) < seeds:
            how = "never reached the threshold" if not reached else f"reached it with {len(reached)} of {seeds} seeds"
            lines.append(f"{name} {how} within {count(results['steps'], 'step')}, so it is given no speed-up.")
        if name != REFERENCE and starts_below(m):
            lines.append(
                f"{name} is below the threshold before or within the first step: its donors have learned text like "
                "this. Its speed-up counts as if it took one step, so look at its final loss instead."
            )
    return lines


def _about_rates(results: Results) -> list[str]:
    grid, methods = results["grid"], results["methods"]
    lines = []
    if len(grid) == 1:
        lines.append(f"Only one learning rate ({grid[0]:g}) was tried, so nothing was tuned.")
    else:
        for end, rate in (("lowest", min(grid)), ("highest", max(grid))):
            names = [name for name, m in methods.items() if m["lr"] == rate]
            if names:
                lines.append(
                    f"For {', '.join(names)} the {end} learning rate of the grid ({rate:g}) was the best: a better one "
                    "may lie beyond."
                )
    scales, scale = methods[REFERENCE]["scales"], methods[REFERENCE]["scale"]
    if len(scales) > 1:
        edge = scale is not None and scale in (min(map(float, scales)), max(map(float, scales)))
        lines.append(
            f"The default initialisation was also tuned over its scale ({', '.join(scales)}), which the other methods "
            "were not: that favours it."
            + (f" The best of them, {scale:g}, is the last on its side: a better one may lie beyond." if edge else "")
        )
    else:
        lines.append("The scale of the default initialisation was not tuned, only its learning rate, as for all.")
    for name, m in methods.items():
        if m["diverged"]:
            rates = ", ".join(sorted({f"{d['lr']:g}" for d in m["diverged"]}, key=float))
            lines.append(
                f"{name} diverged in {count(len(m['diverged']), 'run')}, at learning rate {rates}; such a rate is not "
                "eligible."
            )
    return lines


def _about_donors(results: Results) -> list[str]:
    using = {name: m for name, m in results["methods"].items() if m["donors"]}
    if not using:
        return []
    unknown = [name for name, m in using.items() if m["donor_cost"] is None]
    line = (
        "Steps count the training of the target alone. Somebody had to train the donors, and a learned method had to "
        "be trained on them; the table above says what is known of the donors' cost"
    )
    return [
        line + (f", which for {', '.join(unknown)} is nothing." if unknown else "."),
        "Whether the donors have learned from the held-out text is not checked here. Where they have, the methods that "
        "use them look better than they are.",
    ]


def starts_below(method: dict[str, Any]) -> bool:
    """Whether a method reaches the threshold within its first step, with any seed."""
    return any(c is not None and c < 1 for c in method["steps_to_threshold"]["per_seed"])


def fold(method: dict[str, Any]) -> str:
    """The speed-up, as a lower bound where it was cut off at one step."""
    mean = method["speedup"]["mean"]
    return "–" if mean is None else ("≥ " if starts_below(method) else "") + times(mean)


def fewer(found: dict[str, Any]) -> str:
    """Of one entry of `thresholds`, how many times fewer steps than the default took: `17× (11–26)`; `≥ 50×` where some
    seed is there within its first step, which counts as one; `2 of 3 arrive`; `never`."""
    steps, ratio = found["steps"], found["ratio"]
    if ratio["mean"] is None:
        arrived = sum(s is not None for s in steps)
        return f"{arrived} of {len(steps)} arrive" if arrived else "never"
    if min(steps) < 1:
        return f"≥ {_at_least(ratio['mean'])}×"
    bounds = "" if ratio["ci95"] is None else f" ({'–'.join(_two_digits(x) for x in ratio['ci95'])})"
    return f"{_two_digits(ratio['mean'])}×{bounds}"


def _two_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def _at_least(value: float) -> str:
    """Two digits, rounded down; up only what falls short by the error of its logarithm."""
    unit = 1.0 if value >= 10 else 0.1 if value >= 1 else 0.01
    return _two_digits(math.floor(value / unit * (1 + 1e-9)) * unit)


def count(number: float, noun: str) -> str:
    """`18 steps`, `1 step`, `2.5 steps`."""
    text = f"{number:,.0f}" if number >= 9.95 or number == int(number) else f"{number:.1f}"
    return f"{text} {noun}{'' if text == '1' else 's'}"


def times(value: float) -> str:
    """`16.7×`, three digits or so."""
    return f"{value:,.0f}×" if value >= 99.5 else f"{value:.1f}×" if value >= 9.95 else f"{value:.2f}×"
