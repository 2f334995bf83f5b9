"""Training batches of the diffusion: views of donors, mixed with noise. Each is a function of (seed, step).

Letters: N units, T token size of a kind, X context size, M units of the bank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from diffusion.config import DiffusionTrainConfig
from diffusion.denoiser import CONTEXT
from diffusion.memory import Bank
from diffusion.training_data import TrainingData
from diffusion.views import View, make_view, view_shape
from zoo.streams import stream

BATCH_SHARES = {"neuron": 0.4, "qk": 0.2, "vo": 0.25, "vocab": 0.15}  # kind -> its share of a step's units
CONTEXTS_PER_STEP = 64
NEGATIVES_PER_STEP = 512  # units of the bank, besides the batch's own, that the prior is trained against
VIEWS_PER_BATCH = 4  # from which the units of one kind are taken


@dataclass(frozen=True)
class CleanBatch:
    """Units of one kind, or contexts, with their conditions and the candidates of the bank."""

    kind: str
    tokens: Tensor  # [N, T]
    features: Tensor  # [N, FEATURES]
    family: Tensor  # int64 [N]
    context: Tensor | None = None  # [N, X]; None for contexts
    partner: Tensor | None = None  # [N, T]; None for contexts
    strings: Tensor | None = None  # int64 [N]: number of each token's string, -1 if it may be any; vocabulary only
    bank: Bank | None = None
    log_count: Tensor | None = None  # [M]: log of how many units of the whole bank each of `bank` stands for


@dataclass(frozen=True)
class NoisyBatch:
    """Units at noise levels: the input of the denoiser and its target."""

    units: CleanBatch
    x: Tensor  # [N, T], (1 - sigma) token + sigma noise
    sigma: Tensor  # [N]
    target: Tensor  # [N, T], noise - token
    conditional: Tensor  # bool [N]: False where the condition is dropped

    def to(self, device: torch.device) -> NoisyBatch:
        return replace(_moved(self, device), units=_moved(self.units, device))


def _moved(batch: Any, device: torch.device) -> Any:
    return replace(batch, **{k: v.to(device) for k, v in vars(batch).items() if isinstance(v, Tensor | Bank)})


def batches(data: TrainingData, config: DiffusionTrainConfig, start: int) -> Iterator[list[NoisyBatch]]:
    """Yields, for every step from `start` on, one batch of each kind and one of contexts."""
    pool: dict[int, tuple[int, View]] = {}  # slot -> generation and view
    banks = {kind: data.memory.bank(kind) for kind in (*BATCH_SHARES, CONTEXT)}
    for step in range(start, config.steps):
        rng = stream(config.seed, f"step {step}")
        for slot in range(config.pool):
            current = view_generation(config, slot, step)
            if slot not in pool or pool[slot][0] != current:
                pool[slot] = (current, pool_view(data, config, slot, current))
        views = [view for _, view in (pool[slot] for slot in range(config.pool))]
        kinds = [
            add_noise(_draw_units(kind, views, data, config, banks[kind], rng), config, rng) for kind in BATCH_SHARES
        ]
        yield [*kinds, add_noise(_draw_contexts(views, data, config, banks[CONTEXT], rng), config, rng)]


def pool_view(data: TrainingData, config: DiffusionTrainConfig, slot: int, generation: int) -> View:
    """The view that a slot of the pool holds in its `generation`, a function of the seed. Donors are drawn in
    proportion to their size, so every unit counts alike."""
    name = f"view {slot} {generation}"
    sizes = torch.tensor([float(sum(u.numel() for u in d.units.values())) for d in data.donors])
    index = int(torch.multinomial(sizes, 1, generator=stream(config.seed, name)))
    donor = data.donors[index]
    shape = view_shape(donor.metadata, config.seed, name + " shape")
    return make_view(index, donor, shape, data.tokens[index], data.memory.scale, data.others[index])


def view_generation(config: DiffusionTrainConfig, slot: int, step: int) -> int:
    """How often a slot has been refreshed before `step`: one slot every `refresh` steps, in turn."""
    return (step // config.refresh - slot - 1) // config.pool + 1


def _draw_units(
    kind: str, views: list[View], data: TrainingData, config: DiffusionTrainConfig, bank: Bank, rng: torch.Generator
) -> CleanBatch:
    """Units of one kind from a few views. Candidates: their own rows of the bank, and random others."""
    memory = data.memory
    per_view = max(1, round(BATCH_SHARES[kind] * config.batch / VIEWS_PER_BATCH))
    drawn = []
    for slot in torch.randint(len(views), (VIEWS_PER_BATCH,), generator=rng).tolist():
        view = views[slot]
        drawn.append((view, torch.randint(len(view.rows[kind]), (per_view,), generator=rng)))
    donor = torch.tensor([view.donor for view, _ in drawn]).repeat_interleave(per_view)
    rows = torch.cat([data.first[kind][view.donor] + view.rows[kind][r] for view, r in drawn])
    own = rows.unique()
    negatives = torch.randint(len(bank.tokens), (NEGATIVES_PER_STEP,), generator=rng)
    candidates = torch.cat([own, negatives[~torch.isin(negatives, own)]])
    log_count = torch.zeros(len(candidates))
    n_others, n_negatives = len(bank.tokens) - len(own), len(candidates) - len(own)
    log_count[len(own) :] = math.log(max(1.0, n_others / max(1, n_negatives)))
    return CleanBatch(
        kind=kind,
        tokens=torch.cat([view.tokens[kind][r] for view, r in drawn]),
        features=torch.cat([view.features[kind][r] for view, r in drawn]),
        family=memory.get_buffer("families")[donor],
        context=memory.get_buffer("contexts")[donor],
        partner=torch.cat([view.partners[kind][r] for view, r in drawn]),
        strings=memory.get_buffer("strings_vocab")[rows] if kind == "vocab" else None,
        bank=bank[candidates] if config.bandwidth is not None else None,
        log_count=log_count,
    )


def _draw_contexts(
    views: list[View], data: TrainingData, config: DiffusionTrainConfig, bank: Bank, rng: torch.Generator
) -> CleanBatch:
    """Contexts of the donors of random views, for the shapes of these views."""
    drawn = [views[slot] for slot in torch.randint(len(views), (CONTEXTS_PER_STEP,), generator=rng).tolist()]
    donor = torch.tensor([view.donor for view in drawn])
    contexts = data.memory.get_buffer("contexts")
    return CleanBatch(
        kind=CONTEXT,
        tokens=contexts[donor],
        features=torch.stack([view.model for view in drawn]),
        family=data.memory.get_buffer("families")[donor],
        bank=bank if config.bandwidth is not None else None,
        log_count=torch.zeros(len(contexts)),
    )


def add_noise(units: CleanBatch, config: DiffusionTrainConfig, rng: torch.Generator) -> NoisyBatch:
    """Mixes tokens with noise. Its levels are logit-normal (2403.03206) and lean to the noisy side, where it is decided
    which unit a token becomes. The context is jittered, and some conditions are dropped."""
    tokens, context, strings = units.tokens, units.context, units.strings
    if context is not None:
        context = context + config.jitter * torch.randn(context.shape, generator=rng)
    if config.bandwidth is not None:
        tokens = tokens + config.bandwidth * torch.randn(tokens.shape, generator=rng)
    sigma = torch.sigmoid(1.0 + 1.5 * torch.randn(len(tokens), generator=rng))
    noise = torch.randn(tokens.shape, generator=rng)
    conditional = torch.rand(len(tokens), generator=rng) >= config.drop
    if strings is not None and units.partner is not None:  # a string that no other donor has counts as unknown
        strings = torch.where(conditional & (units.partner != 0).any(1), strings, -1)
    return NoisyBatch(
        units=replace(units, tokens=tokens, context=context, strings=strings),
        x=(1 - sigma[:, None]) * tokens + sigma[:, None] * noise,
        sigma=sigma,
        target=noise - tokens,
        conditional=conditional,
    )
