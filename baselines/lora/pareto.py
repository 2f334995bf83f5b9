"""LoRA pairs reshaped to how the weights of a reference model are distributed (2509.00046)."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor

from baselines.lora.pareto_generator import (
    MODES,
    PUBLISHED_EXPONENT,
    TEMPLATES,
    gaussian_counts,
    kaiming_std,
    pareto_counts,
    perturb,
    to_matrix,
)
from zoo.donors.folder import StandaloneDonor, donor_ref, open_ref
from zoo.errors import UserError
from zoo.linear_algebra import frobenius_norm
from zoo.lora.adapters import LoraSampler, base_donor, change_norm, lora_pairs
from zoo.options import option
from zoo.statistics.grouping import Grouping, group_donor, read_grouping
from zoo.streams import stream
from zoo.targets.adapters import Pair

if TYPE_CHECKING:
    from zoo.donors.donor import Donor
    from zoo.donors.zoo import Zoo
    from zoo.targets.blueprint import Blueprint

log = logging.getLogger(__name__)

ANALYSIS_PATTERN = re.compile(r"(.+\.json)(?:#(.+))?")  # FILE or FILE#MODEL
REFERENCE, OTHERS = "reference", "others"  # the two templates


@dataclass(kw_only=True)
class Pareto(LoraSampler):
    """Draws A and B as perturbed copies of templates, grouped as a reference model's weights are (2509.00046).

    A copy differs from its template at a Pareto- or Gaussian-distributed number of places. Which of the two applies
    to a projection follows from the singular values of the reference model (`zoo.statistics.grouping`): which
    projection is its reference weight, and which are partners, whose distances to it follow no power law. The
    exponent of the Pareto counts is that of the distances between all its singular-value vectors. Nothing else of
    the reference is used, so that it may be of any family, width and depth. `reference_model` may be an
    analysis.json, which needs no weights. It gives the same result as the model if it was made with the same rank,
    bootstraps and seed 0. Borderline pairs of large matrices and the second decimal of their exponent may differ,
    because their singular values are approximated together with those of other ranks.

    What the adapter then shows: distances between the flattened matrices have the reference's exponent. Distances
    between their own singular values have it only where few entries are replaced (`nmin=1`). From about a twentieth
    of the entries on, the singular values of a random matrix are those of another one
    (benchmarks/results/real_singular_vectors.md).

    Our choice, templates: the reference weight and its partners share one template, all other projections another.
    Partners have Gaussian counts, the others Pareto counts. A fused projection goes by its first part (q of GPT-2's
    c_attn, gate of Phi-3's gate_up_proj). Heads and embeddings are others. Where nothing differs (`undifferentiated`),
    all pairs share one template with Pareto counts.

    Our choice, matrices: a template is as long as the largest A or B. Each A and each B is a copy of its own, made from
    the template's first values, row by row, shifted to mean 0 and scaled to `std`. Copies do not depend on their order.

    Strategies: `A_only` leaves B zero and the base's function unchanged. `both_small` also draws B, made smaller
    where ||s B A||_F / ||W||_F would exceed `cap`. `both_compensated` also draws B, and the base must hold W - s B A
    instead of W. The change at step 0 is logged.
    """

    name: ClassVar[str] = "pareto"
    summary: ClassVar[str] = "A and B as perturbed copies of templates, grouped as a reference model's weights are"
    reference: ClassVar[str] = "2509.00046"
    needs: ClassVar[tuple[str, ...]] = ("base", "reference")
    choices: ClassVar[dict[str, tuple[str, ...]]] = {
        "strategy": ("A_only", "both_small", "both_compensated"),
        "template": tuple(TEMPLATES),
        "mode": MODES,
    }

    # `reference` is the paper's; the command line calls this option --reference.
    reference_model: str | None = option(
        None, "reference model: folder, hub id, donor or analysis.json[#MODEL]; none: the base"
    )
    reference_rank: int = option(16, "number of singular values that are compared: 16, 64 or 256 in the paper", least=2)
    bootstraps: int = option(500, "bootstrap replicates of each test", least=1)
    strategy: str = option("A_only", "A_only, both_small or both_compensated")
    std: float | None = option(
        None, "standard deviation of A and B; none: that of PEFT's own A, (3 in)^-1/2", above=0.0
    )
    cap: float = option(0.01, "both_small: largest ||s B A|| / ||W|| (our choice)", above=0.0)
    template: str = option("normal", "normal or gaussian-process (RBF kernel)")
    length: float = option(1.0, "gaussian-process: length scale in entries (our choice)", above=0.0)
    mode: str = option("replace", "how places are changed: replace or add (our choice)")
    strength: float = option(1.0, "standard deviation of the changes; the template has 1", above=0.0)
    exponent: float | None = option(
        None, "exponent b of the Pareto counts floor(nmin U^(-1/b)); none: the reference's exponent - 1", above=0.0
    )
    nmin: int | None = option(None, "smallest Pareto count; none: 1/384 of the entries (our choice)", least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._grouping: Grouping | None = None
        self._used: tuple[str, ...] = ()  # donors of the zoo
        self._base: Donor | None = None  # for both_small

    @property
    def compensated(self) -> bool:
        return self.strategy == "both_compensated"

    @property
    def reads_base(self) -> bool:
        return self.reference_model is None or self.strategy != "A_only"

    @property
    def grouping(self) -> Grouping:
        """The characterisation that `fit` made or read."""
        if self._grouping is None:
            raise RuntimeError(f"{self.name}: call fit before sample")
        return self._grouping

    @property
    def count_exponent(self) -> float:
        """The exponent b of the Pareto counts. Their density has the exponent 1 + b, and so have the distances."""
        if self.exponent is not None:
            return self.exponent
        known = self.grouping.exponent
        return PUBLISHED_EXPONENT if known is None else known - 1

    @property
    def donors(self) -> tuple[str, ...]:
        return self._used

    def provenance(self, zoo: Zoo | None) -> list[dict[str, Any]]:
        """Of the donors, and of a reference that is none of them."""
        known, source = super().provenance(zoo), self.grouping.source
        return known if not source or any(d["sha256"] == source["sha256"] for d in known) else [*known, source]

    def planned_donors(self, zoo: Zoo | None, blueprint: Blueprint) -> tuple[str, ...]:
        self.check(blueprint)
        names = []
        if self.reference_model is None or self.strategy == "both_small":
            names.append(base_donor(zoo, self.base, self.name).name)
        if zoo is not None and self.reference_model in zoo.names:
            names.append(self.reference_model)
        return tuple(dict.fromkeys(names))

    def fit(self, zoo: Zoo | None, blueprint: Blueprint) -> Self:
        """UserError: not a LoRA blueprint; a base that is missing or of other shapes where its weights are read; a
        reference that cannot be read or characterised (no recognisable projections, fewer than three layers, constant
        or non-finite matrices); a matrix to draw that has one entry; a length scale above the largest matrix."""
        self._check_sizes(blueprint)
        self._used = self.planned_donors(zoo, blueprint)
        self._base = base_donor(zoo, self.base, self.name) if self.strategy == "both_small" else None
        if self._base is not None:
            _check_base(self._base, blueprint)
        self._grouping = self._characterised(zoo)
        log_grouping(self._grouping)
        self._log_exponent()
        return self

    def sample(self, blueprint: Blueprint, seed: int = 0) -> Iterator[tuple[str, Tensor]]:
        pairs = lora_pairs(blueprint, self.name)
        groups = {pair.module: template_and_counts(projection_role(blueprint, pair), self.grouping) for pair in pairs}
        size = largest_size(pairs)
        templates = {name: self._template(name, size, seed) for name in {name for name, _ in groups.values()}}
        changes = []
        for pair in pairs:
            template, counts = groups[pair.module]
            a = self._member(pair.a, (pair.rank, pair.columns), pair, templates[template], counts, seed)
            b = torch.zeros(pair.rows, pair.rank)
            if self.strategy != "A_only":
                b = self._member(pair.b, (pair.rows, pair.rank), pair, templates[template], counts, seed)
                change = change_norm(pair, a, b)
                if self._base is not None:
                    weight = frobenius_norm(self._base.read(pair.weight, torch.float32))
                    if change > self.cap * weight:
                        b *= self.cap * weight / change
                        change = self.cap * weight
                    change = change / weight if weight else 0.0
                changes.append(change)
            yield pair.a, a
            yield pair.b, b
        self._log_change(changes)

    def _check_sizes(self, blueprint: Blueprint) -> None:
        pairs = lora_pairs(blueprint, self.name)
        for pair in pairs:
            entries = pair.rank * (pair.columns if self.strategy == "A_only" else min(pair.rows, pair.columns))
            if entries < 2:
                raise UserError(f"{self.name}: {pair.module}: a matrix of one entry has no spread; raise the rank")
        if self.template == "gaussian-process" and self.length > (size := largest_size(pairs)):
            raise UserError(
                f"{self.name}: length is {self.length:g}; give at most {size}, the largest matrix's entries"
            )

    def _template(self, name: str, size: int, seed: int) -> Tensor:
        generator = stream(seed, f"{self.name}/template/{name}")
        more = {"length": self.length} if self.template == "gaussian-process" else {}
        return TEMPLATES[self.template](size, generator, **more)

    def _member(
        self, name: str, shape: tuple[int, int], pair: Pair, template: Tensor, counts: str, seed: int
    ) -> Tensor:
        """[rows, columns] float32: the matrix called `name`, from the first values of a template."""
        generator = stream(seed, f"{self.name}/{name}")
        size = shape[0] * shape[1]
        if counts == "gaussian":
            count = gaussian_counts(1, size, generator)
        else:
            count = pareto_counts(1, size, generator, self.nmin, self.count_exponent)
        values = perturb(template[:size], int(count), generator, self.mode, std=self.strength)
        return to_matrix(values, *shape, self.std or kaiming_std(pair.columns))

    def _characterised(self, zoo: Zoo | None) -> Grouping:
        given = self.reference_model
        if given is not None and (analysis := ANALYSIS_PATTERN.fullmatch(given)):
            return read_grouping(Path(analysis[1]), analysis[2], self.reference_rank)
        if given is None:
            donor = base_donor(zoo, self.base, self.name)
            log.info("%s: no reference is given, so the base is its own: %s", self.name, donor.name)
        elif zoo is not None and given in zoo.names:
            donor = zoo.donor(given)
        else:
            donor = StandaloneDonor.open(given, quiet=True)
        return group_donor(donor, self.reference_rank, self.bootstraps, device=self.device)

    def _log_exponent(self) -> None:
        if self.exponent is not None:
            return
        if self.grouping.exponent is None:
            log.warning(
                "%s: the exponent of the reference is unknown, so Pareto counts have the paper's, %g; analyze the "
                "reference again, or set exponent",
                self.name,
                PUBLISHED_EXPONENT,
            )
        else:
            log.info("%s: Pareto counts have the reference's exponent - 1: %.2f", self.name, self.count_exponent)

    def _log_change(self, changes: list[float]) -> None:
        if not changes:
            log.info("%s: B is zero, so step 0 is the base's", self.name)
            return
        what = "||s B A|| / ||W||" if self._base is not None else "||s B A||, which the base's weights are less by,"
        low, high = min(changes), max(changes)
        log.info("%s: %s from %.3g to %.3g over %d pairs at step 0", self.name, what, low, high, len(changes))

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        base = None if self._base is None else donor_ref(self._base)
        return {"grouping": self.grouping.to_json(), "donors": list(self._used), "base": base}, {}

    def restore(self, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self._grouping = Grouping.from_json(values["grouping"])
        self._used = tuple(values["donors"])
        self._base = None if values["base"] is None else open_ref(values["base"], self.name)


def template_and_counts(role: str, grouping: Grouping) -> tuple[str, str]:
    """(which template, which counts) the pairs of a projection are drawn from."""
    if role == grouping.reference:
        return REFERENCE, "pareto"
    return (REFERENCE, "gaussian") if role in grouping.gaussian else (OTHERS, "pareto")


def largest_size(pairs: Sequence[Pair]) -> int:
    """Entries of the largest matrix of all pairs."""
    return max(pair.rank * max(pair.rows, pair.columns) for pair in pairs)


def projection_role(blueprint: Blueprint, pair: Pair) -> str:
    """The projection that a pair goes by: the first of those fused in the weight that it adapts."""
    assert blueprint.adapter is not None
    return blueprint.adapter.base[pair.weight].parts[0].role


def log_grouping(grouping: Grouping) -> None:
    """Says which projections follow which law, and warns where nothing tells them apart."""
    if grouping.undifferentiated:
        log.warning("pareto: %s; a deeper reference, or another reference_rank, may differ", grouping.description)
    else:
        log.info("pareto: %s", grouping.description)


def _check_base(base: Donor, blueprint: Blueprint) -> None:
    assert blueprint.adapter is not None
    for pair in blueprint.adapter.pairs:
        base_shape = blueprint.adapter.base[pair.weight].shape
        found = base.blueprint[pair.weight].shape if pair.weight in base.blueprint else None
        if found != base_shape:
            has = "lacks it" if found is None else f"has {list(found)}"
            raise UserError(
                f"{base.name}: is not the base of this adapter: it adapts {pair.weight} {list(base_shape)}, "
                f"the donor {has}"
            )
