"""The page of results/real_adapters.json."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.pages import cells
from headstart.report.scores import interval

DEFAULT = "default"
ALONE = "the base alone"
TITLES = {DEFAULT: "`default`: PEFT's own, B zero"}


def best_lr(runs: Sequence[dict[str, Any]], init: str, seed: int) -> float:
    """The learning rate of the lowest final loss of an initialisation with one seed."""
    tuned = [run for run in runs if run["init"] == init and run["seed"] == seed]
    return min(tuned, key=lambda run: float(np.mean(run["losses"])))["lr"]


def chosen_runs(runs: Sequence[dict[str, Any]], init: str) -> list[dict[str, Any]]:
    """The runs of an initialisation at its best learning rate, by seed."""
    own = [run for run in runs if run["init"] == init]
    lr = best_lr(own, init, own[0]["seed"])
    return sorted((run for run in own if run["lr"] == lr), key=lambda run: run["seed"])


def paired_answers(before: Sequence[int], after: Sequence[int]) -> tuple[int, int, float]:
    """(questions that only the first answers, that only the second does, p of McNemar's exact test)."""
    from scipy.stats import binomtest

    lost = sum(b and not a for b, a in zip(before, after, strict=True))
    won = sum(a and not b for b, a in zip(before, after, strict=True))
    return lost, won, float(binomtest(won, won + lost).pvalue) if won + lost else 1.0


def write_page(facts: dict[str, Any]) -> str:
    """The page. facts: {settings, base: {losses}, runs: [...], answers: {"INIT, seed S": {lr, TASK: [0 or 1]}}}."""
    settings, runs = facts["settings"], facts["runs"]
    seeds = sorted({run["seed"] for run in runs})
    rates = ", ".join(f"{lr:g}" for lr in sorted({run["lr"] for run in runs}))
    drift = max(_drift(facts, run) for run in runs)
    tokens = settings["windows"] * settings["sequence"]
    training = f"{settings['steps']} steps of {settings['batch_size']} x {settings['sequence']} tokens"
    seed_word = f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''}"
    return f"""# LoRA initialisations on a real model

Written by `python -m benchmarks.real.adapters`. SmolLM2 135M is fine-tuned on WikiText from each initialisation:
adapters of rank {settings["rank"]} on all linear layers, {training}, AdamW without
weight decay, {seed_word}. Learning rates tried: {rates}. All see the same batches. The base comes from a 4-bit file.

- **loss**: nats per token on {tokens:,} tokens of the last tenth of the text.
- **minus default**: the mean of the paired differences over the {settings["windows"]} windows of that text, each
  averaged over the seeds, with Student's 95 % interval. It covers the choice of the text, **not** that of the seed.
- Before the training no loss differs from the base's by more than {drift:.0e}, also where a part of the base moved.

{_loss_table(facts)}

{_answer_section(facts)}## What this does not show

- The training is short. Differences after thousands of steps may be others.
{_seed_caveats(seeds, rates)}
- `pareto` with SmolLM2 as its own reference is what `headstart lora` does without `--reference`. Both models are
  undifferentiated at rank 16 ([singular vectors](real_singular_vectors.md)), so that these two rows differ only in the
  exponent of the Pareto counts. `as in the paper` has the groups of the paper's example, with gate as reference weight.
"""


def _drift(facts: dict[str, Any], run: dict[str, Any]) -> float:
    """How far the losses before the training are from those of the base."""
    base = facts["base"]["losses"][: len(run["before"])]
    return float(np.abs(np.subtract(run["before"], base)).max())


def _loss_table(facts: dict[str, Any]) -> str:
    base = float(np.mean(facts["base"]["losses"]))
    rows = [[ALONE, f"{base:.4f}", cells.MISSING, cells.MISSING, cells.MISSING]]
    reference = chosen_runs(facts["runs"], DEFAULT)
    inits = list(dict.fromkeys(run["init"] for run in facts["runs"]))
    mean = {init: float(np.mean([run["losses"] for run in chosen_runs(facts["runs"], init)])) for init in inits}
    for init in sorted(inits, key=lambda name: mean[name]):
        own = chosen_runs(facts["runs"], init)
        shared = {run["seed"] for run in own} & {run["seed"] for run in reference}
        own_losses, others = (
            np.mean([run["losses"] for run in runs if run["seed"] in shared], axis=0) for runs in (own, reference)
        )
        difference = interval((own_losses - others).tolist())
        bounds = difference["ci95"]
        text = f"{difference['mean']:+.4f} [{bounds[0]:+.4f}, {bounds[1]:+.4f}]" if init != DEFAULT else cells.MISSING
        seconds = float(np.mean([run["cpu_seconds"]["start"] for run in own]))
        rows.append([TITLES.get(init, f"`{init}`"), f"{mean[init]:.4f}", text, f"{own[0]['lr']:g}", f"{seconds:.0f}"])
    return cells.table(["start", "loss", "minus default", "lr", "CPU seconds to make it"], rows)


def _answer_section(facts: dict[str, Any]) -> str:
    """Accuracies, and McNemar's test against the default; "" without answers."""
    answers = {name: found for name, found in facts["answers"].items() if len(found) > 1}
    if not answers:
        return ""
    tasks = [name for name in next(iter(answers.values())) if name != "lr"]
    counts = " and ".join(f"{len(next(iter(answers.values()))[task])} of {task}" for task in tasks)
    rows = []
    for name, found in answers.items():
        seed = name.rpartition(", seed ")[2]
        other = answers.get(f"{DEFAULT}, seed {seed}")
        row = [ALONE if name.startswith(ALONE) else f"`{name}`"]
        for task in tasks:
            row.append(f"{np.mean(found[task]):.3f}")
            if other is None or other is found or len(other[task]) != len(found[task]):
                row.append(cells.MISSING)
                continue
            lost, won, p = paired_answers(other[task], found[task])
            row.append(f"+{won} −{lost}, p = {p:.2f}")
        rows.append(row)
    heads = [head for task in tasks for head in (task, f"{task} against default")]
    return f"""## Answers after the training

Only the first questions of each set: {counts}. The answer is the choice with the highest likelihood per character.
**against default**: questions that only this model answers, questions that only the default answers, and the p-value of
McNemar's exact test. So few questions show only large differences.

{cells.table(["model", *heads], rows)}

"""


def _seed_caveats(seeds: Sequence[int], rates: str) -> str:
    lines = []
    if len(seeds) == 1:
        lines.append("- One seed. Another draw of A, or another order of the text, may change the order of the rows.")
    else:
        lines.append(f"- {len(seeds)} seeds bound the scatter only roughly.")
    if "," not in rates:
        lines.append("- One learning rate for all. An initialisation may train better at another one.")
    return "\n".join(lines)
