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
    TEMPLATES,
    gaussian_counts,
    kaiming_std,
    pareto_counts,
    perturb,
    to_matrix,
)
from zoo.donors.folder import StandaloneDonor, donor_ref, open_ref
from zoo.errors import UserError
from zoo.lora.adapters import LoraSampler, base_donor, change_norm, pairs_of
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
    """A and B are members of a template, perturbed at Pareto- or Gaussian-distributed numbers of places, by what the
    reference model's singular values say of the projection that they adapt (`zoo.statistics.grouping`).

    Of the reference model only this characterisation is used: which projection is its reference weight, and which are
    the partners whose distances to it are no power law. It may be of any family, width and depth, and `fit` needs no
    weights at all where `reference_model` is an analysis.json. That gives what the model itself gives if the analysis
    was made with this rank, number of bootstraps and seed 0, but for borderline pairs of large matrices, whose
    singular values are approximated along with those of other ranks.

    Which template, which counts [R]: the pairs of the reference weight and of its partners share one template, all
    others another. Partners have Gaussian counts, the reference weight and all others Pareto counts. A fused
    projection goes by its first part (q of GPT-2's c_attn, gate of Phi-3's gate_up_proj); what is none of the seven
    projections (heads, embeddings) is one of the others. Where nothing differs (`undifferentiated`) all pairs are
    members of one template with Pareto counts.

    From arrays to pairs [R]: a template is as long as the largest A or B; every A and every B is a member of its own,
    of the template's first values, row by row, shifted to mean 0 and scaled to `std`. Mean and deviation of the
    template cancel in that. The members of (seed, name) do not depend on order.

    Strategies: `A_only`: B is zero, the base's function is untouched. `both_small`: B is drawn too, and made smaller
    where ||s B A||_F / ||W||_F would exceed `cap`. `both_compensated`: B is drawn too, and belongs to the base with
    W - s B A for W. Whichever it is, the change at step 0 is logged.
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
        None, "whose distribution is followed: folder, hub id, donor or analysis.json[#MODEL]; none: the base"
    )
    reference_rank: int = option(16, "how many singular values are compared: 16, 64 or 256 in the paper", least=2)
    bootstraps: int = option(
        500, "replicates behind each test, of as many independent values as the layers are worth", least=1
    )
    strategy: str = option("A_only", "A_only, both_small or both_compensated")
    std: float | None = option(None, "deviation of A and B; none: that of PEFT's own A, (3 in)^-1/2", above=0.0)
    cap: float = option(0.01, "of both_small: the most that ||s B A|| / ||W|| may be [R]", above=0.0)
    template: str = option("normal", "normal or gaussian-process (RBF kernel)")
    length: float = option(1.0, "of the Gaussian process: length scale, in entries [R]", above=0.0)
    mode: str = option("replace", "what happens to the entries drawn: replace or add [R]")
    strength: float = option(1.0, "deviation of what replaces or is added, the template's being 1", above=0.0)
    exponent: float = option(0.78, "b of the Pareto counts floor(nmin U^(-1/b))", above=0.0)
    nmin: int | None = option(None, "the least Pareto count; none: 1/384 of an array's entries [R]", least=1)

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
    def donors(self) -> tuple[str, ...]:
        return self._used

    def provenance(self, zoo: Zoo | None) -> list[dict[str, Any]]:
        """Of the donors, and of a reference that is none of them."""
        known, source = super().provenance(zoo), self.grouping.source
        return known if not source or any(d["sha256"] == source["sha256"] for d in known) else [*known, source]

    def reads(self, zoo: Zoo | None, blueprint: Blueprint) -> tuple[str, ...]:
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
        self._used = self.reads(zoo, blueprint)
        self._base = base_donor(zoo, self.base, self.name) if self.strategy == "both_small" else None
        if self._base is not None:
            _check_base(self._base, blueprint)
        self._grouping = self._characterised(zoo)
        log_grouping(self._grouping)
        return self

    def sample(self, blueprint: Blueprint, seed: int = 0) -> Iterator[tuple[str, Tensor]]:
        pairs = pairs_of(blueprint, self.name)
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
                    weight = float(self._base.read(pair.weight, torch.float32).norm())
                    if change > self.cap * weight:
                        b *= self.cap * weight / change
                        change = self.cap * weight
                    change = change / weight if weight else 0.0
                changes.append(change)
            yield pair.a, a
            yield pair.b, b
        self._log_change(changes)

    def _check_sizes(self, blueprint: Blueprint) -> None:
        pairs = pairs_of(blueprint, self.name)
        for pair in pairs:
            entries = pair.rank * (pair.columns if self.strategy == "A_only" else min(pair.rows, pair.columns))
            if entries < 2:
                raise UserError(f"{self.name}: {pair.module}: a matrix of one entry has no spread; raise the rank")
        if self.template == "gaussian-process" and self.length > (size := largest_size(pairs)):
            raise UserError(f"{self.name}: length {self.length:g}: above the {size} entries of the largest matrix")

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
            count = pareto_counts(1, size, generator, self.nmin, self.exponent)
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
        wanted = blueprint.adapter.base[pair.weight].shape
        found = base.blueprint[pair.weight].shape if pair.weight in base.blueprint else None
        if found != wanted:
            has = "lacks it" if found is None else f"has {list(found)}"
            raise UserError(
                f"{base.name}: is not the base of this adapter: it adapts {pair.weight} {list(wanted)}, the donor {has}"
            )
