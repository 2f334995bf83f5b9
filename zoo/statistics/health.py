"""Checks from its weights alone whether a donor is worth learning from: no text, no forward pass.

Trained matrices have structure: rows and columns of unequal energy, and singular values above those of noise. A
model without any of it was never trained, or its values were put in random places."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from zoo.donors.donor import Donor
from zoo.donors.measures import Measure
from zoo.donors.model_checkpoint import ModelCheckpoint
from zoo.errors import NotFinite
from zoo.statistics.noise import edge_excess, kurtosis, normal_scores, unevenness_p_values
from zoo.statistics.row_column import random_indices
from zoo.streams import stream
from zoo.tensors import TensorSpec, split_parts

STRUCTURE_P_VALUE = 1e-8  # below this a matrix has structure: no false positive in thousands of tests
MAX_EDGE_EXCESS = 8.0  # Tracy-Widom units of the largest squared singular value above the edge: p about 1e-7
MIN_SIDE = 8  # rows and columns: smaller matrices cannot be tested
VALUES_PER_CHUNK = 1 << 22  # values that are converted to float64 at a time
FEW_ROWS = 4  # a matrix with more than so many times the tested rows is read row by row
DEAD_SHARE = 0.01  # a block is dead if its output is at most this share of the same block in other layers
UNIFORM_KURTOSIS, NORMAL_KURTOSIS = 1.8, 3.0  # initialisations lie between these

# The factors of a block's output: (roles, sites of norms).
BLOCK_FACTORS = {
    "attention": (("attn.v", "attn.o"), ("attn", "attn.out")),
    "MLP": (("mlp.gate", "mlp.up", "mlp.down"), ("mlp", "mlp.out")),
}


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a donor."""

    kind: str  # untrained | permuted | dead | constant | non-finite
    tensors: tuple[str, ...]  # names on disk
    text: str  # one line
    whole: bool = False  # it concerns all matrices of the model


def check_health(
    donor: Donor | ModelCheckpoint,
    device: str = "cpu",
    most: int = 512,
    seed: int = 0,
    progress: Callable[[int], object] | None = None,
    measures: Mapping[str, Measure] | None = None,
) -> list[Finding]:
    """Returns what is wrong with a donor; nothing if it is healthy. The kinds of finding:

    untrained   all matrices of the model, or of a whole layer, are noise with the values of an initialisation, and
                every gain is the same. Kurtosis: from 1.8 for uniform to 3 for normal entries. Matrices of zeros (o
                and down in some schemes) belong to it
    permuted    the same noise, but trained values or gains: heavier tails than a normal, or gains that differ. Causes:
                shuffled entries, or entries drawn independently from distributions fitted to a trained model
    dead        an attention or MLP block that writes less than 1 % of what the same block writes in other layers, by
                the product of the RMS of its matrices and gains. MLPs with experts are compared with each other; the
                RMS of their experts' matrices is averaged
    constant    a matrix whose values are all the same
    non-finite  a tensor with NaN or infinity

    A matrix has structure if one of two tests says so, on at most `most` random rows and columns. First: the shares
    of large entries (above the median of |w|) differ between rows or between columns (chi-square, p < 1e-8). Second:
    its largest singular value is more than 8 units of Tracy-Widom's law above the Marchenko-Pastur edge. For the
    second, the entries are replaced by normal scores, so noise of any distribution has the same edge. Rows and
    columns of zeros (padding), learned positions, and matrices smaller than 8 x 8 are skipped.

    Limits. Models with a structured initialisation pass (mimetic, identity, fixed sinusoids). So do models whose
    training shows in a single matrix per layer. Shuffled entries are called untrained if all gains are 1 and the
    kurtosis is at most that of a normal. Embedding and head count only for the whole model: in good models, small
    ones can stay noise.

    One tensor is in memory at a time; those of layers that look like noise are read twice. Of a checkpoint's tensor in
    `measures` (by its name on disk) only what is tested is read. progress: called with the values of each tensor."""
    tally, reader = _Tally(), _Reader(donor, device, most, seed, measures or {})
    for spec in donor.blueprint.specs:
        tally.add(reader, spec)
        if progress is not None:
            progress(spec.numel)
    noise = {layer: found for layer, found in tally.matrices.items() if not tally.has_structure(layer)}
    for found in noise.values():
        for matrix in found:
            entries = reader.entries(matrix.spec, matrix.role).double()
            matrix.structured = edge_excess(normal_scores(entries)) > MAX_EDGE_EXCESS
            matrix.kurtosis = kurtosis(entries)
            if matrix.structured:
                break
    noise = {layer: found for layer, found in noise.items() if not any(m.structured for m in found)}
    structureless, whole = _structureless_findings(tally, noise)
    initial_zeros = tally.constant_zero if whole and structureless[0].kind == "untrained" else set()
    dead = [] if initial_zeros else _dead_blocks(tally)
    constant = tuple(sorted(tally.constant - initial_zeros - {name for f in dead for name in f.tensors}))
    findings = []
    if tally.not_finite:
        findings.append(
            Finding("non-finite", tuple(tally.not_finite), f"NaN or infinity in {_join_names(tally.not_finite)}")
        )
    if constant:
        findings.append(Finding("constant", constant, f"all values are the same in {_join_names(constant)}"))
    return [*findings, *structureless, *dead]


def summarise_findings(findings: Iterable[Finding]) -> str:
    """`fine`, or the kinds of the findings; `untrained layers` if the rest of the model was trained."""
    by_layer = ("untrained", "permuted")
    kinds = (f"{f.kind} layers" if f.kind in by_layer and not f.whole else f.kind for f in findings)
    return ", ".join(dict.fromkeys(kinds)) or "fine"


@dataclass
class _Matrix:
    """The noise tests of one matrix."""

    spec: TensorSpec
    role: str
    structured: bool
    margin: float  # how much the kurtosis of noise varies with this number of values
    kurtosis: float = math.nan  # computed where its layer looks like noise


@dataclass
class _Tally:
    """What one pass over a donor collects."""

    matrices: dict[int | None, list[_Matrix]] = field(default_factory=dict)
    trained_gains: set[int | None] = field(default_factory=set)  # layers with a norm whose gains differ
    outputs: dict[tuple[int, str], list[float]] = field(default_factory=dict)  # (layer, factor) -> RMS of each tensor
    named: dict[tuple[int, str], str] = field(default_factory=dict)  # (layer, factor) -> first tensor
    mixtures: set[int] = field(default_factory=set)  # layers with experts
    constant: set[str] = field(default_factory=set)
    constant_zero: set[str] = field(default_factory=set)
    not_finite: list[str] = field(default_factory=list)

    def add(self, reader: _Reader, spec: TensorSpec) -> None:
        """Reads one tensor and adds its measurements."""
        if not spec.numel or not spec.dtype.is_floating_point:
            return
        try:
            ranges = reader.ranges(spec)
        except NotFinite:
            self.not_finite.append(spec.name)
            return
        for part, found in zip(spec.parts, ranges, strict=True):
            self._count(spec, part.role, found.rms)
            is_matrix = len(part.shape) > 1
            if is_matrix and found.low == found.high and spec.kind == "weight":  # BART's bias of the logits is [1, V]
                self.constant.add(spec.name)
                if found.low == 0:
                    self.constant_zero.add(spec.name)
            elif is_matrix and "position" not in spec.parts[0].axes and not self.has_structure(spec.layer):
                self._add_matrix(spec, part.role, reader.entries(spec, part.role))
        if spec.role == "norm" and spec.kind == "weight" and min(r.low for r in ranges) < max(r.high for r in ranges):
            self.trained_gains.add(spec.layer)

    def has_structure(self, layer: int | None) -> bool:
        """Whether a matrix of a layer has structure, so that the others need no test."""
        return any(matrix.structured for matrix in self.matrices.get(layer, ()))

    def _add_matrix(self, spec: TensorSpec, role: str, matrix: Tensor) -> None:
        """Adds the noise tests of a matrix."""
        if min(matrix.shape) < MIN_SIDE:
            return
        structured = min(unevenness_p_values(matrix)) < STRUCTURE_P_VALUE
        margin = 6 * (24 / matrix.numel()) ** 0.5
        self.matrices.setdefault(spec.layer, []).append(_Matrix(spec, role, structured, margin))

    def _count(self, spec: TensorSpec, role: str, rms: float) -> None:
        """Adds the RMS of a factor of a block's output."""
        if spec.layer is None or spec.kind != "weight":
            return
        factor = f"norm@{spec.site}" if role == "norm" else role
        self.outputs.setdefault((spec.layer, factor), []).append(rms)
        self.named.setdefault((spec.layer, factor), spec.name)
        if spec.expert is not None or "experts" in spec.parts[0].axes:
            self.mixtures.add(spec.layer)

    def rms(self, layer: int, factor: str) -> float:
        """RMS of a factor of a layer's block; over experts, the mean."""
        return statistics.fmean(self.outputs[layer, factor])


@dataclass(frozen=True)
class _Range:
    """The range of the values of one part, and the RMS of what the model multiplies by."""

    low: float
    high: float
    rms: float


@dataclass
class _Reader:
    """Reads the tensors of a donor, or as much of them as the tests need."""

    donor: Donor | ModelCheckpoint
    device: str
    most: int
    seed: int
    measures: Mapping[str, Measure]  # by name on disk
    last: tuple[str, dict[str, Tensor]] = ("", {})  # the parts of the tensor that was read last

    def ranges(self, spec: TensorSpec) -> list[_Range]:
        """One for each part of a tensor. NotFinite where a value is NaN or infinite."""
        offset, checkpoint = self.donor.blueprint.offset(spec), self._measured(spec)
        if checkpoint is None:
            return [_range(values, offset) for values in self._parts(spec).values()]
        measure = self.measures[checkpoint.entry(spec.name).name]
        assert measure.mean is not None and measure.std is not None
        assert measure.low is not None and measure.high is not None
        return [_Range(measure.low, measure.high, math.hypot(measure.mean + offset, measure.std))]

    def entries(self, spec: TensorSpec, role: str) -> Tensor:
        """Random rows and columns of a matrix, without those of zeros: [m, n], float64 or float32."""
        matrix = self._submatrix(spec, role)
        sizes = matrix.abs()
        for dim in (0, 1):
            filled = sizes.amax(1 - dim) > 0
            if not filled.all():
                matrix = matrix.index_select(dim, filled.nonzero().flatten())
        return matrix

    def _submatrix(self, spec: TensorSpec, role: str) -> Tensor:
        """Random rows and columns of a matrix: float64 or float32."""
        part = next(part for part in spec.parts if part.role == role)
        shape = part.shape[0], math.prod(part.shape[1:])
        rows, columns = random_indices(shape, self.most, stream(self.seed, f"health/{spec.name}/{role}"))
        checkpoint, stored_rows = self._measured(spec), columns if spec.transposed else rows
        if checkpoint and stored_rows is not None and len(spec.shape) == 2 and spec.shape[0] > FEW_ROWS * self.most:
            matrix = checkpoint.read_rows(spec.name, stored_rows)
            matrix, rows, columns = (matrix.mT, rows, None) if spec.transposed else (matrix, None, columns)
        else:
            matrix = self._parts(spec)[role].flatten(1)
        matrix = matrix if rows is None else matrix.index_select(0, rows.to(matrix.device))
        # Before the columns are taken, which takes longer in bfloat16.
        matrix = matrix.to(self.device, torch.float64 if matrix.dtype == torch.float64 else torch.float32)
        return matrix if columns is None else matrix.index_select(1, columns.to(matrix.device))

    def _measured(self, spec: TensorSpec) -> ModelCheckpoint | None:
        """The donor, where it is a checkpoint and has a measure of a tensor that is stored as it is used, in one part.

        Its values are then known to be finite.
        """
        if not isinstance(self.donor, ModelCheckpoint) or len(spec.parts) > 1:
            return None
        name = self.donor.entry(spec.name).name
        return self.donor if name in self.measures and name not in self.donor.quantisation.weights else None

    def _parts(self, spec: TensorSpec) -> dict[str, Tensor]:
        if self.last[0] != spec.name:
            checkpoint = self._measured(spec)
            if checkpoint is None:
                tensor = self.donor.read(spec.name)
            else:
                tensor = checkpoint.read_stored(checkpoint.entry(spec.name))
            tensor = tensor.float() if tensor.dtype.itemsize == 1 else tensor
            self.last = spec.name, split_parts(spec, tensor)
        return self.last[1]


def _range(values: Tensor, offset: float) -> _Range:
    low, high = values.aminmax()
    gains = values + offset if offset else values
    parts = gains.flatten().split(VALUES_PER_CHUNK)  # torch makes a copy in float64
    norm = math.hypot(*(torch.linalg.vector_norm(part, dtype=torch.float64).item() for part in parts))
    rms = norm / gains.numel() ** 0.5
    return _Range(low.item(), high.item(), rms)


def _structureless_findings(tally: _Tally, noise: dict[int | None, list[_Matrix]]) -> tuple[list[Finding], bool]:
    """The findings `untrained` and `permuted`, and whether they concern the whole model."""
    if not noise:
        return [], False
    whole = len(noise) == len(tally.matrices)
    if whole:
        groups: list[list[int | None]] = [list(noise)]
    else:
        layers = [layer for layer in noise if layer is not None]
        trained: list[int | None] = [layer for layer in layers if _marked_by_training(tally, noise[layer], {layer})]
        groups = [trained, [layer for layer in layers if layer not in trained]]
    findings = []
    for group in filter(None, groups):
        found = [m for layer in group for m in noise[layer]]
        marked_by_training = _marked_by_training(tally, found, tally.trained_gains if whole else set(group))
        kurtoses = sorted({f"{m.kurtosis:.1f}" for m in found}, key=float)
        span = " to ".join(dict.fromkeys([kurtoses[0], kurtoses[-1]]))
        what = f"all {len(found)} matrices" if whole else f"{_layer_numbers(group)}: {len(found)} matrices"
        about = f"spectra inside the Marchenko-Pastur edge, kurtosis {span}"
        text = (
            f"structure lost: {what} are noise with trained values ({about}), as if shuffled or drawn independently"
            if marked_by_training
            else f"never trained: {what} are noise as in an initialisation ({about})"
        )
        names = dict.fromkeys(m.spec.name for m in found)
        findings.append(Finding("permuted" if marked_by_training else "untrained", tuple(names), text, whole))
    return findings, whole


def _marked_by_training(tally: _Tally, found: list[_Matrix], layers: set[int | None]) -> bool:
    """Whether values or gains differ from those of an initialisation."""
    unusual_values = any(not UNIFORM_KURTOSIS - m.margin <= m.kurtosis <= NORMAL_KURTOSIS + m.margin for m in found)
    return unusual_values or bool(layers & tally.trained_gains)


def _dead_blocks(tally: _Tally) -> list[Finding]:
    """The findings `dead`."""
    findings = []
    layers = {layer for layer, _ in tally.outputs}
    for block, (roles, sites) in BLOCK_FACTORS.items():
        factors = [*roles, *(f"norm@{site}" for site in sites)]
        mixtures = tally.mixtures if block == "MLP" else set()
        for siblings in (layers & mixtures, layers - mixtures):
            writing = [layer for layer in sorted(siblings) if all((layer, r) in tally.outputs for r in roles[-2:])]
            output = {
                layer: math.prod(tally.rms(layer, f) for f in factors if (layer, f) in tally.outputs)
                for layer in writing
            }
            alive = [o for o in output.values() if o]
            typical = statistics.median(alive) if alive else 1.0
            for layer, o in output.items():
                if o <= DEAD_SHARE * typical:
                    names = _smallest_tensors(tally, layer, factors, writing)
                    text = (
                        f"layer {layer}: the output of its {block} is {o / typical:.1g} of that in other layers: "
                        f"{_join_names(names)}"
                    )
                    findings.append(Finding("dead", names, text))
    return sorted(findings, key=lambda f: f.text)


def _smallest_tensors(tally: _Tally, layer: int, factors: list[str], siblings: list[int]) -> tuple[str, ...]:
    """Names of the tensors of a dead block that are small relative to the same tensors of other layers."""
    ratio = {}
    for factor in factors:
        if (layer, factor) in tally.outputs:
            others = [tally.rms(other, factor) for other in siblings if (other, factor) in tally.outputs]
            alive = [rms for rms in others if rms]
            ratio[tally.named[layer, factor]] = tally.rms(layer, factor) / (statistics.median(alive) if alive else 1.0)
    least = min(ratio.values())
    return tuple(name for name, r in ratio.items() if r <= max(10 * least, DEAD_SHARE))


def _join_names(names: Iterable[str], most: int = 3) -> str:
    """The first `most` names, and how many more there are."""
    names = list(names)
    return ", ".join(map(repr, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")


def _layer_numbers(layers: Iterable[int | None]) -> str:
    numbers = sorted(layer for layer in layers if layer is not None)
    return f"layer{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"
