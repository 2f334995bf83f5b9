"""Our autoencoder and diffusion beside two published generators: same zoo, same parameter count, same time.

    python -m benchmarks.peers.measure --zoo DIR --model DIR --seconds N --text FILE --target CONFIG --work DIR

model is a trained pipeline; seconds is the time that its training and that of its autoencoder took. Each peer gets as
many seconds and parameters. Writes WORK/peers.json and prints the table; an interrupted call continues. `--table FILE`
prints the table of a file again. Every sampled model counts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autoencoder.donors import read_training_donors
from autoencoder.loading import load_autoencoder
from autoencoder.objective import donor_decoder, encode_donor
from benchmarks.novelty import distance as novelty
from benchmarks.peers import d2nwg, sane
from benchmarks.peers.scoring import WINDOWS, donor_loss, finite_loss
from benchmarks.peers.training import parameter_count
from benchmarks.peers.weights import (
    Reconstruction,
    canonical_weights,
    fit_pca_reconstruction,
    make_reconstruction,
    read_weights,
)
from diffusion.pipeline import load_pipeline
from diffusion.sampler import DiffusionSampler
from headstart.compare.trials import training_token_count
from headstart.generate.sampling import sample_with_defaults
from zoo.checkpoints.atomic import replace_file
from zoo.donors.zoo import Zoo
from zoo.errors import UserError
from zoo.sampler import Sampler
from zoo.targets.blueprint import Blueprint
from zoo.training.corpora import encode_corpus
from zoo.training.runs import run_identity
from zoo.units.aligned import token_strings
from zoo.units.decoder import read_decoder
from zoo.vocabulary import find_tokenizer

OURS = "diffusion"


@dataclass(frozen=True)
class Variant:
    """A peer under some settings of its training and options of its sampler; `description` is shown in the table."""

    peer: str
    description: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)


VARIANTS = {
    "d2nwg": Variant("d2nwg", "nearest to published"),
    "d2nwg-helped": Variant("d2nwg", "in our coordinates, at rate 1.5", {"coordinates": "canonical", "rate": 1.5}),
    "sane": Variant("sane", "nearest to published, in our coordinates"),
    "sane-helped": Variant("sane", "in our coordinates, at rate 1.5", {"rate": 1.5}),
}
SAMPLERS: dict[str, type[Sampler]] = {"d2nwg": d2nwg.D2NWG, "sane": sane.SANE}
MODULES: dict[str, Any] = {"d2nwg": d2nwg, "sane": sane}


@dataclass(frozen=True)
class PeerMeasurement:
    """Inputs and sizes of the measurement.

    tokens: held-out text, int64 [N], in the zoo's vocabulary; shapes: number of the donors' own shapes that are
    generated; rebuilds: number of donors that the autoencoders encode and decode; None: all of them.
    """

    zoo: Zoo
    model: Path
    tokens: Tensor
    target: dict[str, Any]
    work: Path
    seconds: float | None
    steps: int | None = None
    seeds: tuple[int, ...] = (0, 1, 2)
    shapes: int | None = None
    rebuilds: int | None = None
    variants: Mapping[str, Variant] = field(default_factory=lambda: VARIANTS)
    quiet: bool = True

    @cached_property
    def frames(self) -> list[novelty.Frame]:
        """Each donor in the coordinates in which distances are measured."""
        return [novelty.donor_frame(d) for d in self.zoo.donors]


def measure(setup: PeerMeasurement) -> dict[str, Any]:
    """The content of peers.json: {donors: {name: own loss}, apart, models: {name: {…}}, …}."""
    pipeline = load_pipeline(str(setup.model))
    budget = parameter_count(pipeline.autoencoder) + parameter_count(pipeline.denoiser)

    def diffusion() -> Sampler:
        return DiffusionSampler(model=str(setup.model))

    ours = {
        "said": "ours", "parameters": budget, "stored": 0, "seconds": setup.seconds,
        **_cached(setup, OURS, "rebuilt", lambda: _mean_reconstruction(setup, our_reconstructions(setup))),
        **_cached(setup, OURS, "generated", lambda: generation_scores(setup, diffusion)),
    }  # fmt: skip
    models: dict[str, Any] = {OURS: ours}
    for name, variant in setup.variants.items():
        folder = setup.work / "models" / name
        MODULES[variant.peer].train(
            setup.zoo.path, folder, seconds=setup.seconds if setup.steps is None else None, steps=setup.steps,
            parameters=budget, resume=True, quiet=setup.quiet, **variant.settings,
        )  # fmt: skip
        models[name] = _measure_peer(setup, name, variant, folder)
    return {
        "zoo": [{"name": d.name, "sha256": d.sha256, "parameters": d.parameters} for d in setup.zoo.donors],
        "target": setup.target,
        "seeds": list(setup.seeds),
        "windows": WINDOWS,
        "donors": _cached(setup, "donors", "loss", lambda: donor_losses(setup)),
        "apart": _cached(setup, "donors", "apart", lambda: donor_distances(setup)),
        "models": models,
    }


def _measure_peer(setup: PeerMeasurement, name: str, variant: Variant, folder: Path) -> dict[str, Any]:
    module = MODULES[variant.peer]
    content = json.loads((folder / "peer.json").read_text())
    runs = content["training"]
    anchors = sum(t.numel() for t in sane.load_file(folder / sane.ANCHORS).values()) if variant.peer == "sane" else 0

    def reconstructions() -> Iterator[tuple[str, Reconstruction, Reconstruction]]:
        coder = module.load_peer(str(folder))[0]
        donors = read_weights(setup.zoo, content["recipe"]["coordinates"])
        rows = torch.cat([module.input_rows(coder, content, d) for d in donors])
        size = coder.config["latent"] if variant.peer == "sane" else coder.latent_size
        pca = fit_pca_reconstruction(rows, size)
        for donor in donors[: setup.rebuilds]:
            yield (
                donor.name,
                module.reconstruct_weights(coder, content, donor),
                module.reconstruct_weights(coder, content, donor, pca),
            )

    def sampler() -> Sampler:
        return SAMPLERS[variant.peer](**{"model": str(folder), **variant.options})

    return {
        "said": variant.description,
        "parameters": content["parameters"],
        "stored": anchors,
        "seconds": sum(run["seconds"] for run in runs.values()),
        "training": runs,
        "recipe": content["recipe"],
        **_cached(setup, name, "rebuilt", lambda: _mean_reconstruction(setup, reconstructions())),
        **_cached(setup, name, "generated", lambda: generation_scores(setup, sampler)),
    }


def our_reconstructions(setup: PeerMeasurement) -> Iterator[tuple[str, Reconstruction, None]]:
    """(donor, after our autoencoder), in canonical coordinates. The numbers kept are the latents: everything else is
    stored once for all donors."""
    coder = load_autoencoder(setup.model)
    for donor in read_training_donors(setup.zoo, setup.quiet)[0][: setup.rebuilds]:
        own = donor_decoder(donor, torch.device("cpu"))
        with torch.no_grad():
            latents = encode_donor(coder, donor)
        pairs = coder.token_pairs(donor.shape, latents)[donor.rows]
        made = canonical_weights(coder.decode(donor.shape, latents, pairs), donor.donor)
        numbers = latents.model.numel() + latents.blocks.numel()
        whole = canonical_weights(own, donor.donor)
        yield donor.name, make_reconstruction(whole, made.tensors, numbers, "canonical"), None


def _mean_reconstruction(
    setup: PeerMeasurement, found: Iterator[tuple[str, Reconstruction, Reconstruction | None]]
) -> dict[str, Any]:
    """{rate, error, rebuilt_loss, by_donor}: means over the donors; with pca_error and pca_loss where a PCA was fitted
    to the same rows."""
    by_donor = {}
    for name, one, pca in found:
        loss = finite_loss(one.config, one.tensors, setup.tokens)
        by_donor[name] = {"rate": one.rate, "error": one.error, "rebuilt_loss": loss}
        if pca is not None:
            pca_loss = finite_loss(pca.config, pca.tensors, setup.tokens)
            by_donor[name] |= {"pca_error": pca.error, "pca_loss": pca_loss}
    keys = next(iter(by_donor.values())).keys()
    means = {key: _mean([d[key] for d in by_donor.values()]) for key in keys}
    return means | {"by_donor": by_donor}


def generation_scores(setup: PeerMeasurement, sampler: Callable[[], Sampler]) -> dict[str, Any]:
    """{own_shape_loss, target_loss, speed (parameters/s), novelty}: means over all sampled models; novelty is
    the relative distance to the nearest donor, its parts by kind of unit."""
    shapes = {json.dumps(_shape_key(d.config)): d.config for d in setup.zoo.donors}
    own = [_draw_model(setup, sampler, config, setup.seeds[0])[0] for config in list(shapes.values())[: setup.shapes]]
    drawn = [_draw_model(setup, sampler, setup.target, seed) for seed in setup.seeds]
    target = Blueprint.from_config(setup.target)
    far = [_nearest_donor(setup, target, tensors) for _, _, tensors in drawn]
    return {
        "own_shape_loss": _mean([loss for loss in own]), "own_shape_losses": own,
        "target_loss": _mean([loss for loss, _, _ in drawn]), "target_losses": [loss for loss, _, _ in drawn],
        "speed": target.parameters / statistics.median(seconds for _, seconds, _ in drawn),
        "novelty": _mean([d["total"] for d in far]), "nearest": far,
    }  # fmt: skip


def _draw_model(
    setup: PeerMeasurement, sampler: Callable[[], Sampler], config: dict[str, Any], seed: int
) -> tuple[float | None, float, dict[str, Tensor]]:
    """(loss, seconds of sampling, tensors)"""
    blueprint = Blueprint.from_config(config)
    fitted = sampler().fit(None, blueprint)
    began = time.perf_counter()
    tensors = {name: tensor.float() for name, tensor in sample_with_defaults(fitted, blueprint, seed)}
    seconds = time.perf_counter() - began
    return finite_loss(config, tensors, setup.tokens), seconds, tensors


def donor_losses(setup: PeerMeasurement) -> dict[str, float | None]:
    return {d.name: donor_loss(d, setup.tokens) for d in setup.zoo.donors}


def donor_distances(setup: PeerMeasurement) -> dict[str, Any]:
    """{median, by_donor}: every donor's distance to its nearest among the others."""
    found = {name: near.total for name, (near, _) in novelty.leave_one_out(setup.zoo.donors, setup.frames).items()}
    return {"median": statistics.median(found.values()) if found else None, "by_donor": found}


def _nearest_donor(setup: PeerMeasurement, target: Blueprint, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The nearest donor of a model that has the zoo's vocabulary."""
    decoder = read_decoder(target, lambda name: tensors[name].double(), where="sample")
    tokens = token_strings(setup.zoo.donors[0])
    found = novelty.nearest_donor_distance(decoder, tokens, setup.frames)
    return {"donor": found.donor, "total": found.total, **found.kinds}


def _mean(values: Sequence[float | None]) -> float | None:
    """The mean, or None if one value is None: a model with a loss that is not finite is not left out."""
    known = [v for v in values if v is not None]
    return statistics.mean(known) if known and len(known) == len(values) else None


def _shape_key(config: Mapping[str, Any]) -> list[Any]:
    keys = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    return [config.get(key) for key in keys]


def _cached(setup: PeerMeasurement, name: str, what: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Reads the result of an earlier call, or computes and saves it."""
    path = setup.work / "results" / f"{name}-{what}.json"
    if path.is_file():
        return json.loads(path.read_text())
    found = compute()
    replace_file(path, (json.dumps(found, indent=1, allow_nan=False) + "\n").encode())
    return found


def format_table(found: Mapping[str, Any]) -> str:
    """Markdown: a row per model."""
    own, apart = _mean(list(found["donors"].values())), found["apart"]["median"]
    number = _format_number
    rows = [
        f"Donors' own loss {number(own)}; their distance to the nearest other donor {number(apart)}.",
        "",
        "| model | settings | parameters (and stored numbers), M | seconds | rate | error (PCA) | loss rebuilt (PCA) "
        "| loss, donors' shapes | loss, target, step 0 | M parameters/s | distance to nearest donor |",
        "|---" * 11 + "|",
    ]
    for name, m in found["models"].items():
        cells = [
            name, m["said"], f"{m['parameters'] / 1e6:.2f} ({m['stored'] / 1e6:.1f})",
            "–" if m["seconds"] is None else f"{m['seconds']:.0f}", number(m["rate"]),
            f"{number(m['error'])} ({number(m['pca_error']) if 'pca_error' in m else '–'})",
            f"{number(m['rebuilt_loss'])} ({number(m['pca_loss']) if 'pca_loss' in m else '–'})",
            number(m["own_shape_loss"]),
            number(m["target_loss"]), f"{m['speed'] / 1e6:.2g}", number(m["novelty"]),
        ]  # fmt: skip
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def _format_number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3g}"


def held_out_tokens(text: str | Path, zoo: Zoo) -> Tensor:
    """int64 [N]: the end of a text, on which nothing here is trained, in the tokens of the first donor."""
    donor = zoo.donors[0]
    assert donor.blueprint.metadata is not None
    tokens = encode_corpus(text, find_tokenizer(None, donor.folder), donor.blueprint.metadata.vocab)
    return tokens[training_token_count(tokens) :]


@dataclass(frozen=True)
class MeasurementIdentity:
    """Everything that a measurement depends on, besides the zoo."""

    model: str
    seconds: float | None
    target: dict[str, Any]
    quick: bool
    seeds: str


def main() -> None:
    a = _parse_arguments()
    if a.table is not None:
        print(format_table(json.loads(a.table.read_text())))
        return
    torch.set_num_threads(1)
    zoo = Zoo.open(a.zoo)
    given: dict[str, Any] = {"seeds": tuple(int(s) for s in a.seeds.split(",")), "quiet": False}
    if a.quick:
        variants = {"d2nwg": replace(VARIANTS["d2nwg"], options={"steps": 2}), "sane": VARIANTS["sane"]}
        given |= {"steps": 3, "seeds": (0,), "shapes": 1, "rebuilds": 1, "variants": variants}
    target = json.loads(a.target.read_text())
    setup = PeerMeasurement(zoo, a.model, held_out_tokens(a.text, zoo), target, a.work, a.seconds, **given)
    identity = MeasurementIdentity(str(a.model), a.seconds, target, a.quick, a.seeds)
    _claim_work(a.work, {"run": run_identity(identity, zoo)})
    found = measure(setup) | {"command": "python -m benchmarks.peers.measure", "cpu_threads": 1}
    replace_file(a.work / "peers.json", (json.dumps(found, indent=1, allow_nan=False) + "\n").encode())
    print(format_table(found))


def _claim_work(work: Path, run: dict[str, str]) -> None:
    """Makes the folder of a measurement, or continues the same one. UserError if it holds another."""
    record = work / "run.json"
    if record.is_file() and json.loads(record.read_text()) != run:
        raise UserError(f"{work}: holds another measurement; give another --work")
    replace_file(record, (json.dumps(run) + "\n").encode())


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zoo", type=Path)
    parser.add_argument("--model", type=Path, help="a trained pipeline")
    parser.add_argument("--seconds", type=float, help="time that training the model and its autoencoder took")
    parser.add_argument("--text", type=Path, help="the zoo's text; losses are measured on its last tenth")
    parser.add_argument("--target", type=Path, help="config.json of an unseen shape")
    parser.add_argument("--work", type=Path, help="folder for the trained peers and their results")
    parser.add_argument("--seeds", default="0,1,2", help="seeds of the samples, with commas")
    parser.add_argument("--quick", action="store_true", help="a few steps, one seed, one shape, to see that it runs")
    parser.add_argument("--table", type=Path, help="only print the table of this peers.json")
    a = parser.parse_args()
    given = (a.zoo, a.model, a.text, a.target, a.work)
    if a.table is None and (None in given or (a.seconds is None and not a.quick)):
        parser.error("give --zoo, --model, --seconds (or --quick), --text, --target and --work, or --table")
    return a


if __name__ == "__main__":
    main()
