"""Quantised weights: every layout that is read gives exact values, and codes never pass for weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from headstart.generate.sampling import sample_with_defaults
from tests.support.shaken import CONFIGS, build, logits
from zoo.add import add
from zoo.checkpoints.quantised import count_weights
from zoo.checkpoints.writer import write_checkpoint
from zoo.donors.donor import provenance
from zoo.donors.manifest import read_manifest
from zoo.donors.model_checkpoint import ModelCheckpoint, check_against_blueprint
from zoo.donors.verify import verify
from zoo.donors.zoo import Zoo, open_standalone
from zoo.errors import UserError

QUANTISED = "model.layers.0.mlp.down_proj.weight"  # [32, 48]
CONFIG = CONFIGS["llama"]

# The tensors of one quantised weight by name, and its values.
Layout = Callable[[str, Tensor], tuple[dict[str, Tensor], Tensor]]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    build(CONFIG).save_pretrained(folder)
    return folder


def save(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: t.contiguous().clone() for name, t in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def quantise(
    plain: Path, folder: Path, layout: Layout, quantisation: dict[str, Any] | None
) -> tuple[Path, dict[str, Tensor]]:
    """(a checkpoint whose projections are quantised, the values of all its tensors)."""
    stored: dict[str, Tensor] = {}
    values = load_file(plain / "model.safetensors")
    for name, tensor in load_file(plain / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            parts, values[name] = layout(name, tensor)
            stored |= parts
        else:
            stored[name] = tensor
    config = json.loads((plain / "config.json").read_text())
    if quantisation is not None:
        config["quantization_config"] = quantisation
    return save(folder, stored, config), values


def random(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(len(shape) + sum(shape))) * 0.01 + 0.001


def int8(shape: torch.Size | tuple[int, ...], low: int = -128) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randint(low, 128, tuple(shape), generator=generator, dtype=torch.int8)


def fp8(w: Tensor, dtype: torch.dtype = torch.float8_e4m3fn) -> Tensor:
    return (w / w.abs().max() * 400).to(dtype)


def blocks(rows: int, columns: int, end: str = "weight_scale_inv", dtype: torch.dtype = torch.float32) -> Layout:
    """Blocks of a fixed size; the last ones are smaller where the size does not divide the matrix."""

    def layout(name: str, w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        codes = fp8(w)
        scale = random(-(-w.shape[0] // rows), -(-w.shape[1] // columns)).to(dtype)
        value = torch.empty(w.shape)
        for i in range(w.shape[0]):
            for j in range(w.shape[1]):
                value[i, j] = codes[i, j].float() * scale[i // rows, j // columns].float()
        return {name: codes, name.removesuffix("weight") + end: scale}, value

    return layout


def scaled(scale: Tensor, dtype: torch.dtype = torch.float8_e4m3fn, **more: Tensor) -> Layout:
    """`weight_scale` of a shape that broadcasts. more: further tensors of the module."""

    def layout(name: str, w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        own = scale if scale.numel() == 1 else scale[: w.shape[0]]
        codes = int8(w.shape) if dtype == torch.int8 else fp8(w, dtype)
        module = name.removesuffix("weight")
        column = own.float() if own.numel() == 1 else own.float().reshape(-1, 1)
        parts = {name: codes, f"{name}_scale": own, **{module + key: t.clone() for key, t in more.items()}}
        return parts, codes.float() * column

    return layout


def grouped(size: int, zero_points: bool, dtype: torch.dtype) -> Layout:
    """compressed-tensors: one scale per row and group of columns."""

    def layout(name: str, w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        codes, shape = int8(w.shape), (w.shape[0], w.shape[1] // size)
        scale, zero = random(*shape).to(dtype), int8(shape)
        offset = zero.float() if zero_points else torch.zeros(shape)
        value = (codes.float().unflatten(1, (-1, size)) - offset[..., None]) * scale.float()[..., None]
        parts = {name: codes, f"{name}_scale": scale}
        return parts | ({f"{name}_zero_point": zero} if zero_points else {}), value.flatten(1)

    return layout


def bitsandbytes(name: str, w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    codes, scb = int8(w.shape, low=-127), random(w.shape[0]) * 100
    module = name.removesuffix("weight")
    parts = {name: codes, f"{module}SCB": scb, f"{name}_format": torch.tensor(0, dtype=torch.uint8)}
    return parts, codes * scb[:, None] * 7.874015718698502e-3  # bitsandbytes.functional.int8_vectorwise_dequant


def modelopt_blocks(name: str, w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    parts, value = blocks(16, 16, "weight_scale")(name, w)
    scale = parts[f"{name}_scale"]
    return parts | {f"{name}_scale": scale[:, None, :, None]}, value


def powers_of_two(name: str, w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Scales in E8M0, one per row and 16 columns, stored as bytes."""
    exponents = int8((w.shape[0], w.shape[1] // 16)).to(torch.int16).remainder(16).add(112).to(torch.uint8)
    codes = fp8(w)
    value = codes.float().unflatten(1, (-1, 16)) * (2.0 ** (exponents.float() - 127))[..., None]
    return {name: codes, f"{name}_scale_inv": exponents}, value.flatten(1)


def compressed(**weights: Any) -> dict[str, Any]:
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": weights}}}


FINE = {"quant_method": "fp8", "weight_block_size": [20, 24]}
MODELOPT = {"quant_method": "modelopt", "quant_algo": "FP8"}
VECTOR = torch.linspace(0.001, 0.02, 64)
LAYOUTS: dict[str, tuple[Layout, dict[str, Any] | None, str]] = {
    "fine-grained": (blocks(20, 24), FINE, "float8_e4m3fn with one scale per block"),
    "fine-grained, no config": (blocks(128, 128), None, "per tensor"),
    "fine-grained, even blocks": (blocks(16, 16), None, "per block"),
    "fine-grained, bfloat16": (blocks(20, 24, dtype=torch.bfloat16), FINE, "per block"),
    "scales in E8M0": (powers_of_two, {"quant_method": "fp8"}, "per block"),
    "per tensor": (scaled(torch.tensor([0.02])), compressed(strategy="tensor"), "per tensor"),
    "per tensor, 0-d": (scaled(torch.tensor(0.02), input_scale=torch.tensor(1.0)), MODELOPT, "per tensor"),
    "per channel": (scaled(VECTOR.bfloat16()[:, None]), compressed(strategy="channel"), "per channel"),
    "per channel, a vector": (scaled(VECTOR), {"quant_method": "fbgemm_fp8"}, "per channel"),
    "e5m2": (scaled(VECTOR, torch.float8_e5m2), None, "float8_e5m2"),
    "ModelOpt blocks": (modelopt_blocks, {"quant_method": "modelopt", "quant_algo": "FP8_PB_WO"}, "per block"),
    "int8": (scaled(VECTOR[:, None], torch.int8), compressed(strategy="channel"), "int8 with one scale per channel"),
    "int8, groups": (grouped(16, False, torch.bfloat16), compressed(group_size=16), "per block"),
    "int8, zero points": (grouped(8, True, torch.float32), compressed(group_size=8), "one scale and zero point"),
    "bitsandbytes": (bitsandbytes, {"quant_method": "bitsandbytes", "load_in_8bit": True}, "int8"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_is_read_exactly(plain: Path, tmp_path: Path, name: str) -> None:
    layout, quantisation, description = LAYOUTS[name]
    folder, values = quantise(plain, tmp_path / "donor", layout, quantisation)
    checkpoint = ModelCheckpoint.open(folder)
    assert check_against_blueprint(checkpoint) == ()
    assert sorted(checkpoint.names) == sorted(values)  # the scales are no tensors of the model
    assert checkpoint.parameters == ModelCheckpoint.open(plain).parameters
    for key, value in values.items():
        read = checkpoint.read(key)
        assert read.dtype == value.dtype and torch.equal(read, value), key
    assert len(checkpoint.quantisation.weights) == 14 and description in str(checkpoint.quantisation)
    assert count_weights(load_file(folder / "model.safetensors")) == len(values)


@pytest.mark.skipif(not hasattr(torch, "float8_e8m0fnu"), reason="this torch has no E8M0")
def test_scales_of_dtype_e8m0_are_powers_of_two(plain: Path, tmp_path: Path) -> None:
    def layout(name: str, w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        parts, value = powers_of_two(name, w)
        return {name: parts[name], f"{name}_scale_inv": parts[f"{name}_scale_inv"].view(torch.float8_e8m0fnu)}, value

    folder, values = quantise(plain, tmp_path / "donor", layout, {"quant_method": "fp8"})
    assert torch.equal(ModelCheckpoint.open(folder).read(QUANTISED), values[QUANTISED])


def test_transformers_dequantises_to_the_same_values(plain: Path, tmp_path: Path) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    folder, _ = quantise(plain, tmp_path / "donor", blocks(16, 16), {**FINE, "weight_block_size": [16, 16]})
    stored, checkpoint = load_file(folder / "model.safetensors"), ModelCheckpoint.open(folder)
    for name in checkpoint.quantisation.weights:
        reference = Fp8Dequantize(None)._dequantize_one(stored[name], stored[f"{name}_scale_inv"])
        assert torch.equal(checkpoint.read(name), reference)


def test_weights_of_three_axes_and_scales_of_activations(tmp_path: Path) -> None:
    """Fused experts [E, rows, columns], as FBGEMM stores them, and scales that values do not depend on."""
    codes, scale = fp8(torch.randn(2, 6, 8)), random(2, 1, 8)
    tensors = {
        "experts.gate_up_proj": codes, "experts.gate_up_proj_scale": scale, "attn.k_scale": torch.tensor(2.0),
        "attn.k_proj.weight": codes[0], "attn.k_proj.weight_scale": scale[0], "attn.k_proj.input_scale_ub": scale[0],
    }  # fmt: skip
    checkpoint = ModelCheckpoint.open(save(tmp_path, tensors, {}))
    assert sorted(checkpoint.names) == ["attn.k_proj.weight", "experts.gate_up_proj"]
    assert sorted(checkpoint.quantisation.ignored) == ["attn.k_proj.input_scale_ub", "attn.k_scale"]
    assert torch.equal(super(ModelCheckpoint, checkpoint).read("experts.gate_up_proj"), codes.float() * scale)


def test_a_quantised_donor_gives_the_function_of_its_values(plain: Path, tmp_path: Path) -> None:
    """The whole way: zoo, manifest, verify, provenance, and a generated checkpoint that is not quantised."""
    from baselines.transfer.growth.hypercloning import HyperCloning
    from zoo.targets.blueprint import Blueprint

    folder, values = quantise(plain, tmp_path / "donor", blocks(20, 24), FINE)
    reference = save(tmp_path / "reference", values, json.loads((plain / "config.json").read_text()))
    add([str(folder)], tmp_path / "zoo", quiet=True)
    zoo = Zoo.open(tmp_path / "zoo")
    assert verify(tmp_path / "zoo") == []
    rows = {row["tensor"]: row for row in read_manifest(tmp_path / "zoo").to_pylist()}
    assert set(rows) == set(values) and rows[QUANTISED]["dtype"] == "float8_e4m3fn"
    assert rows[QUANTISED]["std"] == pytest.approx(values[QUANTISED].double().std(correction=0).item(), rel=1e-12)
    assert provenance(zoo.donors[0])["quantisation"].startswith("14 weights in float8_e4m3fn")
    assert "quantisation" not in provenance(open_standalone(plain).donors[0])

    target = Blueprint.from_config(folder)  # the donor's own config, with its quantization_config
    sampler = HyperCloning().fit(zoo, target)
    write_checkpoint(tmp_path / "out", target, sample_with_defaults(sampler, target, seed=0))
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert torch.equal(logits(tmp_path / "out"), logits(reference))


def nothing(name: str, w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    return {name: fp8(w)}, w


def integers(dtype: torch.dtype) -> Layout:
    return lambda name, w: ({name: (w * 9).to(dtype)}, w)


def beside(end: str, dtype: torch.dtype = torch.float8_e4m3fn) -> Layout:
    """A scale of the right shape, and another tensor `end` in the module."""

    def layout(name: str, w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        parts, value = scaled(VECTOR, dtype)(name, w)
        return parts | {name.removesuffix("weight") + end: torch.ones(1)}, value

    return layout


def tiles(name: str, w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    parts, value = bitsandbytes(name, w)
    return parts | {f"{name}_format": torch.tensor(2, dtype=torch.uint8)}, value


def with_five_scales(name: str, w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    return {name: fp8(w), f"{name}_scale": random(5)}, w


def with_zero_point(name: str, w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    parts, value = scaled(VECTOR, torch.int8)(name, w)
    return parts | {f"{name}_zero_point": int8((3,))}, value


CODES: dict[str, tuple[Layout, dict[str, Any] | None, str]] = {
    "float8 without a scale": (nothing, None, "holds float8_e4m3fn codes instead of weights, and its scale .*is not"),
    "int8 without a scale": (integers(torch.int8), None, "holds int8 codes instead of weights"),
    "uint8": (integers(torch.uint8), None, "holds uint8 codes"),
    "int32": (integers(torch.int32), None, "holds int32 codes"),
    "int64": (integers(torch.int64), None, "holds int64 codes"),
    "a scale that does not fit": (with_five_scales, None, r"its scale of shape \[5\] does not fit its shape"),
    "blocks of unknown size": (blocks(20, 24), {"quant_method": "fp8"}, r"scale of shape \[2, 2\] does not fit"),
    "two scales": (beside("weight_scale_inv"), None, "it has the scales .*weight_scale_inv and .*weight_scale"),
    "NVFP4": (beside("weight_scale_2"), None, "two levels of scales"),
    "packed FP4": (beside("weight_scale_inv", torch.int8), None, "packed FP4"),
    "SmoothQuant": (beside("pre_quant_scale"), None, "its inputs are scaled as well"),
    "reordered groups": (beside("weight_g_idx"), None, "columns are reordered"),
    "a zero point that does not fit": (with_zero_point, None, r"its zero point of shape \[3\]"),
    "GPTQ": (nothing, {"quant_method": "gptq", "bits": 4}, "is quantised by gptq, which is not read"),
    "AWQ": (nothing, {"quant_method": "awq"}, "is quantised by awq"),
    "NF4": (nothing, {"quant_method": "bitsandbytes", "load_in_4bit": True}, "NF4 or FP4"),
    "NVFP4 by its config": (nothing, {"quant_method": "modelopt", "quant_algo": "NVFP4"}, "NVFP4"),
    "packed": (nothing, {"quant_method": "compressed-tensors", "format": "pack-quantized"}, "pack-quantized"),
    "rotated": (nothing, {"quant_method": "compressed-tensors", "transform_config": {"a": 1}}, "rotated weights"),
    "sparse": (
        nothing,
        {"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24-bitmask"}},
        "sparse-24",
    ),
    "a config that is no object": (nothing, 7, "quantization_config is not an object"),  # type: ignore[dict-item]
}


@pytest.mark.parametrize("name", CODES)
def test_codes_never_pass_for_weights(plain: Path, tmp_path: Path, name: str) -> None:
    layout, quantisation, reason = CODES[name]
    folder, _ = quantise(plain, tmp_path / "donor", layout, quantisation)
    checkpoint = ModelCheckpoint.open(folder)
    for use in (lambda: check_against_blueprint(checkpoint), lambda: checkpoint.read(QUANTISED)):
        with pytest.raises(UserError, match=reason) as caught:
            use()
        assert "give the original model" in str(caught.value) or name == "a config that is no object"
        assert str(folder) in str(caught.value) and len(str(caught.value)) <= 400


def test_int8_codes_in_tiles_are_refused(plain: Path, tmp_path: Path) -> None:
    folder, _ = quantise(plain, tmp_path / "donor", tiles, None)
    with pytest.raises(UserError, match="tiles of a GPU"):
        ModelCheckpoint.open(folder).read(QUANTISED)


@pytest.mark.parametrize(
    ("end", "writer"),
    [("qweight", "GPTQ or AWQ"), ("weight_packed", "compressed-tensors"), ("W_q", "HQQ"), ("weight_blocks", "MXFP4")],
)
def test_packed_weights_are_named_where_the_config_does_not(plain: Path, tmp_path: Path, end: str, writer: str) -> None:
    def layout(name: str, w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        return {name.removesuffix("weight") + end: (w * 9).to(torch.int32)}, w

    folder, _ = quantise(plain, tmp_path / "donor", layout, None)
    with pytest.raises(UserError, match=f"is packed by {writer}.*give the original model"):
        check_against_blueprint(ModelCheckpoint.open(folder))


def test_nan_among_codes_and_scales_is_refused(plain: Path, tmp_path: Path) -> None:
    folder, _ = quantise(plain, tmp_path / "donor", scaled(torch.tensor([torch.nan])), None)
    with pytest.raises(UserError, match="holds NaN or infinity"):
        ModelCheckpoint.open(folder).read(QUANTISED)


def test_a_module_with_codes_is_refused() -> None:
    from zoo.donors.memory import ModuleDonor

    model = build(CONFIG)
    layer = model.model.layers[0].mlp.down_proj
    layer.weight = torch.nn.Parameter(int8(layer.weight.shape), requires_grad=False)
    donor = ModuleDonor(model, "m", source="m", revision="memory", sha256="")
    with pytest.raises(UserError, match=r"holds torch\.int8 codes instead of weights"):
        donor.read(QUANTISED)
    assert donor.read("model.norm.weight").dtype == torch.float32


def test_adapters_need_a_base_that_is_not_quantised(plain: Path, tmp_path: Path) -> None:
    from headstart.config import LoraConfig
    from headstart.lora.lora import lora

    folder, _ = quantise(plain, tmp_path / "donor", blocks(128, 128), None)
    for method in ("pissa", "peft-default"):
        with pytest.raises(UserError, match=r"is quantised .*give the original model"):
            lora(LoraConfig(base=str(folder), method=method, out=str(tmp_path / "adapter"), rank=2))
