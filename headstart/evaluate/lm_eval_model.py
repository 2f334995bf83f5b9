"""A model in memory as lm-eval needs it, and the run of lm-eval's tasks. Imports lm-eval, which takes seconds.

lm-eval stops with an assertion where a small model lacks characters in its tokenizer, has a context of a hundred tokens
or no first token. Here such cases are counted, or refused in one line."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import random
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lm_eval.tasks
import numpy as np
import torch
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from zoo.errors import UserError, unknown
from zoo.streams import stream_seed

BOOTSTRAPS = 1000  # resamplings for the standard error of a metric that is not a mean, such as a perplexity
DATASETS_URL = "https://huggingface.co/datasets/"
TASK_NAME_PATTERN = re.compile(rb"^[ \t]*(?:-[ \t]+)?(?:task|group|tag)[ \t]*:[ \t]*[\"']?([\w.+-]+)", re.MULTILINE)


class Scorer(HFLM):
    """A model and its tokenizer. After a run, `lacking[task]` counts the characters that the tokenizer does not have.
    `cut[task]` counts the requests that are longer than the context and lost their beginnings."""

    def __init__(self, model: Any, tokenizer: Any, batch_size: int = 16, quiet: bool = True) -> None:
        first = _first_token(tokenizer, model)
        with _silence(quiet):
            super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, prefix_token_id=first)
        self.quiet = quiet
        self.characters = Characters(tokenizer)
        self.lacking: Counter[str] = Counter()
        self.cut: Counter[str] = Counter()

    def _create_tokenizer(self, pretrained: Any, tokenizer: Any, **options: Any) -> None:
        self.tokenizer = tokenizer  # lm-eval accepts only the classes of transformers

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether greedy decoding gives the same) of each request (context, continuation). A
        continuation without any character of the tokenizer has no tokens, so its probability is 1."""
        encoded = [(request.args, *self.encode(*request.args)) for request in requests]
        for request, (_, context, continuation) in zip(requests, encoded, strict=True):
            self._check(request.task_name, context, continuation)
        texts = {(request.task_name, text) for request in requests for text in request.args}
        for task, text in texts:
            self.lacking[task] += self.characters.lacking(text)
        scored = [request for request in encoded if request[2]]
        answers = iter(self._loglikelihood_tokens(scored, disable_tqdm=self.quiet) if scored else ())
        return [next(answers) if continuation else (0.0, True) for _, _, continuation in encoded]

    def encode(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Token ids of both, as lm-eval splits them. At least one token precedes the continuation."""
        if not context:
            return [self.prefix_token_id], self.tok_encode(continuation, add_special_tokens=False)
        ids, following = self._encode_pair(context, continuation)
        return ids or [self.prefix_token_id], following

    def _check(self, task: str, context: list[int], continuation: list[int]) -> None:
        vocab = self.model.get_input_embeddings().num_embeddings
        if (largest := max(context + continuation)) >= vocab:
            raise UserError(
                f"{task}: the tokenizer produces the token id {largest}, outside the vocabulary of {vocab}; put the "
                "model's own tokenizer into its folder"
            )
        if len(continuation) > self.max_length:
            raise UserError(
                f"{task}: an answer of {len(continuation)} tokens does not fit the model's context of "
                f"{self.max_length}; leave this task out"
            )
        self.cut[task] += len(context) + len(continuation) > self.max_length + 1


class Characters:
    """Finds the characters that a tokenizer lacks: those that become its unknown token, or nothing."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.known: dict[str, bool] = {}

    def lacking(self, text: str) -> int:
        """How many characters of a text the tokenizer lacks."""
        return sum(n for character, n in Counter(text).items() if self._lacks(character))

    def _lacks(self, character: str) -> bool:
        if character not in self.known:
            alone, between, without = (
                self.tokenizer.encode(text, add_special_tokens=False) for text in (character, f"a{character}a", "aa")
            )
            self.known[character] = self.tokenizer.unk_token_id not in alone and between != without
        return not self.known[character]


def _first_token(tokenizer: Any, model: Any) -> int:
    """The token before a text without context: the one that begins or ends texts, else a line break, else the first
    token that the config names."""
    newline = tokenizer.encode("\n", add_special_tokens=False)
    known = (
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        newline[0] if len(newline) == 1 and newline[0] != tokenizer.unk_token_id else None,
        model.config.bos_token_id,
    )
    return next((token for token in known if token is not None), 0)


def find_tasks(names: Sequence[str]) -> TaskManager:
    """An index of lm-eval's tasks that contains `names`. Raises UserError for a name that lm-eval does not know.

    The whole index takes about twenty seconds to read. So only folders whose names are a prefix of one of `names` are
    read at first, and a name that is in no file of lm-eval is refused without the index."""
    root = Path(lm_eval.tasks.__file__).parent
    near = [str(p) for p in sorted(root.iterdir()) if p.is_dir() and any(name.startswith(p.name) for name in names)]
    manager = TaskManager(include_defaults=False, include_path=near or None)
    if set(names) <= set(manager.all_subtasks):
        return manager
    missing, declared = _search(root, set(names) - set(manager.all_tasks))
    known: Sequence[str] = sorted(declared)
    if not missing:
        manager = _whole_index()
        known = manager.all_tasks
        missing = set(names) - set(known)
    for name in names:
        if name in missing:
            raise unknown("task of lm-eval", name, known)
    return manager


@functools.cache
def _whole_index() -> TaskManager:
    return TaskManager()


def _search(root: Path, names: set[str]) -> tuple[set[str], set[str]]:
    """(those of `names` that are in no file below `root`, the tasks, groups and tags that its files declare)."""
    missing, declared = {name: name.encode() for name in names}, set()
    for folder, _, files in os.walk(root):
        for file in files:
            if file.endswith((".py", ".pyc")):
                continue
            with open(os.path.join(folder, file), "rb") as opened:
                text = opened.read()
            missing = {name: word for name, word in missing.items() if word not in text}
            declared.update(TASK_NAME_PATTERN.findall(text))
    return set(missing), {word.decode() for word in declared}


def run_tasks(
    lm: Scorer, manager: TaskManager, tasks: Sequence[str | dict[str, Any]], limit: int | None = None, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """{name: {samples, metrics: {name: {mean, stderr}}}} of tasks by name and of `local_task`s. stderr is None where
    lm-eval has none, samples is None for a group. Raises UserError where the data of a task cannot be downloaded."""
    for draws in (random.seed, np.random.seed, torch.manual_seed):
        draws(stream_seed(seed, "evaluate") % 2**32)  # for tasks that draw questions or examples
    with _silence(lm.quiet):
        loaded: dict[str, dict[str, Any]] = {"tasks": {}, "groups": {}, "group_map": {}}
        for task in tasks:
            for kind, found in _load(manager, task).items():
                loaded[kind] |= found
        for task in loaded["tasks"].values():
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=seed)
        results = evaluate(lm=lm, task_dict=loaded, limit=limit, bootstrap_iters=BOOTSTRAPS, log_samples=False)
    counts = results["n-samples"]
    scores = {**results["results"], **results.get("groups", {})}
    return {
        name: {"samples": counts[name]["effective"] if name in counts else None, "metrics": _metrics(entry)}
        for name, entry in scores.items()
    }


def _metrics(entry: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """lm-eval calls a metric `acc,none`, with the filter of the answers behind the comma."""
    found = {}
    for key, value in entry.items():
        metric, comma, kept = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        error = entry.get(f"{metric}_stderr,{kept}")
        name = metric if kept == "none" else f"{metric} ({kept})"
        found[name] = {"mean": float(value), "stderr": float(error) if isinstance(error, (int, float)) else None}
    return found


def _load(manager: TaskManager, task: str | dict[str, Any]) -> dict[str, Any]:
    try:
        return dict(manager.load([task]))
    except ImportError as error:
        raise UserError(f"{task}: {_line(error)}; install the missing package") from error
    except OSError as error:  # no network, no such data set, one that is gated
        if "gated" in str(error):
            where = str(error).split("'")[1] if "'" in str(error) else ""
            raise UserError(
                f"{task}: its data are gated; accept the terms on {DATASETS_URL}{where} and log in with `hf auth login`"
            ) from error
        raise UserError(
            f"{task}: its data cannot be downloaded ({_line(error)}); check the network, or give a local .jsonl file"
        ) from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


@contextlib.contextmanager
def _silence(quiet: bool) -> Iterator[None]:
    """Keeps lm-eval from printing to stdout and from warnings. Its progress bars stop only without stderr."""
    logger, before = logging.getLogger("lm_eval"), os.environ.get("DISABLE_MULTIPROC")
    level = logger.level
    logger.setLevel(logging.ERROR)
    os.environ["DISABLE_MULTIPROC"] = "1"  # else it forks a pool for every perplexity
    with contextlib.ExitStack() as stack:
        target = stack.enter_context(open(os.devnull, "w")) if quiet else sys.stderr
        stack.enter_context(contextlib.redirect_stdout(target))
        stack.enter_context(contextlib.redirect_stderr(target))
        try:
            yield
        finally:
            logger.setLevel(level)
            if before is None:
                del os.environ["DISABLE_MULTIPROC"]
            else:
                os.environ["DISABLE_MULTIPROC"] = before
