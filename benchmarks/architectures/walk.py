"""Every transfer method on a tiny donor of every architecture, one architecture at a time."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.architectures.checks import (
    Outcome,
    coded_donor,
    own_shape,
    random_donor,
    same_function,
    same_name_values,
)
from benchmarks.architectures.rotary import rotary_pairs
from benchmarks.architectures.tiny_configs import DEEP, NARROW, OWN, WIDE, Shape, tiny_config
from headstart import samplers
from zoo.targets.blueprint import Blueprint
from zoo.targets.configs import quiet_transformers

SECONDS = 300  # per architecture
MOST_PARAMETERS = 20_000_000  # of a tiny model; more means that a size was not found
OWN_SHAPE = ("weight-selection", "subcloning", "pruning", "stacking")
NARROWER: dict[str, dict[str, Any]] = {  # methods without their scales, so that values stay the donor's
    "weight-selection": {},
    "subcloning": {"rescale": "none"},
    "pruning": {"correct": False},
    "row-column": {"noise": 0.0, "scale": "none"},
}
LARGER: dict[str, tuple[Shape, dict[str, Any]]] = {
    "hypercloning": (WIDE, {}),
    "net2wider": (WIDE, {}),
    "stacking": (DEEP, {"exact": True}),
}
DEEPER = ("stacking",)  # with `exact=false`, which copies layers without silencing any
KINDS = ("causal", "encoder-decoder", "encoder")

Row = dict[str, Any]
Checks = list[tuple[str, Callable[[], Outcome]]]


def architectures() -> list[tuple[str, str]]:
    """[(kind, model_type)] of all language models of transformers, but speech models among the encoder-decoders."""
    from transformers.models.auto import modeling_auto as auto

    speech = {
        "audioflamingo3", "glmasr", "granite_speech", "granite_speech_plus", "moss_transcribe_diarize", "musicflamingo",
        "nemo_speechlm", "qwen2_audio", "qwen3_asr", "seamless_m4t", "seamless_m4t_v2", "vibevoice_asr", "voxtral",
        "voxtral_realtime",
    }  # fmt: skip
    names = {
        "causal": auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "encoder-decoder": [n for n in auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES if n not in speech],
        "encoder": auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    }
    return [(kind, name) for kind in KINDS for name in names[kind]]


def build_model(kind: str, config: Any) -> Any:
    """The model of a config on the CPU, in float32, with random weights."""
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

    auto = {"causal": AutoModelForCausalLM, "encoder-decoder": AutoModelForSeq2SeqLM, "encoder": AutoModelForMaskedLM}
    torch.manual_seed(0)
    with quiet_transformers():
        with torch.device("meta"):
            parameters = sum(p.numel() for p in auto[kind].from_config(config).parameters())
        if parameters > MOST_PARAMETERS:
            raise ValueError(f"the smallest model has {parameters:,} parameters")
        return auto[kind].from_config(config).float().eval()


def set_up_process() -> None:
    """One thread per process, no network, no warnings: the configs are odd on purpose."""
    os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TQDM_DISABLE="1", HF_HUB_DISABLE_PROGRESS_BARS="1")
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    from transformers.utils import logging as transformers_logging

    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()


def walk_architecture(pair: tuple[str, str]) -> Row:
    """The row of one (kind, model_type): {kind, architecture, seconds, cells: {column: Outcome}} or {…, reason}."""
    kind, model_type = pair
    start = time.monotonic()
    row: Row = {"kind": kind, "architecture": model_type}
    with tempfile.TemporaryDirectory(prefix="walk-") as folder:
        try:
            model = build_model(kind, tiny_config(model_type, is_encoder=kind == "encoder"))
        except Exception as error:  # whatever a constructor of transformers raises
            return row | {"reason": _one_line(error)}
        rotary = _guarded(lambda: rotary_pairs(model))
        donor = random_donor(Path(folder) / "donor", model)
        names = (model.config.model_type, type(model).__name__)  # a multimodal config gives its text model
        row["cells"] = {"rotary pairs": rotary} | {
            column: _guarded(check) for column, check in _checks(names, kind == "encoder", donor, Path(folder))
        }
    return row | {"seconds": round(time.monotonic() - start, 1)}


class NoSuchConfig(Exception):
    """transformers accepts no config of a shape."""


def _checks(names: tuple[str, str], is_encoder: bool, donor: Path, work: Path) -> Checks:
    """[(column, check)]; names: the model_type of the model's own config, and the model's class."""
    model_type, architecture = names

    def target(*shapes: Shape) -> dict[str, Any]:
        """The config of the first of the shapes that transformers accepts."""
        for shape in shapes:
            try:
                config = tiny_config(model_type, shape, is_encoder).to_dict()
                Blueprint.from_config(config | {"model_type": model_type, "architectures": [architecture]})
            except Exception as error:
                reason = _one_line(error)
            else:
                return config | {"model_type": model_type, "architectures": [architecture]}
        raise NoSuchConfig(f"no config of this shape: {reason}")

    def narrower(method: str) -> Outcome:
        shutil.rmtree(work / "coded", ignore_errors=True)
        coded, codes = coded_donor(work / "coded", donor)
        config = target(NARROW, replace(NARROW, layers=OWN.layers))
        return same_name_values(samplers.get(method)(**NARROWER[method]), coded, codes, config)

    def deeper(method: str) -> Outcome:
        shutil.rmtree(work / "coded", ignore_errors=True)
        coded, codes = coded_donor(work / "coded", donor)
        return same_name_values(samplers.get(method)(), coded, codes, target(DEEP))

    def larger(method: str) -> Outcome:
        shape, options = LARGER[method]
        return same_function(samplers.get(method)(**options), donor, target(shape), work)

    found: Checks = []
    found += [(f"own {method}", lambda m=method: own_shape(m, donor, work)) for method in OWN_SHAPE]
    found += [(f"narrower {method}", lambda m=method: narrower(m)) for method in NARROWER]
    found += [(f"deeper {method}", lambda m=method: deeper(m)) for method in DEEPER]
    found += [(f"larger {method}", lambda m=method: larger(m)) for method in LARGER]
    return found


def _guarded(check: Callable[[], Outcome]) -> dict[str, Any]:
    """The outcome of a check as JSON; an exception or a timeout is a failure."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"more than {SECONDS} seconds")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        outcome = check()
    except NoSuchConfig as error:
        outcome = Outcome(True, str(error))
    except Exception as error:  # a crash is what the walk looks for
        outcome = Outcome(False, f"crash: {type(error).__name__}: {_one_line(error)}")
    finally:
        signal.alarm(0)
    return {"ok": outcome.ok, "text": outcome.text}


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    line = lines[-1] if lines[0].startswith(("Validation error", "Class validation error")) else lines[0]
    return line[:300]
