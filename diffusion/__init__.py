"""Latent diffusion over sets of units. Names are imported when asked for: diffusers is slow to load."""

from __future__ import annotations

from typing import Any

_PLACES = {
    "WeightDiffusionPipeline": "diffusion.pipeline",
    "Request": "diffusion.pipeline",
    "UnitDenoiser": "diffusion.denoiser",
    "ZooMemory": "diffusion.memory",
}
__all__ = sorted(_PLACES)


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(name)
    from importlib import import_module

    return getattr(import_module(_PLACES[name]), name)
