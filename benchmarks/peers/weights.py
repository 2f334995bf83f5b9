"""Donors as the peers see them: named tensors, raw or in canonical coordinates, and back to checkpoints.

`raw`: as stored. `canonical`: after the exact symmetries of `zoo.units.canonical`, aligned across donors, the head
untied and the readers times sqrt(width), as `zoo.units.units` keeps them. Both peers read and write through this
module, so one option decides which coordinates they get.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from zoo.donors.donor import Donor, provenance
from zoo.donors.zoo import Zoo
from zoo.errors import UserError
from zoo.targets.blueprint import Blueprint
from zoo.tensors import Metadata, TensorSpec
from zoo.units.aligned import AlignedDonor, align_donors, recorded_loss
from zoo.units.decoder import Decoder, read_decoder, write_decoder
from zoo.units.gains import tie_head
from zoo.units.units import require_unit_target, units_to_decoder

COORDINATES = ("raw", "canonical")
READERS = {"head", "attn.q", "attn.k", "attn.v", "mlp.gate", "mlp.up"}


@dataclass(frozen=True)
class Weights:
    """A donor: float32 tensors by name, in the order of the blueprint's specs, and the blueprint that they fill."""

    name: str
    blueprint: Blueprint
    tensors: Mapping[str, Tensor]
    loss: float | None

    @property
    def metadata(self) -> Metadata:
        assert self.blueprint.metadata is not None
        return self.blueprint.metadata


def stored_tensors(donor: Donor) -> dict[str, Tensor]:
    """All of a donor's tensors as stored, float32."""
    return {spec.name: donor.read(spec.name).float() for spec in donor.blueprint.specs}


def read_weights(zoo: Zoo, coordinates: str = "raw", quiet: bool = True) -> list[Weights]:
    """The donors that fit a Llama-like target, all in memory; the others are named on stderr. UserError without any."""
    if coordinates == "canonical":
        return [to_canonical(aligned, zoo.donor(aligned.name)) for aligned in align_donors(zoo, quiet)]
    found = []
    for donor in zoo.donors:
        try:
            require_unit_target(donor.blueprint, donor.name)
        except UserError as error:
            if not quiet:
                print(f"left out: {error}", file=sys.stderr)
            continue
        found.append(Weights(donor.name, donor.blueprint, stored_tensors(donor), recorded_loss(donor.facts)))
    if not found:
        raise UserError(f"{zoo.path}: no donor is an RMSNorm decoder with rotary attention and a gated MLP; add one")
    return found


def to_canonical(aligned: AlignedDonor, donor: Donor) -> Weights:
    """A donor in canonical coordinates."""
    return canonical_weights(units_to_decoder(dict(aligned.units), aligned.metadata), donor)


def canonical_weights(decoder: Decoder, donor: Donor) -> Weights:
    """A canonical decoder as the peers see it, under the name of a donor of its shape."""
    blueprint = learned_blueprint(donor.blueprint, "canonical")
    tensors = dict(_scale_readers(write_decoder(decoder, blueprint), blueprint, 1))
    return Weights(donor.name, blueprint, tensors, recorded_loss(donor.facts))


def untie(blueprint: Blueprint) -> Blueprint:
    """The blueprint with a head of its own."""
    if not blueprint.ties:
        return blueprint
    assert blueprint.config is not None
    return Blueprint.from_config(blueprint.config | {"tie_word_embeddings": False})


def learned_blueprint(blueprint: Blueprint, coordinates: str) -> Blueprint:
    """The tensors that a peer learns and fills: all, or in canonical coordinates an untied head and no norms, because
    their gains are one there. `to_checkpoint` turns them into the tensors of the blueprint."""
    if coordinates == "raw":
        return blueprint
    loose = untie(blueprint)
    return replace(loose, specs=tuple(spec for spec in loose.specs if spec.role != "norm"))


def to_checkpoint(
    tensors: Iterable[tuple[str, Tensor]], blueprint: Blueprint, coordinates: str
) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of `learned_blueprint(blueprint)` -> (name, tensor) of the blueprint. A tied target in canonical
    coordinates gets the embedding and the final gain of `zoo.units.gains.tie_head`."""
    if coordinates == "raw":
        yield from tensors
        return
    loose = untie(blueprint)
    ones = ((spec.name, torch.ones(spec.shape)) for spec in loose.specs if spec.role == "norm")
    plain = _scale_readers(itertools.chain(tensors, ones), loose, -1)
    if loose is blueprint:
        yield from plain
        return
    held = dict(plain)
    yield from write_decoder(tie_head(read_decoder(loose, held.__getitem__, where="target")), blueprint)


def _scale_readers(
    tensors: Iterable[tuple[str, Tensor]], blueprint: Blueprint, power: int
) -> Iterator[tuple[str, Tensor]]:
    assert blueprint.metadata is not None
    factor = math.sqrt(blueprint.metadata.width) ** power
    for name, tensor in tensors:
        yield name, tensor * factor if blueprint[name].role in READERS else tensor


@dataclass(frozen=True)
class Reconstruction:
    """A donor after an autoencoder: config and tensors of a checkpoint, the donor's own tensors in the same
    coordinates, and the count of numbers that the autoencoder kept."""

    config: dict[str, Any]
    tensors: Mapping[str, Tensor]
    own: Mapping[str, Tensor]
    numbers: int

    @property
    def error(self) -> float:
        """Root of sum |rebuilt - own|^2 / sum |own|^2 over all matrices."""
        own = {name: t.double() for name, t in self.own.items() if t.ndim > 1}
        wrong = sum(float((self.tensors[name] - t).square().sum()) for name, t in own.items())
        return math.sqrt(wrong / sum(float(t.square().sum()) for t in own.values()))

    @property
    def rate(self) -> float:
        """Numbers in the donor's matrices per number kept."""
        return sum(t.numel() for t in self.own.values() if t.ndim > 1) / self.numbers


def make_reconstruction(weights: Weights, made: Mapping[str, Tensor], numbers: int, coordinates: str) -> Reconstruction:
    """made: the donor's tensors after the autoencoder."""
    assert weights.blueprint.config is not None
    loose = Blueprint.from_config(weights.blueprint.config)
    tensors, own = (dict(to_checkpoint(t.items(), loose, coordinates)) for t in (made, weights.tensors))
    return Reconstruction(weights.blueprint.config, tensors, own, numbers)


def fit_pca_reconstruction(rows: Tensor, size: int) -> Callable[[Tensor], Tensor]:
    """Fits a PCA of [N, D] with `size` components and returns the function that projects any [M, D] onto it. An
    autoencoder with a larger error at the same rate has not learned its data."""
    data = rows.double()
    mean = data.mean(0)
    axes = torch.linalg.eigh((data - mean).T @ (data - mean)).eigenvectors.flip(-1)[:, :size]
    return lambda x: (((x.double() - mean) @ axes) @ axes.T + mean).float()


def provenance_records(zoo: Zoo, weights: Iterable[Weights]) -> list[dict[str, Any]]:
    """Name, revision, hash and licence of the donors that a peer learned from."""
    return [provenance(zoo.donor(w.name)) for w in weights]


def depth_third(spec: TensorSpec, layers: int) -> str:
    """Whether a tensor belongs to the first, a middle or the last layer, or to none. Tensors of one role and third
    share statistics across models."""
    if spec.layer is None:
        return "outside"
    return ("first", "middle", "last")[0 if spec.layer == 0 else 2 if spec.layer == layers - 1 else 1]


def layer_at_same_depth(index: int, layers: int, of: int) -> int:
    """The layer of a model of depth `of` at the relative depth of layer `index` of `layers`."""
    return 0 if layers == 1 else round(index * (of - 1) / (layers - 1))
