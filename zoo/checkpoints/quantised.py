"""Quantised weights: which tensors of a checkpoint are codes, which scales belong to them, and their values.

    value = (code - zero point) * scale

One scale serves a whole tensor, a channel, a block or a group. Read are float8 codes (`weight_scale_inv` of DeepSeek-V3
and transformers' fine-grained FP8; `weight_scale` of compressed-tensors, FBGEMM and ModelOpt) and int8 codes
(`weight_scale` and `weight_zero_point` of compressed-tensors; `SCB` of bitsandbytes, LLM.int8(), 2208.07339).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from zoo.checkpoints.headers import Entry
from zoo.errors import UserError

CODES = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)
CONFIG_KEYS = ("quantization_config", "compression_config")
BNB_SCALE = 7.874015718698502e-3  # 1/127, as bitsandbytes multiplies by it
ADVICE = "give the original model, or dequantise this one with transformers (model.dequantize) and save that"

# Beside a quantised weight: scales of activations and of the KV cache, which its values do not depend on.
OF_ACTIVATIONS = (
    "input_scale", "input_scale_ub", "input_zero_point", "activation_scale", "output_scale", "output_zero_point",
    "q_scale", "k_scale", "v_scale",
)  # fmt: skip
# Beside a weight that is stored in a way that is not read: end of the name -> what wrote it.
PACKED = {
    ".qweight": "GPTQ or AWQ", ".weight_packed": "compressed-tensors (packed)", "_blocks": "MXFP4", ".W_q": "HQQ",
    ".weight.absmax": "bitsandbytes NF4 or FP4",
}  # fmt: skip
UNREADABLE_COMPANIONS = {
    "{weight}_g_idx": "its groups of columns are reordered",
    "{weight}_scale_2": "it has two levels of scales (NVFP4)",
    "{module}pre_quant_scale": "its inputs are scaled as well (AWQ, SmoothQuant)",
}


@dataclass(frozen=True)
class QuantisedWeight:
    """One weight that is stored as codes."""

    codes: Entry
    scale: Entry
    blocks: tuple[int, ...]  # per axis of the codes, how many values share a scale
    zero_point: Entry | None = None  # of the scale's shape
    weight_format: Entry | None = None  # bitsandbytes: 0 for codes in rows

    @property
    def is_bitsandbytes(self) -> bool:
        return self.scale.name.rpartition(".")[2] == "SCB"


@dataclass(frozen=True)
class Quantisation:
    """What is quantised in a checkpoint."""

    weights: dict[str, QuantisedWeight] = field(default_factory=dict)  # by name on disk
    problems: dict[str, str] = field(default_factory=dict)  # name on disk of codes that cannot be read -> why
    companions: frozenset[str] = frozenset()  # scales and the like: no tensors of the model
    ignored: tuple[str, ...] = ()  # those of them that the values do not depend on
    origin: str = ""  # how the GGUF file that the checkpoint was converted from stored its tensors

    def __str__(self) -> str:
        """'28 weights in float8_e4m3fn with one scale per block', empty without quantised weights."""
        counts = Counter(_describe(weight) for weight in self.weights.values())
        return self.origin or "; ".join(f"{count} weights in {what}" for what, count in counts.items())


def find_quantised(entries: Mapping[str, Entry], config: Mapping[str, Any]) -> Quantisation:
    """The quantised weights among the tensors of a checkpoint, by their dtypes and the names of their scales."""
    weights: dict[str, QuantisedWeight] = {}
    problems: dict[str, str] = {}
    companions: set[str] = set()
    ignored: dict[str, None] = {}
    sizes = list(_block_sizes(config))
    for name, entry in entries.items():
        if entry.dtype not in CODES or not entry.shape:
            continue
        weight = _quantised_weight(entry, entries, sizes)
        if isinstance(weight, str):
            problems[name] = weight
            continue
        weights[name] = weight
        parts = (weight.scale, weight.zero_point, weight.weight_format)
        companions |= {part.name for part in parts if part is not None}
        ignored |= dict.fromkeys(_activation_scales(name, entries))
    # Zero points are int8 themselves.
    problems = {name: why for name, why in problems.items() if name not in companions}
    return Quantisation(weights, problems, frozenset(companions | ignored.keys()), tuple(ignored))


def dequantise(weight: QuantisedWeight, read: Callable[[Entry], Tensor]) -> Tensor:
    """The values of a quantised weight, in float32. read: a tensor as stored.

    UserError for bitsandbytes codes in another order than rows.
    """
    if weight.weight_format is not None and int(read(weight.weight_format).flatten()[0]) != 0:
        raise UserError(f"tensor {weight.codes.name!r} has its int8 codes in tiles of a GPU, not in rows; {ADVICE}")
    values = read(weight.codes).float()
    if weight.zero_point is not None:
        values -= _expand(read(weight.zero_point).float(), weight)
    scale = read(weight.scale)
    if scale.dtype == torch.uint8:  # the exponents of E8M0, by another name
        values *= _expand((scale.float() - 127).exp2(), weight)
    else:
        values *= _expand(scale.float(), weight)
    return values * BNB_SCALE if weight.is_bitsandbytes else values


def count_weights(names: Collection[str]) -> int:
    """The number of tensors of a model, from their names alone: without what lies beside a quantised weight."""

    def is_companion(name: str) -> bool:
        module, _, last = name.rpartition(".")
        beside = (name.removesuffix(end) for end in ("_scale_inv", "_scale", "_zero_point", "_format"))
        in_module = last == "SCB" or last in OF_ACTIVATIONS
        return any(other != name and other in names for other in beside) or (in_module and f"{module}.weight" in names)

    return sum(not is_companion(name) for name in names)


def is_code(dtype: torch.dtype) -> bool:
    """Whether a tensor of this dtype cannot hold plain weights: integers, and floats of one byte."""
    return not dtype.is_floating_point or dtype.itemsize < 2


def without_quantisation(config: Mapping[str, Any]) -> dict[str, Any]:
    """A parsed config.json for weights that are not quantised, also in its inner configs."""
    return {
        key: without_quantisation(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in CONFIG_KEYS
    }


def refuse_unreadable(config: Mapping[str, Any], where: str) -> None:
    """UserError for a config that names a quantisation that is not read. where: for the message."""
    quantisation = next((config[key] for key in CONFIG_KEYS if config.get(key)), None)
    if quantisation is None:
        return
    if not isinstance(quantisation, Mapping):
        raise UserError(f"{where}: quantization_config is not an object; download it again")
    problem = _unreadable_method(quantisation)
    if problem:
        raise UserError(f"{where}: is quantised by {problem}, which is not read; {ADVICE}")


def packed_by(names: Mapping[str, Any]) -> str | None:
    """The name of a packed tensor among these and what wrote it, as text; None where there is none."""
    for name in names:
        for end, writer in PACKED.items():
            if name.endswith(end):
                return f"{name!r} is packed by {writer}"
    return None


def _unreadable_method(quantisation: Mapping[str, Any]) -> str | None:
    """The method of a quantization_config that is not read, None where it is read."""
    four_bits, eight_bits = quantisation.get("load_in_4bit"), quantisation.get("load_in_8bit")
    method = quantisation.get("quant_method") or ("bitsandbytes" if four_bits or eight_bits else None)
    if method is None and isinstance(quantisation.get("producer"), Mapping):
        method = quantisation["producer"].get("name")
    if method == "bitsandbytes":
        return "bitsandbytes (NF4 or FP4)" if four_bits else None
    if method == "modelopt":
        inner = quantisation.get("quantization")
        algorithm = (inner if isinstance(inner, Mapping) else quantisation).get("quant_algo") or "FP8"
        return None if str(algorithm).startswith("FP8") else f"modelopt ({algorithm})"
    if method == "compressed-tensors":
        return _unreadable_format(quantisation)
    return None if method in ("fp8", "fbgemm_fp8") else f"{method or 'an unnamed method'}"


def _unreadable_format(quantisation: Mapping[str, Any]) -> str | None:
    """What of a compressed-tensors config is not read, None where all is."""
    readable = (None, "dense", "float-quantized", "int-quantized", "naive-quantized", "mixed-precision")
    groups = quantisation.get("config_groups")
    inner = [g for g in groups.values() if isinstance(g, Mapping)] if isinstance(groups, Mapping) else []
    for part in (quantisation, *inner):
        if part.get("format") not in readable:
            return f"compressed-tensors ({part['format']})"
    sparsity = quantisation.get("sparsity_config")
    if isinstance(sparsity, Mapping) and sparsity.get("format") not in (None, "dense"):
        return f"compressed-tensors ({sparsity['format']})"
    return "compressed-tensors (rotated weights)" if quantisation.get("transform_config") else None


def _quantised_weight(
    codes: Entry, entries: Mapping[str, Entry], sizes: list[tuple[int, int]]
) -> QuantisedWeight | str:
    """How a tensor of codes is read, or why it is not."""
    name, module = codes.name, codes.name[: codes.name.rfind(".") + 1]
    for pattern, why in UNREADABLE_COMPANIONS.items():
        if pattern.format(weight=name, module=module) in entries:
            return why
    scales = [n for n in (f"{name}_scale_inv", f"{name}_scale") if n in entries]
    if codes.dtype == torch.int8 and f"{name}_scale_inv" in scales:
        return "its int8 values are packed FP4"
    if name == f"{module}weight" and codes.dtype == torch.int8 and f"{module}SCB" in entries:
        scales.append(f"{module}SCB")
    if len(scales) != 1:
        return f"it has the scales {' and '.join(scales)}" if scales else f"its scale {name}_scale is not there"
    scale = entries[scales[0]]
    if not (scale.dtype.is_floating_point or (scale.dtype == torch.uint8 and codes.dtype != torch.int8)):
        return f"its scale is of dtype {str(scale.dtype).removeprefix('torch.')}"
    blocks = _scale_blocks(codes.shape, _aligned(codes.shape, scale.shape), sizes)
    if blocks is None:
        return f"its scale of shape {list(scale.shape)} does not fit its shape {list(codes.shape)}"
    zero_point = entries.get(f"{name}_zero_point")
    if zero_point is not None and zero_point.shape != scale.shape:
        return f"its zero point of shape {list(zero_point.shape)} does not fit its scale of {list(scale.shape)}"
    weight_format = entries.get(f"{name}_format")
    if weight_format is not None and math.prod(weight_format.shape) != 1:
        return f"its weight_format is of shape {list(weight_format.shape)}"
    return QuantisedWeight(codes, scale, blocks, zero_point, weight_format)


def _activation_scales(name: str, entries: Mapping[str, Entry]) -> Iterator[str]:
    """The scales beside a quantised weight, in its module and around it, that its values do not depend on."""
    module = name.rpartition(".")[0]
    around = module.rpartition(".")[0]
    for end in OF_ACTIVATIONS:
        for candidate in (f"{name}_{end}", f"{module}.{end}", f"{around}.{end}"):
            if candidate in entries:
                yield candidate


def _block_sizes(config: Mapping[str, Any]) -> Iterator[tuple[int, int]]:
    """The sizes (rows, columns) of blocks and groups that a config names."""
    quantisation: Mapping[str, Any] = next((config[k] for k in CONFIG_KEYS if isinstance(config.get(k), Mapping)), {})
    groups = quantisation.get("config_groups")
    inner = groups.values() if isinstance(groups, Mapping) else ()
    weights = [g["weights"] for g in inner if isinstance(g, Mapping) and isinstance(g.get("weights"), Mapping)]
    for size in (quantisation.get("weight_block_size"), *(w.get("block_structure") for w in weights)):
        if isinstance(size, list) and len(size) == 2 and all(type(n) is int and n > 0 for n in size):
            yield size[0], size[1]
    for group in (w.get("group_size") for w in weights):
        if type(group) is int and group > 0:
            yield 1, group


def _aligned(shape: tuple[int, ...], scale: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a scale with one size per axis of the codes.

    A vector belongs to the first axis. ModelOpt stores the scales of blocks as [rows, 1, columns, 1].
    """
    if math.prod(scale) == 1:
        return (1,) * len(shape)
    if len(scale) == 2 * len(shape) and all(n == 1 for n in scale[1::2]):
        return scale[::2]
    return scale + (1,) * (len(shape) - len(scale))


def _scale_blocks(
    shape: tuple[int, ...], scale: tuple[int, ...], sizes: list[tuple[int, int]]
) -> tuple[int, ...] | None:
    """Per axis, how many values share a scale. None where the shape of the scale does not determine it.

    sizes: (rows, columns) of the blocks that the config names. Without a fitting one, a block is a power of two that
    divides the axis.
    """
    if len(scale) != len(shape):
        return None
    for size in sizes:
        blocks = [_axis_block(n, count, given) for n, count, given in zip(shape[-2:], scale[-2:], size, strict=False)]
        if len(shape) >= 2 and None not in blocks:
            leading = [_axis_block(n, count, None) for n, count in zip(shape[:-2], scale[:-2], strict=True)]
            if None not in leading:
                return tuple(b for b in (*leading, *blocks) if b is not None)
    blocks = [_axis_block(n, count, _even_block(n, count)) for n, count in zip(shape, scale, strict=True)]
    return None if None in blocks else tuple(b for b in blocks if b is not None)


def _axis_block(size: int, count: int, block: int | None) -> int | None:
    """How many values of an axis share one of `count` scales: all, one, or `block`; None where none of these fits."""
    if count == 1:
        return max(size, 1)
    if count == size:
        return 1
    return block if block is not None and block > 0 and math.ceil(size / block) == count else None


def _even_block(size: int, count: int) -> int | None:
    """The size of `count` equal blocks of an axis, where it is a power of two."""
    block = size // count if count and size % count == 0 else 0
    return block if block and block & (block - 1) == 0 else None


def _expand(scale: Tensor, weight: QuantisedWeight) -> Tensor:
    """A scale or zero point with the shape of the codes, or one that broadcasts to it."""
    shape = weight.codes.shape
    expanded = scale.reshape(_aligned(shape, tuple(scale.shape)))
    for axis, (size, block) in enumerate(zip(shape, weight.blocks, strict=True)):
        if expanded.shape[axis] != 1 and block != 1:
            expanded = expanded.repeat_interleave(block, dim=axis).narrow(axis, 0, size)
    return expanded


def _describe(weight: QuantisedWeight) -> str:
    shape, blocks = weight.codes.shape, weight.blocks
    if all(b >= n for n, b in zip(shape, blocks, strict=True)):
        unit = "tensor"
    elif all(b in (1, n) for n, b in zip(shape, blocks, strict=True)):
        unit = "channel"
    else:
        unit = "block"
    offset = " and zero point" if weight.zero_point is not None else ""
    return f"{str(weight.codes.dtype).removeprefix('torch.')} with one scale{offset} per {unit}"
