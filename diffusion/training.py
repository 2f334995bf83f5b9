"""Training the diffusion on the latents of a zoo, and then on the loss of the models that it generates."""

from __future__ import annotations

import copy
import hashlib
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autoencoder.config import AutoencoderTrainConfig
from autoencoder.donors import field_sizes, given_corpora, read_training_donors
from autoencoder.loading import load_autoencoder
from autoencoder.model import WeightAutoencoder
from autoencoder.objective import (
    BehaviourStep,
    Skeletons,
    mixed_windows,
    noisy,
    sameness,
    training_shapes,
    written_loss,
)
from autoencoder.report import stage_flops
from autoencoder.texts import given_text_hashes, read_texts
from diffusion.conditions import fit_scales
from diffusion.config import DiffusionTrainConfig
from diffusion.denoiser import LatentDenoiser
from diffusion.latent_data import draw_pool, draw_sample, prepare_latents
from diffusion.pipeline import WeightDiffusionPipeline
from diffusion.solving import latent_noise, make_scheduler, scaled_latents, solve
from zoo.donors.donor import provenance
from zoo.donors.zoo import Zoo
from zoo.errors import UserError
from zoo.streams import stream
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

SAVE_EVERY = 200  # steps
SCHEDULE = (50, 0.02)  # steps of warm-up, and the last learning rate as a share of the peak
RECORD_FILE = "headstart.json"


def train_diffusion(
    config: DiffusionTrainConfig,
    zoo: str | Path,
    autoencoder: str | Path,
    out: str | Path,
    *,
    resume: bool = False,
    device: str = "auto",
    quiet: bool = False,
    command: dict[str, Any] | None = None,
) -> Path:
    """Trains a denoiser of latents on a zoo and writes a `WeightDiffusionPipeline` folder to `out`. command: the
    configuration of the command, written to the record as it is.

    An interrupted run leaves its state in `out`; `resume` continues from it to the same bytes. Raises UserError for an
    unusable zoo or text, an autoencoder of another zoo, or an `out` that is in use (without `resume`)."""
    out, opened, coder = Path(out), Zoo.open(zoo), load_autoencoder(autoencoder)
    given = given_corpora(config.corpora, opened.donors)
    weights = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in coder.parameters())).hexdigest()
    identity = run_identity(replace(config, corpora={}), opened, weights, *given_text_hashes(given))
    run = Run(out, identity, config.all_steps, SAVE_EVERY, RECORD_FILE, "diffusion", resume, quiet)
    return train_in_folder(run, lambda: _DiffusionTrainer(config, opened, coder, run, given, device, command))


class _DiffusionTrainer:
    """The denoiser, the field, their optimizer and the latents (`zoo.training.runs.Trainer`)."""

    def __init__(
        self,
        config: DiffusionTrainConfig,
        zoo: Zoo,
        autoencoder: WeightAutoencoder,
        run: Run,
        given: Any,
        device: str,
        command: dict[str, Any] | None,
    ) -> None:
        self.config, self.run, self.command = config, run, command
        self.accelerator = shared_accelerator(device, [config.batch, config.tuning_windows])
        donors, strings = read_training_donors(zoo, run.quiet)
        sizes = field_sizes(donors, len(strings))
        own = (strings, sizes.head_dim, sizes.families)
        if own != (autoencoder.token_strings, autoencoder.sizes.head_dim, autoencoder.sizes.families):
            raise UserError(
                f"{zoo.path}: has other tokens, heads or families than the autoencoder; train one on this zoo"
            )
        self.autoencoder = copy.deepcopy(autoencoder)
        read = read_texts(donors, given, config.seed)
        self.tokens = [text.tokens for text in read]
        shapes = training_shapes(donors, autoencoder, config.shapes, config.seed)
        self.data = prepare_latents(autoencoder, donors, [text.sample for text in read], shapes)
        self.pool = draw_pool(self.data, config)
        self.by_depth: dict[int, list[int]] = {}
        for i, sample in enumerate(self.pool):
            self.by_depth.setdefault(sample.shape.layers, []).append(i)
        self.skeletons = Skeletons(donors)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.denoiser = LatentDenoiser(
                autoencoder.sizes.model_latent,
                autoencoder.sizes.block_latent,
                config.hidden,
                config.layers,
                several_families=len(sizes.families) > 1,
            )
        self._fit_scales()
        device_now = self.accelerator.device
        self.denoiser.to(device_now)
        self.autoencoder.to(device_now)
        groups = [{"params": list(self.denoiser.parameters())}, {"params": list(self.autoencoder.field.parameters())}]
        optimizer = new_optimizer(groups, config.lr)
        objective = Objective(self._modules(), self.step_loss)
        self.objective, self.optimizer = self.accelerator.prepare(objective, optimizer)
        self.average_loss = float("nan")  # exponential moving average

    def _fit_scales(self) -> None:
        """Sets the scales of conditions and latents."""
        pure = [s for s in self.pool if len(s.donors) == 1]
        names = [self.data.donors[s.donors[0]].corpus for s in pure]
        mean, inverse = fit_scales(torch.stack([s.condition for s in pure]), names)
        self.denoiser.get_buffer("mean").copy_(mean)
        self.denoiser.get_buffer("inverse").copy_(inverse)
        models = torch.stack([z.model for z in self.data.latents])
        blocks = torch.cat([z.blocks for z in self.data.latents])
        for name, found in (("model_scale", models), ("block_scale", blocks)):
            deviation = (found.var(0, correction=0) + self.config.jitter**2).sqrt()
            self.denoiser.get_buffer(name).copy_(torch.stack([found.mean(0), deviation]))

    def state(self) -> dict[str, Tensor]:
        loss = torch.tensor(self.average_loss, dtype=torch.float64)
        return training_tensors(self._modules(), self.optimizer) | {"average": loss}

    def restore(self, state: dict[str, Tensor], step: int) -> None:
        restore_training(state, self._modules(), self.optimizer)
        self.average_loss = float(stored_tensor(state, "average", torch.tensor(0.0, dtype=torch.float64)))

    def _modules(self) -> nn.Module:
        return nn.ModuleDict({"denoiser": self.denoiser, "field": self.autoencoder.field})

    def progress_note(self) -> str:
        return f"loss={self.average_loss:.3f}"

    def step_loss(self, step: int, part: int, parts: int) -> Tensor:
        """The loss of a step on one of `parts` equal parts of its batch."""
        if step < self.config.steps:
            return self._flow_loss(step, part, parts)
        return self._tuning_loss(step, part, parts)

    def _flow_loss(self, step: int, part: int, parts: int) -> Tensor:
        """Mean squared error of the velocity. All models of a step have the same depth."""
        config, device = self.config, self.accelerator.device
        rng = stream(config.seed, f"flow {step}")
        first = self.pool[int(torch.randint(len(self.pool), (1,), generator=rng))]
        layers = first.shape.layers
        same = torch.tensor(self.by_depth[layers])
        chosen = same[torch.randint(len(same), (config.batch,), generator=rng)]
        rng = stream(config.seed, f"flow noise {step}")
        samples = [self.pool[i] for i in chosen.tolist()]
        own = slice(part * len(samples) // parts, (part + 1) * len(samples) // parts)  # all parts draw for all samples
        drawn = [noisy(s.latents, config.jitter, rng) for s in samples][own]
        sigma = torch.randn(len(samples), generator=rng).sigmoid()[own].to(device)
        noise = [latent_noise(self.denoiser, layers, rng) for _ in samples][own]
        drop = torch.rand(len(samples), generator=rng)[own].to(device) < config.drop
        samples = samples[own]
        scaled = [scaled_latents(self.denoiser, z.to(device)) for z in drawn]
        model, blocks = torch.stack([z.model for z in scaled]), torch.stack([z.blocks for z in scaled])
        condition = self.denoiser.embed(torch.stack([s.condition for s in samples]).to(device))
        condition = torch.where(drop[:, None], self.denoiser.unconditional, condition)
        n_model = torch.stack([z.model for z in noise]).to(device)
        n_blocks = torch.stack([z.blocks for z in noise]).to(device)
        s_model, s_blocks = sigma[:, None], sigma[:, None, None]
        found = self.denoiser(
            (1 - s_model) * model + s_model * n_model, (1 - s_blocks) * blocks + s_blocks * n_blocks, sigma, condition
        )
        errors = (found[0] - (n_model - model)).square().mean(), (found[1] - (n_blocks - blocks)).square().mean()
        return sum(errors) / 2  # type: ignore[return-value]

    def _tuning_loss(self, step: int, part: int, parts: int) -> Tensor:
        """The loss of a model from the sampler, through its last step; and how far a model from other noise is from
        being another one, because the loss alone would make every noise give the same model."""
        config, device = self.config, self.accelerator.device
        sample = draw_sample(self.data, config, f"tuning {step}")
        donor, layers = self.data.donors[sample.donors[0]], sample.shape.layers
        condition = self.denoiser.embed(sample.condition[None].to(device))
        found = []
        for name in ("", "other "):
            noise = latent_noise(self.denoiser, layers, stream(config.seed, f"tuning {name}noise {step}"))
            start, steps = noise.to(device), config.solver_steps
            found.append(solve(self.denoiser, make_scheduler(), start, condition, steps=steps, last_with_gradient=True))
        windows = mixed_windows(
            self.tokens,
            BehaviourStep(sample.donors, sample.donors[0], sample.share, -1),
            AutoencoderTrainConfig(batch=config.tuning_windows, sequence=config.sequence, seed=config.seed),
            step,
        )
        windows = windows.chunk(parts)[part].to(device)
        field = self.autoencoder.field
        loss = written_loss(field, found[0], donor, sample.shape, self.skeletons, windows)
        if not config.diversity:
            return loss
        return loss + config.diversity_weight * sameness(field, sample.shape, found[0], found[1], config.diversity)

    def train_step(self, step: int) -> None:
        rates = learning_rates(self.config, step)
        value = shared_update(self.accelerator, self.objective, self.optimizer, step, rates)
        self.average_loss = moving_average(self.average_loss, value, step == self.config.steps)

    def _flops(self) -> float:
        """The floating-point operations of the training, from those of some steps of each stage."""
        return stage_flops(self.step_loss, (0, self.config.steps, self.config.all_steps))

    def save(self, folder: Path) -> dict[str, Any]:
        flops = self._flops()
        donors = [provenance(d.donor) for d in self.data.donors]
        pipeline = WeightDiffusionPipeline(self.autoencoder.cpu().eval(), self.denoiser.cpu().eval(), make_scheduler())
        pipeline.save_pretrained(folder)
        record = {
            "recipe": asdict(replace(self.config, corpora={})),
            "loss": self.average_loss,
            "flops": flops,
            "donors": donors,
            "identity": self.run.identity,
        }
        return record if self.command is None else record | {"config": self.command}


def learning_rates(config: DiffusionTrainConfig, step: int) -> tuple[float, float]:
    """The learning rates of the denoiser and of the field, which is only tuned."""
    if step < config.steps:
        return config.lr * warm_cosine(step, config.steps, *SCHEDULE), 0.0
    lr = config.tuning_lr * warm_cosine(step - config.steps, config.tuning, *SCHEDULE)
    return lr, lr
