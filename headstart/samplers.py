"""`from headstart import samplers; samplers.get("weight-selection")(donor="…")`."""

from __future__ import annotations

from headstart.methods import METHODS, describe, get, load

__all__ = ["METHODS", "describe", "get", "load"]
