"""`headstart evaluate`: the scores of a checkpoint or an adapter in lm-eval's tasks, or on local files of questions."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from headstart.config import EvaluateConfig
from headstart.devices import torch_device
from headstart.evaluate.local_tasks import is_question_path, local_task, question_files
from headstart.evaluate.models import load_model, load_tokenizer, locate_checkpoint_and_adapter
from headstart.versions import package_versions
from zoo.checkpoints.atomic import remove_leftovers, replace_file
from zoo.errors import UserError

log = logging.getLogger(__name__)


def evaluate(config: EvaluateConfig, *, quiet: bool = False, command: str | None = None) -> dict[str, Any]:
    """Scores a model and returns the results, also written to `config.out`: {model, base, command, versions, seed,
    limit, device, dtype, tasks: {name: {samples, metrics: {name: {mean, stderr}}, lacking, cut}}, config}.

    A task is a name that lm-eval knows, a JSONL file whose keys say what it asks (`local_tasks.FORMATS`), or a folder
    of such files. A file gives the task its name. `lacking` counts the characters that the tokenizer does not have,
    `cut` the requests that are longer than the context and lost their beginnings. A model of 256 tokens without a
    tokenizer reads bytes.

    command  what the results name as the command; else the command line that does the same

    Raises UserError:
    - lm-eval is not installed, or peft for an adapter
    - a task, a file or its format is unknown
    - the model has no weights or no tokenizer, or an adapter does not fit its base
    - the data of a task cannot be downloaded, or `out` cannot be written
    """
    _check(config)
    local = {name: local_task(name, path) for name, path in question_files(config.tasks).items()}
    names = [task for task in config.tasks if not is_question_path(task)]
    folder, adapter = locate_checkpoint_and_adapter(config.model, config.base, quiet)
    from headstart.evaluate.lm_eval_model import Scorer, find_tasks, run_tasks

    manager = find_tasks(names)
    device = torch_device(config.device)
    network = load_model(folder, adapter, config.dtype).to(device).eval()
    scorer = Scorer(network, load_tokenizer(folder, adapter), config.batch_size, quiet)
    scores = run_tasks(scorer, manager, [*names, *local.values()], config.limit, config.seed)
    for name, entry in scores.items():
        entry["lacking"], entry["cut"] = scorer.lacking[name], scorer.cut[name]
        if entry["lacking"]:
            log.info("%s: the tokenizer lacks %d characters of its texts", name, entry["lacking"])
        if entry["cut"]:
            log.info("%s: %d requests are longer than the context and lost their beginnings", name, entry["cut"])
    packages = ("lm_eval", "datasets", *(("peft",) if adapter else ()))
    results = {
        "model": str(config.model),
        "base": str(folder) if adapter else None,
        "command": command or config.to_command(),
        "versions": package_versions() | {name: importlib.metadata.version(name) for name in packages},
        "seed": config.seed,
        "limit": config.limit,
        "device": device,
        "dtype": str(network.dtype).removeprefix("torch."),
        "tasks": scores,
        "config": config.to_record(),
    }
    if config.out is not None:
        replace_file(Path(config.out), (json.dumps(results, indent=2) + "\n").encode())
    return results


def _check(config: EvaluateConfig) -> None:
    """Raises UserError where lm-eval is missing or `out` cannot be written."""
    if find_spec("lm_eval") is None:
        raise UserError("evaluate needs lm-eval: pip install 'headstart[eval]'")
    if config.out is None:
        return
    out = Path(config.out)
    if out.exists():
        remove_leftovers(out)
        raise UserError(f"{out}: exists already; give another --out, or remove it")
    parent = next(folder for folder in out.absolute().parents if folder.exists())
    if not parent.is_dir():
        raise UserError(f"{out}: {parent} is a file, not a folder; give another --out")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"{out}: no permission to write to {parent}; give another --out")
