"""Files from untrusted sources: which are read, and within which bounds."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path

import pytest

from zoo.checkpoints import files
from zoo.checkpoints.files import expect, file_hash, parse_json, read_bytes, read_json, read_text
from zoo.errors import UserError
from zoo.limits import MAX_JSON, MAX_JSON_VALUES, MAX_NESTING


def test_only_regular_files_are_opened_and_nothing_blocks(tmp_path: Path) -> None:
    pipe, link = tmp_path / "pipe", tmp_path / "link.json"
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        start = time.monotonic()
        for path, problem in (
            (pipe, "is a pipe"),
            (link, "is a pipe"),
            (Path("/dev/zero"), "is a device"),
            (tmp_path, "is a folder"),
            (tmp_path / "socket", "cannot be read"),
            (tmp_path / "none", "No such file"),
            (tmp_path / "null\0character", "null byte"),
        ):
            for read in (read_json, file_hash, lambda path: read_text(path, 10)):
                with pytest.raises(UserError, match=problem):
                    read(path)
        assert time.monotonic() - start < 2


def test_the_size_is_checked_before_anything_is_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(9_000_000_000)  # sparse: takes no space on disk
    with pytest.raises(UserError, match="has 9000000000 bytes, more than the 64000000 allowed"):
        read_json(path)
    path.write_bytes(b"12345")
    assert read_bytes(path, 5) == b"12345"
    with pytest.raises(UserError, match="has 5 bytes, more than the 4 allowed"):
        read_bytes(path, 4)
    assert MAX_JSON == 64_000_000


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[" * (MAX_NESTING + 1) + "]" * (MAX_NESTING + 1), "more than 100 levels"),
        ('{"a":' * 200_000, "not valid JSON"),
        ('{"a": 1, "a": 1}', "the key 'a' comes twice"),
        ('{"a": [{"b": 1, "c": 2, "b": 3}]}', "the key 'b' comes twice"),
        (f"[{'9' * 5000}]", "a number of 5000 digits"),
        (f"[-{'9' * 102}]", "a number of 103 digits"),
        ("[" + "," * MAX_JSON_VALUES + "]", "3000001 values, more than the 3000000"),
        (r'{"\ud800": 1}', "half a surrogate pair"),
        (r'["\udc00\ud83d"]', "half a surrogate pair"),
        ('["\ud800"]', "not valid JSON"),
        ("", "not valid JSON"),
    ],
)
def test_a_json_text_beyond_the_bounds_is_refused_in_one_line(text: str, problem: str) -> None:
    with pytest.raises(UserError, match=problem) as caught:
        parse_json(text.encode("utf-8", "surrogatepass"), "a.json")
    assert str(caught.value).startswith("a.json: ")


def test_an_object_of_too_many_keys_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_KEYS", 3)
    assert len(parse_json('{"a":0,"b":0,"c":{}}', "a.json")) == 3
    with pytest.raises(UserError, match="an object of 4 keys, more than the 3 allowed"):
        parse_json('[{"a":0,"b":0,"c":0,"d":0}]', "a.json")


def test_what_real_files_hold_is_read_as_it_is() -> None:
    value = {
        "model_max_length": 1000000000000000019884624838656,  # of many tokenizer_config.json
        "time_step_limit": [0.0, float("inf")],
        "𝄞 \u0000": "🙂",
        "deep": json.loads("[" * (MAX_NESTING - 1) + "]" * (MAX_NESTING - 1)),
        "vocab": {str(i): i for i in range(100)},
    }
    for ascii in (True, False):
        assert parse_json(json.dumps(value, ensure_ascii=ascii).encode(), "a") == value
    assert parse_json(json.dumps(value).encode("utf-8-sig"), "a") == value
    assert parse_json(json.dumps(value).encode("utf-16"), "a") == value


def test_expect_states_what_is_wrong() -> None:
    data = {"n": 3, "yes": True, "names": ["a", "b"], "sizes": {"x": [1, 2]}, "long": "x" * 1000, "none": None}
    assert expect(data, "n", int, "f") == expect(data, "n", float, "f") == 3
    assert expect(data, "none", (None, str), "f") is expect(data, "absent", (None, str), "f") is None
    assert expect(data, "names", [str], "f") == ["a", "b"] and expect(data, "sizes", {str: [int]}, "f") == {"x": [1, 2]}
    for key, kind, problem in (
        ("yes", int, "f: yes is True; it must be a whole number; "),
        ("yes", float, "f: yes is True; it must be a number; "),
        ("absent", [str], "f: absent is missing; it must be a list of values that are each text; "),
        ("names", [int], r"f: names is \['a', 'b'\]; it must be a list of values that are each a whole number; "),
        ("sizes", {str: [str]}, "it must be an object whose values are each a list of values that are each text; "),
        ("n", (None, str), "f: n is 3; it must be null or text; write it again"),
    ):
        with pytest.raises(UserError, match=problem):
            expect(data, key, kind, "f", "write it again")
    with pytest.raises(UserError) as caught:
        expect(data, "long", int, "f")
    assert len(str(caught.value)) < 150
