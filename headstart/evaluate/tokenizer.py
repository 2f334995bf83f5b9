"""The tokenizer of a model from outside, which works in a child process with limits of time and memory."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo.sandbox import Sandbox
from zoo.vocabulary import tokenizer_errors, tokenizer_limits

CACHED_TEXTS = 100_000  # encoded texts that are kept: lm-eval encodes a context once for every answer
_idle: list[Sandbox] = []  # at most one, which a tokenizer no longer uses: its child process has imported transformers


class SandboxedTokenizer:
    """The part of a transformers tokenizer that lm-eval uses: encode, decode, batches, special tokens.

    UserError where the tokenizer is damaged, or takes more time or memory than `tokenizer_limits` allows.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._sandbox = _idle.pop() if _idle else Sandbox()
        weakref.finalize(self, _keep_idle, self._sandbox)
        self._encoded: dict[tuple[str, str], list[int]] = {}
        arguments = {"folder": str(folder.resolve())}
        with tokenizer_errors(folder):
            limits = tokenizer_limits(folder, 0)
            self._values, _ = self._sandbox.call("open_tokenizer", arguments, limits, str(folder))

    def __getattr__(self, name: str) -> Any:
        values = self.__dict__.get("_values", {})
        if name not in values:
            raise AttributeError(name)
        return values[name]

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            super().__setattr__(name, value)
        else:
            self._values = self._use("set", [name, value])

    def __len__(self) -> int:
        return int(self._values["length"])

    def encode(self, text: str, **options: Any) -> list[int]:
        """The token ids of a text. options: as in transformers."""
        key = (text, json.dumps(options, sort_keys=True))
        if key not in self._encoded:
            if len(self._encoded) >= CACHED_TEXTS:
                self._encoded.clear()
            self._encoded[key] = self._use("encode", [text], options)["result"]
        return list(self._encoded[key])

    def decode(self, ids: Any, **options: Any) -> str:
        """The text of token ids, a list or a tensor."""
        return self._use("decode", [_plain(ids)], options)["result"]

    def batch_decode(self, ids: Any, **options: Any) -> list[str]:
        """The texts of several lists of token ids, or of the rows of a tensor."""
        return self._use("batch_decode", [_plain(ids)], options)["result"]

    def __call__(self, texts: list[str], return_tensors: str | None = None, **options: Any) -> dict[str, Any]:
        """{input_ids, attention_mask, …} of texts; tensors with return_tensors="pt"."""
        result = self._use("__call__", [texts], options)["result"]
        return result if return_tensors is None else {key: torch.tensor(value) for key, value in result.items()}

    def add_special_tokens(self, tokens: dict[str, str]) -> None:
        """Adds tokens such as {"pad_token": "<pad>"}."""
        self._values = self._use("add_special_tokens", [tokens])

    def close(self) -> None:
        """Ends the child process."""
        self._sandbox.close()

    def _use(self, method: str, arguments: list[Any], options: dict[str, Any] | None = None) -> dict[str, Any]:
        size = sum(len(text) for text in _texts(arguments)) * 4  # bytes of UTF-8 at most
        call = {
            "folder": str(self._folder.resolve()), "method": method, "arguments": arguments, "options": options or {},
        }  # fmt: skip
        with tokenizer_errors(self._folder):
            reply, _ = self._sandbox.call(
                "use_tokenizer", call, tokenizer_limits(self._folder, size), str(self._folder)
            )
        return reply


def _keep_idle(sandbox: Sandbox) -> None:
    if not _idle:
        _idle.append(sandbox)


def _plain(ids: Any) -> Any:
    return ids.tolist() if isinstance(ids, Tensor) else ids


def _texts(values: Any) -> Iterator[str]:
    if isinstance(values, str):
        yield values
    elif isinstance(values, list):
        for value in values:
            yield from _texts(value)
