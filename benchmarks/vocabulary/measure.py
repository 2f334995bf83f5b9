"""Losses of targets with another tokenizer than their donor's, before and after a short training."""

from __future__ import annotations

import json
import logging
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.vocabulary.pairs import Pair, split_text
from headstart.config import GenerateConfig
from headstart.generate.generate import generate
from zoo.training.loop import TrainingConfig, evaluate, reproducible, train_steps
from zoo.vocabulary import encode_text

METHOD = "row-column"
STEPS, BATCH_SIZE, SEQUENCE = 100, 8, 64
LRS = (3e-3, 1e-2)  # 1e-3 and 3e-2 were tried on the first pair, and won for no start
WINDOWS = {True: 64, False: 16}  # held-out windows of pairs that are trained, and of the real models
HELD_OUT_BYTES = 1 << 17
DEFAULT, OWN = "default", "own tokenizer"
RULES = ("strings", "match", "mean", "length-weighted", "omp", "focus")
WITH_MODEL = ("omp, model", "focus, model")  # tokens compared by the embedding of a model with the target's tokenizer


@dataclass(frozen=True)
class Run:
    """One target: how it starts, and how it is trained."""

    pair: str
    variant: str  # DEFAULT, OWN (the donor itself), one of RULES, or of WITH_MODEL
    seed: int
    lr: float | None  # None: not trained

    def key(self) -> str:
        return json.dumps(asdict(self))


def variants(pair: Pair) -> tuple[str, ...]:
    return (OWN, DEFAULT, *RULES, *(() if pair.trains else WITH_MODEL))


def measure(pair: Pair, run: Run) -> dict[str, Any]:
    """{step0, final: nats per token, bytes_per_token, seconds (of generating), vocabulary (its record)} of one run."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    own = run.variant == OWN
    tokenizer = pair.donor if own else pair.tokenizer
    training, held_out = split_text(pair.text)
    text = held_out[:HELD_OUT_BYTES].decode(errors="ignore")
    tokens = encode_text(text, tokenizer)
    found: dict[str, Any] = {"bytes_per_token": len(text.encode()) / len(tokens)}
    with tempfile.TemporaryDirectory() as scratch, reproducible(threads=1 if pair.trains else 2):
        folder = pair.donor
        if not own:
            start = time.perf_counter()
            folder = generate(_config(pair, run, Path(scratch) / "init"), quiet=True)  # type: ignore[assignment]
            found["seconds"] = time.perf_counter() - start
            found["vocabulary"] = json.loads((folder / "headstart.json").read_text()).get("vocabulary")
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        batch = 32 if pair.trains else 2
        found["step0"] = evaluate(model, tokens, SEQUENCE, batch, limit=WINDOWS[pair.trains])
        if run.lr is not None:
            settings = TrainingConfig(STEPS, run.lr, BATCH_SIZE, SEQUENCE, seed=run.seed)
            for _ in train_steps(model, _training_tokens(training, tokenizer), settings):
                pass
            found["final"] = evaluate(model, tokens, SEQUENCE, batch, limit=WINDOWS[pair.trains])
    return found


def _training_tokens(text: bytes, tokenizer: Path) -> Tensor:
    return encode_text(text.decode(errors="ignore"), tokenizer)


def _config(pair: Pair, run: Run, out: Path) -> GenerateConfig:
    rule = run.variant.partition(",")[0]
    if run.variant == DEFAULT:
        return GenerateConfig(target=pair.target(), method=DEFAULT, seed=run.seed, out=out)
    options = {"vocabulary": rule}
    if run.variant in WITH_MODEL:
        options["vocabulary_model"] = str(pair.tokenizer)
    return GenerateConfig(
        target=pair.target(), method=METHOD, donor=str(pair.donor), tokenizer=str(pair.tokenizer), seed=run.seed,
        set=options, out=out,
    )  # fmt: skip
