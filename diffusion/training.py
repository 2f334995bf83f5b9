"""Training the diffusion on a zoo: flow matching (2210.02747) over unit tokens."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor

from autoencoder.model import UnitAutoencoder
from diffusion.denoiser import CONTEXT, UnitDenoiser
from diffusion.pipeline import WeightDiffusionPipeline, scheduler
from diffusion.statistics import ZooStatistics
from diffusion.views import View, contexts, fit_scale, make_view, mean_tokens, view_shape, vocabulary_tokens
from zoo.aligned import Aligned, align
from zoo.errors import UserError
from zoo.progress import load_state, restore_training, save_state, training_tensors
from zoo.store import Zoo
from zoo.streams import stream
from zoo.units import ROLES


@dataclass(frozen=True)
class Recipe:
    """How the denoiser is trained. `batch` units a step, shared among the kinds by `SHARES`."""

    steps: int = 4000
    batch: int = 512
    lr: float = 2e-3
    warmup: int = 100
    hidden: int = 256
    blocks: int = 4
    context: int = 32
    jitter: float = 0.1  # noise on the context, of its RMS: neighbours of a donor are told alike
    drop: float = 0.1  # how often the condition is dropped, for classifier-free guidance
    ema: float = 0.999
    pool: int = 32  # views in memory
    refresh: int = 4  # steps between two new views
    seed: int = 0


SHARES = {"neuron": 0.4, "qk": 0.2, "vo": 0.25, "vocab": 0.15}
CONTEXTS = 16  # of each batch
VIEWS = 4  # that the units of one kind in a batch come from
SAVE_EVERY = 500
STATE = "training.safetensors"


@dataclass(frozen=True)
class Material:
    """What is learned from, computed once: the donors, and what belongs to each."""

    donors: list[Aligned]
    autoencoder: UnitAutoencoder
    statistics: ZooStatistics
    contexts: Tensor  # [donors, X]
    others: list[Tensor]  # per donor [V, T]: the mean vocabulary tokens of the other donors


def gather_material(zoo: Zoo, autoencoder: UnitAutoencoder, recipe: Recipe, quiet: bool) -> Material:
    """Aligns and encodes the donors of a zoo. Raises UserError where none is usable or none fits the autoencoder."""
    donors = list(align(zoo, quiet))
    widest = max(d.metadata.width for d in donors)
    if widest > autoencoder.width:
        raise UserError(
            f"{zoo.path}: a donor is {widest} wide, the autoencoder knows {autoencoder.width}; train it on this zoo"
        )
    with torch.no_grad():
        scales = {kind: fit_scale(autoencoder, donors, kind) for kind in ROLES}
        tables = vocabulary_tokens(donors, autoencoder, scales["vocab"])
    size = autoencoder.latent_size("vocab") + len(ROLES["vocab"])
    names = tuple(dict.fromkeys(name for donor in donors for name in donor.tokens))
    losses = [float(d.facts["loss"]) for d in donors if "loss" in d.facts]
    records = {d.name: d for d in zoo.donors}
    statistics = ZooStatistics(
        scales={kind: asdict(scale) for kind, scale in scales.items()},
        tokens=list(names),
        size=size,
        donors=[
            {
                "name": d.name,
                "revision": records[d.name].revision,
                "sha256": records[d.name].sha256,
                "license": records[d.name].license,
                **{k: d.facts[k] for k in ("loss", "tokens") if k in d.facts},
            }
            for d in donors
        ],
        best_loss=min(losses) if losses else None,
    )
    statistics.get_buffer("vocabulary").copy_(mean_tokens(tables, names, size))
    others = [mean_tokens(tables[:i] + tables[i + 1 :], d.tokens, size) for i, d in enumerate(donors)]
    return Material(donors, autoencoder, statistics, contexts(tables, recipe.context), others)


def pool_view(material: Material, recipe: Recipe, slot: int, generation: int) -> View:
    """The view that a slot of the pool holds in its `generation`: a function of the seed alone."""
    name = f"view {slot} {generation}"
    sizes = torch.tensor([float(sum(u.numel() for u in d.units.values())) for d in material.donors])
    pick = int(torch.multinomial(sizes, 1, generator=stream(recipe.seed, name)))
    donor = material.donors[pick]
    shape = view_shape(donor.metadata, recipe.seed, name + " shape")
    return make_view(
        donor, shape, material.autoencoder, material.statistics.scales, material.contexts[pick], material.others[pick]
    )


def generation(recipe: Recipe, slot: int, step: int) -> int:
    """How often a slot has been refreshed before `step`: one slot every `refresh` steps, in turn."""
    return (step // recipe.refresh - slot - 1) // recipe.pool + 1


def batches(
    material: Material, recipe: Recipe, families: dict[str, int], start: int, device: torch.device
) -> Iterator[list[dict[str, Any]]]:
    """Per step, the arguments of the denoiser for every kind, `target` among them; a function of (seed, step)."""
    pool: dict[int, tuple[int, View]] = {}
    for step in range(start, recipe.steps):
        rng = stream(recipe.seed, f"step {step}")
        for slot in range(recipe.pool):
            turn = generation(recipe, slot, step)
            if slot not in pool or pool[slot][0] != turn:
                pool[slot] = (turn, pool_view(material, recipe, slot, turn))
        out = []
        for kind, share in SHARES.items():
            each = max(1, round(share * recipe.batch / VIEWS))
            parts = []
            for slot in torch.randint(recipe.pool, (VIEWS,), generator=rng).tolist():
                view = pool[slot][1]
                rows = torch.randint(len(view.tokens[kind]), (each,), generator=rng)
                parts.append((view, rows))
            token = torch.cat([v.tokens[kind][r] for v, r in parts])
            out.append(
                _noised(
                    kind,
                    token,
                    torch.cat([v.features[kind][r] for v, r in parts]),
                    torch.cat([torch.full((each,), families[v.family]) for v, _ in parts]),
                    torch.cat([v.context.expand(each, -1) for v, _ in parts]),
                    torch.cat([v.partners[kind][r] for v, r in parts]),
                    recipe,
                    rng,
                )
            )
        views = [pool[slot][1] for slot in torch.randint(recipe.pool, (CONTEXTS,), generator=rng).tolist()]
        told = torch.stack([v.model for v in views])
        family = torch.tensor([families[v.family] for v in views])
        out.append(_noised(CONTEXT, torch.stack([v.context for v in views]), told, family, None, None, recipe, rng))
        yield [{k: t.to(device) if isinstance(t, Tensor) else t for k, t in b.items()} for b in out]


def _noised(
    kind: str,
    token: Tensor,
    told: Tensor,
    family: Tensor,
    context: Tensor | None,
    partner: Tensor | None,
    recipe: Recipe,
    rng: torch.Generator,
) -> dict[str, Any]:
    """A batch of the denoiser: tokens [N, T] mixed with noise at levels from a logit-normal (2403.03206)."""
    count = len(token)
    if kind == CONTEXT:
        token = token + recipe.jitter * torch.randn(token.shape, generator=rng)
    elif context is not None:
        context = context + recipe.jitter * torch.randn(context.shape, generator=rng)
    sigma = torch.sigmoid(torch.randn(count, generator=rng))
    noise = torch.randn(token.shape, generator=rng)
    return {
        "kind": kind,
        "x": (1 - sigma[:, None]) * token + sigma[:, None] * noise,
        "sigma": sigma,
        "features": told,
        "family": family,
        "context": context,
        "partner": partner,
        "conditional": torch.rand(count, generator=rng) >= recipe.drop,
        "target": noise - token,
    }


def learning_rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up, then a cosine to a hundredth."""
    warm = min(1.0, (step + 1) / recipe.warmup)
    return recipe.lr * warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / recipe.steps)))


def train(
    zoo: str | Path,
    autoencoder: str | Path,
    out: str | Path,
    resume: bool = False,
    seed: int = 0,
    device: str = "auto",
    quiet: bool = False,
    steps: int | None = None,
    tracker: str | None = None,
    **settings: Any,
) -> Path:
    """Trains the denoiser on a zoo and writes a `WeightDiffusionPipeline` folder to `out`.

    settings: fields of `Recipe`. An interrupted run leaves its state in `out`; `resume` continues it to the same
    bytes as an uninterrupted one. tracker: a name that accelerate knows ("tensorboard", "wandb", …).
    Raises UserError for an unusable zoo, an autoencoder of another zoo, or an `out` that exists (without resume)."""
    from accelerate import Accelerator
    from tqdm import tqdm

    out = Path(out)
    if steps is not None:
        settings["steps"] = steps
    recipe = Recipe(seed=seed, **settings)
    if (out / "model_index.json").exists() and resume:
        return out
    if out.exists() and any(out.iterdir()) and not resume:
        raise UserError(f"{out}: exists and is not empty; give another --out, or --resume to continue")
    accelerator = Accelerator(cpu=device == "cpu", log_with=tracker)
    opened = Zoo.open(zoo)
    coder = load_autoencoder(autoencoder)
    material = gather_material(opened, coder, recipe, quiet)
    tokens = {kind: coder.latent_size(kind) + len(ROLES[kind]) for kind in ROLES} | {CONTEXT: recipe.context}
    families = sorted({d.metadata.architecture for d in material.donors})
    torch.manual_seed(seed)
    denoiser = UnitDenoiser(tokens, families, hidden=recipe.hidden, blocks=recipe.blocks)
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=recipe.lr, betas=(0.9, 0.99), weight_decay=0.01)
    model, optimizer = accelerator.prepare(denoiser, optimizer)
    ema = EMAModel(denoiser.parameters(), decay=recipe.ema, use_ema_warmup=True, power=0.75)
    identity = _identity(recipe, material)
    start = 0
    if resume and (out / STATE).exists():
        state, start = load_state(out / STATE, identity)
        _restore(state, start, denoiser, optimizer, ema)
    if tracker:
        accelerator.init_trackers("headstart-diffusion", config=asdict(recipe))

    main = accelerator.is_main_process
    bar = tqdm(total=recipe.steps, initial=start, desc="diffusion", unit="step", disable=quiet or not main)
    average: float | None = None
    step = start
    try:
        for batch in batches(material, recipe, denoiser.family, start, accelerator.device):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(recipe, step)
            loss = torch.zeros((), device=accelerator.device)
            for part in batch:
                target = part.pop("target")
                loss = loss + (model(**part) - target).square().mean() / len(batch)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(denoiser.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            ema.step(denoiser.parameters())
            step += 1
            value = float(loss.detach())
            average = value if average is None else 0.98 * average + 0.02 * value
            bar.update()
            if step % 50 == 0:
                bar.set_postfix(loss=f"{average:.3f}")
                if tracker:
                    accelerator.log({"loss": average}, step=step)
            if step % SAVE_EVERY == 0 and main and step < recipe.steps:
                save_state(out / STATE, _state(denoiser, optimizer, ema), step, identity)
    except KeyboardInterrupt:
        if main:
            save_state(out / STATE, _state(denoiser, optimizer, ema), step, identity)
        raise
    finally:
        bar.close()
        if tracker:
            accelerator.end_training()
    ema.copy_to(denoiser.parameters())
    if main:
        pipeline = WeightDiffusionPipeline(coder, denoiser.cpu(), material.statistics, scheduler())
        pipeline.save_pretrained(out)
        record = {"recipe": asdict(recipe), "loss": average, "donors": material.statistics.config["donors"]}
        (out / "headstart.json").write_text(json.dumps(record, indent=2) + "\n")
        (out / STATE).unlink(missing_ok=True)
    accelerator.wait_for_everyone()
    return out


def load_autoencoder(folder: str | Path) -> UnitAutoencoder:
    """An autoencoder from a folder. Raises UserError where there is none."""
    if not (Path(folder) / "config.json").is_file():
        raise UserError(f"{folder}: holds no autoencoder; make one with `headstart train autoencoder`")
    return UnitAutoencoder.from_pretrained(folder).eval()


def _identity(recipe: Recipe, material: Material) -> str:
    """What a state must agree in to be resumed."""
    known = {"recipe": asdict(recipe), "donors": [d["sha256"] for d in material.statistics.config["donors"]]}
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def _state(denoiser: UnitDenoiser, optimizer: Any, ema: EMAModel) -> dict[str, Tensor]:
    return training_tensors(denoiser, optimizer) | {f"ema.{i}": p for i, p in enumerate(ema.shadow_params)}


def _restore(state: dict[str, Tensor], step: int, denoiser: UnitDenoiser, optimizer: Any, ema: EMAModel) -> None:
    restore_training(state, denoiser, optimizer)
    for i, p in enumerate(ema.shadow_params):
        p.copy_(state[f"ema.{i}"])
    ema.optimization_step = step
