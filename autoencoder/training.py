"""Training the unit autoencoder on a zoo."""

from __future__ import annotations

import contextlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autoencoder.model import UnitAutoencoder, error_weights, fit_pca
from zoo.checkpoints.writer import writing
from zoo.donors.store import Zoo, record
from zoo.errors import UserError
from zoo.streams import stream
from zoo.training.resumable import (
    STAGING_FOLDER,
    STATE_FILE,
    claim_folder,
    load_state,
    publish,
    restore_training,
    resumable_steps,
    run_identity,
    save_state,
    training_tensors,
)
from zoo.units.aligned import AlignedDonor, align_donors
from zoo.units.units import ROLES, to_width

REPORT_FILE = "report.json"
SAVE_EVERY = 200


@dataclass(frozen=True)
class AutoencoderTrainConfig:
    """rate: numbers of a unit per number of its latent. The network starts as PCA and is trained for `steps`, with
    normal noise of `noise` times their RMS on the latents: what is generated is off by as much, and a decoder that has
    only seen exact latents blows that up wherever donors have little (noise on latents: 2510.11690)."""

    rate: float = 1.5
    noise: float = 0.1
    hidden: int = 128
    steps: int = 400
    batch: int = 256
    lr: float = 1e-3
    seed: int = 0


def pca_autoencoder(
    donors: list[AlignedDonor], recipe: AutoencoderTrainConfig, records: list[dict[str, Any]]
) -> UnitAutoencoder:
    """The autoencoder before training: PCA at the recipe's rate under the error's weights. records: of the donors."""
    width = max(d.metadata.width for d in donors)
    latent = {kind: max(1, round(len(roles) * width / recipe.rate)) for kind, roles in ROLES.items()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = UnitAutoencoder(width, latent, recipe.hidden, records)
    weights = error_weights([d.units for d in donors], width)
    for kind in ROLES:
        fit_pca(model, kind, torch.cat([to_width(d.units[kind], width) for d in donors]), weights[kind])
    return model


def sample_batch(
    donors: list[AlignedDonor], kind: str, recipe: AutoencoderTrainConfig, step: int, width: int
) -> Tensor:
    """[batch, P, W]: units of one kind of all donors; of (seed, step)."""
    rng = stream(recipe.seed, f"{kind} {step}")
    sizes = torch.tensor([float(len(d.units[kind])) for d in donors])
    counts = torch.bincount(torch.multinomial(sizes, recipe.batch, True, generator=rng), minlength=len(donors))
    rows = []
    for donor, count in zip(donors, counts.tolist(), strict=True):
        units = donor.units[kind]
        rows.append(to_width(units[torch.randint(len(units), (count,), generator=rng)], width))
    return torch.cat(rows)


@torch.no_grad()
def reconstruction_errors(model: UnitAutoencoder, donors: list[AlignedDonor], noise: float = 0.0) -> dict[str, float]:
    """kind -> relative weighted squared error over all units of all donors, with that much noise on the latents."""
    out = {}
    for kind in ROLES:
        units = torch.cat([to_width(d.units[kind], model.width) for d in donors])
        drawn = noise * torch.randn(len(units), model.latent_size(kind), generator=stream(0, f"errors {kind}"))
        out[kind] = float(model.loss(kind, units.to(model.device), drawn.to(model.device)))
    return out


def train_autoencoder(
    zoo: str | Path,
    out: str | Path,
    resume: bool = False,
    seed: int = 0,
    device: str = "auto",
    quiet: bool = False,
    steps: int | None = None,
    **settings: Any,
) -> Path:
    """Trains the unit autoencoder of a zoo and writes it to `out`, with `report.json`: its error beside that of PCA at
    the same rate, per kind. settings: fields of `AutoencoderTrainConfig`.

    An interrupted run leaves its state in `out`; `resume` continues it to the same bytes. Raises UserError for an
    unusable zoo, or an `out` that exists (without resume)."""
    from accelerate import Accelerator

    out = Path(out)
    if steps is not None:
        settings["steps"] = steps
    recipe = AutoencoderTrainConfig(seed=seed, **settings)
    opened = Zoo.open(zoo)
    known = run_identity(recipe, opened)
    done = claim_folder(out, resume, REPORT_FILE)
    if done is not None:
        if done != known:
            raise UserError(f"{out}: holds an autoencoder of other settings or another zoo; give another --out")
        return out
    accelerator = Accelerator(cpu=device == "cpu")
    donors = list(align_donors(opened, quiet))
    model = pca_autoencoder(donors, recipe, [record(opened.donor(d.name)) for d in donors]).to(accelerator.device)
    before = reconstruction_errors(model, donors), reconstruction_errors(model, donors, recipe.noise)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, weight_decay=0.0)
    start = 0
    if (out / STATE_FILE).is_file():
        state, start = load_state(out / STATE_FILE, known)
        restore_training(state, model, optimizer)
    main = accelerator.is_main_process  # every process makes the same steps, so that their number changes nothing

    def save(step: int) -> None:
        if main:
            save_state(out / STATE_FILE, training_tensors(model, optimizer), step, known)

    run = resumable_steps(start, recipe.steps, SAVE_EVERY, save, "autoencoder", quiet or not main)
    with contextlib.closing(run):
        for step in run:
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr * 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
            loss = torch.zeros((), device=accelerator.device)
            for kind in ROLES:
                units = sample_batch(donors, kind, recipe, step, model.width).to(accelerator.device)
                rng = stream(recipe.seed, f"noise {kind} {step}")
                drawn = recipe.noise * torch.randn(len(units), model.latent_size(kind), generator=rng)
                loss = loss + model.loss(kind, units, drawn.to(accelerator.device))
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    if main:
        after = reconstruction_errors(model, donors), reconstruction_errors(model, donors, recipe.noise)
        kept = {"autoencoder": after[0], "pca": before[0], "autoencoder_noised": after[1], "pca_noised": before[1]}
        report = {
            "recipe": asdict(recipe),
            "donors": model.config["donors"],
            "error": {k: {name: e[k] for name, e in kept.items()} | {"latent": model.latent_size(k)} for k in ROLES},
            "identity": known,
        }
        staged = out / STAGING_FOLDER
        with writing(out):
            model.cpu().save_pretrained(staged)
            (staged / REPORT_FILE).write_text(json.dumps(report, indent=2) + "\n")
            publish(staged, out, REPORT_FILE)
        (out / STATE_FILE).unlink(missing_ok=True)
    accelerator.wait_for_everyone()
    return out
