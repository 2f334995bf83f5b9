"""Learned pruning: masks trained on a text until the open parts have exactly the target's shape (2310.06694)."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from baselines.calibration import load_model, window_length
from baselines.transfer.gather import copy_tensors
from baselines.transfer.shrinking.base import KeptParts, Shrinking
from baselines.transfer.shrinking.importance import Scores, top_indices
from baselines.transfer.shrinking.kept_scores import kept_or_scored
from baselines.transfer.shrinking.masks import SUPPORTED, MaskDistribution, apply_masks
from baselines.transfer.sizes import metadata_pair
from zoo.donors.memory import ModuleDonor
from zoo.errors import UserError
from zoo.options import option
from zoo.sandbox import library_errors
from zoo.streams import stream
from zoo.targets.blueprint import Blueprint
from zoo.tensors import Metadata
from zoo.training.corpora import reference_corpus
from zoo.training.loop import next_token_loss
from zoo.training.resumable import (
    STATE_FILE,
    load_state,
    restore_training,
    resumable_steps,
    save_state,
    training_tensors,
)
from zoo.vocabulary import BYTE_VOCAB, byte_tokens

if TYPE_CHECKING:
    from zoo.donors.donor import Donor

log = logging.getLogger(__name__)

BATCH_TOKENS = 128  # predicted tokens of a window in a batch
SAVE_EVERY = 100
IDENTITY_IN_CONTENT = ("work", "text", "split", "text_column", "tokenizer", "donor")  # hashed by content, or not at all


@dataclass(kw_only=True)
class LearnedPruning(Shrinking):
    """Trains masks on a text until exactly the target's shape stays open (Sheared LLaMA, 2310.06694).

    Hard-concrete masks multiply the coordinates of the residual stream, the neurons and KV groups of every layer
    (the query heads of a group share a mask), and whole layers. They minimise the loss on the text under a
    Lagrangian that leads the expected size of every axis to the target's. At the end the most open parts of every
    axis are kept, exactly as many as the target has; of equal ones those with the larger
    `importance.score_by_weights`.

    Learning rates, their schedule, and the fifth of the steps in which the constraint tightens are the authors'. They
    make 3200 steps. Our choice, where we differ:
    - `constraint`: the authors' is an equality. Once too much is closed, it opens the parts that resist least, which
    are
      those that do nothing. After 100 steps on a donor padded with dead neurons it had kept all of them, and `at-most`
      none.
    - `train_weights`: the authors train the donor's weights as well (at 1e-4). It is off by default, because a
    comparison
      of initialisations would have to count that training.
    - Masks end at zero or one, where the authors multiply soft masks into the weights.

    The donor is on `device` in float32 (with `train_weights` also its gradients, two moments, and the target). `work`
    is a folder for the state of the run: after an interruption the same call continues from there to the same bytes.
    """

    name: ClassVar[str] = "learned-pruning"
    family: ClassVar[str] = "pruning"
    summary: ClassVar[str] = "a larger donor under masks that are trained on a text to the target's exact shape"
    reference: ClassVar[str] = "2310.06694"
    needs: ClassVar[tuple[str, ...]] = ("donor", "text")
    on_other_machines: ClassVar[str] = "maybe other parts, because training amplifies rounding errors"
    choices: ClassVar[dict[str, tuple[str, ...]]] = {"constraint": ("at-most", "equality")}

    windows: int = option(512, "windows of 256 tokens, read from the start of the text", least=1, most=1_000_000)
    steps: int = option(300, "training steps of the masks", least=1)
    batch_size: int = option(8, "windows of 128 tokens per step", least=1, most=4096)
    mask_lr: float = option(1.0, "learning rate of the masks' log-odds", least=0.0)
    multiplier_lr: float = option(1.0, "learning rate of the Lagrange multipliers", least=0.0)
    constraint: str = option("at-most", "on the expected size: at-most the target's, or the authors' equality")
    train_weights: bool = option(False, "train the donor's weights together with the masks")
    weights_lr: float = option(1e-4, "learning rate of the weights", least=0.0)
    warmup: float = option(0.2, "share of the steps in which the constraint tightens", least=0.0, most=1.0)
    mask_seed: int = option(0, "seed of the masks and of the order of the text")
    work: str | None = option(None, "folder that keeps the state of an interrupted run; none: nothing is kept")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._trained: dict[str, Tensor] = {}  # by name in the target, filled by train_weights

    def extra_mismatches(self, donor: Donor, blueprint: Blueprint) -> list[str]:
        found = super().extra_mismatches(donor, blueprint)
        source, target = donor.blueprint.metadata, blueprint.metadata
        assert source is not None and target is not None
        if source.architecture not in SUPPORTED:
            known = ", ".join(SUPPORTED)
            found.append(f"masks are exact only for {known}, not for {source.architecture}: use pruning")
        if not donor.blueprint.has_head:
            found.append("it has no head, which training its masks needs: use pruning")
        if source.head_dim != target.head_dim:
            found.append(f"head_dim {source.head_dim} cannot be masked to {target.head_dim}: use pruning")
        before, after = source.heads // source.kv_heads, target.heads // target.kv_heads
        if before != after:
            found.append(f"{before} query heads per KV head share a mask, but the target has {after}: use pruning")
        return found

    def _calibration(self, donor: Donor) -> Tensor | None:
        assert donor.blueprint.metadata is not None
        if self.text is not None:
            return super()._calibration(donor)
        if donor.blueprint.metadata.vocab != BYTE_VOCAB:
            raise UserError(f"{self.name} needs a text to train masks on: give a UTF-8 file with --set text=FILE")
        log.info("%s: without a text, masks are trained on Python's language reference", self.name)
        length = window_length(donor)
        tokens = byte_tokens(reference_corpus())
        return tokens[: len(tokens) // length * length].view(-1, length)[: self.windows]

    def _choose_parts(self, blueprint: Blueprint, windows: Tensor | None) -> KeptParts:
        source, target = metadata_pair(self.source, blueprint)
        assert windows is not None
        scores = kept_or_scored(self.source, self.device)
        model = load_model(self.source, self.device)
        masks = self._train(model, MaskDistribution(source, target).to(self.device), windows)
        self._kept = select_most_open(masks, scores, source, target)
        self._trained = {}
        if self.train_weights:
            self._trained = self._gather(ModuleDonor.from_module(self.source.name, model.cpu()), blueprint)
        return self._kept

    def _train(self, model: nn.Module, masks: MaskDistribution, windows: Tensor) -> MaskDistribution:
        """Trains the masks (and the model's weights with `train_weights`), or continues the run of `work`."""
        if not masks.target:  # donor and target have the same shape
            return masks
        model.requires_grad_(self.train_weights)
        trained = nn.ModuleDict({"masks": masks, "donor": model} if self.train_weights else {"masks": masks})
        optimizer = self._optimizer(model, masks)
        identity, start = self._identity(windows, masks), 0
        path = None if self.work is None else _state_path(Path(self.work))
        if path is not None and path.is_file():
            state, start = load_state(path, identity, self.steps)
            with library_errors(f"{path}: a run cannot be resumed from it", "remove it to start again"):
                restore_training(state, trained, optimizer)

        def save(step: int) -> None:
            if path is not None:
                save_state(path, training_tensors(trained, optimizer), step, identity)

        drawn: dict[str, Tensor] = {}
        steps = resumable_steps(start, self.steps, SAVE_EVERY, save, self.name, quiet=not sys.stderr.isatty())
        with apply_masks(model, self.source.blueprint, drawn), contextlib.closing(steps):
            for step in steps:
                for group in optimizer.param_groups:
                    group["lr"] = group["peak"] * lr_factor(step, self.steps)
                drawn.update(masks.draw(self.mask_seed, f"{self.name}/step {step}"))
                loss = next_token_loss(model, self._batch(windows, step).to(self.device))
                total = loss + masks.penalty(
                    (step + 1) / max(1.0, self.warmup * self.steps), self.constraint == "equality"
                )
                optimizer.zero_grad()
                total.backward()
                if self.train_weights:
                    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                masks.clamp()
        save(self.steps)
        for axis, share in masks.expected_open().items():
            mean = float(share.detach().mean())
            log.info("%s: %s: a share of %.3f is open, %.3f is the target", self.name, axis, mean, masks.target[axis])
        return masks

    def _optimizer(self, model: nn.Module, masks: MaskDistribution) -> torch.optim.Optimizer:
        multipliers = [*masks.linear.values(), *masks.quadratic.values()]
        groups: list[dict[str, Any]] = [
            {"params": [*masks.log_odds.values()], "peak": self.mask_lr},
            {"params": multipliers, "peak": self.multiplier_lr, "maximize": True},
        ]
        if self.train_weights:
            groups.append({"params": [*model.parameters()], "peak": self.weights_lr})
        return torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)

    def _batch(self, windows: Tensor, step: int) -> Tensor:
        """The batch of a step, int64 [B, S + 1], drawn from the stream (mask_seed, step)."""
        generator = stream(self.mask_seed, f"{self.name}/batch {step}")
        length = min(BATCH_TOKENS + 1, windows.shape[1])
        rows = torch.randint(len(windows), (self.batch_size,), generator=generator)
        starts = torch.randint(windows.shape[1] - length + 1, (self.batch_size,), generator=generator)
        return windows[rows[:, None], starts[:, None] + torch.arange(length)]

    def _identity(self, windows: Tensor, masks: MaskDistribution) -> str:
        """A hash of everything that the result of the run depends on."""
        options = {k: v for k, v in self.options().items() if k not in IDENTITY_IN_CONTENT}
        text = hashlib.sha256(windows.numpy().tobytes()).hexdigest()
        content = [options, self.source.sha256, text, sorted(masks.target.items())]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def _gather(self, donor: Donor, blueprint: Blueprint) -> dict[str, Tensor]:
        maps = self.index_maps(blueprint, rescale=False)
        return dict(self.gather(blueprint, lambda _: maps, self.mask_seed, donor))

    def sample(self, blueprint: Blueprint, seed: int = 0) -> Iterator[tuple[str, Tensor]]:
        if self.is_copy(blueprint):
            yield from copy_tensors(self.source, blueprint, self.only)
            return
        if self._trained:
            yield from self._trained.items()
            return
        maps = self.index_maps(blueprint, rescale=False)
        yield from self.gather(blueprint, lambda _: maps, seed)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        values, tensors = super().state()
        return values, tensors | {f"trained.{name}": t for name, t in self._trained.items()}

    def restore(self, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        super().restore(values, tensors)
        self._trained = {k.removeprefix("trained."): t for k, t in tensors.items() if k.startswith("trained.")}


def lr_factor(step: int, steps: int) -> float:
    """The share of the peak learning rate in a step: linear warm-up over a tenth, then a cosine to a tenth."""
    warmup = max(1, round(0.1 * steps))
    phase = max(0.0, (step - warmup) / max(1, steps - warmup))
    return min((step + 1) / warmup, 0.1 + 0.45 * (1 + math.cos(math.pi * phase)))


def _state_path(work: Path) -> Path:
    """The state's file in a folder, which is created here so that an error shows before the masks are trained."""
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--set work={work}: cannot be created ({error.strerror}); give another folder") from error
    return work / STATE_FILE


def select_most_open(masks: MaskDistribution, scores: Scores, source: Metadata, target: Metadata) -> KeptParts:
    """The parts with the largest log-odds; their number is the target's size."""
    weights = {
        "residual": scores.residual,
        "groups": scores.groups(source.kv_heads),
        "ffn": scores.ffn,
        "layers": torch.zeros(source.layers),
    }

    def ranked(axis: str) -> Tensor:
        """The log-odds, with ties broken by the scores of the weights."""
        preferred = weights[axis].argsort(-1).argsort(-1) / weights[axis].shape[-1]
        odds = masks.log_odds[axis].detach().double().cpu() if axis in masks.log_odds else 0.0
        return odds + 1e-6 * preferred

    layers = top_indices(ranked("layers"), target.layers)
    groups = torch.stack([top_indices(ranked("groups")[i], target.kv_heads) for i in layers])
    per_group = target.heads // target.kv_heads
    return KeptParts(
        layers=layers,
        residual=top_indices(ranked("residual"), target.width),
        groups=groups,
        queries=torch.arange(per_group).expand(*groups.shape, per_group).clone(),
        ffn=torch.stack([top_indices(ranked("ffn")[i], target.ffn) for i in layers]),
        expert_ffn=torch.zeros(len(layers), 0, dtype=torch.int64),
    )
