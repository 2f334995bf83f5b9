"""Initial weights for new language models, learned from the weights of open ones."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_LAZY = {
    "Blueprint": ("zoo.targets.blueprint", "Blueprint"),
    "initialize_lora_weights": ("headstart.lora.lora", "initialize_lora_weights"),
    "samplers": ("headstart.samplers", None),
}
__all__ = ["Blueprint", "__version__", "initialize_lora_weights", "samplers"]


def __getattr__(name: str) -> Any:
    """Imports torch and transformers only when something is used."""
    if name not in _LAZY:
        raise AttributeError(f"module 'headstart' has no attribute {name!r}")
    module, attribute = _LAZY[name]
    return getattr(import_module(module), attribute) if attribute else import_module(module)
