"""Strategies that damage a real file: its bytes, or the structure of its JSON or YAML."""

from __future__ import annotations

import copy
import json
import re
from typing import Any

from hypothesis import strategies as st

RAW = "@raw@"  # a string that starts so stands for the JSON text after it, which json.dumps would not write

STRANGE_VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 3, 2**31, 2**63, 10**30, -(2**70), 0.5, -1e300, "", "a", " ", "0", "../../victim.txt",
    "/etc/passwd", "a\x00b", "\udc80", "x" * 5000, "(a+)+$", "torch.float64", [], {}, [[]], [None], [{}], {"": None},
    {"a": {"b": []}}, list(range(300)), [1e308] * 3, ["\ud800"], RAW + "1e999", RAW + "-Infinity", RAW + "NaN",
    RAW + "9" * 6000, RAW + "[" * 3000 + "]" * 3000, RAW + '{"a":' * 3000 + "1" + "}" * 3000, RAW + "",
    RAW + '"\\ud83d"', RAW + '{"a": 1, "a": 2}', RAW + "tru",
]  # fmt: skip

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=12,
)


@st.composite
def damaged_bytes(draw: st.DrawFn, data: bytes) -> bytes:
    """The data after one to four edits: bytes changed, removed, inserted, repeated, or the rest cut off."""
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        length = draw(st.sampled_from((1, 1, 1, 2, 4, 8, 64, 1024)))
        edit = draw(st.sampled_from(("change", "remove", "insert", "repeat", "cut", "number")))
        if edit == "change":
            data = data[:at] + draw(st.binary(min_size=1, max_size=8)) + data[at + length :]
        elif edit == "remove":
            data = data[:at] + data[at + length :]
        elif edit == "insert":
            data = data[:at] + draw(st.binary(min_size=1, max_size=8)) + data[at:]
        elif edit == "repeat":
            data = data[:at] + data[at : at + length] * draw(st.sampled_from((2, 3, 50))) + data[at + length :]
        elif edit == "cut":
            data = data[:at]
        else:
            number = draw(st.sampled_from((0, 1, 255, 2**16, 2**31 - 1, 2**32 - 1, 2**63, 2**64 - 1)))
            data = data[:at] + number.to_bytes(8, "little") + data[at + 8 :]
    return data


@st.composite
def damaged_structure(draw: st.DrawFn, value: Any) -> Any:
    """A copy of a JSON value after one to three edits of its nodes: replaced, removed, renamed, repeated or wrapped."""
    value = json.loads(json.dumps(value))
    for _ in range(draw(st.sampled_from((1, 1, 1, 2, 3)))):
        value = _edit(draw, value)
    return value


def _edit(draw: st.DrawFn, root: Any) -> Any:
    """Walks down from the root along drawn keys and edits the node where the walk stops."""
    holder: Any = {"root": root}
    key: Any = "root"
    while isinstance(holder[key], dict | list) and holder[key] and draw(st.integers(0, 4)):
        holder, key = holder[key], _drawn_key(draw, holder[key])
    edit = draw(st.sampled_from(("strange", "strange", "strange", "any", "remove", "rename", "wrap", "sibling")))
    if edit == "strange":
        holder[key] = copy.deepcopy(draw(st.sampled_from(STRANGE_VALUES)))  # later edits change it in place
    elif edit == "any":
        holder[key] = draw(JSON_VALUES)
    elif edit == "remove":
        del holder[key]
    elif edit == "rename" and isinstance(holder, dict):
        holder[draw(st.text(max_size=12))] = holder.pop(key)
    elif edit == "wrap":
        holder[key] = draw(st.sampled_from(([holder[key]], {"a": holder[key]}, str(holder[key]), [holder[key]] * 200)))
    else:
        holder[key] = holder[_drawn_key(draw, holder)]
    return root if "root" not in holder or len(holder) > 1 else holder["root"]


def _drawn_key(draw: st.DrawFn, holder: dict[str, Any] | list[Any]) -> Any:
    if isinstance(holder, dict):
        return draw(st.sampled_from(sorted(holder)))
    return draw(st.integers(0, len(holder) - 1))


def as_json(value: Any) -> bytes:
    """JSON text of a value in which strings that start with RAW stand for themselves."""
    text = json.dumps(value, ensure_ascii=True)
    while (start := text.find(f'"{RAW}')) >= 0:
        end = start + 1
        while text[end] != '"' or text[end - 1] == "\\":
            end += 1
        raw = json.loads(text[start : end + 1])[len(RAW) :]
        text = text[:start] + raw + text[end + 1 :]
    return text.encode()


@st.composite
def damaged_file(draw: st.DrawFn, name: str, data: bytes) -> bytes:
    """A damaged version of a file: of its structure where it is JSON, JSON lines or safetensors, else of its bytes."""
    kind = draw(st.sampled_from(("structure", "structure", "structure", "bytes", "generated")))
    if kind == "bytes":
        return draw(damaged_bytes(data))
    if kind == "generated":
        return draw(st.binary(max_size=200) | JSON_VALUES.map(lambda value: json.dumps(value).encode()))
    if name.endswith(".safetensors"):
        length = int.from_bytes(data[:8], "little")
        header = as_json(draw(damaged_structure(json.loads(data[8 : 8 + length]))))
        return len(header).to_bytes(8, "little") + header + data[8 + length :]
    if name.endswith(".gguf"):
        return draw(damaged_gguf(data))
    if name.endswith(".jsonl"):
        lines = data.splitlines()
        at = draw(st.integers(0, len(lines) - 1))
        lines[at] = as_json(draw(damaged_structure(json.loads(lines[at]))))
        return b"\n".join(lines)
    if name.endswith(".json"):
        return as_json(draw(damaged_structure(json.loads(data))))
    if name.endswith((".yaml", ".md")):
        return draw(damaged_yaml(data))
    return draw(damaged_bytes(data))


@st.composite
def damaged_gguf(draw: st.DrawFn, original: bytes) -> bytes:
    """A GGUF file after one to three edits of its header: of names, their lengths, and the numbers after them."""
    places, data = _gguf_texts(original), bytearray(original)
    for _ in range(draw(st.sampled_from((1, 1, 2, 3)))):
        at, length = draw(st.sampled_from(places))
        edit = draw(st.sampled_from(("length", "text", "after", "after", "swap")))
        if edit == "length":
            number = draw(st.sampled_from((0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1)))
            data[at : at + 8] = (number % 2**64).to_bytes(8, "little")
        elif edit == "text":
            data[at + 8 : at + 8 + length] = draw(st.binary(min_size=length, max_size=length))
        elif edit == "swap":
            other, size = draw(st.sampled_from(places))
            if size == length:
                data[at : at + 8 + length] = data[other : other + 8 + size]
        else:  # the type or the value of a key, or the shape, the type or the place of a tensor
            start = at + 8 + length + draw(st.sampled_from((0, 4, 8, 12, 16, 20, 24, 28)))
            number = draw(st.sampled_from((0, 1, 2, 3, 8, 9, 12, 255, 2**16, 2**31, 2**40, 2**63, 2**64 - 1)))
            width = draw(st.sampled_from((1, 4, 8)))
            data[start : start + width] = (number % 2 ** (8 * width)).to_bytes(width, "little")
    return bytes(data)


def _gguf_texts(data: bytes) -> list[tuple[int, int]]:
    """(offset, length) of the names of keys and tensors in the header of a GGUF file, and of some other texts."""
    found = []
    for match in re.finditer(rb"[a-z][a-z0-9_.]{3,60}", data[:100_000]):
        length = int.from_bytes(data[max(0, match.start() - 8) : match.start()], "little")
        if 3 < length <= len(match[0]):
            found.append((match.start() - 8, length))
    return found


@st.composite
def damaged_yaml(draw: st.DrawFn, data: bytes) -> bytes:
    """Text with a strange YAML value in place of what follows a colon."""
    lines = data.decode().splitlines()
    keys = [n for n, line in enumerate(lines) if ":" in line] or [0]
    at = draw(st.sampled_from(keys))
    strange = [
        "&a [*a]", "!!python/object/apply:os.system ['true']", "- - - -", "{a: {b: [", "'", "2026-11-28", "0o7", "no",
        "|", ">", "*undefined", "!!binary x", "? a", "\t", "9" * 6000, "[" * 2000, "<a href='x'>mit</a>", "\ufeff",
        "é" * 100, "!!timestamp 9999999-1-1", "1" + "_0" * 2000, "{" * 500,
    ]  # fmt: skip
    lines[at] = lines[at].split(":")[0] + ": " + draw(st.sampled_from(strange) | st.text(max_size=30))
    return "\n".join(lines).encode(errors="surrogatepass")
