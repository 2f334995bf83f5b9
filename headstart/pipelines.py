"""Lets `diffusers.DiffusionPipeline.from_pretrained` load our pipelines.

diffusers looks the class of a pipeline up among its own names. `import headstart` adds ours, without importing
diffusers: it is added when diffusers is imported, and our class is imported when its name is read."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

LIBRARY = "diffusers"
NAME = "WeightDiffusionPipeline"


def register_pipeline() -> None:
    """Adds our pipeline to diffusers, now or when it is imported."""
    if LIBRARY in sys.modules:
        _add_name(sys.modules[LIBRARY])
    elif not any(isinstance(finder, _OnImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _OnImport())


class _OnImport(MetaPathFinder):
    """Finds diffusers as usual, and adds the name once it is imported."""

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != LIBRARY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(LIBRARY)
        if spec is None or spec.loader is None:
            return spec
        loader: Any = spec.loader
        execute = loader.exec_module

        def execute_and_add(module: ModuleType) -> None:
            execute(module)
            _add_name(sys.modules[LIBRARY])

        loader.exec_module = execute_and_add
        return spec


def _add_name(module: ModuleType) -> None:
    """Adds the name as a property, so that our class is imported when somebody reads it."""
    kind = type(module)
    if not hasattr(kind, NAME):
        found = property(lambda _: getattr(importlib.import_module("diffusion.pipeline"), NAME))
        module.__class__ = type(kind.__name__, (kind,), {NAME: found})
