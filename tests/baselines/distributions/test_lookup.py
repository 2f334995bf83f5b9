"""The guided search finds what torch.searchsorted finds, number by number."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from baselines.distributions.empirical import quantile_levels
from baselines.distributions.lookup import GuidedSearch


@pytest.mark.parametrize("right", [False, True])
@pytest.mark.parametrize("points", [1, 2, 16, 2048])
def test_tables_of_quantiles(points: int, right: bool) -> None:
    table = quantile_levels(points) if points >= 16 else torch.linspace(0, 1, points, dtype=torch.float64)
    u = torch.rand(1 << 16, generator=torch.Generator().manual_seed(points), dtype=torch.float64)
    u = torch.cat([u, table[table < 1], torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)])
    assert torch.equal(GuidedSearch(table, right=right)(u), torch.searchsorted(table, u, right=right))


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=200), st.booleans(), st.integers(0, 2**32))
def test_tables_of_counts(counts: list[int], right: bool, seed: int) -> None:
    table = torch.tensor(counts, dtype=torch.float64).cumsum(0)
    scale = table[-1].item()
    u = torch.rand(2000, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    u = torch.cat([u, (table / scale)[:-1], torch.nextafter(table / scale, torch.zeros(1, dtype=torch.float64))])
    assert torch.equal(GuidedSearch(table, scale, right)(u), torch.searchsorted(table, u * scale, right=right))
