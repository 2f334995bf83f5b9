"""Non-parametric fits: tensors drawn from donors' values themselves, not from a formula for them."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from baselines.distributions.lookup import BLOCK, GuidedSearch
from baselines.distributions.statistical import (
    Fit,
    Member,
    Statistical,
    candidate_groups,
    choose_donors,
    collect_members,
    fan_in_factor,
    first_found,
    on_cpu,
)
from baselines.distributions.summary import moments, sort_values, weighted_points
from zoo.donors.donor import Donor, size_gap
from zoo.donors.folder import donor_ref, open_ref
from zoo.donors.zoo import Zoo
from zoo.options import option
from zoo.parallel.threads import make_in_order
from zoo.sampler import Sampler, wanted_specs
from zoo.streams import stream
from zoo.targets.blueprint import Blueprint
from zoo.tensors import Part, TensorSpec, join_parts, split_parts

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Histogram(Statistical):
    """Inverse transform sampling from a table of quantiles, with linear interpolation (Devroye 1986).

    Quantiles are evenly spaced from probability .01 to .99 and log-spaced to 1e-7 on either side. With even spacing
    alone the last bins would spread the few extreme values over the tails and multiply the kurtosis.
    """

    name: ClassVar[str] = "histogram"
    family: ClassVar[str] = "empirical"
    summary: ClassVar[str] = "independent draws from a table of a donor's quantiles, log-spaced in the tails"
    reference: ClassVar[str] = "Devroye 1986"

    points: int = option(2048, "quantiles in the table; half of them in the tails", least=16, most=1 << 20)

    def fit_values(self, values: Tensor) -> Fit:
        x = sort_values(values).double()
        at = quantile_levels(self.points).to(x.device) * (len(x) - 1)
        left = at.long().clamp(max=max(0, len(x) - 2))
        right = (left + 1).clamp(max=len(x) - 1)
        return {"quantiles": torch.lerp(x[left], x[right], at - left).float().cpu()}

    def draw(self, fit: Fit, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        table = fit["quantiles"].to(self.device)
        levels, search = _level_search(len(table), self.device)
        gaps, lowest, highest = levels.diff(), levels[0].item(), levels[-1].item()
        uniform = torch.rand(shape, generator=generator, dtype=torch.float64, device=generator.device)
        drawn = torch.empty(shape, device=self.device)
        for u, out in zip(uniform.view(-1).split(BLOCK), drawn.view(-1).split(BLOCK), strict=True):
            u = u.to(self.device).clamp_(lowest, highest)
            left = search(u).sub_(1).clamp_(min=0)
            share = (u - levels.index_select(0, left)) / gaps.index_select(0, left)
            low, high = table.index_select(0, left), table.index_select(0, left + 1)
            out.copy_(torch.lerp(low, high, share.float()))
        return drawn


@functools.lru_cache(maxsize=8)
def _level_search(points: int, device: str) -> tuple[Tensor, GuidedSearch]:
    """`quantile_levels` on a device, and the search in them."""
    levels = quantile_levels(points).to(device)
    return levels, GuidedSearch(levels)


def quantile_levels(points: int) -> Tensor:
    """[points] float64, ascending: the probabilities of a table of that many quantiles."""
    tail = torch.logspace(-7, -2, points // 4, dtype=torch.float64)
    body = torch.linspace(0.01, 0.99, points - 2 * len(tail) + 2, dtype=torch.float64)
    return torch.cat([tail, body[1:-1], 1 - tail.flip(0)])


@dataclass(kw_only=True)
class KDE(Statistical):
    """The smoothed bootstrap: a random value of the donors plus h N(0, 1) (Silverman 1986).

    Draws are shrunk towards the mean so that the variance stays. h is Silverman's rule,
    0.9 min(std, IQR / 1.34) n^(-1/5), times `bandwidth`. The rule assumes one mode and is too wide for several narrow
    ones. Of large groups `data` points are kept: the extreme values, and means of neighbours, weighted by their counts.
    """

    name: ClassVar[str] = "kde"
    family: ClassVar[str] = "empirical"
    summary: ClassVar[str] = "a donor's values drawn at random and smoothed, mean and variance kept"
    reference: ClassVar[str] = "Silverman 1986"

    bandwidth: float = option(1.0, "factor of the kernel's width; 0 draws the points themselves", least=0.0)
    data: int = option(8192, "points kept per group", least=64, most=1 << 24)

    def fit_values(self, values: Tensor) -> Fit:
        mean, std, _ = moments(values)
        points, counts = weighted_points(values, self.data)
        low, high = points[torch.searchsorted(counts.cumsum(0), torch.tensor([0.25, 0.75]) * len(values))].tolist()
        width = 0.9 * min(std, (high - low) / 1.34 or std) * len(values) ** -0.2 * self.bandwidth
        return {"mean": mean, "std": std, "width": width, "points": points.float(), "counts": counts.int()}

    def draw(self, fit: Fit, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        points, mean = fit["points"].to(self.device), fit["mean"]
        cumulative = fit["counts"].double().cumsum(0).to(self.device)
        uniform = torch.rand(shape, generator=generator, dtype=torch.float64, device=generator.device)
        search = GuidedSearch(cumulative, cumulative[-1].item(), right=True)
        drawn = torch.randn(shape, generator=generator, device=generator.device)
        shrink = math.hypot(1, fit["width"] / (fit["std"] or 1))
        for u, out in zip(uniform.view(-1).split(BLOCK), drawn.view(-1).split(BLOCK), strict=True):
            chosen = points.index_select(0, search(u.to(self.device)).clamp_(max=len(points) - 1))
            out.copy_(mean + (chosen - mean + fit["width"] * out.to(self.device)) / shrink)
        return drawn


@dataclass(kw_only=True)
class Permuted(Sampler):
    """Shuffles one donor's weights within each matrix, bias or gain: the same values without structure.

    It is the control that shows the most that a marginal distribution can give. Values come from the donor's tensor of
    the same role at the nearest relative depth (of several, from the same expert or the nearest in size). Where shapes
    differ, values are drawn without replacement, again and again, so that the counts of values differ by one at most.
    The weights are read while sampling.
    """

    name: ClassVar[str] = "permuted"
    family: ClassVar[str] = "empirical"
    summary: ClassVar[str] = "a donor's weights shuffled within each tensor: no structure, the same marginals"
    reference: ClassVar[str] = "1902.07208"
    needs: ClassVar[tuple[str, ...]] = ("donor",)
    choices: ClassVar[dict[str, tuple[str, ...]]] = {"rescale": ("fan-in", "none")}

    donor: str | None = option(None, "name of the donor; none: the nearest in size of those that have the roles")
    rescale: str = option("fan-in", "scaling of the spread with the size of the input axis: fan-in (1 / sqrt) or none")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._source: Donor | None = None
        self._members: tuple[Blueprint, dict[tuple[str, ...], list[Member]]] | None = None  # of the latest target

    @property
    def donors(self) -> tuple[str, ...]:
        return () if self._source is None else (self._source.name,)

    def planned_donors(self, zoo: Zoo | None, blueprint: Blueprint) -> tuple[str, ...]:
        return (self._choose(zoo, blueprint).name,)

    def fit(self, zoo: Zoo | None, blueprint: Blueprint) -> Self:
        self._source = self._choose(zoo, blueprint)
        if self.donor is None:
            log.info("%s: donor %s (%s parameters)", self.name, self._source.name, f"{self._source.parameters:,}")
        return self

    def sample(self, blueprint: Blueprint, seed: int = 0) -> Iterator[tuple[str, Tensor]]:
        self._found(blueprint)
        yield from make_in_order(
            wanted_specs(blueprint, self.only), lambda spec: on_cpu(self.tensor(blueprint, spec, seed))
        )

    def tensor(self, blueprint: Blueprint, spec: TensorSpec, seed: int) -> Tensor | None:
        """The tensor of one spec on self.device, None where the donor has no counterpart."""
        generator = stream(seed, f"{self.name}/{spec.name}", self.device)
        parts = {}
        for part in spec.parts:
            found = self._found(blueprint)
            group = first_found(candidate_groups(blueprint, spec, part, "layer"), found)
            if group is None:
                return None
            donor, own, matrix = min(found[group], key=partial(_distance_to_member, spec, part))
            stored = donor.read(own.name, torch.float32).to(self.device)
            values = split_parts(own, stored)[matrix.role].flatten()
            size, rounds = math.prod(part.shape), math.ceil(math.prod(part.shape) / len(values))
            shuffles = [
                torch.randperm(len(values), generator=generator, device=generator.device) for _ in range(rounds)
            ]
            order = torch.cat(shuffles)[:size].to(self.device)
            scale = fan_in_factor(own, matrix, self.rescale) / fan_in_factor(spec, part, self.rescale)
            shift = donor.blueprint.offset(own) - blueprint.offset(spec)
            parts[part.role] = values[order].view(part.shape) * scale + shift
        return join_parts(spec, parts)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        assert self._source is not None
        return {**donor_ref(self._source)}, {}

    def restore(self, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self._source = open_ref(values, self.name)

    def _choose(self, zoo: Zoo | None, blueprint: Blueprint) -> Donor:
        chosen = choose_donors(zoo, blueprint, self.donor, self.name)
        return min(chosen, key=lambda donor: size_gap(donor, blueprint))

    def _found(self, blueprint: Blueprint) -> dict[tuple[str, ...], list[Member]]:
        if self._source is None:
            raise RuntimeError(f"{self.name}: call fit before sample")
        if self._members is None or self._members[0] is not blueprint:
            self._members = (blueprint, collect_members([self._source], blueprint, "layer"))
        return self._members[1]


def _distance_to_member(spec: TensorSpec, part: Part, member: Member) -> tuple[bool, float]:
    """How far a donor's part is from a target's: (whether it is another expert, difference of log sizes)."""
    _, own, matrix = member
    return own.expert != spec.expert, abs(math.log(math.prod(matrix.shape) / math.prod(part.shape)))
