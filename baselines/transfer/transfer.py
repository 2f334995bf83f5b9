"""From one donor to a target by index maps: which donor, whether it fits, and the gathering itself."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from baselines.transfer.index_maps import Axis, Maps, changes, past_the_end, rope_pairs, take
from zoo.donors.standalone import kept, reopen
from zoo.donors.store import Donor, Zoo, unlikeness
from zoo.errors import UserError
from zoo.options import option
from zoo.sampler import Sampler
from zoo.streams import stream
from zoo.targets.blueprint import Blueprint
from zoo.tensors import Metadata, Part, TensorSpec, join, split
from zoo.vocabulary import read_vocabulary, rows_by_token

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Transfer(Sampler):
    """A sampler that gathers one donor's weights by index maps. `fit` chooses the donor and checks that it fits; the
    weights are read while sampling. Subclasses give `sample`, and `choices` for their options of fixed words."""

    needs: ClassVar[tuple[str, ...]] = ("donor",)

    donor: str | None = option(None, "name of the donor; none: the nearest in size that fits")
    tokenizer: str | None = option(None, "the target's tokenizer (folder or tokenizer.json), to match tokens by string")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._source: Donor | None = None

    @property
    def grows(self) -> bool:
        """Whether an axis of the target may be larger than the donor's."""
        return False

    def refuses(self, donor: Donor, blueprint: Blueprint) -> list[str]:
        """A method's own reasons why a donor cannot fill a target, where `problems` finds none. Reads configs only."""
        return []

    @property
    def source(self) -> Donor:
        """The donor that `fit` chose."""
        if self._source is None:
            raise RuntimeError(f"{self.name}: call fit before sample")
        return self._source

    @property
    def donors(self) -> tuple[str, ...]:
        return () if self._source is None else (self._source.name,)

    def reads(self, zoo: Zoo | None, blueprint: Blueprint) -> tuple[str, ...]:
        return (self._choose(zoo, blueprint).name,)

    def fit(self, zoo: Zoo | None, blueprint: Blueprint) -> Self:
        self._source = self._choose(zoo, blueprint)
        announce(self._source, blueprint, self.rows(blueprint), self.name)
        return self

    def _choose(self, zoo: Zoo | None, blueprint: Blueprint) -> Donor:
        given = {"grow": "`--set wider=repeat`, or the method row-column"} if "wider" in self.choices else {}
        return choose(zoo, blueprint, self.donor, self.tokenizer, self.grows, self.name, self.refuses, **given)

    def rows(self, blueprint: Blueprint) -> Rows:
        return vocabulary_rows(self.source, blueprint, self.tokenizer)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return {**kept(self.source)}, {}

    def restore(self, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self._source = reopen(values, self.name)


@dataclass(frozen=True)
class Rows:
    """What is known of the target's vocabulary rows: the donor's row of each, -1 where it has none."""

    index: Tensor  # [V] int64
    same: bool  # the tokenizers agree (or their sizes do, and nothing more is known)


def problems(donor: Donor, blueprint: Blueprint, wider: bool) -> list[str]:
    """Why a donor cannot fill a target, axis by axis with both sizes; empty where it can. wider: whether an axis of
    the target may be larger than the donor's. Reads configs only."""
    source, target = donor.blueprint.metadata, blueprint.metadata
    if source is None or target is None:
        return ["index maps need a config on both sides"]
    found = []
    here, there = _signature(donor.blueprint), _signature(blueprint)
    if not there:
        return ["no tensor of the target has a known role"]
    for who, side in (("the donor", donor.blueprint), ("the target", blueprint)):
        assert side.metadata is not None
        if not side.metadata.kv_heads or not side.metadata.heads:
            return [f"{who} ({side.metadata.architecture}) has no attention heads"]
        if not _layers_alike(side):
            return [f"{who}'s layers are not all of one kind ({side.metadata.architecture}): maps go by depth alone"]
    found += [f"the target has {role} and the donor has none" for role in sorted(there - here)]
    found += [f"the donor has {role} and the target has none" for role in sorted(here - there)]
    if source.norm != target.norm:
        found.append(f"the donor has {source.norm} norms and the target {target.norm} norms")
    if (source.rope_theta is None) != (target.rope_theta is None):
        found.append("one of the two has rotary positions and the other has none")
    for axis, t, s in sizes(source, target):
        if axis == "head_dim":
            try:
                rope_pairs(t, s, _rotary(source))
            except UserError:
                more = f": heads do not grow, take more of {t}" if s > t else ""
                found.append(f"head_dim {t} is no whole multiple of the target's {s}{more}")
        elif s > t and not wider and axis not in ("layers", "vocab"):
            found.append(f"{axis} {t} is smaller than the target's {s}")
    return found


def sizes(source: Metadata, target: Metadata) -> list[tuple[str, int, int]]:
    """[(axis, donor's size, target's size)]."""
    pairs = [(name, getattr(source, name), getattr(target, name)) for name in ("layers", "width", "ffn", "head_dim")]
    pairs += [("kv_heads", source.kv_heads, target.kv_heads)]
    pairs += [("heads per KV head", source.heads // source.kv_heads, target.heads // target.kv_heads)]
    pairs += [("positions", source.positions, target.positions), ("experts", source.experts, target.experts)]
    pairs += [("expert ffn", expert_ffn(source), expert_ffn(target))]
    return [*pairs, ("vocab", source.vocab, target.vocab)]


Refuses = Callable[["Donor", Blueprint], list[str]]


def choose(
    zoo: Zoo | None,
    blueprint: Blueprint,
    name: str | None,
    tokenizer: str | None,
    wider: bool,
    who: str,
    refuses: Refuses = lambda donor, blueprint: [],
    grow: str = "the method row-column or net2wider",
) -> Donor:
    """The donor called `name`, or of those that fit the one nearest in size, with the same tokenizer if there is one
    (ties by name). refuses: a method's own reasons; grow: what a larger axis needs. Raises UserError where it (or none)
    fits, saying which axis and which sizes, and which other donors would do."""
    if zoo is None:
        raise UserError(f"{who} needs a donor: give --zoo DIR, or --donor FOLDER")
    refused: list[tuple[bool, int, float, str]] = []
    fitting: list[tuple[bool, float, str]] = []
    for donor in [zoo.donor(name)] if name is not None else zoo.donors:
        other, distance = unlikeness(donor, blueprint)
        found, same = _fits(donor, blueprint, tokenizer, wider, refuses)
        if not found:
            fitting.append((not same, distance, donor.name))
        else:
            why = f"{who}: donor {donor.name!r} does not fit the target: {'; '.join(found)}"
            refused.append((other, len(found), distance, why))
    if not fitting:
        if not refused:
            raise UserError(f"{who} needs a donor and {zoo.path} holds none: fill it with `headstart zoo add`")
        message = min(refused)[-1]
        others = f" ({len(refused)} donors, none fits)" if len(refused) > 1 else ""
        if name is not None:
            do = [d.name for d in zoo.donors if not _fits(d, blueprint, tokenizer, wider, refuses)[0]]
            others = f" (of this zoo would do: {', '.join(do)})" if do else ""
        wish = "" if wider else f"; a larger axis needs {grow}"
        raise UserError(message + others + (wish if "smaller than the target's" in message else ""))
    chosen = zoo.donor(min(fitting)[2])
    if name is None:
        log.info("%s: donor %s (%s parameters)", who, chosen.name, f"{chosen.parameters:,}")
    return chosen


def _fits(
    donor: Donor, blueprint: Blueprint, tokenizer: str | None, wider: bool, refuses: Refuses
) -> tuple[list[str], bool]:
    """(why a donor does not fit, whether it has the target's tokenizer)."""
    found = problems(donor, blueprint, wider) or refuses(donor, blueprint)
    if found:
        return found, False
    try:
        return [], vocabulary_rows(donor, blueprint, tokenizer).same
    except UserError as error:
        return [str(error)], False


def vocabulary_rows(donor: Donor, blueprint: Blueprint, tokenizer: str | None) -> Rows:
    """The donor's row of every row of the target's vocabulary. tokenizer: the target's folder or tokenizer.json, None
    where it is not known: then the sizes must agree. Raises UserError where they do not, or no token is shared."""
    source, target = donor.blueprint.metadata, blueprint.metadata
    assert source is not None and target is not None
    theirs = donor.vocabulary()
    ours = read_vocabulary(tokenizer) if tokenizer is not None else None
    if ours is None or theirs is None:
        if source.vocab != target.vocab:
            raise UserError(
                f"vocab {source.vocab} is not the target's {target.vocab} and the tokens cannot be matched by their"
                f" strings: give the target's --tokenizer{'' if theirs else ', and a donor that has one'}"
            )
        return Rows(torch.arange(target.vocab), True)
    if ours == theirs:  # sizes may differ by padding
        index = torch.arange(target.vocab)
        index[source.vocab :] = -1
        return Rows(index, True)
    index = rows_by_token(theirs, ours, source.vocab, target.vocab)
    if (index < 0).all():
        raise UserError("its tokenizer shares no token with the target's")
    return Rows(index, False)


def announce(donor: Donor, blueprint: Blueprint, rows: Rows, who: str) -> None:
    """Says aloud what the maps will do that a user may not expect."""
    source, target = donor.blueprint.metadata, blueprint.metadata
    assert source is not None and target is not None
    log.info("%s: from %s: %s", who, donor.name, changes(sizes(source, target)))
    if target.layers > source.layers:
        log.info("%s: %d layers are made of %d: layers repeat", who, target.layers, source.layers)
    fresh = int((rows.index < 0).sum())
    if fresh or not rows.same:
        shared = f"{target.vocab - fresh} of {target.vocab} tokens are the donor's by string"
        log.info("%s: %s; the other %d rows are drawn like its rows", who, shared, fresh)
    if target.positions > source.positions:
        log.info("%s: positions from %d on are drawn like the donor's", who, source.positions)
    if target.tied and not source.tied:
        log.info("%s: the target ties its head to the embedding: the donor's head is left out", who)
    if target.rope_theta != source.rope_theta:
        log.info("%s: rope_theta %s -> %s: positions rotate differently", who, source.rope_theta, target.rope_theta)


def table_axes(donor: Donor, blueprint: Blueprint, rows: Rows) -> dict[str, Any]:
    """The maps that no method decides: vocabulary, positions, coordinates within a head, experts."""
    source, target = donor.blueprint.metadata, blueprint.metadata
    assert source is not None and target is not None
    positions = torch.arange(_positions(blueprint))
    positions[_positions(donor.blueprint) :] = -1
    return {
        "vocab": Axis(past_the_end(rows.index, source.vocab)),
        "position": Axis(past_the_end(positions, _positions(donor.blueprint))),
        "head_dim": Axis(rope_pairs(source.head_dim, target.head_dim, _rotary(source))),
        "experts": tuple(i * source.experts // target.experts for i in range(target.experts)),
    }


def transfer(
    donor: Donor, blueprint: Blueprint, maps: Callable[[str], Maps], seed: int, who: str
) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor in float32) for every tensor of the target whose role is known; float64 where the donor is. maps:
    of a tensor's name, always the same one where the coordinates are coupled. One tensor of the donor is in memory at
    a time."""
    source = {_key(spec, part): (spec, part) for spec in donor.blueprint.specs for part in spec.parts}
    cache: dict[str, dict[str, Tensor]] = {}

    def read(spec: TensorSpec) -> dict[str, Tensor]:
        if spec.name not in cache:
            cache.clear()
            cache[spec.name] = split(spec, donor.read(spec.name, torch.promote_types(spec.dtype, torch.float32)))
        return cache[spec.name]

    for spec in blueprint.specs:
        if any("other" in part.axes for part in spec.parts):
            continue
        found = maps(spec.name)
        parts = {}
        generator = stream(seed, f"{who}/free/{spec.name}")
        for part in spec.parts:
            layer = None if spec.layer is None else found.layers[spec.layer]
            expert = None if spec.expert is None else found.experts[spec.expert]
            key = _key(spec, part, layer, expert)
            if part.role == "head" and key not in source:  # a tied donor: its head is its embedding
                key = _embedding(donor.blueprint)
            donor_spec, donor_part = source[key]
            matrix = _with_fresh_rows(read(donor_spec)[donor_part.role], part, found, f"{who}/{spec.name}", seed)
            parts[part.role] = take(matrix, part, found, spec.layer, spec.expert is not None, spec.kind, generator)
        tensor = join(spec, parts)
        if spec.role == "norm" and spec.site == "final" and blueprint.ties:
            tensor = _scale_final_norm(tensor, spec, blueprint, found)
        yield spec.name, tensor


def _scale_final_norm(tensor: Tensor, spec: TensorSpec, blueprint: Blueprint, maps: Maps) -> Tensor:
    """A tied head cannot have its columns scaled without the embedding: the norm before it takes the scale."""
    assert blueprint.metadata is not None
    scale = torch.as_tensor(maps.residual.scale, dtype=torch.float64) / maps.residual.write / maps.embed_scale
    if maps.residual.free is not None:  # nothing is written there: any gain would do
        scale = torch.where(maps.residual.free, scale[~maps.residual.free].mean(), scale)
    scale = scale.to(tensor.dtype)
    one = blueprint.offset(spec)
    return (tensor + one) * scale - one


def _with_fresh_rows(matrix: Tensor, part: Part, maps: Maps, name: str, seed: int) -> Tensor:
    """The donor's matrix with rows appended for the tokens or positions that it lacks: normal, with the mean and the
    standard deviation of its rows, coordinate by coordinate."""
    if part.axes[0] not in ("vocab", "position"):
        return matrix
    index = maps.axis(part.axes[0], None).index
    fresh = max(0, int(index.max()) + 1 - len(matrix))
    draws = torch.randn(fresh, *matrix.shape[1:], generator=stream(seed, name))
    return torch.cat([matrix, matrix.mean(0) + matrix.std(0, correction=0) * draws])


Key = tuple[str, str, str, str | None, int | None, int | None]


def _key(spec: TensorSpec, part: Part, layer: int | None = None, expert: int | None = None) -> Key:
    """What a part is, apart from its sizes; a layer or expert given replaces the spec's own."""
    return (
        part.role,
        part.axes[0],
        spec.kind,
        spec.site,
        spec.layer if layer is None else layer,
        spec.expert if expert is None else expert,
    )


def _embedding(blueprint: Blueprint) -> Key:
    return next(_key(spec, part) for spec, part in blueprint.find("embed") if part.axes[0] == "vocab")


def _signature(blueprint: Blueprint) -> set[str]:
    """What kinds of tensors a model has; head and embedding are interchangeable, so the head does not count."""
    found = set()
    for spec in blueprint.specs:
        for part in spec.parts:
            if "other" not in part.axes and (part.role, spec.kind) != ("head", "weight"):
                site = f" ({spec.site})" if spec.site else f" ({part.axes[0]})" if part.role == "embed" else ""
                experts = " per expert" if spec.expert is not None else ""
                found.add(f"{part.role} {spec.kind}{site}{experts}")
    return found


def _layers_alike(blueprint: Blueprint) -> bool:
    """Whether every layer has the same kinds of tensors."""
    kinds: dict[int, set[tuple[str, str, str | None, bool]]] = {}
    for spec in blueprint.specs:
        if spec.layer is not None and spec.role != "other":
            kinds.setdefault(spec.layer, set()).add((spec.role, spec.kind, spec.site, spec.expert is not None))
    return len({frozenset(kind) for kind in kinds.values()}) <= 1


def _positions(blueprint: Blueprint) -> int:
    """Rows of the table of learned positions (OPT's has two more than its config says), 0 for none."""
    tables = [part.shape[0] for _, part in blueprint.find("embed") if part.axes[0] == "position"]
    return tables[0] if tables else 0


def _rotary(metadata: Metadata) -> int:
    """How many coordinates of a head are rotated."""
    return 0 if metadata.rope_theta is None else int(str(metadata.extra.get("rotary_dim", metadata.head_dim)))


def expert_ffn(metadata: Metadata) -> int:
    """The hidden size of an expert, 0 without experts."""
    return int(str(metadata.extra.get("expert_ffn", metadata.ffn))) if metadata.experts else 0
