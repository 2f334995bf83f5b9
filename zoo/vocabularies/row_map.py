"""How the rows of one vocabulary are made of the rows of another: a sparse linear map."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class RowSums:
    """Weighted sums of rows. Sum i is over the entries offsets[i] to offsets[i + 1]."""

    offsets: Tensor  # [N + 1] int64
    columns: Tensor  # [entries] int64: rows of the donor
    weights: Tensor  # [entries] float64

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def apply(self, table: Tensor) -> Tensor:
        """[N, …]: the sums of the rows of a table [V, …], in its dtype and on its device."""
        flat = table.flatten(1) if table.ndim > 1 else table[:, None]
        device = table.device
        summed = F.embedding_bag(
            self.columns.to(device), flat, self.offsets.to(device), mode="sum", include_last_offset=True,
            per_sample_weights=self.weights.to(flat),
        )  # fmt: skip
        return summed.reshape(-1, *table.shape[1:])

    def select(self, kept: Tensor) -> RowSums:
        """The sums for which `kept` [N] is true."""
        counts = self.offsets.diff()
        entries = kept.repeat_interleave(counts)
        return sums_of_counts(counts[kept], self.columns[entries], self.weights[entries])


def sums_of_counts(counts: Tensor, columns: Tensor, weights: Tensor) -> RowSums:
    """Sums of `counts` [N] entries each, one after the other."""
    return RowSums(F.pad(counts.cumsum(0), (1, 0)), columns, weights.double())


@dataclass(frozen=True)
class Coverage:
    """How many tokens of a target the donor's vocabulary serves."""

    tokens: int  # of the target's tokenizer that have a row
    copied: int  # they have the donor's row of the same text, or of the same role
    composed: int  # they are made of several rows of the donor
    from_bytes: int  # of those: made of single bytes alone, which says nothing of their meaning

    @property
    def drawn(self) -> int:
        return self.tokens - self.copied - self.composed

    @property
    def share(self) -> float:
        """The share of tokens that are copied, or composed of more than single bytes."""
        return (self.copied + self.composed - self.from_bytes) / max(1, self.tokens)

    def record(self) -> dict[str, Any]:
        """The numbers for `headstart.json`."""
        return {**asdict(self), "drawn": self.drawn, "share": round(self.share, 4)}


@dataclass(frozen=True)
class RowMap:
    """The sparse linear map from the rows of a donor's vocabulary to those of a target.

    Rows that are neither copied nor composed are the caller's to draw: tokens without a counterpart, and padding.
    """

    index: Tensor  # [V] int64: the donor's row that is copied, -1 where none is
    composed: Tensor  # [N] int64: the rows of the target that are sums, none of which is copied
    sums: RowSums  # N of them
    coverage: Coverage

    @property
    def is_drawn(self) -> Tensor:
        """[V] bool: the rows that the map leaves to the caller."""
        drawn = self.index < 0
        drawn[self.composed] = False
        return drawn

    def apply(self, table: Tensor, drawn: Tensor) -> Tensor:
        """[V, …]: the target's table from the donor's; `drawn` [V, …] gives the rows that the map does not make.

        Copied rows are bit for bit those of the table.
        """
        known = (self.index >= 0).to(table.device).view(-1, *[1] * (table.ndim - 1))
        rows = torch.where(known, table[self.index.clamp_min(0).to(table.device)], drawn)
        return self.fill_composed(rows, table)

    def fill_composed(self, rows: Tensor, table: Tensor, places: Tensor | None = None) -> Tensor:
        """`rows` with the composed ones filled in. places: [N], where they are in `rows`; else where in the target."""
        if not len(self.composed):
            return rows
        at = self.composed if places is None else places
        return rows.index_copy(0, at.to(rows.device), self.sums.apply(table).to(rows))
