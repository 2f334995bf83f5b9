"""What the parts of a generator do: its network, its conditions, its noise, and how much it stores and costs.

All losses are those of the model that is written, before any training, on held-out windows of a text.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from autoencoder.field import all_blocks
from benchmarks.facts import read_facts, write_facts
from benchmarks.generator.inputs import Inputs, make_inputs, noise_and_mean
from benchmarks.generator.models import generator_flops, last_checkpoints, shape_of, train_generator
from benchmarks.generator.tasks import TEXTS, WITHOUT
from benchmarks.generator.text_audit import text_losses
from benchmarks.head_start.models import training_seconds
from benchmarks.head_start.tasks import SEEDS, UNSEEN_TARGETS, corpus_file
from benchmarks.novelty.distance import Frame, donor_frame, leave_one_out, nearest_donor_distance
from benchmarks.paths import RESULTS
from diffusion.pipeline import WeightDiffusionPipeline
from diffusion.sampler import SAMPLE_BYTES
from zoo.donors.zoo import Zoo
from zoo.streams import stream
from zoo.targets.blueprint import Blueprint
from zoo.tensors import Metadata
from zoo.training.corpora import corpus_name
from zoo.units.decoder import read_decoder

FACTS = RESULTS / "generator.json"
EXCESS = 1.0  # nats above the best donor, asked for to see whether quality matters
SPEED_TARGET = {"hidden_size": 160, "num_hidden_layers": 24}  # of `wider`, deepened to 7 M weights


def run(work: Path, data: Path | None) -> None:
    """Audits every generator that is trained in `work` and writes FACTS."""
    facts = read_facts(FACTS)
    for zoo in ("embedded", *(f"{WITHOUT}{text}" for text in TEXTS)):
        if (work / zoo / "diffusion" / "headstart.json").exists():
            facts[zoo] = audit(work, zoo, data)
            write_facts(FACTS, facts)


def audit(work: Path, zoo: str, data: Path | None) -> dict[str, Any]:
    """The measurements of one generator. It is judged on the text that the zoo lacks, or on the donors' own."""
    paths = train_generator(work, zoo, data)
    text = zoo.removeprefix(WITHOUT) if zoo.startswith(WITHOUT) else "reference"
    donors = Zoo.open(paths["zoo"])
    texts = {t: corpus_file(work, t, data).read_bytes() for t in TEXTS}
    inputs = make_inputs(paths["model"], donors, texts[text])
    known = {corpus_name(d.facts) for d in donors.donors}
    known_texts = {t: content for t, content in texts.items() if t in known}
    others = {t: content[:SAMPLE_BYTES] for t, content in texts.items() if t != text}
    final = last_checkpoints(donors)  # an early checkpoint lies near the last one of its run
    frames = [donor_frame(d) for d in final]
    flops = generator_flops(paths)
    return {
        "text": text,
        "sizes": sizes(inputs.pipeline, donors),
        "cost": {"flops": flops, "seconds": training_seconds(paths), "donor_flops": donor_flops(donors)},
        "speed": parameters_per_second(inputs.pipeline),
        "donors apart": statistics.median(near.total for near, _ in leave_one_out(final, frames).values()),
        "shapes": {
            name: losses(inputs, shape_of(config), others)
            | diversity(inputs, shape_of(config))
            | {"nearest": distances(inputs, config, frames)}
            | {"texts": text_losses(inputs, shape_of(config), known_texts)}
            for name, config in UNSEEN_TARGETS.items()
        },
    }


def losses(inputs: Inputs, shape: Metadata, others: Mapping[str, bytes]) -> dict[str, Any]:
    """Step-0 losses at a shape: as sampled, without the network, and told wrong."""
    noise, mean = noise_and_mean(inputs.pipeline.denoiser, shape.layers)
    found = {
        "sampled": [inputs.loss(inputs.sample(shape, seed), shape) for seed in SEEDS],
        "denoiser zeroed": inputs.loss(noise, shape),
        "mean latents": inputs.loss(mean, shape),
        "mixers zeroed": with_zeroed_mixers(inputs, lambda: inputs.loss(inputs.sample(shape), shape)),
    }
    for name, wrong in wrong_shapes(shape).items():
        found[name] = inputs.loss(inputs.sample(wrong).at_depth(shape.layers), shape)
        found[f"{name} (field)"] = told_wrong(inputs, shape, wrong)
    found["quality told wrong"] = inputs.loss(inputs.sample(shape, excess=EXCESS), shape)
    found["no text"] = inputs.loss(inputs.sample(shape, text=None), shape)
    found["other texts"] = {n: inputs.loss(inputs.sample(shape, text=text), shape) for n, text in others.items()}
    return found


def wrong_shapes(shape: Metadata) -> dict[str, Metadata]:
    """The shape with one size halved or doubled, whichever is nearer to the donors' range."""
    return {
        "width told wrong": replace(shape, width=shape.width // 2 if shape.width > 80 else shape.width * 2),
        "depth told wrong": replace(shape, layers=shape.layers // 2 if shape.layers > 4 else shape.layers * 2),
    }


def told_wrong(inputs: Inputs, shape: Metadata, wrong: Metadata) -> float:
    """The loss at a shape when the field's network reads the features of another."""
    from autoencoder import field as module

    true_features = module.shape_features
    latents = inputs.sample(shape)
    module.shape_features = lambda _: true_features(wrong)
    try:
        return inputs.loss(latents, shape)
    finally:
        module.shape_features = true_features


def with_zeroed_mixers(inputs: Inputs, measure: Callable[[], float]) -> float:
    """A measurement while the field's network gives every basis the weight of its bias."""
    field = inputs.pipeline.autoencoder.field
    kept = {n: p.detach().clone() for n, p in field.mixers.named_parameters() if n.endswith("weight")}
    with torch.no_grad():
        for name in kept:
            field.mixers.get_parameter(name).zero_()
        value = measure()
        for name, weight in kept.items():
            field.mixers.get_parameter(name).copy_(weight)
    return value


@torch.no_grad()
def diversity(inputs: Inputs, shape: Metadata) -> dict[str, Any]:
    """The relative distances of what two seeds write."""
    field = inputs.pipeline.autoencoder.field
    written = []
    for seed in SEEDS:
        blocks = all_blocks(field, shape, inputs.sample(shape, seed))
        written.append(torch.cat([table.flatten() for table in blocks.values()]))
    pairs = [(a, b) for i, a in enumerate(written) for b in written[i + 1 :]]
    return {"seeds apart": [float((a - b).norm() / a.norm()) for a, b in pairs]}


def distances(inputs: Inputs, config: Mapping[str, Any], frames: Sequence[Frame]) -> list[float]:
    """How far each seed's model is from the nearest donor (`benchmarks/novelty/distance.py`)."""
    target, found = Blueprint.from_config(dict(config)), []
    for seed in SEEDS:
        tensors = inputs.pipeline(target, text=inputs.text, generator=stream(seed, "latents")).state_dict()
        decoder = read_decoder(target, {name: t.double() for name, t in tensors.items()}.__getitem__)
        found.append(nearest_donor_distance(decoder, inputs.pipeline.autoencoder.token_strings, frames).total)
    return found


def sizes(pipeline: WeightDiffusionPipeline, donors: Zoo) -> dict[str, int]:
    """How many numbers the pipeline stores for generating, and how many weights its donors have."""
    field = sum(p.numel() for p in pipeline.autoencoder.field.parameters())
    denoiser = sum(p.numel() for p in pipeline.denoiser.parameters())
    return {"field": field, "denoiser": denoiser, "donors": sum(d.parameters for d in donors.donors)}


def donor_flops(donors: Zoo) -> float:
    """6 x parameters x tokens of the training of all donors; donors of one run count once."""
    runs: dict[str, float] = {}
    for d in donors.donors:
        name = d.facts.get("run", d.name)
        runs[name] = max(runs.get(name, 0.0), 6.0 * d.parameters * d.facts.get("tokens", 0))
    return sum(runs.values())


def parameters_per_second(pipeline: WeightDiffusionPipeline) -> float:
    """How many weights of a large target are written per second, the better of two runs."""
    target = Blueprint.from_config(UNSEEN_TARGETS["wider"] | SPEED_TARGET)
    best = 0.0
    for _ in range(2):
        began = time.perf_counter()
        count = sum(t.numel() for _, t in pipeline(target, generator=stream(0, "latents")).tensors())
        best = max(best, count / (time.perf_counter() - began))
    return best
