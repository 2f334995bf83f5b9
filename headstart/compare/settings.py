"""What all runs of a comparison share, and one initialisation in it. Both are JSON values for other processes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self


@dataclass(frozen=True)
class AdapterSettings:
    """The LoRA adapters of a comparison that trains adapters."""

    base: str  # the model that is adapted: a folder or a hub id
    rank: int
    alpha: float | None  # lora_alpha; None for the rank
    targets: tuple[str, ...]  # names of modules, or all-linear
    reference: str | None  # for methods that follow a model


@dataclass(frozen=True)
class TrialSettings:
    """What all runs of a comparison share."""

    target: dict[str, Any]  # the parsed config; of adapters, that of their base
    zoo: str | None
    donor: str | None
    model: str | None
    tokenizer: str | None  # the folder of the target's tokenizer; None for bytes
    text: str  # a file with the beginning of the corpus, for methods that take a text
    method_options: Mapping[str, Mapping[str, Any]]  # label -> options of its method
    steps: int
    batch_size: int
    sequence: int
    windows: int  # held-out windows at each measurement
    device: str
    threads: int
    tokens: str  # .npy of the encoded corpus
    runs: str  # the folder of finished runs
    fingerprint: Mapping[str, Any]  # hashes of the content of tokens, zoo, model and so on, for the names of the runs
    dtype: str = "float32"  # of the products in training
    adapter: AdapterSettings | None = None  # None where whole models are trained

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `dataclasses.asdict`, also after a way through JSON."""
        adapter = values.get("adapter")
        if adapter is not None:
            adapter = AdapterSettings(**{**adapter, "targets": tuple(adapter["targets"])})
        return cls(**{**values, "adapter": adapter})


@dataclass(frozen=True)
class Trial:
    """One initialisation (a sample of a method under a seed) and the learning rates to train it with."""

    label: str
    seed: int
    scale: float  # of the default initialisation; 1 for all other methods
    lrs: tuple[float, ...]
