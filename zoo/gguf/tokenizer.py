"""The tokenizer of a GGUF file in the format of the tokenizers library, rebuilt by transformers in a child process."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from zoo.checkpoints.files import kind_name
from zoo.checkpoints.headers import DAMAGED
from zoo.errors import UserError
from zoo.gguf.config import SPECIAL_TOKENS
from zoo.gguf.header import typed_value
from zoo.limits import (
    GGUF_TOKENIZER_MEMORY,
    GGUF_TOKENIZER_MEMORY_PER_BYTE,
    GGUF_TOKENIZER_SECONDS,
    GGUF_TOKENIZER_SECONDS_PER_MB,
)
from zoo.sandbox import Limits, shared

PREFIX = "tokenizer.ggml."
LISTS = {"tokens": [str], "merges": [str], "scores": [(int, float)], "token_type": [int]}
SINGLE = {"pre": str, "add_space_prefix": bool}
RENAMED = {"model": "tokenizer_type", "pre": "pre_tokenizer_type", "add_space_prefix": "add_prefix_space"}
KINDS = {"gpt2": "byte-level BPE", "llama": "SentencePiece BPE"}  # tokenizer.ggml.model of those that are rebuilt
ENDS = {"bos": "before", "eos": "after"}
LIKE_GPT2 = (None, "default", "gpt-2")
TEMPLATE = "tokenizer.chat_template"


def rebuild_tokenizer(metadata: Mapping[str, Any], architecture: str, where: str) -> tuple[dict[str, bytes], list[str]]:
    """({file name: its bytes} of the tokenizer, what of it is left out: one line each). No files without a tokenizer.

    UserError where the lists of the vocabulary disagree, or take more than the limits in `zoo.limits`.
    """
    kind = typed_value(metadata, f"{PREFIX}model", str, "none", where)
    notes = []
    if kind not in KINDS:
        return {}, ["has no tokenizer" if kind in ("none", "no_vocab") else f"its tokenizer ({kind}) is not rebuilt"]
    content = _content(metadata, kind, where)
    config = _tokenizer_config(metadata, kind, content["tokens"], where)
    ends = {end: config[f"{name}_token"] if config.get(f"add_{name}_token") else None for name, end in ENDS.items()}
    data = json.dumps({"tokenizer": content, **ends}).encode()
    limits = Limits(
        GGUF_TOKENIZER_SECONDS + GGUF_TOKENIZER_SECONDS_PER_MB * len(data) / 1e6,
        GGUF_TOKENIZER_MEMORY + GGUF_TOKENIZER_MEMORY_PER_BYTE * len(data),
    )
    arguments = {"architecture": architecture}
    reply, tokenizer = shared.call("rebuild_gguf_tokenizer", arguments, limits, f"{where}: its tokenizer", data)
    split = content.get("pre_tokenizer_type")
    if kind == "gpt2" and split not in (*LIKE_GPT2, *reply["splits"]):
        notes.append(f"transformers does not know how it splits a text into words ({split!r:.40}), and splits as GPT-2")
    own = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **config}
    files = {"tokenizer.json": tokenizer, "tokenizer_config.json": json_bytes(own)}
    template = typed_value(metadata, TEMPLATE, str, None, where)
    if template is not None:
        files["chat_template.jinja"] = template.encode()
    more = sorted(key.removeprefix(f"{TEMPLATE}.") for key in metadata if key.startswith(f"{TEMPLATE}."))
    if more:
        notes.append(f"its other chat templates ({', '.join(more):.60}) are not copied")
    return files, notes


def json_bytes(value: Mapping[str, Any]) -> bytes:
    """An indented JSON file."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode("utf-8")


def _content(metadata: Mapping[str, Any], kind: str, where: str) -> dict[str, Any]:
    """The vocabulary under the names that transformers gives to its parts, its lists checked against each other."""
    found: dict[str, Any] = {"tokenizer_type": kind}
    for name, expected in {**LISTS, **SINGLE}.items():
        value = typed_value(metadata, PREFIX + name, expected, None, where)
        if value is not None:
            found[RENAMED.get(name, name)] = value
    tokens = found.get("tokens")
    if not tokens:
        raise UserError(f"{where}: has no {PREFIX}tokens, {kind_name([str])}; {DAMAGED}")
    for name in ("scores", "token_type"):
        if name in found and len(found[name]) != len(tokens):
            raise UserError(f"{where}: has {len(tokens)} tokens and {len(found[name])} {name}; {DAMAGED}")
    needed = ("merges",) if kind == "gpt2" else ("merges", "scores")
    if not any(name in found for name in needed):
        raise UserError(f"{where}: has a vocabulary without {' or '.join(needed)}; {DAMAGED}")
    for name, token in _special_ids(metadata, where).items():
        if not 0 <= token < len(tokens):
            raise UserError(f"{where}: {name} token {token} is outside its {len(tokens)} tokens; {DAMAGED}")
        found[f"{name}_token_id"] = token
    return found


def _special_ids(metadata: Mapping[str, Any], where: str) -> dict[str, int]:
    """bos, eos, unk, pad -> token id, those that the file names."""
    found = {
        name: typed_value(metadata, f"{PREFIX}{key}_token_id", int, None, where) for name, key in SPECIAL_TOKENS.items()
    }
    return {name: token for name, token in found.items() if token is not None}


def _tokenizer_config(metadata: Mapping[str, Any], kind: str, tokens: list[str], where: str) -> dict[str, Any]:
    """The special tokens, and which of them a text gets. SentencePiece vocabularies begin with one unless they say no,
    as in llama.cpp."""
    config: dict[str, Any] = dict.fromkeys((f"{name}_token" for name in SPECIAL_TOKENS), None)
    config |= {f"{name}_token": tokens[token] for name, token in _special_ids(metadata, where).items()}
    for name in ("add_bos_token", "add_eos_token"):
        value = typed_value(metadata, PREFIX + name, bool, kind == "llama" if name == "add_bos_token" else None, where)
        if value is not None:
            config[name] = value
    return config
