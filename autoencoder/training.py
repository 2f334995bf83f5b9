"""Training the weight autoencoder on a zoo: reconstruction of the donors, then the behaviour of what it writes."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from autoencoder.config import AutoencoderTrainConfig
from autoencoder.donors import (
    base_blocks,
    base_vocabularies,
    field_sizes,
    given_corpora,
    read_training_donors,
)
from autoencoder.field import Latents, start_field
from autoencoder.model import WeightAutoencoder, new_autoencoder, normalise_latents
from autoencoder.objective import (
    Skeletons,
    draw_step,
    encode_donor,
    mixed_windows,
    noisy,
    reconstruction_error,
    sameness,
    text_error,
    training_shapes,
    written_loss,
)
from autoencoder.report import stage_flops, training_report
from autoencoder.texts import given_text_hashes, read_texts, text_coordinates
from zoo.donors.donor import provenance
from zoo.donors.zoo import Zoo
from zoo.streams import stream
from zoo.training.corpora import corpus_name
from zoo.training.resumable import restore_training, stored_tensor, training_tensors
from zoo.training.runs import Run, run_identity, train_in_folder
from zoo.training.shared_steps import (
    Objective,
    moving_average,
    new_optimizer,
    shared_accelerator,
    shared_update,
    warm_cosine,
)

REPORT_FILE = "report.json"
SAVE_EVERY = 200  # steps
SCHEDULE = (20, 0.05)  # steps of warm-up, and the last learning rate as a share of the peak
NORMS = ("model_norm", "block_norm")  # buffers of the encoder


def train_autoencoder(
    config: AutoencoderTrainConfig,
    zoo: str | Path,
    out: str | Path,
    *,
    resume: bool = False,
    device: str = "auto",
    quiet: bool = False,
    command: dict[str, Any] | None = None,
) -> Path:
    """Trains the autoencoder of a zoo and writes it to `out`, with `report.json`. command: the configuration of the
    command, written to the report as it is.

    An interrupted run leaves its state in `out`; `resume` continues from it to the same bytes. Raises UserError for an
    unusable zoo or text, or for an `out` that is in use (without `resume`)."""
    out, opened = Path(out), Zoo.open(zoo)
    given = given_corpora(config.corpora, opened.donors)
    config = config.with_steps(len({corpus_name(d.facts) for d in opened.donors}))
    identity = run_identity(replace(config, corpora={}), opened, *given_text_hashes(given))
    run = Run(out, identity, config.all_steps, SAVE_EVERY, REPORT_FILE, "autoencoder", resume, quiet)
    return train_in_folder(run, lambda: _AutoencoderTrainer(config, opened, run, given, device, command))


class _AutoencoderTrainer:
    """The autoencoder, its optimizer and its donors (`zoo.training.runs.Trainer`)."""

    def __init__(
        self,
        config: AutoencoderTrainConfig,
        zoo: Zoo,
        run: Run,
        given: Any,
        device: str,
        command: dict[str, Any] | None,
    ) -> None:
        self.config, self.run, self.command = config, run, command
        self.accelerator = shared_accelerator(device, [config.batch], "windows")
        self.donors, strings = read_training_donors(zoo, run.quiet)
        self.model = self._new_model(zoo, strings).to(self.accelerator.device)
        read = read_texts(self.donors, given, config.seed)
        self.text_names, self.texts = [text.name for text in read], [text.tokens for text in read]
        self.coordinates = text_coordinates(read, self.model.sizes.model_latent // 2)
        self.shapes = training_shapes(self.donors, self.model, config.shapes, config.seed)
        self.skeletons = Skeletons(self.donors)
        groups: dict[str, list[Parameter]] = {"network": [], "bases": [], "maps": []}
        for name, parameter in self.model.named_parameters():
            groups[parameter_group(name)].append(parameter)
        optimizer = new_optimizer([{"params": group} for group in groups.values()], config.lr)
        self.objective, self.optimizer = self.accelerator.prepare(Objective(self.model, self.step_loss), optimizer)
        self.average_loss = float("nan")  # exponential moving average
        self.latents: list[Latents] | None = None  # of the donors, from the second stage on

    def _new_model(self, zoo: Zoo, strings: tuple[str, ...]) -> WeightAutoencoder:
        sizes = field_sizes(self.donors, len(strings))
        records = [provenance(d.donor) for d in self.donors]
        used = self.donors if len(sizes.families) > 1 else self.donors[:1]
        architecture = ", ".join(dict.fromkeys(d.shape.architecture for d in used))
        model = new_autoencoder(sizes, strings, architecture, records, self.config.seed)
        blocks, vocabularies = base_blocks(self.donors, sizes), base_vocabularies(self.donors, sizes)
        start_field(model.field, blocks, vocabularies, stream(self.config.seed, "start of the field"))
        for name, scale in model.field.named_buffers():
            model.encoder.get_buffer(name).copy_(scale)
        return model

    def state(self) -> dict[str, Tensor]:
        loss = torch.tensor(self.average_loss, dtype=torch.float64)
        norms = {name: self.model.encoder.get_buffer(name) for name in NORMS}
        return training_tensors(self.model, self.optimizer) | norms | {"average": loss}

    def restore(self, state: dict[str, Tensor], step: int) -> None:
        restore_training(state, self.model, self.optimizer)
        self.average_loss = float(stored_tensor(state, "average", torch.tensor(0.0, dtype=torch.float64)))
        for name in NORMS:
            norm = self.model.encoder.get_buffer(name)
            norm.copy_(stored_tensor(state, name, norm))
        if step > self.config.reconstruction:
            self._finish_encoder(normalise=False)

    def progress_note(self) -> str:
        return f"loss={self.average_loss:.3f}"

    def encode(self, number: int) -> Latents:
        """The latents of donor `number`; after the first stage the encoder stays as it is."""
        if self.latents is not None:
            return self.latents[number]
        return encode_donor(self.model, self.donors[number])

    @torch.no_grad()
    def _finish_encoder(self, normalise: bool) -> None:
        """Keeps the latents of all donors from now on. Trained further, the encoder would give all donors of a text the
        same latents, which is the shortest way to a low loss."""
        if normalise:
            normalise_latents(self.model, [self.encode(i) for i in range(len(self.donors))])
        self.latents = [self.encode(i) for i in range(len(self.donors))]

    def step_loss(self, step: int, part: int, parts: int) -> Tensor:
        """The loss of a step on one of `parts` equal parts of its windows."""
        config, device = self.config, self.accelerator.device
        rng = stream(config.seed, f"noise {step}")
        if step < config.reconstruction:  # every process reconstructs the same donor
            number = int(torch.randint(len(self.donors), (1,), generator=rng))
            latents = self.encode(number)
            errors = reconstruction_error(
                self.model.field, self.donors[number], noisy(latents, config.noise, rng), device
            )
            loss = torch.stack([e.mean() for e in errors.values()]).mean()
            coordinates = self.coordinates[number]
            return loss if coordinates is None else loss + config.text_weight * text_error(latents, coordinates)
        chosen = draw_step(config, self.donors, step)
        first = self.donors[chosen.donors[0]]
        latents = self.encode(chosen.donors[0])
        if len(chosen.donors) == 2:
            latents = latents.mixed(self.encode(chosen.donors[1]), chosen.share)
        latents = noisy(latents, config.noise, rng)
        shapes = self.shapes[first.family]
        shape = first.shape if chosen.shape < 0 else replace(shapes[chosen.shape], vocab=first.shape.vocab)
        windows = mixed_windows(self.texts, chosen, config, step).chunk(parts)[part].to(device)
        loss = written_loss(self.model.field, latents, first, shape, self.skeletons, windows, config.distill)
        late = config.is_late(step, config.diversity_from)
        if late and chosen.other != chosen.donors[0] and config.diversity:
            both = self.encode(chosen.donors[0]), self.encode(chosen.other)
            loss = loss + config.diversity_weight * sameness(self.model.field, shape, *both, config.diversity)
        return loss

    def train_step(self, step: int) -> None:
        if step == self.config.reconstruction:
            self._finish_encoder(normalise=True)
        rates = learning_rates(self.config, step)
        value = shared_update(self.accelerator, self.objective, self.optimizer, step, rates)
        self.average_loss = moving_average(self.average_loss, value, step == self.config.reconstruction)

    def _flops(self) -> float:
        """The floating-point operations of the training, from those of some steps of each stage."""
        config, kept = self.config, self.latents
        self.latents = None  # the first stage trains the encoder
        total = stage_flops(self.step_loss, (0, config.reconstruction))
        self.latents = kept
        total += stage_flops(self.step_loss, (config.reconstruction, config.all_steps))
        self.optimizer.zero_grad()
        return total

    def save(self, folder: Path) -> dict[str, Any]:
        flops = self._flops()  # on the device of the training
        self.model.cpu().eval().save_pretrained(folder)
        report = training_report(self.model, self.donors, self.texts, self.skeletons)
        record = {
            "recipe": asdict(replace(self.config, corpora={})),
            "donors": self.model.config["donors"],
            "texts": dict(zip([d.name for d in self.donors], self.text_names, strict=True)),
            "loss": self.average_loss,
            "flops": flops,
            "identity": self.run.identity,
        } | report
        return record if self.command is None else record | {"config": self.command}


def parameter_group(name: str) -> str:
    """Which learning rate a parameter has: `bases`, `maps`, or `network` for all others."""
    return next((group for group in ("bases", "maps") if name.startswith(f"field.{group}.")), "network")


def learning_rates(config: AutoencoderTrainConfig, step: int) -> tuple[float, float, float]:
    """The learning rates of the small network, the bases and the maps."""
    if step < config.reconstruction:
        lr = config.reconstruction_lr * warm_cosine(step, config.reconstruction, *SCHEDULE)
        return lr, lr / 6, lr / 6
    number = step - config.reconstruction
    if number < config.warmup:
        return config.reconstruction_lr, 0.0, 0.0
    share = warm_cosine(number - config.warmup, config.last_stage, *SCHEDULE)
    return share * config.lr, share * config.bases_lr, share * config.maps_lr
