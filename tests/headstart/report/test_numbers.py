"""Numbers as text."""

from __future__ import annotations

from headstart.report import numbers


def test_numbers_have_two_or_three_digits() -> None:
    assert [numbers.three_digits(x) for x in (None, 12345, 0.123456, -1234.5)] == ["–", "12,345", "0.123", "-1234"]
    assert [numbers.two_digits(x) for x in (17.4, 1.74, 0.174)] == ["17", "1.7", "0.17"]
    assert [numbers.format_factor(x) for x in (1234.0, 16.66, 1.666)] == ["1,234×", "16.7×", "1.67×"]


def test_counts_agree_with_their_noun() -> None:
    assert [numbers.count_of(x, "step") for x in (1800, 1, 2.5, 0)] == ["1,800 steps", "1 step", "2.5 steps", "0 steps"]


def test_shapes_exponents_and_revisions() -> None:
    assert numbers.shape_text([64, 32]) == "64 × 32" and numbers.superscript(-12) == "⁻¹²"
    for prefix in ("", "sha256:"):
        assert numbers.short_revision(f"{prefix}0123456789abcdef") == "0123456789"


def test_a_missing_number_is_a_dash() -> None:
    assert numbers.or_dash(None, str) == "–" and numbers.or_dash(None, str, "none") == "none"
    assert numbers.or_dash(0, str) == "0"
