"""Lists and errors as text."""

from __future__ import annotations

from zoo.words import first_line, shortened_list


def test_a_long_list_is_cut() -> None:
    assert shortened_list([]) == ""
    assert shortened_list("ab", 2) == "a, b"
    assert shortened_list("abcd", 2) == "a, b and 2 more"


def test_an_error_gives_its_first_line_or_its_class() -> None:
    assert first_line(ValueError("one\ntwo")) == "one"
    assert first_line(ValueError("x" * 200)) == "x" * 120
    assert first_line(KeyboardInterrupt()) == "KeyboardInterrupt"
