"""`headstart evaluate`: the scores of a checkpoint or an adapter in lm-eval's tasks, or on local files of questions."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import logging
import os
import shlex
import warnings
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from headstart.evaluate.local_tasks import is_file, local_task, question_files
from headstart.generate.sampling import language_model_blueprint
from headstart.lora.lora import BASE
from headstart.versions import package_versions
from zoo.checkpoints.checkpoint import Checkpoint
from zoo.checkpoints.files import read_json
from zoo.checkpoints.headers import read_header
from zoo.checkpoints.hub import HUB_ID, with_retries
from zoo.checkpoints.sources import fetch, resolve
from zoo.checkpoints.writer import replace_file
from zoo.errors import UserError, unknown
from zoo.lora.adapters import CONFIG, WEIGHTS, lora_config_of, require_peft
from zoo.vocabulary import BYTE_VOCAB, byte_tokenizer

log = logging.getLogger(__name__)

TOKENIZERS = ("tokenizer.json", "tokenizer.model")


def evaluate(
    model: str | Path,
    tasks: Sequence[str],
    out: str | Path | None = None,
    base: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
    device: str = "cpu",
    dtype: str | None = None,
    quiet: bool = False,
    command: str | None = None,
) -> dict[str, Any]:
    """{model, base, command, versions, seed, limit, device, dtype, tasks: {name: {samples, metrics: {name: {mean,
    stderr}}, lacking, cut}}}, also written to `out`.

    model   a checkpoint or an adapter: a folder or a hub id (org/name@revision)
    tasks   names that lm-eval knows, JSONL files whose keys say what they ask (`local_tasks.FORMATS`; they are named
            after the file), folders of such files
    base    what an adapter adapts, else what its config names
    limit   only the first questions of each task
    dtype   to compute in, else the checkpoint's own
    lacking, cut  how many characters of the texts the tokenizer does not have, and how many requests are longer than
            the context and lost their beginnings

    A model of 256 tokens without a tokenizer reads bytes. UserError: lm-eval (or, for an adapter, peft) is not
    installed, no such file or format, a folder without weights or tokenizer, weights that do not fill the model, an
    adapter whose settings PEFT refuses or whose base is not found or does not fit it, data of a task that cannot be
    had, a place that `out` cannot be written to.
    """
    _check(tasks, out, limit, batch_size)
    files = question_files(tasks)
    local = {name: local_task(name, path) for name, path in files.items()}
    names = [task for task in tasks if not is_file(task)]
    folder, adapter = locate(model, base, quiet)
    from headstart.evaluate.lm_eval_model import Scorer, find_tasks, run_tasks

    manager = find_tasks(names)
    network = load_model(folder, adapter, dtype).to(device).eval()
    scorer = Scorer(network, load_tokenizer(folder, adapter), batch_size, quiet)
    scores = run_tasks(scorer, manager, [*names, *local.values()], limit, seed)
    for name, entry in scores.items():
        entry["lacking"], entry["cut"] = scorer.lacking[name], scorer.cut[name]
        if entry["lacking"]:
            log.info("%s: the tokenizer lacks %d characters of its texts", name, entry["lacking"])
        if entry["cut"]:
            log.info("%s: %d requests are longer than the context and lost their beginnings", name, entry["cut"])
    packages = ("lm_eval", "datasets", *(("peft",) if adapter else ()))
    results = {
        "model": str(model),
        "base": str(folder) if adapter else None,
        "command": command or _command(model, tasks, base, limit, seed),
        "versions": package_versions() | {name: importlib.metadata.version(name) for name in packages},
        "seed": seed,
        "limit": limit,
        "device": device,
        "dtype": str(network.dtype).removeprefix("torch."),
        "tasks": scores,
    }
    if out is not None:
        replace_file(Path(out), (json.dumps(results, indent=2) + "\n").encode())
    return results


def locate(model: str | Path, base: str | Path | None, quiet: bool = True) -> tuple[Path, Path | None]:
    """The folder of the checkpoint, and that of the adapter where `model` is one; what is on the hub is fetched."""
    adapter = _adapter(str(model), quiet)
    if adapter is None:
        if base is not None:
            raise UserError(f"--base {base}: {model} is no adapter (it has no {CONFIG}); leave --base out")
        return _fetched(str(model), quiet), None
    _check_settings(adapter)
    named = str(base or read_json(adapter / CONFIG).get("base_model_name_or_path") or "")
    try:
        return _fetched(named, quiet), adapter
    except UserError as error:
        if base is not None:
            raise
        if (adapter / BASE).is_dir():  # an adapter that came with its base, moved since
            return _fetched(str(adapter / BASE), quiet), adapter
        raise UserError(f"{model}: its base {named!r} is not found ({error}); give it with --base MODEL") from error


def load_model(folder: Path, adapter: Path | None, dtype: str | None) -> Any:
    """The model of a checkpoint, with the adapter on it where there is one. UserError: weights of no language model,
    or that leave tensors unfilled; an adapter of another base."""
    from transformers import AutoModelForCausalLM

    language_model_blueprint(folder)
    with _no_bars():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype or "auto", local_files_only=True, output_loading_info=True
        )
    model, info = loaded
    if info["missing_keys"]:
        first = min(info["missing_keys"])
        raise UserError(f"{folder}: has no weights for {first!r} and so is no whole model; give a checkpoint of it all")
    if adapter is None:
        return model
    from peft import PeftModel, get_peft_model_state_dict

    if not (adapter / WEIGHTS).is_file():
        raise UserError(f"{adapter}: has no {WEIGHTS}; save the adapter as safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            adapted = PeftModel.from_pretrained(model, str(adapter))
        except Exception as error:  # PEFT checks few settings, so odd ones fail anywhere
            reason = _reason(error)
            if "size mismatch" in str(error) or "not found in the base model" in str(error):
                raise UserError(
                    f"{adapter}: does not fit {folder} ({reason}); give its own base with --base"
                ) from error
            raise UserError(f"{adapter / CONFIG}: PEFT refuses it ({reason}); mend it, or save it again") from error
    wanted = {name for name in get_peft_model_state_dict(adapted, save_embedding_layers=False) if "lora_" in name}
    stored = {name for name in read_header(adapter / WEIGHTS) if "lora_" in name}
    if other := wanted ^ stored:  # PEFT passes over both kinds
        raise UserError(f"{adapter}: does not fit {folder} ({min(other)} has no place); give its own base with --base")
    return adapted


def load_tokenizer(folder: Path, adapter: Path | None = None) -> Any:
    """The adapter's tokenizer, else the checkpoint's, else bytes for a model of 256 tokens. UserError: neither."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    for place in filter(None, (adapter, folder)):
        if any((place / name).is_file() for name in TOKENIZERS):
            try:
                return AutoTokenizer.from_pretrained(place, local_files_only=True)
            except Exception as error:  # the tokenizers library has no exception of its own
                raise UserError(f"{place}: its tokenizer cannot be loaded ({error}); save it again") from error
    vocab = read_json(folder / "config.json").get("vocab_size")
    if vocab != BYTE_VOCAB:
        raise UserError(
            f"{folder}: has no tokenizer for its {vocab} tokens; put tokenizer.json there (only a vocabulary of "
            f"{BYTE_VOCAB} is read as bytes)"
        )
    return PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer())


def _check(tasks: Sequence[str], out: str | Path | None, limit: int | None, batch_size: int) -> None:
    if find_spec("lm_eval") is None:
        raise UserError("evaluate needs lm-eval: pip install headstart[eval]")
    if not tasks:
        raise UserError("--tasks: none are named; give names that lm-eval knows, or JSONL files")
    for option, number in (("limit", limit), ("batch-size", batch_size)):
        if number is not None and number < 1:
            raise UserError(f"--{option} {number}: must be at least 1")
    if out is None:
        return
    if Path(out).exists():
        raise UserError(f"{out}: exists already; give another --out, or remove it")
    above = next(folder for folder in Path(out).absolute().parents if folder.exists())
    if not above.is_dir():
        raise UserError(f"{out}: {above} is a file, no folder; give another --out")
    if not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"{out}: {above} cannot be written to; give another --out")


def _check_settings(adapter: Path) -> None:
    """UserError for an adapter_config.json that is no config of PEFT's, whatever the base."""
    peft = require_peft()
    path = adapter / CONFIG
    kind = read_json(path).get("peft_type")
    known = [known.value for known in peft.PeftType]
    if kind not in known:
        raise unknown(f"peft_type in {path}", str(kind), known)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = peft.PeftConfig.from_pretrained(str(adapter))
    except Exception as error:  # PEFT checks few settings, so odd ones fail anywhere
        raise UserError(f"{path}: PEFT refuses it ({_reason(error)}); mend it, or save it again") from error
    if kind == peft.PeftType.LORA.value:
        try:
            lora_config_of(config)
        except UserError as error:
            raise UserError(f"{path}: {str(error).removeprefix('lora config: ')}") from error


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _adapter(model: str, quiet: bool) -> Path | None:
    """The folder of an adapter, None where `model` is none."""
    folder = Path(model)
    if folder.exists():
        return folder if (folder / CONFIG).is_file() else None
    if not HUB_ID.fullmatch(model):
        return None
    from huggingface_hub import HfApi, constants, snapshot_download

    repo, _, revision = model.partition("@")
    wanted: dict[str, Any] = {
        "revision": revision or None,
        "allow_patterns": ["adapter_*", "tokenizer*", "special_tokens_map.json"],
    }
    if constants.HF_HUB_OFFLINE:
        with contextlib.suppress(OSError):
            cached = Path(snapshot_download(repo, local_files_only=True, **wanted))
            return cached if (cached / CONFIG).is_file() else None
        return None
    if not with_retries(lambda: HfApi().file_exists(repo, CONFIG, revision=revision or None), model):
        return None
    return Path(with_retries(lambda: snapshot_download(repo, **wanted), model))


def _fetched(model: str, quiet: bool) -> Path:
    """The folder of a checkpoint, whole as far as its headers say."""
    folder = Path(model)
    if not folder.is_dir():
        folder = fetch(resolve(model), quiet)
    Checkpoint.open(folder)
    return folder


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    from transformers.utils import logging as chatter

    shown = chatter.is_progress_bar_enabled()
    chatter.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            chatter.enable_progress_bar()


def _command(model: str | Path, tasks: Sequence[str], base: str | Path | None, limit: int | None, seed: int) -> str:
    """The command line that does what this call does."""
    line = ["headstart", "evaluate", "--model", str(model), "--tasks", ",".join(tasks), "--seed", str(seed)]
    line += ["--base", str(base)] if base is not None else []
    return shlex.join(line + (["--limit", str(limit)] if limit is not None else []))
