"""The donors of a zoo as tokens, and the memory that the pipeline keeps of them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from autoencoder.model import UnitAutoencoder
from diffusion.conditions import model_condition
from diffusion.memory import ZooMemory
from diffusion.views import donor_contexts, donor_tokens, fit_scale, make_view, mean_tokens
from zoo.donors.donor import provenance
from zoo.donors.zoo import Zoo
from zoo.errors import UserError
from zoo.units.aligned import AlignedDonor, align_donors, recorded_loss
from zoo.units.units import ROLES


@dataclass(frozen=True)
class TrainingData:
    """The donors of a zoo as tokens, computed once before training."""

    donors: list[AlignedDonor]
    memory: ZooMemory
    tokens: list[dict[str, Tensor]]  # per donor and kind [N, T]
    others: list[Tensor]  # per donor [V, T]: the mean vocabulary tokens of the other donors
    first: dict[str, list[int]]  # per kind: where each donor's units begin in the bank


def prepare_training_data(zoo: Zoo, autoencoder: UnitAutoencoder, context: int, quiet: bool) -> TrainingData:
    """Aligns and encodes the donors of a zoo. context: size of the context vector.

    Raises UserError if no donor is usable, or if one is wider than the autoencoder."""
    donors = list(align_donors(zoo, quiet))
    widest = max(d.metadata.width for d in donors)
    if widest > autoencoder.width:
        raise UserError(
            f"{zoo.path}: the widest donor has width {widest}, the autoencoder at most {autoencoder.width}; "
            "train an autoencoder on this zoo"
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
        context=context,
        donors=[_record(zoo, d) for d in donors],
        best_loss=min(losses) if losses else None,
    )
    size = sizes["vocab"][1]
    others = [mean_tokens(tables[:i] + tables[i + 1 :], d.tokens, size) for i, d in enumerate(donors)]
    families = family_numbers(donors)
    memory.get_buffer("vocabulary").copy_(mean_tokens(tables, names, size))
    memory.get_buffer("contexts").copy_(donor_contexts(tables, context))
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
    return provenance(source) | known


def family_numbers(donors: list[AlignedDonor]) -> dict[str, int]:
    """architecture -> its number, from 1; 0 stands for an architecture that no donor has."""
    return {name: i + 1 for i, name in enumerate(sorted({d.metadata.architecture for d in donors}))}
