"""Measures what the novelty audit needs: how far samples are from the donors, their errors, and how they train.

Each sample is compared with every donor and trained with the short budget. The overlap of mispredicted tokens is
compared with that of independent donors. `verdict.py` decides from these numbers what is novel.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from benchmarks.head_start import tasks
from benchmarks.novelty.controls import Average, Interpolation, Noise, PerDimension
from benchmarks.novelty.distance import (
    Frame,
    donor_frame,
    error_overlap,
    leave_one_out,
    nearest_and_combined_distance,
    predictions,
)
from benchmarks.peers import d2nwg, sane
from benchmarks.peers.scoring import build_model
from benchmarks.peers.weights import stored_tensors
from headstart import samplers
from headstart.compare.inputs import hash_model, hash_zoo
from headstart.compare.trials import training_token_count
from headstart.generate.sampling import build_sampler, language_model_blueprint, sample_with_defaults
from zoo.checkpoints.atomic import replace_file
from zoo.donors.zoo import Zoo
from zoo.sampler import Sampler
from zoo.streams import stream_seed
from zoo.training.corpora import encode_corpus
from zoo.training.loop import TrainingConfig, evaluate, reproducible, train_steps
from zoo.training.workers import ReportProgress, default_workers, run_jobs
from zoo.units.aligned import token_strings
from zoo.units.decoder import read_decoder

SEEDS = tuple(range(10))
LRS = tasks.LRS["long"][1:3]  # learning rates of the test training; the better one of a label counts
SHAPES = {"seen": tasks.SEEN_TARGET, "unseen": tasks.UNSEEN_TARGETS[tasks.MAIN_TARGET]}
# Methods that generate from what they learned from donors; the autoencoder encodes and decodes one. `default` uses no
# donor: its distance to the donors is that of unrelated models.
GENERATING_METHODS = (
    "diffusion", "retrieval", "autoencoder", "row-column", "matrix-normal", "normal", "default"
)  # fmt: skip
# Methods that draw entries one by one; they differ in the distribution alone, so they are sampled at one shape.
MARGINAL_METHODS = (
    "laplace", "student-t", "generalized-normal", "stable", "mixture", "auto-fit", "histogram", "kde", "permuted",
    "hybrid",
)  # fmt: skip
PEERS: dict[str, type[Sampler]] = {"d2nwg": d2nwg.D2NWG, "sane": sane.SANE}  # trained by peers/measure.py
CONTROLS: dict[str, Sampler] = {
    **{f"a donor with {amount:.0%} noise": Noise(amount=amount) for amount in (0.05, 0.2, 0.5)},
    "average of donors": Average(),
    "interpolation of two donors": Interpolation(),
    "Gaussian per dimension": PerDimension(),
}


@dataclass(frozen=True)
class AuditInputs:
    """Paths of the embedded zoo, of the diffusion and the peers trained on it, of the text, and of the folder that
    holds the finished samples."""

    zoo: str
    model: str
    peers: str
    corpus: str
    folder: str


def audit_inputs(zoo: Path, model: Path, peers: Path, corpus: Path, folder: Path) -> AuditInputs:
    """The inputs, with a folder whose name is a hash of everything that the samples depend on."""
    settings = [LRS, SHAPES, tasks.BUDGETS["short"], tasks.BATCH_SIZE, tasks.SEQUENCE, tasks.WINDOWS]
    found = [hash_model(peers), hashlib.sha256(corpus.read_bytes()).hexdigest(), json.dumps(settings)]
    name = hashlib.sha256(" ".join([content_hash(zoo, model), *found]).encode()).hexdigest()[:16]
    return AuditInputs(str(zoo), str(model), str(peers), str(corpus), str(folder / name))


def content_hash(zoo: Path, model: Path) -> str:
    """Hash of what a zoo and a trained model contain, 16 hex digits."""
    return hashlib.sha256(f"{hash_zoo(zoo)} {hash_model(model)}".encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Sample:
    """One sample of the audit; `file` holds its measurements."""

    shape: str  # of SHAPES
    label: str  # a method, or one of CONTROLS
    seed: int

    @property
    def file(self) -> str:
        return f"{self.shape}-{self.label}-s{self.seed}.json".replace(" ", "-").replace("%", "")


def all_samples() -> list[Sample]:
    """Every sample of the audit."""
    return [Sample(shape, label, seed) for shape in SHAPES for label in sample_labels(shape) for seed in SEEDS]


def sample_labels(shape: str) -> list[str]:
    """The methods and controls that are sampled at a shape of SHAPES; controls need donors of that shape."""
    return [*GENERATING_METHODS, *PEERS, *((*MARGINAL_METHODS, *CONTROLS) if shape == "seen" else ())]


def run_audit(inputs: AuditInputs, quiet: bool = False) -> dict[str, Any]:
    """{donors: {…}, samples: [{shape, label, seed, …}]}; keeps samples that were measured before."""
    from tqdm import tqdm

    Path(inputs.folder).mkdir(parents=True, exist_ok=True)
    missing = [s for s in all_samples() if not (Path(inputs.folder) / s.file).exists()]
    with tqdm(total=len(missing), desc="novelty", unit="sample", disable=quiet) as bar:
        run_jobs(partial(measure_sample, inputs), missing, default_workers(), bar.update)
    found = [json.loads((Path(inputs.folder) / s.file).read_text()) for s in all_samples()]
    return {"donors": donor_distances(inputs), "samples": found, "rates": LRS, "steps": tasks.BUDGETS["short"]}


def measure_sample(inputs: AuditInputs, sample: Sample, report: ReportProgress) -> None:
    """Writes the distance of a sample to every donor, the overlap of its errors with theirs, and how it trains."""
    config = SHAPES[sample.shape]
    blueprint = language_model_blueprint(config)
    zoo, frames, guesses, truth, learned, held = _load_inputs(inputs)
    with reproducible():
        tensors = {
            name: t.float()
            for name, t in sample_with_defaults(
                _fitted_sampler(inputs, sample.shape, sample.label), blueprint, sample.seed
            )
        }
        decoder = read_decoder(blueprint, lambda name: tensors[name].double(), where=sample.label)
        near, combined = nearest_and_combined_distance(decoder, token_strings(zoo.donors[0]), frames)
        model = build_model(config, tensors)
        start = evaluate(model, held, tasks.SEQUENCE, limit=tasks.WINDOWS)
        own, _ = predictions(model, held, tasks.SEQUENCE, tasks.WINDOWS)
        overlaps = {name: error_overlap(own, other, truth) for name, other in guesses.items()}
        alike = max(overlaps, key=lambda name: overlaps[name]["iou"])
        ends = {
            f"{lr:g}": loss_after_training(build_model(config, tensors), lr, sample.seed, learned, held) for lr in LRS
        }
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].numpy().tobytes())
    found = {
        "shape": sample.shape, "label": sample.label, "seed": sample.seed, "digest": digest.hexdigest()[:16],
        "loss": start if math.isfinite(start) else None, "trained": ends,
        "distance": near.total, "mosaic": combined, "kinds": dict(near.kinds), "sizes": dict(near.sizes),
        "nearest": near.donor, "alike": alike, **{f"error_{key}": value for key, value in overlaps[alike].items()},
    }  # fmt: skip
    replace_file(Path(inputs.folder) / sample.file, (json.dumps(found) + "\n").encode())
    report(1)


def loss_after_training(model: nn.Module, lr: float, seed: int, learned: Tensor, held: Tensor) -> float | None:
    """Held-out loss after the short budget; None if training diverged."""
    training = TrainingConfig(
        tasks.BUDGETS["short"], lr, tasks.BATCH_SIZE, tasks.SEQUENCE, seed=stream_seed(seed, "compare")
    )
    for step in train_steps(model, learned, training):
        if not (math.isfinite(step.loss) and math.isfinite(step.grad_norm)):
            return None
    end = evaluate(model, held, tasks.SEQUENCE, limit=tasks.WINDOWS)
    return end if math.isfinite(end) else None


@cache
def _load_inputs(inputs: AuditInputs) -> tuple[Zoo, list[Frame], dict[str, Tensor], Tensor, Tensor, Tensor]:
    """(zoo, its frames, each donor's predictions, the true tokens, training text, held-out text), once a process."""
    zoo = Zoo.open(inputs.zoo)
    tokens = encode_corpus(inputs.corpus, None, 256)
    learned, held = tokens[: training_token_count(tokens)], tokens[training_token_count(tokens) :]
    guesses, truth = {}, held
    for donor in zoo.donors:
        model = build_model(donor.config, stored_tensors(donor))
        guesses[donor.name], truth = predictions(model, held, tasks.SEQUENCE, tasks.WINDOWS)
    return zoo, [donor_frame(d) for d in zoo.donors], guesses, truth, learned, held


@cache
def _fitted_sampler(inputs: AuditInputs, shape: str, label: str) -> Sampler:
    blueprint, zoo = language_model_blueprint(SHAPES[shape]), _load_inputs(inputs)[0]
    if label in CONTROLS:
        return CONTROLS[label].fit(zoo, blueprint)
    if label in PEERS:
        return PEERS[label](**{"model": str(Path(inputs.peers) / label)}).fit(None, blueprint)
    cls = samplers.get(label)
    sampler = build_sampler(cls, model=inputs.model) if "model" in cls.__dataclass_fields__ else build_sampler(cls)
    sampler.fit(zoo, blueprint)
    return sampler


def donor_distances(inputs: AuditInputs) -> dict[str, Any]:
    """{median, by_donor, mosaic, iou, expected, same}: the distance of every donor to the nearest other and to all
    others together, and the largest overlap of its mispredicted tokens with another donor's. Medians over donors."""
    path = Path(inputs.folder) / "donors.json"
    if path.exists():
        return json.loads(path.read_text())
    zoo, frames, guesses, truth, _, _ = _load_inputs(inputs)
    apart = leave_one_out(zoo.donors, frames)
    overlaps = []
    for name, own in guesses.items():
        others = [error_overlap(own, o, truth) for other, o in guesses.items() if other != name]
        overlaps.append(max(others, key=lambda o: o["iou"]))
    by_donor = {name: near.total for name, (near, _) in apart.items()}
    found = {"median": statistics.median(by_donor.values()), "by_donor": by_donor}
    found["mosaic"] = statistics.median(combined for _, combined in apart.values())
    found |= {key: statistics.median(o[key] for o in overlaps) for key in ("iou", "expected", "same")}
    replace_file(path, (json.dumps(found) + "\n").encode())
    return found
