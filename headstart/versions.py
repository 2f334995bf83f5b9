"""The versions of the packages that an output depends on."""

from __future__ import annotations

import importlib.metadata

from headstart import __version__

PACKAGES = ("torch", "transformers", "diffusers", "safetensors")


def package_versions() -> dict[str, str]:
    """The versions of the packages that the output depends on."""
    return {"headstart": __version__, **{name: importlib.metadata.version(name) for name in PACKAGES}}
