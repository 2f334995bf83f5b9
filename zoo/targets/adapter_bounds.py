"""Bounds on an adapter_config.json, checked before PEFT builds anything of it or matches its regular expressions."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from zoo.checkpoints.files import expect_all
from zoo.errors import UserError
from zoo.limits import (
    MAX_ADAPTER_NUMBER,
    MAX_LAYERS,
    MAX_PATTERN,
    MAX_PATTERNS,
    MAX_PISSA_STEPS,
    MAX_RANK,
    PATTERN_MEMORY,
    PATTERN_SECONDS,
)
from zoo.sandbox import Limits, shared
from zoo.words import first_line

NAMES = (None, str, [str])
KINDS: dict[str, Any] = {
    "r": (None, int), "lora_alpha": (None, float), "lora_dropout": (None, float),
    "rank_pattern": (None, {str: int}), "alpha_pattern": (None, {str: float}),
    "target_modules": NAMES, "exclude_modules": NAMES, "layers_pattern": NAMES, "feedforward_modules": NAMES,
    "modules_to_save": (None, [str]), "target_parameters": (None, [str]),
    "layers_to_transform": (None, int, [int]), "layer_replication": (None, [[int]]),
    "init_lora_weights": (None, bool, str), "bias": (None, str), "task_type": (None, str), "revision": (None, str),
    "base_model_name_or_path": (None, str), "auto_mapping": (None, dict),
    "peft_type": (None, str), "num_virtual_tokens": (None, int), "token_dim": (None, int),
    "use_rslora": (None, bool), "use_dora": (None, bool), "lora_bias": (None, bool), "fan_in_fan_out": (None, bool),
}  # fmt: skip  # key of an adapter_config.json -> its kind (`zoo.checkpoints.files.expect`)
PATTERN_KEYS = (
    "target_modules", "exclude_modules", "layers_pattern", "feedforward_modules", "modules_to_save",
    "target_parameters", "rank_pattern", "alpha_pattern",
)  # fmt: skip
PLAIN = re.compile(r"[\w.-]*", re.ASCII)  # a name that needs no care as a regular expression


def check_adapter(data: Mapping[str, Any], where: str) -> None:
    """UserError where a value of an adapter_config.json has the wrong type, or asks PEFT for minutes of work."""
    expect_all(data, KINDS, where)
    if data.get("megatron_config"):  # PEFT would import the module that the adapter names
        raise UserError(f"{where}: has a megatron_config, which can run code; remove it")
    for key, number in _numbers(data):
        if not math.isfinite(number) or abs(number) > MAX_ADAPTER_NUMBER:
            raise UserError(f"{where}: {key} is {number:.4g}, more than the {MAX_ADAPTER_NUMBER} allowed; correct it")
    for rank in (data.get("r"), *(data.get("rank_pattern") or {}).values()):
        if rank is not None and rank > MAX_RANK:
            raise UserError(f"{where}: rank is {rank}, more than the {MAX_RANK} allowed; correct it")
    for key in PATTERN_KEYS:
        value: Any = data.get(key) or ()
        texts: list[str] = [value] if isinstance(value, str) else list(value)
        if len(texts) > MAX_PATTERNS:
            raise UserError(f"{where}: {key} has {len(texts)} entries, more than the {MAX_PATTERNS} allowed")
        if any(len(text) > MAX_PATTERN for text in texts):
            raise UserError(f"{where}: {key} has an entry of more than {MAX_PATTERN} characters; give shorter ones")
    layers = sum(max(0, pair[1] - pair[0]) for pair in data.get("layer_replication") or () if len(pair) == 2)
    if layers > MAX_LAYERS:
        raise UserError(f"{where}: layer_replication makes {layers} layers, more than the {MAX_LAYERS} allowed")
    steps = re.fullmatch(r"pissa_niter_(\d+)", str(data.get("init_lora_weights")))
    if steps and int(steps[1]) > MAX_PISSA_STEPS:
        raise UserError(
            f"{where}: init_lora_weights asks for {int(steps[1]):.4g} steps, more than the {MAX_PISSA_STEPS} allowed"
        )


def check_patterns(config: Any, names: Sequence[str], where: str) -> None:
    """UserError where a regular expression of a PEFT config is none, or takes more than PATTERN_SECONDS.

    names: of the base's modules. The expressions are matched as PEFT does, in a child process with limits.
    """
    patterns = [pattern for text, pattern in _patterns(config) if not PLAIN.fullmatch(text)]
    if patterns:
        limits = Limits(PATTERN_SECONDS, PATTERN_MEMORY)
        try:
            shared.call("match_patterns", {"patterns": patterns, "names": list(names)}, limits, "regular expression")
        except UserError as error:
            raise UserError(f"{where}: {first_line(error)}; give names of modules") from error


def _patterns(config: Any) -> Iterator[tuple[str, str]]:
    """(a text of a PEFT config, the regular expression that PEFT makes of it)."""
    for key in ("target_modules", "exclude_modules", "feedforward_modules"):
        text = getattr(config, key, None)
        if isinstance(text, str) and text != "all-linear":
            yield text, text
    for key in ("rank_pattern", "alpha_pattern"):
        for text in getattr(config, key, None) or ():
            yield text, rf"(.*\.)?({text})$"
    for text in getattr(config, "modules_to_save", None) or ():
        yield text, rf"(^|.*\.){text}($|\..*)"
    layers = getattr(config, "layers_pattern", None) or ()
    for text in [layers] if isinstance(layers, str) else layers:
        yield text, rf"(?:^|.*?\.){text}\.(?P<idx>\d+)\..*"


def _numbers(value: Any, key: str = "") -> Iterator[tuple[str, float]]:
    """(key, number) of every number in a JSON value, but for seeds, which PEFT calls keys and seeds."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            if not re.search(r"(seed|_key|_ids?|tokens)$", name):
                yield from _numbers(inner, name)
    elif isinstance(value, list):
        for inner in value:
            yield from _numbers(inner, key)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield key, float(value)
