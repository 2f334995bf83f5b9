"""The method `autoencoder`: a donor, encoded and decoded. It shows what encoding and decoding alone keep of a donor."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from autoencoder.loading import load_autoencoder
from autoencoder.model import UnitAutoencoder
from zoo.donors.donor import size_gap
from zoo.donors.zoo import Zoo
from zoo.errors import UserError, unknown
from zoo.options import option
from zoo.sampler import Sampler
from zoo.targets.blueprint import Blueprint
from zoo.tensors import Metadata
from zoo.units.aligned import AlignedDonor, align_donors, recorded_loss
from zoo.units.decoder import write_decoder
from zoo.units.gains import tie_head
from zoo.units.resizing import principal_axes, project_to_axes, residual_energy, resize_units
from zoo.units.units import ROLES, require_unit_target, units_to_decoder
from zoo.vocabularies.build import DEFAULT_RULE, RULES, VOCABULARY_HELP, build_row_map, match_vocabularies
from zoo.vocabularies.tokens import Tokens, read_tokens


@dataclass(kw_only=True)
class AutoencoderSampler(Sampler):
    """Takes a donor's most important units (`resize_units`), encodes and decodes them."""

    name: ClassVar[str] = "autoencoder"
    family: ClassVar[str] = "generative"
    summary: ClassVar[str] = "what encoding and decoding alone keep of a donor's most important units"
    reference: ClassVar[str] = "autoencoder/README.md"
    needs: ClassVar[tuple[str, ...]] = ("donor", "model")
    choices: ClassVar[dict[str, tuple[str, ...]]] = {"vocabulary": RULES}

    donor: str | None = option(
        None, "donor's name; none: by shared tokens (most first), sufficient width, lowest loss, nearest size"
    )
    model: str | None = option(None, "folder of an autoencoder, or of a pipeline, which contains one")
    tokenizer: str | None = option(
        None, "the target's tokenizer (folder or tokenizer.json), to match tokens by their strings"
    )
    vocabulary: str = option(DEFAULT_RULE, VOCABULARY_HELP)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._source: AlignedDonor | None = None
        self._autoencoder: UnitAutoencoder | None = None

    @property
    def donors(self) -> tuple[str, ...]:
        return () if self._source is None else (self._source.name,)

    def planned_donors(self, zoo: Zoo | None, blueprint: Blueprint) -> tuple[str, ...]:
        return tuple(d.name for d in zoo.donors) if zoo is not None else ()

    def provenance(self, zoo: Zoo | None) -> list[dict[str, Any]]:
        """The donor, and the donors that the autoencoder was trained on."""
        of_autoencoder = self._autoencoder.config["donors"] or [] if self._autoencoder is not None else []
        own = super().provenance(zoo)
        return own + [d for d in of_autoencoder if d["sha256"] not in {o["sha256"] for o in own}]

    def _load(self) -> UnitAutoencoder:
        if self.model is None:
            raise UserError(
                "autoencoder: needs a trained autoencoder; give one with --model (`headstart train autoencoder`)"
            )
        return load_autoencoder(self.model)

    def _tokens(self) -> Tokens | None:
        return None if self.tokenizer is None else read_tokens(self.tokenizer)

    def fit(self, zoo: Zoo | None, blueprint: Blueprint) -> Self:
        target = require_unit_target(blueprint, "target")
        self._autoencoder = self._load()
        if zoo is None:
            raise UserError("autoencoder: needs a donor; give --zoo, or --donor with a folder or a hub id")
        if self.donor is not None and self.donor not in {d.name for d in zoo.donors}:
            raise unknown("donor", self.donor, (d.name for d in zoo.donors))
        tokens = self._tokens()
        reasons = []
        best: tuple[tuple[float, ...], AlignedDonor] | None = None
        for aligned in align_donors(zoo):
            if self.donor not in (None, aligned.name):
                continue
            problem = mismatch_reason(aligned.metadata, target, self.tokenizer)
            if problem:
                reasons.append(f"{aligned.name}: {problem}")
                continue
            known = round((copied_rows(aligned, target, tokens, self.vocabulary) >= 0).double().mean().item(), 1)
            narrower = max(0, target.width - aligned.metadata.width)
            loss = recorded_loss(aligned.facts)
            gap = size_gap(zoo.donor(aligned.name), blueprint)
            rank = (-known, narrower, math.inf if loss is None else loss, gap)
            if best is None or rank < best[0]:
                best = (rank, aligned)
        if best is None:
            why = "; ".join(reasons[:3]) or self.donor
            raise UserError(f"autoencoder: no donor fits the target ({why}); add one that does")
        self._source = best[1]
        return self

    def sample(self, blueprint: Blueprint, seed: int = 0) -> Iterator[tuple[str, Tensor]]:
        """The seed changes nothing: no random number is drawn."""
        if self._source is None or self._autoencoder is None:
            raise RuntimeError("autoencoder: call fit before sample")
        donor, target = self._source, blueprint.metadata
        assert target is not None
        units = {**donor.units, "vocab": vocabulary_units(donor, target, self._tokens(), self.vocabulary)}
        source = replace(donor.metadata, vocab=target.vocab)
        width = max(source.width, target.width)  # a narrower target is cut at the end, along its principal axes
        resized = resize_units(units, source, replace(target, width=width))
        device = torch.device(self.device)
        coder = self._autoencoder.to(device)
        with torch.no_grad():
            decoded = {
                kind: coder.decode(kind, *coder.encode(kind, resized[kind].to(device)), width).cpu() for kind in ROLES
            }
        if width > target.width:
            decoded = project_to_axes(decoded, principal_axes(residual_energy(decoded, target), target.width))
        decoder = units_to_decoder(decoded, target)
        yield from write_decoder(tie_head(decoder) if target.tied else decoder, blueprint)

    @classmethod
    def current_options(cls, saved: dict[str, Any]) -> dict[str, Any]:
        """Samplers that were saved before there was a choice match equal strings only."""
        return {"vocabulary": "strings", **saved}

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        if self._source is None:
            return {}, {}
        values = {"name": self._source.name, "metadata": vars(self._source.metadata), "tokens": self._source.tokens}
        return values, self._source.units

    def restore(self, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self._autoencoder = self._load()
        self._source = AlignedDonor(values["name"], Metadata(**values["metadata"]), tuple(values["tokens"]), tensors)


def mismatch_reason(donor: Metadata, target: Metadata, tokenizer: str | None) -> str | None:
    """Why a donor's units cannot fill the target; None if they can."""
    if donor.head_dim != target.head_dim:
        return f"its head_dim is {donor.head_dim}, the target's is {target.head_dim}"
    if donor.vocab != target.vocab and tokenizer is None:
        return f"its vocabulary has {donor.vocab} tokens, the target's {target.vocab}; give the target's --tokenizer"
    return None


def own_tokens(donor: AlignedDonor) -> Tokens:
    """The donor's tokens, of which only the strings are known."""
    return Tokens.of_strings({token: i for i, token in enumerate(donor.tokens)})


def copied_rows(donor: AlignedDonor, target: Metadata, tokens: Tokens | None, rule: str) -> Tensor:
    """The donor's row of the same token for each row of the target, int64 [V]; -1 if it has none.

    tokens: the target's; None if it has the donor's vocabulary. rule: one of `zoo.vocabularies.build.RULES`."""
    if tokens is None:
        return torch.arange(target.vocab)
    return match_vocabularies(own_tokens(donor), tokens, len(donor.tokens), target.vocab, rule)


def vocabulary_units(donor: AlignedDonor, target: Metadata, tokens: Tokens | None, rule: str) -> Tensor:
    """The donor's vocabulary pairs for the target's tokens, [V, P, d]; the mean pair for tokens without a counterpart.

    tokens, rule: as for `copied_rows`."""
    pairs = donor.units["vocab"]
    if tokens is None:
        return pairs[: target.vocab]
    row_map = build_row_map(own_tokens(donor), tokens, len(donor.tokens), target.vocab, rule)
    return row_map.apply(pairs, pairs.mean(0).expand(target.vocab, *pairs.shape[1:]))
