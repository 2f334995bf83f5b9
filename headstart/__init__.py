"""Initial weights for new language models, learned from the weights of open ones."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from headstart.pipelines import register_pipeline

__version__ = "0.1.0"

# Imported on first use, because torch and transformers take seconds: name -> (module, attribute or None for itself).
_LAZY = {
    "Blueprint": ("zoo.targets.blueprint", "Blueprint"),
    "WeightDiffusionPipeline": ("diffusion.pipeline", "WeightDiffusionPipeline"),
    "Zoo": ("zoo.donors.zoo", "Zoo"),
    "initialize_lora_weights": ("headstart.lora.in_memory", "initialize_lora_weights"),
    "load_into": ("zoo.donors.memory", "load_into"),
    "samplers": ("headstart.samplers", None),
    "zoo_of": ("zoo.donors.memory", "zoo_of"),
}
__all__ = [
    "Blueprint",
    "WeightDiffusionPipeline",
    "Zoo",
    "__version__",
    "initialize_lora_weights",
    "load_into",
    "samplers",
    "zoo_of",
]


register_pipeline()


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'headstart' has no attribute {name!r}")
    module, attribute = _LAZY[name]
    return getattr(import_module(module), attribute) if attribute else import_module(module)


def __dir__() -> list[str]:
    return sorted(__all__)
