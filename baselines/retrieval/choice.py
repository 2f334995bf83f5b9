"""Which donor, block and heads a part of a target is taken from: draws whose probability falls with a distance."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from zoo.tensors import Metadata

SIZES = ("width", "layers", "heads", "kv_heads", "ffn")  # the sizes of a model that are compared
LOSS_SCALE = 0.1  # nats of held-out loss that count as much as a size that is twice as large
DISAGREEMENT_SCALE = 0.25  # root of the disagreement of two vocabularies (`bank.disagreement`) that counts as much


def donor_distances(
    sources: list[Metadata], losses: list[float | None], target: Metadata, wanted_loss: float | None
) -> Tensor:
    """The squared distance of each donor to a target, float64 [D].

    It is the sum of squares of the log2 ratios of SIZES, of the log10 ratio of the RoPE bases, and of the difference of
    the losses in units of LOSS_SCALE.
    losses: the donors' held-out losses, None where unknown; an unknown one counts as the highest. wanted_loss: None for
    the donors' lowest."""
    known = [loss for loss in losses if loss is not None]
    found = []
    for source, loss in zip(sources, losses, strict=True):
        ratios = [math.log2(getattr(source, name) / getattr(target, name)) for name in SIZES]
        ratios.append(math.log10((source.rope_theta or 1.0) / (target.rope_theta or 1.0)))
        wanted = wanted_loss if wanted_loss is not None else min(known, default=0.0)
        off = 0.0 if not known else ((max(known) if loss is None else loss) - wanted) / LOSS_SCALE
        found.append(sum(ratio**2 for ratio in ratios) + off**2)
    return torch.tensor(found, dtype=torch.float64)


def depth_distances(n_source: int, n_target: int) -> Tensor:
    """The squared distance in relative depth of each block of a target to each of a donor, float64 [target, source].

    The unit is a block of the target."""
    ends = torch.linspace(0, 1, n_source, dtype=torch.float64) if n_source > 1 else torch.full((1,), 0.5).double()
    own = torch.linspace(0, 1, n_target, dtype=torch.float64) if n_target > 1 else torch.full((1,), 0.5).double()
    return ((own[:, None] - ends) * max(1, n_target - 1)).square()


def drawn_order(squared: Tensor, bandwidth: float, generator: torch.Generator) -> Tensor:
    """All entries of squared distances [N] in the order of draws without replacement, int64 [N].

    An entry is drawn with a probability in proportion to exp(-squared / (2 bandwidth^2)), by the Gumbel trick
    (1903.06059). With a bandwidth of 0 the order is that of the distances."""
    if bandwidth == 0:
        return squared.argsort(stable=True)
    uniform = torch.rand(len(squared), generator=generator, dtype=torch.float64)
    keys = -squared / (2 * bandwidth**2) - (-uniform.log()).log()
    return keys.argsort(descending=True, stable=True)


def drawn_groups(n_source: int, n_target: int, bandwidth: float, generator: torch.Generator) -> Tensor:
    """The donor's KV groups in the order in which a target takes them, int64 [n_source]: each of them once.

    Groups are in order of energy. Place i is most probably taken by group i; the distance is in places."""
    taken = torch.zeros(n_source, dtype=torch.bool)
    places = torch.arange(n_source, dtype=torch.float64)
    order = []
    for place in range(min(n_source, n_target)):
        squared = (places - place).square().masked_fill(taken, math.inf)
        order.append(int(drawn_order(squared, bandwidth, generator)[0]))
        taken[order[-1]] = True
    return torch.cat([torch.tensor(order), (~taken).nonzero().flatten()])
