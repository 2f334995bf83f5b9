"""What an analysis found, in sentences: the state of donors, their relations, their groups of projections."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from headstart.report.analysis_claims import exceeds_random_matrices, in_random_matrices
from headstart.report.analysis_data import (
    NO_POWER_LAW,
    POWER_LAW,
    UNDECIDED,
    Model,
    Results,
    count_pairs,
    count_verdicts,
    is_measured,
    is_mostly_undecided,
    layer_indices,
    matrices_above_noise,
    smallest_rank,
)

TRAINED, UNHEALTHY, UNCLEAR = "trained", "unhealthy", "unclear"  # unhealthy: the health check found something wrong
NOT_TRAINED, NOT_CHECKED = "not trained", "not checked"
STATES = (TRAINED, UNHEALTHY, UNCLEAR, NOT_TRAINED, NOT_CHECKED)


def headline(results: Results) -> str:
    """The sentences at the top of the page."""
    models = results["models"]
    if len(models) == 1:
        ((name, model),) = models.items()
        return " ".join([_state_sentence(name, model), *_similarity_sentence(model)])
    states = Counter(health_state(model) for model in models.values())
    counts = ", ".join(f"{states[s]} {s}" for s in STATES if states[s])
    compared = [m for m in models.values() if is_measured(m["dsv"]) and not is_mostly_undecided(m, smallest_rank(m))]
    if not compared:
        return f"{len(models)} donors: {counts}. None has enough layers to test distances between layers."
    exceeding = sum(exceeds_random_matrices(m, smallest_rank(m), POWER_LAW) for m in compared)
    return (
        f"{len(models)} donors: {counts}. {len(compared)} have enough layers to test distances between layers. "
        f"In {exceeding or 'none'} of them, power laws are more frequent than in random matrices."
    )


def introduction(results: Results) -> str:
    """What the page shows."""
    donors = "a donor" if len(results["models"]) == 1 else f"{len(results['models'])} donors"
    return (
        f"Statistics of the weights of {donors}. Beside each number stands what chance alone gives, because a property "
        "that random matrices share says nothing about learning."
    )


def health_findings(model: Model) -> list[dict[str, Any]]:
    """What the health check found wrong; empty where nothing is, or where it could not run."""
    return model["health"] if isinstance(model["health"], list) else []


def health_state(model: Model) -> str:
    """One of STATES, from the health check and the spectra."""
    if isinstance(model["health"], dict):
        return NOT_CHECKED
    found = health_findings(model)
    if any(finding["kind"] == "untrained" and finding["whole"] for finding in found):
        return NOT_TRAINED
    if found:
        return UNHEALTHY
    return TRAINED if matrices_above_noise(model)[0] else UNCLEAR


def _state_sentence(name: str, model: Model) -> str:
    state = health_state(model)
    if state == NOT_CHECKED:
        return f"{name} could not be checked: {model['health']['why'].rstrip('.')}."
    if state == NOT_TRAINED:
        return f"{name} looks as if it was never trained."
    above, measured = matrices_above_noise(model)
    problem = "".join(f" A problem: {f['text'].rstrip('.')}." for f in health_findings(model)[:1])
    if above:
        return f"{name} is trained: {above} of {measured} matrices have singular values above noise.{problem}"
    if problem:
        return f"It is unclear whether {name} was trained.{problem}"
    return (
        f"It is unclear whether {name} was trained: its matrices are not pure noise, but no singular value is above "
        "noise. Training or a structured initialisation can cause this."
    )


def _similarity_sentence(model: Model) -> Iterator[str]:
    if not is_measured(model["dsv"]):
        return
    rank = smallest_rank(model)
    pairs = count_pairs(model, rank)
    found, null = count_verdicts(model, rank)[POWER_LAW], count_verdicts(model, rank, "gaussian")[POWER_LAW]
    if is_mostly_undecided(model, rank):
        yield f"Its {len(layer_indices(model))} layers are too few to test distances between layers for a power law."
    elif found == 0:
        yield f"No pair of projections follows a power law between layers (0 of {pairs})."
    elif not exceeds_random_matrices(model, rank, POWER_LAW):
        yield (
            f"Power laws between its layers say nothing about learning: {found} of {pairs} pairs of projections follow "
            f"one, and {null} of {pairs} do in random matrices."
        )
    else:
        yield (
            f"{found} of {pairs} pairs of projections follow a power law between layers. In random matrices {null} do."
        )


def nearest_neighbour_sentence(results: Results, kind: str) -> str:
    """How often the nearest donor by a signature has the same architecture, and how often a random one would."""
    names, distances = (results["signatures"][kind][key] for key in ("models", "distances"))
    architectures = {d["name"]: d["architecture"] for d in results["donors"]}
    if len({architectures[name] for name in names}) == 1:
        return "All donors have one architecture, so the table shows only how near they are."
    same, expected = 0, 0.0
    for name, row in zip(names, distances, strict=True):
        others = [(x, other) for other, x in zip(names, row, strict=True) if other != name and x is not None]
        if others:
            same += architectures[min(others)[1]] == architectures[name]
            expected += sum(architectures[other] == architectures[name] for _, other in others) / len(others)
    return (
        f"The nearest other donor has the same architecture for {same} of {len(names)} donors. By chance "
        f"that would hold for {expected:.1f}."
    )


def grouping_sentences(model: Model) -> Iterator[str]:
    """How LoRA method pareto would group the projections, one paragraph for each rank."""
    for rank, grouping in model["grouping"].items():
        undecided = grouping.get("undecided", count_verdicts(model, rank)[UNDECIDED])
        if not grouping["undifferentiated"]:
            yield _group_sentence(model, rank, grouping)
        elif 2 * undecided > count_pairs(model, rank):
            yield (
                f"Top {rank}: too few layers to distinguish projections ({undecided} of {count_pairs(model, rank)} "
                "pairs undecided)."
            )
        else:
            yield (
                f"Top {rank}: undifferentiated. No pair of projections is shown to differ from a power law, so all of "
                f"them form one Pareto group. {undecided} of {count_pairs(model, rank)} pairs are undecided."
            )
        yield from _exponent_sentence(model, rank)


def _exponent_sentence(model: Model, rank: str) -> Iterator[str]:
    """The exponent that Pareto counts get. Older analyses have none."""
    pooled = model["dsv"][rank].get("pooled", {})
    known = {kind: row["alpha"] for kind, row in pooled.items() if row.get("alpha") is not None}
    own = known.pop("own", None)
    if own is not None:
        share = pooled["own"]["tail"] / pooled["own"]["n"]
        chance = " and ".join(f"{alpha:.2f}" for alpha in known.values())
        yield (
            f"Top {rank}: the largest {share:.0%} of the distances between all layers of all projections have the "
            f"exponent {own:.2f}, those of random matrices {chance}. Pareto counts have an exponent of one less."
        )


def _group_sentence(model: Model, rank: str, grouping: dict[str, Any]) -> str:
    gaussian, pareto = (", ".join(grouping[kind]) or "none" for kind in ("gaussian", "pareto"))
    text = (
        f"Top {rank}: the reference weight is {grouping['reference']}. Perturbed by Gaussian counts: {gaussian}. "
        f"Perturbed by Pareto counts: {pareto}."
    )
    if not exceeds_random_matrices(model, rank, NO_POWER_LAW):
        by_chance = in_random_matrices(model, rank, NO_POWER_LAW)
        text += f" This grouping is not reliable, as chance gives such pairs too: {by_chance}."
    return text
