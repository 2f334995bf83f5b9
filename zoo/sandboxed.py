"""What `zoo.sandbox` runs in its child process: a library's work on untrusted files, one call at a time.

A call and its reply are a length of JSON and a length of bytes, then both. Nothing is pickled. Importing this module
imports neither torch nor transformers.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import re
import struct
import sys
from array import array
from collections.abc import Callable, Iterator
from typing import IO, Any

LENGTHS = struct.Struct(">QQ")  # of the JSON and of the bytes
STRINGS_AT_ONCE = 4096  # strings that are encoded at once: each takes about a kilobyte
PATTERN_SIGNS = re.compile(r"[*?\[\]{}!]|::")  # in a path, by which fsspec looks for other files
UNUSED = ("torch", "tensorflow", "jax", "flax")  # transformers would import them, which takes seconds


def serve() -> None:
    """Answers the calls on stdin until it ends. What a library prints is dropped."""
    calls, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    while (call := read_message(calls)) is not None:
        reply, data = _answer(*call)
        write_message(replies, reply, data)


def write_message(stream: IO[bytes], content: dict[str, Any], data: bytes = b"") -> None:
    text = json.dumps(content).encode()
    stream.write(LENGTHS.pack(len(text), len(data)) + text)
    stream.write(data)
    stream.flush()


def read_message(stream: IO[bytes], most: int = sys.maxsize) -> tuple[dict[str, Any], bytes] | None:
    """(the JSON object, the bytes) of the next message, None where the stream ends or has more than `most` bytes."""
    lengths = stream.read(LENGTHS.size)
    if len(lengths) < LENGTHS.size or sum(sizes := LENGTHS.unpack(lengths)) > most:
        return None
    text, data = stream.read(sizes[0]), stream.read(sizes[1])
    return (json.loads(text), data) if len(text) + len(data) == sum(sizes) else None


def _answer(call: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
    function, modules = FUNCTIONS[call["function"]]
    for name in modules:  # before the limits: it takes seconds, and reads nothing of the call
        _import(name)
    with _limits(call["seconds"], call["memory"]):
        try:
            return function(data, **call["arguments"])
        except MemoryError:
            return {"memory": True}, b""
        except BaseException as error:  # a panic of a Rust library is no Exception
            text = " ".join(str(error).split()) or type(error).__name__
            return {"error": text[:300].encode("utf-8", "replace").decode()}, b""


def _import(name: str) -> None:
    if name not in sys.modules:
        for unused in UNUSED:
            sys.modules.setdefault(unused, None)  # type: ignore[arg-type]
        importlib.import_module(name)


@contextlib.contextmanager
def _without_placeholders() -> Iterator[None]:
    """Inside, the modules of UNUSED are not marked as missing: `datasets` imports those that `sys.modules` names."""
    placeholders = [name for name in UNUSED if name in sys.modules and sys.modules[name] is None]
    for name in placeholders:
        del sys.modules[name]
    try:
        yield
    finally:
        for name in placeholders:
            sys.modules.setdefault(name, None)  # type: ignore[arg-type]


@contextlib.contextmanager
def _limits(seconds: float, memory: int) -> Iterator[None]:
    """Limits on this process: `seconds` of CPU and `memory` bytes from now on, and no files written.

    The system ends the process where it passes the first. Systems without limits (Windows) have only the deadline of
    the parent, and those without /proc no limit of memory.
    """
    try:
        import resource
    except ImportError:
        yield
        return
    usage = resource.getrusage(resource.RUSAGE_SELF)
    limits = {
        resource.RLIMIT_CPU: math.ceil(usage.ru_utime + usage.ru_stime + seconds),
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_CORE: 0,
    }
    with contextlib.suppress(OSError), open("/proc/self/statm") as file:
        limits[resource.RLIMIT_AS] = int(file.read().split()[0]) * resource.getpagesize() + memory
    before = {kind: resource.getrlimit(kind) for kind in limits}
    for kind, most in limits.items():
        soft, hard = before[kind]
        bounds = [most, *(bound for bound in (soft, hard) if bound != resource.RLIM_INFINITY)]
        resource.setrlimit(kind, (min(bounds), hard))
    try:
        yield
    finally:
        for kind, (soft, hard) in before.items():
            resource.setrlimit(kind, (soft, hard))


def match_patterns(data: bytes, patterns: list[str], names: list[str]) -> tuple[dict[str, Any], bytes]:
    """{matches: [[index of the pattern, index of the name], …]} of regular expressions that match a whole name."""
    compiled = [re.compile(pattern) for pattern in patterns]
    return {"matches": [[i, j] for i, p in enumerate(compiled) for j, n in enumerate(names) if p.fullmatch(n)]}, b""


def read_parquet(data: bytes, rows: int) -> tuple[dict[str, Any], bytes]:
    """The table of a Parquet file of at most `rows` rows, as a stream of Arrow's IPC format."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    found = pq.read_metadata(pa.BufferReader(data)).num_rows
    if found > rows:
        raise ValueError(f"{found} rows, more than the {rows} allowed")
    table = pq.read_table(pa.BufferReader(data), use_threads=False)
    table.validate(full=True)
    stream = pa.BufferOutputStream()
    with pa.ipc.new_stream(stream, table.schema) as writer:
        writer.write_table(table)
    return {}, stream.getvalue().to_pybytes()


class UnsuitableText(ValueError):
    """Texts that a library can read and that are refused, with advice."""


def read_documents(
    data: bytes, files: list[str], kind: str, column: str, separator: str, most: int, cache: str
) -> tuple[dict[str, Any], bytes]:
    """The texts in a column of JSON, Parquet or CSV files, joined by a separator: at most the first `most` bytes.

    {documents, empty: rows without a text, whole: whether nothing was cut off}. `datasets` reads them row by row.
    cache: an empty folder. The caller removes it, because this process may be killed.
    """
    from datasets import load_dataset
    from datasets.utils.logging import disable_progress_bar

    disable_progress_bar()
    parts: list[bytes] = []
    size, empty, whole, between = 0, 0, True, separator.encode()
    with _without_placeholders():
        try:
            files = _plain_names(_with_rows(files, kind), cache)
            if not files:
                return {"documents": 0, "empty": 0, "whole": True}, b""
            rows = load_dataset(kind, data_files={"train": files}, split="train", streaming=True, cache_dir=cache)
            for number, row in enumerate(rows, 1):
                text = _text_of_row(row, column, number)
                if size >= most:
                    whole = False
                    break
                if text is None:
                    empty += 1
                    continue
                joined = (between if parts else b"") + text.encode()
                whole = size + len(joined) <= most
                parts.append(joined[: most - size])
                size += len(parts[-1])
        except (UnsuitableText, MemoryError):
            raise
        except Exception as error:
            reason = str(error) or type(error).__name__
            raise ValueError(f"cannot be read as {kind} ({reason}); correct the file, or give another one") from error
    return {"documents": len(parts), "empty": empty, "whole": whole}, b"".join(parts)


def _with_rows(files: list[str], kind: str) -> list[str]:
    """The files that are not empty, which `datasets` refuses."""
    import pyarrow.parquet as pq

    if kind == "parquet":
        return [file for file in files if pq.read_metadata(file).num_rows]
    return [file for file in files if os.path.getsize(file)]


def _plain_names(files: list[str], folder: str) -> list[str]:
    """The files by names that `datasets` takes literally: links in a folder for those that it takes for patterns."""
    found = []
    for number, file in enumerate(files):
        name = file
        if PATTERN_SIGNS.search(file):
            name = os.path.join(folder, f"{number:06}{os.path.splitext(file)[1]}")
            os.symlink(file, name)
        found.append(name)
    return found


def _text_of_row(row: dict[str, Any], column: str, number: int) -> str | None:
    if column not in row:
        names = ", ".join(map(repr, row)) or "none"
        raise UnsuitableText(f"has no column {column!r}; name one with --text-column: {names}")
    text = row[column]
    if not isinstance(text, str | None):
        found = type(text).__name__
        raise UnsuitableText(f"row {number}: {column!r} is a {found}, not a text; name another --text-column")
    return text


def encode_with_file(data: bytes, file: str) -> tuple[dict[str, Any], bytes]:
    """The token ids, int64, of a UTF-8 text by the tokenizers library alone, for a tokenizer.json."""
    from tokenizers import Tokenizer

    return {}, _ids(Tokenizer.from_file(file).encode(data.decode(), add_special_tokens=False).ids)


def encode_with_folder(data: bytes, folder: str) -> tuple[dict[str, Any], bytes]:
    """The token ids, int64, of a UTF-8 text by transformers, for a folder with a tokenizer."""
    return {}, _ids(_load(folder)(data.decode(), add_special_tokens=False)["input_ids"])


def encode_strings_with_file(data: bytes, file: str, word_inside: bool) -> tuple[dict[str, Any], bytes]:
    """The token ids of each string of a JSON list by a tokenizer.json, as parts of a text: nothing is put before them.

    Returns int64: the number of ids of each string, then all ids. word_inside: whether the strings are not split.
    """
    from tokenizers import Tokenizer

    return {}, _encode_parts(json.loads(data), Tokenizer.from_file(file), word_inside)


def encode_strings_with_folder(data: bytes, folder: str, word_inside: bool) -> tuple[dict[str, Any], bytes]:
    """`encode_strings_with_file` for a folder with a tokenizer in any format that transformers reads."""
    tokenizer, strings = _load(folder), json.loads(data)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return {}, _encode_parts(strings, backend, word_inside)
    found = [tokenizer.encode(string, add_special_tokens=False) for string in strings]
    return {}, _ids([len(ids) for ids in found]) + _ids([i for ids in found for i in ids])


def _encode_parts(strings: list[str], tokenizer: Any, word_inside: bool) -> bytes:
    _encode_as_parts(tokenizer, word_inside)
    counts, ids = array("q"), array("q")
    for start in range(0, len(strings), STRINGS_AT_ONCE):
        for found in tokenizer.encode_batch_fast(strings[start : start + STRINGS_AT_ONCE], add_special_tokens=False):
            counts.append(len(found.ids))
            ids.extend(found.ids)
    return counts.tobytes() + ids.tobytes()


def _encode_as_parts(tokenizer: Any, word_inside: bool) -> None:
    """Changes a tokenizer of the tokenizers library to encode parts of a text: no word marker or space comes first.

    word_inside: whether it also does not split into words, as for the inside of a word of WordPiece.
    """
    from tokenizers import Tokenizer

    def state(component: Any) -> Any:
        return None if component is None else json.loads(component.__getstate__())

    splitter = state(tokenizer.pre_tokenizer)
    dropped = ("WhitespaceSplit",) if _has_type(splitter, "Metaspace") else ()
    parts = {
        "normalizer": _without_prefix(state(tokenizer.normalizer), "normalizers", ("Prepend", "Strip")),
        "pre_tokenizer": None if word_inside else _without_prefix(splitter, "pretokenizers", dropped),
    }
    empty = {"type": "WordLevel", "vocab": {"": 0}, "unk_token": ""}
    template = Tokenizer.from_str(json.dumps({"version": "1.0", "added_tokens": [], "model": empty, **parts}))
    tokenizer.normalizer, tokenizer.pre_tokenizer = template.normalizer, template.pre_tokenizer
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if getattr(tokenizer.model, "dropout", None):
        tokenizer.model.dropout = None


def _without_prefix(part: Any, key: str, dropped: tuple[str, ...]) -> Any:
    """A normaliser or pre-tokenizer that puts nothing before a text. dropped: the types that are left out of it."""
    if not isinstance(part, dict) or part.get("type") in dropped:
        return None
    if part.get("type") == "Sequence" and isinstance(part.get(key), list):
        inner = [_without_prefix(one, key, dropped) for one in part[key]]
        return {**part, key: [one for one in inner if one is not None]}
    if part.get("type") == "Metaspace":
        return {
            **part,
            "prepend_scheme": "never",
            **({"add_prefix_space": False} if "add_prefix_space" in part else {}),
        }
    return {**part, "add_prefix_space": False} if part.get("type") == "ByteLevel" else part


def _has_type(part: Any, name: str) -> bool:
    """Whether a pre-tokenizer is of a type, or has a component of it."""
    inner = part.get("pretokenizers") if isinstance(part, dict) else None
    return isinstance(part, dict) and (
        part.get("type") == name or any(_has_type(one, name) for one in (inner if isinstance(inner, list) else ()))
    )


def vocabulary_with_folder(data: bytes, folder: str) -> tuple[dict[str, Any], bytes]:
    """{vocabulary: token string -> id, parts: its tokenizer.json without the vocabulary} of a folder with a tokenizer.

    The vocabulary has the added tokens. The parts are empty where the tokenizer is not one of the tokenizers library.
    """
    tokenizer = _load(folder)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = json.loads(backend.to_str()) if backend is not None else {}
    if isinstance(parts.get("model"), dict):
        parts["model"] = {k: v for k, v in parts["model"].items() if k not in ("vocab", "merges")}
    return {"vocabulary": tokenizer.get_vocab(), "parts": parts}, b""


def compare_tokenizers(data: bytes, folders: list[str]) -> tuple[dict[str, Any], bytes]:
    """{classes: the class of each folder's tokenizer, equal: whether all encode alike} as transformers loads them."""
    tokenizers = [_load(folder) for folder in folders]
    states = {
        backend.to_str() if (backend := getattr(found, "backend_tokenizer", None)) else json.dumps(found.get_vocab())
        for found in tokenizers
    }
    return {"classes": [type(found).__name__ for found in tokenizers], "equal": len(states) == 1}, b""


def rebuild_gguf_tokenizer(data: bytes, architecture: str) -> tuple[dict[str, Any], bytes]:
    """The tokenizer.json of the vocabulary in a GGUF file, as transformers converts it.

    data: JSON, {tokenizer: its parts by transformers' names, before, after: the special token that a text gets there}.
    Returns {splits: the names of the patterns that transformers knows for splitting a text into words}.
    """
    from tokenizers import processors

    try:
        library: Any = importlib.import_module("transformers.integrations.gguf.gguf_tokenizer_mapping")
    except ImportError:  # before transformers had a package for GGUF
        library = importlib.import_module("transformers.integrations.ggml")
    given = json.loads(data)
    backend, _ = library.convert_gguf_tokenizer(architecture, given["tokenizer"])
    before, after = given["before"], given["after"]
    if before is not None or after is not None:
        special = [(token, backend.token_to_id(token)) for token in dict.fromkeys((before, after)) if token is not None]
        parts = [[f"{before}:{n}"] * (before is not None) + [f"${c}:{n}"] + [f"{after}:{n}"] * (after is not None)
                 for n, c in enumerate("AB")]  # fmt: skip
        backend.post_processor = processors.TemplateProcessing(
            single=parts[0], pair=parts[0] + parts[1], special_tokens=special
        )
    return {"splits": sorted(getattr(library, "GGUF_PRE_TOKENIZER_SPLITS", ()))}, backend.to_str().encode()


_open: dict[str, Any] = {}  # the tokenizer that `open_tokenizer` loaded, by its folder


def open_tokenizer(data: bytes, folder: str) -> tuple[dict[str, Any], bytes]:
    """Loads the tokenizer of a folder for the calls of `use_tokenizer`, and returns its values that lm-eval reads."""
    _open.clear()
    _open[folder] = _load(folder)
    return tokenizer_values(_open[folder]), b""


def use_tokenizer(
    data: bytes, folder: str, method: str, arguments: list[Any], options: dict[str, Any]
) -> tuple[dict[str, Any], bytes]:
    """{result: what a method of the open tokenizer returns}: encode, decode, batch_decode, __call__."""
    if method not in ("encode", "decode", "batch_decode", "__call__", "add_special_tokens", "set"):
        raise ValueError(f"{method} is not allowed")
    tokenizer = _open[folder]
    if method == "set":
        setattr(tokenizer, *arguments)
        return tokenizer_values(tokenizer), b""
    if method == "add_special_tokens":
        tokenizer.add_special_tokens(*arguments)
        return tokenizer_values(tokenizer), b""
    result = getattr(tokenizer, method)(*arguments, **options)
    return {"result": dict(result) if method == "__call__" else result}, b""


def tokenizer_values(tokenizer: Any) -> dict[str, Any]:
    """The special tokens of a tokenizer and their ids, and its sizes."""
    names = [f"{kind}_token" for kind in ("bos", "eos", "unk", "pad", "sep", "cls", "mask")]
    values = {name: getattr(tokenizer, name, None) for name in (*names, *(f"{name}_id" for name in names))}
    sizes = {"vocab_size": tokenizer.vocab_size, "length": len(tokenizer), "padding_side": tokenizer.padding_side}
    return values | sizes | {"model_max_length": tokenizer.model_max_length, "name_or_path": tokenizer.name_or_path}


def _load(folder: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _ids(ids: list[int]) -> bytes:
    return array("q", ids).tobytes()


FUNCTIONS: dict[str, tuple[Callable[..., tuple[dict[str, Any], bytes]], tuple[str, ...]]] = {
    "match_patterns": (match_patterns, ()),
    "read_parquet": (read_parquet, ("pyarrow.parquet",)),
    "read_documents": (read_documents, ("datasets",)),
    "encode_with_file": (encode_with_file, ("tokenizers",)),
    "encode_with_folder": (encode_with_folder, ("transformers.models.auto.tokenization_auto",)),
    "encode_strings_with_file": (encode_strings_with_file, ("tokenizers",)),
    "encode_strings_with_folder": (encode_strings_with_folder, ("transformers.models.auto.tokenization_auto",)),
    "vocabulary_with_folder": (vocabulary_with_folder, ("transformers.models.auto.tokenization_auto",)),
    "compare_tokenizers": (compare_tokenizers, ("transformers.models.auto.tokenization_auto",)),
    "rebuild_gguf_tokenizer": (rebuild_gguf_tokenizer, ("transformers.models.auto.tokenization_auto",)),
    "open_tokenizer": (open_tokenizer, ("transformers.models.auto.tokenization_auto",)),
    "use_tokenizer": (use_tokenizer, ()),
}  # name -> (function, modules that it needs)
