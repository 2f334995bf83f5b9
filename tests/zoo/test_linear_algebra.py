"""Eigenvectors, rotations and orders are a function of the matrix, whatever LAPACK returns and rounding adds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.support.lapack import use_other_lapack
from zoo.linear_algebra import (
    add_gram,
    closest_basis,
    closest_rotation,
    descending_order,
    fix_signs,
    frobenius_norm,
    near_equal_groups,
    skew_signs,
    symmetric_eigenvectors,
)


def random_basis(n: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q


def with_spectrum(values: list[float], seed: int = 0) -> Tensor:
    basis = random_basis(len(values), seed)
    return basis @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ basis.mT


SPECTRA = {
    "distinct": with_spectrum([5.0, 4.0, 2.5, 1.0, 0.3, 0.1]),
    "a pair": with_spectrum([5.0, 2.0, 2.0, 1.0, 0.5, 0.1]),
    "rank 3": with_spectrum([5.0, 4.0, 3.0, 0.0, 0.0, 0.0]),
    "identity": torch.eye(6, dtype=torch.float64),
    "diagonal": torch.diag(torch.tensor([2.0, 2.0, 2.0, 1.0, 1.0, 1.0], dtype=torch.float64)),
    "zero": torch.zeros(6, 6, dtype=torch.float64),
    "signs tie": torch.block_diag(*(size * torch.tensor([[1.0, -0.5], [-0.5, 1.0]]).double() for size in (1, 2, 5))),
}


@pytest.mark.parametrize("name", SPECTRA)
def test_eigenvectors_are_the_same_for_another_lapack_and_after_rounding(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix = SPECTRA[name]
    values, vectors = symmetric_eigenvectors(matrix)
    torch.testing.assert_close(matrix @ vectors, vectors * values, atol=1e-12, rtol=0)
    torch.testing.assert_close(vectors.mT @ vectors, torch.eye(6, dtype=torch.float64), atol=1e-12, rtol=0)
    assert bool((values[:-1] >= values[1:]).all())
    sizes = use_other_lapack(monkeypatch)
    for seed in range(4):
        noise = torch.randn(6, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        moved = matrix + 1e-13 * matrix.abs().max() * (noise + noise.mT)
        again, other = symmetric_eigenvectors(moved)
        torch.testing.assert_close(other, vectors, atol=1e-9, rtol=0)
        torch.testing.assert_close(again, values, atol=1e-11, rtol=0)
    assert max(sizes) == {"distinct": 1, "signs tie": 1, "a pair": 2, "rank 3": 3, "diagonal": 3}.get(name, 6)


def test_groups_are_runs_of_near_equal_values() -> None:
    values = torch.tensor([3.0, 3.0 - 1e-9, 2.0, 1e-5, 1e-5 - 1e-12, 1e-13, 0.0], dtype=torch.float64)
    assert near_equal_groups(values) == [slice(0, 2), slice(2, 3), slice(3, 5), slice(5, 7)]
    assert near_equal_groups(values[:1]) == [slice(0, 1)]


def test_a_basis_depends_on_its_space_alone() -> None:
    columns = random_basis(8, 1)[:, :3]
    found = closest_basis(columns)
    torch.testing.assert_close(found, closest_basis(columns @ random_basis(3, 2)), atol=1e-12, rtol=0)
    torch.testing.assert_close(found @ found.mT, columns @ columns.mT, atol=1e-12, rtol=0)


@pytest.mark.parametrize("rank", [0, 2, 4])
def test_the_closest_rotation_of_a_product(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(n, 4, generator=generator, dtype=torch.float64) for n in (7, 4))
    product = left[:, :rank] @ right[:, :rank].mT
    found = closest_rotation(product)
    torch.testing.assert_close(found.mT @ found, torch.eye(4, dtype=torch.float64), atol=1e-12, rtol=0)
    # No matrix with orthonormal columns has a larger inner product with it: that of the sum of singular values.
    torch.testing.assert_close((found * product).sum(), torch.linalg.svdvals(product).sum())
    use_other_lapack(monkeypatch)
    torch.testing.assert_close(closest_rotation(product), found, atol=1e-9, rtol=0)


def test_signs_make_the_largest_entry_positive_and_ties_follow_a_rule() -> None:
    columns = torch.tensor([[0.5, -0.75, 0.0], [1.0, -0.5, 0.25], [-3.0, 3.0, 1.0]]).double().mT
    found = fix_signs(columns)
    assert found[:, 0].tolist() == [-0.5, 0.75, 0.0] and found[:, 1].tolist() == [1.0, -0.5, 0.25]
    assert torch.equal(fix_signs(-columns), found)
    for rounding in (1e-12, -1e-12):  # which of -3 and 3 is the larger one
        moved = columns + rounding * torch.tensor([[0.0], [1.0], [0.0]]).double()
        torch.testing.assert_close(fix_signs(moved), found, atol=1e-11, rtol=0)


def test_signs_of_third_moments() -> None:
    values = torch.tensor([[1.0, 1.0, -3.0], [3.0, -1.0, -1.0], [2.0, -2.0, 0.0], [0.0, 0.0, 0.0]]).double()
    signs = skew_signs(values, dim=1)
    assert signs[:2].tolist() == [-1.0, 1.0] and signs[3] == 1
    assert torch.equal(skew_signs(values.mT, dim=0), signs)
    symmetric = values[2]
    for noise in (1e-15, -1e-15):  # the moment is rounding error, and the sign is that of the values themselves
        moved = symmetric + torch.tensor([noise, 0, 0], dtype=torch.float64)
        assert skew_signs(moved, dim=0) == signs[2] == -skew_signs(-moved, dim=0)
    assert skew_signs(-1e-14 * values[1].abs(), dim=0, noise=1e-12) == 1, "too small to have a sign"


def test_order_of_near_equal_values_is_their_own() -> None:
    values = torch.tensor([1.0, 3.0, 3.0 + 1e-14, 2.0, 3.0 - 1e-14, 0.0, 0.0], dtype=torch.float64)
    assert descending_order(values).tolist() == [1, 2, 4, 3, 0, 5, 6]
    assert descending_order(values.expand(2, 7)).tolist() == [[1, 2, 4, 3, 0, 5, 6]] * 2
    assert descending_order(torch.tensor([1.0, 1.0 + 1e-9], dtype=torch.float64)).tolist() == [1, 0]


def test_a_gram_matrix_is_added_to_the_upper_triangle() -> None:
    for width in (3, 128, 300, 700):
        rows, total = torch.randn(5, width).double(), torch.randn(width, width).double()
        expected = total + rows.mT @ rows
        add_gram(total, rows)
        torch.testing.assert_close(total.triu(), expected.triu())


def test_the_norm_of_many_values_is_exact_and_that_of_few_is_torchs() -> None:
    many = torch.full((1 << 25,), 0.1)  # torch's own norm in float32 is 0.2 % too small
    assert frobenius_norm(many.view(4, -1)) == pytest.approx(float(many[0]) * 2**12.5, rel=1e-6)
    assert abs(float(many.norm()) / (float(many[0]) * 2**12.5) - 1) > 1e-4
    few = torch.randn(30, 20, generator=torch.Generator().manual_seed(0))
    assert frobenius_norm(few) == float(few.norm())
