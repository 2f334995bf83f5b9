"""Slicing: a donor rotated to the principal axes of its residual stream and cut to the target's sizes (2401.15024)."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from baselines.calibration import calibration_windows, load_model, observe_inputs, run_windows
from baselines.transfer.base import Transfer
from baselines.transfer.donor_choice import DonorRequest, choose_donor
from baselines.transfer.index_rules import even_layers
from baselines.transfer.shrinking.base import drop_middle_layers
from baselines.transfer.vocabulary import VocabularyRows, vocabulary_rows
from zoo.donors.donor import Donor, dissimilarity
from zoo.donors.zoo import Zoo
from zoo.errors import UserError
from zoo.linear_algebra import descending_order, symmetric_eigenvectors
from zoo.options import option
from zoo.streams import stream
from zoo.targets.architectures import ARCHITECTURES
from zoo.targets.blueprint import Blueprint
from zoo.tensors import Metadata
from zoo.training.documents import TextSource
from zoo.units.canonical import canonicalise
from zoo.units.decoder import READERS, Decoder, Layer, read_decoder, require_decoder, write_decoder
from zoo.units.gains import tie_head
from zoo.units.lazy import map_items, select_items

log = logging.getLogger(__name__)

CHOICES: dict[str, tuple[str, ...]] = {
    "axes": ("auto", "weights", "activations"),
    "layers": ("middle", "first", "even"),
    "tie": ("coordinates", "fit", "refuse"),
}


@dataclass(kw_only=True)
class Sliced(Transfer):
    """Rotates a donor to the principal axes of its residual stream and keeps the first coordinates (2401.15024).

    The donor is brought into canonical form (gains folded, one global rotation). The target gets its first coordinates,
    and per layer the KV groups and neurons of highest energy. Matrices that read the narrower stream are multiplied by
    sqrt(n_source / n_target), because RMSNorm divides by the root of the width. A target of the donor's sizes computes
    the donor's function. This is exact for RMSNorm with an untied head.

    The axes are those of the weights, or, given a text, those of the states before the norms, each of unit RMS, as in
    the paper. Our choice: one basis serves all blocks. The paper rotates every block to its own axes and stores the
    changes of basis as extra matrices, which no architecture has a place for. With post-norms (Gemma 2 and 3, OLMo 2)
    only the order of the coordinates is free, and those of highest energy come first. The paper's least-squares
    compensation of o and down is left out.

    A tied target keeps the donor's own coordinates, those of highest energy first, because a rotated final gain fits no
    tied head. A tied donor in a tied target of its sizes then stays exact. The cost: without a rotation a narrower
    target loses more. On SmolLM2 135M, from 576 to 540 wide with a text, it is 0.2 nats per token. `tie=fit` rotates
    and fits the gain by least squares, which costs 4 nats there, and 3.5 nats at the donor's own sizes.

    Refused: a LayerNorm donor, a larger axis, another head_dim, and with `tie=refuse` a tied target.

    Memory: the donor's embedding and head in float64, before and after the rotation, and one layer three times over.
    With a text, the whole donor in float32 while its activations are measured.
    """

    name: ClassVar[str] = "sliced"
    family: ClassVar[str] = "pruning"
    summary: ClassVar[str] = "a larger RMSNorm donor, rotated to its principal axes and cut to their first"
    reference: ClassVar[str] = "2401.15024"
    choices: ClassVar[dict[str, tuple[str, ...]]] = CHOICES

    axes: str = option(
        "auto", "principal axes of the weights or the activations; auto: activations where there is a text"
    )
    text: str | None = option(None, "text, a folder or a data set to measure activations on")
    split: str | None = option(None, "split of a data set; none: train")
    text_column: str | None = option(None, "column of a data set; none: text")
    windows: int = option(
        64, "calibration windows of 256 tokens, read from the start of the text", least=1, most=1_000_000
    )
    layers: str = option("middle", "which layers go: middle, or even (spaced); first: the first layers stay")
    tie: str = option(
        "coordinates",
        "for a target with a tied head: coordinates (the donor's own, without a rotation), fit (rotated; least squares "
        "give the final gain, which is not exact), or refuse",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._basis: Tensor | None = None  # [d, d], for the axes of the activations

    def planned_donors(self, zoo: Zoo | None, blueprint: Blueprint) -> tuple[str, ...]:
        donor = self._choose(zoo, blueprint)
        self._calibration(donor)
        return (donor.name,)

    def fit(self, zoo: Zoo | None, blueprint: Blueprint) -> Self:
        donor = self._choose(zoo, blueprint)
        windows = self._calibration(donor)
        self._source = donor
        self.log_plan(blueprint)
        self.warn_about_head(blueprint)
        rotates = self._rotates(blueprint)
        self._basis = None if windows is None else activation_basis(donor, windows, self.device, rotates)
        return self

    def _calibration(self, donor: Donor) -> Tensor | None:
        """The calibration windows, int64 [B, S]; None for the axes of the weights."""
        if self.axes == "weights" or (self.axes == "auto" and self.text is None):
            return None
        if self.text is None:
            raise UserError("sliced: axes=activations needs a text: give a UTF-8 file with --set text=FILE")
        source = TextSource(self.text, self.split, self.text_column)
        return calibration_windows(source, donor, self.tokenizer, self.windows, self.name)

    def sample(self, blueprint: Blueprint, seed: int = 0) -> Iterator[tuple[str, Tensor]]:
        """Only the rows of tokens that the donor does not have are random."""
        donor, target = self.source, blueprint.metadata
        assert target is not None and donor.blueprint.metadata is not None
        rows = self.vocabulary_rows(blueprint)
        basis = None if self._basis is None else self._basis.to(self.device)
        layers = select_layers(self.layers, donor.blueprint.metadata.layers, target.layers)
        canonical = self._canonical(donor, basis, self._rotates(blueprint))
        small = _map_vocabulary(cut_decoder(canonical, target, layers), rows, seed)
        small = tie_head(small) if target.tied else small
        has_head = donor.blueprint.has_head or self.head == "embedding"
        for name, tensor in write_decoder(small, blueprint):
            if has_head or blueprint[name].role != "head":
                yield name, tensor.to("cpu", torch.float32)

    def _rotates(self, blueprint: Blueprint) -> bool:
        return self.tie == "fit" or not (blueprint.metadata and blueprint.metadata.tied)

    def _canonical(self, donor: Donor, basis: Tensor | None, rotates: bool) -> Decoder:
        """The donor in canonical form on the device, with lazy layers."""

        def read(name: str) -> Tensor:
            return donor.read(name).to(self.device)

        decoder = read_decoder(donor.blueprint, read, where=donor.name, copy_head=True, lazy=True)
        return canonicalise(decoder, basis=basis, rotates=rotates).decoder

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return super().state()[0], {} if self._basis is None else {"basis": self._basis}

    def restore(self, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        super().restore(values, tensors)
        self._basis = tensors.get("basis")

    def _choose(self, zoo: Zoo | None, blueprint: Blueprint) -> Donor:
        """The donor that is asked for, or of those that fit the nearest in size, with the same tokenizer if possible.

        Raises UserError where the donor (or none) fits. Reads configs only.
        """
        target = require_decoder(blueprint, "target")
        if zoo is None or not zoo.donors:
            raise UserError(f"{self.name} needs a donor: give --zoo DIR, or --donor FOLDER")
        if target.tied and self.tie == "refuse":
            raise UserError(
                "sliced: the target ties its head to its embedding, which no rotated final gain fits: set "
                "tie_word_embeddings to false, or use --set tie=coordinates, or the method pruning"
            )
        fitting: list[tuple[bool, float, str]] = []
        refused: list[tuple[bool, float, str]] = []
        for donor in [zoo.donor(self.donor)] if self.donor is not None else zoo.donors:
            other, distance = dissimilarity(donor, blueprint)
            try:
                require_sliceable(donor, target)
                choose_donor(zoo, blueprint, DonorRequest(self.name, donor.name, self.tokenizer, self.vocabulary))
                same = vocabulary_rows(donor, blueprint, self.tokenizer, self.vocabulary).same_tokenizer
                fitting.append((not same, distance, donor.name))
            except UserError as error:
                refused.append((other, distance, str(error)))
        if not fitting:
            others = f" ({len(refused)} donors, none fits)" if len(refused) > 1 else ""
            raise UserError(min(refused)[-1] + others)
        return zoo.donor(min(fitting)[2])


def require_sliceable(donor: Donor, target: Metadata) -> None:
    """Raises UserError where a donor cannot be rotated or is too small; the message names another method."""
    meta = require_decoder(donor.blueprint, donor.name)
    source_queries, target_queries = meta.heads // meta.kv_heads, target.heads // target.kv_heads
    sizes = [(axis, getattr(meta, axis), getattr(target, axis)) for axis in ("width", "ffn", "kv_heads")]
    larger = next((f"{axis} {a} is smaller than the target's {b}" for axis, a, b in sizes if a < b), None)
    reason = (
        "it uses LayerNorm, whose mean allows no rotation of the stream: use pruning, subcloning or weight-selection"
        if meta.norm != "rms"
        else f"the symmetries of {meta.architecture!r} are not known: use pruning or weight-selection"
        if meta.architecture not in ARCHITECTURES
        else f"{larger}: use row-column or net2wider"
        if larger
        else f"its {source_queries} query heads per KV head are fewer than {target_queries}: use row-column"
        if source_queries < target_queries
        else f"its {meta.layers} layers are fewer than the target's {target.layers}: use stacking or row-column"
        if meta.layers < target.layers
        else f"head_dim {meta.head_dim} is not the target's {target.head_dim}, and heads stay whole: set the "
        f"target's head_dim to {meta.head_dim}, or use weight-selection"
        if meta.head_dim != target.head_dim
        else None
    )
    if reason:
        raise UserError(f"sliced: donor {donor.name!r} does not fit the target: {reason}")


def select_layers(rule: str, n_source: int, n_target: int) -> tuple[int, ...]:
    """The donor's layer for each layer of the target: `middle` drops those in the middle, `first` keeps the first."""
    if rule == "even":
        return even_layers(n_source, n_target)
    return tuple(range(n_target)) if rule == "first" else drop_middle_layers(n_source, n_target)


def cut_decoder(decoder: Decoder, target: Metadata, layers: tuple[int, ...]) -> Decoder:
    """Cuts a canonical decoder to the target's sizes, but for the vocabulary.

    The first coordinates, KV groups, query heads of each group, and neurons stay. Layer i of the target is layers[i].
    """
    meta, width = decoder.metadata, target.width
    root = math.sqrt(meta.width / width)
    source_queries, target_queries = meta.heads // meta.kv_heads, target.heads // target.kv_heads
    groups = torch.arange(target.kv_heads)
    heads = (groups[:, None] * source_queries + torch.arange(target_queries)).flatten()
    units: dict[str, Any] = {"q": heads, "o": heads, "k": groups, "v": groups}
    units |= dict.fromkeys(("gate", "up", "down"), slice(target.ffn))

    def cut_layer(layer: Layer) -> Layer:
        weights: dict[str, Any] = {}
        for role, index in units.items():
            w = getattr(layer, role)
            weights[role] = None if w is None else w[index][..., :width] * (root if role in READERS else 1.0)
        bias = {r: b[:width] if r in ("o", "down") else b[units[r]] for r, b in layer.bias.items()}
        gain = {site: g[:width] for site, g in layer.gain.items() if site not in ("q", "k")}
        # A norm after a writer then gives the kept coordinates the mean square of the narrower stream.
        gain |= {site: gain[site] * root for site in ("attn.out", "mlp.out") if site in gain}
        for site, index in (("q", heads), ("k", groups)):
            if site in layer.gain:  # one gain for all heads, or one per head
                g = layer.gain[site]
                gain[site] = g if len(g) == meta.head_dim else g.unflatten(0, (-1, meta.head_dim))[index].flatten()
        return replace(layer, **weights, bias=bias, gain=gain)

    scale = meta.embed_scale / target.embed_scale
    return replace(
        decoder,
        metadata=replace(target, vocab=meta.vocab, tied=False),
        embed=decoder.embed[:, :width] * scale,
        head=decoder.head[:, :width] * root,
        positions=None if decoder.positions is None else decoder.positions[: target.positions, :width],
        layers=map_items(cut_layer, select_items(decoder.layers, layers)),
        gain={site: g[:width] for site, g in decoder.gain.items()},
    )


def _map_vocabulary(decoder: Decoder, rows: VocabularyRows, seed: int) -> Decoder:
    """The decoder with the target's vocabulary.

    A token that is neither copied nor composed gets normal rows, with the mean and standard deviation of each column.
    """
    n_target = len(rows.index)

    def map_rows(table: Tensor, name: str) -> Tensor:
        if bool((rows.index >= 0).all()):
            return rows.apply(table, table.new_zeros(()))
        draws = torch.randn((n_target, *table.shape[1:]), generator=stream(seed, f"sliced/{name}"), device="cpu")
        return rows.apply(table, table.mean(0) + table.std(0, correction=0) * draws.to(table))

    bias = None if decoder.head_bias is None else map_rows(decoder.head_bias, "head bias")
    metadata = replace(decoder.metadata, vocab=n_target)
    embed, head = map_rows(decoder.embed, "embed"), map_rows(decoder.head, "head")
    return replace(decoder, metadata=metadata, embed=embed, head=head, head_bias=bias)


def activation_basis(donor: Donor, windows: Tensor, device: str, rotates: bool = True) -> Tensor:
    """[d, d] float64 on the CPU: the principal axes of the residual states before the norms, each of unit RMS.

    windows: int64 [B, S]. With post-norms, which allow no rotation, or without `rotates`, these are the coordinates in
    the order of their energy.
    """
    blueprint = donor.blueprint
    assert blueprint.metadata is not None
    total = torch.zeros(blueprint.metadata.width, blueprint.metadata.width, dtype=torch.float64, device=device)

    def add_states(x: Tensor) -> None:
        x = x.flatten(0, -2).double()
        x = x / x.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-12)
        total.addmm_(x.mT, x)

    norms = [spec.name for spec, _ in blueprint.find("norm") if spec.site in ("attn", "mlp", "final")]
    model = load_model(donor, device)
    with observe_inputs(model, dict.fromkeys(norms, add_states)):
        run_windows(model, windows)
    if not rotates or blueprint.find("norm", site="attn.out") or blueprint.find("norm", site="mlp.out"):
        order = descending_order(total.diagonal()).cpu()
        return torch.eye(len(order), dtype=torch.float64)[:, order].contiguous()
    return symmetric_eigenvectors(total)[1].cpu().contiguous()
