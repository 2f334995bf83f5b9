"""Finds where uniform numbers fall in an ascending table, with the help of a guide (Chen & Asau 1974)."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

BUCKETS_PER_POINT = 8
MARGIN = 1e-6  # of a bucket: far above the rounding of u * scale, so that rounding cannot leave a clear bucket
BLOCK = 1 << 15  # numbers that are looked up at a time, so that they stay in the processor's cache


class GuidedSearch:
    """`torch.searchsorted(table, u * scale)` for u from 0 to below 1, several times as fast for many numbers.

    The interval is divided into many equal buckets. Where no point of the table is in a bucket, the guide holds the
    place of all numbers in it. Only the other numbers are searched for.
    """

    def __init__(self, table: Tensor, scale: float = 1.0, right: bool = False) -> None:
        """table: [n] float64, ascending, from 0 to `scale`. right: as for `torch.searchsorted`."""
        self._table, self._scale, self._right = table, scale, right
        self._buckets = 1 << (BUCKETS_PER_POINT * len(table) - 1).bit_length()  # u * 2^k is exact

    @cached_property
    def _guide(self) -> Tensor:
        """[buckets + 1] int64: the place of all numbers in a bucket, -1 where they have to be searched for."""
        at = self._table * (self._buckets / self._scale)
        bucket = at.long().clamp_(0, self._buckets)
        counts = torch.zeros(self._buckets + 1, dtype=torch.long, device=at.device)
        counts.index_add_(0, bucket, torch.ones_like(bucket))
        guide = counts.cumsum(0) - counts
        for edge in (at - MARGIN, at + MARGIN):
            guide[edge.long().clamp_(0, self._buckets)] = -1
        return guide

    def __call__(self, u: Tensor) -> Tensor:
        """[m] int64, for u [m] float64."""
        if len(u) < len(self._table):  # the guide would take longer than it saves
            return self._search(u)
        found = self._guide.index_select(0, (u * self._buckets).long())
        unclear = (found < 0).nonzero().squeeze(1)
        return found.index_copy_(0, unclear, self._search(u.index_select(0, unclear)))

    def _search(self, u: Tensor) -> Tensor:
        return torch.searchsorted(self._table, u * self._scale, right=self._right)
