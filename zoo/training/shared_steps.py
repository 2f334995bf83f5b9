"""Training steps that the processes and the accumulated parts of accelerate share, with one result."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, DistributedType
from torch import Tensor, nn

from zoo.errors import UserError

LARGEST_GRADIENT = 1.0  # norm to which gradients are clipped


class Objective(nn.Module):
    """The loss of one step, as a module, because that is what accelerate distributes over processes.

    trained: what the loss depends on. loss: of (step, part, parts), one of `parts` equal parts of a step's batch."""

    def __init__(self, trained: nn.Module, loss: Callable[[int, int, int], Tensor]) -> None:
        super().__init__()
        self.trained, self.loss = trained, loss

    def forward(self, step: int, part: int, parts: int) -> Tensor:
        return self.loss(step, part, parts)


def shared_accelerator(device: str, batches: Iterable[int], unit: str = "") -> Accelerator:
    """The accelerator of a training. batches: the sizes of its batches. unit: what they count, for messages.

    Raises UserError for a batch that its processes and accumulated parts do not divide, and for a way to distribute
    that shards weights."""
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    accelerator = Accelerator(cpu=device == "cpu", kwargs_handlers=[unused])
    require_data_parallelism(accelerator.distributed_type)
    parts = part_count(accelerator)
    for size in batches:
        if size % parts:
            batch = f"{size} {unit}".strip()
            raise UserError(
                f"a batch of {batch} cannot be shared by {parts} processes and accumulated parts; "
                "use a number that divides it"
            )
    return accelerator


def require_data_parallelism(kind: DistributedType) -> None:
    """UserError for a way to distribute that does not keep all weights in every process, such as FSDP: resuming and
    saving need them."""
    if kind not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        raise UserError(
            f"accelerate: {kind.value} is not supported; the processes of a training share its data, not its weights, "
            "so use --multi_gpu or --cpu"
        )


def part_count(accelerator: Accelerator) -> int:
    """Into how many parts the batch of a step is split."""
    return accelerator.num_processes * accelerator.gradient_accumulation_steps


def new_optimizer(parameters: Any, lr: float) -> torch.optim.Optimizer:
    """AdamW without weight decay. parameters: as torch's optimizers take them.

    It updates all parameters in one pass (fused), which makes a step of the autoencoder twice as fast on a CPU."""
    return torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)


def shared_update(
    accelerator: Accelerator, objective: Any, optimizer: Any, step: int, learning_rates: Iterable[float]
) -> float:
    """One update of a prepared objective and optimizer; the mean loss of all parts. learning_rates: one per group of
    the optimizer."""
    for group, lr in zip(optimizer.param_groups, learning_rates, strict=True):
        group["lr"] = lr
    count, value = accelerator.gradient_accumulation_steps, 0.0
    for i in range(count):
        waits = accelerator.no_sync(objective) if i < count - 1 else contextlib.nullcontext()
        with waits, accelerator.autocast():
            loss = objective(step, accelerator.process_index * count + i, part_count(accelerator))
        accelerator.backward(loss)  # divides by the count
        value += float(loss.detach()) / count
    accelerator.clip_grad_norm_(objective.parameters(), LARGEST_GRADIENT)
    optimizer.step()
    optimizer.zero_grad()
    return float(accelerator.reduce(torch.tensor(value, device=accelerator.device), "mean"))  # type: ignore[arg-type]


def moving_average(average: float, value: float, fresh: bool) -> float:
    """The exponential moving average of a loss; `fresh` where a new loss begins."""
    return value if fresh or math.isnan(average) else 0.97 * average + 0.03 * value


def warm_cosine(number: int, total: int, warmup: int, least: float) -> float:
    """The share of the peak learning rate at step `number` of `total`: a linear warm-up of `warmup` steps under a
    cosine that ends at `least`."""
    cosine = 0.5 * (1 + math.cos(math.pi * number / max(total, 1)))
    return min(1.0, (number + 1) / warmup) * (least + (1 - least) * cosine)
