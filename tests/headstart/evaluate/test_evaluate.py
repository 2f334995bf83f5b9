"""Our scores are what a direct computation with transformers says, on really trained models and on bytes."""

from __future__ import annotations

import http.server
import json
import math
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from headstart.evaluate import models
from headstart.evaluate.local_tasks import question_files, read_questions
from tests.conftest import make_llama
from tests.support.commands import evaluate, invoke
from tests.support.hub_server import use_hub
from zoo.errors import UserError

lm_eval = pytest.importorskip("lm_eval.tasks") and pytest.importorskip("lm_eval")

QUESTIONS = [
    {"query": "Once upon a time there was a", "choices": ["little girl", "xyzzy plugh", "q"], "gold": 0},
    {"query": "Question: Who is it?\n", "choices": ["Lily", "the big red ball of the park"], "gold": 1},
    {"query": "One day", "choices": ["she saw a dog", "dog a saw she"], "gold": 0},
]


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class Direct:
    """Sums of log-probabilities by a plain forward pass, one text at a time."""

    def __init__(self, folder: Path, model: Any = None) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.model = (model or AutoModelForCausalLM.from_pretrained(folder)).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    @torch.no_grad()
    def loglikelihood(self, context: str, continuation: str) -> tuple[float, bool]:
        if context:
            kept = len(self.tokenizer(context.rstrip())["input_ids"])
            ids = self.tokenizer(context + continuation)["input_ids"]
        else:
            kept = 1
            ids = [self.tokenizer.bos_token_id, *self.tokenizer(continuation, add_special_tokens=False)["input_ids"]]
        logits = self.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        at = range(kept, len(ids))
        total = sum(float(logits[i - 1, ids[i]]) for i in at)
        return total, all(int(logits[i - 1].argmax()) == ids[i] for i in at)


def stderr(hits: list[bool]) -> float:
    return float(np.std(hits, ddof=1) / math.sqrt(len(hits)))


def near(metric: dict[str, float], hits: list[bool]) -> None:
    assert metric["mean"] == pytest.approx(np.mean(hits))
    assert metric["stderr"] == pytest.approx(stderr(hits))


def test_scores_of_a_real_model_are_the_direct_computation(shared_data: Path) -> None:
    folder, questions, limit = shared_data / "models" / "stories260K", shared_data / "eval", 12
    names = ("hellaswag_olmo_1000", "arc_easy", "winogrande", "lambada_openai", "blimp/causative")
    files = {name: questions / f"{name}.jsonl" for name in names}
    found = evaluate(folder, [str(f) for f in files.values()], limit=limit, quiet=True)
    assert set(found["tasks"]) == {f.name for f in files.values()}
    assert all(task["samples"] == limit and task["lacking"] == 0 for task in found["tasks"].values())
    direct = Direct(folder)

    def rows(name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in files[name].read_text().splitlines()[:limit]]

    def score(name: str) -> dict[str, Any]:
        return found["tasks"][files[name].name]["metrics"]

    for name, cue in (("hellaswag_olmo_1000", ""), ("arc_easy", "\nAnswer:")):
        best, normed = [], []
        for row in rows(name):
            sums = [direct.loglikelihood(row["query"] + cue, f" {c}")[0] for c in row["choices"]]
            best.append(int(np.argmax(sums)) == row["gold"])
            normed.append(
                int(np.argmax([s / len(c) for s, c in zip(sums, row["choices"], strict=True)])) == row["gold"]
            )
        near(score(name)["acc"], best)
        near(score(name)["acc_norm"], normed)
        assert 0 < np.mean(best) < 1
    ends = [
        int(np.argmax([direct.loglikelihood(c, f" {row['continuation']}")[0] for c in row["context_options"]]))
        == row["gold"]
        for row in rows("winogrande")
    ]
    near(score("winogrande")["acc"], ends)
    words = [direct.loglikelihood(row["context"], f" {row['continuation']}") for row in rows("lambada_openai")]
    near(score("lambada_openai")["acc"], [greedy for _, greedy in words])
    assert score("lambada_openai")["perplexity"]["mean"] == pytest.approx(
        math.exp(-np.mean([total for total, _ in words])), rel=1e-4
    )
    pairs = [
        direct.loglikelihood("", f" {row['sentence_good']}")[0] > direct.loglikelihood("", f" {row['sentence_bad']}")[0]
        for row in rows("blimp/causative")
    ]
    near(score("blimp/causative")["acc"], pairs)
    assert np.mean(pairs) > 0.5


def test_every_file_of_the_shared_data_is_read(shared_data: Path) -> None:
    files = question_files([str(shared_data / "eval"), str(shared_data / "eval" / "blimp")])
    counts = {name: len(read_questions(path)[1]) for name, path in files.items()}
    assert len(counts) == 58 and sum(counts.values()) == 51_000 + 1000 + 2376 + 1838 + 5153 + 500 + 100 + 1267


def test_a_model_of_256_tokens_reads_bytes(tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "bytes", vocab_size=256, max_position_embeddings=64)
    file = write(tmp_path / "questions.jsonl", [*QUESTIONS, {"query": "Où", "choices": ["ça", "là-bas €"], "gold": 1}])
    found = evaluate(folder, [str(file)], quiet=True)["tasks"]["questions.jsonl"]
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    hits = []
    for query, choices, gold in (tuple(json.loads(line).values()) for line in file.read_text().splitlines()):
        text = query.rstrip() + ("\nAnswer:" if query.startswith("Question") else "")
        sums = []
        for choice in choices:
            ids = list(f"{text} {choice}".encode())
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            sums.append(sum(float(logits[i - 1, ids[i]]) for i in range(len(text.encode()), len(ids))))
        hits.append(int(np.argmax(sums)) == gold)
    near(found["metrics"]["acc"], hits)
    assert found["lacking"] == 0 and found["cut"] == 0


def test_characters_that_a_tokenizer_lacks_are_counted(shared_data: Path, tmp_path: Path) -> None:
    """One tokenizer leaves them out, the other has a token for what it does not know, and none to begin a text with."""
    rows = [
        {"query": "anna", "choices": ["42", "7", "b"], "gold": 1},  # 42 and 7 are nothing to it, and so are blanks
        {"query": "marie", "choices": ["anne", "é"], "gold": 0},
    ]
    file = write(tmp_path / "names.jsonl", rows)
    found = evaluate(shared_data / "models" / "makemore-en-a", [str(file)], quiet=True)["tasks"]["names.jsonl"]
    assert found["lacking"] == len(" 42") + len(" 7") + len(" ") + len(" ") + len(" é")
    assert found["samples"] == 2 and found["metrics"]["acc"]["mean"] == 0  # the first and the last are certain
    pairs = write(tmp_path / "pairs.jsonl", [{"sentence_good": "Ab €£.", "sentence_bad": "Ab."}])
    found = evaluate(shared_data / "models" / "arthur" / "run0-ep025", [str(pairs)], quiet=True)["tasks"]["pairs.jsonl"]
    assert found["lacking"] == 2


def test_long_texts_lose_their_beginning_but_keep_the_answer(tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "bytes", vocab_size=256, max_position_embeddings=64)
    rows = [{"query": f"{'a' * 90} end", "choices": ["one", "three"], "gold": 0}, QUESTIONS[0]]
    long, short = write(tmp_path / "long.jsonl", rows), write(tmp_path / "short.jsonl", rows)
    short.write_text(long.read_text().replace("a" * 90, "a" * 80))
    found = evaluate(folder, [str(long), str(short)], quiet=True)["tasks"]
    assert found["long.jsonl"]["cut"] == found["short.jsonl"]["cut"] == 2
    assert found["long.jsonl"]["metrics"] == found["short.jsonl"]["metrics"]
    write(long, [{"query": "x", "choices": ["a" * 64, "b"], "gold": 0}])
    with pytest.raises(UserError, match=r"long.jsonl: an answer of 65 tokens does not fit the model's context of 64"):
        evaluate(folder, [str(long)], quiet=True)


def make_adapter(base: Path, out: Path, named: str | None = None) -> Path:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base)
    config = peft.LoraConfig(r=4, lora_alpha=64, target_modules="all-linear", init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    adapted.save_pretrained(out)
    if named is not None:
        path = out / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": named}))
    return out


def test_an_adapter_is_scored_on_its_base(shared_data: Path, tmp_path: Path) -> None:
    base, questions = shared_data / "models" / "stories260K", [shared_data / "eval" / "blimp" / "causative.jsonl"]
    adapter = make_adapter(base, tmp_path / "adapter", "nowhere/to-be-found-x")
    tasks = [str(q) for q in questions]
    found = evaluate(adapter, tasks, base=base, limit=30, quiet=True, dtype="float32")
    assert found["base"] == str(base) and "peft" in found["versions"]
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    direct = Direct(base, PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter))
    rows = [json.loads(line) for line in questions[0].read_text().splitlines()[:30]]
    hits = [
        direct.loglikelihood("", f" {row['sentence_good']}")[0] > direct.loglikelihood("", f" {row['sentence_bad']}")[0]
        for row in rows
    ]
    near(found["tasks"]["causative.jsonl"]["metrics"]["acc"], hits)
    plain = evaluate(base, tasks, limit=30, quiet=True)
    assert plain["tasks"] != found["tasks"]
    again = make_adapter(base, tmp_path / "named", str(base))  # the base that it names itself
    assert evaluate(again, tasks, limit=30, quiet=True)["tasks"] == found["tasks"]


def test_an_adapter_of_ours_is_scored_on_the_base_that_came_with_it(shared_data: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from tests.support.commands import lora

    base, file = shared_data / "models" / "stories260K", str(shared_data / "eval" / "copa.jsonl")
    lora(base, "olora", 4, tmp_path / "made", quiet=True)
    moved = (tmp_path / "made").rename(tmp_path / "moved")
    found = evaluate(moved, [file], quiet=True)
    assert found["base"] == str(moved / "base")
    assert found["tasks"] == evaluate(base, [file], quiet=True)["tasks"]  # base and adapter are the original together
    assert evaluate(moved / "base", [file], quiet=True)["tasks"] != found["tasks"]
    lora(base, "gaussian", 4, tmp_path / "plain", quiet=True)  # its config names no folder of this machine
    again = evaluate(tmp_path / "plain", [file], quiet=True)
    assert again["base"] == str(base) and again["tasks"] == found["tasks"]


def test_an_adapter_without_its_base_is_refused(tmp_path: Path) -> None:
    base = make_llama(tmp_path / "base", vocab_size=256)
    other = make_llama(tmp_path / "other", vocab_size=256, hidden_size=48)
    shallow = make_llama(tmp_path / "shallow", vocab_size=256, num_hidden_layers=1)
    file = str(write(tmp_path / "questions.jsonl", QUESTIONS))
    gone = make_adapter(base, tmp_path / "gone", "no such folder")
    with pytest.raises(UserError, match=r"gone: its base 'no such folder' is not found .* give it with --base MODEL"):
        evaluate(gone, [file], quiet=True)
    with pytest.raises(UserError, match=r"does not fit .*other"):
        evaluate(gone, [file], base=other, quiet=True)
    with pytest.raises(UserError, match=r"does not fit .*shallow .base_model.model.model.layers.1.* only in one"):
        evaluate(gone, [file], base=shallow, quiet=True)
    (gone / "adapter_model.safetensors").rename(gone / "adapter_model.bin")
    with pytest.raises(UserError, match=r"has no adapter_model.safetensors"):
        evaluate(gone, [file], base=base, quiet=True)
    with pytest.raises(UserError, match="base is not an adapter"):
        evaluate(base, [file], base=base, quiet=True)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ("[]", "holds a list instead of a JSON object"),
        ("{}", "unknown peft_type in .* 'None': known: "),
        ({"peft_type": "NOPE"}, "unknown peft_type in .* 'NOPE'"),
        ({"peft_type": ["LORA"]}, r"peft_type is \['LORA'\]; it must be null or text"),
        ({"task_type": "NOPE"}, "PEFT refuses it .*NOPE.*; correct it"),
        ({"r": "x"}, "r is 'x'; it must be null or a whole number"),
        ({"r": -1}, "rank is -1; give a whole number"),
        ({"target_modules": "(("}, r"regular expression: missing .*; give names of modules"),
        ({"target_modules": r"([\w.]+)+!"}, "regular expression: takes more than the 1 seconds allowed"),
        ({"target_modules": 3}, "target_modules is 3; it must be null or text or a list"),
        ({"lora_alpha": "x"}, "lora_alpha is 'x'; it must be null or a number"),
        ({"lora_alpha": 1e300}, r"lora_alpha is 1e\+300, more than the 1000000 allowed"),
        ({"r": 1000}, "states rank 1000, its weights have 4; give both of one adapter"),
        ({"megatron_config": {"a": 1}, "megatron_core": "antigravity"}, "has a megatron_config, which can run code"),
        ({"init_lora_weights": "pissa_niter_10000000"}, r"asks for 1e\+07 steps, more than the 100 allowed"),
        ({"layer_replication": [[0, 100_000]]}, "layer_replication makes 100000 layers, more than the 512 allowed"),
        ({"lora_dropout": 5}, "PEFT refuses it .*; correct it"),
        ({"target_modules": ["nowhere"]}, "does not fit .*base .*; give its own base with --base"),
    ],
)
def test_odd_settings_of_an_adapter_are_refused(tmp_path: Path, changes: Any, reason: str) -> None:
    base = make_llama(tmp_path / "base", vocab_size=256)
    file = str(write(tmp_path / "questions.jsonl", QUESTIONS))
    path = make_adapter(base, tmp_path / "adapter") / "adapter_config.json"
    path.write_text(changes if isinstance(changes, str) else json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError, match=reason) as refused:
        evaluate(path.parent, [file], base=base, quiet=True)
    assert len(str(refused.value)) < 1000 and str(path.parent) in str(refused.value)
    assert ("--base" in str(refused.value)) == ("--base" in reason)


def test_settings_of_a_later_peft_are_passed_over(tmp_path: Path) -> None:
    base = make_llama(tmp_path / "base", vocab_size=256)
    file = str(write(tmp_path / "questions.jsonl", QUESTIONS))
    adapter = make_adapter(base, tmp_path / "adapter")
    before = evaluate(adapter, [file], base=base, quiet=True)["tasks"]
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"of_a_later_version": True}))
    assert evaluate(adapter, [file], base=base, quiet=True)["tasks"] == before


def test_an_unknown_task_is_a_short_line(tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "model", vocab_size=256)
    with pytest.raises(UserError, match=r"unknown task of lm-eval 'qqqqzzzz': known: .* and \d{4,} more$") as refused:
        evaluate(folder, ["qqqqzzzz"], quiet=True)
    assert len(str(refused.value)) < 2000


def test_the_whole_index_of_tasks_is_read_for_names_in_other_folders_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here one folder stands for all of lm-eval's, which takes twenty seconds to read."""
    from headstart.evaluate import lm_eval_model as harness

    root, read = Path(lm_eval.tasks.__file__).parent, []

    def index(include_defaults: bool = True, include_path: Any = None) -> Any:
        if include_defaults:
            read.append(include_path := [str(root / "arc")])
        return lm_eval.tasks.TaskManager(include_defaults=False, include_path=include_path)

    monkeypatch.setattr(harness, "TaskManager", index)
    harness._whole_index.cache_clear()
    assert "arc_easy" in harness.find_tasks(["arc_easy"]).all_tasks and not read
    assert {"ai2_arc", "arc_challenge"} <= set(harness.find_tasks(["ai2_arc", "arc_challenge"]).all_tasks)
    with pytest.raises(UserError, match="unknown task of lm-eval 'leaderboard': known: ai2_arc, "):
        harness.find_tasks(["ai2_arc", "leaderboard"])  # files hold both, so that it is the index that counts
    harness._whole_index.cache_clear()
    assert len(read) == 1


def test_a_place_that_cannot_be_written_to_is_refused_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path / "questions.jsonl", QUESTIONS)
    with pytest.raises(UserError, match=r"y.json: .*questions.jsonl is a file, not a folder"):
        evaluate(tmp_path / "nowhere", [str(file)], out=file / "x" / "y.json", quiet=True)
    monkeypatch.chdir(tmp_path)
    folder = make_llama(tmp_path / "model", vocab_size=256)
    found = evaluate(folder, [str(file)], out="new/folder/scores.json", quiet=True)
    assert json.loads(Path("new/folder/scores.json").read_text()) == found
    assert [p.name for p in Path("new/folder").iterdir()] == ["scores.json"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"question": "a", "answers": []}\n', "has the keys answers, question; known are {query, choices, gold};"),
        ("", "holds no questions"),
        ("{]\n", "line 1 is not JSON"),
        ("[1]\n", "line 1 is not a JSON object"),
        ('{"query": "a", "choices": ["b", "c"], "gold": 2}\n', "line 1 has 2 as gold, not a number from 0 to 1"),
        ('{"query": "a", "choices": ["b"], "gold": 0}\n', "line 1 has .* as choices, not a list of texts"),
        ('\n{"sentence_good": "a", "sentence_bad": "b"}\n{"sentence_good": "a"}\n', "line 3 has no 'sentence_bad'"),
        pytest.param("[" * 100_000, "line 1 is not JSON .*recursion", id="brackets"),
        pytest.param('{"gold": ' + "9" * 10_000 + "}", "line 1 is not JSON", id="digits"),
        (r'{"context": "a \ud800 b", "continuation": "c"}', "line 1 has .* as context, not a text"),
        (r'{"query": "a", "choices": ["b", "\udfff"], "gold": 0}', "line 1 has .* as choices, not a list of texts"),
    ],
)
def test_files_that_cannot_be_asked_are_refused(tmp_path: Path, text: str, reason: str) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text(text)
    folder = make_llama(tmp_path / "model", vocab_size=256)
    reason = reason.replace("{", r"\{").replace("has the", "its lines have the")
    with pytest.raises(UserError, match=reason):
        evaluate(folder, [str(file)], quiet=True)


def test_a_model_is_not_built_larger_than_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers would fill 12 GB with random values before it says that the shapes differ."""
    file = str(write(tmp_path / "questions.jsonl", QUESTIONS))
    folder = make_llama(tmp_path / "model", vocab_size=256)
    config = json.loads((folder / "config.json").read_text()) | {"intermediate_size": 1 << 24}
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(models, "without_progress_bars", lambda: pytest.fail("transformers builds the model"))
    with pytest.raises(UserError, match=r"disagree: 'model.layers.0.mlp.down_proj.weight' has shape \[32, 64\]"):
        evaluate(folder, [file], quiet=True)
    save_file({"other": torch.zeros(8)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"its config describes \d+ weights, its files have \d+ bytes"):
        evaluate(folder, [file], quiet=True)


def test_what_is_missing_is_reported_in_one_line(tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "model", vocab_size=256)
    file = str(write(tmp_path / "questions.jsonl", QUESTIONS))
    (tmp_path / "more").mkdir()
    double = str(write(tmp_path / "more" / "questions.jsonl", QUESTIONS))
    bare = make_llama(tmp_path / "bare", vocab_size=256)
    (bare / "model.safetensors").unlink()
    worded = make_llama(tmp_path / "worded", vocab_size=300)
    holed = make_llama(tmp_path / "holed", vocab_size=256)
    from safetensors.torch import load_file, save_file

    tensors = load_file(holed / "model.safetensors")
    save_file(
        {k: t for k, t in tensors.items() if "layers.1.mlp.up_proj" not in k},
        holed / "model.safetensors",
        metadata={"format": "pt"},
    )
    for model, tasks, reason in (
        (folder, ["nothing.jsonl"], "nothing.jsonl: no such file of questions"),
        (folder, [file, double], "has the same name"),
        (folder, [], "--tasks: give names that lm-eval knows"),
        (bare, [file], "bare: "),
        (worded, [file], "has no tokenizer for its 300 tokens"),
        (holed, [file], r"has no weights for 'model.layers.1.mlp.up_proj.weight'"),
        (tmp_path / "nowhere", [file], "nowhere: no such folder"),
    ):
        with pytest.raises(UserError, match=reason):
            evaluate(model, tasks, quiet=True)
    with pytest.raises(UserError, match="--limit 0"):
        evaluate(folder, [file], limit=0, quiet=True)
    with pytest.raises(UserError, match="exists already"):
        evaluate(folder, [file], out=file, quiet=True)


def test_the_command_writes_json_alone_and_nothing_at_home(tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "model", vocab_size=256)
    (tmp_path / "questions").mkdir()
    write(tmp_path / "questions" / "a.jsonl", QUESTIONS)
    write(tmp_path / "questions" / "b.jsonl", [{"context": "one two", "continuation": "three"}] * 3)
    home = tmp_path / "home"
    words = ["--model", str(folder), "--tasks", str(tmp_path / "questions"), "--json", "--quiet"]
    result = subprocess.run(
        [sys.executable, "-m", "headstart", "evaluate", *words, "--out", str(tmp_path / "scores.json")],
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if not k.startswith(("HF_", "XDG_"))} | {"HOME": str(home)},
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    found = json.loads(result.stdout)
    assert json.loads((tmp_path / "scores.json").read_text()) == found
    assert set(found["tasks"]) == {"a.jsonl", "b.jsonl"} and found["tasks"]["a.jsonl"]["samples"] == 3
    assert found["command"].startswith("headstart evaluate --model") and found["seed"] == 0
    assert not home.exists()


@pytest.fixture
def gate() -> Iterator[str]:
    """A hub on which GPQA is gated, and all else is not there."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            gated = "gpqa" in self.path
            self.send_response(401 if gated else 404)
            self.send_header("X-Error-Code", "GatedRepo" if gated else "RepoNotFound")
            self.send_header("X-Error-Message", "Access is restricted.")
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_HEAD

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


def test_gated_or_missing_data_is_a_one_line_error(
    tmp_path: Path, gate: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import datasets

    folder = make_llama(tmp_path / "model", vocab_size=256)
    use_hub(monkeypatch, gate, tmp_path / "hf")
    for name, value in {"HF_ENDPOINT": gate, "HF_HUB_OFFLINE": False, "HF_DATASETS_CACHE": tmp_path / "sets"}.items():
        monkeypatch.setattr(datasets.config, name, value)
    capfd.readouterr()
    with pytest.raises(UserError) as gated:
        evaluate(folder, ["gpqa_diamond_zeroshot"], quiet=True)
    with pytest.raises(UserError) as gone:
        evaluate(folder, ["piqa"], quiet=True)
    assert str(gated.value) == (
        "gpqa_diamond_zeroshot: its data are gated; accept the terms on "
        "https://huggingface.co/datasets/Idavidrein/gpqa and log in with `hf auth login`"
    )
    assert str(gone.value).startswith("piqa: its data cannot be downloaded (") and "baber/piqa" in str(gone.value)
    assert capfd.readouterr() == ("", "")


def test_a_table_for_people(tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "model", vocab_size=256)
    file = write(tmp_path / "questions.jsonl", QUESTIONS[:1])  # one question: no standard error
    result = invoke("evaluate", "--model", folder, "--tasks", file, "--device", "cpu")
    assert result.exit_code == 0, result.output
    row = next(line.split() for line in result.stdout.splitlines() if " acc " in line)
    assert row[:3] == ["questions.jsonl", "acc", "1"] and row[4] == "-"
