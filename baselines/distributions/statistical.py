"""The base of methods that fit a distribution to donors' values: which tensors of the donors belong to which fit."""

from __future__ import annotations

import logging
import math
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor

from baselines.distributions.fit_cache import fit_folder, keep_fit, load_fit
from zoo.errors import UserError
from zoo.options import option
from zoo.parallel.threads import make_in_order
from zoo.sampler import Sampler, wanted_specs
from zoo.streams import stream
from zoo.targets.blueprint import Blueprint
from zoo.targets.roles import parse_name
from zoo.tensors import Part, TensorSpec, join_parts, split_parts

if TYPE_CHECKING:
    from zoo.donors.donor import Donor
    from zoo.donors.zoo import Zoo

log = logging.getLogger(__name__)

CHOICES = {"granularity": ("layer", "role", "global"), "rescale": ("fan-in", "none")}
MAX_FIT_VALUES = 1 << 22  # values of one fit; larger groups are thinned evenly
DRAW_CHUNK = 1 << 22  # values that are drawn at a time
Group = tuple[str, ...]  # the properties that tensors of one fit share
Member = tuple["Donor", TensorSpec, Part]
Fit = dict[str, Any]  # JSON values and tensors


@dataclass(kw_only=True)
class Statistical(Sampler):
    """Draws the entries of a tensor independently from a distribution fitted to donors' values.

    A subclass implements `fit_values` and `draw`. A tensor that no donor has a counterpart for is left out.

    Each layer of the target uses the layers at the nearest relative depth of every donor. With `rescale=fan-in` values
    are multiplied by sqrt(fan-in) before the fit, and draws divided by the target's, so that donors of other widths can
    be used. Gains and shifts of norms are set to the donors' mean. Embeddings have fits of their own at every
    granularity, because no matrix product sums over their rows.

    A plain module without a config uses the donors' tensors of the same name. Where there are none, it uses all their
    tensors of the same kind with as many axes: weights for weights, biases for biases. Donors may be modules
    (zoo.donors.memory.zoo_of) or language models.
    """

    needs: ClassVar[tuple[str, ...]] = ("donors",)
    choices: ClassVar[dict[str, tuple[str, ...]]] = CHOICES

    donor: str | None = option(None, "name of the donor; none: all donors together, where they have the role")
    granularity: str = option("layer", "one fit per tensor (layer), per role, or for all matrices (global)")
    rescale: str = option("fan-in", "scaling of the spread with the size of the input axis: fan-in (1 / sqrt) or none")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._donors: tuple[str, ...] = ()
        self._fits: dict[str, Fit] = {}  # by group

    @abstractmethod
    def fit_values(self, values: Tensor) -> Fit:
        """Fits values [n] float32 on self.device. Returns JSON values, and tensors on the CPU."""

    @abstractmethod
    def draw(self, fit: Fit, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Draws independent values of a fit, float32 on self.device or the generator's."""

    @property
    def donors(self) -> tuple[str, ...]:
        return self._donors

    def planned_donors(self, zoo: Zoo | None, blueprint: Blueprint) -> tuple[str, ...]:
        return tuple(donor.name for donor in choose_donors(zoo, blueprint, self.donor, self.name))

    def fit(self, zoo: Zoo | None, blueprint: Blueprint) -> Self:
        chosen = choose_donors(zoo, blueprint, self.donor, self.name)
        self._donors, self._fits = tuple(donor.name for donor in chosen), {}
        if self.donor is None:
            log.info("%s: fitted to %d donors: %s", self.name, len(chosen), ", ".join(self._donors))
        found = collect_members(chosen, blueprint, self.granularity)
        needed = {
            group: found[group]
            for spec in wanted_specs(blueprint, self.only)
            for part in spec.parts
            if (group := first_found(candidate_groups(blueprint, spec, part, self.granularity), found)) is not None
        }
        assert zoo is not None  # `choose_donors` refuses that
        what = {
            "/".join(group): [(donor.sha256, spec.name, part.role) for donor, spec, part in members]
            for group, members in needed.items()
        }
        folder = fit_folder(self, zoo, what) if self.only is None else None  # else it is the fit of a part
        kept = load_fit(type(self), folder) if folder is not None else None
        if kept is not None:
            log.info("%s: the fit is in %s", self.name, folder)
            self._fits = kept._fits
            return self
        self._fit_groups(needed)
        if folder is not None:
            keep_fit(self, folder)
        return self

    def _fit_groups(self, needed: dict[Group, list[Member]]) -> None:
        for group, own in needed.items():
            share = max(1, MAX_FIT_VALUES // len(own))
            pooled = torch.cat([thin_values(standardized_values(member, self.rescale), share) for member in own])
            is_norm = group[0] == "norm"
            mean = {"mean": pooled.double().mean().item()}
            self._fits["/".join(group)] = mean if is_norm else self.fit_values(pooled.to(self.device))

    def sample(self, blueprint: Blueprint, seed: int = 0) -> Iterator[tuple[str, Tensor]]:
        yield from make_in_order(
            wanted_specs(blueprint, self.only), lambda spec: on_cpu(self.tensor(blueprint, spec, seed))
        )

    def tensor(self, blueprint: Blueprint, spec: TensorSpec, seed: int) -> Tensor | None:
        """The tensor of one spec on self.device, None where no donor has a counterpart."""
        generator = stream(seed, f"{self.name}/{spec.name}", self.device)
        parts = {}
        for part in spec.parts:
            keys = ["/".join(group) for group in candidate_groups(blueprint, spec, part, self.granularity)]
            key = next((key for key in keys if key in self._fits), None)
            if key is None:
                return None
            if key.startswith("norm/"):
                level = self._fits[key]["mean"] - blueprint.offset(spec)
                parts[part.role] = torch.full(part.shape, level, device=self.device)
            else:
                flat = torch.empty(math.prod(part.shape), device=self.device)
                for piece in flat.split(DRAW_CHUNK):
                    piece.copy_(self.draw(self._fits[key], tuple(piece.shape), generator))
                parts[part.role] = flat.view(part.shape) / fan_in_factor(spec, part, self.rescale)
        return join_parts(spec, parts)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        values: dict[str, Any] = {}
        tensors: dict[str, Tensor] = {}
        for group, fit in self._fits.items():
            values[group] = {k: v for k, v in fit.items() if not isinstance(v, Tensor)}
            tensors |= {f"{group}/{k}": v for k, v in fit.items() if isinstance(v, Tensor)}
        return {"donors": list(self._donors), "fits": values}, tensors

    def restore(self, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self._donors, self._fits = tuple(values["donors"]), values["fits"]
        for name, tensor in tensors.items():
            group, _, key = name.rpartition("/")
            self._fits[group][key] = tensor
        for group, fit in self._fits.items():  # a damaged fit fails here, where `load` says so
            is_norm = group.startswith("norm/")
            value = torch.tensor(fit["mean"]) if is_norm else self.draw(fit, (1,), stream(0, "check", self.device))
            if value.numel() != 1 or not value.isfinite().all():
                raise ValueError(f"the fit of {group} draws no number")


def on_cpu(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.cpu()


def choose_donors(zoo: Zoo | None, blueprint: Blueprint, name: str | None, method: str) -> tuple[Donor, ...]:
    """The donor called `name`, or all donors that share the most roles of matrices with the target.

    For a plain module it is the donors that have the most of its tensors, by name or role before number of axes. Raises
    UserError where no donor has any.
    """
    if zoo is None or not zoo.donors:
        raise UserError(f"{method} needs donors: give --zoo DIR, or --donor FOLDER")
    if blueprint.metadata is None:
        has = {donor: _count_matches(donor, blueprint) for donor in zoo.donors}
        lacking = "tensor with a name of the target or with as many axes"
    else:
        target_roles = _matrix_roles(blueprint)
        if not target_roles:
            raise UserError(f"{method}: no tensor of the target has a known role")
        has = {donor: (len(target_roles & _matrix_roles(donor.blueprint)), 0) for donor in zoo.donors}
        lacking = f"matrix of the target's roles ({', '.join(sorted(target_roles))})"
    if name is not None:
        donor = zoo.donor(name)
        if has[donor] == (0, 0):
            raise UserError(f"{method}: donor {donor.name!r} has no {lacking}; choose another donor")
        return (donor,)
    most = max(has.values())
    if most == (0, 0):
        raise UserError(f"{method}: no donor has a {lacking}; add one to the zoo")
    return tuple(donor for donor, count in has.items() if count == most)


def candidate_groups(blueprint: Blueprint, spec: TensorSpec, part: Part, granularity: str) -> list[Group]:
    """The groups whose fit a target's part may use, the best first: by role; in plain modules by name, then by axes.

    Biases, norms and embeddings always have groups of their own.
    """
    is_plain = blueprint.metadata is None
    if len(part.axes) >= 2 and part.role != "embed" and granularity == "global" and (is_plain or part.role != "other"):
        return [("all",)]
    layer = (str(spec.layer),) if granularity == "layer" and spec.layer is not None else ()
    found: list[Group] = [(*kind, *layer) for kind in _kind_groups(spec, part, is_plain)]
    return [*found, _axes_group(spec, part)] if is_plain and part.role != "embed" else found


def collect_members(donors: Sequence[Donor], blueprint: Blueprint, granularity: str) -> dict[Group, list[Member]]:
    """Group -> the donors' parts in it. A donor's layer belongs to the target's layers nearest in relative depth."""
    is_plain, layers = blueprint.metadata is None, count_layers(blueprint)
    found: dict[Group, list[Member]] = defaultdict(list)
    for donor in donors:
        for spec in donor.blueprint.specs:
            for part in spec.parts:
                kinds: list[Group] = _kind_groups(spec, part, is_plain and donor.blueprint.metadata is None)
                if granularity == "layer" and spec.layer is not None:
                    near = list(nearest_layers(spec.layer, count_layers(donor.blueprint), layers))
                    keys = [(*kind, str(layer)) for kind in kinds for layer in near]
                else:
                    keys = kinds
                if len(part.axes) >= 2 and part.role != "embed" and granularity == "global" and kinds:
                    keys = [("all",)]
                if is_plain and part.role != "embed":
                    keys = [*keys, _axes_group(spec, part)]
                for key in keys:
                    found[key].append((donor, spec, part))
    return found


def first_found(candidates: Sequence[Group], found: Collection[Group]) -> Group | None:
    return next((group for group in candidates if group in found), None)


def standardized_values(member: Member, rescale: str) -> Tensor:
    """[n] float32: the values of a donor's part, scaled to fan-in 1; gains as the factor that they multiply by."""
    donor, spec, part = member
    values = split_parts(spec, donor.read(spec.name, torch.float32))[part.role].flatten()
    return values * fan_in_factor(spec, part, rescale) + donor.blueprint.offset(spec)


def fan_in_factor(spec: TensorSpec, part: Part, rescale: str) -> float:
    """sqrt(fan-in) for a matrix that reads an axis; 1 for other parts and for rescale=none."""
    reads = len(part.axes) >= 2 and part.role != "embed" and rescale == "fan-in"
    return math.sqrt(math.prod(part.shape[1:])) if reads else 1.0


def thin_values(values: Tensor, most: int) -> Tensor:
    """At most `most` of the values: one at random of each run of neighbours, the same in every call.

    A regular stride would take some columns of a matrix and never the others.
    """
    if len(values) <= most:
        return values
    run = math.ceil(len(values) / most)
    starts = torch.arange(0, len(values) - run + 1, run)
    index = starts + torch.randint(run, starts.shape, generator=stream(0, "thin"))
    return values[index.to(values.device)]


def count_layers(blueprint: Blueprint) -> int:
    """The number of layers of a model; for a plain module by the numbers in its tensors' names."""
    if blueprint.metadata is not None:
        return blueprint.metadata.layers
    return 1 + max((spec.layer for spec in blueprint.specs if spec.layer is not None), default=0)


def nearest_layers(layer: int, donor_layers: int, layers: int) -> Iterator[int]:
    """The layers of the target that are nearest to a donor's layer in relative depth."""
    for target in range(layers):
        if round(target / max(1, layers - 1) * (donor_layers - 1)) == layer:
            yield target


def _kind_groups(spec: TensorSpec, part: Part, is_plain: bool) -> list[Group]:
    """The groups of a part without its layer: by its role, or by its name in a plain module without roles."""
    if is_plain and part.role in ("conv", "other"):
        return [("name", parse_name(spec.name)[0], spec.kind, str(len(part.axes)))]
    table = spec.site or (part.axes[0] if part.role == "embed" else "")
    return [] if part.role == "other" else [(part.role, spec.kind, table)]


def _axes_group(spec: TensorSpec, part: Part) -> Group:
    return ("axes", spec.kind, str(len(part.axes)))


def _count_matches(donor: Donor, blueprint: Blueprint) -> tuple[int, int]:
    """(tensors of a plain module that a donor matches by name or role, tensors that it matches at all)."""
    found = collect_members([donor], blueprint, "layer")
    keys = [
        first_found(candidate_groups(blueprint, s, part, "layer"), found) for s in blueprint.specs for part in s.parts
    ]
    served = [key for key in keys if key is not None]
    return sum(key[0] != "axes" for key in served), len(served)


def _matrix_roles(blueprint: Blueprint) -> set[str]:
    return {part.role for s in blueprint.specs for part in s.parts if len(part.axes) >= 2} - {"other", "head"}
