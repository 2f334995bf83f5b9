"""What has to be filled: the tensors of a target as they are stored, read from its config without any weights."""

from __future__ import annotations

import copy
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from zoo.checkpoints.quantised import CONFIG_KEYS as QUANTISATION_KEYS
from zoo.checkpoints.quantised import without_quantisation
from zoo.errors import unknown
from zoo.targets import roles
from zoo.targets.adapters import (
    Pair,
    adapter_config_of,
    adapter_pairs,
    adapter_specs,
    as_lora_config,
    make_peft_model,
    refuse_quantised,
    require_peft,
)
from zoo.targets.blueprint_json import metadata_from_json, metadata_to_json, specs_from_json, specs_to_json
from zoo.targets.config_facts import ask
from zoo.targets.configs import check_config, meta_model, metadata_of, parse_config, read_config, to_disk
from zoo.tensors import Metadata, Part, TensorSpec

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PretrainedConfig, PreTrainedModel

__all__ = ["Blueprint", "meta_model", "to_disk"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Adapter:
    """What a blueprint of a LoRA adapter knows besides its tensors."""

    config: dict[str, Any]  # adapter_config.json
    base: Blueprint
    pairs: tuple[Pair, ...]


@dataclass(frozen=True)
class Blueprint:
    """What has to be filled.

    specs     one per tensor on disk, in the model's order (by name where transformers converts tensors on saving)
    metadata  the architecture in numbers, None without a config
    config    the parsed config.json, None without one
    ties      name that is not on disk -> name on disk of the tensor that it shares
    module    the argument of `from_module`, whose classes know the default initialisation
    adapter   for a LoRA adapter (`from_lora`): its config, its base and its pairs
    """

    specs: tuple[TensorSpec, ...]
    metadata: Metadata | None = None
    config: dict[str, Any] | None = None
    ties: dict[str, str] = field(default_factory=dict)
    module: nn.Module | None = field(default=None, repr=False, compare=False)
    adapter: Adapter | None = field(default=None, repr=False)

    @classmethod
    def from_config(cls, source: str | Path | Mapping[str, Any], where: str | None = None) -> Blueprint:
        """The blueprint of a config.

        source: a config.json, a folder that contains one, a hub id (org/name or org/name@revision) or a parsed config.
        Only a hub id uses the network. where: the name of a parsed config in errors. A quantization_config is left out,
        because the tensors that fill a blueprint are not quantised. UserError for a config that cannot be read, an
        architecture that transformers does not know, and numbers that disagree.
        """
        data, name = read_config(source)
        where = where or name
        if any(data.get(key) for key in QUANTISATION_KEYS):
            log.info("%s: its quantization_config is left out: the weights are written as they are sampled", where)
        data = without_quantisation(data)

        def build() -> Blueprint:
            return _model_blueprint(meta_model(parse_config(data, where), where), copy.deepcopy(data))

        return ask("blueprint", data, build, _to_json, lambda value: _from_json(value, copy.deepcopy(data)))

    @classmethod
    def from_pretrained_config(cls, config: PretrainedConfig) -> Blueprint:
        """The blueprint of a transformers config object, which is not changed. UserError as for `from_config`."""
        check_config(config, type(config).__name__)
        return _model_blueprint(meta_model(config, type(config).__name__), _as_json(config))

    @classmethod
    def from_module(cls, module: nn.Module) -> Blueprint:
        """The blueprint of the parameters of any module, shared ones once.

        The names are those on disk for a transformers model, and the module's own for any other, whose roles are
        inferred from the names (and sizes, with a `module.config`).
        """
        from transformers import PretrainedConfig, PreTrainedModel

        config = getattr(module, "config", None)
        if isinstance(module, PreTrainedModel):
            return replace(_model_blueprint(module, _as_json(module.config)), module=module)
        metadata = metadata_of(config) if isinstance(config, PretrainedConfig) else None
        data = _as_json(config) if isinstance(config, PretrainedConfig) else None
        tensors = dict(module.named_parameters())
        first = {id(p): name for name, p in tensors.items()}
        every = module.named_parameters(remove_duplicate=False)
        ties = {name: first[id(p)] for name, p in every if name not in tensors}
        origin = {name: name for name in tensors}
        return replace(_tensors_blueprint(module, tensors, origin, metadata, data, ties), module=module)

    @classmethod
    def from_lora(cls, base_config: str | Path | Mapping[str, Any], lora_config: Any) -> Blueprint:
        """The blueprint of a LoRA adapter: A [rank, in] (role lora.a) and B [out, rank] (lora.b) of every target.

        They are float32, under the names that PEFT saves. `metadata` is the base's.

        base_config: as for `from_config`. lora_config: a peft.LoraConfig, a dict of its options, an adapter's folder or
        its adapter_config.json; its initialisation method is ignored.

        UserError as for `from_config`, and if
        - peft is not installed,
        - the base lacks a target module or is quantised,
        - a rank is above the smaller side of a target's weight,
        - the adapter is not plain LoRA of linear layers (DoRA, modules_to_save, embeddings).
        """
        require_peft()
        data, where = read_config(base_config)
        refuse_quantised(data, where)
        model = meta_model(parse_config(data, where), where)
        base = cls.from_config(data)
        config = as_lora_config(lora_config)
        path = str(base_config) if isinstance(base_config, str | Path) else None
        blueprint = adapter_blueprint(make_peft_model(model, config, where), base)
        assert blueprint.adapter is not None
        # PEFT writes the name of the model without weights here.
        blueprint.adapter.config["base_model_name_or_path"] = config.base_model_name_or_path or path
        return blueprint

    @cached_property
    def _by_name(self) -> dict[str, TensorSpec]:
        return {s.name: s for s in self.specs}

    def __getitem__(self, name: str) -> TensorSpec:
        """The spec of a tensor. KeyError, with the closest name, for an unknown name."""
        if name in self._by_name:
            return self._by_name[name]
        if name in self.ties:
            raise KeyError(f"{name!r} is tied to {self.ties[name]!r} and not stored")
        raise KeyError(str(unknown("tensor", name, self._by_name))[:300])

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the tensors on disk."""
        return tuple(self._by_name)

    @property
    def parameters(self) -> int:
        """The number of weights."""
        return sum(s.numel for s in self.specs)

    @property
    def nbytes(self) -> int:
        """The size of all tensors on disk."""
        return sum(s.numel * s.dtype.itemsize for s in self.specs)

    @property
    def unknown(self) -> tuple[str, ...]:
        """The tensors that no method models (role `other`). They keep the default initialisation; tell the user."""
        return tuple(s.name for s in self.specs if s.role == "other")

    @property
    def has_head(self) -> bool:
        """Whether it predicts tokens, by a head of its own or by its embedding. Base models and classifiers do not."""
        own = any(part.axes[0] == "vocab" for _, part in self.find("head") if part.axes)
        return own or bool(self.ties) or (self.metadata is not None and self.metadata.tied)

    def offset(self, spec: TensorSpec) -> float:
        """What the model adds to the stored values of a tensor: 1 for the gains of Gemma's norms."""
        is_gain = spec.role == "norm" and spec.kind == "weight"
        return self.metadata.gain_offset if is_gain and self.metadata is not None else 0.0

    def has_norm(self, site: str) -> bool:
        """Whether a norm of this site (of NORM_SITES) is in the model, with weights or without (OLMo 1)."""
        bare = self.metadata.extra.get("bare_norms", ()) if self.metadata is not None else ()
        return bool(self.find("norm", site=site)) or site in bare  # type: ignore[operator]

    def find(
        self,
        role: str,
        layer: int | None = None,
        kind: str = "weight",
        site: str | None = None,
        expert: int | None = None,
    ) -> list[tuple[TensorSpec, Part]]:
        """The parts of a role, fused ones included, with their tensors. None for layer, site or expert means any."""
        return [
            (spec, part)
            for spec in self._specs_by_role.get((role, kind), ())
            if (layer is None or spec.layer == layer)
            and (site is None or spec.site == site)
            and (expert is None or spec.expert == expert)
            for part in spec.parts
            if part.role == role
        ]

    @cached_property
    def _specs_by_role(self) -> dict[tuple[str, str], list[TensorSpec]]:
        by_role: dict[tuple[str, str], list[TensorSpec]] = {}
        for spec in self.specs:
            for role in {part.role for part in spec.parts}:
                by_role.setdefault((role, spec.kind), []).append(spec)
        return by_role


def adapter_blueprint(model: PeftModel, base: Blueprint, adapter_name: str = "default") -> Blueprint:
    """The blueprint of an adapter of a PEFT model, on the meta device or not; `base` is that of its base model.

    UserError if
    - the model has no adapter of this name, or it is not LoRA or a variant (DoRA and similar),
    - it adapts a layer that is not a plain linear one (quantised, embedding, convolution),
    - it trains other tensors as well,
    - a rank is above the smaller side of a weight.
    """
    config = adapter_config_of(model, adapter_name)
    base_specs = {spec.name: spec for spec in base.specs}
    pairs = adapter_pairs(model, adapter_name, base_specs, base.ties)
    specs = adapter_specs(model, adapter_name, pairs, base_specs)
    return Blueprint(specs, base.metadata, adapter=Adapter(config, base, tuple(pairs)))


def _to_json(blueprint: Blueprint) -> dict[str, Any]:
    """What a blueprint says besides its config."""
    metadata = metadata_to_json(blueprint.metadata)
    return {"specs": specs_to_json(blueprint.specs), "metadata": metadata, "ties": blueprint.ties}


def _from_json(value: dict[str, Any], data: dict[str, Any]) -> Blueprint:
    metadata = metadata_from_json(value["metadata"])
    return Blueprint(specs_from_json(value["specs"]), metadata, data, dict(value["ties"]))


def _as_json(config: PretrainedConfig) -> dict[str, Any]:
    """The config.json that `save_pretrained` would write."""
    return json.loads(config.to_json_string())


def _model_blueprint(model: PreTrainedModel, data: dict[str, Any]) -> Blueprint:
    """The blueprint of a transformers model, on the meta device or not."""
    ties = model.all_tied_weights_keys
    skipped = {*ties, *(model._keys_to_ignore_on_save or ())}
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in skipped}
    on_disk = to_disk(model, state)
    module_name = {
        id(tensor): name for name, tensor in state.items()
    }  # a tensor that is only renamed stays the same object
    origin = {name: module_name[id(tensor)] for name, tensor in on_disk.items() if id(tensor) in module_name}

    def disk_name(name: str) -> str:
        return next(iter(to_disk(model, {name: torch.empty(0, device="meta")})))

    ties_on_disk = {disk_name(tied): disk_name(stored) for tied, stored in ties.items()}
    return _tensors_blueprint(model, on_disk, origin, metadata_of(model.config), data, ties_on_disk)


def _tensors_blueprint(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    origin: Mapping[str, str],
    metadata: Metadata | None,
    data: dict[str, Any] | None,
    ties: dict[str, str],
) -> Blueprint:
    """origin: name on disk -> name in memory, for the tensors that are the same in both."""
    owner = {name: model.get_submodule(in_memory.rpartition(".")[0]) for name, in_memory in origin.items()}
    specs = roles.assign_roles(
        [(name, tuple(t.shape), t.dtype) for name, t in tensors.items()],
        metadata,
        convolutions={name for name, module in owner.items() if isinstance(module, _ConvNd)},
        transposed={name for name, module in owner.items() if type(module).__name__ == "Conv1D"},
    )
    if metadata is not None:
        metadata = _complete_metadata(metadata, specs, owner, model)
    return Blueprint(specs, metadata, data, ties)


def _complete_metadata(
    metadata: Metadata, specs: tuple[TensorSpec, ...], owner: Mapping[str, nn.Module], model: nn.Module
) -> Metadata:
    """The metadata with what the model shows and its config does not. owner: name on disk -> the tensor's module."""
    norms = [
        s for s in specs if s.role == "norm" and s.kind == "weight" and s.site not in ("q", "k") and s.name in owner
    ]
    norms.sort(key=lambda s: s.site != "final")
    kind, offset = _norm_kind(owner[norms[0].name]) if norms else (metadata.norm, False)
    bare = _norms_without_weights(model)
    if bare and not norms:
        kind = _bare_norm_kind(next(iter(bare.values())), metadata.width)
    positions = sum(p.shape[0] for s in specs for p in s.parts if p.role == "embed" and p.axes[0] == "position")
    shared = bool(metadata.extra.get("parallel_block")) and not any(s.site == "mlp" for s in specs)
    extra = {**metadata.extra, "rms_offset": offset, "shared_norm": shared}
    shared_ffn = {
        n for s in specs for p in s.parts for axis, n in zip(p.axes, p.shape, strict=True) if axis == "shared_ffn"
    }
    if shared_ffn:
        extra["shared_ffn"] = max(shared_ffn)
    if any(re.search("sinusoid", type(module).__name__, re.IGNORECASE) for module in model.modules()):
        extra["sinusoidal_positions"] = positions == 0
    if sites := roles.norm_sites(bare, metadata):
        extra["bare_norms"] = sites
    return replace(metadata, norm=kind, positions=positions, extra=extra)


def _norms_without_weights(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> norm without a gain (OLMo 1): no tensor on disk shows that it is there."""
    return {
        name: module
        for name, module in model.named_modules()
        if "norm" in type(module).__name__.lower() and not any(module.children()) and not module.state_dict()
    }


def _bare_norm_kind(norm: nn.Module, width: int) -> str:
    """'rms' or 'layer' for a norm without weights: LayerNorm maps a constant vector to zero and RMSNorm does not."""
    try:
        with torch.no_grad():
            return "rms" if norm(torch.ones(1, width)).abs().max() > 0.5 else "layer"
    except Exception:  # a module that is called a norm, and takes other arguments
        return "rms"


def _norm_kind(norm: nn.Module) -> tuple[str, bool]:
    """('rms' or 'layer', whether gains are stored minus one), found by applying a copy of the norm.

    LayerNorm maps a constant vector to zero and RMSNorm does not. Gains of zero give zero, unless the norm adds one to
    them (Gemma). The name of the class decides where the norm cannot be applied to a vector (I-BERT).
    """
    try:
        return _applied_norm_kind(norm)
    except Exception:  # a norm with a forward of its own
        return ("layer" if "LayerNorm" in type(norm).__name__ else "rms"), False


def _applied_norm_kind(norm: nn.Module) -> tuple[str, bool]:
    """`_norm_kind` by applying a copy of the norm."""
    probe = copy.deepcopy(norm).float().to_empty(device="cpu")
    with torch.no_grad():
        for parameter in probe.parameters():
            parameter.zero_()
        width = next(probe.parameters()).shape[-1]
        offset = bool(probe(torch.linspace(1.0, 2.0, width)[None]).any())
        for name, parameter in probe.named_parameters():
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        constant = probe(torch.ones(1, width))
    return ("rms" if constant.abs().max() > 0.5 else "layer"), offset
