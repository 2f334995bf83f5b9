"""Filters of convolutions drawn with the covariance that a donor's filters have (2210.03651)."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor

from zoo.errors import UserError
from zoo.options import option
from zoo.sampler import Sampler
from zoo.streams import stream
from zoo.targets.blueprint import Blueprint
from zoo.tensors import TensorSpec

if TYPE_CHECKING:
    from zoo.donors.donor import Donor
    from zoo.donors.zoo import Zoo

log = logging.getLogger(__name__)

Kernel = tuple[int, ...]  # (7, 7), or (4,) for the convolutions of Mamba

CHOICES: dict[str, tuple[str, ...]] = {"rescale": ("fan-in", "none"), "mean": ("zero", "pooled")}


@dataclass(kw_only=True)
class ConvCovariance(Sampler):
    """Every filter of a convolution, flattened to k x k values, is drawn from N(0, Σ), with Σ the empirical covariance
    of the donors' filters in the convolution at the nearest relative depth among those of the same kernel size. Number
    and width of the target's convolutions are free, depthwise or not. Everything else, convolutions of a single tap and
    biases included, keeps the architecture's default.

    Σ is centred, and its mean is left out as in the paper; `mean=pooled` adds it [R: a full convolution's filters have
    a mean near zero, a depthwise one's need not]. `rescale=fan-in` takes filters times sqrt(fan-in) and divides by the
    target's, which changes nothing between depthwise convolutions [R].

    How much of a gain is the scale of the filters and how much their shape is for a control to tell, the `permuted`
    method. Plain 5 x 5 networks on scikit-learn's digits, held-out loss after 80 steps, mean of ten seeds: torch's
    default 1.10, this 0.74 (lower in all ten), the same values permuted 0.67.
    """

    name: ClassVar[str] = "conv-covariance"
    family: ClassVar[str] = "parametric"
    summary: ClassVar[str] = "convolution filters with the covariance of a donor's, at the same relative depth"
    reference: ClassVar[str] = "2210.03651"
    needs: ClassVar[tuple[str, ...]] = ("donors",)
    choices: ClassVar[dict[str, tuple[str, ...]]] = CHOICES

    donor: str | None = option(None, "name of the donor; none: all donors together, where they have the kernel size")
    rescale: str = option(
        "fan-in", "of the spread when the number of input channels changes: fan-in (1 / sqrt) or none"
    )
    mean: str = option("zero", "of the filters: zero, or pooled (the donors' mean filter)")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._donors: tuple[str, ...] = ()
        self._laws: dict[str, Tensor] = {}  # root/TENSOR [k, k] with root @ root = Σ, and mean/TENSOR [k]

    @property
    def donors(self) -> tuple[str, ...]:
        return self._donors

    def reads(self, zoo: Zoo | None, blueprint: Blueprint) -> tuple[str, ...]:
        return tuple(donor.name for donor in self._choose(zoo, blueprint))

    def fit(self, zoo: Zoo | None, blueprint: Blueprint) -> Self:
        chosen = self._choose(zoo, blueprint)
        self._donors = tuple(donor.name for donor in chosen)
        self._laws = {}
        filters = [_convolutions_by_kernel(donor.blueprint) for donor in chosen]
        for kernel, specs in _convolutions_by_kernel(blueprint).items():
            for place, spec in enumerate(specs):
                found = [
                    self._filters(donor, theirs[kernel][nearest_in_depth(place, len(specs), len(theirs[kernel]))])
                    for donor, theirs in zip(chosen, filters, strict=True)
                    if kernel in theirs
                ]
                if found:
                    mean, root = mean_and_root(torch.cat(found))
                    self._laws[f"root/{spec.name}"] = root.float().cpu()
                    self._laws |= {f"mean/{spec.name}": mean.float().cpu()} if self.mean == "pooled" else {}
                else:
                    log.info("%s: no donor has a kernel of %s: %s keeps its default", self.name, kernel, spec.name)
        return self

    def sample(self, blueprint: Blueprint, seed: int = 0) -> Iterator[tuple[str, Tensor]]:
        for spec in blueprint.specs:
            root = self._laws.get(f"root/{spec.name}")
            if root is None:
                continue
            draws = torch.randn(
                math.prod(spec.shape[:2]), len(root), generator=stream(seed, f"{self.name}/{spec.name}")
            )
            drawn = draws @ root + self._laws.get(f"mean/{spec.name}", torch.zeros(1))
            yield spec.name, (drawn / self._width(spec)).reshape(spec.shape)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return {"donors": list(self._donors)}, self._laws

    def restore(self, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self._donors, self._laws = tuple(values["donors"]), tensors

    def _choose(self, zoo: Zoo | None, blueprint: Blueprint) -> tuple[Donor, ...]:
        """The donors with a kernel size of the target. UserError where there are none."""
        if zoo is None or not zoo.donors:
            raise UserError(f"{self.name} needs donors: give --zoo DIR, or --donor FOLDER")
        wanted = _convolutions_by_kernel(blueprint)
        if not wanted:
            raise UserError(f"{self.name}: the target has no convolution of more than one tap; use normal or another")
        among = (zoo.donor(self.donor),) if self.donor is not None else zoo.donors
        chosen = tuple(donor for donor in among if wanted.keys() & _convolutions_by_kernel(donor.blueprint).keys())
        if not chosen:
            have = {kernel for donor in among for kernel in _convolutions_by_kernel(donor.blueprint)}
            raise UserError(
                f"{self.name}: the target's kernels are {_format_kernels(wanted)}, and {'the donor' if self.donor else 'the zoo'} "
                f"has {_format_kernels(have) or 'no convolutions'}: a covariance holds for one kernel size; add such a donor"
            )
        return chosen

    def _filters(self, donor: Donor, spec: TensorSpec) -> Tensor:
        """[filters, taps] float64 of one convolution, brought to fan-in 1."""
        values = donor.read(spec.name, torch.float32).flatten(0, 1).flatten(1)
        return values.to(self.device, torch.float64) * self._width(spec)

    def _width(self, spec: TensorSpec) -> float:
        return math.sqrt(math.prod(spec.shape[1:])) if self.rescale == "fan-in" else 1.0


def mean_and_root(filters: Tensor) -> tuple[Tensor, Tensor]:
    """[n, k] -> mean [k] and the symmetric root [k, k] of the covariance around it."""
    mean = filters.mean(0)
    left = filters - mean
    energy, axes = torch.linalg.eigh(left.mT @ left / len(left))
    return mean, axes * energy.clamp_min(0).sqrt() @ axes.mT


def nearest_in_depth(place: int, count: int, there: int) -> int:
    """Which of `there` convolutions lies at the relative depth of the one at `place` of `count`."""
    return round(place / max(1, count - 1) * (there - 1))


def _convolutions_by_kernel(blueprint: Blueprint) -> dict[Kernel, list[TensorSpec]]:
    """Kernel size -> the weights of convolutions of more than one tap, in the model's order."""
    found: dict[Kernel, list[TensorSpec]] = {}
    for spec, _ in blueprint.find("conv"):
        if math.prod(spec.shape[2:]) > 1:
            found.setdefault(spec.shape[2:], []).append(spec)
    return found


def _format_kernels(kernels: dict[Kernel, Any] | set[Kernel]) -> str:
    return ", ".join("x".join(map(str, kernel)) for kernel in sorted(kernels))
