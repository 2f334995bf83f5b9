"""Tables: the residual vectors of a canonical decoder, by what they belong to. A block becomes tables, and back.

| table | shape | residual vectors of an entry | single numbers of an entry |
|---|---|---|---|
| neuron | [F, 3, c] | gate, up, down | biases of gate and up |
| query | [K, G, h, 2, c] | q, o of one component of a query head | bias of q, gain of its norm |
| key | [K, h, 2, c] | k, v of one component of a KV head | biases of k and v, gain of k's norm |
| block | [1, R, c] | biases of o and down, gains of norms after them | |
| token | [V, 2, d] | embed, head | constant of the head |
| position | [P, 1, c] | a learned position | |

A family (`family.py`) has some of these only: GPT-2 has no gates, a Llama has no numbers, block table or positions. The
numbers of a table are a table of their own, `neuron_numbers` [F, S] and so on. Those of tokens are the last coordinate
of the head.

Unlike units (`units.py`), keys and values of a group appear once. Everything is width-free. Vectors that read after a
norm, and gains of norms after writers, are multiplied by sqrt(d). Embeddings have the scale that they have in the
stream.

LayerNorm hides the last principal coordinate, so that c is d - 1; c is d for RMSNorm. Its shift is folded into the
constants of the readers. A reader without a bias holds its constant in the hidden coordinate, where the shift is not
zero. Letters: d width, F neurons, K KV heads, G query heads per KV head, h head dimension, V tokens, P positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from zoo.tensors import Metadata
from zoo.units.decoder import Decoder, Layer
from zoo.units.family import PLAIN, READER_SITES, VECTOR_ROLES, Family, coordinates, family_of
from zoo.units.gains import tie_head
from zoo.units.residual_basis import to_disk_basis

BLOCK_TABLES = ("neuron", "query", "key")  # of every decoder
TABLE_ROLES: dict[str, tuple[str, ...]] = {t: VECTOR_ROLES[t] for t in (*BLOCK_TABLES, "token")}


def numbers_of(table: str) -> str:
    """The name of the table that holds the single numbers of a table's entries."""
    return f"{table}_numbers"


def block_tables(family: Family) -> tuple[str, ...]:
    """The names of the tables of a block of a family."""
    numbers = [numbers_of(t) for t in BLOCK_TABLES if family.number_roles(t)]
    return (*BLOCK_TABLES, *numbers, *(["block"] if family.vector_roles("block") else []))


def width_exponents(family: Family) -> tuple[float, float]:
    """The power of the width that makes the readers of attention, and of the MLP, width-free. Readers that no norm
    precedes (OLMo 2) already are."""
    attention, mlp = (0.5 if site in family.norms else 0.0 for site in ("attn", "mlp"))
    return attention, mlp


def layer_to_tables(layer: Layer, metadata: Metadata) -> dict[str, Tensor]:
    """The tables of one canonical block, in its dtype."""
    family, size = family_of(metadata), coordinates(metadata)
    attention, mlp = (metadata.width**power for power in width_exponents(family))
    up = [layer.up * mlp, layer.down] if layer.gate is None else [layer.gate * mlp, layer.up * mlp, layer.down]
    groups = metadata.kv_heads
    tables = {
        "neuron": torch.stack(up, dim=1),
        "query": torch.stack([layer.q * attention, layer.o], dim=2).unflatten(0, (groups, -1)),
        "key": torch.stack([layer.k * attention, layer.v * attention], dim=2),
    }
    tables = {name: table[..., :size] for name, table in tables.items()}
    for table in BLOCK_TABLES:
        if roles := family.number_roles(table):
            numbers = torch.stack([_read_number(layer, role) for role in roles], dim=-1)
            tables[numbers_of(table)] = numbers.unflatten(0, (groups, -1)) if table == "query" else numbers
    if roles := family.vector_roles("block"):
        vectors = [_read_vector(layer, role, metadata.width)[:size] for role in roles]
        tables["block"] = torch.stack(vectors)[None]
    return tables


def _read_number(layer: Layer, role: str) -> Tensor:
    """A single number of each entry: [F], [H, h] or [K, h]."""
    name, _, kind = role.rpartition(".")
    vectors: Tensor = getattr(layer, name)
    if kind == "gain":  # one for each component, or for each component of each head
        return layer.gain[name].view(-1, vectors.shape[1]).expand(vectors.shape[:2])
    constant = layer.bias.get(name)
    if (shift := layer.shift.get(READER_SITES[name])) is not None:
        constant = vectors @ shift if constant is None else constant + vectors @ shift
    assert constant is not None
    return constant


def _read_vector(layer: Layer, role: str, width: int) -> Tensor:
    """A residual vector of a block, [d]."""
    name, _, kind = role.rpartition(".")
    return layer.bias[name] if kind == "bias" else layer.gain[name] * width**0.5


def token_table(decoder: Decoder) -> Tensor:
    """The vocabulary of a canonical decoder, [V, 2, d]. Where LayerNorm hides the last coordinate, that of the head is
    the constant that it adds."""
    meta = decoder.metadata
    family, head = family_of(meta), decoder.head * meta.width**0.5
    embed = decoder.embed * meta.width**0.5 if family.scaled_embedding else decoder.embed
    if family.norm == "layer":
        constant = torch.zeros_like(head[:, 0]) if decoder.head_bias is None else decoder.head_bias
        if "final" in decoder.shift:
            constant = constant + decoder.head @ decoder.shift["final"]
        head = torch.cat([head[:, :-1], constant[:, None]], dim=1)
    return torch.stack([embed, head], dim=1)


def join_constants(pairs: Tensor, constants: Tensor | None) -> Tensor:
    """A token table [V, 2, d] of pairs [V, 2, d - 1] and the constants of the head [V], in its last coordinate."""
    head = torch.zeros_like(pairs[:, 0, 0]) if constants is None else constants
    return torch.cat([pairs, torch.stack([torch.zeros_like(head), head], dim=1)[..., None]], dim=2)


def split_constants(tokens: Tensor, family: Family) -> dict[str, Tensor]:
    """The inverse of `join_constants` for a token table of a family: `token` [V, 2, c] and, if the family has
    constants, `token_numbers` [V, 1]."""
    if family.norm != "layer":
        return {"token": tokens}
    constants = {numbers_of("token"): tokens[:, 1, -1:]} if family.number_roles("token") else {}
    return {"token": tokens[..., :-1], **constants}


def neutral_value(role: str, shape: Metadata) -> float:
    """What changes nothing: 0 for a bias, 1 for a gain, which is width-free if it comes after a writer."""
    if not role.endswith(".gain"):
        return 0.0
    return shape.width**0.5 if role in VECTOR_ROLES["block"] else 1.0


def position_table(decoder: Decoder) -> Tensor | None:
    """The learned positions of a canonical decoder, [P, 1, c]; None without any."""
    found = decoder.positions
    return None if found is None else found[:, None, : coordinates(decoder.metadata)]


def tables_to_layer(tables: Mapping[str, Tensor], metadata: Metadata | None = None) -> Layer:
    """The inverse of `layer_to_tables`, with unit gains before readers. Without metadata: a plain Llama's block."""
    family = PLAIN if metadata is None else family_of(metadata)
    width = tables["neuron"].shape[-1] if metadata is None else metadata.width
    attention, mlp = (width**-power for power in width_exponents(family))
    query, key, neuron = tables["query"].flatten(0, 1), tables["key"], tables["neuron"]
    numbers: dict[str, Tensor] = {}
    for table in BLOCK_TABLES:
        if roles := family.number_roles(table):
            found = tables[numbers_of(table)]
            found = found.flatten(0, 1) if table == "query" else found
            numbers |= dict(zip(roles, found.unbind(-1), strict=True))
    vectors = {}
    if roles := family.vector_roles("block"):
        vectors = dict(zip(roles, tables["block"][0], strict=True))
    ones = torch.ones(width, dtype=key.dtype, device=key.device)
    weights = {
        "q": query[:, :, 0] * attention,
        "k": key[:, :, 0] * attention,
        "v": key[:, :, 1] * attention,
        "o": query[:, :, 1],
        "up": neuron[:, -2] * mlp,
        "down": neuron[:, -1],
    }
    if family.gated:
        weights["gate"] = neuron[:, 0] * mlp
    layer = Layer(**weights, gain={s: ones for s in ("attn", "mlp") if s in family.norms})
    return layer if family == PLAIN else _with_family_parts(layer, numbers, vectors, family)


def _with_family_parts(
    layer: Layer, numbers: Mapping[str, Tensor], vectors: Mapping[str, Tensor], family: Family
) -> Layer:
    """A layer with its biases, shifts and further gains; LayerNorm's hidden coordinate is added to its vectors."""
    is_layer_norm = family.norm == "layer"
    width = layer.up.shape[-1] + is_layer_norm
    bias, gain = dict(layer.bias), dict(layer.gain)
    weights, held = {}, {}  # constants that the hidden coordinate holds, by reader
    for role, number in numbers.items():
        name, _, kind = role.rpartition(".")
        if kind == "gain":
            gain[name] = number.flatten() if family.gains_per_head else number.mean(0)
        elif name in family.biases:
            bias[name] = number
        else:
            held[name] = number
    for role, vector in vectors.items():
        name, _, kind = role.rpartition(".")
        if kind == "gain":
            gain[name] = vector * width**-0.5
        else:
            bias[name] = _with_last(vector) if is_layer_norm else vector
    if is_layer_norm:
        for name in ("q", "k", "v", "o", "up", "down", "gate"):
            if (found := getattr(layer, name)) is not None:
                weights[name] = _with_last(found, held.get(name), width)
    shift = {site: _hidden_shift(layer.up, width, held, site) for site in family.shifts if site != "final"}
    return replace(layer, **weights, bias=bias, gain=gain, shift=shift)


def _with_last(vectors: Tensor, constant: Tensor | None = None, width: int = 1) -> Tensor:
    """Vectors [..., c] with a last coordinate, which meets a shift of sqrt(width): [..., c + 1]."""
    last = torch.zeros_like(vectors[..., :1]) if constant is None else constant[..., None] * width**-0.5
    return torch.cat([vectors, last], dim=-1)


def _hidden_shift(like: Tensor, width: int, held: Mapping[str, Tensor], site: str) -> Tensor:
    """The shift of a norm [d]: zero, or sqrt(d) in the hidden coordinate if a reader holds its constant there."""
    shift = torch.zeros(width, dtype=like.dtype, device=like.device)
    if any(READER_SITES[name] == site for name in held):
        shift[-1] = width**0.5
    return shift


def tables_to_decoder(
    tokens: Tensor, layers: Sequence[Layer], metadata: Metadata, positions: Tensor | None = None
) -> Decoder:
    """A canonical decoder with unit gains and an untied head, of a token table [V, 2, d], layers, and the position
    table [P, 1, c] of a family that has one."""
    width, family = tokens.shape[-1], family_of(metadata)
    embed, head, head_bias = tokens[:, 0], tokens[:, 1] * width**-0.5, None
    shift = {}
    if family.scaled_embedding:
        embed = embed * width**-0.5
    if family.norm == "layer":
        in_bias = "head" in family.biases
        if in_bias:
            head_bias, head = tokens[:, 1, -1], _with_last(head[:, :-1])
        if "final" in family.shifts:
            held = {} if in_bias else {"head": head[:, -1]}
            shift["final"] = _hidden_shift(tokens, width, held, "final")
        positions = None if positions is None else _with_last(positions)
    return Decoder(
        metadata=replace(metadata, tied=False),
        embed=embed,
        head=head,
        layers=layers,
        positions=None if positions is None else positions[:, 0],
        gain={"final": torch.ones(width, dtype=tokens.dtype, device=tokens.device)},
        shift=shift,
        head_bias=head_bias,
    )


def to_checkpoint(decoder: Decoder, tied: bool) -> Decoder:
    """A canonical decoder in the coordinates of a checkpoint, with its head tied to its embedding if `tied`."""
    if tied and decoder.metadata.norm == "layer":  # the hidden coordinate of the head holds constants
        embed = torch.cat([decoder.embed[:, :-1], decoder.head[:, -1:]], dim=1)
        decoder = replace(decoder, embed=embed)
    stored = to_disk_basis(decoder)
    return tie_head(stored) if tied else stored
