"""The donors of a zoo as units in common coordinates: the training data of the autoencoder and the diffusion."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping
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
from zoo.units.residual_basis import Anchor, make_anchor
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


def recorded_loss(facts: Mapping[str, Any]) -> float | None:
    """The held-out loss in a donor's facts; None if it is missing or not finite."""
    loss = facts.get("loss")
    return float(loss) if isinstance(loss, (int, float)) and math.isfinite(loss) else None


def read_donor_decoder(donor: Donor) -> Decoder:
    """A donor as a float64 decoder. Raises UserError if units do not describe its whole function."""
    decoder = read_decoder(donor.blueprint, donor.read, where=donor.name)
    require_units(decoder, donor.name)
    return decoder


def align_donors(zoo: Zoo, quiet: bool = True) -> Iterator[AlignedDonor]:
    """Yields the donors whose whole function is in units, aligned to the widest one by shared token strings.

    The widest comes first; among equals, the one with the lowest loss, then the first by name. A donor that shares no
    token string with it keeps its own principal axes. Other donors are skipped and, unless `quiet`, named on stderr.

    One donor at a time is in memory, in float64, besides the anchor's vocabulary. Raises UserError if none is left."""

    def order(donor: Donor) -> tuple[float, float, str]:
        width = donor.blueprint.metadata.width if donor.blueprint.metadata else 0
        loss = recorded_loss(donor.facts)
        return (-width, float("inf") if loss is None else loss, donor.name)

    anchor: Anchor | None = None
    for donor in sorted(zoo.donors, key=order):
        tokens = token_strings(donor)
        try:
            decoder = read_donor_decoder(donor)
            shares_tokens = anchor is not None and not set(tokens).isdisjoint(anchor.tokens)
            canonical = canonicalise(decoder, tokens, anchor if shares_tokens else None)
        except UserError as error:
            if not quiet:
                print(f"skipped: {error}", file=sys.stderr)
            continue
        if anchor is None:
            anchor = make_anchor(canonical.decoder, tokens)
        units = {kind: unit.vectors.to(torch.float32) for kind, unit in decoder_to_units(canonical.decoder).items()}
        yield AlignedDonor(donor.name, canonical.decoder.metadata, tokens, units, donor.facts)
    if anchor is None:
        raise UserError(f"{zoo.path}: no donor is an RMSNorm decoder with rotary attention and a gated MLP; add one")
