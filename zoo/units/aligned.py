"""The donors of a zoo as units in common coordinates: the training data of the autoencoder and the diffusion."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from zoo.donors.donor import Donor
from zoo.donors.zoo import Zoo
from zoo.errors import UserError
from zoo.tensors import Metadata
from zoo.units.canonical import canonicalise
from zoo.units.decoder import Decoder, read_decoder
from zoo.units.residual_basis import Anchor, has_post_norms, make_anchor
from zoo.units.units import decoder_to_units, require_units


@dataclass(frozen=True)
class AlignedDonor:
    """One donor: `units` are float32 vectors [N, P, d] by kind in canonical, aligned coordinates."""

    name: str
    metadata: Metadata
    tokens: tuple[str, ...]
    units: dict[str, Tensor]
    facts: dict[str, Any] = field(default_factory=dict)


def token_strings(donor: Donor) -> tuple[str, ...]:
    """The token string of each row of the embedding. A row without one is named by its number, as `<row 7>`."""
    size = donor.blueprint.metadata.vocab if donor.blueprint.metadata else 0
    names = [f"<row {i}>" for i in range(size)]
    for token, i in (donor.vocabulary() or {}).items():
        if i < size:
            names[i] = token
    return tuple(names)


def is_last_checkpoint(facts: Mapping[str, Any]) -> bool:
    """Whether a donor is the last checkpoint of its run, as far as its facts say."""
    return facts.get("step") in (None, facts.get("steps"))


def recorded_loss(facts: Mapping[str, Any]) -> float | None:
    """The held-out loss in a donor's facts; None if it is missing or not finite."""
    loss = facts.get("loss")
    return float(loss) if isinstance(loss, (int, float)) and math.isfinite(loss) else None


Require = Callable[[Decoder, str], object]  # raises UserError for a decoder that cannot be used; a name for messages


def read_donor_decoder(
    donor: Donor, device: str = "cpu", lazy: bool = False, require: Require = require_units
) -> Decoder:
    """A donor as a float64 decoder. Raises UserError if units do not describe its whole function.

    lazy: a layer is read each time it is used, and does not stay in memory. require: another check than that."""

    def read(name: str) -> Tensor:
        return donor.read(name).to(device)

    decoder = read_decoder(donor.blueprint, read, where=donor.name, lazy=lazy)
    require(decoder, donor.name)
    return decoder


@dataclass(frozen=True)
class AlignedDecoder:
    """One donor as a decoder in canonical, aligned coordinates: float64, with lazy layers."""

    donor: Donor
    tokens: tuple[str, ...]
    decoder: Decoder
    basis: Tensor  # [d, d]: `canonicalise` with this basis makes the decoder again


def align_decoders(
    zoo: Zoo, quiet: bool = True, device: str = "cpu", require: Require = require_units
) -> Iterator[AlignedDecoder]:
    """Yields the donors whose whole function is in units, aligned to the widest one by shared token strings. require:
    another check than that.

    The widest comes first; among equals, the one with the lowest loss, then the first by name. A donor that shares no
    token string with it keeps its own principal axes. So does one with norms after its writers, to which no other is
    aligned. Other donors are skipped and, unless `quiet`, named on stderr.

    In memory are the vocabularies of one donor, before and after its rotation, and of the anchor, and one layer of the
    donor. Raises UserError if no donor is left."""

    def order(donor: Donor) -> tuple[float, float, str]:
        width = donor.blueprint.metadata.width if donor.blueprint.metadata else 0
        loss = recorded_loss(donor.facts)
        return (-width, float("inf") if loss is None else loss, donor.name)

    anchor: Anchor | None = None
    found_any = False
    donors = sorted(zoo.donors, key=order)
    for donor in donors:
        tokens = token_strings(donor)
        try:
            shares_tokens = anchor is not None and not set(tokens).isdisjoint(anchor.tokens)
            source = read_donor_decoder(donor, device, lazy=True, require=require)
            canonical = canonicalise(source, tokens, anchor if shares_tokens else None)
            decoder, basis = canonical.decoder, canonical.symmetry.basis
            del source, canonical  # the vocabulary before its rotation
        except UserError as error:
            _report_skipped(error, quiet)
            continue
        if anchor is None and donor is not donors[-1] and not has_post_norms(decoder):
            anchor = make_anchor(decoder, tokens)
        found_any = True
        yield AlignedDecoder(donor, tokens, decoder, basis)
    if not found_any:
        usable = "an RMSNorm decoder with rotary attention and a gated MLP"
        usable = usable if require is require_units else "a decoder whose whole function is in tables"
        raise UserError(f"{zoo.path}: no donor is {usable}; add one")


def _report_skipped(error: UserError, quiet: bool) -> None:
    if not quiet:
        print(f"skipped: {error}", file=sys.stderr)


def align_donors(zoo: Zoo, quiet: bool = True) -> Iterator[AlignedDonor]:
    """The donors of `align_decoders` as units. Each is in memory in float32 while it is used."""
    for found in align_decoders(zoo, quiet):
        try:
            units = decoder_to_units(found.decoder, torch.float32)
        except UserError as error:
            _report_skipped(error, quiet)
            continue
        vectors = {kind: unit.vectors for kind, unit in units.items()}
        yield AlignedDonor(found.donor.name, found.decoder.metadata, found.tokens, vectors, found.donor.facts)
