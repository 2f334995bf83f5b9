"""What has to be filled: the tensors of a target as they lie on disk, read from its config without any weights."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from zoo import roles
from zoo.errors import UserError, unknown
from zoo.tensors import Metadata, Part, TensorSpec

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Blueprint:
    """specs     one per tensor on disk, in the model's own order
    metadata  the architecture in numbers, None where there is no config
    config    the parsed config.json, None where there is none
    ties      name that is not on disk -> disk name of the tensor that it shares
    """

    specs: tuple[TensorSpec, ...]
    metadata: Metadata | None = None
    config: dict[str, Any] | None = None
    ties: dict[str, str] = field(default_factory=dict)

    @classmethod
    def from_config(cls, source: str | Path | dict[str, Any]) -> Blueprint:
        """source: a config.json, a folder that holds one, a hub id (id or id@revision) or a parsed config.
        UserError: what cannot be read, whose architecture is unknown, or whose numbers disagree."""
        data, where = _read(source)
        return _build(_parse(data, where), data, where)

    @classmethod
    def from_pretrained_config(cls, config: PretrainedConfig) -> Blueprint:
        """config: a transformers config object. UserError as for from_config."""
        return _build(config, json.loads(config.to_json_string(use_diff=False)), type(config).__name__)

    @cached_property
    def _by_name(self) -> dict[str, TensorSpec]:
        return {s.name: s for s in self.specs}

    def __getitem__(self, name: str) -> TensorSpec:
        """KeyError: says which name is near."""
        if name in self._by_name:
            return self._by_name[name]
        if name in self.ties:
            raise KeyError(f"{name!r} is tied to {self.ties[name]!r} and not on disk")
        raise KeyError(str(unknown("tensor", name, self._by_name)))

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._by_name)

    @property
    def parameters(self) -> int:
        return sum(s.numel for s in self.specs)

    @property
    def nbytes(self) -> int:
        return sum(s.numel * s.dtype.itemsize for s in self.specs)

    @property
    def unknown(self) -> tuple[str, ...]:
        """The tensors that nobody models: role `other`, left to default initialisation."""
        return tuple(s.name for s in self.specs if s.role == "other")

    def find(
        self,
        role: str,
        layer: int | None = None,
        kind: str = "weight",
        site: str | None = None,
        expert: int | None = None,
    ) -> list[tuple[TensorSpec, Part]]:
        """The parts of a role, fused ones too. None for layer, site or expert means any."""
        return [
            (spec, part)
            for spec in self.specs
            if spec.kind == kind
            and (layer is None or spec.layer == layer)
            and (site is None or spec.site == site)
            and (expert is None or spec.expert == expert)
            for part in spec.parts
            if part.role == role
        ]


def _read(source: str | Path | dict[str, Any]) -> tuple[dict[str, Any], str]:
    if isinstance(source, dict):
        return source, "config"
    path = Path(source)
    path = path / "config.json" if path.is_dir() else path
    if not path.exists():
        raise UserError(f"{path}: no such config")
    return json.loads(path.read_text()), str(path)


def _parse(data: dict[str, Any], where: str) -> PretrainedConfig:
    from transformers import AutoConfig

    rest = {k: v for k, v in data.items() if k != "model_type"}
    return AutoConfig.for_model(data["model_type"], **rest)


def meta_model(config: PretrainedConfig) -> PreTrainedModel:
    """The model of a config on the meta device: names and shapes, no memory."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _build(config: PretrainedConfig, data: dict[str, Any], where: str) -> Blueprint:
    from transformers.core_model_loading import revert_weight_conversion

    model = meta_model(config)
    state = {k: v for k, v in model.state_dict().items() if k not in model.all_tied_weights_keys}
    on_disk = revert_weight_conversion(model, state)
    metadata = _metadata(config)
    specs = roles.assign(((n, tuple(t.shape), t.dtype) for n, t in on_disk.items()), metadata)
    return Blueprint(specs, metadata, data, dict(model.all_tied_weights_keys))


def _metadata(config: PretrainedConfig) -> Metadata:
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    rope = getattr(config, "rope_parameters", None) or {}
    return Metadata(
        architecture=config.model_type,
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=head_dim,
        ffn=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        vocab=config.vocab_size,
        tied=bool(config.tie_word_embeddings),
        rope_theta=rope.get("rope_theta"),
    )
