"""LoRA adapters as blueprints: which pairs A, B adapt which weights of a base, as PEFT itself sees it, without weights.

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
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from zoo.checkpoints.headers import read_json
from zoo.errors import UserError, unknown
from zoo.options import option
from zoo.sampler import Sampler
from zoo.targets.blueprint import Blueprint, meta_model, to_disk
from zoo.targets.configs import parse, read
from zoo.tensors import Part, TensorSpec

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

    from zoo.donors.store import Donor, Zoo

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True)
class Pair:
    """What adapts one linear layer."""

    module: str  # in the base model, as in memory
    weight: str  # disk name of the base's weight
    role: str  # of that weight: attn.q, attn.qkv, …
    layer: int | None
    rows: int  # out
    columns: int  # in
    rank: int
    scaling: float  # what B A is multiplied by: alpha / rank, or alpha / sqrt(rank) with use_rslora
    transposed: bool  # the base's weight lies on disk as [in, out] (GPT-2's Conv1D)
    a: str  # disk names of the adapter: A [rank, columns]
    b: str  # B [rows, rank]


@dataclass(frozen=True)
class Adapter:
    config: dict[str, Any]  # adapter_config.json, for the base as it is
    base: Blueprint
    pairs: tuple[Pair, ...]


@dataclass(kw_only=True)
class LoraSampler(Sampler):
    """Fills A and B of every pair of an adapter's blueprint, float32. Where `compensated` says so, they belong to a
    base whose weights were made W - scaling B A, so that base and adapter together compute what the base did."""

    family: ClassVar[str] = "lora"

    base: str | None = option(None, "the donor that is adapted, else the zoo's first")

    def check(self, blueprint: Blueprint) -> tuple[Pair, ...]:
        """The pairs of the blueprint. UserError where this method cannot fill them; reads no weights."""
        return pairs_of(blueprint, self.name)

    @property
    def compensated(self) -> bool:
        return False

    @property
    def reads_base(self) -> bool:
        """Whether `fit` or `sample` need the weights of the base; else its config is enough."""
        return self.compensated


def from_lora(base_config: str | Path | Mapping[str, Any], lora_config: Any) -> Blueprint:
    """See Blueprint.from_lora."""
    peft = require_peft()
    data, where = read(base_config)
    _refuse_quantised(data.get("quantization_config"), where)
    model = meta_model(parse(data, where), where)
    base = Blueprint.from_config(data)
    config = copy.deepcopy(lora_config_of(lora_config))
    named = config.base_model_name_or_path or (str(base_config) if isinstance(base_config, str | Path) else None)
    config.init_lora_weights = True  # the sampler's business; PEFT would want weights for some
    _check_targets(model, config.target_modules, where)
    try:
        with _quiet():
            adapted = peft.get_peft_model(model, config, low_cpu_mem_usage=True)
    except ValueError as error:  # what PEFT says of a combination of settings that no check above knows
        raise UserError(f"{where}: PEFT cannot adapt it: {' '.join(str(error).split())[:300]}") from error
    blueprint = described(adapted, base)
    assert blueprint.adapter is not None
    blueprint.adapter.config["base_model_name_or_path"] = named  # PEFT puts what the hollow model is called
    return blueprint


def described(model: PeftModel, base: Blueprint, adapter_name: str = "default") -> Blueprint:
    """The blueprint of an adapter of a PEFT model, on the meta device or not; `base` is that of its base model.
    UserError: no such adapter, not LoRA, a layer that is no plain linear one (quantised, embedding, convolution), a
    variant (DoRA and its like), other tensors that are trained besides, a rank above the smaller side of a weight."""
    peft = require_peft()
    from peft.tuners.lora import LoraLayer

    config = getattr(model, "peft_config", {}).get(adapter_name)
    if config is None:
        raise unknown("adapter of the model", adapter_name, getattr(model, "peft_config", {}))
    if config.peft_type != peft.PeftType.LORA:
        raise UserError(f"adapter {adapter_name!r} is of type {config.peft_type.value}; only LoRA is filled here")
    inner = model.get_base_model()
    layers = {n: m for n, m in inner.named_modules() if isinstance(m, LoraLayer) and adapter_name in m.r}
    for module, layer in layers.items():
        _refuse_variants(module, layer, adapter_name)
    on_disk = _disk_names(inner, layers)
    pairs = [_pair(module, layer, adapter_name, on_disk.get(module), base) for module, layer in layers.items()]
    _check_ranks(pairs)
    specs = [spec for pair in pairs for spec in _specs(pair, base[pair.weight])]
    state = peft.get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    more = sorted(set(state) - {spec.name for spec in specs})
    if more:
        raise UserError(f"the adapter trains {more[0]} besides its pairs; leave modules_to_save and its like out")
    odd = next((s for s in specs if tuple(state[s.name].shape) != s.shape), None)
    if odd is not None:
        raise UserError(f"{odd.name} is {list(state[odd.name].shape)} to PEFT, not {list(odd.shape)}: no plain LoRA")
    adapter = Adapter(_as_json(config, inner), base, tuple(pairs))
    return Blueprint(tuple(specs), base.metadata, adapter=adapter)


def lora_config_of(given: Any) -> LoraConfig:
    """A peft.LoraConfig, a dict of its options, an adapter's folder or its adapter_config.json -> LoraConfig.
    UserError: no such file, another kind of adapter, unknown options, rank below 1."""
    peft = require_peft()
    where = "lora config"
    if isinstance(given, str | Path):
        path = Path(given)
        path = path / CONFIG if path.is_dir() else path
        given, where = read_json(path), str(path)
    if isinstance(given, Mapping):
        kind = given.get("peft_type") or "LORA"
        if getattr(kind, "value", kind) != "LORA":
            raise UserError(f"{where}: is an adapter of type {kind}; only LoRA is filled here")
        try:
            with _quiet():
                given = peft.LoraConfig(**{k: v for k, v in given.items() if k not in ("peft_type", "peft_version")})
        except (TypeError, ValueError) as error:
            raise UserError(f"{where}: PEFT refuses it: {str(error)[:300]}") from error
    if not isinstance(given, peft.LoraConfig):
        raise UserError(f"{where}: is a {type(given).__name__}; give a LoraConfig, its options or an adapter's folder")
    ranks = [given.r, *(given.rank_pattern or {}).values()]
    wrong = next((r for r in ranks if isinstance(r, bool) or not isinstance(r, int) or r < 1), None)
    if wrong is not None:
        raise UserError(f"{where}: rank {wrong}: give a whole number from 1 on")
    return given


def pairs_of(blueprint: Blueprint, who: str) -> tuple[Pair, ...]:
    """The pairs of an adapter's blueprint. UserError for the blueprint of a model."""
    if blueprint.adapter is None:
        raise UserError(f"{who} fills LoRA adapters, not models: use `headstart lora`, or Blueprint.from_lora")
    return blueprint.adapter.pairs


def base_donor(zoo: Zoo | None, name: str | None, who: str) -> Donor:
    """The donor that is adapted: the one called `name`, else the zoo's first. UserError where there is none."""
    if zoo is None or not zoo.donors:
        raise UserError(f"{who} reads the weights of the base: give it a zoo that holds the base")
    return zoo.donors[0] if name is None else zoo.donor(name)


def base_weight(donor: Donor, pair: Pair) -> Tensor:
    """The weight that a pair adapts, [rows, columns], float32."""
    weight = donor.read(pair.weight, torch.float32)
    return weight.mT.contiguous() if pair.transposed else weight


def compensation(weight: Tensor, pair: Pair, a: Tensor, b: Tensor) -> Tensor:
    """W - scaling B A for a weight as on disk (transposed where the pair says so), float32, of the weight's shape."""
    change = (pair.scaling * b.float()) @ a.float()
    return weight.float() - (change.mT if pair.transposed else change)


def refuse_shared(adapter: Adapter) -> None:
    """UserError where a weight that the adapter adapts has a second use (a head tied to the embedding): changing it for
    the one would change the other."""
    shared = set(adapter.base.ties.values())
    wrong = next((pair for pair in adapter.pairs if pair.weight in shared), None)
    if wrong is not None:
        raise UserError(
            f"{wrong.module} shares {wrong.weight} with another layer, which this method would change as well; "
            "leave it out of the targets"
        )


def change_norm(pair: Pair, a: Tensor, b: Tensor) -> float:
    """||scaling B A||_F by the Gram matrices of both, without the product."""
    a, b = a.double(), b.double()
    return pair.scaling * float(((b.mT @ b) * (a @ a.mT)).sum().clamp(min=0).sqrt())


def require_peft() -> Any:
    """The package peft. UserError where it is not installed."""
    try:
        import peft
    except ImportError:
        raise UserError("LoRA needs the package peft, which is not installed: pip install 'headstart[peft]'") from None
    return peft


def _disk_names(model: nn.Module, layers: Mapping[str, Any]) -> dict[str, str]:
    """Module -> disk name of its weight, for those that are on disk what they are in memory."""
    weights = {f"{module}.weight": layer.get_base_layer().weight for module, layer in layers.items()}
    module_of = {id(weight): name.removesuffix(".weight") for name, weight in weights.items()}
    renamed = to_disk(model, weights) if hasattr(model, "save_pretrained") else weights  # type: ignore[arg-type]
    return {module_of[id(weight)]: name for name, weight in renamed.items() if id(weight) in module_of}


def _pair(module: str, layer: Any, adapter: str, name: str | None, base: Blueprint) -> Pair:
    """name: of the layer's weight on disk, None where there is none."""
    name = base.ties.get(name or "", name or f"{module}.weight")
    if name not in base:
        raise UserError(f"{module}: {name} is not a tensor of the base on disk; adapt other modules")
    prefix = f"base_model.model.{module}"
    return Pair(
        module=module,
        weight=name,
        role=base[name].role,
        layer=base[name].layer,
        rows=layer.out_features,
        columns=layer.in_features,
        rank=layer.r[adapter],
        scaling=float(layer.scaling[adapter]),
        transposed=layer.fan_in_fan_out,
        a=f"{prefix}.lora_A.weight",
        b=f"{prefix}.lora_B.weight",
    )


def _specs(pair: Pair, of: TensorSpec) -> list[TensorSpec]:
    """A and B for the base's weight `of`; an axis is `other` where the parts fused in that weight differ."""
    outs, ins = {p.axes[0] for p in of.parts}, {p.axes[-1] for p in of.parts}
    out, into = (axes.pop() if len(axes) == 1 else "other" for axes in (outs, ins))
    a = Part("lora.a", ("rank", into), (pair.rank, pair.columns))
    b = Part("lora.b", (out, "rank"), (pair.rows, pair.rank))
    return [
        TensorSpec(name, part.shape, torch.float32, (part,), of.layer, expert=of.expert)
        for name, part in ((pair.a, a), (pair.b, b))
    ]


def _refuse_variants(module: str, layer: Any, adapter: str) -> None:
    from peft.tuners.lora import Linear

    base = layer.get_base_layer()
    weight = getattr(base, "weight", None)
    if type(layer) is not Linear or weight is None or not weight.is_floating_point() or weight.dtype.itemsize < 2:
        raise UserError(
            f"{module} is a {type(base).__name__} ({type(layer).__name__} to PEFT): only plain linear layers are "
            "filled, not quantised ones, embeddings, convolutions or experts; adapt others"
        )
    variant = layer.lora_variant.get(adapter)
    if variant is not None or layer.lora_bias.get(adapter):
        kind = "LoRA with a bias" if variant is None else type(variant).__name__.removesuffix("LinearVariant")
        raise UserError(f"{module}: {kind} is not filled here; use plain LoRA (use_dora=False and its like)")


def _refuse_quantised(quantisation: Any, where: str) -> None:
    if quantisation:
        raise UserError(f"{where}: is quantised, and its weights are no plain matrices; give what it was made from")


def _check_ranks(pairs: list[Pair]) -> None:
    worst = next((p for p in pairs if p.rank > min(p.rows, p.columns)), None)
    if worst is not None:
        most = min(min(p.rows, p.columns) for p in pairs)
        raise UserError(
            f"rank {worst.rank} is above the smaller side of {worst.module} ({worst.rows} x {worst.columns}); "
            f"give at most {most}, or other targets"
        )


def _check_targets(model: nn.Module, targets: Any, where: str) -> None:
    """UserError for a target that no module of the base is called, or that is no linear layer."""
    from transformers.pytorch_utils import Conv1D

    if targets is None or isinstance(targets, str):  # PEFT's table, a regular expression, or all-linear
        return
    modules = dict(model.named_modules())
    linear = {n.rpartition(".")[2] for n, m in modules.items() if isinstance(m, nn.Linear | Conv1D)}
    for target in sorted(targets):
        found = [n for n in modules if n == target or n.endswith(f".{target}")]
        if not found:
            raise unknown(f"adapter target of {where}", target, linear)
        wrong = next((n for n in found if not isinstance(modules[n], nn.Linear | Conv1D)), None)
        if wrong is not None:
            raise UserError(
                f"adapter target {target!r}: {wrong} is a {type(modules[wrong]).__name__}, no linear layer; "
                f"choose from {', '.join(sorted(linear))}"
            )


def _as_json(config: LoraConfig, model: nn.Module) -> dict[str, Any]:
    """adapter_config.json of an adapter that is loaded as it is written: PEFT must not initialise it again."""
    values = {k: sorted(v) if isinstance(v, set) else getattr(v, "value", v) for k, v in config.to_dict().items()}
    values |= {"init_lora_weights": True, "inference_mode": True}
    if values["task_type"] is None:
        values["task_type"] = _task(type(model).__name__)
    if values["task_type"] is None:
        values["auto_mapping"] = {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}
    return dict(sorted(values.items()))


def _task(model_class: str) -> str | None:
    """PEFT's word for what a class of transformers does, which AutoPeftModelFor… goes by."""
    from transformers.models.auto import modeling_auto as auto

    if model_class in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        return "CAUSAL_LM"
    return "SEQ_2_SEQ_LM" if model_class in auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values() else None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without PEFT's remarks on settings that it corrects itself (fan_in_fan_out)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
