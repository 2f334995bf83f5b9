"""Learned pruning: masks trained on a text until what they leave open has exactly the target's shape (2310.06694)."""

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

from baselines.transfer.gather import gather_tensors
from baselines.transfer.shrinking.base import KeptParts, Shrinking
from baselines.transfer.shrinking.calibration import load_model, window_length
from baselines.transfer.shrinking.importance import Scores, score_by_weights, top_indices
from baselines.transfer.shrinking.masks import SUPPORTED, Masks, apply_masks
from zoo.donors.memory import ModuleDonor
from zoo.errors import UserError
from zoo.options import option
from zoo.streams import stream
from zoo.targets.blueprint import Blueprint
from zoo.tensors import Metadata
from zoo.training.corpora import byte_tokens, reference_corpus
from zoo.training.loop import next_token_loss
from zoo.training.resumable import (
    STATE_FILE,
    load_state,
    restore_training,
    resumable_steps,
    save_state,
    training_tensors,
)
from zoo.vocabulary import BYTE_VOCAB

if TYPE_CHECKING:
    from zoo.donors.donor import Donor

log = logging.getLogger(__name__)

BATCH_TOKENS = 128  # predicted tokens of a window in a batch
SAVE_EVERY = 100


@dataclass(kw_only=True)
class LearnedPruning(Shrinking):
    """Sheared LLaMA: hard-concrete masks on the coordinates of the residual stream, the neurons and KV groups of every
    layer (the query heads of a group share its mask) and whole layers (attention and MLP together) minimise the loss
    on a text under a Lagrangian, linear and quadratic, that leads the expected size of every axis to the target's. At
    the end the most open parts of every axis are kept, exactly as many as the target has; of equals those that
    `baselines.transfer.shrinking.importance.by_weights` prefers.

    Rates of masks and multipliers, their schedule, and the fifth of the steps in which the target tightens are the
    authors', who make 3200 steps. What differs:
    - `constraint`: theirs is an equality. Once too much is closed it opens what resists least, which is what is dead
      (100 steps on a donor padded with dead neurons: all of them kept, none with `at-most`).
    - `train_weights`: they train the donor's weights along (at 1e-4). Off by default, because that is training that a
      comparison of initialisations would have to count.
    - Masks end at zero or one, where the authors fold the soft ones into the weights.

    The donor is held on `device` in float32 (with `train_weights` also its gradients and two moments, and the target).
    `work` is a folder for the state of the run: interrupted, the same call continues from there to the same bytes.
    """

    name: ClassVar[str] = "learned-pruning"
    family: ClassVar[str] = "pruning"
    summary: ClassVar[str] = "a larger donor under masks that are trained on a text to the target's exact shape"
    reference: ClassVar[str] = "2310.06694"
    needs: ClassVar[tuple[str, ...]] = ("donor", "text")
    choices: ClassVar[dict[str, tuple[str, ...]]] = {"constraint": ("at-most", "equality")}

    windows: int = option(
        512, "of 256 tokens, the beginning of the text: so much of it is read", least=1, most=1_000_000
    )
    steps: int = option(300, "of training the masks", least=1)
    batch_size: int = option(8, "windows of 128 tokens in a step", least=1, most=4096)
    mask_lr: float = option(1.0, "of Adam on the masks' log-odds", least=0.0)
    multiplier_lr: float = option(1.0, "of Adam on the Lagrange multipliers", least=0.0)
    constraint: str = option("at-most", "on the expected size: at-most the target's, or the authors' equality")
    train_weights: bool = option(False, "train the donor's weights along with the masks")
    weights_lr: float = option(1e-4, "of AdamW on the weights", least=0.0)
    warmup: float = option(0.2, "of the steps: in which the target tightens", least=0.0, most=1.0)
    mask_seed: int = option(0, "of the masks and the order of the text")
    work: str | None = option(None, "a folder that keeps the state of an interrupted run; none: it is lost")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._trained: dict[str, Tensor] = {}  # by name in the target, with train_weights

    def refuses(self, donor: Donor, blueprint: Blueprint) -> list[str]:
        found = super().refuses(donor, blueprint)
        source, target = donor.blueprint.metadata, blueprint.metadata
        assert source is not None and target is not None
        if source.architecture not in SUPPORTED:
            known = ", ".join(SUPPORTED)
            found.append(f"masks are exact for {known} and not for {source.architecture}: use pruning")
        if source.head_dim != target.head_dim:
            found.append(f"head_dim {source.head_dim} has no mask that makes it {target.head_dim}: use pruning")
        before, after = source.heads // source.kv_heads, target.heads // target.kv_heads
        if before != after:
            found.append(f"{before} query heads per KV head are not the target's {after} and share a mask: use pruning")
        return found

    def _calibration(self, donor: Donor) -> Tensor | None:
        assert donor.blueprint.metadata is not None
        if self.text is not None:
            return super()._calibration(donor)
        if donor.blueprint.metadata.vocab != BYTE_VOCAB:
            raise UserError(f"{self.name} trains masks on a text: give a UTF-8 file with --set text=FILE")
        log.info("%s: no text given: masks are trained on Python's language reference", self.name)
        length = window_length(donor)
        tokens = byte_tokens(reference_corpus())
        return tokens[: len(tokens) // length * length].view(-1, length)[: self.windows]

    def _choose_parts(self, blueprint: Blueprint, windows: Tensor | None) -> KeptParts:
        source, target = self.source.blueprint.metadata, blueprint.metadata
        assert source is not None and target is not None and windows is not None
        scores = score_by_weights(self.source, self.device)
        model = load_model(self.source, self.device)
        masks = self._train(model, Masks(source, target).to(self.device), windows)
        self._kept = select_most_open(masks, scores, source, target)
        self._trained = {}
        if self.train_weights:
            self._trained = self._gathered(ModuleDonor.from_module(self.source.name, model.cpu()), blueprint)
        return self._kept

    def _train(self, model: nn.Module, masks: Masks, windows: Tensor) -> Masks:
        if not masks.target:  # same shape
            return masks
        model.requires_grad_(self.train_weights)
        trained = nn.ModuleDict({"masks": masks, "donor": model} if self.train_weights else {"masks": masks})
        multipliers = [*masks.linear.values(), *masks.quadratic.values()]
        groups: list[dict[str, Any]] = [
            {"params": [*masks.log_odds.values()], "peak": self.mask_lr},
            {"params": multipliers, "peak": self.multiplier_lr, "maximize": True},
        ]
        if self.train_weights:
            groups.append({"params": [*model.parameters()], "peak": self.weights_lr})
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
        known, start = self._identity(windows, masks), 0
        path = None if self.work is None else _state_path(Path(self.work))
        if path is not None and path.is_file():
            state, start = load_state(path, known)
            restore_training(state, trained, optimizer)

        def save(step: int) -> None:
            if path is not None:
                save_state(path, training_tensors(trained, optimizer), step, known)

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
        for axis, share in masks.expected().items():
            mean = float(share.detach().mean())
            log.info("%s: %s: %.3f are open, %.3f are wanted", self.name, axis, mean, masks.target[axis])
        return masks

    def _batch(self, windows: Tensor, step: int) -> Tensor:
        """int64 [B, S + 1], a function of (mask_seed, step)."""
        generator = stream(self.mask_seed, f"{self.name}/batch {step}")
        length = min(BATCH_TOKENS + 1, windows.shape[1])
        rows = torch.randint(len(windows), (self.batch_size,), generator=generator)
        starts = torch.randint(windows.shape[1] - length + 1, (self.batch_size,), generator=generator)
        return windows[rows[:, None], starts[:, None] + torch.arange(length)]

    def _identity(self, windows: Tensor, masks: Masks) -> str:
        """A hash of all that the run is a function of."""
        options = {k: v for k, v in self.options().items() if k not in ("work", "text", "tokenizer", "donor")}
        text = hashlib.sha256(windows.numpy().tobytes()).hexdigest()
        known = [options, self.source.sha256, text, sorted(masks.target.items())]
        return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()

    def _gathered(self, donor: Donor, blueprint: Blueprint) -> dict[str, Tensor]:
        maps = self.maps(blueprint, rescale=False)
        return dict(gather_tensors(donor, blueprint, lambda _: maps, self.mask_seed, self.name))

    def sample(self, blueprint: Blueprint, seed: int = 0) -> Iterator[tuple[str, Tensor]]:
        if self._trained:
            yield from self._trained.items()
            return
        maps = self.maps(blueprint, rescale=False)
        yield from gather_tensors(self.source, blueprint, lambda _: maps, seed, self.name)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        values, tensors = super().state()
        return values, tensors | {f"trained.{name}": t for name, t in self._trained.items()}

    def restore(self, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        super().restore(values, tensors)
        self._trained = {k.removeprefix("trained."): t for k, t in tensors.items() if k.startswith("trained.")}


def lr_factor(step: int, steps: int) -> float:
    """The share of its peak that a learning rate has in a step: up over the first tenth, then a cosine to a tenth."""
    warm = max(1, round(0.1 * steps))
    phase = max(0.0, (step - warm) / max(1, steps - warm))
    return min((step + 1) / warm, 0.1 + 0.45 * (1 + math.cos(math.pi * phase)))


def _state_path(work: Path) -> Path:
    """The state's file in a folder, made if need be: what cannot be written shows before the masks are trained."""
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--set work={work}: cannot be made ({error.strerror}); give another folder") from error
    return work / STATE_FILE


def select_most_open(masks: Masks, scores: Scores, source: Metadata, target: Metadata) -> KeptParts:
    """The parts with the largest log-odds, exactly as many as the target has."""
    weights = {
        "residual": scores.residual,
        "groups": scores.groups(source.kv_heads),
        "ffn": scores.ffn,
        "layers": torch.zeros(source.layers),
    }

    def ranked(axis: str) -> Tensor:
        """Log-odds, with what the weights say where they are equal."""
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
