"""Does it matter how LoRA begins? A small trained base is fine-tuned on another domain from each initialisation.

    python examples/lora_inits.py --data DIR --work DIR      about half an hour on two cores; goes on where it stopped
    python examples/lora_inits.py --data DIR --work DIR --quick
    python examples/lora_inits.py --tables                   the table again, from the committed lora_inits.json

DIR holds models/, corpora/ and eval/; --base, --reference, --corpus and --tasks name others. The corpus is cut into
what is trained on (its first 80 %), text A, on which each initialisation's learning rate is chosen, and text B, on
which all are compared. Per seed all initialisations see the same windows in the same order. `pareto` (2509.00046)
follows --reference: by default a Llama of another lineage than the base, with other tokens and 3.6 times its weights,
as the paper lets a small model follow a larger one of another family.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import sys
import textwrap
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headstart import initialize_lora_weights, methods
from headstart.evaluate import load_model, load_tokenizer
from headstart.generate import versions
from headstart.local_tasks import is_file, local_task, question_files
from headstart.scores import interval
from zoo.errors import UserError
from zoo.lm import Training, evaluate, reproducible, train_steps
from zoo.pool import Report, run_jobs
from zoo.single import single
from zoo.statistics.grouping import characterise
from zoo.streams import stream_seed
from zoo.text import encode_corpus

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "lora_inits.json"
README = HERE / "README.md"

PEFT = "peft-default"
INITS: dict[str, tuple[str, dict[str, Any]]] = {
    PEFT: ("peft-default", {}),
    "gaussian": ("gaussian", {}),
    "orthogonal": ("orthogonal", {}),
    "pissa": ("pissa", {}),
    "olora": ("olora", {}),
    "pareto, A_only": ("pareto", {"strategy": "A_only"}),
    "pareto, both_small": ("pareto", {"strategy": "both_small"}),
    "pareto, both_compensated": ("pareto", {"strategy": "both_compensated"}),
}
BLIMP = (
    "anaphor_number_agreement", "causative", "determiner_noun_agreement_1", "irregular_past_participle_verbs",
    "npi_present_1", "regular_plural_subject_verb_agreement_1",
)  # fmt: skip
TASKS = {
    "HellaSwag": ("hellaswag_olmo_1000.jsonl",),
    "ARC-easy": ("arc_easy.jsonl",),
    "PIQA": ("piqa.jsonl",),
    "BLiMP": tuple(f"blimp/{name}.jsonl" for name in BLIMP),
}
PUBLISHED = {
    "source": "2509.00046",
    "what": "SmolLM2-135M on GPQA-Diamond, the reference of pareto LLaMA3-8B",
    "questions": 198,
    "chance": 0.25,
    "rows": {"before": {"accuracy": 0.2222, "right": 44}, "reshaped LoRA": {"accuracy": 0.2879, "right": 57}},
}


@dataclass(frozen=True)
class Setup:
    """What all runs share. Paths are where things lie; `contents` says what lies there, for the names of the runs."""

    base: str
    reference: str  # the grouping of the reference, in the form of an analysis.json
    tokens: str  # .npy of the encoded corpus
    work: str
    contents: dict[str, Any]
    tasks: dict[str, tuple[str, ...]]  # group -> files, or names that lm-eval knows
    rank: int
    alpha: int
    steps: int
    batch_size: int
    sequence: int
    windows: int  # of text A and of text B, at most
    limit: int  # questions per file


@dataclass(frozen=True)
class Job:
    """`scored`: not a training run, but lm-eval on what it left. init None: the base as it is."""

    init: str | None
    lr: float
    seed: int
    scored: bool = False


def key(setup: Setup, job: Job) -> str:
    """A hash of all that a run depends on."""
    depends: dict[str, Any] = {k: v for k, v in asdict(setup).items() if k in ("contents", "rank", "alpha", "steps")}
    depends |= {"batch": setup.batch_size, "sequence": setup.sequence, "windows": setup.windows, "job": asdict(job)}
    depends["init"] = None if job.init is None else INITS[job.init]
    if job.scored:
        depends |= {"tasks": setup.tasks, "limit": setup.limit}
    return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:24]


def run(setup: Setup, job: Job, report: Report) -> None:
    """One run; appends its line to runs.jsonl."""
    start = time.perf_counter()
    with reproducible():
        found = score(setup, job) if job.scored else train(setup, job)
    line = {"key": key(setup, job), **asdict(job), **found, "seconds": round(time.perf_counter() - start, 2)}
    with (Path(setup.work) / "runs.jsonl").open("a") as f:
        f.write(json.dumps(line) + "\n")  # one write of a line: other processes do the same
    report(1)


def prepare(setup: Setup, job: Job) -> Any:
    """The base with a fresh adapter: a function of the initialisation and the seed."""
    model = load_model(Path(setup.base), None, "float32")
    if job.init is None:
        return model
    import peft

    method, options = INITS[job.init]
    config = peft.LoraConfig(r=setup.rank, lora_alpha=setup.alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(model, config)
    if method == "pareto":
        options = options | {"reference_model": setup.reference}
    initialize_lora_weights(adapted, methods.get(method)(**options), seed=job.seed)  # type: ignore[arg-type]
    return adapted


def texts(setup: Setup) -> tuple[Tensor, Tensor, Tensor]:
    """What is trained on, text A and text B: int64 each."""
    tokens = torch.from_numpy(np.load(setup.tokens))
    n = len(tokens)
    return tokens[: n * 8 // 10], tokens[n * 8 // 10 : n * 9 // 10], tokens[n * 9 // 10 :]


def train(setup: Setup, job: Job) -> dict[str, Any]:
    """Held-out losses before and after; the trained adapter is kept for `score`."""
    from safetensors.torch import save_file

    model = prepare(setup, job)
    learned, a, b = texts(setup)

    def loss(text: Tensor) -> float:
        return evaluate(model, text, setup.sequence, limit=setup.windows)

    if job.init is None:
        return {"a": loss(a), "b": loss(b), "diverged": None}
    before = loss(a)
    training = Training(
        setup.steps, job.lr, setup.batch_size, setup.sequence, stream_seed(job.seed, "lora inits"), weight_decay=0.0
    )
    norm = 0.0
    for step in train_steps(model, learned, training):
        if not (math.isfinite(step.loss) and math.isfinite(step.grad_norm)):
            return {"before": before, "a": None, "b": None, "diverged": step.number}
        norm = max(norm, step.grad_norm)
    ended = {"a": loss(a), "b": loss(b)}
    if not all(map(math.isfinite, ended.values())):
        return {"before": before, "a": None, "b": None, "diverged": setup.steps}
    trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    path = adapter(setup, job)
    path.parent.mkdir(exist_ok=True)
    save_file(trained, path.with_suffix(".part"))
    os.replace(path.with_suffix(".part"), path)
    return {"before": before, **ended, "max_grad_norm": norm, "diverged": None}


def adapter(setup: Setup, job: Job) -> Path:
    return Path(setup.work) / "adapters" / f"{key(setup, Job(job.init, job.lr, job.seed))}.safetensors"


def score(setup: Setup, job: Job) -> dict[str, Any]:
    """Accuracy in each group of tasks: acc_norm where lm-eval has it, else acc; the mean over the group's files."""
    from safetensors.torch import load_file

    from headstart.harness import Scorer, find_tasks, run_tasks

    model = prepare(setup, job)
    if job.init is not None:
        left = model.load_state_dict(load_file(adapter(setup, job)), strict=False)
        assert not left.unexpected_keys
    lm = Scorer(model.eval(), load_tokenizer(Path(setup.base)), batch_size=32)
    every = [task for group in setup.tasks.values() for task in group]
    names = [task for task in every if not is_file(task)]
    local = {task: Path(task).name for task in every if is_file(task)}
    described = [local_task(name, Path(task)) for task, name in local.items()]
    found = run_tasks(lm, find_tasks(names), [*names, *described], setup.limit, job.seed)
    accuracies = {}
    for group, members in setup.tasks.items():
        metrics = [found[local.get(task, task)]["metrics"] for task in members]
        accuracies[group] = float(np.mean([m.get("acc_norm", m["acc"])["mean"] for m in metrics]))
    return {"accuracy": accuracies, "samples": {name: entry["samples"] for name, entry in found.items()}}


def finished(setup: Setup) -> dict[str, dict[str, Any]]:
    """key -> line of runs.jsonl. A line that an interruption cut is none."""
    path = Path(setup.work) / "runs.jsonl"
    found = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        found[row["key"]] = row
    return found


def complete(setup: Setup, jobs: Sequence[Job], workers: int, what: str) -> dict[Job, dict[str, Any]]:
    """Runs what is not yet finished."""
    from tqdm import tqdm

    done = finished(setup)
    missing = [job for job in jobs if key(setup, job) not in done]
    with tqdm(total=len(jobs), initial=len(jobs) - len(missing), desc=what, unit="run") as bar:
        run_jobs(partial(run, setup), missing, workers, bar.update)
    done = finished(setup)
    return {job: done[key(setup, job)] for job in jobs}


def paired(values: Sequence[float], others: Sequence[float]) -> dict[str, Any]:
    """values - others, seed by seed: {mean, std, ci95} by Student's t, the two-sided p of the paired t test, Cohen's d
    of the differences."""
    from scipy.special import stdtr

    found = interval([x - y for x, y in zip(values, others, strict=True)])
    n, std = len(values), found["std"]
    if not std:  # one seed, or the same difference in all
        return found | {"p": None if std is None or found["mean"] else 1.0, "d": None}
    d = found["mean"] / std
    return found | {"p": float(2 * stdtr(n - 1, -abs(d) * math.sqrt(n))), "d": d}


def holm(ps: dict[str, float | None]) -> dict[str, float | None]:
    """p-values corrected for their number (Holm); None stays None and counts."""
    ordered = sorted((p, name) for name, p in ps.items() if p is not None)
    corrected: dict[str, float | None] = dict.fromkeys(ps)
    least = 0.0
    for i, (p, name) in enumerate(ordered):
        least = corrected[name] = max(least, min(1.0, p * (len(ps) - i)))
    return corrected


def tuned(runs: dict[Job, dict[str, Any]], init: str, lrs: Sequence[float]) -> tuple[float | None, dict[str, Any]]:
    """(the learning rate with the lowest mean loss on text A, those means); None where a seed diverged."""
    means: dict[float, float | None] = {}
    for lr in lrs:
        losses = [row["a"] for job, row in runs.items() if (job.init, job.lr) == (init, lr)]
        means[lr] = None if None in losses else float(np.mean(losses))
    usable = {lr: loss for lr, loss in means.items() if loss is not None}
    best = min(usable, key=lambda lr: usable[lr]) if usable else None
    return best, {f"{lr:g}": loss for lr, loss in means.items()}


def compare(setup: Setup, inits: Sequence[str], lrs: Sequence[float], seeds: Sequence[int], workers: int) -> Any:
    """The entries of lora_inits.json: {base, inits}."""
    grid = [Job(init, lr, seed) for seed in seeds for init in inits for lr in lrs]
    runs = complete(setup, [Job(None, 0.0, 0), *grid], workers, "train")
    base = runs.pop(Job(None, 0.0, 0))
    best = {init: tuned(runs, init, lrs) for init in inits}
    asked = [Job(init, lr, seed, True) for init, (lr, _) in best.items() if lr is not None for seed in seeds]
    scores = complete(setup, [Job(None, 0.0, 0, True), *asked], workers, "tasks")
    entries: dict[str, Any] = {}
    for init, (lr, means) in best.items():
        chosen = [runs[Job(init, lr, seed)] for seed in seeds] if lr is not None else []
        answers = [scores[Job(init, lr, seed, True)]["accuracy"] for seed in seeds] if lr is not None else []
        entries[init] = {
            "method": INITS[init][0],
            "options": INITS[init][1],
            "lr": lr,
            "edge": len(lrs) > 1 and lr in (min(lrs), max(lrs)),
            "lrs": means,
            "before": [row["before"] for row in chosen],
            "losses": [row["b"] for row in chosen],
            "loss": interval([row["b"] for row in chosen]) if chosen else None,
            "max_grad_norm": max((row["max_grad_norm"] for row in chosen), default=None),
            "accuracies": {group: [row[group] for row in answers] for group in setup.tasks},
            "accuracy": {
                group: interval([row[group] for row in answers]) if answers else None for group in setup.tasks
            },
        }
    against(entries, list(setup.tasks))
    rows = [*runs.values(), base, *scores.values()]
    untouched = {"loss": base["b"], "accuracy": scores[Job(None, 0.0, 0, True)]["accuracy"]}
    samples = scores[Job(None, 0.0, 0, True)]["samples"]
    return {"base": untouched, "inits": entries, "samples": samples, "seconds": round(sum(r["seconds"] for r in rows))}


def against(entries: dict[str, Any], groups: Sequence[str]) -> None:
    """Adds to every entry but PEFT's default what tells it from that: paired over seeds, Holm over initialisations."""
    own = entries[PEFT]
    others = [init for init, entry in entries.items() if init != PEFT and entry["losses"] and own["losses"]]
    for init in others:
        entry = entries[init]
        entry["difference"] = paired(entry["losses"], own["losses"])
        entry["gains"] = {g: paired(entry["accuracies"][g], own["accuracies"][g]) for g in groups}
    for find in (lambda e: e["difference"], *(lambda e, g=g: e["gains"][g] for g in groups)):
        corrected = holm({init: find(entries[init])["p"] for init in others})
        for init, p in corrected.items():
            find(entries[init])["holm"] = p


def published() -> dict[str, Any]:
    """The published table, with what chance says of it."""
    from scipy.stats import binomtest, fisher_exact

    n, rows = PUBLISHED["questions"], PUBLISHED["rows"]
    right = [row["right"] for row in rows.values()]  # type: ignore[attr-defined]
    fisher = float(fisher_exact([[r, n - r] for r in right])[1])
    chance = float(binomtest(max(right), n, PUBLISHED["chance"]).pvalue)
    return PUBLISHED | {"fisher_p": fisher, "chance_p": chance}


def verdict(found: dict[str, Any]) -> str:
    """One sentence, from the figures alone, on whether reshaping helps here."""
    entries = {name: e for name, e in found["inits"].items() if e["method"] == "pareto" and "difference" in e}
    if not entries:
        return "Nothing was compared: no pareto run ended beside PEFT's default."

    def significant(cell: dict[str, Any]) -> bool:
        return cell["holm"] is not None and cell["holm"] < 0.05

    lower = [n for n, e in entries.items() if significant(e["difference"]) and e["difference"]["mean"] < 0]
    higher = [n for n, e in entries.items() if significant(e["difference"]) and e["difference"]["mean"] > 0]
    moved = [
        f"{group} ({name}, {cell['mean']:+.3f})"
        for name, e in entries.items()
        for group, cell in e["gains"].items()
        if significant(cell)
    ]
    default = found["inits"][PEFT]["loss"]["mean"]
    best = min(entries, key=lambda n: entries[n]["difference"]["mean"])
    d = entries[best]["difference"]
    seeds = len(found["settings"]["seeds"])
    bounds = f", 95 % CI {d['ci95'][0]:+.4f} to {d['ci95'][1]:+.4f}" if d["ci95"] else ""
    p = "" if d["holm"] is None else f", p = {d['holm']:.2g} after Holm"
    nearest = f"the best of them, {best}, differs by {d['mean']:+.4f} nats ({d['mean'] / default:+.2%}{bounds}{p})"
    if lower:
        start = f"The effect is there in the held-out loss of {_list(lower)}: over {seeds} seeds {nearest}"
    else:
        start = (
            f"No effect is seen: over {seeds} seeds no pareto strategy ends significantly below PEFT's default, each "
        )
        start += f"at its own learning rate; {nearest}"
        start += f", so that a gain of more than {max(0.0, -d['ci95'][0]):.4f} nats is unlikely" if d["ci95"] else ""
    worse = f", and {_list(higher)} {'ends' if len(higher) == 1 else 'end'} above it" if higher else ""
    tasks = f"accuracy moves in {_list(moved)}" if moved else "no accuracy differs significantly"
    peers = {name: e["loss"]["mean"] for name, e in found["inits"].items() if e["loss"] is not None}
    spread = (max(peers.values()) - min(peers.values())) / default
    return (
        f"{start}{worse}; {tasks}; the {len(peers)} tuned inits lie within {spread:.1%} of each other, the lowest is "
        f"{min(peers, key=lambda name: peers[name])}."
    )


def _list(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def table(found: dict[str, Any]) -> str:
    """The markdown of examples/README.md: settings, figures, what was published, the sentence."""
    groups = list(found["settings"]["tasks"])
    lines = [
        f"| init | lr | loss on text B | against PEFT's default | p (Holm) | d | {' | '.join(groups)} |",
        "|---|---|---|---|---|---|" + "---|" * len(groups),
    ]
    base = found["base"]
    cells = " | ".join(f"{base['accuracy'][g]:.3f}" for g in groups)
    lines.append(f"| none: the base as it is | – | {base['loss']:.3f} | – | – | – | {cells} |")
    for name, entry in found["inits"].items():
        if entry["loss"] is None:
            lines.append(f"| {name} | – | diverged | – | – | – | {' | '.join('–' for _ in groups)} |")
            continue
        d = entry.get("difference")
        cells = " | ".join(_accuracy(entry, g) for g in groups)
        tests = (
            "– | – | –"
            if d is None
            else f"{_interval(d, '+.4f')} | {_number(d['holm'], '.2g')} | {_number(d['d'], '+.1f')}"
        )
        rate = f"{entry['lr']:g}{' (edge)' if entry['edge'] else ''}"
        lines.append(f"| {name} | {rate} | {_interval(entry['loss'], '.4f')} | {tests} | {cells} |")
    p = found["published"]
    rows = [f"| {name} | {row['accuracy']:.4f} | {row['right']} |" for name, row in p["rows"].items()]
    chances = f"Fisher's exact p = {p['fisher_p']:.2f}; the better one against chance ({p['chance']:g}): p = "
    blocks = [
        _settings(found),
        "\n".join(lines),
        f"Published ({p['source']}; {p['what']}):",
        "\n".join([f"| | accuracy | right of {p['questions']} |", "|---|---|---|", *rows]),
        f"{chances}{p['chance_p']:.2f}.",
        f"**{found['verdict']}**",
    ]
    return "\n\n".join(blocks)


def _settings(found: dict[str, Any]) -> str:
    """What was done, in words."""
    s, model, reference = found["settings"], found["model"], found["reference"]
    lrs = ", ".join(f"{lr:g}" for lr in s["lrs"])
    questions = sum(n for n in found["samples"].values() if n is not None)
    text = (
        f"Base {model['name']} ({model['parameters']:,} weights), text {found['corpus']['name']}, rank {s['rank']}, "
        f"alpha {s['alpha']}, all linear layers ({s['trained']:,} weights trained), {s['steps']} steps of "
        f"{s['batch_size']} x {s['sequence']} tokens, learning rate chosen per init from {lrs} on text A, "
        f"{len(s['seeds'])} seeds. Brackets and ± are 95 % intervals over seeds (Student's t); p is that of paired t "
        f"tests with Holm's correction over the {len(found['inits']) - 1} other inits, d Cohen's; accuracies on the "
        f"first {s['limit']} questions of each file ({questions} in all), * where they differ from PEFT's default at "
        f"p < .05 likewise. Reference of pareto: {reference['name']} ({_grouping(reference)})."
    )
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def _interval(cell: dict[str, Any], form: str) -> str:
    return f"{cell['mean']:{form}}" + (f" [{cell['ci95'][0]:{form}}, {cell['ci95'][1]:{form}}]" if cell["ci95"] else "")


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else f"{value:{form}}"


def _accuracy(entry: dict[str, Any], group: str) -> str:
    cell, gain = entry["accuracy"][group], entry.get("gains", {}).get(group)
    half = f" ± {(cell['ci95'][1] - cell['ci95'][0]) / 2:.3f}" if cell["ci95"] else ""
    return f"{cell['mean']:.3f}{half}" + ("*" if gain and gain["holm"] is not None and gain["holm"] < 0.05 else "")


def _grouping(reference: dict[str, Any]) -> str:
    found = reference["grouping"]
    if found["undifferentiated"]:
        return "undifferentiated"
    return f"reference weight {found['reference']}, Gaussian counts for {_list(found['gaussian'])}"


def place(text: str, content: str) -> str:
    """A README with `content` between its marks."""
    before, start, rest = text.partition("<!-- lora-inits -->\n")
    _, end, after = rest.partition("<!-- /lora-inits -->")
    if not end:
        raise UserError(f"{README}: has no <!-- lora-inits --> … <!-- /lora-inits --> to write to")
    return f"{before}{start}{content}\n{end}{after}"


def characterised(reference: str, rank: int, bootstraps: int, path: Path) -> dict[str, Any]:
    """Reads the reference once and keeps its grouping in the form of an analysis.json, which pareto reads."""
    donor = single(reference, quiet=True).only
    asked = {"sha256": donor.sha256, "rank": rank, "bootstraps": bootstraps}
    if not path.exists() or json.loads(path.read_text())["asked"] != asked:
        grouping = characterise(donor, rank, bootstraps).to_json()
        path.write_text(json.dumps({"asked": asked, "models": {donor.name: {"grouping": {str(rank): grouping}}}}))
    (entry,) = json.loads(path.read_text())["models"].values()
    return {"name": Path(reference).name, "sha256": donor.sha256, "grouping": entry["grouping"][str(rank)]}


def experiment(arguments: argparse.Namespace) -> dict[str, Any]:
    work = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    donor = single(str(arguments.base), quiet=True).only
    vocab = donor.blueprint.metadata.vocab  # type: ignore[union-attr]
    tokenizer = donor.folder if (donor.folder / "tokenizer.json").is_file() else None
    tokens = encode_corpus(arguments.corpus, tokenizer, vocab)
    if len(tokens) < 100 * (arguments.sequence + 1):
        raise UserError(f"{arguments.corpus}: {len(tokens)} tokens are too few for windows of {arguments.sequence}")
    np.save(work / "tokens.npy", tokens.numpy())
    files = {task: path for tasks in arguments.tasks.values() for task, path in question_files(tasks).items()}
    bootstraps = 50 if arguments.quick else 500
    reference = characterised(str(arguments.reference), arguments.reference_rank, bootstraps, work / "reference.json")
    contents = {
        "base": donor.sha256,
        "reference": reference["grouping"] | {"source": None},
        "tokens": hashlib.sha256(tokens.numpy().tobytes()).hexdigest(),
        "questions": {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in sorted(files.items())},
    }
    setup = Setup(
        str(donor.folder), str(work / "reference.json"), str(work / "tokens.npy"), str(work), contents, arguments.tasks,
        arguments.rank, arguments.alpha, arguments.steps, arguments.batch_size, arguments.sequence, arguments.windows,
        arguments.limit,
    )  # fmt: skip
    model = prepare(setup, Job(PEFT, 0.0, 0))
    found = compare(setup, arguments.inits, arguments.lrs, arguments.seeds, arguments.workers)
    learned, a, b = texts(setup)
    settings = ("rank", "alpha", "steps", "batch_size", "sequence", "windows", "limit")
    known: dict[str, Any] = {
        "command": "python examples/lora_inits.py --data DIR --work DIR" + (" --quick" if arguments.quick else ""),
        "versions": versions() | {name: _version(name) for name in ("peft", "lm_eval")},
        "model": {"name": Path(str(arguments.base)).name, "sha256": donor.sha256, "parameters": donor.parameters},
        "reference": reference | {"rank": arguments.reference_rank, "bootstraps": bootstraps},
        "corpus": {
            "name": Path(arguments.corpus).name,
            "sha256": hashlib.sha256(Path(arguments.corpus).read_bytes()).hexdigest(),
            "tokens": {"trained on": len(learned), "A": len(a), "B": len(b)},
        },
        "settings": {name: getattr(setup, name) for name in settings}
        | {
            "targets": "all-linear",
            "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "optimiser": "AdamW (0.9, 0.95), no weight decay, warm-up 5 %, cosine to a tenth, gradients clipped to 1",
            "lrs": list(arguments.lrs),
            "seeds": list(arguments.seeds),
            "tasks": {group: [Path(task).name for task in tasks] for group, tasks in arguments.tasks.items()},
        },
    }
    result = known | found | {"published": published()}
    return result | {"verdict": verdict(result)}


def _version(name: str) -> str:
    import importlib.metadata

    return importlib.metadata.version(name)


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def numbers(kind: type) -> Any:
        return lambda text: tuple(kind(word) for word in text.split(","))

    parser.add_argument("--data", type=Path, help="folder with models/, corpora/ and eval/")
    parser.add_argument("--work", type=Path, help="folder of the runs")
    parser.add_argument("--base", type=Path, help="what is adapted: a folder (models/stories260K)")
    parser.add_argument("--reference", help="what pareto follows: folder or hub id (models/babyllama-tok105)")
    parser.add_argument("--reference-rank", type=int, default=16)
    parser.add_argument("--corpus", type=Path, help="UTF-8 text (corpora/tinyshakespeare.txt)")
    parser.add_argument("--tasks", help="with commas: JSONL files, or lm-eval's names such as gpqa_diamond_zeroshot")
    parser.add_argument("--inits", help=f"with semicolons, of: {'; '.join(INITS)}")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--alpha", type=int, default=16)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--sequence", type=int, default=64)
    parser.add_argument("--windows", type=int, default=512, help="of texts A and B, at most")
    parser.add_argument("--lrs", type=numbers(float))
    parser.add_argument("--seeds", type=numbers(int))
    parser.add_argument("--limit", type=int, help="questions of each file")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the JSON")
    parser.add_argument("--quick", action="store_true", help="two inits, two seeds, 20 steps; --out is in --work then")
    parser.add_argument("--tables", action="store_true", help="only write the README's table again")
    arguments = parser.parse_args(argv)
    if arguments.tables:
        return arguments
    data, quick = arguments.data, arguments.quick
    if arguments.work is None or (data is None and not (arguments.base and arguments.reference and arguments.corpus)):
        parser.error("give --work DIR and --data DIR, or --tables")
    arguments.base = arguments.base or data / "models" / "stories260K"
    arguments.reference = arguments.reference or data / "models" / "babyllama-tok105"
    arguments.corpus = arguments.corpus or data / "corpora" / "tinyshakespeare.txt"
    if arguments.tasks is not None:
        arguments.tasks = {Path(task).stem: (task,) for task in arguments.tasks.split(",")}
    elif data is None:
        parser.error("give --tasks, or --data")
    else:
        chosen = {"BLiMP": TASKS["BLiMP"][:1], "COPA": ("copa.jsonl",)} if quick else TASKS
        arguments.tasks = {group: tuple(str(data / "eval" / f) for f in files) for group, files in chosen.items()}
    few = [PEFT, "pareto, A_only"] if quick else list(INITS)
    arguments.inits = few if arguments.inits is None else [word.strip() for word in arguments.inits.split(";")]
    if PEFT not in arguments.inits or not set(arguments.inits) <= set(INITS):
        parser.error(f"--inits: {PEFT} and others of {'; '.join(INITS)}")
    arguments.steps = arguments.steps or (20 if quick else 150)
    arguments.lrs = arguments.lrs or ((1e-2,) if quick else (1e-3, 2e-3, 5e-3, 1e-2, 2e-2))
    arguments.seeds = arguments.seeds or ((0, 1) if quick else (0, 1, 2, 3, 4))
    arguments.limit = arguments.limit or (10 if quick else 150)
    if quick:
        arguments.workers, arguments.windows = 1, min(arguments.windows, 32)
        arguments.out = arguments.work / RESULTS.name if arguments.out == RESULTS else arguments.out
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parsed(argv)
    try:
        if arguments.tables:
            found = json.loads(RESULTS.read_text())
        else:
            found = experiment(arguments)
            arguments.out.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
        if arguments.tables or arguments.out == RESULTS:
            README.write_text(place(README.read_text(), table(found)))
    except UserError as error:
        print(f"lora_inits.py: {error}", file=sys.stderr)
        return 2
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
