"""BENCHMARKS.md, its details and its figures, from the rows and facts of the benchmark alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks import rows as store
from benchmarks import tasks
from benchmarks.audits import CLAIMS, CONTROLS, SHAPES, TAUS, shares
from benchmarks.methods import placed
from benchmarks.tasks import Comparison
from headstart import methods
from headstart.scores import REFERENCE, interval, score

ROOT = Path(__file__).resolve().parents[1]
PAGE, DETAILS, FIGURES = ROOT / "BENCHMARKS.md", ROOT / "benchmarks" / "details.md", ROOT / "benchmarks" / "figures"
STABLE = 0.25  # nats above its best rate, up to which a rate counts as borne

Rows = Sequence[dict[str, Any]]
Facts = Mapping[str, Any]
Entries = dict[str, dict[str, Any]]


def write(rows: Rows, facts: Facts) -> None:
    """Between the marks of BENCHMARKS.md, and the other files whole."""
    from benchmarks import figures

    text = PAGE.read_text()
    for mark, make in PARTS.items():
        text = placed(text, mark, make(rows, facts) or "Not measured yet.")
    PAGE.write_text(text)
    DETAILS.write_text(details(rows, facts))
    FIGURES.mkdir(exist_ok=True)
    for name, content in figures.all_of(rows).items():
        (FIGURES / name).write_bytes(content)


def complete(rows: Rows, facts: Facts) -> list[Comparison]:
    """The comparisons that were finished."""
    done = facts.get("comparisons", {})
    return [c for c in tasks.comparisons() if c.name in done and store.of(rows, c)]


def entries(rows: Rows, comparison: Comparison) -> Entries:
    """{method: what `headstart compare` says of it}, from the rows."""
    tuning = None if comparison.budget == "ladder" else tasks.SEEDS[: tasks.TUNING]
    runs = [store.run_of(r) for r in store.of(rows, comparison)]
    runs.sort(key=lambda run: run["method"] != REFERENCE)
    return score(runs, comparison.steps, tuning)[1]


def head_starts(task: str, text: str, budget: str) -> Callable[[Rows, Facts], str]:
    """A part: a row per method, a column per target."""

    def make(rows: Rows, facts: Facts) -> str:
        found = {
            c: entries(rows, c) for c in complete(rows, facts) if (c.task, c.text, c.budget) == (task, text, budget)
        }
        if not found:
            return ""
        lines = [
            "| method | " + " | ".join(c.target for c in found) + " |",
            "|---" * (len(found) + 1) + "|",
            f"| {REFERENCE}, tuned | " + " | ".join(_reference(e[REFERENCE]) for e in found.values()) + " |",
        ]
        for name in _ranked(found.values()):
            cells = [_cell(e.get(name), facts["comparisons"][c.name]["refused"].get(name)) for c, e in found.items()]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        return "\n".join(lines)

    return make


def _ranked(found: Iterable[Entries]) -> list[str]:
    """Methods, the one whose losses are lowest beside the default's first; those that nothing is known of last."""
    gains: dict[str, list[float]] = {name: [] for name in tasks.names() if name != REFERENCE}
    for of in found:
        for name, entry in of.items():
            if name in gains and entry["difference"]["mean"] is not None:
                gains[name].append(entry["difference"]["mean"])
    return sorted(gains, key=lambda name: fmean(gains[name]) if gains[name] else 99.0)


def _reference(entry: dict[str, Any]) -> str:
    loss = entry["final_loss"]
    if loss["mean"] is None:
        return "diverged"
    return f"{loss['mean']:.3f} ± {_half(loss):.3f} (scale {entry['scale']:g})"


def _cell(entry: dict[str, Any] | None, refused: str | None) -> str:
    """Difference of the final loss to the default's with its interval, and how many times fewer steps to that loss."""
    if entry is None:
        return "refused" if refused else "–"
    gap = entry["difference"]
    if gap["mean"] is None:
        return "diverged"
    return f"{gap['mean']:+.3f} ± {_half(gap):.3f}, {times(entry)}"


def times(entry: dict[str, Any], at: str = "1") -> str:
    """Steps of the default over steps of the method to a threshold, with the interval."""
    found = entry["thresholds"].get(at)
    if found is None or found["ratio"]["mean"] is None:
        arrived = 0 if found is None else sum(s is not None for s in found["steps"])
        return f"{arrived} of {len(found['steps'])} arrive" if found is not None and arrived else "never"
    ratio = found["ratio"]
    if max(found["steps"]) <= 1:
        return f"≥ {ratio['mean']:.0f}×"
    return f"{ratio['mean']:.2g}× ({ratio['ci95'][0]:.2g}–{ratio['ci95'][1]:.2g})"


def _half(stats: Mapping[str, Any]) -> float:
    return stats["ci95"][1] - stats["mean"] if stats["ci95"] else 0.0


def overview(rows: Rows, facts: Facts) -> str:
    """What was compared on what."""
    done = complete(rows, facts)
    if not done:
        return ""
    lines = ["| comparison | target | parameters | text | steps | donors |", "|---|---|---|---|---|---|"]
    for c in done:
        about = facts["comparisons"][c.name]
        t = about["target"]
        shape = (
            f"{t['num_hidden_layers']} layers, {t['hidden_size']} wide, {t['num_attention_heads']} heads "
            f"({t['num_key_value_heads']} kv), FFN {t['intermediate_size']}, {t['vocab_size']} tokens"
        )
        lines.append(
            f"| {c.task} {c.target}, {c.budget} | {shape} | {about['parameters']:,} "
            f"| {c.text} ({about['corpus']['tokenizer']}) | {about['steps']} | {len(facts['zoos'][c.zoo])} {c.zoo} |"
        )
    cost = {
        zoo: (sum(6 * d["parameters"] * d["tokens"] for d in donors) if all(d["tokens"] for d in donors) else None)
        for zoo, donors in facts["zoos"].items()
    }
    told = "; ".join(f"{zoo}: {'unknown' if flops is None else f'{flops:.2g} FLOPs'}" for zoo, flops in cost.items())
    return "\n".join(lines) + f"\n\nTraining all donors took (6 x parameters x tokens): {told}."


def per_method(rows: Rows, facts: Facts) -> str:
    """Cost of making an init, and how it bears training: on the first target of A."""
    done = {c.budget: entries(rows, c) for c in complete(rows, facts) if (c.task, c.target) == ("A", "gqa")}
    if "long" not in done:
        return ""
    lines = [
        "| method | seconds (of one thread) | MiB | donors | their training, FLOPs | step 0 | learning rate | largest "
        "stable | gradient spikes | activation RMS, last block / embedding: start, end |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in [REFERENCE, *_ranked([done["long"]])]:
        e = done["long"].get(name)
        if e is None:
            continue
        cost = facts.get("cost", {}).get(name, {})
        spent = "–" if "cpu_seconds" not in cost else f"{cost['cpu_seconds']:.1f}"
        memory = "–" if "mib" not in cost else f"{cost['mib']:.0f}"
        flops = "unknown" if e["donor_cost"] is None else f"{e['donor_cost']:.2g}" if e["donor_cost"] else "0"
        rate = "diverged" if e["lr"] is None else f"{e['lr']:g}"
        start = "–" if e["step0_loss"] is None else f"{e['step0_loss']:.2f}"
        shaky = "–" if e["grad_spikes"] is None else f"{e['grad_spikes']:.1f}"
        lines.append(
            f"| {name} | {spent} | {memory} | {len(e['donors'])} | {flops} | {start} | {rate} "
            f"| {largest_stable(done, name)} | {shaky} | {_growth(e)} |"
        )
    return "\n".join(lines)


def _growth(entry: dict[str, Any]) -> str:
    rms = entry["activation_rms"]
    if rms is None or rms["end"] is None:
        return "–"
    # The last state stands behind the final norm, so the last block that is told is the one before.
    return ", ".join(f"{rms[when][-2] / rms[when][0]:.2g}" for when in ("start", "end"))


def largest_stable(done: Mapping[str, Entries], name: str) -> str:
    """The largest rate of the ladder at which every seed ends finite, the mean within STABLE of the best rate."""
    if "ladder" not in done or "short" not in done or name not in done["ladder"]:
        return "–"
    known = {float(lr): loss for e in (done["short"], done["ladder"]) for lr, loss in e[name]["lrs"].items()}
    best = min((loss for loss in known.values() if loss is not None), default=None)
    if best is None:
        return "none"
    borne = [lr for lr in tasks.LADDER if known.get(lr) is not None and known[lr] <= best + STABLE]  # type: ignore[operator]
    if borne:
        return f"{max(borne):g}" + (" or more" if max(borne) == max(tasks.LADDER) else "")
    return f"below {min(tasks.LADDER):g}"


def novelty(rows: Rows, facts: Facts) -> str:
    found = facts.get("novelty")
    reference = [c for c in complete(rows, facts) if (c.task, c.target, c.budget) == ("A", "gqa", "long")]
    if found is None or not reference:
        return ""
    bound = entries(rows, reference[0])[REFERENCE]["final_loss"]["mean"]
    apart = found["donors"]
    lines = [
        f"Donors are {apart['median']:.3f} apart (median of the distance to the nearest other); of their mispredicted "
        f"tokens {apart['iou']:.2f} are those of the other donor most alike (intersection over union; independent "
        f"errors: {apart['expected']:.2f}), and {apart['same']:.2f} of what both get wrong is the same wrong token. "
        f"Performant: at or below {bound:.3f} nats, the tuned default's loss after {tasks.BUDGETS['long']} steps, "
        f"after {found['steps']} steps at {found['rate']:g}.",
        "",
        "| shape | samples of | loss at step 0 | after training | distance | error overlap (same token) | performant | "
        + " | ".join(f"novel, and performant: τ = {tau:g}" for tau in TAUS)
        + " |",
        "|---" * (7 + len(TAUS)) + "|",
    ]
    for shape in SHAPES:
        for label in [*CLAIMS, *(CONTROLS if shape == "seen" else ())]:
            s = shares(found, label, shape, bound)
            cells = [f"{s['novel'][f'{tau:g}']}, {s['both'][f'{tau:g}']}" for tau in TAUS]
            lines.append(
                f"| {shape} | {label} | {s['loss']:.2f} | {s['trained']:.3f} | {s['distance']:.3f} "
                f"| {s['iou']:.2f} ({s['same']:.2f}) | {s['performant']} of {s['n']} | " + " | ".join(cells) + " |"
            )
    return "\n".join(lines)


def conditioning(rows: Rows, facts: Facts) -> str:
    """The diffusion under true metadata against shuffled and mean ones, paired by seed."""
    lines = []
    for c in complete(rows, facts):
        e = entries(rows, c)
        if c.budget == "ladder" or "diffusion" not in e or not e["diffusion"]["curves"]:
            continue
        cells = []
        for control in tasks.CONTROLS:
            if control not in e or not e[control]["curves"]:
                cells += ["–", "–"]
                continue
            pairs = zip(e[control]["curves"], e["diffusion"]["curves"], strict=True)
            gap = interval([worse["losses"][-1] - own["losses"][-1] for worse, own in pairs])
            cells += [f"{e[control]['step0_loss']:.2f}", f"{gap['mean']:+.3f} ± {_half(gap):.3f}"]
        own = e["diffusion"]
        final = own["final_loss"]["mean"]
        lines.append(
            f"| {c.task} {c.target}, {c.text}, {c.budget} | {own['step0_loss']:.2f} | {final:.3f} | "
            + " | ".join(cells)
            + " |"
        )
    if not lines:
        return ""
    heads = (
        "| comparison | true: step 0 | final | shuffled: step 0 | final, less true | mean: step 0 | final, less true |"
    )
    return "\n".join([heads, "|---|---|---|---|---|---|---|", *lines])


def peers(rows: Rows, facts: Facts) -> str:
    from benchmarks.peers.measure import table

    return table(facts["peers"]) if "peers" in facts else ""


def details(rows: Rows, facts: Facts) -> str:
    """A table per comparison: rates, three thresholds, spikes, who refused and why."""
    parts = ["# The benchmark's comparisons, one by one", "", "Written by `python -m benchmarks.head_start --tables`."]
    for c in complete(rows, facts):
        if c.budget == "ladder":
            continue
        e = entries(rows, c)
        levels = next(iter(e.values()))["thresholds"]
        parts += [
            "", f"## {c.task} {c.target}, {c.text}, {c.budget}: {c.steps} steps", "",
            "| method | lr | step 0 | final loss | " + " | ".join(
                f"steps to {found['loss']:.3f} (default's at {float(at):.0%})" for at, found in levels.items()
            ) + " | spikes | largest gradient | diverged |",
            "|---" * (7 + len(levels)) + "|",
        ]  # fmt: skip
        for name in [REFERENCE, *_ranked([e])]:
            if name not in e:
                continue
            m = e[name]
            if not m["curves"]:
                parts.append(f"| {name} | – | – | diverged |" + " – |" * (len(levels) + 2) + f" {len(m['diverged'])} |")
                continue
            loss = m["final_loss"]
            cells = [times(m, at) for at in levels]
            parts.append(
                f"| {name} | {m['lr']:g} | {m['step0_loss']:.2f} | {loss['mean']:.3f} ± {_half(loss):.3f} | "
                + " | ".join(cells)
                + f" | {m['grad_spikes']:.1f} | {m['max_grad_norm']:.1f} | {len(m['diverged'])} |"
            )
        refused = facts["comparisons"][c.name]["refused"]
        parts += [""] + [f"- {name} refused: {_plain(why)}" for name, why in refused.items()]
    return "\n".join(parts) + "\n"


def _plain(text: str) -> str:
    """Without the folders of the machine that it ran on."""
    return re.sub(r"(?<![\w.])/[^\s:,;]*/", "", text)


def counted(rows: Rows, facts: Facts) -> str:
    runs = sum(len(store.of(rows, c)) for c in complete(rows, facts))
    if not runs:
        return ""
    made = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    families = len({methods.get(name).family for name in tasks.plain()})
    return (
        f"{runs:,} runs of {len(tasks.plain())} methods of {families} families (and the diffusion under wrong "
        f"metadata), seeds {', '.join(map(str, tasks.SEEDS))}, learning rates "
        f"{', '.join(f'{lr:g}' for lr in tasks.LRS)}, chosen on the first seed; {facts['cores']} cores, {made}."
    )


PARTS: dict[str, Callable[[Rows, Facts], str]] = {
    "counted": counted,
    "overview": overview,
    **{
        f"{task}-{text}-{budget}": head_starts(task, text, budget)
        for task, text in (("A", "reference"), ("B", "source"), ("B", "shakespeare"), ("C", "stories"))
        for budget in tasks.BUDGETS
    },
    "methods": per_method,
    "novelty": novelty,
    "conditioning": conditioning,
    "peers": peers,
}
