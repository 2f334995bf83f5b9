"""The audits' parts of BENCHMARKS.md: is it new, does the metadata matter, published generators."""

from __future__ import annotations

from benchmarks.head_start import tasks
from benchmarks.head_start.scored import Found, beside, plus_minus
from benchmarks.novelty.audits import SHAPES, TAUS, labels, shares
from headstart.compare.scores import REFERENCE


def novelty(found: Found) -> str:
    audit = found.facts.get("novelty")
    losses: dict[str, float] = {}
    for c, e in found.entries.items():
        if c.task == "A" and c.target in ("seen", tasks.MAIN) and c.budget in tasks.BUDGETS:
            end = e[REFERENCE]["final_loss"]["mean"]
            if end is not None:
                losses[f"{'seen' if c.target == 'seen' else 'unseen'} {c.budget}"] = end
    if audit is None or len(losses) < 4:
        return ""
    apart, short, long = audit["donors"], tasks.BUDGETS["short"], tasks.BUDGETS["long"]
    lines = [
        f"Donors are {apart['median']:.3f} apart (median of the distance to the nearest other) and "
        f"{apart['mosaic']:.3f} from all others together. Of the tokens that a donor or the one most alike mispredict, "
        f"{apart['iou']:.2f} are mispredicted by both ({apart['expected']:.2f} if errors were "
        f"independent), {apart['same']:.2f} of them as the same wrong token. "
        f"Ready: at step 0 at or below the tuned default's loss after {short} steps ("
        + ", ".join(f"{shape} {losses[f'{shape} short']:.3f}" for shape in SHAPES)
        + f"). Performant: after {audit['steps']} steps at or below the tuned default's after "
        f"{long} (" + ", ".join(f"{shape} {losses[f'{shape} long']:.3f}" for shape in SHAPES) + ").",
        "",
        "| shape | samples of | n (distinct) | step 0 | trained (rate) | size | distance | to all together "
        "| error overlap (if independent; same token) | ready | performant | "
        + " | ".join(f"novel, both: τ = {tau:g}" for tau in TAUS)
        + " | farther than donors from all together, and performant |",
        "|---" * (12 + len(TAUS)) + "|",
    ]  # fmt: skip
    for shape in SHAPES:
        for label in labels(shape):
            s = shares(audit, label, shape, losses[f"{shape} short"], losses[f"{shape} long"])
            cells = [f"{s['novel'][f'{tau:g}']}, {s['both'][f'{tau:g}']}" for tau in TAUS]
            lines.append(
                f"| {shape} | {label} | {s['n']} ({s['distinct']}) | {_number(s['loss'], 2)} "
                f"| {_number(s['trained'])} ({s['rate']}) | {s['size']:.2f} | {s['distance']:.3f} | {s['mosaic']:.3f} "
                f"| {s['iou']:.2f} ({s['expected']:.2f}; {s['same']:.2f}) | {s['ready']} | {s['performant']} | "
                + " | ".join(cells)
                + f" | {s['beyond']} |"
            )
    return "\n".join(lines)


def _number(value: float | None, digits: int = 3) -> str:
    return "not finite" if value is None else f"{value:.{digits}f}"


def conditioning(found: Found) -> str:
    """The diffusion under true metadata against the controls, paired by seed."""
    lines = []
    for c, e in found.entries.items():
        own = e.get("diffusion")
        if c.budget == "ladder" or own is None or not own["curves"]:
            continue
        cells = []
        for control in tasks.CONTROLS:
            if control not in e or not e[control]["curves"]:
                cells += ["–", "–"]
                continue
            gap, _ = beside(e[control], own)
            cells += [f"{e[control]['step0_loss']:.2f}", plus_minus(gap, "+")]
        final = own["final_loss"]["mean"]
        lines.append(
            f"| {c.task} {c.target}, {c.text}, {c.budget} | {own['step0_loss']:.2f} | {final:.3f} | "
            + " | ".join(cells)
            + " |"
        )
    if not lines:
        return ""
    told = [control.rpartition("=")[2] for control in tasks.CONTROLS]
    heads = ["true: step 0", "final", *(f"{name}: {what}" for name in told for what in ("step 0", "final, less true"))]
    return "\n".join([f"| comparison | {' | '.join(heads)} |", "|---" * (1 + len(heads)) + "|", *lines])


def peers(found: Found) -> str:
    from benchmarks.peers.measure import table

    return table(found.facts["peers"]) if "peers" in found.facts else ""
