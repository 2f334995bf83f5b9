"""Does the start of a LoRA adapter matter for a real model? results/real_adapters.md.

    python -m benchmarks.real.adapters --models MODELS --data DATA [--work DIR] [--only INIT …]
        [--steps N] [--batch-size B] [--lrs 1e-3,…] [--seeds 0,…] [--questions N]

MODELS: a folder of smollm2 and gemma3, checkpoints with their tokenizers. DATA: a folder of corpora/ and eval/.
SmolLM2 is fine-tuned on WikiText from each initialisation, and its loss on the last tenth is measured. Then it answers
the first N questions of ARC-easy and of HellaSwag. A run of 20 steps takes two minutes of one core, and 25 questions of
each set take one and a half. It resumes, and adds seeds, rates and questions to what is there. Other steps start anew.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks.facts import read_facts, write_facts
from benchmarks.paths import RESULTS
from benchmarks.real.adapters_page import ALONE, DEFAULT, best_lr, write_page
from benchmarks.real.singular_vectors.measure import PUBLISHED
from benchmarks.vocabulary.pairs import WIKIPEDIA, split_text
from headstart import samplers
from headstart.config import LoraConfig
from headstart.evaluate.local_tasks import read_questions
from headstart.evaluate.models import load_model, load_tokenizer
from headstart.lora.lora import BASE_FOLDER, lora
from zoo.checkpoints.atomic import replace_file, replacement_file
from zoo.streams import stream_seed
from zoo.training.loop import TrainingConfig, next_token_loss, reproducible, spread_windows, train_steps
from zoo.vocabulary import encode_text

FACTS, PAGE = RESULTS / "real_adapters.json", RESULTS / "real_adapters.md"
BASE, OTHER = "smollm2", "gemma3"  # folders of the models
PAPER = "paper"  # the example of 2509.00046: gate is the reference weight; V, up and down are its partners
GROUPINGS = RESULTS / "real_singular_vectors.json"  # of the models, by the full protocol
RANK, SEQUENCE, WINDOWS = 8, 128, 32  # 4,096 held-out tokens
FIRST_WINDOWS = 4  # of them, also measured before the training
TEXT_BYTES = 100_000  # of the training text, for initialisations that read a text
INITS: dict[str, tuple[str, dict[str, str]]] = {
    DEFAULT: ("peft-default", {}),
    "pareto, reference Gemma 3 270M": ("pareto", {"reference": OTHER}),
    "pareto, reference SmolLM2 itself": ("pareto", {"reference": BASE}),
    "pareto, reference as in the paper": ("pareto", {"reference": PAPER}),
    "pissa": ("pissa", {"niter": "16"}),
    "eva": ("eva", {"windows": "8"}),
    "lora_ga": ("lora_ga", {"windows": "8"}),
    "gaussian": ("gaussian", {}),
    "orthogonal": ("orthogonal", {}),
    "olora": ("olora", {}),
    "corda": ("corda", {"windows": "16"}),
}
TASKS = {"ARC-easy": "arc_easy.jsonl", "HellaSwag": "hellaswag_olmo_1000.jsonl"}


@dataclass(frozen=True)
class AdapterRun:
    """One fine-tuning."""

    init: str
    seed: int
    lr: float


@dataclass(frozen=True)
class Experiment:
    """The files and settings that all runs share."""

    models: Path
    data: Path
    work: Path
    steps: int
    batch_size: int

    @property
    def base(self) -> Path:
        return self.models / BASE

    def settings(self) -> dict[str, Any]:
        """What the results depend on, for the JSON."""
        return {
            "rank": RANK, "steps": self.steps, "batch_size": self.batch_size, "sequence": SEQUENCE, "windows": WINDOWS,
        }  # fmt: skip

    def texts(self) -> tuple[Tensor, Tensor]:
        """(training text, windows of the held-out text [WINDOWS, SEQUENCE + 1]), int64 token ids."""
        training, held_out = split_text(self.data / "corpora" / WIKIPEDIA)
        tokens, rest = (encode_text(text.decode(errors="ignore"), self.base) for text in (training, held_out))
        return tokens, spread_windows(rest, WINDOWS, SEQUENCE)

    def read_text(self) -> Path:
        """A file with the beginning of the training text."""
        path = self.work / "read.txt"
        path.write_bytes(split_text(self.data / "corpora" / WIKIPEDIA)[0][:TEXT_BYTES])
        return path

    def reference(self, name: str) -> str:
        """The measured grouping of a reference, as `headstart lora --reference FILE#NAME` takes it."""
        measured = json.loads(GROUPINGS.read_text())["models"]
        groupings = {model: found["16"]["own"]["grouping"] for model, found in measured.items()}
        groupings[PAPER] = PUBLISHED.to_json()
        path = self.work / "references.json"
        path.write_text(json.dumps({"models": {key: {"grouping": {"16": value}} for key, value in groupings.items()}}))
        return f"{path}#{name}"

    def trained(self, run: AdapterRun) -> Path:
        """The file of the trained A and B."""
        name = "-".join(part for part in run.init.replace(",", "").split())
        return self.work / f"{name}-s{run.seed}-lr{run.lr:g}-{self.steps}x{self.batch_size}.safetensors"


def main() -> None:
    given = _arguments()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    given.work.mkdir(parents=True, exist_ok=True)
    experiment = Experiment(given.models, given.data, given.work, given.steps, given.batch_size)
    facts = read_facts(FACTS)
    if facts.get("settings") != experiment.settings():
        facts = {"settings": experiment.settings(), "base": {}, "runs": [], "answers": {}}
    inits = [init for init in INITS if not given.only or init in given.only]
    seeds, lrs = ([kind(word) for word in words.split(",")] for kind, words in ((int, given.seeds), (float, given.lrs)))
    with reproducible(torch.get_num_threads()):
        for found in measure(experiment, facts, inits, seeds, lrs, given.questions):
            print(found, flush=True)
            _save(facts)
    _save(facts)


def _save(facts: dict[str, Any]) -> None:
    write_facts(FACTS, facts)
    if facts["runs"]:
        replace_file(PAGE, write_page(facts).encode())


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("build/real-adapters"))
    parser.add_argument("--only", nargs="*", default=[], choices=list(INITS), metavar="INIT")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--lrs", default="1e-3")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--questions", type=int, default=0, help="of each set; 0: none")
    return parser.parse_args()


def measure(
    experiment: Experiment, facts: dict[str, Any], inits: list[str], seeds: list[int], lrs: list[float], questions: int
) -> Iterator[str]:
    """Adds what is missing to `facts`, and yields a line on each addition. Rates are chosen on the first seed."""
    tokens, held_out = experiment.texts()
    if not facts["base"]:
        facts["base"] = {"losses": window_losses(load_model(experiment.base, None, "float32").eval(), held_out)}
        yield "base"
    for i, seed in enumerate(seeds):
        for init in inits:
            for lr in lrs if i == 0 else [best_lr(facts["runs"], init, seeds[0])]:
                run = AdapterRun(init, seed, lr)
                if not any(asdict(run).items() <= found.items() for found in facts["runs"]):
                    facts["runs"].append(asdict(run) | fine_tune(experiment, run, tokens, held_out))
                    yield f"{run}: {sum(facts['runs'][-1]['losses']) / WINDOWS:.4f}"
    if not questions:
        return
    for init in (ALONE, *inits):
        for seed in seeds if init != ALONE else [0]:
            run = AdapterRun(init, seed, 0.0 if init == ALONE else best_lr(facts["runs"], init, seeds[0]))
            answers = facts["answers"].setdefault(f"{init}, seed {seed}", {})
            if answers.get("lr") != run.lr or any(len(answers[task]) < questions for task in TASKS):
                answers |= {"lr": run.lr, **answer(experiment, run, questions)}
                yield f"{run}: answered"


def start(experiment: Experiment, run: AdapterRun) -> Any:
    """The base with the untrained adapter of a run, as `headstart lora` writes it."""
    from peft import PeftModel

    method, options = INITS[run.init]
    options = dict(options)
    reference = options.pop("reference", None)
    if "text" in samplers.get(method).needs:
        options["text"] = str(experiment.read_text())
    with tempfile.TemporaryDirectory(dir=experiment.work) as scratch:
        out = Path(scratch) / "init"
        config = LoraConfig(
            base=experiment.base, method=method, rank=RANK, out=out, set=options, seed=run.seed, dtype="float32",
            reference=None if reference is None else experiment.reference(reference), device="cpu",
        )  # fmt: skip
        lora(config, quiet=True)
        changed = out / BASE_FOLDER
        base = load_model(changed if changed.is_dir() else experiment.base, None, "float32")
        return PeftModel.from_pretrained(base, out, is_trainable=True)


def fine_tune(experiment: Experiment, run: AdapterRun, tokens: Tensor, held_out: Tensor) -> dict[str, Any]:
    """{before, losses: nats per token of each held-out window, cpu_seconds: {start, training}}. Saves A and B."""
    from safetensors.torch import save_file

    clock = time.process_time()
    model = start(experiment, run)
    started = time.process_time()
    before = window_losses(model.eval(), held_out[:FIRST_WINDOWS])
    training = TrainingConfig(
        experiment.steps, run.lr, experiment.batch_size, SEQUENCE, stream_seed(run.seed, "adapters"), weight_decay=0.0
    )
    for _ in train_steps(model, tokens, training):
        pass
    losses = window_losses(model.eval(), held_out)
    with replacement_file(experiment.trained(run)) as partial:
        save_file({name: p.detach() for name, p in model.named_parameters() if p.requires_grad}, partial)
    seconds = {"start": round(started - clock, 1), "training": round(time.process_time() - started, 1)}
    return {"before": before, "losses": losses, "cpu_seconds": seconds}


@torch.no_grad()
def window_losses(model: Any, windows: Tensor) -> list[float]:
    """Nats per token of each window, int64 [B, S+1]."""
    return [float(next_token_loss(model, window)) for window in windows.split(1)]


def answer(experiment: Experiment, run: AdapterRun, questions: int) -> dict[str, list[int]]:
    """{task: 1 for each question that is answered correctly, else 0}. The answer is the choice of the highest
    likelihood per character (lm-eval's acc_norm)."""
    from safetensors.torch import load_file

    from headstart.evaluate.lm_eval_model import Scorer

    if run.init == ALONE:
        model = load_model(experiment.base, None, "float32")
    else:
        model = start(experiment, run)
        left = model.load_state_dict(load_file(experiment.trained(run)), strict=False)
        assert not left.unexpected_keys
    scorer = Scorer(model.eval(), load_tokenizer(experiment.base), batch_size=4)
    found = {}
    for task, name in TASKS.items():
        rows = read_questions(experiment.data / "eval" / name)[1][:questions]
        found[task] = [int(_chosen(scorer, task, row) == row["gold"]) for row in rows]
    return found


def _chosen(scorer: Any, task: str, row: dict[str, Any]) -> int:
    requests = [SimpleNamespace(args=(row["query"], f" {choice}"), task_name=task) for choice in row["choices"]]
    scores: Sequence[tuple[float, bool]] = scorer.loglikelihood(requests)
    per_character = [score / len(choice) for (score, _), choice in zip(scores, row["choices"], strict=True)]
    return max(range(len(per_character)), key=per_character.__getitem__)


if __name__ == "__main__":
    main()
