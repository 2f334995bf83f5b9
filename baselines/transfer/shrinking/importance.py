"""How much the parts of a donor matter: its residual coordinates, neurons, heads and layers, from its weights alone or
from what they do on calibration text.

Letters: L layers, d width, F neurons, E neurons of an expert, H query heads, K KV groups, h head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from baselines.transfer.shrinking.calibration import (
    block_path,
    first_input,
    module_holding,
    observe_inputs,
    run_windows,
)
from zoo.tensors import Metadata, split
from zoo.units.decoder import site_readers

if TYPE_CHECKING:
    from zoo.donors.donor import Donor

NormSite = tuple[str | None, int | None]  # the site and the layer of one


@dataclass(frozen=True)
class Scores:
    """All float64 on the CPU; a larger score matters more, and what is dead has zero."""

    residual: Tensor  # [d]
    ffn: Tensor  # [L, F]; [L, 0] where there are only experts
    heads: Tensor  # [L, H]
    expert_ffn: Tensor  # [L, E], the experts of a layer together; [L, 0] without experts
    energy: Mapping[
        NormSite, Tensor
    ]  # of every norm: how what it normalises is shared among its coordinates, sums to 1
    influence: Tensor | None = None  # [L] block influence 1 - E cos(x_l, x_l+1) (ShortGPT 2403.03853); needs text

    def groups(self, kv_heads: int) -> Tensor:
        """[L, K]: the root of the sum of the squares of a KV group's heads."""
        return self.heads.unflatten(1, (kv_heads, -1)).square().sum(-1).sqrt()


def top_indices(scores: Tensor, count: int) -> Tensor:
    """[count] int64: where the largest of [n] are, in their original order; of equals the first."""
    return scores.sort(descending=True, stable=True).indices[:count].sort().values


def score_by_weights(donor: Donor, device: str = "cpu") -> Scores:
    """Scores from norms, with a layer's matrices at most in memory; what reads the stream counts with its norm's gain:

    residual   |what writes the coordinate| · |what reads it|, every matrix over its mean
    ffn        |gate_i| · |up_i| · |down_i|, without a gate |up_i| · |down_i|; experts added up
    heads      |o_h v_g|, the Frobenius norm of the map from the stream to itself
    energy     squares of what writes each coordinate, every matrix over its mean
    """
    blueprint, meta = donor.blueprint, _metadata(donor)
    offset = meta.gain_offset

    def matrices(role: str, layer: int | None = None, site: str | None = None) -> Iterator[Tensor]:
        """[out, in] on the device; one per expert."""
        for spec, _ in blueprint.find(role, layer=layer, site=site):
            yield split(spec, donor.read(spec.name, torch.float32))[role].to(device)

    def gain(layer: int | None, site: str) -> Tensor | float:
        return next((g + offset for g in matrices("norm", layer, site)), 1.0)

    writes = torch.zeros(meta.width, dtype=torch.float64)
    reads = torch.zeros(meta.width, dtype=torch.float64)
    for table in matrices("embed"):
        writes += _divide_by_mean(_squared_columns(table))
    for head in matrices("head" if blueprint.find("head") else "embed"):
        if head.shape[0] == meta.vocab:
            reads += _divide_by_mean(_squared_columns(head * gain(None, "final")))
    shares: dict[NormSite, Tensor] = {}
    neurons, heads = [], []
    for layer in range(meta.layers):
        gains = {f"attn.{r}": gain(layer, "attn") for r in ("q", "k", "v")}
        mlp = "attn" if "up" in site_readers(meta, "attn") else "mlp"
        gains |= {f"mlp.{r}": gain(layer, mlp) for r in ("gate", "up")}
        rows: dict[str, list[Tensor]] = {}
        for role in gains:
            for matrix in matrices(role, layer):
                reads += _divide_by_mean(_squared_columns(matrix * gains[role]))
                rows.setdefault(role, []).append(_squared_columns((matrix * gains[role]).mT))
        product = torch.stack(rows["mlp.up"])
        if "mlp.gate" in rows:
            product = product * torch.stack(rows["mlp.gate"])
        for role in ("attn.o", "mlp.down"):
            for matrix in matrices(role, layer):
                writes += _divide_by_mean(_squared_columns(matrix.mT))
                rows.setdefault(role, []).append(_squared_columns(matrix.mT))
                rows.setdefault(f"{role} columns", []).append(_squared_columns(matrix))
        neurons.append((product * torch.stack(rows["mlp.down columns"])).sqrt().sum(0))
        v = next(matrices("attn.v", layer)) * gains["attn.v"]
        heads.append(_head_norms(v, next(matrices("attn.o", layer)), meta))
        sources = {"q": "attn.q", "k": "attn.k", "attn.out": "attn.o", "mlp.out": "mlp.down"}
        for site, role in sources.items():
            for _, part in blueprint.find("norm", layer=layer, site=site):
                shares[site, layer] = _divide_by_sum(torch.stack(rows[role]).sum(0).view(-1, part.shape[0]).sum(0))
    for spec, _ in blueprint.find("norm"):
        shares.setdefault((spec.site, spec.layer), _divide_by_sum(writes))
    ffn, none = torch.stack(neurons), torch.zeros(meta.layers, 0, dtype=torch.float64)
    dense = not meta.experts
    return Scores(
        residual=(writes * reads).sqrt(),
        ffn=ffn if dense else none,
        heads=torch.stack(heads),
        expert_ffn=none if dense else ffn,
        energy=shares,
    )


def score_by_activations(model: nn.Module, donor: Donor, windows: Tensor, weights: Scores) -> Scores:
    """Scores from int64 [B, S] run through the donor, loaded as `model`:

    residual   mean |x| of the stream before every block, each divided by its mean over the coordinates
    ffn        mean |what down reads| (experts have no such place in memory: theirs stay as in `weights`)
    heads      mean |what o reads|
    energy     mean share of each coordinate in the square of what a norm reads (a LayerNorm's is centred)
    influence  1 - the mean cosine between the stream before and after a block (ShortGPT, 2403.03853)
    """
    blueprint, meta = donor.blueprint, _metadata(donor)
    sums: dict[Any, Tensor] = {}
    counts: dict[Any, int] = {}

    def add(key: Any, values: Tensor) -> None:  # [..., n]: one row per token
        values = values.flatten(0, -2) if values.ndim > 1 else values[:, None]
        sums[key] = sums.get(key, 0.0) + values.sum(0).cpu().double()
        counts[key] = counts.get(key, 0) + len(values)

    def share(site: NormSite) -> Callable[[Tensor], None]:
        def see(x: Tensor) -> None:
            x = x - x.mean(-1, keepdim=True) if meta.norm == "layer" else x
            add(("norm", *site), x.square() / x.square().sum(-1, keepdim=True).clamp_min(1e-30))

        return see

    def size(key: tuple[str, int]) -> Callable[[Tensor], None]:
        return lambda x: add(key, x.abs())

    readers = {spec.name: share((spec.site, spec.layer)) for spec, _ in blueprint.find("norm")}
    readers |= {spec.name: size(("heads", spec.layer or 0)) for spec, _ in blueprint.find("attn.o")}
    if not meta.experts:
        readers |= {spec.name: size(("ffn", spec.layer or 0)) for spec, _ in blueprint.find("mlp.down")}
    handles = []
    for spec, _ in blueprint.find("attn.o"):
        layer = spec.layer or 0

        def block(module: nn.Module, args: Any, kwargs: Any, output: Any, layer: int = layer) -> None:
            x, y = first_input(args, kwargs), output[0] if isinstance(output, tuple) else output
            add(("stream", layer), x.abs())
            add(("influence", layer), 1 - F.cosine_similarity(x.float(), y.float(), dim=-1).flatten())

        handles.append(
            module_holding(model, f"{block_path(spec.name)}.weight").register_forward_hook(block, with_kwargs=True)
        )
    try:
        with observe_inputs(model, readers):
            run_windows(model, windows)
    finally:
        for handle in handles:
            handle.remove()

    def mean(*key: Any) -> Tensor:
        return sums[key] / counts[key]

    layers = range(meta.layers)
    return replace(
        weights,
        residual=torch.stack([_divide_by_mean(mean("stream", i)) for i in layers]).mean(0),
        ffn=weights.ffn if meta.experts else torch.stack([mean("ffn", i) for i in layers]),
        heads=torch.stack([mean("heads", i).unflatten(0, (meta.heads, -1)).mean(-1) for i in layers]),
        energy=weights.energy | {key[1:]: mean(*key) for key in sums if key[0] == "norm"},  # type: ignore[operator]
        influence=torch.cat([mean("influence", i) for i in layers]),
    )


def _head_norms(v: Tensor, o: Tensor, meta: Metadata) -> Tensor:
    """v [K h, d], o [d, H h] -> [H], |o_h v_g| of every query head, by h x h products: |o v|^2 = <o^T o, v v^T>."""
    v = v.unflatten(0, (meta.kv_heads, -1)).repeat_interleave(meta.heads // meta.kv_heads, 0)  # [H, h, d]
    o = o.mT.unflatten(0, (meta.heads, -1))
    return ((o @ o.mT) * (v @ v.mT)).sum((1, 2)).clamp_min(0).sqrt().cpu().double()


def _squared_columns(matrix: Tensor) -> Tensor:
    """[out, in] -> [in], float64 on the CPU: the squared norm of every column."""
    return matrix.square().sum(0).cpu().double()


def _divide_by_mean(x: Tensor) -> Tensor:
    return x / x.mean().clamp_min(1e-30)


def _divide_by_sum(x: Tensor) -> Tensor:
    return x / x.sum().clamp_min(1e-30)


def _metadata(donor: Donor) -> Metadata:
    assert donor.blueprint.metadata is not None
    return donor.blueprint.metadata
