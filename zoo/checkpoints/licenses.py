"""The licence of a checkpoint as one line of text: from a model card's front matter, or from what a hub answers."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from zoo.limits import MAX_FRONT_MATTER, MAX_FRONT_MATTER_DEPTH, MAX_LICENSE
from zoo.words import one_line

UNKNOWN = "unknown"
KEYS = ("license", "license_name", "license_link")
NULLS = ("", "~", "null", "Null", "NULL")  # how YAML writes no value


def folder_license(folder: Path) -> str:
    """The licence in README.md's front matter, else `see LICENSE` where such a file exists, else `unknown`."""
    keys = read_front_matter(folder / "README.md")
    found = license_text(*(keys.get(key) for key in KEYS))
    if found != UNKNOWN:
        return found
    files = sorted(p.name for p in folder.iterdir() if p.name.upper().startswith(("LICENSE", "LICENCE", "COPYING")))
    return _clean(f"see {files[0]}") if files else UNKNOWN


def license_text(license: object, name: object = None, link: object = None) -> str:
    """A licence as one printable line without HTML, `unknown` where there is none.

    license: an id of the hub or a list of ids. `other` stands for `name`. An http(s) `link` follows in parentheses.
    """
    ids = [_clean(item) for item in (license if isinstance(license, list | tuple) else [license])]
    text = " or ".join(dict.fromkeys(item for item in ids if item))
    if text.lower() in ("", "other") and _clean(name):
        text = _clean(name)
    address = _clean(link)
    if text and re.fullmatch(r"https?://\S+", address):
        text = f"{text} ({address})"
    return one_line(text, MAX_LICENSE) or UNKNOWN


def read_front_matter(readme: Path, keys: Sequence[str] = KEYS) -> dict[str, str | list[str]]:
    """The values of `keys` in a model card's front matter, as they are written there; {} where it cannot be read.

    Builds no YAML value, so that neither aliases nor tags do anything. Of a longer front matter only the first
    `MAX_FRONT_MATTER` bytes are read.
    """
    import yaml

    found: dict[str, str | list[str]] = {}
    try:
        for key, value in _top_level(_front_matter(readme)):
            if key in keys:
                found[key] = value
    except (OSError, yaml.YAMLError):
        return found
    return found


def _front_matter(readme: Path) -> str:
    if not readme.is_file():
        return ""
    with readme.open("rb") as f:
        lines = f.read(MAX_FRONT_MATTER).decode("utf-8", errors="replace").lstrip("\ufeff \t\r\n").splitlines()
    if not lines or lines[0].rstrip() != "---":
        return ""
    end = next((n for n, line in enumerate(lines[1:], 1) if line.rstrip() == "---"), len(lines))
    return "\n".join(lines[1:end])


def _top_level(text: str) -> Iterator[tuple[str, str | list[str]]]:
    """The keys of a YAML mapping whose values are scalars or lists of scalars, from the events of YAML's parser."""
    import yaml

    depth = 0
    key: str | None = None  # None where the next scalar of the mapping is a key
    items: list[str] | None = None  # of the list that is the key's value
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        if isinstance(event, yaml.CollectionStartEvent):
            if depth == 0 and not isinstance(event, yaml.MappingStartEvent):
                return
            if depth == 1:
                items = [] if isinstance(event, yaml.SequenceStartEvent) else None
            depth += 1
            if depth > MAX_FRONT_MATTER_DEPTH:
                return
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
            if depth == 1:
                if key is not None and items:
                    yield key, items
                key, items = (None if key is not None else ""), None
        elif isinstance(event, yaml.ScalarEvent | yaml.AliasEvent):
            value = event.value if isinstance(event, yaml.ScalarEvent) else ""
            is_null = value in NULLS and not getattr(event, "style", None)
            if depth == 2 and items is not None and not is_null:
                items.append(value)
            elif depth == 1:
                if key is not None and not is_null:
                    yield key, value
                key = value if key is None else None


def _clean(value: object) -> str:
    """A text without HTML tags and line breaks, short enough; "" for what is not a text."""
    if not isinstance(value, str):
        return ""
    text = html.unescape(re.sub(r"</?[A-Za-z!][^<>]*>", " ", value[: 10 * MAX_LICENSE]))
    return one_line(" ".join(text.split()), MAX_LICENSE)
