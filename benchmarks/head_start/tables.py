"""BENCHMARKS.md, its details and its figures, from the rows and facts of the benchmark alone."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.head_start import readmes, tasks
from benchmarks.head_start import rows as store
from benchmarks.head_start.marks import placed
from benchmarks.head_start.scored import Entries, Facts, Found, Rows, beside, plus_minus, ranked
from benchmarks.novelty.tables import conditioning, novelty, peers
from benchmarks.paths import RESULTS, ROOT
from headstart import samplers
from headstart.compare.scores import REFERENCE
from headstart.report.comparison_findings import fewer
from zoo.targets.blueprint import Blueprint

PAGE, DETAILS, FIGURES = ROOT / "BENCHMARKS.md", RESULTS / "details.md", RESULTS / "figures"
GENERATOR = "diffusion"
BORNE = (0.1, 0.25)  # nats above the loss at a method's best rate, up to which a rate counts as borne


def write(rows: Rows, facts: Facts) -> None:
    """Between the marks of BENCHMARKS.md and of the READMEs, and the other files whole."""
    from benchmarks.head_start import figures

    found = Found.of(rows, facts)
    for path, mark, make in parts():
        path.write_text(placed(path.read_text(), mark, make(found) or "Not measured yet."))
    DETAILS.write_text(details(found))
    FIGURES.mkdir(exist_ok=True)
    for name, content in figures.all_of(found.entries).items():
        (FIGURES / f"{name}.png").write_bytes(content)


def parts() -> Iterator[tuple[Path, str, Callable[[Found], str]]]:
    """(page, mark, what makes the part) of every page."""
    yield from ((PAGE, mark, make) for mark, make in PARTS.items())
    yield from readmes.PARTS


def head_starts(task: str, text: str, budget: str) -> Callable[[Found], str]:
    """A part: a row per method, a column per target."""

    def make(found: Found) -> str:
        chosen = {
            c: e
            for c, e in found.entries.items()
            if (c.task, c.text, c.budget) == (task, text, budget) and not c.methods
        }
        if not chosen:
            return ""
        lines = [
            "| method | " + " | ".join(c.target for c in chosen) + " |",
            "|---" * (len(chosen) + 1) + "|",
            f"| {REFERENCE}, tuned | " + " | ".join(_reference(e[REFERENCE]) for e in chosen.values()) + " |",
            "| best donor, as it is | " + " | ".join(_copy(found.facts["comparisons"][c.name]) for c in chosen) + " |",
        ]
        for name in ranked(chosen.values()):
            cells = [
                _cell(e.get(name), found.facts["comparisons"][c.name]["refused"].get(name)) for c, e in chosen.items()
            ]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        return "\n".join(lines)

    return make


def _reference(entry: dict[str, Any]) -> str:
    loss = entry["final_loss"]
    if loss["mean"] is None:
        return "diverged"
    plain = [end for end in entry["scales"].get("1", {}).values() if end is not None]
    told = f"; {min(plain):.3f} at scale 1" if plain else ""
    return f"{plus_minus(loss)} ({_rate(entry)}, scale {_scale(entry)}{told})"


def _copy(about: Facts) -> str:
    """The lowest loss of a donor that has the target's tokens."""
    known = [loss for loss in about["as_they_are"].values() if loss is not None]
    return f"{min(known):.3f}" if known else "–"


def _rate(entry: dict[str, Any]) -> str:
    """The learning rate chosen, with a star where it is the smallest or largest that was tried."""
    tried = [float(lr) for lr in entry["lrs"]]
    return f"{entry['lr']:g}" + ("\\*" if entry["lr"] in (min(tried), max(tried)) else "")


def _scale(entry: dict[str, Any]) -> str:
    return f"{entry['scale']:g}" + ("\\*" if entry["scale"] in (min(tasks.SCALES), max(tasks.SCALES)) else "")


def _cell(entry: dict[str, Any] | None, refused: str | None) -> str:
    """Difference of the final loss to the default's with its interval, and how many times fewer steps to that loss."""
    if entry is None:
        return "refused" if refused else "–"
    if entry["final_loss"]["mean"] is None:
        return "diverged"
    gap = entry["difference"]
    if gap["mean"] is None:
        return f"{entry['final_loss']['mean']:.3f}; the default diverged"
    return f"{plus_minus(gap, '+')}, {times(entry)}"


def times(entry: dict[str, Any], at: str = "1") -> str:
    return _fewer(entry["thresholds"].get(at))


def _fewer(found: dict[str, Any] | None) -> str:
    return fewer(found) if found else "–"


def rivals(found: Found) -> str:
    """The diffusion beside the best start that needs no donor, and beside the best of the others."""
    lines = []
    for c, e in found.entries.items():
        if c.budget == "ladder" or c.methods or GENERATOR not in e:
            continue
        cells = [f"{c.task} {c.target}, {c.text}, {c.budget}"]
        for donors in (False, True):
            best = _best(e, donors)
            gap, ahead = beside(e[GENERATOR], e[best])
            before = "" if best == REFERENCE else f" ({_gap(e[best]['difference'])})"
            cells += [best + before, _gap(gap), _fewer(ahead)]
        lines.append("| " + " | ".join(cells[:-1]) + " |")
    if not lines:
        return ""
    heads = "| comparison | best without donors | diffusion minus it | fewer steps | best with | diffusion minus it |"
    return "\n".join([heads, "|---" * 6 + "|", *lines])


def each_donor(found: Found) -> str:
    """What the choice of the donor is worth: one method with every donor of the zoo, and the diffusion beside it."""
    done = {c.budget: c for c in found.entries if (c.task, c.target) == ("A", tasks.REPEATED)}
    if "donors" not in done or "long" not in done or GENERATOR not in found.entries[done["long"]]:
        return ""
    entries, own = found.entries[done["donors"]], found.entries[done["long"]][GENERATOR]
    alone = found.facts["comparisons"][done["donors"].name]["as_they_are"]
    lines = ["| donor | its loss as it is | final loss (learning rate) | diffusion minus it |", "|---" * 4 + "|"]
    for name in ranked([entries]):
        if name not in entries or entries[name]["final_loss"]["mean"] is None:
            continue
        e, donor = entries[name], name.partition("donor=")[2]
        lines.append(
            f"| {donor} | {alone[donor]:.3f} | {plus_minus(e['final_loss'])} ({_rate(e)}) | {_gap(beside(own, e)[0])} |"
        )
    return "\n".join(lines)


def _best(entries: Entries, donors: bool) -> str:
    """The method of the lowest final loss that needs donors or that needs none; the diffusion is not asked."""
    losses = {
        name: e["final_loss"]["mean"]
        for name, e in entries.items()
        if name.partition(":")[0] != GENERATOR and bool(samplers.get(name.partition(":")[0]).needs) == donors
    }
    return min(losses, key=lambda name: math.inf if losses[name] is None else losses[name])


def _gap(gap: dict[str, Any]) -> str:
    return plus_minus(gap, "+") if gap and gap["mean"] is not None else "–"


def overview(found: Found) -> str:
    """What was compared on what."""
    facts = found.facts
    if not found.entries:
        return ""
    lines = ["| comparison | target | parameters | text | steps | FLOPs | donors |", "|---" * 7 + "|"]
    for c in found.entries:
        about = facts["comparisons"][c.name]
        m = Blueprint.from_config(about["target"]).metadata
        assert m is not None
        shape = (
            f"{m.layers} layers, {m.width} wide, {m.heads} heads ({m.kv_heads} kv) of {m.head_dim}, FFN {m.ffn}, "
            f"{m.vocab} tokens{', tied' if m.tied else ''}{'' if m.architecture == 'llama' else ', ' + m.architecture}"
        )
        flops = 6 * about["parameters"] * about["steps"] * about["batch_size"] * about["sequence"]
        lines.append(
            f"| {c.task} {c.target}, {c.budget} | {shape} | {about['parameters']:,} "
            f"| {c.text} ({c.tokenizer}) | {about['steps']} | {flops:.2g} | {len(facts['zoos'][c.zoo])} {c.zoo} |"
        )
    told = []
    for zoo, donors in facts["zoos"].items():
        known = all(d["tokens"] for d in donors)
        flops = f"{sum(6 * d['parameters'] * d['tokens'] for d in donors):.2g} FLOPs" if known else "unknown"
        seconds = facts["trained"].get(zoo)
        more = "" if seconds is None else f", autoencoder and diffusion {seconds:.0f} seconds of a core"
        told.append(f"{zoo}: {flops}{more}")
    return "\n".join(lines) + f"\n\nTraining all donors took (6 x parameters x tokens) {'; '.join(told)}."


def per_method(found: Found) -> str:
    """Cost of making an init, and how it bears training: on the main target of A."""
    done = {c.budget: c for c in found.entries if (c.task, c.target) == ("A", tasks.MAIN)}
    if "long" not in done:
        return ""
    long, costs = found.entries[done["long"]], found.facts.get("cost", {}).get("methods", {})
    ladder = store.of(found.rows, done["ladder"]) if "ladder" in done else []
    lines = [
        "| method | seconds | MiB | donors | their training, FLOPs | step 0 | learning rate "
        f"| largest borne within {'; '.join(f'{within:g}' for within in BORNE)} | gradient spikes | largest gradient "
        "| activation RMS, first block to last but one: start, end |",
        "|---" * 11 + "|",
    ]
    for name in [REFERENCE, *ranked([long])]:
        e, cost = long.get(name), costs.get(name, {})
        spent = "–" if "cpu_seconds" not in cost else f"{cost['cpu_seconds']:.1f}"
        memory = "–" if "mib" not in cost else f"{cost['mib']:.0f}"
        if e is None or e["lr"] is None:
            if "target" in cost:
                lines.append(f"| {name}, on {cost['target']} | {spent} | {memory} " + "| – " * 8 + "|")
            continue
        flops = "unknown" if e["donor_cost"] is None else f"{e['donor_cost']:.2g}" if e["donor_cost"] else "0"
        own = [r for r in ladder if r["method"] == name]
        stable = "; ".join(largest_borne(own, within) for within in BORNE)
        lines.append(
            f"| {name} | {spent} | {memory} | {len(e['donors'])} | {flops} | {e['step0_loss']:.2f} | {_rate(e)} "
            f"| {stable} | {e['grad_spikes']:.1f} | {e['max_grad_norm']:.1f} | {_growth(e)} |"
        )
    return "\n".join(lines)


def _growth(entry: dict[str, Any]) -> str:
    """transformers gives the last state behind the final norm, so the last block that is told is the one before."""
    rms = entry["activation_rms"]
    return ", ".join(f"{rms[when][1]:.2g} to {rms[when][-2]:.2g}" for when in ("start", "end"))


def largest_borne(runs: Rows, within: float) -> str:
    """Of a method's rows of the ladder: the largest rate up to which every seed ends finite and within so many nats of
    what the method's best rate gives that seed; of the default's scales, the one with the best mean."""
    if not runs:
        return "–"
    finals: dict[float, dict[float, dict[int, float]]] = {}
    for r in runs:
        ends = finals.setdefault(r["scale"], {}).setdefault(r["lr"], {})
        ends[r["seed"]] = math.inf if r["diverged"] is not None else r["losses"][-1]
    means = {(scale, lr): fmean(ends.values()) for scale, of in finals.items() for lr, ends in of.items()}
    scale, best = min(means, key=lambda key: means[key])
    if not math.isfinite(means[scale, best]):
        return "none"
    least, borne = finals[scale][best], best
    for lr in sorted(lr for lr in finals[scale] if lr > best):
        if any(loss > least[seed] + within for seed, loss in finals[scale][lr].items()):
            break
        borne = lr
    return f"{borne:g}" + (" or more" if borne == max(tasks.LRS["ladder"]) else "")


def details(found: Found) -> str:
    """Per comparison: rates, three thresholds, gradients, activations, who refused and why."""
    parts = ["# The benchmark's comparisons, one by one", "", "Written by `python -m benchmarks.head_start --tables`.",
             "A star: the smallest or largest that was tried."]  # fmt: skip
    for c, e in found.entries.items():
        if c.budget == "ladder":
            continue
        levels = next((m["thresholds"] for m in e.values() if m["thresholds"]), {})
        heads = [f"times fewer steps to {of['loss']:.3f} (default's at {float(at):.0%})" for at, of in levels.items()]
        generated = e.get(GENERATOR, {"curves": []})
        heads.append(f"to the {GENERATOR}'s last, its steps over these")
        heads = ["method", "lr", "step 0", "final loss", *heads, "spikes", "largest gradient", "diverged"]
        parts += ["", f"## {c.task} {c.target}, {c.text}, {c.budget}: {c.steps} steps", "",
                  "| " + " | ".join([*heads, "activation RMS by layer at the start", "at the end"]) + " |",
                  "|---" * (len(heads) + 2) + "|"]  # fmt: skip
        for name in [REFERENCE, *ranked([e])]:
            if name not in e:
                continue
            m = e[name]
            if not m["curves"]:
                cells = ["–", "–", "diverged", *["–"] * (len(levels) + 3), str(len(m["diverged"])), "–", "–"]
            else:
                rms = m["activation_rms"]
                cells = [
                    _rate(m), f"{m['step0_loss']:.2f}", plus_minus(m["final_loss"]),
                    *(times(m, at) for at in levels), _fewer(beside(m, generated)[1]),
                    f"{m['grad_spikes']:.1f}", f"{m['max_grad_norm']:.1f}", str(len(m["diverged"])),
                    *(" ".join(f"{x:.2g}" for x in rms[when]) for when in ("start", "end")),
                ]  # fmt: skip
            parts.append(f"| {name} | " + " | ".join(cells) + " |")
        refused = found.facts["comparisons"][c.name]["refused"]
        parts += ["", *(f"- {name} refused: {_plain(why)}" for name, why in refused.items())]
    return "\n".join(parts) + "\n"


def _plain(text: str) -> str:
    """Without the folders of the machine that it ran on."""
    return re.sub(r"(?<![\w.])/[^\s:,;]*/", "", text)


def picture(name: str) -> Callable[[Found], str]:
    """A part: a figure, where what it shows was measured."""

    def make(found: Found) -> str:
        from benchmarks.head_start import figures

        drawn = figures.shown(found.entries)
        return f"![{name.replace('_', ' ')}](benchmarks/results/figures/{name}.png)" if name in drawn else ""

    return make


def counted(found: Found) -> str:
    done = [r for c in found.entries for r in store.of(found.rows, c)]
    if not done:
        return ""
    commits: dict[str, set[str]] = {}
    for r in done:
        commit, _, versions = r["made"].partition(", ")
        commits.setdefault(versions, set()).add(commit)
    makers = "; ".join(f"{versions}, at {', '.join(sorted(of))}" for versions, of in commits.items())
    families = len({samplers.get(name).family for name in tasks.plain()})
    return (
        f"{len(done):,} rows, {len({r['file'] for r in done}):,} different runs, of {len(tasks.plain())} methods "
        f"of {families} families (with options that lift a refusal, "
        f"and the diffusion under wrong metadata), seeds {', '.join(map(str, tasks.SEEDS))}, learning rates "
        f"{', '.join(f'{lr:g}' for lr in tasks.LRS['long'])} (with the short budget {tasks.LRS['short'][-1]:g} too, "
        f"others for the largest that is borne), {tasks.BATCH} x {tasks.SEQUENCE} tokens a step; {makers}."
    )


PARTS: dict[str, Callable[[Found], str]] = {
    "counted": counted,
    "head_starts": picture("head_starts"),
    "activations": picture("activations"),
    "overview": overview,
    "rivals": rivals,
    "each_donor": each_donor,
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
