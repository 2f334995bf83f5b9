"""Questions in local JSONL files as lm-eval tasks. The keys of its lines say what a file asks."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoo.checkpoints.files import read_bytes
from zoo.errors import UserError
from zoo.limits import MAX_QUESTIONS

Row = dict[str, Any]


@dataclass(frozen=True)
class Format:
    """A kind of question file."""

    question: str
    keys: tuple[str, ...]  # of every line, which may have others
    convert: Callable[[Row], Row]  # a line as lm-eval needs it; KeyError or ValueError for a wrong line
    task: dict[str, Any]  # lm-eval's description of the task


def _metrics(**higher_is_better: bool) -> list[dict[str, Any]]:
    aggregation = {"perplexity": "perplexity"}
    return [
        {"metric": name, "aggregation": aggregation.get(name, "mean"), "higher_is_better": higher}
        for name, higher in higher_is_better.items()
    ]


def _choices(row: Row) -> Row:
    """lm-eval asks ARC and PIQA as `Question: …\\nAnswer:`. The files lack `Answer:`."""
    query = _text(row, "query")
    if query.startswith("Question:") and not query.endswith("Answer:"):
        query = f"{query.rstrip()}\nAnswer:"
    choices = _texts(row, "choices")
    return {"query": query, "choices": choices, "gold": _gold(row, len(choices))}


def _contexts(row: Row) -> Row:
    contexts = _texts(row, "context_options")
    return {"contexts": contexts, "continuation": _text(row, "continuation"), "gold": _gold(row, len(contexts))}


def _minimal_pair(row: Row) -> Row:
    return {"sentences": [_text(row, "sentence_good"), _text(row, "sentence_bad")]}


def _last_word(row: Row) -> Row:
    return {"context": _text(row, "context"), "target": " " + _text(row, "continuation").lstrip()}


# As in lm-eval, one space precedes an answer, and acc_norm divides by the number of an answer's characters.
FORMATS = (
    Format(
        "which of several answers follows a question (HellaSwag, ARC, PIQA, OpenBookQA, COPA)",
        ("query", "choices", "gold"),
        _choices,
        {
            "output_type": "multiple_choice",
            "doc_to_text": "query",
            "doc_to_choice": "choices",
            "doc_to_target": "gold",
            "metric_list": _metrics(acc=True, acc_norm=True),
        },
    ),
    Format(
        "after which of several beginnings a continuation is most likely (Winogrande)",
        ("context_options", "continuation", "gold"),
        _contexts,
        {
            "output_type": "multiple_choice",
            "doc_to_text": "gold",  # a number, for which lm-eval uses the choices as contexts
            "doc_to_choice": "contexts",
            "doc_to_target": "continuation",
            "metric_list": _metrics(acc=True),
        },
    ),
    Format(
        "which of two sentences is more likely (BLiMP)",
        ("sentence_good", "sentence_bad"),
        _minimal_pair,
        {
            "output_type": "multiple_choice",
            "doc_to_text": "",
            "doc_to_choice": "sentences",
            "doc_to_target": 0,
            "metric_list": _metrics(acc=True),
        },
    ),
    Format(
        "whether the next word is predicted (LAMBADA)",
        ("context", "continuation"),
        _last_word,
        {
            "output_type": "loglikelihood",
            "doc_to_text": "context",
            "doc_to_target": "target",
            "metric_list": _metrics(acc=True, perplexity=False),
        },
    ),
)


def is_question_path(task: str) -> bool:
    """Whether a task is written as a path. Any other is a name for lm-eval."""
    return task.endswith((".jsonl", ".json")) or "/" in task or "\\" in task or Path(task).exists()


def question_files(tasks: Sequence[str]) -> dict[str, Path]:
    """{name of the task: file} of the tasks that are paths. A folder stands for its .jsonl files. Raises UserError for
    a missing file, and for two files with the same name."""
    found: dict[str, Path] = {}
    for task in filter(is_question_path, tasks):
        path = Path(task)
        if not path.exists():
            raise UserError(
                f"{task}: no such file of questions; give a .jsonl file, a folder of them, or an lm-eval task"
            )
        files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
        if not files:
            raise UserError(f"{task}: has no .jsonl; give a folder of question files, or a file")
        for file in files:
            if file.name in found:
                raise UserError(
                    f"{file}: {found[file.name]} has the same name; rename one, as results are listed by name"
                )
            found[file.name] = file
    return found


def read_questions(path: Path) -> tuple[Format, list[Row]]:
    """The format of a file and its questions as lm-eval needs them. Raises UserError, with the line, for a line that is
    not JSON, keys of no known format, or an answer that is not among the choices."""
    lines = [(n, line) for n, line in enumerate(_decoded(path).split("\n"), 1) if line.strip()]
    if not lines:
        raise UserError(f"{path}: holds no questions; give a file of one JSON object per line")
    parsed = [(n, _parse(path, n, line)) for n, line in lines]
    keys = set(parsed[0][1])
    format = next((f for f in FORMATS if keys.issuperset(f.keys)), None)
    if format is None:
        known = "; ".join("{" + ", ".join(f.keys) + "}" for f in FORMATS)
        raise UserError(f"{path}: its lines have the keys {', '.join(sorted(keys)) or 'none'}; known are {known}")
    rows = []
    for n, line in parsed:
        try:
            rows.append(format.convert(line))
        except (KeyError, ValueError) as error:
            reason = f"has no {error}" if isinstance(error, KeyError) else str(error)
            raise UserError(f"{path}: line {n} {reason}; correct or remove it") from error
    return format, rows


def local_task(name: str, path: Path) -> dict[str, Any]:
    """The file as the description of an lm-eval task. Its questions stay in memory, so no cache is written."""
    format, rows = read_questions(path)

    def questions(**_: Any) -> dict[str, Any]:
        from datasets import Dataset

        return {"test": Dataset.from_list(rows)}

    return {"task": name, "custom_dataset": questions, "test_split": "test", "num_fewshot": 0, **format.task}


def _decoded(path: Path) -> str:
    try:
        return read_bytes(path, MAX_QUESTIONS).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text ({error}); give a file of JSON lines") from error


def _parse(path: Path, number: int, line: str) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # ValueError: also numbers of thousands of digits
        reason = getattr(error, "msg", str(error))
        raise UserError(f"{path}: line {number} is not JSON ({reason}); give one JSON object per line") from error
    if not isinstance(row, dict):
        raise UserError(f"{path}: line {number} is not a JSON object; give one per line")
    return row


def _is_text(value: object) -> bool:
    """JSON can hold half a surrogate pair, which is not text: UTF-8 cannot encode it."""
    return isinstance(value, str) and bool(value.strip()) and not any("\ud800" <= c <= "\udfff" for c in value)


def _text(row: Row, key: str) -> str:
    value = row[key]
    if not _is_text(value):
        raise ValueError(f"has {value!r:.60} as {key}, not a text")
    return value


def _texts(row: Row, key: str) -> list[str]:
    value = row[key]
    if not isinstance(value, list) or len(value) < 2 or not all(map(_is_text, value)):
        raise ValueError(f"has {value!r:.60} as {key}, not a list of texts")
    return value


def _gold(row: Row, choices: int) -> int:
    value = row["gold"]
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < choices:
        raise ValueError(f"has {value!r:.60} as gold, not a number from 0 to {choices - 1}")
    return value
