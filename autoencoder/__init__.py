"""The autoencoder of units. Its names are imported at first use, because diffusers is slow to load."""

from __future__ import annotations

from typing import Any

__all__ = ["WeightAutoencoder"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(name)
    from autoencoder.model import WeightAutoencoder

    return WeightAutoencoder
