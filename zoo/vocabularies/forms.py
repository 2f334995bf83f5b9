"""The normal form of a token: the bytes of text that it stands for, whatever the kind of its tokenizer.

`▁the` of SentencePiece, `Ġthe` of byte-level BPE and `the` of WordPiece all have the normal form b" the".
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from zoo.vocabulary import byte_characters

WORD_MARKER = "▁"  # SentencePiece's character for a space
CONTINUATION = "##"  # WordPiece's prefix of a token inside a word
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # SentencePiece's token for one byte
BYTE_OF_CHARACTER = {character: byte for byte, character in enumerate(byte_characters())}
SPACE_CHARACTER = byte_characters()[ord(" ")]  # Ġ, the space of byte-level BPE
SPLIT_AT_SPACES = ("Whitespace", "WhitespaceSplit", "BertPreTokenizer")


@dataclass(frozen=True)
class TokenFormat:
    """How the strings of a vocabulary stand for text."""

    kind: str  # sentencepiece | byte-level | wordpiece | words | word-end | plain
    mark: str = ""  # the word marker, the prefix of a continuation, or the suffix of a word's last token
    byte_fallback: bool = False  # whether `<0xNN>` is the byte NN


def detect_format(content: dict[str, Any]) -> TokenFormat:
    """The format of a tokenizer.json, from its decoder, pre-tokenizer, normaliser and model."""
    found = content.get("model")
    model: dict[str, Any] = found if isinstance(found, dict) else {}
    components = [c for key in ("decoder", "pre_tokenizer", "normalizer") for c in _components(content.get(key))]
    kinds = {str(component["type"]) for component in components}
    marker = _word_marker(components)
    fallback = bool(model.get("byte_fallback")) or "ByteFallback" in kinds
    if "ByteLevel" in kinds:
        return TokenFormat("byte-level")
    if marker is not None:
        return TokenFormat("sentencepiece", marker, fallback)
    prefix = _text(model, "continuing_subword_prefix") or (CONTINUATION if model.get("type") == "WordPiece" else None)
    if model.get("type") == "WordPiece" or (prefix and model.get("type") == "BPE"):
        return TokenFormat("wordpiece", prefix or CONTINUATION)
    suffix = _text(model, "end_of_word_suffix")
    if suffix:
        return TokenFormat("word-end", suffix)
    if model.get("type") == "WordLevel" and not kinds.isdisjoint(SPLIT_AT_SPACES):
        return TokenFormat("words")
    return TokenFormat("plain", byte_fallback=fallback)


def guess_format(tokens: Iterable[str]) -> TokenFormat:
    """The format of a vocabulary of which only the strings are known, from the word markers that occur in it."""
    tokens = list(tokens)
    counts = {
        mark: sum(token.startswith(mark) for token in tokens) for mark in (WORD_MARKER, SPACE_CHARACTER, CONTINUATION)
    }
    mark = max(counts, key=lambda key: counts[key])
    fallback = any(BYTE_TOKEN.fullmatch(token) for token in tokens)
    if not counts[mark]:
        return TokenFormat("plain", byte_fallback=fallback)
    kinds = {WORD_MARKER: "sentencepiece", SPACE_CHARACTER: "byte-level", CONTINUATION: "wordpiece"}
    return TokenFormat(kinds[mark], "" if mark == SPACE_CHARACTER else mark, fallback and mark == WORD_MARKER)


def token_bytes(token: str, form: TokenFormat, is_added: bool = False) -> bytes:
    """The bytes of text that a token stands for; a leading space marks the start of a word.

    is_added: whether the token was added to the vocabulary of the tokenizer's model, so that it is literal text.
    """
    if form.kind == "sentencepiece":
        byte = BYTE_TOKEN.fullmatch(token) if form.byte_fallback else None
        return bytes([int(byte[1], 16)]) if byte else token.replace(form.mark, " ").encode()
    if is_added:
        return token.encode()
    if form.kind == "byte-level":
        found = [BYTE_OF_CHARACTER.get(character) for character in token]
        return token.encode() if None in found else bytes(b for b in found if b is not None)
    if form.kind == "wordpiece":
        if token.startswith(form.mark) and len(token) > len(form.mark):
            return token[len(form.mark) :].encode()
        return token.encode() if _stands_alone(token) else b" " + token.encode()
    if form.kind == "words":
        return token.encode() if _stands_alone(token) else b" " + token.encode()
    if form.kind == "word-end" and token.endswith(form.mark) and len(token) > len(form.mark):
        return b" " + token[: -len(form.mark)].encode()
    byte = BYTE_TOKEN.fullmatch(token) if form.byte_fallback else None
    return bytes([int(byte[1], 16)]) if byte else token.encode()


def is_byte_piece(token: str, form: TokenFormat, data: bytes) -> bool:
    """Whether a token is one byte that means nothing by itself: a part of a character, or a byte-fallback token."""
    return len(data) == 1 and (data[0] >= 0x80 or (form.byte_fallback and BYTE_TOKEN.fullmatch(token) is not None))


def _stands_alone(token: str) -> bool:
    """Whether a token is a punctuation mark or a Chinese character: WordPiece splits there, without a space in text."""
    return len(token) == 1 and (not token.isalnum() or "\u3400" <= token <= "\u9fff")


def _components(part: Any) -> Iterator[dict[str, Any]]:
    """The components of a normaliser, pre-tokenizer or decoder, those of a sequence one by one."""
    if isinstance(part, dict) and isinstance(part.get("type"), str):
        yield part
        for key in ("normalizers", "pretokenizers", "decoders"):
            inner = part.get(key)
            for component in inner if isinstance(inner, list) else ():
                yield from _components(component)


def _word_marker(components: list[dict[str, Any]]) -> str | None:
    """The character for a space: of Metaspace, or of a normaliser or decoder that replaces one by the other."""
    for component in components:
        if component["type"] == "Metaspace":
            return _text(component, "replacement") or WORD_MARKER
        if component["type"] == "Replace":
            found = component.get("pattern")
            pattern, content = _text(found if isinstance(found, dict) else {}, "String"), _text(component, "content")
            if (pattern == " " or content == " ") and WORD_MARKER in (pattern, content):
                return WORD_MARKER
    return None


def _text(found: dict[str, Any], key: str) -> str | None:
    value = found.get(key)
    return value if isinstance(value, str) else None
