"""Configs of other sizes: the config of an architecture with the sizes of another shape."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from zoo.targets.configs import SIZE_KEYS, parse_config, text_config
from zoo.tensors import Metadata

SIZES = ("width", "layers", "heads", "kv_heads", "head_dim", "ffn", "vocab")
PER_LAYER = ("layer_types",)  # lists with one item per layer, which another depth would contradict


def _key(data: Mapping[str, Any], known: Any, size: str) -> str | None:
    """The key of a size in a config, None if its architecture derives the size from others."""
    return next((key for key in SIZE_KEYS[size] if key in data or hasattr(known, key)), None)


def has_size(config: Mapping[str, Any], size: str) -> bool:
    """Whether the architecture of a config has this size on its own, and does not derive it from others."""
    return _key(config, text_config(parse_config(config, "config to resize")), size) is not None


def resized_config(config: Mapping[str, Any], shape: Metadata) -> dict[str, Any]:
    """A parsed config of transformers with the sizes of `shape`. Everything else stays.

    Only the keys that the architecture has are set, under the names that its class uses."""
    data = copy.deepcopy(dict(config))
    known = text_config(parse_config(data, "config to resize"))
    for size in SIZES:
        if (key := _key(data, known, size)) is not None:
            data[key] = getattr(shape, size)
    for key in PER_LAYER:
        if isinstance(data.get(key), list):
            kinds = data[key]
            data[key] = [kinds[i % len(kinds)] for i in range(shape.layers)]
    data["tie_word_embeddings"] = shape.tied
    return data
