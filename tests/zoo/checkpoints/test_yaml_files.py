"""YAML from outside: what its aliases stand for is counted before it is built."""

from __future__ import annotations

import time

import pytest

from zoo.checkpoints.yaml_files import parse_yaml
from zoo.errors import UserError

LAUGHS = "a0: &a0 [lol]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10)
)  # a billion
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i}\n  <<: [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (LAUGHS, "more than 100000 values, with its aliases written out"),
        (MERGES, "more than 100000 values, with its aliases written out"),
        ("a: &a [*a]", "the alias 'a' stands for nothing that comes before it"),
        ("a: *b", "the alias 'b'"),
        ("[" * 100_000, "more than 100 levels"),
        ("- " * 5000 + "a", "more than 100 levels"),
        ("a: 1\nb: {c: 1, c: 2}", "the key 'c' comes twice"),
        ('a: !!int ""', "f: is neither YAML nor JSON"),
        ("a: !!timestamp x", "f: is neither YAML nor JSON"),
        ("a: !!python/object/apply:os.system ['echo hi']", "could not determine a constructor"),
        ("a: 1" + "0" * 5000, "f: is neither YAML nor JSON"),
        ("? [a]\n: b", "unhashable key"),
        ("a: \x00", "f: is neither YAML nor JSON"),
    ],
)
def test_what_is_refused_is_refused_at_once(text: str, problem: str) -> None:
    start = time.process_time()
    with pytest.raises(UserError, match=problem) as caught:
        parse_yaml(text, "f")
    assert time.process_time() - start < 1 and len(str(caught.value)) <= 400


def test_aliases_and_merges_within_the_bounds_mean_what_they_mean_in_yaml() -> None:
    text = "usual: &usual {lr: 0.001, seeds: [0, 1]}\nrun:\n  <<: *usual\n  lr: 0.003\nagain: *usual\nnone:\n"
    usual = {"lr": 0.001, "seeds": [0, 1]}
    assert parse_yaml(text, "f") == {"usual": usual, "run": usual | {"lr": 0.003}, "again": usual, "none": None}
    assert parse_yaml("", "f") is None and parse_yaml("- 1\n- a: yes", "f") == [1, {"a": True}]
