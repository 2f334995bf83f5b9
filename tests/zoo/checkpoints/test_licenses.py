"""Licences: what a model card or a hub says becomes one line of text, whatever it holds."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import ModelCardData

from zoo.checkpoints.licenses import folder_license, license_text, read_front_matter
from zoo.checkpoints.sources import hub_license
from zoo.limits import MAX_LICENSE


@pytest.mark.parametrize(("front_matter", "expected"), [
    ("license: mit", "mit"),
    ("license: no", "no"), ("license: 1.0", "1.0"), ("license: 'null'", "null"), ("license: on # a comment", "on"),
    ("license: null", "unknown"), ("license:", "unknown"), ("license: ~", "unknown"), ("license: ''", "unknown"),
    ("license: [mit, apache-2.0]", "mit or apache-2.0"), ("license:\n- mit\n- mit\n", "mit"),
    ("license: {mit: yes}", "unknown"), ("license: [[mit]]", "unknown"), ("? [license]\n: mit", "unknown"),
    ("model-index: {license: gpl}\nlicense: mit", "mit"), ("x: &a [y]\nlicense: *a", "unknown"),
    ('license: "My: licence"', "My: licence"), ('license: "a\\n---\\nb"', "a --- b"),
    ("license: other\nlicense_name: foo-license\nlicense_link: LICENSE", "foo-license"),
    ("license_link: https://x.org/l\nlicense_name: foo\nlicense: other", "foo (https://x.org/l)"),
    ("license: other", "other"), ("license_name: foo", "foo"),
    ('license: <a href="https://x.org/l" title="y">Foo &amp; Bar</a> licence', "Foo & Bar licence"),
    ("license: <script>", "unknown"), ("license: a < b > c", "a < b > c"),
    ("license: mit\nbroken: [", "mit"), ("- license", "unknown"), ("license", "unknown"),
    ("license: !!python/object/apply:os.system [true]", "true"),
])  # fmt: skip
def test_a_folders_license_is_what_its_card_says(tmp_path: Path, front_matter: str, expected: str) -> None:
    (tmp_path / "README.md").write_text(f"---\n{front_matter}\n---\n\nlicense: body\n")
    assert folder_license(tmp_path) == expected


def test_a_folder_without_a_card_names_its_license_file(tmp_path: Path) -> None:
    assert folder_license(tmp_path) == "unknown"
    (tmp_path / "LICENSE.txt").write_text("text")
    assert folder_license(tmp_path) == "see LICENSE.txt"
    (tmp_path / "README.md").write_text("# No front matter\n\nlicense: mit\n")
    assert folder_license(tmp_path) == "see LICENSE.txt"
    (tmp_path / "README.md").unlink()
    (tmp_path / "README.md").mkdir()
    assert folder_license(tmp_path) == "see LICENSE.txt"


@pytest.mark.parametrize("value", [None, 3, True, {"a": 1}, object(), [None, {}], "", " \n", b"mit"])
def test_what_is_not_a_text_is_no_license(value: object) -> None:
    assert license_text(value) == license_text(value, value, value) == "unknown"


def test_a_license_is_one_printable_line(tmp_path: Path) -> None:
    text = license_text("\x1b[31m" + "x" * 10**6 + "\ud800\n")
    assert text.isprintable() and len(text) <= MAX_LICENSE
    assert len(license_text(["a" * 150, "b" * 150], "n", "https://x")) <= MAX_LICENSE
    (tmp_path / "README.md").write_bytes(b"\xef\xbb\xbf---\r\nlicense: m\xfft\r\n---\r\n")
    assert folder_license(tmp_path) == "m\N{REPLACEMENT CHARACTER}t"


LAUGHS = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 40))


@pytest.mark.parametrize("front_matter", [
    f"a0: &a0 [x]\n{LAUGHS}license: *a39", "license: " + "[" * 10**6,
    "license: " + "{" * 10**6, "? " * 10**6, "- " * 10**6, "license: " + "&a " * 10**6,
    "license: " + "<a" * 10**6, "license: '" + "\n" * 10**6, "license: \"" + "\\u0041" * 10**6,
])  # fmt: skip
def test_a_bomb_in_a_card_costs_nothing(tmp_path: Path, front_matter: str) -> None:
    (tmp_path / "README.md").write_text(f"---\n{front_matter}\n---\n")
    start = time.process_time()
    assert len(folder_license(tmp_path)) <= MAX_LICENSE
    assert time.process_time() - start < 2


def test_only_the_asked_keys_are_read(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\na: 1\nb: [2, 3]\nc: {d: 4}\n---\n")
    assert read_front_matter(tmp_path / "README.md", ["a", "b", "c"]) == {"a": "1", "b": ["2", "3"]}


@pytest.mark.parametrize(("card", "tags", "expected"), [
    ({"license": "other", "license_name": "foo", "license_link": "https://x"}, ["license:other"], "foo (https://x)"),
    ({}, ["x", "license:apache-2.0"], "apache-2.0"), (None, ["license:mit"], "mit"), (None, None, "unknown"),
    ({"license": ["a", "b"]}, [], "a or b"), ({"license": "<a href='//x'>y</a>"}, [], "y"),
    ({"license": {"x": 1}}, [3, "license:mit"], "mit"),
])  # fmt: skip
def test_a_hubs_license_is_that_of_its_card_or_its_tags(card: Any, tags: Any, expected: str) -> None:
    data = None if card is None else ModelCardData(**card)
    info: Any = SimpleNamespace(card_data=data, tags=tags)
    assert hub_license(info) == expected
