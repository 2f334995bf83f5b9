"""The base of all methods that gather one donor's weights by index maps."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import Tensor

from baselines.transfer.donor_choice import DonorRequest, choose_donor, copies_by_name
from baselines.transfer.gather import fixed_maps, gather_tensors
from baselines.transfer.index_maps import IndexMaps
from baselines.transfer.sizes import changes_alibi_heads, describe_changes, metadata_pair
from baselines.transfer.vocabulary import VocabularyRows, composed_rows, log_vocabulary
from zoo.donors.donor import Donor
from zoo.donors.folder import donor_ref, open_ref
from zoo.donors.zoo import Zoo
from zoo.options import option
from zoo.sampler import Sampler
from zoo.targets.blueprint import Blueprint
from zoo.vocabularies.build import DEFAULT_RULE, MODEL_HELP, RULES, VOCABULARY_HELP

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Transfer(Sampler):
    """A sampler that fills a target with the weights of one donor.

    `fit` chooses the donor and refuses a target that it cannot fill; `sample` reads the weights. A subclass implements
    `sample`, and overrides `allow_larger` and `extra_mismatches` where its rules differ.
    """

    needs: ClassVar[tuple[str, ...]] = ("donor",)
    how_to_grow: ClassVar[str] = "the method row-column or net2wider"  # advice for a target with a larger axis

    donor: str | None = option(None, "name of the donor; none: the nearest in size that fits")
    tokenizer: str | None = option(None, "the target's tokenizer (folder or tokenizer.json), to match tokens by string")
    vocabulary: str = option(DEFAULT_RULE, VOCABULARY_HELP)
    vocabulary_model: str | None = option(None, MODEL_HELP)
    head: str = option(
        "default", "the head, for a donor without one: default (the default initialisation) or embedding (a copy of it)"
    )

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.choices = {**cls.choices, "head": ("default", "embedding"), "vocabulary": RULES}

    def __post_init__(self) -> None:
        super().__post_init__()
        self._source: Donor | None = None
        self._rows: dict[tuple[Any, ...], VocabularyRows] = {}

    @property
    def allow_larger(self) -> bool:
        """Whether an axis of the target may be larger than the donor's."""
        return False

    @property
    def copies_own_shape(self) -> bool:
        """Whether a donor of the target's own architecture and shape is copied tensor by tensor."""
        return True

    def is_copy(self, blueprint: Blueprint) -> bool:
        """Whether `sample` copies every tensor of the fitted donor by its name."""
        return self.copies_own_shape and copies_by_name(self.source, blueprint, self.tokenizer, self.vocabulary)

    @property
    def keeps_alibi_slopes(self) -> bool:
        """Whether a head of a donor with ALiBi goes to the head of the target with its slope."""
        return False

    def extra_mismatches(self, donor: Donor, blueprint: Blueprint) -> list[str]:
        """The method's own reasons why a donor cannot fill a target. Reads configs only."""
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

    def planned_donors(self, zoo: Zoo | None, blueprint: Blueprint) -> tuple[str, ...]:
        return (self._choose(zoo, blueprint).name,)

    def fit(self, zoo: Zoo | None, blueprint: Blueprint) -> Self:
        self._source = self._choose(zoo, blueprint)
        self.log_plan(blueprint)
        self.warn_about_head(blueprint)
        return self

    def log_plan(self, blueprint: Blueprint) -> None:
        """Logs which axes change, and what is composed or drawn because the donor does not have it."""
        if blueprint.metadata is None:
            log.info("%s: from %s: same shape", self.name, self.source.name)
            return
        log_axes(self.source, blueprint, self.name)
        if not self.keeps_alibi_slopes and changes_alibi_heads(*metadata_pair(self.source, blueprint)):
            log.info("%s: heads get the ALiBi slopes of the target, not those of the donor's heads", self.name)
        log_vocabulary(self.vocabulary_rows(blueprint), self.name, self.vocabulary)

    def gather(
        self, blueprint: Blueprint, maps_of: Callable[[str], IndexMaps], seed: int, donor: Donor | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """`gather_tensors` from the fitted donor, or from `donor`, with the method's options."""
        only = self.only if donor is None else None
        donor = self.source if donor is None else donor
        yield from gather_tensors(
            donor, blueprint, maps_of, seed, self.name, self.head == "embedding", only, self.device
        )

    def warn_about_head(self, blueprint: Blueprint) -> None:
        """Says what the target's head is where the donor has none."""
        if self.source.blueprint.has_head or not blueprint.find("head"):
            return
        if self.head == "embedding":
            log.warning("%s: %s has no head: the target's is its embedding", self.name, self.source.name)
        else:
            log.warning(
                "%s: %s has no head: the target's keeps the default initialisation; --set head=embedding copies the"
                " donor's embedding", self.name, self.source.name,
            )  # fmt: skip

    def _choose(self, zoo: Zoo | None, blueprint: Blueprint) -> Donor:
        request = DonorRequest(
            method=self.name,
            name=self.donor,
            tokenizer=self.tokenizer,
            vocabulary=self.vocabulary,
            allow_larger=self.allow_larger,
            extra_mismatches=self.extra_mismatches,
            how_to_grow=self.how_to_grow,
            copies=self.copies_own_shape,
        )
        return choose_donor(zoo, blueprint, request)

    def vocabulary_rows(self, blueprint: Blueprint) -> VocabularyRows:
        """The donor's rows for each row of the target's vocabulary."""
        source, target = metadata_pair(self.source, blueprint)
        key = (self.source.sha256, source.vocab, target.vocab)
        if key not in self._rows:
            rows = composed_rows(self.source, blueprint, self.tokenizer, self.vocabulary, self.vocabulary_model)
            self._rows = {key: rows}
        return self._rows[key]

    def details(self, blueprint: Blueprint) -> dict[str, Any]:
        rows = None if self._source is None or blueprint.metadata is None else self.vocabulary_rows(blueprint)
        record = {} if rows is None else rows.record(self.vocabulary)
        return {"vocabulary": record} if record else {}

    @classmethod
    def current_options(cls, saved: dict[str, Any]) -> dict[str, Any]:
        """Samplers that were saved before there was a choice match equal strings only."""
        return {"vocabulary": "strings", **saved}

    def fixed_maps(self, blueprint: Blueprint) -> dict[str, Any]:
        """The maps that no method decides, as keyword arguments of `IndexMaps`."""
        return fixed_maps(self.source, blueprint, self.vocabulary_rows(blueprint))

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return {**donor_ref(self.source)}, {}

    def restore(self, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self._source = open_ref(values, self.name)


def log_axes(donor: Donor, blueprint: Blueprint, method: str) -> None:
    """Logs which axes change, but for the vocabulary."""
    source, target = metadata_pair(donor, blueprint)
    log.info("%s: from %s: %s", method, donor.name, describe_changes(source, target))
    if target.layers > source.layers:
        log.info("%s: %d layers from %d: layers repeat", method, target.layers, source.layers)
    if target.positions > source.positions:
        log.info("%s: positions from %d on are drawn like the donor's", method, source.positions)
    if target.tied and not source.tied:
        log.info("%s: the target ties its head to the embedding: the donor's head is left out", method)
    if target.rope_theta != source.rope_theta:
        log.info("%s: rope_theta %s -> %s: positions rotate differently", method, source.rope_theta, target.rope_theta)
