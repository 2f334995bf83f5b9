"""LoRA adapters as PEFT itself sees them, without weights: which pairs A, B adapt which weights of a base.

A pair changes what a linear layer computes from W x to (W + scaling B A) x. All matrices here are in torch's
orientation: W [rows, columns] = [out, in], A [rank, columns], B [rows, rank].
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from zoo.checkpoints.files import read_json
from zoo.errors import UserError, unknown
from zoo.limits import MAX_CONFIG
from zoo.targets.adapter_bounds import check_adapter, check_patterns
from zoo.targets.configs import to_disk
from zoo.tensors import Part, TensorSpec

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True)
class Pair:
    """The matrices A and B that adapt one linear layer."""

    module: str  # in the base model, as in memory
    weight: str  # name on disk of the base's weight
    role: str  # of that weight: attn.q, attn.qkv, …
    layer: int | None
    rows: int  # out
    columns: int  # in
    rank: int
    scaling: float  # what B A is multiplied by: alpha / rank, or alpha / sqrt(rank) with use_rslora
    transposed: bool  # the base's weight is stored as [in, out] (GPT-2's Conv1D)
    a: str  # name on disk of A [rank, columns]
    b: str  # name on disk of B [rows, rank]


def as_lora_config(given: Any) -> LoraConfig:
    """The LoraConfig of a peft.LoraConfig, a dict of its options, an adapter's folder or its adapter_config.json.

    UserError: no such file, another kind of adapter, unknown options, a rank below 1.
    """
    peft = require_peft()
    where = "lora config"
    if isinstance(given, str | Path):
        path = Path(given)
        path = path / ADAPTER_CONFIG if path.is_dir() else path
        given, where = read_json(path, MAX_CONFIG), str(path)
        check_adapter(given, where)
    if isinstance(given, Mapping):
        kind = given.get("peft_type") or "LORA"
        if getattr(kind, "value", kind) != "LORA":
            raise UserError(f"{where}: is an adapter of type {kind}; only LoRA can be filled")
        try:
            with _quiet():
                given = peft.LoraConfig(**{k: v for k, v in given.items() if k not in ("peft_type", "peft_version")})
        except Exception as error:  # PEFT checks few settings, so unusual ones fail anywhere
            raise UserError(f"{where}: PEFT refuses it: {_reason(error)}") from error
    if not isinstance(given, peft.LoraConfig):
        raise UserError(f"{where}: is a {type(given).__name__}; give a LoraConfig, its options or an adapter's folder")
    ranks = [given.r, *(given.rank_pattern or {}).values()]
    invalid = next((r for r in ranks if isinstance(r, bool) or not isinstance(r, int) or r < 1), None)
    if invalid is not None:
        raise UserError(f"{where}: rank is {invalid}; give a whole number of at least 1")
    return given


def make_peft_model(model: PreTrainedModel, lora_config: LoraConfig, where: str) -> PeftModel:
    """A PEFT model of a model on the meta device. UserError, about `where`, for what PEFT cannot adapt."""
    peft = require_peft()
    config = copy.deepcopy(lora_config)
    config.init_lora_weights = True  # the sampler decides how to initialise; PEFT needs weights for some ways
    _check_targets(model, config.target_modules, where)
    check_patterns(config, [name for name, _ in model.named_modules()], where)
    try:
        with _quiet():
            return peft.get_peft_model(model, config, low_cpu_mem_usage=True)
    except Exception as error:  # PEFT's reason for a combination of settings that no check above covers
        raise UserError(f"{where}: PEFT cannot adapt it: {_reason(error)}") from error


def adapter_config_of(model: PeftModel, adapter_name: str) -> dict[str, Any]:
    """The adapter_config.json of an adapter of a PEFT model. UserError: no such adapter, or one that is not LoRA."""
    peft = require_peft()
    config = getattr(model, "peft_config", {}).get(adapter_name)
    if config is None:
        raise unknown("adapter of the model", adapter_name, getattr(model, "peft_config", {}))
    if config.peft_type != peft.PeftType.LORA:
        raise UserError(f"adapter {adapter_name!r} is of type {config.peft_type.value}; only LoRA can be filled")
    return _as_json(config, model.get_base_model())


def adapter_pairs(
    model: PeftModel, adapter_name: str, base_specs: Mapping[str, TensorSpec], ties: Mapping[str, str]
) -> list[Pair]:
    """The pairs of an adapter of a PEFT model, on the meta device or not.

    base_specs and ties are those of the base's blueprint, by names on disk. UserError if it adapts a layer that is not
    plain linear (quantised, embedding, convolution), is a variant (DoRA and similar), or a rank is above the smaller
    side of a weight.
    """
    from peft.tuners.lora import LoraLayer

    base = model.get_base_model()
    layers = {n: m for n, m in base.named_modules() if isinstance(m, LoraLayer) and adapter_name in m.r}
    for module, layer in layers.items():
        _refuse_variants(module, layer, adapter_name)
    disk_names = _disk_names(base, layers)
    pairs = []
    for module, layer in layers.items():
        name = disk_names.get(module)
        weight = ties.get(name or "", name or f"{module}.weight")
        if weight not in base_specs:
            raise UserError(f"{module}: {weight} is not a tensor of the base on disk; adapt other modules")
        pairs.append(_pair(module, layer, adapter_name, base_specs[weight]))
    _check_ranks(pairs)
    return pairs


def adapter_specs(
    model: PeftModel, adapter_name: str, pairs: list[Pair], base_specs: Mapping[str, TensorSpec]
) -> tuple[TensorSpec, ...]:
    """A and B of every pair, float32, under the names that PEFT saves. UserError where the adapter trains more."""
    peft = require_peft()
    specs = tuple(spec for pair in pairs for spec in _pair_specs(pair, base_specs[pair.weight]))
    state = peft.get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    more = sorted(set(state) - {spec.name for spec in specs})
    if more:
        raise UserError(f"the adapter trains {more[0]} besides its pairs; leave out modules_to_save and the like")
    odd = next((s for s in specs if tuple(state[s.name].shape) != s.shape), None)
    if odd is not None:
        raise UserError(f"{odd.name} is {list(state[odd.name].shape)} in PEFT, not {list(odd.shape)}: not plain LoRA")
    return specs


def refuse_quantised(config: Mapping[str, Any], where: str) -> None:
    """UserError for the config of a quantised base."""
    if config.get("quantization_config"):
        raise UserError(f"{where}: is quantised, so its weights are not plain matrices; give the original model")


def require_peft() -> Any:
    """The package peft. UserError where it is not installed."""
    try:
        import peft
    except ImportError:
        raise UserError("LoRA needs the package peft, which is not installed: pip install 'headstart[peft]'") from None
    return peft


def _disk_names(model: nn.Module, layers: Mapping[str, Any]) -> dict[str, str]:
    """Module -> name on disk of its weight, for the weights that are the same on disk and in memory."""
    weights = {f"{module}.weight": layer.get_base_layer().weight for module, layer in layers.items()}
    module_of = {id(weight): name.removesuffix(".weight") for name, weight in weights.items()}
    renamed = to_disk(model, weights) if hasattr(model, "save_pretrained") else weights  # type: ignore[arg-type]
    return {module_of[id(weight)]: name for name, weight in renamed.items() if id(weight) in module_of}


def _pair(module: str, layer: Any, adapter: str, spec: TensorSpec) -> Pair:
    """spec: of the layer's weight on disk."""
    prefix = f"base_model.model.{module}"
    return Pair(
        module=module,
        weight=spec.name,
        role=spec.role,
        layer=spec.layer,
        rows=layer.out_features,
        columns=layer.in_features,
        rank=layer.r[adapter],
        scaling=float(layer.scaling[adapter]),
        transposed=layer.fan_in_fan_out,
        a=f"{prefix}.lora_A.weight",
        b=f"{prefix}.lora_B.weight",
    )


def _pair_specs(pair: Pair, weight: TensorSpec) -> list[TensorSpec]:
    """A and B of a pair. An axis is `other` where the parts fused in the base's weight differ."""
    outs, ins = {p.axes[0] for p in weight.parts}, {p.axes[-1] for p in weight.parts}
    out, into = (axes.pop() if len(axes) == 1 else "other" for axes in (outs, ins))
    a = Part("lora.a", ("rank", into), (pair.rank, pair.columns))
    b = Part("lora.b", (out, "rank"), (pair.rows, pair.rank))
    return [
        TensorSpec(name, part.shape, torch.float32, (part,), weight.layer, expert=weight.expert)
        for name, part in ((pair.a, a), (pair.b, b))
    ]


def _refuse_variants(module: str, layer: Any, adapter: str) -> None:
    """UserError where a layer is not a plain linear one with plain LoRA."""
    from peft.tuners.lora import Linear

    base = layer.get_base_layer()
    weight = getattr(base, "weight", None)
    if type(layer) is not Linear or weight is None or not weight.is_floating_point() or weight.dtype.itemsize < 2:
        raise UserError(
            f"{module} is a {type(base).__name__} ({type(layer).__name__} to PEFT): only plain linear layers can "
            "be filled, not quantised ones, embeddings, convolutions or experts; adapt other modules"
        )
    variant = layer.lora_variant.get(adapter)
    if variant is not None or layer.lora_bias.get(adapter):
        kind = "LoRA with a bias" if variant is None else type(variant).__name__.removesuffix("LinearVariant")
        raise UserError(f"{module}: {kind} cannot be filled; use plain LoRA (use_dora=False)")


def _check_ranks(pairs: list[Pair]) -> None:
    """UserError where a rank is above the smaller side of its weight."""
    pair = next((p for p in pairs if p.rank > min(p.rows, p.columns)), None)
    if pair is not None:
        most = min(min(p.rows, p.columns) for p in pairs)
        raise UserError(
            f"rank {pair.rank} is above the smaller side of {pair.module} ({pair.rows} x {pair.columns}); "
            f"give at most {most}, or other targets"
        )


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _check_targets(model: nn.Module, targets: Any, where: str) -> None:
    """UserError for a target that is not the name of a linear layer of the base."""
    from transformers.pytorch_utils import Conv1D

    if targets is None or isinstance(targets, str):  # PEFT's table, a regular expression, or all-linear
        return
    modules = dict(model.named_modules())
    linear = {n.rpartition(".")[2] for n, m in modules.items() if isinstance(m, nn.Linear | Conv1D)}
    by_end: dict[str, list[str]] = {}  # the end of a name, at a dot -> the names with it
    for name in modules:
        parts = name.split(".")
        for i in range(len(parts)):
            by_end.setdefault(".".join(parts[i:]), []).append(name)
    for target in sorted(targets):
        matches = by_end.get(target, ())
        if not matches:
            raise unknown(f"adapter target of {where}", target, linear)
        other = next((n for n in matches if not isinstance(modules[n], nn.Linear | Conv1D)), None)
        if other is not None:
            raise UserError(
                f"adapter target {target!r}: {other} is a {type(modules[other]).__name__}, not a linear layer; "
                f"choose from {', '.join(sorted(linear))}"
            )


def _as_json(config: LoraConfig, model: nn.Module) -> dict[str, Any]:
    """The adapter_config.json of an adapter that is loaded as it is stored: PEFT must not initialise it again."""
    values = {k: sorted(v) if isinstance(v, set) else getattr(v, "value", v) for k, v in config.to_dict().items()}
    values |= {"init_lora_weights": True, "inference_mode": True}
    if values["task_type"] is None:
        values["task_type"] = _task(type(model).__name__)
    if values["task_type"] is None:
        values["auto_mapping"] = {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}
    return dict(sorted(values.items()))


def _task(model_class: str) -> str | None:
    """PEFT's task type of a class of transformers, which AutoPeftModelFor… needs. None for a class without one."""
    from transformers.models.auto import modeling_auto as auto

    if model_class in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        return "CAUSAL_LM"
    return "SEQ_2_SEQ_LM" if model_class in auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values() else None


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences PEFT's warnings on settings that it corrects itself (fan_in_fan_out)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
