"""Labels of a comparison: the name of a method, with options for a variant: `normal`, `normal:scale=2`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from headstart import samplers
from zoo.errors import UserError

if TYPE_CHECKING:
    from zoo.sampler import Sampler


def method_name(label: str) -> str:
    """The method of a label: normal of normal:scale=2."""
    return label.partition(":")[0]


def label_options(label: str) -> dict[str, str]:
    """The options of a label: {"scale": "2"} of normal:scale=2. Raises UserError where there is no `=`."""
    pairs = [setting.partition("=") for setting in label.split(":")[1:]]
    if not all(equals for _, equals, _ in pairs):
        raise UserError(f"--methods {label}: write a variant as NAME:KEY=VALUE")
    return {key: value for key, _, value in pairs}


def sampler_class(label: str) -> type[Sampler]:
    """The sampler of a label. Raises UserError for an unknown method, or one that fills adapters."""
    return samplers.model_sampler(method_name(label))
