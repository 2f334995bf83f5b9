"""What a comparison found, in sentences, and what its numbers do not show."""

from __future__ import annotations

import math
from typing import Any

from headstart.report.numbers import DASH, count_of, format_factor, or_dash, two_digits
from headstart.report.scores import REFERENCE

Results = dict[str, Any]
FEW_SEEDS = 5  # with fewer, an interval rests on the assumption of normal scatter


def rank_methods(results: Results) -> list[tuple[str, dict[str, Any]]]:
    """(name, entry) of all methods. First those with a speed-up, the fastest first, equals by final loss; then those
    without by final loss; last those that diverged at every learning rate."""

    def sort_key(item: tuple[str, dict[str, Any]]) -> tuple[int, float, float]:
        speedup, final = item[1]["speedup"]["mean"], item[1]["final_loss"]["mean"]
        if speedup is not None:
            return (0, -round(speedup, 6), final)
        return (1, final, 0.0) if final is not None else (2, 0.0, 0.0)

    return sorted(results["methods"].items(), key=sort_key)


def headline(results: Results) -> str:
    """One sentence: the fastest method, its speed-up, and whether that exceeds the noise between seeds."""
    budget = count_of(results["steps"], "step")
    if results["threshold"] is None:
        return "The default initialisation diverged at every learning rate, so nothing can be compared with it."
    fast = [(name, m) for name, m in rank_methods(results) if m["speedup"]["mean"] is not None and name != REFERENCE]
    if not fast or fast[0][1]["speedup"]["mean"] <= 1:
        return f"No method reaches the final loss of the tuned default in fewer than its {budget}."
    name, best = fast[0]
    if starts_below_threshold(best):
        bounds = best["difference"]["ci95"]
        verdict = _noise_verdict(results, None if bounds is None else bounds[1] < 0)
        return (
            f"{name} starts below the loss that the tuned default reaches after {budget}. It ends at "
            f"{best['final_loss']['mean']:.3f}, the default at {results['threshold']:.3f}: {verdict}."
        )
    taken, mean, bounds = best["steps_to_threshold"]["mean"], best["speedup"]["mean"], best["speedup"]["ci95"]
    first = f"{name} reaches the final loss of the tuned default in {count_of(taken, 'step')} instead of {budget}"
    interval = "" if bounds is None else f" (95 % interval {format_factor(bounds[0])} to {format_factor(bounds[1])})"
    verdict = _noise_verdict(results, None if bounds is None else bounds[0] > 1)
    return f"{first}: {format_factor(mean)} faster{interval}, {verdict}."


def _noise_verdict(results: Results, exceeds_noise: bool | None) -> str:
    """`exceeds_noise` is None where one seed gives no interval."""
    if exceeds_noise is None:
        return "measured with one seed, which cannot exclude noise"
    return f"{'more than' if exceeds_noise else 'within'} the noise of {len(results['seeds'])} seeds"


def introduction(results: Results) -> str:
    """What was compared, and how."""
    ends = or_dash(results["threshold"], lambda loss: f" The tuned default ends at {loss:.3f} nats per token.", "")
    kind = "initial adapters" if "adapter" in results else "initialisations"
    return (
        f"{len(results['methods'])} {kind}, each trained for {count_of(results['steps'], 'step')} with "
        f"{count_of(len(results['seeds']), 'seed')} on {results['corpus']['name']}. Each method uses its best of "
        f"{count_of(len(results['grid']), 'learning rate')}. All see the same batches in the same order.{ends}"
    )


def caveats(results: Results) -> list[str]:
    """What the data of this comparison does not show, one paragraph each."""
    return [
        *_seed_caveats(results),
        *_threshold_caveats(results),
        *_adapter_caveats(results),
        *_learning_rate_caveats(results),
        *_scale_caveats(results),
        *_divergence_caveats(results),
        *_donor_caveats(results),
        f"Every run ends after {count_of(results['steps'], 'step')}. Longer training may shrink the advantage.",
        "The loss at step 0 does not enter the comparison. The loss after training does.",
        "The held-out loss that is reported also chose the learning rates, for every method alike. All final losses "
        "are therefore slightly too low. The threshold is a mean over seeds, and the intervals ignore its error.",
    ]


def _seed_caveats(results: Results) -> list[str]:
    seeds = len(results["seeds"])
    if seeds == 1:
        return ["One seed does not show how much runs differ. Use three or more."]
    if seeds < FEW_SEEDS:
        return [
            f"With {seeds} seeds an interval is wide. It assumes that runs scatter normally (Student's t distribution)."
        ]
    return []


def _threshold_caveats(results: Results) -> list[str]:
    lines, seeds = [], len(results["seeds"])
    others = {name: m for name, m in results["methods"].items() if name != REFERENCE}
    for name, m in others.items():
        reached = [c for c in m["steps_to_threshold"]["per_seed"] if c is not None]
        if m["curves"] and len(reached) < seeds:
            how = "never reached the threshold" if not reached else f"reached it with {len(reached)} of {seeds} seeds"
            lines.append(f"{name} {how} within {count_of(results['steps'], 'step')}, so it has no speed-up.")
    below = [name for name, m in others.items() if starts_below_threshold(m)]
    if below and "adapter" not in results:
        lines.append(
            f"Below the threshold before or within the first step: {', '.join(below)}. The donors were trained on "
            "similar text. The speed-up counts one step, so compare final losses instead."
        )
    return lines


def _adapter_caveats(results: Results) -> list[str]:
    if "adapter" not in results:
        return []
    lines = ["Only the held-out loss was measured. How well the adapted models answer questions is another matter."]
    default = results["methods"][REFERENCE]
    if results["threshold"] is not None and results["threshold"] >= default["step0_loss"]:
        lines.append(
            "The tuned default ends no lower than the base, so training did not help and no speed-up means anything. "
            "Try lower learning rates."
        )
    return lines


def _learning_rate_caveats(results: Results) -> list[str]:
    grid = results["grid"]
    if len(grid) == 1:
        return [f"Only one learning rate ({grid[0]:g}) was tried, so nothing was tuned."]
    lines = []
    for end, rate in (("lowest", min(grid)), ("highest", max(grid))):
        names = [name for name, m in results["methods"].items() if m["lr"] == rate]
        if names:
            lines.append(
                f"For {', '.join(names)} the {end} learning rate of the grid ({rate:g}) was the best. A better one may "
                "lie outside the grid."
            )
    return lines


def _scale_caveats(results: Results) -> list[str]:
    default = results["methods"][REFERENCE]
    scales, scale = default["scales"], default["scale"]
    if "adapter" in results:
        return []  # an adapter's default has no scale to tune
    if len(scales) <= 1:
        return ["The scale of the default initialisation was not tuned. Its learning rate was, as for every method."]
    text = (
        f"The default initialisation was also tuned over its scale ({', '.join(scales)}). The other methods were not, "
        "which favours the default."
    )
    if scale is not None and scale in (min(map(float, scales)), max(map(float, scales))):
        text += f" Its best scale, {scale:g}, is at the end of that range. A better one may lie outside."
    return [text]


def _divergence_caveats(results: Results) -> list[str]:
    lines = []
    for name, m in results["methods"].items():
        if m["diverged"]:
            rates = ", ".join(sorted({f"{d['lr']:g}" for d in m["diverged"]}, key=float))
            lines.append(
                f"{name} diverged in {count_of(len(m['diverged']), 'run')}, at learning rate {rates}. A learning rate "
                "at which a run diverges is never chosen."
            )
    return lines


def _donor_caveats(results: Results) -> list[str]:
    with_donors = {name: m for name, m in results["methods"].items() if m["donors"]}
    if not with_donors:
        return []
    unknown = [name for name, m in with_donors.items() if m["donor_cost"] is None]
    cost = f" For {', '.join(unknown)} that cost is unknown." if unknown else ""
    return [
        f"{_donor_cost_text(results)} The table of donors shows what is known of their cost.{cost}",
        "This comparison does not check whether the donors were trained on the held-out text. If they were, methods "
        "with donors look better than they are.",
    ]


def _donor_cost_text(results: Results) -> str:
    if "adapter" in results:
        return "Steps count only the training of the adapter. The base and the donors were trained before."
    return (
        "Steps count only the training of the target. The donors were trained before, and learned methods were trained "
        "on them."
    )


def starts_below_threshold(method: dict[str, Any]) -> bool:
    """Whether a method reaches the threshold within its first step, with any seed."""
    return any(c is not None and c < 1 for c in method["steps_to_threshold"]["per_seed"])


def speedup_text(method: dict[str, Any]) -> str:
    """`16.7×`; `≥ 50.0×` where a seed is below the threshold within its first step; a dash without a speed-up."""
    mean = method["speedup"]["mean"]
    return DASH if mean is None else ("≥ " if starts_below_threshold(method) else "") + format_factor(mean)


def format_step_ratio(found: dict[str, Any]) -> str:
    """Steps of the default over steps of the method, from one entry of `thresholds`: `17× (11–26)` with the 95 %
    interval; `≥ 50×` where a seed arrives within its first step, which counts as one; `2 of 3 arrive`; `never`."""
    steps, ratio = found["steps"], found["ratio"]
    if ratio["mean"] is None:
        arrived = sum(s is not None for s in steps)
        return f"{arrived} of {len(steps)} arrive" if arrived else "never"
    if min(steps) < 1:
        return f"≥ {_two_digits_down(ratio['mean'])}×"
    bounds = "" if ratio["ci95"] is None else f" ({'–'.join(two_digits(x) for x in ratio['ci95'])})"
    return f"{two_digits(ratio['mean'])}×{bounds}"


def _two_digits_down(value: float) -> str:
    """Two digits, rounded down. 1e-9 corrects the rounding error of exp(log(x))."""
    unit = 1.0 if value >= 10 else 0.1 if value >= 1 else 0.01
    return two_digits(math.floor(value / unit * (1 + 1e-9)) * unit)
