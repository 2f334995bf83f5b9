"""Blueprints as JSON: their tensors, metadata and ties, exactly."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from zoo.tensors import Metadata, Part, TensorSpec

TUPLE = "__tuple__"  # JSON has lists alone


def specs_to_json(specs: tuple[TensorSpec, ...]) -> list[dict[str, Any]]:
    """One object for each tensor."""
    return [{**asdict(spec), "dtype": str(spec.dtype).removeprefix("torch.")} for spec in specs]


def specs_from_json(values: list[dict[str, Any]]) -> tuple[TensorSpec, ...]:
    """The inverse of `specs_to_json`."""
    return tuple(
        TensorSpec(
            **{
                **value,
                "shape": tuple(value["shape"]),
                "dtype": getattr(torch, value["dtype"]),
                "parts": tuple(Part(p["role"], tuple(p["axes"]), tuple(p["shape"])) for p in value["parts"]),
            }
        )
        for value in values
    )


def metadata_to_json(metadata: Metadata | None) -> dict[str, Any] | None:
    """The metadata with its tuples marked."""
    return None if metadata is None else {**asdict(metadata), "extra": _mark(dict(metadata.extra))}


def metadata_from_json(value: dict[str, Any] | None) -> Metadata | None:
    """The inverse of `metadata_to_json`."""
    return None if value is None else Metadata(**{**value, "extra": _unmark(value["extra"])})


def _mark(value: Any) -> Any:
    if isinstance(value, tuple):
        return {TUPLE: [_mark(v) for v in value]}
    if isinstance(value, dict):
        return {k: _mark(v) for k, v in value.items()}
    return [_mark(v) for v in value] if isinstance(value, list) else value


def _unmark(value: Any) -> Any:
    if isinstance(value, dict):
        return (
            tuple(_unmark(v) for v in value[TUPLE])
            if value.keys() == {TUPLE}
            else {k: _unmark(v) for k, v in value.items()}
        )
    return [_unmark(v) for v in value] if isinstance(value, list) else value
