"""The bank: the donors of a zoo in canonical, aligned coordinates. A block is read from disk each time it is used."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from baselines.transfer.vocabulary import vocabulary_rows
from zoo.donors.donor import Donor
from zoo.donors.folder import donor_ref, open_ref
from zoo.donors.zoo import Zoo
from zoo.errors import UserError
from zoo.targets.blueprint import Blueprint
from zoo.tensors import Metadata
from zoo.units.aligned import AlignedDecoder, align_decoders, read_donor_decoder, recorded_loss
from zoo.units.canonical import canonicalise
from zoo.units.decoder import Decoder, Layer
from zoo.units.resizing import to_width
from zoo.units.units import layer_to_units, require_unit_target, vocabulary_to_units
from zoo.words import shortened_list

log = logging.getLogger(__name__)

PROBED_TOKENS = 1024  # tokens by which the vocabularies of two donors are compared


@dataclass(frozen=True)
class BankDonor:
    """A donor whose blocks are read in canonical, aligned coordinates."""

    donor: Donor
    basis: Tensor  # [d, d] float64: the rotation of its residual stream
    layers: Sequence[Layer]  # lazy
    metadata: Metadata
    loss: float | None  # the recorded held-out loss

    @classmethod
    def of_decoder(cls, donor: Donor, basis: Tensor, decoder: Decoder) -> BankDonor:
        """Keeps no vocabulary."""
        return cls(donor, basis, decoder.layers, decoder.metadata, recorded_loss(donor.facts))

    @classmethod
    def of_basis(cls, donor: Donor, basis: Tensor, device: str) -> BankDonor:
        """The donor in the coordinates of a basis that was found before."""
        return cls.of_decoder(donor, basis, _canonical_decoder(donor, basis, device))

    def block(self, index: int) -> dict[str, Tensor]:
        """The units of a block by kind, float32 vectors [N, P, d]."""
        return {kind: vectors.float() for kind, vectors in layer_to_units(self.layers[index], self.metadata).items()}

    def vocabulary(self) -> Tensor:
        """The vocabulary pairs, float32 [V, 2, d]; the donor's embedding and head are read again."""
        decoder = _canonical_decoder(self.donor, self.basis, str(self.basis.device))
        return vocabulary_to_units(decoder, torch.float32)


def _canonical_decoder(donor: Donor, basis: Tensor, device: str) -> Decoder:
    return canonicalise(read_donor_decoder(donor, device, lazy=True), basis=basis.to(device)).decoder


@dataclass(frozen=True)
class Bank:
    """Donors in common coordinates."""

    members: tuple[BankDonor, ...] = ()
    disagreement: Tensor = field(default_factory=lambda: torch.zeros(0, 0))  # [D, D]: of the vocabularies, see below

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What a saved sampler keeps, for `open_bank`."""
        bases = {f"basis {i}": member.basis.cpu() for i, member in enumerate(self.members)}
        return {"donors": [donor_ref(member.donor) for member in self.members]}, {
            **bases,
            "disagreement": self.disagreement,
        }


@dataclass(frozen=True)
class BankRequest:
    """Which donors of a zoo may serve a target."""

    method: str  # for messages
    blueprint: Blueprint  # the target
    donor: str | None  # the only donor; None for all that fit
    tokenizer: str | None  # the target's
    vocabulary: str  # the rule for tokens that a donor does not have


def fitting_donors(zoo: Zoo | None, request: BankRequest) -> tuple[Donor, ...]:
    """The donors that can serve a target, by their configs and tokenizers. Reads no weights.

    Raises UserError with a reason where there is none, or where the target is of a family without units."""
    method = request.method
    if zoo is None or not zoo.donors:
        raise UserError(f"{method} needs donors: give --zoo DIR, or --donor FOLDER")
    target = require_unit_target(request.blueprint, f"{method}: the target")
    found, reasons = [], []
    for donor in [zoo.donor(request.donor)] if request.donor is not None else zoo.donors:
        try:
            source = require_unit_target(donor.blueprint, f"donor {donor.name!r}")
            if source.head_dim != target.head_dim:
                raise UserError(
                    f"donor {donor.name!r}: head_dim {source.head_dim} is not the target's {target.head_dim}, and heads"
                    f" stay whole; use a donor with head_dim {target.head_dim}, or the method row-column"
                )
            try:
                vocabulary_rows(donor, request.blueprint, request.tokenizer, request.vocabulary)
            except UserError as error:
                raise UserError(f"donor {donor.name!r}: {error}") from error
            found.append(donor)
        except UserError as error:
            reasons.append(str(error))
    if not found:
        others = f" ({len(reasons)} donors, none fits)" if len(reasons) > 1 else ""
        raise UserError(f"{method}: {reasons[0]}{others}")
    return tuple(found)


def fit_bank(zoo: Zoo, donors: Sequence[Donor], method: str, device: str) -> Bank:
    """Aligns donors. Reads each of them twice, one block at a time.

    Donors that cannot be read, or share no token with the widest one and so have other coordinates, are left out."""
    members: list[BankDonor] = []
    tables: list[dict[str, Tensor]] = []
    anchor: tuple[str, ...] = ()
    left_out = [donor.name for donor in donors]
    for found in align_decoders(Zoo.of_donors(donors, zoo.path), device=device):
        if anchor and set(anchor).isdisjoint(found.tokens):
            continue
        anchor = anchor or found.tokens
        members.append(BankDonor.of_decoder(found.donor, found.basis, found.decoder))
        tables.append(_probed_pairs(found, anchor))
        left_out.remove(found.donor.name)
    if left_out:
        names = shortened_list(left_out)
        log.warning("%s: left out, because damaged or without a token of %s: %s", method, members[0].donor.name, names)
    between = torch.tensor([[disagreement(a, b) for b in tables] for a in tables])
    return Bank(tuple(members), between)


def _probed_pairs(found: AlignedDecoder, anchor: tuple[str, ...]) -> dict[str, Tensor]:
    """Token string -> vocabulary pair, float32 [2, d] on the CPU, of some of the anchor's tokens."""
    probed = {anchor[i] for i in torch.linspace(0, len(anchor) - 1, min(PROBED_TOKENS, len(anchor))).long().tolist()}
    rows = [i for i, token in enumerate(found.tokens) if token in probed]
    pairs = torch.stack([found.decoder.embed[rows], found.decoder.head[rows]], dim=1).to("cpu", torch.float32)
    return {found.tokens[row]: pair for row, pair in zip(rows, pairs, strict=True)}


def disagreement(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """One minus the cosine between the vocabularies of two donors in common coordinates, over the tokens of both.

    It is 0 for the same vocabulary, and about 1 for donors that were trained independently. one, other: token string ->
    vocabulary pair [2, d]."""
    shared = sorted(set(one) & set(other))
    if not shared:
        return 1.0
    width = max(next(iter(table.values())).shape[-1] for table in (one, other))
    a, b = (to_width(torch.stack([table[token] for token in shared]), width) for table in (one, other))
    cosines = [torch.cosine_similarity(a[:, part].flatten(), b[:, part].flatten(), dim=0) for part in range(2)]
    return max(0.0, 1 - float(torch.stack(cosines).mean()))


def open_bank(values: Mapping[str, Any], tensors: Mapping[str, Tensor], method: str, device: str) -> Bank:
    """The bank of `Bank.state`. Raises UserError where a donor is gone or has changed."""
    members = [
        BankDonor.of_basis(open_ref(ref, method), tensors[f"basis {i}"].to(device), device)
        for i, ref in enumerate(values["donors"])
    ]
    return Bank(tuple(members), tensors["disagreement"])
