"""The family of a decoder: its norms, biases, gates and positions, whatever its sizes.

A canonical decoder consists of residual vectors and of single numbers. Which ones there are is its family's: Qwen2 has
biases of queries, keys and values, Gemma has gains after its writers, GPT-2 has no gates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from zoo.errors import UserError
from zoo.targets.blueprint import Blueprint
from zoo.tensors import Metadata
from zoo.units.canonical import require_symmetries
from zoo.units.decoder import Decoder, read_decoder
from zoo.units.lazy import outline_of

READER_SITES = {"q": "attn", "k": "attn", "v": "attn", "gate": "mlp", "up": "mlp", "head": "final"}
BLOCK_NORMS = ("attn", "mlp", "attn.out", "mlp.out", "q", "k")
BIASES = ("q", "k", "v", "o", "gate", "up", "down", "head")

# Table -> what an entry may have. A role `NAME.bias` or `NAME.gain` is a bias or the gain of a norm.
VECTOR_ROLES: dict[str, tuple[str, ...]] = {
    "neuron": ("gate", "up", "down"),
    "query": ("q", "o"),
    "key": ("k", "v"),
    "token": ("embed", "head"),
    "block": ("o.bias", "down.bias", "attn.out.gain", "mlp.out.gain"),
    "position": ("position",),
}
NUMBER_ROLES: dict[str, tuple[str, ...]] = {
    "neuron": ("gate.bias", "up.bias"),
    "query": ("q.bias", "q.gain"),
    "key": ("k.bias", "v.bias", "k.gain"),
    "token": ("head.bias",),
}


@dataclass(frozen=True)
class Family:
    """What a decoder consists of. The default is a Llama: RMSNorm, rotary attention, gated MLP, no biases."""

    norm: str = "rms"  # rms | layer
    norms: tuple[str, ...] = ("attn", "mlp")  # sites in a block that have a gain
    shifts: tuple[str, ...] = ()  # sites that have a shift, `final` among them
    biases: tuple[str, ...] = ()  # of BIASES
    gated: bool = True
    positions: bool = False  # learned ones
    rotary: float = 1.0  # share of a head's components that the rotary embedding turns
    gains_per_head: bool = False  # the gain of a QK-norm differs between heads (OLMo 2)
    parallel: bool = False  # attention and MLP read the same residual stream
    activation: str = "silu"
    scaled_embedding: bool = False  # by sqrt(width) (Gemma)

    def has_constant(self, reader: str) -> bool:
        """Whether a reader adds a constant: by a bias, or by the shift of the LayerNorm before it."""
        exists = reader != "gate" or self.gated
        return exists and (reader in self.biases or READER_SITES[reader] in self.shifts)

    def has_role(self, role: str) -> bool:
        """Whether its decoders have a residual vector or a number of this role."""
        name, _, kind = role.rpartition(".")
        if kind == "gain":
            return name in self.norms
        if kind == "bias":
            return self.has_constant(name) if name in READER_SITES else name in self.biases
        return {"gate": self.gated, "position": self.positions}.get(role, True)

    def vector_roles(self, table: str) -> tuple[str, ...]:
        """The residual vectors of an entry of a table (`tables.py`), in order."""
        return tuple(role for role in VECTOR_ROLES[table] if self.has_role(role))

    def number_roles(self, table: str) -> tuple[str, ...]:
        """The single numbers of an entry of a table, in order."""
        return tuple(role for role in NUMBER_ROLES.get(table, ()) if self.has_role(role))

    def flags(self) -> list[float]:
        """What tells families apart, as numbers between 0 and 1; `FLAGS` many."""
        return [
            float(self.norm == "layer"),
            float(self.gated),
            float(self.positions),
            self.rotary,
            float(self.parallel),
            float("q" in self.norms),
            float(self.gains_per_head),
            float("attn" in self.norms),
            float("attn.out" in self.norms),
            float(self.has_constant("q")),
            float("o" in self.biases),
            float(self.activation == "silu"),
            float(self.activation == "relu"),
            float(self.scaled_embedding),
        ]

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Family:
        """The inverse of `dataclasses.asdict`, also after JSON. Raises ValueError for values of other types."""
        found: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        default = cls()
        for key, value in found.items():
            if not hasattr(default, key) or type(value) is not type(getattr(default, key)):
                raise ValueError(f"a family has no {key} of type {type(value).__name__}")
        known = {"norms": BLOCK_NORMS, "shifts": ("attn", "mlp", "final"), "biases": BIASES}
        for key, names in known.items():
            if not all(name in names for name in found.get(key, ())):
                raise ValueError(f"the {key} of a family are some of {', '.join(names)}")
        family = cls(**found)
        if family.norm not in ("rms", "layer") or not 0 <= family.rotary <= 1:
            raise ValueError(f"a family has no norm {family.norm[:20]!r} or no rotary share {family.rotary}")
        return family


PLAIN = Family()
FLAGS = len(PLAIN.flags())


def family_of(shape: Metadata) -> Family:
    """The family that `with_family` has written into a shape; a shape without one is a plain Llama's."""
    found = shape.extra.get("family", PLAIN)
    assert isinstance(found, Family)
    return found


def with_family(shape: Metadata, family: Family) -> Metadata:
    """The shape with its family. A plain Llama's stays as it is."""
    return shape if family == PLAIN else replace(shape, extra={**shape.extra, "family": family})


def coordinates(shape: Metadata) -> int:
    """The free coordinates of the residual stream: LayerNorm hides the last one (`canonical.py`)."""
    return shape.width - 1 if family_of(shape).norm == "layer" else shape.width


def require_family(decoder: Decoder, where: str) -> Family:
    """The family of a decoder. Raises UserError if tables do not describe its whole function."""
    meta, layers = decoder.metadata, outline_of(decoder.layers)
    require_symmetries(decoder, where)
    if reason := _reason_against(decoder):
        raise UserError(
            f"{where}: {reason}, so no table describes its whole function; "
            "use a decoder with RMSNorm or LayerNorm and with rotary or learned positions"
        )
    layer = layers[0]
    shifts = [*layer.shift, *decoder.shift]
    biases = [*layer.bias, *(["head"] if decoder.head_bias is not None else [])]
    activation = str(meta.extra.get("activation"))
    return Family(
        norm=meta.norm,
        norms=tuple(s for s in BLOCK_NORMS if s in layer.gain),
        shifts=tuple(s for s in ("attn", "mlp", "final") if s in shifts),
        biases=tuple(r for r in BIASES if r in biases),
        gated=layer.gate is not None,
        positions=decoder.positions is not None,
        rotary=meta.rotary.size / meta.head_dim,
        gains_per_head="q" in layer.gain and layer.gain["q"].numel() > meta.head_dim,
        parallel=bool(meta.extra.get("parallel_block")),
        activation="silu" if activation == "swish" else activation,
        scaled_embedding=meta.embed_scale != 1.0,
    )


def _reason_against(decoder: Decoder) -> str | None:
    meta, layers = decoder.metadata, outline_of(decoder.layers)
    contents = {
        (*sorted(layer.gain), *sorted(layer.shift), *sorted(layer.bias), layer.gate is None) for layer in layers
    }
    sites = {*layers[0].gain, *decoder.gain} - {*BLOCK_NORMS, "final"}
    shifts = {*layers[0].shift, *decoder.shift} - {"attn", "mlp", "final"}
    return (
        f"it has norms at {', '.join(sorted(sites))}" if sites
        else f"its norms at {', '.join(sorted(shifts))} have shifts" if shifts
        else "its blocks differ from each other" if len(contents) > 1
        else "its head has a bias without LayerNorm" if decoder.head_bias is not None and meta.norm != "layer"
        else f"it multiplies its embedding by {meta.embed_scale:g}" if not _usual_scale(meta)
        else None
    )  # fmt: skip


def _usual_scale(meta: Metadata) -> bool:
    return meta.embed_scale == 1.0 or abs(meta.embed_scale - meta.width**0.5) < 1e-6 * meta.embed_scale


def require_target_family(blueprint: Blueprint, where: str) -> Metadata:
    """The metadata of a blueprint that tables can fill, with its family. Raises UserError if they cannot."""
    decoder = read_decoder(blueprint, lambda name: torch.empty(blueprint[name].shape, device="meta"), where=where)
    family = require_family(decoder, where)
    if blueprint.unknown:
        raise UserError(
            f"{where}: {blueprint.unknown[0]} and {len(blueprint.unknown)} such tensors are no part of a decoder; "
            "give the config of its language model alone"
        )
    return with_family(decoder.metadata, family)


def require_served(family: Family, known: Sequence[Family], method: str) -> list[str]:
    """Lines that say what a target's family has and none of the known families has.

    Raises UserError for what has no neutral value: gates, no gates, learned positions, rotary attention."""
    if family in known:
        return []
    wanted = {
        "an MLP with gates": family.gated and not any(f.gated for f in known),
        "an MLP without gates": not family.gated and all(f.gated for f in known),
        "learned positions": family.positions and not any(f.positions for f in known),
        "rotary attention": bool(family.rotary) and not any(f.rotary for f in known),
    }
    if missing := [name for name, is_missing in wanted.items() if is_missing]:
        raise UserError(f"{method}: the target has {' and '.join(missing)}, which no donor has; add such a donor")
    roles = [role for table in (VECTOR_ROLES, NUMBER_ROLES) for names in table.values() for role in names]
    new = [role for role in roles if family.has_role(role) and not any(f.has_role(role) for f in known)]
    lines = [f"no donor has the target's {', '.join(new)}: gains are 1, biases 0"] if new else []
    differs = [name for name in ("norm", "norms", "parallel", "activation", "scaled_embedding", "positions", "rotary")
               if getattr(family, name) not in {getattr(f, name) for f in known}]  # fmt: skip
    if differs:
        lines.append(f"no donor has the target's {', '.join(differs).replace('_', ' ')}: expect a weak start")
    return lines or ["no donor has the target's combination of norms, biases and gates: expect a weak start"]
