"""Plain feed-forward modules as chains of matrices: each reads the hidden space that the one before it writes.

A module without a config does not name its coordinates, but its forward shows them. Traced symbolically, an MLP is a
line of linear layers with elementwise functions and norms between them. Every hidden space then has one writer and one
reader, and one index map per space moves rows and columns together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from baselines.transfer.index_maps import AxisMap
from zoo.donors.donor import Donor, size_gap
from zoo.donors.zoo import Zoo
from zoo.errors import UserError
from zoo.targets.blueprint import Blueprint

# Functions allowed between two matrices, because they treat all coordinates of a hidden space alike.
ELEMENTWISE = {
    "relu", "relu6", "leakyrelu", "elu", "celu", "selu", "gelu", "silu", "mish", "softplus", "softsign", "sigmoid",
    "logsigmoid", "hardsigmoid", "hardswish", "tanh", "hardtanh", "tanhshrink", "softshrink", "hardshrink", "dropout",
    "alphadropout", "identity", "square", "pow", "abs", "sin", "cos", "exp", "clamp", "add", "sub", "mul", "truediv",
    "neg", "contiguous", "float",
}  # fmt: skip


@dataclass(frozen=True)
class Chain:
    """L matrices and the L + 1 spaces around them: matrix i reads space i and writes space i + 1."""

    matrices: tuple[str, ...]  # names of [sizes[i + 1], sizes[i]]
    sizes: tuple[int, ...]  # of the spaces, the inputs first
    vectors: tuple[tuple[tuple[str, str], ...], ...]  # per space: (kind, name) of biases, gains and shifts

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Chain:
        vectors = tuple(tuple((kind, name) for kind, name in space) for space in values["vectors"])
        return cls(tuple(values["matrices"]), tuple(values["sizes"]), vectors)

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.matrices, *(name for space in self.vectors for _, name in space))


@dataclass(frozen=True)
class ChainDonor:
    """A donor's chain and all its tensors, in float32."""

    name: str
    chain: Chain
    tensors: dict[str, Tensor]


def trace_chain(blueprint: Blueprint, where: str) -> Chain:
    """The chain of a module in memory, found by tracing its forward.

    It may hold linear layers, with elementwise functions, LayerNorm and RMSNorm between them; before the first and
    after the last matrix any function without parameters. Raises UserError for any other layer with parameters, a
    forward that branches or depends on data, and parameters that are shared. where: the model's name in messages.
    """
    module = blueprint.module
    if module is None:
        raise UserError(f"{where}: has neither a config nor a module in memory, so the order of its tensors is unknown")
    matrices: list[str] = []
    sizes: list[int] = []
    vectors: list[list[tuple[str, str]]] = [[]]
    between: list[str] = []  # calls since the last matrix that are not elementwise
    for path, called, layer in _traced_calls(module, where):
        if isinstance(layer, nn.Linear):
            if sizes and layer.in_features != sizes[-1]:
                raise UserError(f"{where}: {path} reads {layer.in_features} values, but {sizes[-1]} come before it")
            if matrices and between:
                raise UserError(f"{where}: {between[0]} between {matrices[-1]} and {path} may mix hidden units")
            sizes = sizes or [layer.in_features]
            matrices.append(f"{path}.weight")
            sizes.append(layer.out_features)
            vectors.append([] if layer.bias is None else [("bias", f"{path}.bias")])
            between = []
        elif isinstance(layer, nn.LayerNorm | nn.RMSNorm):
            size = math.prod(layer.normalized_shape)
            if (sizes and sizes[-1] != size) or len(layer.normalized_shape) != 1:
                raise UserError(f"{where}: {path} normalises {tuple(layer.normalized_shape)}, not one hidden space")
            sizes = sizes or [size]
            kind = type(layer).__name__
            vectors[-1] += [(f"{kind} {key}", f"{path}.{key}") for key, _ in layer.named_parameters()]
        elif layer is not None and any(True for _ in layer.state_dict()):
            raise UserError(
                f"{where}: {path} is a {type(layer).__name__}; without a config row-column takes chains of Linear,"
                " LayerNorm, RMSNorm and elementwise functions"
            )
        elif called not in ELEMENTWISE:
            between.append(path)
    if not matrices:
        raise UserError(f"{where}: has no linear layer for row-column to sample")
    chain = Chain(tuple(matrices), tuple(sizes), tuple(tuple(space) for space in vectors))
    repeated = [name for name in chain.names if chain.names.count(name) > 1]
    computed = [name for name in chain.names if name not in blueprint]
    if repeated or computed:
        raise UserError(
            f"{where}: {(repeated + computed)[0]} is used twice or computed; row-column needs tensors used once"
        )
    return chain


def _traced_calls(module: nn.Module, where: str) -> Iterator[tuple[str, str, nn.Module | None]]:
    """(path or name, name of the function in lower case, the layer if it is one) of each call of a forward, in order.

    Raises UserError where the forward is not one line from input to output.
    """
    kind = type(module).__name__
    try:
        nodes = list(fx.Tracer().trace(module).nodes)
    except Exception as error:  # a forward may raise anything when it is run on symbols
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{where}: the forward of {kind} cannot be traced without data ({reason})") from error
    for node in nodes:
        if node.op == "get_attr":
            raise UserError(f"{where}: {kind} uses {node.target} outside any layer; row-column needs a chain of layers")
        if len(node.users) > 1 or len(node.all_input_nodes) > 1:
            raise UserError(f"{where}: the forward of {kind} branches at {node.name}; row-column needs a plain chain")
        if node.op == "call_module":
            layer = module.get_submodule(str(node.target))
            yield str(node.target), type(layer).__name__.lower(), layer
        elif node.op in ("call_function", "call_method"):
            name = str(getattr(node.target, "__name__", node.target))
            yield name, name.lower().replace("_", ""), None


def chain_mismatches(source: Chain, target: Chain) -> list[str]:
    """Why a donor's chain cannot fill a target's, with both sizes; empty where it can.

    The depths must agree. Without skip connections the coordinates of two hidden spaces have nothing in common, so that
    no matrix can be left out or used twice.
    """
    if len(source.matrices) != len(target.matrices):
        return [f"it has {len(source.matrices)} matrices and the target {len(target.matrices)}"]
    found = []
    for side, place in (("inputs", 0), ("outputs", -1)):
        if source.sizes[place] != target.sizes[place]:
            found.append(f"it has {source.sizes[place]} {side} and the target {target.sizes[place]}")
    for i, (source_vectors, target_vectors) in enumerate(zip(source.vectors, target.vectors, strict=True)):
        source_kinds, target_kinds = ([kind for kind, _ in space] for space in (source_vectors, target_vectors))
        if source_kinds != target_kinds:
            sides = " and the target ".join(", ".join(kinds) or "no vector" for kinds in (source_kinds, target_kinds))
            found.append(f"in hidden space {i} it has {sides}")
    return found


def choose_chain_donor(zoo: Zoo | None, blueprint: Blueprint, name: str | None, method: str) -> tuple[Donor, Chain]:
    """The donor called `name`, or of those that fit the nearest in size (ties by name), and its chain.

    Raises UserError where the target is not a chain, or where the donor (or none) fits. Reads no weights.
    """
    target = trace_chain(blueprint, "target")
    if zoo is None:
        raise UserError(f"{method} needs a donor: give a zoo of modules (zoo.donors.memory.zoo_of)")
    fitting: list[tuple[float, str, Chain]] = []
    reasons = []
    for donor in [zoo.donor(name)] if name is not None else zoo.donors:
        try:
            chain = trace_chain(donor.blueprint, donor.name)
        except UserError as error:
            reasons.append(str(error))
            continue
        if found := chain_mismatches(chain, target):
            reasons.append(f"donor {donor.name!r} does not fit the target: {'; '.join(found)}")
        else:
            fitting.append((size_gap(donor, blueprint), donor.name, chain))
    if not fitting:
        others = f" ({len(reasons)} donors, none fits)" if len(reasons) > 1 else ""
        raise UserError(f"{method}: {reasons[0] if reasons else f'{zoo.path} holds no donor'}{others}")
    _, chosen, chain = min(fitting, key=lambda entry: entry[:2])
    return zoo.donor(chosen), chain


def read_chain(donor: Donor, chain: Chain) -> ChainDonor:
    """Reads all tensors of a donor's chain."""
    return ChainDonor(donor.name, chain, {name: donor.read(name, torch.float32) for name in chain.names})


def gather_chain(
    source: Chain, tensors: Mapping[str, Tensor], target: Chain, map_of: Callable[[int, str], AxisMap]
) -> Iterator[tuple[str, Tensor]]:
    """(name, float32 tensor) of the target.

    Rows are gathered by the map of the space that a matrix writes, columns by the map of the space that it reads, and
    multiplied by that map's scale. Vectors are gathered like rows. map_of: (space, name of the tensor) -> map.
    """
    for i, (source_name, target_name) in enumerate(zip(source.matrices, target.matrices, strict=True)):
        reads, writes = map_of(i, target_name), map_of(i + 1, target_name)
        matrix = tensors[source_name][writes.index][:, reads.index]
        yield target_name, matrix * torch.as_tensor(reads.read_scale, dtype=matrix.dtype)
    for i, (source_vectors, target_vectors) in enumerate(zip(source.vectors, target.vectors, strict=True)):
        for (_, source_name), (_, target_name) in zip(source_vectors, target_vectors, strict=True):
            yield target_name, tensors[source_name][map_of(i, target_name).index]
