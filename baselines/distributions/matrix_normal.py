"""Matrix normal draws: the donors' mean, and the covariances of their rows and of their columns."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from baselines.distributions.kronecker import (
    CHUNK,
    Covariance,
    FitRules,
    color_noise,
    covariance_factor,
    flip_flop,
    rescale_to_unit_rms,
)
from baselines.distributions.low_rank import LowRank
from baselines.transfer.vocabulary import (
    VocabularyRows,
    composed_rows,
    log_vocabulary,
    vocabulary_rows,
)
from zoo.checkpoints.atomic import scratch_folder
from zoo.donors.donor import Donor, dissimilarity
from zoo.donors.zoo import Zoo
from zoo.errors import UserError
from zoo.options import option
from zoo.sampler import Sampler
from zoo.streams import stream
from zoo.targets.blueprint import Blueprint
from zoo.tensors import Metadata
from zoo.units.aligned import align_decoders
from zoo.units.decoder import Decoder, Layer, write_decoder
from zoo.units.gains import tie_head
from zoo.units.lazy import LazySequence
from zoo.units.resizing import layer_map, resize_units, to_width
from zoo.units.units import (
    ROLES,
    layer_to_units,
    require_unit_target,
    units_to_decoder,
    vocabulary_decoder,
    vocabulary_to_units,
)
from zoo.vocabularies.build import DEFAULT_RULE, RULES, VOCABULARY_HELP

log = logging.getLogger(__name__)

MIN_RMS = 1e-12  # the RMS of samples that are all equal
LARGE_BLOCK = 1 << 18  # values of a block from which on products are in float32, which takes half the time
LARGE_SIDE = 2048  # rows or columns, beyond which a fit ends at LARGE_TOLERANCE
LOW_RANK_STEPS = 5  # of the fit of a side of low rank: later ones only turn directions that are noise
LARGE_TOLERANCE = 1e-3  # a tenth of the sampling error that a covariance of so many variables has, or less
CHOICES = {
    "basis": ("auto", "canonical", "stored"),
    "mean": ("pooled", "zero"),
    "granularity": ("role", "layer"),
    "toward": ("diagonal", "identity"),
    "vocabulary": RULES,
}


@dataclass(kw_only=True)
class MatrixNormal(Sampler):
    """Matrix normal draws: W = M + A Z B^T with independent normal Z.

    A A^T is the covariance of rows and B B^T that of columns. Both are fitted by the flip-flop algorithm of maximum
    likelihood (Dutilleul 1999) with shrinkage. Their scale is that of the samples.

    basis=canonical   Covariances carry over only in a common residual basis. Donors are brought into canonical form,
                      aligned to the widest by their tokens (`zoo.units.aligned`), and resized to the target
                      (`zoo.units.resizing.resize_units`). Our choice: one covariance per kind of unit. Rows are the
                      units of a layer in their order of importance, columns the residual vectors of a unit side by
                      side (gate, up and down of a neuron), so that what a unit reads and writes stays coupled. Tokens
                      are matched by string and are independent rows with variances of their own. A token that no donor
                      knows gets the mean row. Of heads that share keys and values the first one counts.
    basis=stored      Tensors as they are on disk, of modules of any kind, from donors' tensors of the same name and
                      shape, each with its own covariances. Vectors are set to the donors' mean. Use it for donors that
                      share coordinates: covariances of independently trained donors average out.

    Each layer uses the nearest relative depth of every donor. `granularity=role` fits one covariance to all layers of a
    kind, each scaled to unit RMS. With `mean=pooled` a single donor has no spread, so that the spread around zero is
    used. A block that is constant, or that only one donor has, is set to its mean.

    Our choice: a side of more than 4096 rows or columns has a covariance of rank 256 plus a diagonal, whose variances
    are those of the samples (`baselines.distributions.low_rank`). A step of the flip-flop then is one EM step of
    factor analysis, and there are five. From 262,144 values in a block on, products are computed in float32.

    Memory: the means of a whole target with `mean=pooled`, the covariances of one kind of block a few times over, one
    block, and one layer of a donor in float64 beside its vocabulary. While fitting, the donors' units are in a
    temporary folder. A target is drawn one layer at a time, beside its vocabulary.
    """

    name: ClassVar[str] = "matrix-normal"
    family: ClassVar[str] = "parametric"
    summary: ClassVar[str] = "normal draws with the donors' mean and their covariances of rows and of columns"
    reference: ClassVar[str] = "Dutilleul 1999, doi:10.1080/00949659908811970"
    needs: ClassVar[tuple[str, ...]] = ("donors",)
    choices: ClassVar[dict[str, tuple[str, ...]]] = CHOICES

    donor: str | None = option(None, "name of the donor; none: all donors that fit")
    tokenizer: str | None = option(None, "the target's tokenizer (folder or tokenizer.json), to match tokens by string")
    vocabulary: str = option(DEFAULT_RULE, VOCABULARY_HELP)
    basis: str = option("auto", "canonical, or stored (same names and shapes); auto: stored where there is no config")
    mean: str = option("pooled", "the mean M: pooled (the donors' mean) or zero")
    granularity: str = option("role", "one covariance for all layers (role), or one for each (layer)")
    shrinkage: float | None = option(
        None, "shrinkage of covariances, 0 to 1; none: estimated (0907.4698)", least=0.0, most=1.0
    )
    toward: str = option("diagonal", "what covariances are shrunk to: their diagonal, or a multiple of the identity")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._donors: tuple[str, ...] = ()
        self._coverage: dict[str, Any] = {}  # donor -> how it serves the tokens of the target
        self._scales: dict[str, float] = {}  # by block: a layer of a kind, or a tensor
        self._group: dict[str, str] = {}  # block -> the covariances that it uses
        self._tensors: dict[str, Tensor] = {}  # mean/BLOCK, rows/GROUP and columns/GROUP (factors), float32

    @property
    def donors(self) -> tuple[str, ...]:
        return self._donors

    def planned_donors(self, zoo: Zoo | None, blueprint: Blueprint) -> tuple[str, ...]:
        return self._choose(zoo, blueprint).names

    def fit(self, zoo: Zoo | None, blueprint: Blueprint) -> Self:
        pool = self._choose(zoo, blueprint)
        self._donors = pool.names
        log.info("%s: fitted to %d donors: %s", self.name, len(pool.names), ", ".join(pool.names))
        self._coverage, self._scales, self._group, self._tensors = {}, {}, {}, {}
        pooled = self.mean == "pooled" and len(pool.names) > 1
        if self.mean == "pooled" and not pooled:
            log.info("%s: one donor has no spread around its mean, so that the mean is taken to be zero", self.name)
        with scratch_folder() as folder:
            canonical = self._canonical(blueprint)
            blocks = BlockStore(folder, self.device, pooled, frozenset({"vocab 0"} if canonical else ()))
            if canonical:
                self._store_units(pool, blueprint, blocks)
            else:
                for donor in pool.donors:
                    for block in _stored_blocks(donor, blueprint):
                        blocks.add(block)
            self._learn(blocks, by_kind=canonical and self.granularity == "role")
        return self

    def _store_units(self, pool: Zoo, blueprint: Blueprint, blocks: BlockStore) -> None:
        """Stores the units of the donors, a layer of the target at a time."""
        left = set(pool.names)
        for aligned in align_decoders(pool, device=self.device):
            name = aligned.donor.name
            left.discard(name)
            rows = composed_rows(aligned.donor, blueprint, self.tokenizer, self.vocabulary)
            log_vocabulary(rows, f"{self.name}: {name}", self.vocabulary)
            self._coverage |= {name: record} if (record := rows.record(self.vocabulary)) else {}
            for layer in _unit_blocks(aligned.decoder, blueprint, rows):
                blocks.add(layer)
        if left:
            raise UserError(f"{pool.path}: donor {min(left)!r} has no canonical form; leave it out")

    def _learn(self, blocks: BlockStore, by_kind: bool) -> None:
        """Fits means, scales and covariances. by_kind: one pair of covariances for all layers of a kind."""
        groups: dict[str, list[str]] = {}
        for name in blocks.members:
            is_vector = len(blocks.shape(name)) == 1
            if blocks.pooled or is_vector:
                self._tensors[f"mean/{name}"] = blocks.mean(name)
            if is_vector:
                continue
            self._group[name] = name.partition(" ")[0] if by_kind else name
            self._scales[name] = blocks.scale(name)
            if self._scales[name] > MIN_RMS and float(blocks.counts(name).sum()):
                groups.setdefault(self._group[name], []).append(name)
            else:  # constant, or only one donor has it
                self._tensors[f"mean/{name}"] = blocks.mean(name)
                self._scales[name] = 0.0
        for group, names in groups.items():
            self._fit_covariances(blocks, group, names)

    def _fit_covariances(self, blocks: BlockStore, group: str, names: list[str]) -> None:
        """Fits the covariances that the blocks of a group share."""
        counts = torch.stack([blocks.counts(name) for name in names]).sum(0)
        rules = FitRules(self.toward, self.shrinkage)
        p, q = blocks.shape(names[0])
        diagonal_rows = names[0] in blocks.partial
        if q > LARGE_SIDE or (p > LARGE_SIDE and not diagonal_rows):
            rules = replace(rules, tolerance=LARGE_TOLERANCE)
        if q > rules.max_full_side or (p > rules.max_full_side and not diagonal_rows):
            rules = replace(rules, steps=LOW_RANK_STEPS)
        rows, columns = flip_flop(
            lambda: (x for name in names for x in blocks.samples(name, self._scales[name])),
            counts,
            q,
            rules,
            diagonal_rows,
        )
        columns = rescale_to_unit_rms(rows, columns, counts)
        for side, covariance in (("rows", rows), ("columns", columns)):
            self._set_factor(f"{side}/{group}", covariance_factor(covariance))

    def _set_factor(self, name: str, root: Covariance) -> None:
        if isinstance(root, LowRank):
            parts = {name: root.scale, f"{name}/axes": root.axes, f"{name}/gains": root.gains}
        else:
            parts = {name: root}
        self._tensors |= {key: tensor.float().cpu().contiguous() for key, tensor in parts.items()}

    def _factor(self, name: str) -> Covariance:
        found = [
            self._tensors[key].to(self.device)
            for key in (name, f"{name}/axes", f"{name}/gains")
            if key in self._tensors
        ]
        return found[0] if len(found) == 1 else LowRank(*found)

    def sample(self, blueprint: Blueprint, seed: int = 0) -> Iterator[tuple[str, Tensor]]:
        if not self._canonical(blueprint):
            for spec in blueprint.specs:
                if spec.name in self._group or f"mean/{spec.name}" in self._tensors:
                    yield spec.name, self._draw(spec.name, seed).reshape(spec.shape)
            return
        target = blueprint.metadata
        assert target is not None
        shape = replace(target, layers=1)

        def draw(kind: str, layer: int) -> Tensor:
            return self._draw(f"{kind} {layer}", seed).unflatten(1, (len(ROLES[kind]), target.width))

        def draw_layer(index: int) -> Layer:
            units = {kind: draw(kind, index) for kind in ROLES if kind != "vocab"}
            return units_to_decoder({**units, "vocab": no_tokens}, shape).layers[0]

        vocabulary = draw("vocab", 0)
        no_tokens = vocabulary[:0]
        decoder = vocabulary_decoder(vocabulary, target, LazySequence(draw_layer, target.layers))
        yield from write_decoder(tie_head(decoder) if target.tied else decoder, blueprint)

    def _draw(self, name: str, seed: int) -> Tensor:
        """One block, [p, q] float32, or the mean of a vector."""
        mean = self._tensors.get(f"mean/{name}")
        if name not in self._group:
            assert mean is not None
            return mean
        if not self._scales[name]:
            assert mean is not None
            return mean
        rows, columns = (self._factor(f"{side}/{self._group[name]}") for side in ("rows", "columns"))
        z = torch.randn(len(rows), len(columns), generator=stream(seed, f"{self.name}/{name}")).to(self.device)
        drawn = (self._scales[name] * color_noise(rows, columns, z)).cpu()
        return drawn if mean is None else drawn + mean

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return {"donors": list(self._donors), "scales": self._scales, "group": self._group}, self._tensors

    def restore(self, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self._donors, self._scales, self._group = tuple(values["donors"]), values["scales"], values["group"]
        self._tensors = tensors

    def _canonical(self, blueprint: Blueprint) -> bool:
        return self.basis == "canonical" or (self.basis == "auto" and blueprint.metadata is not None)

    def _choose(self, zoo: Zoo | None, blueprint: Blueprint) -> Zoo:
        """The donors that fit; in canonical form only those at least as wide as the target, if there are any.

        Raises UserError with the reason where none fits, or not the one that is asked for. Reads configs only.
        """
        if zoo is None or not zoo.donors:
            raise UserError(f"{self.name} needs donors: give --zoo DIR, or --donor FOLDER")
        target = None
        if self._canonical(blueprint):
            try:
                target = require_unit_target(blueprint, "target")
            except UserError as error:
                raise UserError(f"{self.name}: {error}; or --set basis=stored with donors of the same shape") from error
        fitting, refused = [], []
        for donor in [zoo.donor(self.donor)] if self.donor is not None else zoo.donors:
            problem = self._problem(donor, blueprint, target)
            if problem is None:
                fitting.append(donor)
            else:
                refused.append((*dissimilarity(donor, blueprint), f"{donor.name!r}: {problem}"))
        if not fitting:
            raise UserError(f"{self.name}: no donor fits the target; the nearest is {min(refused)[-1]}")
        if target is not None:
            wide = [d for d in fitting if d.blueprint.metadata and d.blueprint.metadata.width >= target.width]
            fitting = wide or fitting
        return Zoo.of_donors(fitting, zoo.path)

    def details(self, blueprint: Blueprint) -> dict[str, Any]:
        return {"vocabulary": self._coverage} if self._coverage else {}

    def _problem(self, donor: Donor, blueprint: Blueprint, target: Metadata | None) -> str | None:
        """Why a donor cannot be used for a target, or None."""
        if target is None:
            shared = [s for s in blueprint.specs if len(s.shape) >= 2 and _has_tensor(donor, s.name, s.shape)]
            return None if shared else "it has no matrix with the name and shape of one of the target's"
        try:
            source = require_unit_target(donor.blueprint, donor.name)
            vocabulary_rows(donor, blueprint, self.tokenizer, self.vocabulary)
        except UserError as error:
            return str(error)
        if source.head_dim != target.head_dim:
            return f"head_dim {source.head_dim} is not the target's {target.head_dim}; set that, or use normal"
        return None


class BlockStore:
    """The donors' matrices by name, in files of a folder: one block in memory at a time."""

    def __init__(self, folder: Path, device: str, pooled: bool, partial: frozenset[str]) -> None:
        """pooled: the mean of the samples is subtracted; partial: blocks where a row of zeros is unknown."""
        self.folder, self.device, self.pooled, self.partial = folder, device, pooled, partial
        self.members: dict[str, list[Path]] = {}  # block -> the files that hold it
        self._files = 0
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._means: dict[str, Tensor] = {}  # where the mean is subtracted

    def add(self, blocks: dict[str, Tensor]) -> None:
        """Adds blocks of one donor: [p, q] or [p], float32."""
        path = self.folder / f"{self._files}.safetensors"
        save_file(blocks, path)
        self._files += 1
        for name, block in blocks.items():
            self.members.setdefault(name, []).append(path)
            self._shapes[name] = tuple(block.shape)

    def _read(self, name: str) -> Iterator[Tensor]:
        for path in self.members[name]:
            with safe_open(path, "pt") as f:
                yield f.get_tensor(name)

    def _known(self, name: str, x: Tensor) -> Tensor:
        """[p] float32: 1 for rows that the donor knows."""
        return (x != 0).any(1).float() if name in self.partial else torch.ones(len(x))

    def mean(self, name: str) -> Tensor:
        """The mean [p, q] or [p] of a block over the donors that know a row; the mean row where no donor does."""
        if name in self._means:
            return self._means[name]
        total = torch.zeros(self._shapes[name])
        known = torch.zeros(len(total))
        for x in self._read(name):
            total += x
            known += self._known(name, x)
        mean = total / known.clamp_min(1).view(-1, *[1] * (total.ndim - 1))
        if total.ndim == 2 and 0 < int((known > 0).sum()) < len(known):
            mean[known == 0] = mean[known > 0].mean(0)
        if self.pooled:
            self._means[name] = mean
        return mean

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def counts(self, name: str) -> Tensor:
        """[p]: in how many samples each row is known, less one if the mean is subtracted; at least zero."""
        known = sum(self._known(name, x).double() for x in self._read(name)) - (1.0 if self.pooled else 0.0)
        return torch.as_tensor(known).clamp_min(0).to(self.device)

    def samples(self, name: str, scale: float = 1.0) -> Iterable[Tensor]:
        """The samples of a block, [p, q] on the device, less the mean where pooled, divided by `scale`.

        In float64; in float32 from LARGE_BLOCK values on."""
        for x in self._read(name):
            if self.pooled:
                x = (x - self.mean(name)) * self._known(name, x)[:, None]
            x = x.to(self.device)
            yield x.div_(scale) if x.numel() >= LARGE_BLOCK else x.double() / scale
            del x

    def scale(self, name: str) -> float:
        """The RMS of a block's samples, at least MIN_RMS."""
        squares = sum(float(rows.double().square().sum()) for x in self.samples(name) for rows in x.split(CHUNK))
        return max(math.sqrt(squares / max(1.0, float(self.counts(name).sum()) * self.shape(name)[1])), MIN_RMS)


def _has_tensor(donor: Donor, name: str, shape: tuple[int, ...]) -> bool:
    return name in donor.blueprint and donor.blueprint[name].shape == shape


def _stored_blocks(donor: Donor, blueprint: Blueprint) -> Iterator[dict[str, Tensor]]:
    """The donor's tensors with names and shapes of the target, with all axes but the first flattened."""
    for spec in blueprint.specs:
        if _has_tensor(donor, spec.name, spec.shape):
            x = donor.read(spec.name, torch.float32)
            yield {spec.name: (x.flatten(1) if x.ndim > 1 else x).contiguous()}


def _unit_blocks(decoder: Decoder, blueprint: Blueprint, rows: VocabularyRows) -> Iterator[dict[str, Tensor]]:
    """'KIND LAYER' -> [units of a layer of the target, vectors x width]; first 'vocab 0' -> the target's tokens.

    decoder: a donor in canonical form. Rows of tokens that the donor does not serve are zero.
    """
    source, target = decoder.metadata, blueprint.metadata
    assert target is not None
    table = to_width(vocabulary_to_units(decoder, torch.float32).cpu(), target.width)
    yield {"vocab 0": rows.apply(table, table.new_zeros(())).flatten(1).contiguous()}
    del table
    one, other = replace(source, layers=1), replace(target, layers=1, vocab=source.vocab)
    for index, place in enumerate(layer_map(source.layers, target.layers).tolist()):
        units = {kind: x.float().cpu() for kind, x in layer_to_units(decoder.layers[place], source).items()}
        resized = resize_units(units, one, other)
        yield {f"{kind} {index}": vectors.flatten(1).contiguous() for kind, vectors in resized.items()}
