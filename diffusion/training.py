"""Training the diffusion on a zoo: flow matching (2210.02747) over unit tokens."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor

from autoencoder.loading import load_autoencoder
from autoencoder.model import UnitAutoencoder
from diffusion.conditions import model_condition
from diffusion.denoiser import CONTEXT, Candidates, UnitDenoiser, mask_to_group
from diffusion.memory import Bank, ZooMemory
from diffusion.pipeline import WeightDiffusionPipeline, make_scheduler
from diffusion.views import View, donor_contexts, donor_tokens, fit_scale, make_view, mean_tokens, view_shape
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
from zoo.units.aligned import AlignedDonor, align_donors, recorded_loss
from zoo.units.units import ROLES


@dataclass(frozen=True)
class DiffusionTrainConfig:
    """How the denoiser is trained. `batch` units a step, shared among the kinds by `BATCH_SHARES`."""

    steps: int = 4000
    batch: int = 256
    lr: float = 2e-3
    warmup: int = 100
    hidden: int = 192
    blocks: int = 3
    bandwidth: float | None = 0.1  # None: no bank
    context: int = 32
    jitter: float = 0.1  # noise on the context, of its RMS: neighbours of a donor are told alike
    drop: float = 0.1  # how often the condition is dropped, for classifier-free guidance
    ema: float = 0.999
    pool: int = 32  # views in memory
    refresh: int = 4  # steps between two new views
    seed: int = 0


BATCH_SHARES = {"neuron": 0.4, "qk": 0.2, "vo": 0.25, "vocab": 0.15}
CONTEXTS_PER_STEP = 64  # of each batch
NEGATIVES_PER_STEP = 512  # units of the bank, besides the batch's own, that the prior is trained against in a step
VIEWS_PER_BATCH = 4  # that the units of one kind in a batch come from
SAVE_EVERY = 500
RECORD_FILE = "headstart.json"


@dataclass(frozen=True)
class TrainingData:
    """What is learned from, computed once: the donors, and what belongs to each."""

    donors: list[AlignedDonor]
    memory: ZooMemory
    tokens: list[dict[str, Tensor]]  # per donor and kind [N, T]
    others: list[Tensor]  # per donor [V, T]: the mean vocabulary tokens of the other donors
    first: dict[str, list[int]]  # per kind: where each donor's units begin in the bank


def prepare_training_data(
    zoo: Zoo, autoencoder: UnitAutoencoder, recipe: DiffusionTrainConfig, quiet: bool
) -> TrainingData:
    """Aligns and encodes the donors of a zoo. Raises UserError where none is usable or none fits the autoencoder."""
    donors = list(align_donors(zoo, quiet))
    widest = max(d.metadata.width for d in donors)
    if widest > autoencoder.width:
        raise UserError(
            f"{zoo.path}: a donor is {widest} wide, the autoencoder knows {autoencoder.width}; train it on this zoo"
        )
    scales = {kind: fit_scale(autoencoder, donors, kind) for kind in ROLES}
    tokens = [donor_tokens(donor, autoencoder, scales) for donor in donors]
    tables = [dict(zip(d.tokens, t["vocab"], strict=True)) for d, t in zip(donors, tokens, strict=True)]
    sizes = {kind: [sum(len(t[kind]) for t in tokens), tokens[0][kind].shape[1]] for kind in ROLES}
    names = tuple(dict.fromkeys(name for donor in donors for name in donor.tokens))
    losses = [loss for d in donors if (loss := recorded_loss(d.facts)) is not None]
    memory = ZooMemory(
        scales={kind: asdict(scale) for kind, scale in scales.items()},
        tokens=list(names),
        sizes=sizes,
        context=recipe.context,
        donors=[_record(zoo, d) for d in donors],
        best_loss=min(losses) if losses else None,
    )
    size = sizes["vocab"][1]
    others = [mean_tokens(tables[:i] + tables[i + 1 :], d.tokens, size) for i, d in enumerate(donors)]
    families = _family_numbers(donors)
    memory.get_buffer("vocabulary").copy_(mean_tokens(tables, names, size))
    memory.get_buffer("contexts").copy_(donor_contexts(tables, recipe.context))
    memory.get_buffer("families").copy_(torch.tensor([families[d.metadata.architecture] for d in donors]))
    shapes = [model_condition(d.metadata, recorded_loss(d.facts)) for d in donors]
    memory.get_buffer("features_context").copy_(torch.stack(shapes))
    own = [make_view(i, d, d.metadata, tokens[i], scales, others[i]) for i, d in enumerate(donors)]
    first = {}
    for kind in ROLES:
        counts = [len(view.tokens[kind]) for view in own]
        first[kind] = torch.tensor([0, *counts]).cumsum(0)[:-1].tolist()
        memory.get_buffer(f"tokens_{kind}").copy_(torch.cat([v.tokens[kind] for v in own]))
        memory.get_buffer(f"features_{kind}").copy_(torch.cat([v.features[kind] for v in own]))
        memory.get_buffer(f"partners_{kind}").copy_(torch.cat([v.partners[kind] for v in own]))
        memory.get_buffer(f"donor_{kind}").copy_(torch.arange(len(own)).repeat_interleave(torch.tensor(counts)))
    memory.get_buffer("strings_vocab").copy_(torch.cat([memory.rows(d.tokens) for d in donors]))
    return TrainingData(donors, memory, tokens, others, first)


def _record(zoo: Zoo, donor: AlignedDonor) -> dict[str, Any]:
    source = zoo.donor(donor.name)
    known: dict[str, Any] = {"parameters": source.parameters} | {
        k: donor.facts[k] for k in ("loss", "tokens") if k in donor.facts
    }
    return record(source) | known


def _family_numbers(donors: list[AlignedDonor]) -> dict[str, int]:
    return {name: i + 1 for i, name in enumerate(sorted({d.metadata.architecture for d in donors}))}


def pool_view(material: TrainingData, recipe: DiffusionTrainConfig, slot: int, generation: int) -> View:
    """The view that a slot of the pool holds in its `generation`: a function of the seed alone. Donors are drawn in
    proportion to their size, so that every unit counts alike."""
    name = f"view {slot} {generation}"
    sizes = torch.tensor([float(sum(u.numel() for u in d.units.values())) for d in material.donors])
    pick = int(torch.multinomial(sizes, 1, generator=stream(recipe.seed, name)))
    donor = material.donors[pick]
    shape = view_shape(donor.metadata, recipe.seed, name + " shape")
    return make_view(pick, donor, shape, material.tokens[pick], material.memory.scale, material.others[pick])


def generation(recipe: DiffusionTrainConfig, slot: int, step: int) -> int:
    """How often a slot has been refreshed before `step`: one slot every `refresh` steps, in turn."""
    return (step // recipe.refresh - slot - 1) // recipe.pool + 1


@dataclass(frozen=True)
class Batch:
    """Units of one kind at noise levels, with their conditions and the units of the bank that they are told from."""

    kind: str
    x: Tensor  # [N, T]
    sigma: Tensor  # [N]
    target: Tensor  # [N, T], noise - token
    features: Tensor  # [N, FEATURES]
    family: Tensor  # int64 [N]
    context: Tensor | None  # [N, X]
    partner: Tensor | None  # [N, T]
    conditional: Tensor  # bool [N]
    strings: Tensor | None = None  # int64 [N]: the string, where told and another donor has it, else -1
    bank: Bank | None = None
    log_count: Tensor | None = None  # [M]: log of how many units of the whole bank each of `bank` stands for

    def to(self, device: torch.device) -> Batch:
        moved: dict[str, Any] = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, (Tensor, Bank))}
        return replace(self, **moved)


def batches(material: TrainingData, recipe: DiffusionTrainConfig, start: int) -> Iterator[list[Batch]]:
    """Per step, one batch of every kind; a function of (seed, step)."""
    pool: dict[int, tuple[int, View]] = {}
    banks = {kind: material.memory.bank(kind) for kind in (*BATCH_SHARES, CONTEXT)}
    families, contexts_of = material.memory.get_buffer("families"), material.memory.get_buffer("contexts")
    strings = material.memory.get_buffer("strings_vocab")
    for step in range(start, recipe.steps):
        rng = stream(recipe.seed, f"step {step}")
        for slot in range(recipe.pool):
            turn = generation(recipe, slot, step)
            if slot not in pool or pool[slot][0] != turn:
                pool[slot] = (turn, pool_view(material, recipe, slot, turn))
        out = []
        for kind, share in BATCH_SHARES.items():
            each = max(1, round(share * recipe.batch / VIEWS_PER_BATCH))
            parts = []
            for slot in torch.randint(recipe.pool, (VIEWS_PER_BATCH,), generator=rng).tolist():
                view = pool[slot][1]
                parts.append((view, torch.randint(len(view.rows[kind]), (each,), generator=rng)))
            donor = torch.tensor([v.donor for v, _ in parts]).repeat_interleave(each)
            row = torch.cat([material.first[kind][v.donor] + v.rows[kind][r] for v, r in parts])
            own, bank = row.unique(), banks[kind]
            negatives = torch.randint(len(bank.tokens), (NEGATIVES_PER_STEP,), generator=rng)
            drawn = torch.cat([own, negatives[~torch.isin(negatives, own)]])
            log_count = torch.zeros(len(drawn))
            log_count[len(own) :] = math.log(max(1.0, (len(bank.tokens) - len(own)) / max(1, len(drawn) - len(own))))
            out.append(
                _noised(
                    kind,
                    torch.cat([v.tokens[kind][r] for v, r in parts]),
                    torch.cat([v.features[kind][r] for v, r in parts]),
                    families[donor],
                    contexts_of[donor],
                    torch.cat([v.partners[kind][r] for v, r in parts]),
                    recipe,
                    rng,
                    bank[drawn] if recipe.bandwidth is not None else None,
                    log_count,
                    strings[row] if kind == "vocab" else None,
                )
            )
        views = [pool[slot][1] for slot in torch.randint(recipe.pool, (CONTEXTS_PER_STEP,), generator=rng).tolist()]
        donor = torch.tensor([v.donor for v in views])
        told = torch.stack([v.model for v in views])
        whole = banks[CONTEXT] if recipe.bandwidth is not None else None
        even = torch.zeros(len(contexts_of))
        out.append(_noised(CONTEXT, contexts_of[donor], told, families[donor], None, None, recipe, rng, whole, even))
        yield out


def _noised(
    kind: str,
    token: Tensor,
    told: Tensor,
    family: Tensor,
    context: Tensor | None,
    partner: Tensor | None,
    recipe: DiffusionTrainConfig,
    rng: torch.Generator,
    bank: Bank | None = None,
    log_count: Tensor | None = None,
    strings: Tensor | None = None,
) -> Batch:
    """Tokens [N, T] mixed with noise at levels from a logit-normal (2403.03206) that leans to the noisy side, where
    it is decided which unit it will be."""
    count = len(token)
    if context is not None:
        context = context + recipe.jitter * torch.randn(context.shape, generator=rng)
    if recipe.bandwidth is not None:
        token = token + recipe.bandwidth * torch.randn(token.shape, generator=rng)
    sigma = torch.sigmoid(1.0 + 1.5 * torch.randn(count, generator=rng))
    noise = torch.randn(token.shape, generator=rng)
    conditional = torch.rand(count, generator=rng) >= recipe.drop
    if strings is not None and partner is not None:  # what no other donor knows is told as what none knows
        strings = torch.where(conditional & (partner != 0).any(1), strings, -1)
    return Batch(
        kind=kind,
        x=(1 - sigma[:, None]) * token + sigma[:, None] * noise,
        sigma=sigma,
        target=noise - token,
        features=told,
        family=family,
        context=context,
        partner=partner,
        conditional=conditional,
        strings=strings,
        bank=bank,
        log_count=log_count,
    )


def batch_loss(denoiser: UnitDenoiser, batch: Batch) -> Tensor:
    """Mean squared error of the velocity: a scalar."""
    told = denoiser.condition_embedding(batch.kind, batch.features, batch.family, batch.context, batch.partner)
    candidates = None
    if batch.bank is not None and batch.log_count is not None:
        wanted = torch.where(batch.conditional[:, None], told, denoiser.unconditional)
        log_prior = denoiser.log_prior(batch.kind, wanted, denoiser.bank_embedding(batch.kind, batch.bank))
        log_prior = mask_to_group(log_prior, batch.strings, batch.bank.group)
        candidates = Candidates(batch.bank.tokens, log_prior + batch.log_count)
    velocity = denoiser(batch.kind, batch.x, batch.sigma, told, candidates, batch.conditional)
    return (velocity - batch.target).square().mean()


def learning_rate(recipe: DiffusionTrainConfig, step: int) -> float:
    """Linear warm-up, then a cosine to a hundredth."""
    warm = min(1.0, (step + 1) / recipe.warmup)
    return recipe.lr * warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / recipe.steps)))


def train_diffusion(
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

    settings: fields of `DiffusionTrainConfig`. An interrupted run leaves its state in `out`; `resume` continues it to the same
    bytes as an uninterrupted one. tracker: a name that accelerate knows ("tensorboard", "wandb", …).
    Raises UserError for an unusable zoo, an autoencoder of another zoo, or an `out` that exists (without resume)."""
    from accelerate import Accelerator

    out = Path(out)
    if steps is not None:
        settings["steps"] = steps
    recipe = DiffusionTrainConfig(seed=seed, **settings)
    opened = Zoo.open(zoo)
    coder = load_autoencoder(autoencoder)
    weights = b"".join(p.detach().numpy().tobytes() for p in coder.parameters())
    known = run_identity(recipe, opened, hashlib.sha256(weights).hexdigest())
    done = claim_folder(out, resume, RECORD_FILE)
    if done is not None:
        if done != known:
            raise UserError(f"{out}: holds a pipeline of other settings or another zoo; give another --out")
        return out
    accelerator = Accelerator(cpu=device == "cpu", log_with=tracker)
    material = prepare_training_data(opened, coder, recipe, quiet)
    tokens = {kind: coder.latent_size(kind) + len(ROLES[kind]) for kind in ROLES} | {CONTEXT: recipe.context}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        denoiser = UnitDenoiser(
            tokens,
            list(_family_numbers(material.donors)),
            hidden=recipe.hidden,
            blocks=recipe.blocks,
            bandwidth=recipe.bandwidth,
        ).to(accelerator.device)
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=recipe.lr, betas=(0.9, 0.99), weight_decay=0.01)
    ema = EMAModel(denoiser.parameters(), decay=recipe.ema, use_ema_warmup=True, power=0.75)
    start, average = 0, float("nan")
    if (out / STATE_FILE).is_file():
        state, start = load_state(out / STATE_FILE, known)
        average = _restore(state, start, denoiser, optimizer, ema)
    if tracker:
        accelerator.init_trackers("headstart-diffusion", config=asdict(recipe))

    main = accelerator.is_main_process  # every process makes the same steps, so that their number changes nothing

    def save(step: int) -> None:
        if main:
            save_state(out / STATE_FILE, _state(denoiser, optimizer, ema, average), step, known)

    run = resumable_steps(
        start, recipe.steps, SAVE_EVERY, save, "diffusion", quiet or not main, lambda: f"loss={average:.3f}"
    )
    with contextlib.closing(run):
        for step, parts in zip(run, batches(material, recipe, start), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(recipe, step)
            loss = torch.zeros((), device=accelerator.device)
            for batch in parts:
                loss = loss + batch_loss(denoiser, batch.to(accelerator.device)) / len(parts)
            accelerator.backward(loss)
            torch.nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            ema.step(denoiser.parameters())
            value = float(loss.detach())
            average = value if math.isnan(average) else 0.98 * average + 0.02 * value
            if tracker and (step + 1) % 50 == 0:
                accelerator.log({"loss": average}, step=step + 1)
    if tracker:
        accelerator.end_training()
    ema.copy_to(denoiser.parameters())
    if main:
        told = {
            "recipe": asdict(recipe),
            "loss": average,
            "donors": material.memory.config["donors"],
            "identity": known,
        }
        staged = out / STAGING_FOLDER
        with writing(out):
            WeightDiffusionPipeline(coder, denoiser.cpu(), material.memory, make_scheduler()).save_pretrained(staged)
            (staged / RECORD_FILE).write_text(json.dumps(told, indent=2) + "\n")
            publish(staged, out, RECORD_FILE)
        (out / STATE_FILE).unlink(missing_ok=True)
    accelerator.wait_for_everyone()
    return out


def _state(denoiser: UnitDenoiser, optimizer: Any, ema: EMAModel, average: float) -> dict[str, Tensor]:
    shadows = {f"ema.{i}": p for i, p in enumerate(ema.shadow_params)}
    return training_tensors(denoiser, optimizer) | shadows | {"average": torch.tensor(average, dtype=torch.float64)}


def _restore(state: dict[str, Tensor], step: int, denoiser: UnitDenoiser, optimizer: Any, ema: EMAModel) -> float:
    restore_training(state, denoiser, optimizer)
    for i, p in enumerate(ema.shadow_params):
        p.copy_(state[f"ema.{i}"])
    ema.optimization_step = step
    return float(state["average"])
