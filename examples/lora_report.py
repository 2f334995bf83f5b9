"""Report of lora_inits.py: paired tests over seeds, the table beside the published one, and a verdict."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import Any

from headstart.report.scores import interval

PEFT = "peft-default"  # all others are compared with it
PUBLISHED = {
    "source": "2509.00046",
    "what": "SmolLM2-135M on GPQA-Diamond, the reference of pareto LLaMA3-8B",
    "questions": 198,
    "chance": 0.25,
    "rows": {"before": {"accuracy": 0.2222, "right": 44}, "reshaped LoRA": {"accuracy": 0.2879, "right": 57}},
}


def paired_test(values: Sequence[float], others: Sequence[float]) -> dict[str, Any]:
    """values - others, seed by seed: {mean, std, ci95} by Student's t, the two-sided p of the paired t test, Cohen's d
    of the differences."""
    from scipy.special import stdtr

    found = interval([x - y for x, y in zip(values, others, strict=True)])
    n, std = len(values), found["std"]
    if not std:  # one seed, or the same difference in all
        return found | {"p": None if std is None or found["mean"] else 1.0, "d": None}
    d = found["mean"] / std
    return found | {"p": float(2 * stdtr(n - 1, -abs(d) * math.sqrt(n))), "d": d}


def holm(ps: dict[str, float | None]) -> dict[str, float | None]:
    """p-values corrected for their number (Holm); None stays None and counts."""
    ordered = sorted((p, name) for name, p in ps.items() if p is not None)
    corrected: dict[str, float | None] = dict.fromkeys(ps)
    least = 0.0
    for i, (p, name) in enumerate(ordered):
        least = corrected[name] = max(least, min(1.0, p * (len(ps) - i)))
    return corrected


def add_tests(entries: dict[str, Any], groups: Sequence[str]) -> None:
    """Adds paired tests against PEFT's default to every other entry, with Holm's correction over initialisations."""
    own = entries[PEFT]
    others = [init for init, entry in entries.items() if init != PEFT and entry["losses"] and own["losses"]]
    for init in others:
        entry = entries[init]
        entry["difference"] = paired_test(entry["losses"], own["losses"])
        entry["gains"] = {g: paired_test(entry["accuracies"][g], own["accuracies"][g]) for g in groups}
    for find in (lambda e: e["difference"], *(lambda e, g=g: e["gains"][g] for g in groups)):
        corrected = holm({init: find(entries[init])["p"] for init in others})
        for init, p in corrected.items():
            find(entries[init])["holm"] = p


def published_result() -> dict[str, Any]:
    """The published table with two tests against chance."""
    from scipy.stats import binomtest, fisher_exact

    n, rows = PUBLISHED["questions"], PUBLISHED["rows"]
    right = [row["right"] for row in rows.values()]  # type: ignore[attr-defined]
    fisher = float(fisher_exact([[r, n - r] for r in right])[1])
    chance = float(binomtest(max(right), n, PUBLISHED["chance"]).pvalue)
    return PUBLISHED | {"fisher_p": fisher, "chance_p": chance}


def verdict(found: dict[str, Any]) -> str:
    """Whether reshaping helps here, in short sentences, from the numbers alone. The first sentence is the answer."""
    entries = {name: e for name, e in found["inits"].items() if e["method"] == "pareto" and "difference" in e}
    if not entries:
        return "Nothing was compared: no pareto run ended beside PEFT's default."
    differences = {name: e["difference"] for name, e in entries.items()}
    lower = [n for n, d in differences.items() if _is_significant(d) and d["mean"] < 0]
    higher = [n for n, d in differences.items() if _is_significant(d) and d["mean"] > 0]
    default = found["inits"][PEFT]["loss"]["mean"]
    best = min(differences, key=lambda n: differences[n]["mean"])
    d = differences[best]
    seeds = len(found["settings"]["seeds"])
    if lower:
        answer = f"Reshaping helps here: {_join_names(lower)} {_verb(lower)} significantly below PEFT's default."
    else:
        answer = "No gain from reshaping is seen: no pareto strategy ends significantly below PEFT's default."
    interval = f" (95 % CI {d['ci95'][0]:+.4f} to {d['ci95'][1]:+.4f})" if d["ci95"] else ""
    p = "" if d["holm"] is None else f"; p = {d['holm']:.2g} after Holm"
    sentences = [
        answer,
        f"Every init trains at its own learning rate, over {seeds} seeds.",
        f"The best strategy, {best}, differs from the default by {d['mean']:+.4f} nats{interval}.",
        f"That is {d['mean'] / default:+.2%}{p}.",
    ]
    if not lower:
        sentences.append(
            f"A gain of more than {largest_plausible_gain(list(entries.values()), seeds):.4f} nats is unlikely."
        )
    if higher:
        sentences.append(f"{_join_names(higher)} {_verb(higher)} significantly above the default.")
    return " ".join([*sentences, _accuracy_sentence(entries), *_spread_sentences(found)])


def _accuracy_sentence(entries: dict[str, Any]) -> str:
    """Which accuracies of the pareto strategies differ significantly from those of PEFT's default."""
    changed = [
        f"{group} ({name}, {cell['mean']:+.3f})"
        for name, e in entries.items()
        for group, cell in e["gains"].items()
        if _is_significant(cell)
    ]
    if changed:
        return f"Accuracy changes significantly on {_join_names(changed)}."
    return "No accuracy of a pareto strategy differs significantly from the default's."


def _spread_sentences(found: dict[str, Any]) -> list[str]:
    """How far the mean losses of all inits lie apart, and which is the lowest."""
    losses = {name: e["loss"]["mean"] for name, e in found["inits"].items() if e["loss"] is not None}
    spread = (max(losses.values()) - min(losses.values())) / found["inits"][PEFT]["loss"]["mean"]
    return [
        f"The {len(losses)} tuned inits lie within {spread:.1%} of each other.",
        f"The lowest loss is that of {min(losses, key=lambda name: losses[name])}.",
    ]


def _is_significant(cell: dict[str, Any]) -> bool:
    return cell["holm"] is not None and cell["holm"] < 0.05


def _verb(names: Sequence[str]) -> str:
    return "ends" if len(names) == 1 else "end"


def largest_plausible_gain(entries: Sequence[dict[str, Any]], seeds: int) -> float:
    """The largest gain of the best of several strategies that the data allow: the lowest end of their 95 % intervals
    over seeds, widened by Bonferroni because the best is selected. Infinite for one seed."""
    from scipy.special import stdtrit

    intervals = [(e["difference"]["mean"], e["difference"]["ci95"]) for e in entries]
    if seeds < 2 or any(bounds is None for _, bounds in intervals):
        return math.inf
    wider = float(stdtrit(seeds - 1, 1 - 0.025 / len(intervals)) / stdtrit(seeds - 1, 0.975))
    return max(0.0, *(wider * (mean - bounds[0]) - mean for mean, bounds in intervals))


def _join_names(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def table(found: dict[str, Any]) -> str:
    """The Markdown of examples/README.md: settings, table, published table, verdict."""
    groups = list(found["settings"]["tasks"])
    lines = [
        f"| init | lr | loss on text B | against PEFT's default | p (Holm) | d | {' | '.join(groups)} |",
        "|---|---|---|---|---|---|" + "---|" * len(groups),
    ]
    base = found["base"]
    cells = " | ".join(f"{base['accuracy'][g]:.3f}" for g in groups)
    lines.append(f"| base without adapter | – | {base['loss']:.3f} | – | – | – | {cells} |")
    for name, entry in found["inits"].items():
        if entry["loss"] is None:
            lines.append(f"| {name} | – | diverged | – | – | – | {' | '.join('–' for _ in groups)} |")
            continue
        d = entry.get("difference")
        cells = " | ".join(_accuracy_cell(entry, g) for g in groups)
        tests = (
            "– | – | –"
            if d is None
            else f"{_interval_cell(d, '+.4f')} | {_number_cell(d['holm'], '.2g')} | {_number_cell(d['d'], '+.1f')}"
        )
        rate = f"{entry['lr']:g}{' (edge)' if entry['edge'] else ''}"
        lines.append(f"| {name} | {rate} | {_interval_cell(entry['loss'], '.4f')} | {tests} | {cells} |")
    p = found["published"]
    rows = [f"| {name} | {row['accuracy']:.4f} | {row['right']} |" for name, row in p["rows"].items()]
    chances = f"Fisher's exact p = {p['fisher_p']:.2f}; the better one against chance ({p['chance']:g}): p = "
    blocks = [
        _settings_text(found),
        "\n".join(lines),
        f"Published ({p['source']}; {p['what']}):",
        "\n".join([f"| | accuracy | right of {p['questions']} |", "|---|---|---|", *rows]),
        f"{chances}{p['chance_p']:.2f}.",
        f"**{found['verdict']}**",
    ]
    return "\n\n".join(blocks)


def _settings_text(found: dict[str, Any]) -> str:
    """One paragraph on the settings."""
    s, model, reference = found["settings"], found["model"], found["reference"]
    lrs = ", ".join(f"{lr:g}" for lr in s["lrs"])
    questions = sum(n for n in found["samples"].values() if n is not None)
    text = (
        f"Base {model['name']} ({model['parameters']:,} weights), text {found['corpus']['name']}, rank {s['rank']}, "
        f"alpha {s['alpha']}, all linear layers ({s['trained']:,} weights trained), {s['steps']} steps of "
        f"{s['batch_size']} x {s['sequence']} tokens, learning rate chosen per init from {lrs} on text A "
        f"with {len(s['tuning_seeds'])} of {len(s['seeds'])} seeds. Brackets and ± are 95 % intervals over "
        f"seeds (Student's t); p is that of paired t "
        f"tests with Holm's correction over the {len(found['inits']) - 1} other inits, d Cohen's; accuracies on the "
        f"first {s['limit']} questions of each file ({questions} in all), * where they differ from PEFT's default at "
        f"p < .05 likewise. Reference of pareto: {reference['name']} ({_grouping_text(reference)})."
    )
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def _interval_cell(cell: dict[str, Any], form: str) -> str:
    return f"{cell['mean']:{form}}" + (f" [{cell['ci95'][0]:{form}}, {cell['ci95'][1]:{form}}]" if cell["ci95"] else "")


def _number_cell(value: float | None, form: str) -> str:
    return "–" if value is None else f"{value:{form}}"


def _accuracy_cell(entry: dict[str, Any], group: str) -> str:
    cell, gain = entry["accuracy"][group], entry.get("gains", {}).get(group)
    half = f" ± {(cell['ci95'][1] - cell['ci95'][0]) / 2:.3f}" if cell["ci95"] else ""
    return f"{cell['mean']:.3f}{half}" + ("*" if gain and gain["holm"] is not None and gain["holm"] < 0.05 else "")


def _grouping_text(reference: dict[str, Any]) -> str:
    found = reference["grouping"]
    if found["undifferentiated"]:
        return "undifferentiated"
    return f"reference weight {found['reference']}, Gaussian counts for {_join_names(found['gaussian'])}"
