"""Does the initialisation of LoRA matter? A small trained base is fine-tuned on another domain from each of eight.

    python examples/lora_inits.py --data DIR --work DIR      half an hour on two cores; an interrupted call continues
    python examples/lora_inits.py --data DIR --work DIR --quick
    python examples/lora_inits.py --tables                   the table again, from the committed lora_inits.json

DIR holds models/, corpora/ and eval/; --base, --reference, --corpus and --tasks name others. The corpus is split
into a training text (the first 80 %), text A, on which each initialisation's learning rate is chosen, and text B, on
which all are compared. With one seed all initialisations see the same windows in the same order.

`pareto` (2509.00046) follows --reference: a model, or by default the grouping that the paper gives as its example
(gate is the reference weight; V, up and down are its partners). It needs nothing else from a model. Small references
have too few layers for a grouping: babyllama-tok105 and three others of four or five layers come out as
undifferentiated or nearly so, and then all pairs are drawn alike.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lora_report import PEFT, add_tests, published_result, table, verdict
from torch import Tensor

from headstart import initialize_lora_weights, samplers
from headstart.evaluate.local_tasks import is_question_path, local_task, question_files
from headstart.evaluate.models import load_model, load_tokenizer
from headstart.report.scores import interval
from headstart.versions import package_versions
from zoo.checkpoints.atomic import replacement_file
from zoo.donors.folder import StandaloneDonor
from zoo.errors import UserError
from zoo.statistics.grouping import Grouping, group_donor
from zoo.streams import stream_seed
from zoo.training.corpora import encode_corpus
from zoo.training.loop import TrainingConfig, evaluate, reproducible, train_steps
from zoo.training.workers import ReportProgress, run_jobs

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "lora_inits.json"
SETTINGS = ("rank", "alpha", "steps", "batch_size", "sequence", "windows", "limit")
README = HERE / "README.md"

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
# The value of --reference for the paper's example: it reports that V-gate, gate-up and gate-down are no power laws.
PUBLISHED_REFERENCE = "published"
PUBLISHED_GROUPING = Grouping(
    16, "mlp.gate", ("attn.v", "mlp.up", "mlp.down"), ("attn.q", "attn.k", "attn.o"), False, exponent=1.78
)


@dataclass(frozen=True)
class LoraExperiment:
    """The inputs and settings that all runs share. `contents` holds hashes of the files, for the keys of the runs."""

    base: str
    reference: str  # JSON file with the grouping of the reference, like an analysis.json
    reference_rank: int
    tokens: str  # .npy of the encoded corpus
    work: str
    contents: dict[str, Any]
    tasks: dict[str, tuple[str, ...]]  # group -> files, or names that lm-eval knows
    rank: int
    alpha: int
    steps: int
    batch_size: int
    sequence: int
    windows: int  # the largest number of windows of text A and of text B
    limit: int  # questions per file


@dataclass(frozen=True)
class Job:
    """One training run, or (`scored`) lm-eval on its adapter. init None: the base without adapter."""

    init: str | None
    lr: float
    seed: int
    scored: bool = False


def run_key(experiment: LoraExperiment, job: Job) -> str:
    """A hash of everything that a run depends on."""
    method, options = (None, {}) if job.init is None else INITS[job.init]
    depends: dict[str, Any] = {name: getattr(experiment, name) for name in SETTINGS if name != "limit"}
    depends |= {"job": asdict(job), "method": method, "options": options, "base": experiment.contents["base"]}
    depends |= {"tokens": experiment.contents["tokens"]}
    if method == "pareto":
        depends["reference"] = experiment.contents["reference"]
    if job.scored:
        depends |= {"tasks": experiment.tasks, "questions": experiment.contents["questions"], "limit": experiment.limit}
    return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:24]


def run_job(experiment: LoraExperiment, job: Job, report: ReportProgress) -> None:
    """Runs one job and appends its line to runs.jsonl."""
    start = time.perf_counter()
    with reproducible():
        found = score(experiment, job) if job.scored else train(experiment, job)
    line = {"key": run_key(experiment, job), **asdict(job), **found, "seconds": round(time.perf_counter() - start, 2)}
    with (Path(experiment.work) / "runs.jsonl").open("a") as f:
        f.write(json.dumps(line) + "\n")  # in one write, because other processes append too
    report(1)


def adapted_base(experiment: LoraExperiment, job: Job) -> Any:
    """The base with a fresh adapter, which depends on initialisation and seed alone."""
    model = load_model(Path(experiment.base), None, "float32")
    if job.init is None:
        return model
    import peft

    method, options = INITS[job.init]
    config = peft.LoraConfig(
        r=experiment.rank, lora_alpha=experiment.alpha, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(model, config)
    if method == "pareto":
        options = options | {"reference_model": experiment.reference, "reference_rank": experiment.reference_rank}
    initialize_lora_weights(adapted, samplers.get(method)(**options), seed=job.seed)  # type: ignore[arg-type]
    return adapted


def split_tokens(experiment: LoraExperiment) -> tuple[Tensor, Tensor, Tensor]:
    """(training text, text A, text B), int64 [N] each."""
    tokens = torch.from_numpy(np.load(experiment.tokens))
    n = len(tokens)
    return tokens[: n * 8 // 10], tokens[n * 8 // 10 : n * 9 // 10], tokens[n * 9 // 10 :]


def train(experiment: LoraExperiment, job: Job) -> dict[str, Any]:
    """Held-out losses before and after training; saves the trained adapter for `score`."""
    from safetensors.torch import save_file

    model = adapted_base(experiment, job)
    learned, a, b = split_tokens(experiment)

    def loss(text: Tensor) -> float:
        return evaluate(model, text, experiment.sequence, limit=experiment.windows)

    if job.init is None:
        return {"a": loss(a), "b": loss(b), "diverged": None}
    before = loss(a)
    training = TrainingConfig(
        experiment.steps,
        job.lr,
        experiment.batch_size,
        experiment.sequence,
        stream_seed(job.seed, "lora inits"),
        weight_decay=0.0,
    )
    norm = 0.0
    for step in train_steps(model, learned, training):
        if not (math.isfinite(step.loss) and math.isfinite(step.grad_norm)):
            return {"before": before, "a": None, "b": None, "diverged": step.number}
        norm = max(norm, step.grad_norm)
    ended = {"a": loss(a), "b": loss(b)}
    if not all(map(math.isfinite, ended.values())):
        return {"before": before, "a": None, "b": None, "diverged": experiment.steps}
    trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    with replacement_file(adapter_path(experiment, job)) as partial:
        save_file(trained, partial)
    return {"before": before, **ended, "max_grad_norm": norm, "diverged": None}


def adapter_path(experiment: LoraExperiment, job: Job) -> Path:
    return Path(experiment.work) / "adapters" / f"{run_key(experiment, Job(job.init, job.lr, job.seed))}.safetensors"


def score(experiment: LoraExperiment, job: Job) -> dict[str, Any]:
    """Accuracy in each group of tasks: acc_norm where lm-eval has it, else acc; the mean over the group's files."""
    from safetensors.torch import load_file

    from headstart.evaluate.lm_eval_model import Scorer, find_tasks, run_tasks

    model = adapted_base(experiment, job)
    if job.init is not None:
        left = model.load_state_dict(load_file(adapter_path(experiment, job)), strict=False)
        assert not left.unexpected_keys
    lm = Scorer(model.eval(), load_tokenizer(Path(experiment.base)), batch_size=32)
    every = [task for group in experiment.tasks.values() for task in group]
    names = [task for task in every if not is_question_path(task)]
    local = {task: Path(task).name for task in every if is_question_path(task)}
    described = [local_task(name, Path(task)) for task, name in local.items()]
    found = run_tasks(lm, find_tasks(names), [*names, *described], experiment.limit, job.seed)
    accuracies = {}
    for group, members in experiment.tasks.items():
        metrics = [found[local.get(task, task)]["metrics"] for task in members]
        accuracies[group] = float(np.mean([m.get("acc_norm", m["acc"])["mean"] for m in metrics]))
    return {"accuracy": accuracies, "samples": {name: entry["samples"] for name, entry in found.items()}}


def finished_runs(experiment: LoraExperiment) -> dict[str, dict[str, Any]]:
    """{key: line of runs.jsonl}, without a line that an interruption cut off."""
    path = Path(experiment.work) / "runs.jsonl"
    found = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        found[row["key"]] = row
    return found


def run_missing(experiment: LoraExperiment, jobs: Sequence[Job], workers: int, what: str) -> dict[Job, dict[str, Any]]:
    """Runs the jobs that are not finished; returns the lines of all."""
    from tqdm import tqdm

    path = Path(experiment.work) / "runs.jsonl"
    if path.exists() and not path.read_bytes().endswith(b"\n"):  # interrupted inside a line
        with path.open("a") as f:
            f.write("\n")
    done = finished_runs(experiment)
    missing = [job for job in jobs if run_key(experiment, job) not in done]
    with tqdm(total=len(jobs), initial=len(jobs) - len(missing), desc=what, unit="run") as bar:
        run_jobs(partial(run_job, experiment), missing, workers, bar.update)
    done = finished_runs(experiment)
    return {job: done[run_key(experiment, job)] for job in jobs}


def tune_lr(runs: dict[Job, dict[str, Any]], init: str, lrs: Sequence[float]) -> tuple[float | None, dict[str, Any]]:
    """(learning rate of the lowest mean loss on text A over the tuning seeds, {learning rate: mean loss}). A mean is
    None if a seed diverged."""
    means: dict[float, float | None] = {}
    for lr in lrs:
        losses = [row["a"] for job, row in runs.items() if (job.init, job.lr) == (init, lr)]
        means[lr] = None if None in losses else float(np.mean(losses))
    usable = {lr: loss for lr, loss in means.items() if loss is not None}
    best = min(usable, key=lambda lr: usable[lr]) if usable else None
    return best, {f"{lr:g}": loss for lr, loss in means.items()}


def compare_inits(
    experiment: LoraExperiment,
    inits: Sequence[str],
    lrs: Sequence[float],
    seeds: Sequence[int],
    tuning: Sequence[int],
    workers: int,
) -> Any:
    """The entries {base, inits, …} of lora_inits.json. Learning rates are chosen on the seeds in `tuning`; the other
    seeds run at the chosen rate only."""
    grid = [Job(init, lr, seed) for seed in tuning for init in inits for lr in lrs]
    runs = run_missing(experiment, [Job(None, 0.0, 0), *grid], workers, "tune")
    base = runs.pop(Job(None, 0.0, 0))
    best = {init: tune_lr(runs, init, lrs) for init in inits}
    rest = [seed for seed in seeds if seed not in tuning]
    more = [Job(init, lr, seed) for seed in rest for init, (lr, _) in best.items() if lr is not None]
    runs |= run_missing(experiment, more, workers, "train")
    for init, (lr, means) in best.items():  # no result if another seed than the tuning seeds diverged
        if lr is not None and any(runs[Job(init, lr, seed)]["b"] is None for seed in seeds):
            best[init] = (None, means)
    asked = [Job(init, lr, seed, True) for init, (lr, _) in best.items() if lr is not None for seed in seeds]
    scores = run_missing(experiment, [Job(None, 0.0, 0, True), *asked], workers, "tasks")
    entries: dict[str, Any] = {}
    for init, (lr, means) in best.items():
        chosen = [runs[Job(init, lr, seed)] for seed in seeds] if lr is not None else []
        answers = [scores[Job(init, lr, seed, True)]["accuracy"] for seed in seeds] if lr is not None else []
        edge = len(lrs) > 1 and lr in (min(lrs), max(lrs))
        tuning_result = {"lr": lr, "edge": edge, "lrs": means}
        entries[init] = _init_entry(init, tuning_result, chosen, answers, list(experiment.tasks))
    add_tests(entries, list(experiment.tasks))
    rows = [*runs.values(), base, *scores.values()]
    untouched = {"loss": base["b"], "accuracy": scores[Job(None, 0.0, 0, True)]["accuracy"]}
    samples = scores[Job(None, 0.0, 0, True)]["samples"]
    return {"base": untouched, "inits": entries, "samples": samples, "seconds": round(sum(r["seconds"] for r in rows))}


def _init_entry(
    init: str, tuning_result: dict[str, Any], runs: list[Any], answers: list[Any], groups: list[str]
) -> dict[str, Any]:
    """The entry of one initialisation, from its runs and accuracies at the chosen learning rate, one per seed."""
    return {
        "method": INITS[init][0],
        "options": INITS[init][1],
        **tuning_result,
        "before": [row["before"] for row in runs],
        "losses": [row["b"] for row in runs],
        "loss": interval([row["b"] for row in runs]) if runs else None,
        "max_grad_norm": max((row["max_grad_norm"] for row in runs), default=None),
        "accuracies": {group: [row[group] for row in answers] for group in groups},
        "accuracy": {group: interval([row[group] for row in answers]) if answers else None for group in groups},
    }


def fill_mark(text: str, content: str) -> str:
    """The README with `content` between its marks. UserError without the marks."""
    before, start, rest = text.partition("<!-- lora-inits -->\n")
    _, end, after = rest.partition("<!-- /lora-inits -->")
    if not end:
        raise UserError(
            f"{README}: lacks <!-- lora-inits --> … <!-- /lora-inits -->; add both lines where the table belongs"
        )
    return f"{before}{start}{content}\n{end}{after}"


def read_reference(reference: str, rank: int, bootstraps: int, path: Path) -> dict[str, Any]:
    """The grouping of the reference. Also saves it to `path` like an analysis.json, which pareto reads."""
    asked: dict[str, Any]
    if reference == PUBLISHED_REFERENCE:
        asked, name, rank = {"name": PUBLISHED_REFERENCE}, "the example of 2509.00046", PUBLISHED_GROUPING.rank
    else:
        donor = StandaloneDonor.open(reference, quiet=True)
        asked, name = {"sha256": donor.sha256, "rank": rank, "bootstraps": bootstraps}, Path(reference).name
    if not path.exists() or json.loads(path.read_text())["asked"] != asked:
        grouping = (
            PUBLISHED_GROUPING if reference == PUBLISHED_REFERENCE else group_donor(donor, rank, bootstraps)
        ).to_json()
        path.write_text(json.dumps({"asked": asked, "models": {name: {"grouping": {str(rank): grouping}}}}))
    (entry,) = json.loads(path.read_text())["models"].values()
    return {"name": name, "asked": asked, "grouping": entry["grouping"][str(rank)]}


def run_experiment(arguments: argparse.Namespace) -> dict[str, Any]:
    work = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    donor = StandaloneDonor.open(str(arguments.base), quiet=True)
    vocab = donor.blueprint.metadata.vocab  # type: ignore[union-attr]
    tokenizer = donor.folder if (donor.folder / "tokenizer.json").is_file() else None
    tokens = encode_corpus(arguments.corpus, tokenizer, vocab)
    if len(tokens) < 100 * (arguments.sequence + 1):
        raise UserError(f"{arguments.corpus}: {len(tokens)} tokens are too few for windows of {arguments.sequence}")
    np.save(work / "tokens.npy", tokens.numpy())
    files = {task: path for tasks in arguments.tasks.values() for task, path in question_files(tasks).items()}
    bootstraps = 50 if arguments.quick else 500
    reference = read_reference(str(arguments.reference), arguments.reference_rank, bootstraps, work / "reference.json")
    contents = {
        "base": donor.sha256,
        "reference": reference["grouping"] | {"source": None},
        "tokens": hashlib.sha256(tokens.numpy().tobytes()).hexdigest(),
        "questions": {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in sorted(files.items())},
    }
    experiment = LoraExperiment(
        base=str(donor.folder),
        reference=str(work / "reference.json"),
        reference_rank=reference["grouping"]["rank"],
        tokens=str(work / "tokens.npy"),
        work=str(work),
        contents=contents,
        tasks=arguments.tasks,
        **{name: getattr(arguments, name) for name in SETTINGS},
    )
    model = adapted_base(experiment, Job(PEFT, 0.0, 0))
    tuning = arguments.seeds[: arguments.tuning_seeds]
    found = compare_inits(experiment, arguments.inits, arguments.lrs, arguments.seeds, tuning, arguments.workers)
    learned, a, b = split_tokens(experiment)
    known: dict[str, Any] = {
        "command": "python examples/lora_inits.py --data DIR --work DIR" + (" --quick" if arguments.quick else ""),
        "versions": package_versions() | {name: _version(name) for name in ("peft", "lm_eval")},
        "model": {"name": Path(str(arguments.base)).name, "sha256": donor.sha256, "parameters": donor.parameters},
        "reference": reference,
        "corpus": {
            "name": Path(arguments.corpus).name,
            "sha256": hashlib.sha256(Path(arguments.corpus).read_bytes()).hexdigest(),
            "tokens": {"trained on": len(learned), "A": len(a), "B": len(b)},
        },
        "settings": {name: getattr(experiment, name) for name in SETTINGS}
        | {
            "targets": "all-linear",
            "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "optimiser": "AdamW (0.9, 0.95), no weight decay, warm-up 5 %, cosine to a tenth, gradients clipped to 1",
            "lrs": list(arguments.lrs),
            "seeds": list(arguments.seeds),
            "tuning_seeds": list(tuning),
            "tasks": {group: [Path(task).name for task in tasks] for group, tasks in arguments.tasks.items()},
        },
    }
    result = known | found | {"published": published_result()}
    return result | {"verdict": verdict(result)}


def _version(name: str) -> str:
    import importlib.metadata

    return importlib.metadata.version(name)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def numbers(kind: type) -> Any:
        return lambda text: tuple(kind(word) for word in text.split(","))

    parser.add_argument("--data", type=Path, help="folder with models/, corpora/ and eval/")
    parser.add_argument("--work", type=Path, help="folder of the runs")
    parser.add_argument("--base", type=Path, help="folder of the base model (models/stories260K)")
    parser.add_argument("--reference", default=PUBLISHED_REFERENCE, help="of pareto: folder, hub id, or `published`")
    parser.add_argument("--reference-rank", type=int, default=16)
    parser.add_argument("--corpus", type=Path, help="UTF-8 text (corpora/tinyshakespeare.txt)")
    parser.add_argument("--tasks", help="JSONL files or lm-eval task names, separated by commas")
    parser.add_argument("--inits", help=f"some of, separated by semicolons: {'; '.join(INITS)}")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--alpha", type=int, default=16)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--sequence", type=int, default=64)
    parser.add_argument("--windows", type=int, default=256, help="largest number of windows of texts A and B")
    parser.add_argument("--lrs", type=numbers(float))
    parser.add_argument("--seeds", type=numbers(int))
    parser.add_argument("--tuning-seeds", type=int, default=2, help="number of seeds that choose learning rates")
    parser.add_argument("--limit", type=int, help="questions of each file")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the JSON")
    parser.add_argument("--quick", action="store_true", help="two inits, two seeds, 20 steps; writes to --work")
    parser.add_argument("--tables", action="store_true", help="only write the README's table again")
    arguments = parser.parse_args(argv)
    if arguments.tables:
        return arguments
    data, quick = arguments.data, arguments.quick
    if arguments.work is None or (data is None and not (arguments.base and arguments.corpus)):
        parser.error("give --work DIR and --data DIR, or --tables")
    arguments.base = arguments.base or data / "models" / "stories260K"
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
        parser.error(f"--inits: give {PEFT} and others of {'; '.join(INITS)}")
    arguments.steps = arguments.steps or (20 if quick else 150)
    arguments.lrs = arguments.lrs or ((1e-2,) if quick else (1e-3, 2e-3, 5e-3, 1e-2, 2e-2))
    arguments.seeds = arguments.seeds or ((0, 1) if quick else (0, 1, 2, 3, 4))
    arguments.limit = arguments.limit or (10 if quick else 150)
    if quick:
        arguments.workers, arguments.windows = 1, min(arguments.windows, 32)
        arguments.out = arguments.work / RESULTS.name if arguments.out == RESULTS else arguments.out
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    try:
        if arguments.tables:
            if not RESULTS.exists():
                raise UserError(f"{RESULTS}: does not exist; run the experiment first")
            found = json.loads(RESULTS.read_text())
        else:
            found = run_experiment(arguments)
            arguments.out.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
        if arguments.tables or arguments.out == RESULTS:
            README.write_text(fill_mark(README.read_text(), table(found)))
    except UserError as error:
        print(f"lora_inits.py: {error}", file=sys.stderr)
        return 2
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
