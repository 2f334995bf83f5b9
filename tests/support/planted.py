"""Donors in which known coordinates, neurons, KV groups and layers do nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.support.shaken import CONFIGS, build
from zoo.donors.zoo import Zoo, open_standalone
from zoo.targets.blueprint import Blueprint
from zoo.tensors import join_parts, split_parts

DEAD: dict[str, Any] = {
    "residual": [1, 5, 6, 17, 20, 21, 30, 31],
    "ffn": [[0, 3, 9, 40, 41, 46, 47, 8], [2, 12, 13, 14, 15, 16, 30, 33], [1, 2, 3, 4, 5, 6, 7, 47]],
    "groups": [1, 0, 0],
}


def config(name: str, **more: Any) -> dict[str, Any]:
    """A config of CONFIGS with bytes for tokens, three layers, and norms with a negligible epsilon."""
    renamed = {"num_hidden_layers": "n_layer", "rms_norm_eps": "layer_norm_epsilon"} if name == "gpt2" else {}
    return CONFIGS[name] | {
        renamed.get(k, k): v
        for k, v in ({"vocab_size": 256, "num_hidden_layers": 3, "rms_norm_eps": 1e-10} | more).items()
    }


@torch.no_grad()
def zero_dead_parts(
    model: torch.nn.Module, axes: tuple[str, ...] = ("residual", "ffn", "groups"), layer: int | None = None
) -> None:
    """Zeros, in place, the rows and columns that are DEAD along `axes`, and the matrices by which `layer` writes."""
    blueprint = Blueprint.from_module(model)
    meta, state = blueprint.metadata, model.state_dict()
    assert meta is not None
    for spec in blueprint.specs:
        parts = {role: part.clone() for role, part in split_parts(spec, state[spec.name]).items()}
        for part in spec.parts:
            tensor = parts[part.role]
            for dim, axis in enumerate(part.axes):
                for dead, index in _dead(axis, spec.layer, meta).items():
                    if dead in axes and not (part.role == "norm" and axis == "residual"):
                        tensor.index_fill_(dim, index, 0.0)
            if layer is not None and spec.layer == layer and part.role in ("attn.o", "attn.v", "mlp.down", "mlp.up"):
                tensor.zero_()
            if layer is not None and spec.layer == layer and spec.site in ("attn.out", "mlp.out"):
                tensor.zero_()
        state[spec.name].copy_(join_parts(spec, parts))


def _dead(axis: str, layer: int | None, meta: Any) -> dict[str, torch.Tensor]:
    if axis == "residual":
        return {"residual": torch.tensor(DEAD["residual"])}
    if axis == "ffn" and layer is not None:
        return {"ffn": torch.tensor(DEAD["ffn"][layer % 3])}
    if axis in ("heads", "kv_heads") and layer is not None:
        rows = (meta.heads // meta.kv_heads if axis == "heads" else 1) * meta.head_dim
        return {"groups": DEAD["groups"][layer % 3] * rows + torch.arange(rows)}
    return {}


def planted(folder: Path, config: dict[str, Any], *axes: str, layer: int | None = None) -> Zoo:
    """A zoo of one: a model of that config whose DEAD parts along `axes`, and whose `layer`, do nothing."""
    model = build(config)
    zero_dead_parts(model, axes, layer)
    model.save_pretrained(folder)
    return open_standalone(folder)


def live_indices(axis: str, layer: int = 0) -> list[int]:
    """The indices along `axis` that are not DEAD."""
    size, dead = {"residual": (32, DEAD["residual"]), "ffn": (48, DEAD["ffn"][layer])}[axis]
    return [i for i in range(size) if i not in dead]
