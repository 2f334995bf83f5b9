"""How far an adapter moves the weights before the first training step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from zoo.donors.donor import Donor
from zoo.linear_algebra import frobenius_norm
from zoo.lora.adapters import change_norm
from zoo.targets.blueprint import Adapter


@dataclass
class FirstStepChange:
    """The pair with the largest ||scaling B A|| / ||W|| (Frobenius norms) so far. `largest` is None where a pair
    changes a weight that was not read."""

    largest: float | None = 0.0
    module: str | None = None
    waiting: dict[str, Tensor] = field(default_factory=dict)  # one side of a pair, until the other comes

    def watch(
        self, tensors: Iterator[tuple[str, Tensor]], adapter: Adapter, base: Donor | None
    ) -> Iterator[tuple[str, Tensor]]:
        """Passes the tensors of an adapter on, and measures each pair when both of its sides are known."""
        pairs = {name: pair for pair in adapter.pairs for name in (pair.a, pair.b)}
        for name, tensor in tensors:
            pair = pairs.get(name)
            if pair is not None:
                self.waiting[name] = tensor
                if pair.a in self.waiting and pair.b in self.waiting:
                    change: float | None = change_norm(pair, self.waiting.pop(pair.a), self.waiting.pop(pair.b))
                    if change:
                        norm = frobenius_norm(base.read(pair.weight, torch.float32)) if base is not None else 0.0
                        change = change / norm if norm else None
                    if self.largest is not None and (change is None or change > self.largest):
                        self.largest, self.module = change, pair.module
            yield name, tensor

    def to_record(self) -> dict[str, Any]:
        """{largest_change, module}, for headstart.json."""
        return {"largest_change": self.largest, "module": self.module}
