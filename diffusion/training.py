"""Training the diffusion on a zoo: flow matching (2210.02747) over unit tokens."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import Tensor

from autoencoder.loading import load_autoencoder
from autoencoder.model import UnitAutoencoder
from diffusion.batches import NoisyBatch, batches
from diffusion.config import DiffusionTrainConfig
from diffusion.denoiser import CONTEXT, Candidates, UnitDenoiser, mask_to_group
from diffusion.pipeline import WeightDiffusionPipeline, make_scheduler
from diffusion.training_data import family_numbers, prepare_training_data
from zoo.donors.zoo import Zoo
from zoo.training.resumable import restore_training, stored_tensor, training_tensors
from zoo.training.runs import Run, run_identity, train_in_folder
from zoo.units.units import ROLES

SAVE_EVERY = 500  # steps
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
    """Trains the denoiser on a zoo and writes a `WeightDiffusionPipeline` folder to `out`. command: the configuration
    of the command, written to the record as it is.

    An interrupted run leaves its state in `out`; `resume` continues from it to the same bytes. Raises UserError for an
    unusable zoo, an autoencoder of another zoo, or an `out` that is in use (without `resume`)."""
    out, opened, coder = Path(out), Zoo.open(zoo), load_autoencoder(autoencoder)
    weights = b"".join(p.detach().numpy().tobytes() for p in coder.parameters())
    identity = run_identity(config, opened, hashlib.sha256(weights).hexdigest())
    run = Run(out, identity, config.steps, SAVE_EVERY, RECORD_FILE, "diffusion", resume, quiet)
    return train_in_folder(run, lambda: _DiffusionTrainer(config, opened, coder, run, device, command))


def batch_loss(denoiser: UnitDenoiser, batch: NoisyBatch) -> Tensor:
    """Mean squared error of the velocity: a scalar."""
    units = batch.units
    condition = denoiser.condition_embedding(units.kind, units.features, units.family, units.context, units.partner)
    candidates = None
    if units.bank is not None and units.log_count is not None:
        query = torch.where(batch.conditional[:, None], condition, denoiser.unconditional)
        log_prior = denoiser.log_prior(units.kind, query, denoiser.bank_embedding(units.kind, units.bank))
        log_prior = mask_to_group(log_prior, units.strings, units.bank.group)
        candidates = Candidates(units.bank.tokens, log_prior + units.log_count)
    velocity = denoiser(units.kind, batch.x, batch.sigma, condition, candidates, batch.conditional)
    return (velocity - batch.target).square().mean()


def learning_rate(config: DiffusionTrainConfig, step: int) -> float:
    """Linear warm-up, then a cosine to a hundredth of the peak."""
    warm = min(1.0, (step + 1) / config.warmup)
    return config.lr * warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / config.steps)))


class _DiffusionTrainer:
    """The denoiser, its optimizer, the average of its weights and its data (`zoo.training.runs.Trainer`)."""

    def __init__(
        self,
        config: DiffusionTrainConfig,
        zoo: Zoo,
        autoencoder: UnitAutoencoder,
        run: Run,
        device: str,
        command: dict[str, Any] | None,
    ) -> None:
        self.config, self.autoencoder, self.run, self.command = config, autoencoder, run, command
        self.accelerator = Accelerator(cpu=device == "cpu")
        self.data = prepare_training_data(zoo, autoencoder, config.context, run.quiet)
        tokens = {kind: autoencoder.latent_size(kind) + len(ROLES[kind]) for kind in ROLES}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.denoiser = UnitDenoiser(
                tokens | {CONTEXT: config.context},
                list(family_numbers(self.data.donors)),
                hidden=config.hidden,
                blocks=config.blocks,
                bandwidth=config.bandwidth,
            ).to(self.accelerator.device)
        self.optimizer = torch.optim.AdamW(
            self.denoiser.parameters(), lr=config.lr, betas=(0.9, 0.99), weight_decay=0.01
        )
        self.ema = EMAModel(self.denoiser.parameters(), decay=config.ema, use_ema_warmup=True, power=0.75)
        self.average_loss = float("nan")  # exponential moving average
        self.batches: Iterator[list[NoisyBatch]] | None = None  # from the first step of this process on

    def state(self) -> dict[str, Tensor]:
        average = {f"ema.{i}": p for i, p in enumerate(self.ema.shadow_params)}
        loss = torch.tensor(self.average_loss, dtype=torch.float64)
        return training_tensors(self.denoiser, self.optimizer) | average | {"average": loss}

    def restore(self, state: dict[str, Tensor], step: int) -> None:
        restore_training(state, self.denoiser, self.optimizer)
        for i, p in enumerate(self.ema.shadow_params):
            p.copy_(stored_tensor(state, f"ema.{i}", p))
        self.ema.optimization_step = step
        self.average_loss = float(stored_tensor(state, "average", torch.tensor(0.0, dtype=torch.float64)))

    def progress_note(self) -> str:
        return f"loss={self.average_loss:.3f}"

    def train_step(self, step: int) -> None:
        if self.batches is None:
            self.batches = batches(self.data, self.config, step)
        parts = next(self.batches)
        device = self.accelerator.device
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, step)
        loss = torch.zeros((), device=device)
        for batch in parts:
            loss = loss + batch_loss(self.denoiser, batch.to(device)) / len(parts)
        self.accelerator.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.denoiser.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.step(self.denoiser.parameters())
        value = float(loss.detach())
        self.average_loss = value if math.isnan(self.average_loss) else 0.98 * self.average_loss + 0.02 * value

    def save(self, folder: Path) -> dict[str, Any]:
        self.ema.copy_to(self.denoiser.parameters())
        pipeline = WeightDiffusionPipeline(self.autoencoder, self.denoiser.cpu(), self.data.memory, make_scheduler())
        pipeline.save_pretrained(folder)
        record = {
            "recipe": asdict(self.config),
            "loss": self.average_loss,
            "donors": self.data.memory.config["donors"],
            "identity": self.run.identity,
        }
        return record if self.command is None else record | {"config": self.command}
