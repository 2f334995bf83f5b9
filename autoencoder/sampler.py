"""The method `autoencoder`: a donor, encoded to its latents and decoded at the target's shape. It reads no text and
draws no random number, so it shows what encoding and decoding alone give: the ceiling of the diffusion."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from autoencoder.donors import TrainingDonor, read_training_donors
from autoencoder.field import Latents
from autoencoder.loading import load_autoencoder
from autoencoder.model import WeightAutoencoder
from autoencoder.objective import encode_donor
from zoo.donors.donor import size_gap
from zoo.donors.zoo import Zoo
from zoo.errors import UserError, unknown
from zoo.options import option
from zoo.sampler import Sampler
from zoo.targets.blueprint import Blueprint
from zoo.tensors import Metadata
from zoo.units.decoder import write_decoder
from zoo.units.family import family_of, require_served, require_target_family
from zoo.units.tables import to_checkpoint
from zoo.vocabularies.build import DEFAULT_RULE, RULES, VOCABULARY_HELP, build_row_map, match_vocabularies
from zoo.vocabularies.tokens import Tokens, read_tokens

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class AutoencoderSampler(Sampler):
    """Takes a donor's latents and decodes them at the target's shape."""

    name: ClassVar[str] = "autoencoder"
    family: ClassVar[str] = "generative"
    summary: ClassVar[str] = "a donor's latents, decoded at the target's shape"
    reference: ClassVar[str] = "autoencoder/README.md"
    needs: ClassVar[tuple[str, ...]] = ("donor", "model")
    choices: ClassVar[dict[str, tuple[str, ...]]] = {"vocabulary": RULES}

    donor: str | None = option(None, "donor's name; none: by shared tokens (most first), lowest loss, nearest size")
    model: str | None = option(None, "folder of an autoencoder, or of a pipeline, which contains one")
    tokenizer: str | None = option(
        None, "the target's tokenizer (folder or tokenizer.json), to match tokens by their strings"
    )
    vocabulary: str = option(DEFAULT_RULE, VOCABULARY_HELP)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._latents: Latents | None = None
        self._donor: str | None = None
        self._autoencoder: WeightAutoencoder | None = None

    @property
    def donors(self) -> tuple[str, ...]:
        return () if self._donor is None else (self._donor,)

    def planned_donors(self, zoo: Zoo | None, blueprint: Blueprint) -> tuple[str, ...]:
        return tuple(d.name for d in zoo.donors) if zoo is not None else ()

    def provenance(self, zoo: Zoo | None) -> list[dict[str, Any]]:
        """The donor, and the donors in the autoencoder's training data."""
        assert self._autoencoder is not None
        of_autoencoder = list(self._autoencoder.config["donors"] or [])
        own = super().provenance(zoo)
        return own + [d for d in of_autoencoder if d["sha256"] not in {o["sha256"] for o in own}]

    def details(self, blueprint: Blueprint) -> dict[str, Any]:
        """Under `family`: what the target has and no donor has."""
        assert self._autoencoder is not None
        target = require_target_family(blueprint, "target")
        notes = require_served(family_of(target), self._autoencoder.sizes.families, self.name)
        return {"family": notes} if notes else {}

    def _load(self) -> WeightAutoencoder:
        if self.model is None:
            raise UserError(
                "autoencoder: needs a trained autoencoder; give one with --model (`headstart train autoencoder`)"
            )
        return load_autoencoder(self.model)

    def _tokens(self) -> Tokens | None:
        return None if self.tokenizer is None else read_tokens(self.tokenizer)

    def fit(self, zoo: Zoo | None, blueprint: Blueprint) -> Self:
        target = require_target_family(blueprint, "target")
        self._autoencoder = self._load()
        for line in require_served(family_of(target), self._autoencoder.sizes.families, self.name):
            log.warning("%s: %s", self.name, line)
        if zoo is None:
            raise UserError("autoencoder: needs a donor; give --zoo, or --donor with a folder or a hub id")
        if self.donor is not None and self.donor not in {d.name for d in zoo.donors}:
            raise unknown("donor", self.donor, (d.name for d in zoo.donors))
        donors, strings = read_training_donors(zoo, quiet=True)
        if self._tokens() is None and target.vocab != len(self._autoencoder.token_strings):
            raise UserError(
                f"autoencoder: the target's vocabulary has {target.vocab} tokens, the autoencoder's has "
                f"{len(self._autoencoder.token_strings)}; give the target's --tokenizer"
            )
        known = self._autoencoder.sizes.families
        chosen = [d for d in donors if self.donor in (None, d.name) and d.family in known]
        if not chosen:
            which = "no donor of the zoo" if self.donor is None else f"the donor {self.donor}"
            raise UserError(f"autoencoder: it cannot encode {which}; use a donor of a family that it was trained on")
        best = min(chosen, key=lambda d: (d.family != family_of(target), self._rank(d, strings, zoo, blueprint)))
        self._donor = best.name
        with torch.no_grad():
            self._latents = encode_donor(self._autoencoder, best)
        return self

    def _rank(
        self, donor: TrainingDonor, strings: tuple[str, ...], zoo: Zoo, blueprint: Blueprint
    ) -> tuple[float, float, float, str]:
        """A sort key, the best donor first."""
        tokens, target = self._tokens(), blueprint.metadata
        assert target is not None
        known = 1.0
        if tokens is not None:
            own = Tokens.of_strings({strings[row]: i for i, row in enumerate(donor.rows.tolist())})
            rows = match_vocabularies(own, tokens, len(donor.rows), target.vocab, self.vocabulary)
            known = round((rows >= 0).double().mean().item(), 1)
        loss = math.inf if donor.loss is None else donor.loss
        return -known, loss, size_gap(zoo.donor(donor.name), blueprint), donor.name

    def sample(self, blueprint: Blueprint, seed: int = 0) -> Iterator[tuple[str, Tensor]]:
        """The seed changes nothing: no random number is drawn."""
        if self._latents is None or self._autoencoder is None:
            raise RuntimeError("autoencoder: call fit before sample")
        target = require_target_family(blueprint, "target")
        coder = self._autoencoder.to(torch.device(self.device))
        latents = self._latents.to(coder.device)
        pairs = target_pairs(coder, target, latents, self._tokens(), self.vocabulary)
        decoder = coder.decode(target, latents, pairs)
        yield from write_decoder(to_checkpoint(decoder, target.tied), blueprint)

    @classmethod
    def current_options(cls, saved: dict[str, Any]) -> dict[str, Any]:
        """Samplers that were saved before there was a choice match equal strings only."""
        return {"vocabulary": "strings", **saved}

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        if self._latents is None:
            return {}, {}
        return {"donor": self._donor}, {"model": self._latents.model, "blocks": self._latents.blocks}

    def restore(self, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self._autoencoder = self._load()
        self._donor = values["donor"]
        self._latents = Latents(tensors["model"], tensors["blocks"])


def target_pairs(
    autoencoder: WeightAutoencoder, target: Metadata, latents: Latents, tokens: Tokens | None, rule: str
) -> Tensor:
    """The vocabulary pairs of a target, [V, 2, d]. tokens: the target's; None if it has the autoencoder's vocabulary.

    rule: how tokens that the autoencoder does not know are composed (`zoo.vocabularies.build.RULES`)."""
    pairs = autoencoder.token_pairs(target, latents)
    if tokens is None:
        return pairs
    strings = autoencoder.token_strings
    known = Tokens.of_strings({token: i for i, token in enumerate(strings)})
    row_map = build_row_map(known, tokens, len(strings), target.vocab, rule)
    return row_map.apply(pairs, pairs.mean(0).expand(target.vocab, *pairs.shape[1:]))
