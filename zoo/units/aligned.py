"""The donors of a zoo as units in common coordinates: what the autoencoder and the diffusion learn from."""

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
    """Token string of every row of the embedding; rows beyond the tokenizer, or of a donor without one, are named by
    their number, which two donors share only if neither has a tokenizer."""
    size = donor.blueprint.metadata.vocab if donor.blueprint.metadata else 0
    names = [f"<row {i}>" for i in range(size)]
    for token, i in (donor.vocabulary() or {}).items():
        if i < size:
            names[i] = token
    return tuple(names)


def recorded_loss(facts: Mapping[str, Any]) -> float | None:
    """The held-out loss that a donor's trainer recorded, None where there is none or it is no finite number."""
    loss = facts.get("loss")
    return float(loss) if isinstance(loss, (int, float)) and math.isfinite(loss) else None


def read_donor_decoder(donor: Donor) -> Decoder:
    """The donor in float64. Raises UserError where its whole function is not in units."""
    decoder = read_decoder(donor.blueprint, donor.read, where=donor.name)
    require_units(decoder, donor.name)
    return decoder


def align_donors(zoo: Zoo, quiet: bool = True) -> Iterator[AlignedDonor]:
    """The donors whose whole function is in units (the others are named on stderr), aligned by shared token strings to
    the widest (of equals, the one of lowest loss, then the first by name), which comes first. A donor that shares no
    token string keeps its own principal axes.

    One donor is in memory at a time, in float64, besides the anchor's vocabulary. Raises UserError where no donor is
    left.
    """

    def rank(donor: Donor) -> tuple[float, float, str]:
        width = donor.blueprint.metadata.width if donor.blueprint.metadata else 0
        loss = recorded_loss(donor.facts)
        return (-width, float("inf") if loss is None else loss, donor.name)

    to: Anchor | None = None
    for donor in sorted(zoo.donors, key=rank):
        tokens = token_strings(donor)
        try:
            decoder = read_donor_decoder(donor)
            shared = to is not None and not set(tokens).isdisjoint(to.tokens)
            canonical = canonicalise(decoder, tokens, to if shared else None)
        except UserError as error:
            if not quiet:
                print(f"left out: {error}", file=sys.stderr)
            continue
        if to is None:
            to = make_anchor(canonical.decoder, tokens)
        units = {kind: unit.vectors.to(torch.float32) for kind, unit in decoder_to_units(canonical.decoder).items()}
        yield AlignedDonor(donor.name, canonical.decoder.metadata, tokens, units, donor.facts)
    if to is None:
        raise UserError(f"{zoo.path}: no donor is an RMSNorm decoder with rotary attention and a gated MLP; add one")
