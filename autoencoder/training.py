"""Training the unit autoencoder on a zoo."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from autoencoder.model import UnitAutoencoder, error_weights, set_linear_part_to_pca
from zoo.donors.donor import provenance
from zoo.donors.zoo import Zoo
from zoo.streams import stream
from zoo.training.resumable import restore_training, training_tensors
from zoo.training.runs import Run, run_identity, train_in_folder
from zoo.units.aligned import AlignedDonor, align_donors
from zoo.units.resizing import to_width
from zoo.units.units import ROLES

REPORT_FILE = "report.json"
SAVE_EVERY = 200  # steps


@dataclass(frozen=True)
class AutoencoderTrainConfig:
    """Hyperparameters. The network starts as PCA and is then trained for `steps`.

    Generated latents are off by about a tenth of their RMS. A decoder that was trained on exact latents amplifies
    that error in directions where donors have little energy, so it is trained under noise (2510.11690)."""

    rate: float = 1.5  # compression: numbers of a unit per number of its latent
    noise: float = 0.1  # standard deviation of the noise on the latents, relative to their RMS
    hidden: int = 128
    steps: int = 400
    batch: int = 256  # units of each kind per step
    lr: float = 1e-3
    seed: int = 0


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
    """Trains the unit autoencoder of a zoo and writes it to `out`, with `report.json`: per kind, its error beside that
    of PCA with latents of the same size. command: the configuration of the command, written to the report as it is.

    An interrupted run leaves its state in `out`; `resume` continues from it to the same bytes. Raises UserError for an
    unusable zoo, or for an `out` that is in use (without `resume`)."""
    out, opened = Path(out), Zoo.open(zoo)
    run = Run(
        out, run_identity(config, opened), config.steps, SAVE_EVERY, REPORT_FILE, "autoencoder", resume, quiet
    )  # fmt: skip
    return train_in_folder(run, lambda: _AutoencoderTrainer(config, opened, run, device, command))


def pca_autoencoder(
    donors: list[AlignedDonor], config: AutoencoderTrainConfig, records: list[dict[str, Any]]
) -> UnitAutoencoder:
    """The autoencoder before training: PCA at the config's `rate`, under the error's weights. records: provenance of
    the donors, kept in the model's config."""
    width = max(d.metadata.width for d in donors)
    latent = {kind: max(1, round(len(roles) * width / config.rate)) for kind, roles in ROLES.items()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = UnitAutoencoder(width, latent, config.hidden, records)
    weights = error_weights([d.units for d in donors], width)
    for kind in ROLES:
        set_linear_part_to_pca(model, kind, torch.cat([to_width(d.units[kind], width) for d in donors]), weights[kind])
    return model


def sample_batch(
    donors: list[AlignedDonor], kind: str, config: AutoencoderTrainConfig, step: int, width: int
) -> Tensor:
    """Units of one kind drawn from all donors, [batch, P, W]: a function of (seed, step). Every unit counts alike."""
    rng = stream(config.seed, f"{kind} {step}")
    sizes = torch.tensor([float(len(d.units[kind])) for d in donors])
    counts = torch.bincount(torch.multinomial(sizes, config.batch, True, generator=rng), minlength=len(donors))
    rows = []
    for donor, count in zip(donors, counts.tolist(), strict=True):
        units = donor.units[kind]
        rows.append(to_width(units[torch.randint(len(units), (count,), generator=rng)], width))
    return torch.cat(rows)


@torch.no_grad()
def reconstruction_errors(model: UnitAutoencoder, donors: list[AlignedDonor], noise: float = 0.0) -> dict[str, float]:
    """kind -> relative weighted squared error over all units of all donors. noise: standard deviation of the noise on
    the latents, relative to their RMS."""
    errors = {}
    for kind in ROLES:
        units = torch.cat([to_width(d.units[kind], model.width) for d in donors])
        drawn = noise * torch.randn(len(units), model.latent_size(kind), generator=stream(0, f"errors {kind}"))
        errors[kind] = float(model.loss(kind, units.to(model.device), drawn.to(model.device)))
    return errors


class _AutoencoderTrainer:
    """The autoencoder, its optimizer and its donors (`zoo.training.runs.Trainer`)."""

    def __init__(
        self, config: AutoencoderTrainConfig, zoo: Zoo, run: Run, device: str, command: dict[str, Any] | None
    ) -> None:
        self.config, self.run, self.command = config, run, command
        self.accelerator = Accelerator(cpu=device == "cpu")
        self.donors = list(align_donors(zoo, run.quiet))
        records = [provenance(zoo.donor(d.name)) for d in self.donors]
        self.model = pca_autoencoder(self.donors, config, records).to(self.accelerator.device)
        self.pca_errors = self._errors()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=config.lr, weight_decay=0.0)

    def _errors(self) -> tuple[dict[str, float], dict[str, float]]:
        """With exact latents, and with noisy ones."""
        exact = reconstruction_errors(self.model, self.donors)
        return exact, reconstruction_errors(self.model, self.donors, self.config.noise)

    def state(self) -> dict[str, Tensor]:
        return training_tensors(self.model, self.optimizer)

    def restore(self, state: dict[str, Tensor], step: int) -> None:
        restore_training(state, self.model, self.optimizer)

    def progress_note(self) -> str:
        return ""

    def train_step(self, step: int) -> None:
        config, device = self.config, self.accelerator.device
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr * 0.5 * (1 + math.cos(math.pi * step / config.steps))
        loss = torch.zeros((), device=device)
        for kind in ROLES:
            units = sample_batch(self.donors, kind, config, step, self.model.width).to(device)
            rng = stream(config.seed, f"noise {kind} {step}")
            noise = config.noise * torch.randn(len(units), self.model.latent_size(kind), generator=rng)
            loss = loss + self.model.loss(kind, units, noise.to(device))
        self.accelerator.backward(loss)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def save(self, folder: Path) -> dict[str, Any]:
        (exact, noisy), (pca_exact, pca_noisy) = self._errors(), self.pca_errors
        columns = {"autoencoder": exact, "pca": pca_exact, "autoencoder_noised": noisy, "pca_noised": pca_noisy}
        errors = {
            kind: {name: column[kind] for name, column in columns.items()} | {"latent": self.model.latent_size(kind)}
            for kind in ROLES
        }
        self.model.cpu().save_pretrained(folder)
        report = {
            "recipe": asdict(self.config),
            "donors": self.model.config["donors"],
            "error": errors,
            "identity": self.run.identity,
        }
        return report if self.command is None else report | {"config": self.command}
