"""Options: bounds, and the type that a setting is read as."""

import dataclasses
import math

import pytest

from headstart.generate.sampling import build_sampler
from zoo.options import bounds_problem, option, type_name
from zoo.sampler import Sampler


@dataclasses.dataclass(kw_only=True)
class Real(Sampler):
    """A method whose annotations are types, not strings: this module does not postpone them."""

    name = "tests.Real"
    gain: float = option(1.0, "a factor", above=0)
    count: int | None = option(None, "a number")
    on: bool = option(False, "a switch")

    def fit(self, zoo, blueprint):
        return self

    def sample(self, blueprint, seed=0):
        yield from ()


def test_settings_have_the_annotated_type_whether_annotations_are_postponed_or_not() -> None:
    sampler = build_sampler(Real, {"gain": "0.5", "count": "3", "on": "yes"})
    assert (sampler.gain, sampler.count, sampler.on) == (0.5, 3, True)
    assert [type_name(f) for f in dataclasses.fields(Real) if "help" in f.metadata] == ["float", "int | None", "bool"]


@pytest.mark.parametrize(
    ("bounds", "value", "problem"),
    [
        ({"least": 1}, 0, "at least 1"),
        ({"above": 0}, 0.0, "more than 0"),
        ({"most": 2}, (1, 3), "at most 2"),
        ({}, math.inf, "a finite number"),
        ({"least": 1}, True, None),
        ({"least": 1}, "0", None),
        ({"least": 1, "most": 2}, 2, None),
    ],
)
def test_bounds(bounds: dict[str, float], value: object, problem: str | None) -> None:
    cls = dataclasses.make_dataclass("Holder", [("value", object, option(1, "", **bounds))])
    assert bounds_problem(dataclasses.fields(cls)[0], value) == problem
