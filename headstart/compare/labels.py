"""Labels of a comparison: the name of a method, with options for a variant: `normal`, `normal:scale=2`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from headstart import samplers
from headstart.report.scores import REFERENCE
from zoo.errors import UserError

if TYPE_CHECKING:
    from zoo.sampler import Sampler

DEFAULT_ADAPTER = "peft-default"  # what the label `default` stands for where adapters are trained


def method_name(label: str) -> str:
    """The method of a label: normal of normal:scale=2."""
    return label.partition(":")[0]


def label_options(label: str) -> dict[str, str]:
    """The options of a label: {"scale": "2"} of normal:scale=2. Raises UserError where there is no `=`."""
    pairs = [setting.partition("=") for setting in label.split(":")[1:]]
    if not all(equals for _, equals, _ in pairs):
        raise UserError(f"--methods {label}: write a variant as NAME:KEY=VALUE")
    return {key: value for key, _, value in pairs}


def compared_labels(methods: Sequence[str], adapters: bool) -> tuple[str, ...]:
    """The labels of a comparison, each once. `default` comes first where it is not among them."""
    labels = [REFERENCE if adapters and label == DEFAULT_ADAPTER else label for label in methods]
    return tuple(dict.fromkeys(labels if REFERENCE in labels else (REFERENCE, *labels)))


def adapter_method(label: str) -> str:
    """The LoRA method of a label: PEFT's own initialisation of `default`."""
    return DEFAULT_ADAPTER if label == REFERENCE else method_name(label)


def sampler_class(label: str, adapters: bool) -> type[Sampler]:
    """The sampler of a label. Raises UserError for an unknown method, and for one that fills adapters where models are
    trained, or the other way round."""
    return samplers.lora_sampler(adapter_method(label)) if adapters else samplers.model_sampler(method_name(label))
