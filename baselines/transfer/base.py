"""The base of all methods that gather one donor's weights by index maps."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import Tensor

from baselines.transfer.donor_choice import choose_donor
from baselines.transfer.index_maps import describe_changes
from baselines.transfer.sizes import axis_sizes
from baselines.transfer.vocabulary import VocabularyRows, vocabulary_rows
from zoo.donors.donor import Donor
from zoo.donors.folder import donor_ref, open_ref
from zoo.donors.zoo import Zoo
from zoo.options import option
from zoo.sampler import Sampler
from zoo.targets.blueprint import Blueprint

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
        log_plan(self._source, blueprint, self.rows(blueprint), self.name)
        return self

    def _choose(self, zoo: Zoo | None, blueprint: Blueprint) -> Donor:
        given = {"grow": "`--set wider=repeat`, or the method row-column"} if "wider" in self.choices else {}
        return choose_donor(zoo, blueprint, self.donor, self.tokenizer, self.grows, self.name, self.refuses, **given)

    def rows(self, blueprint: Blueprint) -> VocabularyRows:
        return vocabulary_rows(self.source, blueprint, self.tokenizer)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return {**donor_ref(self.source)}, {}

    def restore(self, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self._source = open_ref(values, self.name)


def log_plan(donor: Donor, blueprint: Blueprint, rows: VocabularyRows, who: str) -> None:
    """Says aloud what the maps will do that a user may not expect."""
    source, target = donor.blueprint.metadata, blueprint.metadata
    assert source is not None and target is not None
    log.info("%s: from %s: %s", who, donor.name, describe_changes(axis_sizes(source, target)))
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
