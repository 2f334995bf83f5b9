"""The model to evaluate: a checkpoint or an adapter, from a folder or the hub, and its tokenizer."""

from __future__ import annotations

import contextlib
import math
import warnings
from pathlib import Path
from typing import Any

from headstart.evaluate.tokenizer import SandboxedTokenizer
from headstart.generate.sampling import language_model_blueprint
from headstart.lora.lora import BASE_FOLDER
from zoo.checkpoints.checkpoint import Checkpoint
from zoo.checkpoints.files import read_json
from zoo.checkpoints.headers import read_header
from zoo.checkpoints.hub import HUB_ID, with_retries
from zoo.checkpoints.quantised import is_code
from zoo.checkpoints.sources import fetch_files, resolve_source
from zoo.errors import UserError, unknown
from zoo.limits import MAX_CONFIG, MAX_UNKNOWN_VALUES
from zoo.progress import without_progress_bars
from zoo.sandbox import library_errors
from zoo.targets.adapter_bounds import check_adapter, check_patterns
from zoo.targets.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, as_lora_config, require_peft
from zoo.targets.blueprint import Blueprint
from zoo.vocabulary import BYTE_VOCAB, byte_tokenizer, has_tokenizer, require_tokenizer_packages

RECORD = "headstart.json"
USUAL_VALUES_PER_BYTE = 4  # weights of two bits are the smallest
USUAL_RANK = 256  # a rank that any base has memory for


def locate_checkpoint_and_adapter(
    model: str | Path, base: str | Path | None, quiet: bool = True
) -> tuple[Path, Path | None]:
    """(the folder of the checkpoint, the folder of the adapter or None). What is on the hub is downloaded.

    Raises UserError where a model is missing or incomplete, or `base` is given for a model that is not an adapter."""
    adapter = _find_adapter(str(model), quiet)
    if adapter is None:
        if base is not None:
            raise UserError(f"--base {base}: {model} is not an adapter (it has no {ADAPTER_CONFIG}); leave --base out")
        return _find_checkpoint(str(model), quiet), None
    _check_settings(adapter)
    if base is not None:
        return _find_checkpoint(str(base), quiet), adapter
    named = str(read_json(adapter / ADAPTER_CONFIG).get("base_model_name_or_path") or "")
    written = _base_of_ours(adapter)
    if written is not None and named.startswith("./"):
        return _find_checkpoint(written, quiet), adapter
    try:
        return _find_checkpoint(named, quiet), adapter
    except UserError as error:
        if written is not None:
            return _find_checkpoint(written, quiet), adapter
        raise UserError(f"{model}: its base {named!r} is not found ({error}); give it with --base MODEL") from error


def _base_of_ours(adapter: Path) -> str | None:
    """The folder of the base of an adapter that `headstart lora` wrote: the changed base inside the adapter's folder,
    else the folder that was given as --base; None where it is gone, or the adapter is not ours."""
    if (adapter / BASE_FOLDER).is_dir():
        return str(adapter / BASE_FOLDER)
    given = read_json(adapter / RECORD).get("base") if (adapter / RECORD).is_file() else None
    return given if isinstance(given, str) and "\0" not in given and Path(given).is_dir() else None


def load_model(folder: Path, adapter: Path | None, dtype: str | None) -> Any:
    """The model of a checkpoint, with its adapter. Raises UserError for weights that belong to no language model or
    leave tensors unfilled, and for an adapter of another base."""
    from transformers import AutoModelForCausalLM

    _check_sizes(Checkpoint.open(folder), language_model_blueprint(folder))
    with without_progress_bars(), library_errors(str(folder), "give another checkpoint"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype or "auto", local_files_only=True, output_loading_info=True
        )
    model, info = loaded
    if info["missing_keys"]:
        first = min(info["missing_keys"])
        raise UserError(f"{folder}: has no weights for {first!r}, so it is incomplete; give a complete checkpoint")
    return model if adapter is None else _load_adapter(model, folder, adapter)


def load_tokenizer(folder: Path, adapter: Path | None = None) -> Any:
    """The tokenizer of the adapter, else of the checkpoint, else bytes for a vocabulary of 256. Raises UserError where
    there is none. What a tokenizer from outside does runs in a child process."""
    from transformers import PreTrainedTokenizerFast

    for place in filter(None, (adapter, folder)):
        if has_tokenizer(place):
            require_tokenizer_packages(place)
            return SandboxedTokenizer(place)
    vocab = read_json(folder / "config.json").get("vocab_size")
    if vocab != BYTE_VOCAB:
        raise UserError(
            f"{folder}: has no tokenizer for its {vocab} tokens; put tokenizer.json there (only a vocabulary of "
            f"{BYTE_VOCAB} is read as bytes)"
        )
    return PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer())


def _check_sizes(checkpoint: Checkpoint, blueprint: Blueprint) -> None:
    """Raises UserError where transformers would build a model that the weights do not fill, however large it is."""
    described = {spec.name: spec.shape for spec in blueprint.specs}
    for name, entry in checkpoint.entries.items():
        if described.get(name, entry.shape) != entry.shape and not is_code(entry.dtype):
            raise UserError(
                f"{checkpoint.folder}: config.json and weights disagree: {name!r} has shape {list(entry.shape)}, the"
                f" config describes {list(described[name])}; take both from the same checkpoint"
            )
    stored = sum(entry.nbytes for entry in checkpoint.entries.values())
    if blueprint.parameters > max(USUAL_VALUES_PER_BYTE * stored, MAX_UNKNOWN_VALUES):
        raise UserError(
            f"{checkpoint.folder}: its config describes {blueprint.parameters} weights, its files have {stored} bytes;"
            " take both from the same checkpoint"
        )


def _load_adapter(model: Any, folder: Path, adapter: Path) -> Any:
    from peft import PeftModel, get_peft_model_state_dict

    if not (adapter / ADAPTER_WEIGHTS).is_file():
        raise UserError(f"{adapter}: has no {ADAPTER_WEIGHTS}; save the adapter as safetensors")
    _check_against_weights(adapter, model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            adapted = PeftModel.from_pretrained(model, str(adapter))
        except Exception as error:  # PEFT checks few settings, so unusual ones fail anywhere
            reason = _short_reason(error)
            if "size mismatch" in str(error) or "not found in the base model" in str(error):
                raise UserError(
                    f"{adapter}: does not fit {folder} ({reason}); give its own base with --base"
                ) from error
            raise UserError(
                f"{adapter / ADAPTER_CONFIG}: PEFT refuses it ({reason}); correct it, or save it again"
            ) from error
    expected = {name for name in get_peft_model_state_dict(adapted, save_embedding_layers=False) if "lora_" in name}
    stored = {name for name in read_header(adapter / ADAPTER_WEIGHTS) if "lora_" in name}
    if unmatched := expected ^ stored:  # PEFT ignores both kinds
        raise UserError(
            f"{adapter}: does not fit {folder} ({min(unmatched)} is only in one of them); give its own base with --base"
        )
    return adapted


def _check_against_weights(adapter: Path, model: Any) -> None:
    """Raises UserError where PEFT would build more than the adapter's weights hold, or its patterns take too long."""
    import peft

    path, entries = adapter / ADAPTER_CONFIG, read_header(adapter / ADAPTER_WEIGHTS)
    settings = read_json(path, MAX_CONFIG)
    stored = [entry.shape[0] for name, entry in entries.items() if "lora_" in name and "_A" in name and entry.shape]
    rank = max([settings.get("r") or 0, *(settings.get("rank_pattern") or {}).values()])
    if rank > max([*stored, USUAL_RANK]):
        found = max(stored, default=0)
        raise UserError(f"{path}: states rank {rank}, its weights have {found}; give both of one adapter")
    values = sum(math.prod(entry.shape) for entry in entries.values())
    prompt = math.prod(settings.get(key) or 1 for key in ("num_virtual_tokens", "token_dim"))
    if prompt > max(values, 1 << 20):
        raise UserError(f"{path}: describes {prompt} values, its weights have {values}; give both of one adapter")
    config = peft.PeftConfig.from_pretrained(str(adapter))
    check_patterns(config, [name for name, _ in model.named_modules()], str(path))


def _check_settings(adapter: Path) -> None:
    """Raises UserError for an adapter_config.json that PEFT refuses, whatever the base."""
    peft = require_peft()
    path = adapter / ADAPTER_CONFIG
    settings = read_json(path, MAX_CONFIG)
    check_adapter(settings, str(path))
    kind = settings.get("peft_type")
    known = [known.value for known in peft.PeftType]
    if kind not in known:
        raise unknown(f"peft_type in {path}", str(kind), known)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = peft.PeftConfig.from_pretrained(str(adapter))
    except Exception as error:  # PEFT checks few settings, so unusual ones fail anywhere
        raise UserError(f"{path}: PEFT refuses it ({_short_reason(error)}); correct it, or save it again") from error
    if kind == peft.PeftType.LORA.value:
        try:
            as_lora_config(config)
        except UserError as error:
            raise UserError(f"{path}: {str(error).removeprefix('lora config: ')}") from error


def _short_reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _find_adapter(model: str, quiet: bool) -> Path | None:
    """The folder of an adapter; None for any other model."""
    folder = Path(model)
    if folder.exists():
        return folder if (folder / ADAPTER_CONFIG).is_file() else None
    if not HUB_ID.fullmatch(model):
        return None
    from huggingface_hub import HfApi, constants, snapshot_download

    repo, _, revision = model.partition("@")
    request: dict[str, Any] = {
        "revision": revision or None,
        "allow_patterns": ["adapter_*", "tokenizer*", "special_tokens_map.json"],
    }
    if constants.HF_HUB_OFFLINE:
        with contextlib.suppress(OSError):
            cached = Path(snapshot_download(repo, local_files_only=True, **request))
            return cached if (cached / ADAPTER_CONFIG).is_file() else None
        return None
    if not with_retries(lambda: HfApi().file_exists(repo, ADAPTER_CONFIG, revision=revision or None), model):
        return None
    return Path(with_retries(lambda: snapshot_download(repo, **request), model))


def _find_checkpoint(model: str, quiet: bool) -> Path:
    """The folder of a checkpoint. Raises UserError where its headers say that it is incomplete."""
    folder = Path(model)
    if not folder.is_dir():
        folder = fetch_files(resolve_source(model), quiet)
    Checkpoint.open(folder)
    return folder
