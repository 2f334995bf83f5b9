"""Latent diffusion over language models. Its names are imported at first use, because diffusers is slow to load."""

from __future__ import annotations

from typing import Any

_MODULES = {
    "LatentDenoiser": "diffusion.denoiser",
    "WeightDiffusionPipeline": "diffusion.pipeline",
    "WeightPipelineOutput": "diffusion.pipeline",
}
__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(name)
    from importlib import import_module

    return getattr(import_module(_MODULES[name]), name)
