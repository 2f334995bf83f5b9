"""How much each part of a donor matters: its residual coordinates, neurons, heads and layers.

`score_by_weights` uses the weights alone, `score_by_activations` what the parts do on a calibration text.
Letters: L layers, d width, F neurons, E neurons of an expert, H query heads, K KV groups, h head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from baselines.calibration import (
    block_path,
    first_input,
    module_holding,
    observe_inputs,
    run_windows,
)
from baselines.transfer.matching import norms_before_head, stack_of
from zoo.linear_algebra import descending_order
from zoo.tensors import Metadata, Part, split_parts
from zoo.units.decoder import site_readers

if TYPE_CHECKING:
    from zoo.donors.donor import Donor


@dataclass(frozen=True)
class Scores:
    """Importance scores, float64 on the CPU. A larger score matters more; a part that does nothing has zero."""

    residual: Tensor  # [d]
    ffn: Tensor  # [L, F]; [L, 0] where there are only experts
    heads: Tensor  # [L, H]
    expert_ffn: Tensor  # [L, E], the experts of a layer together; [L, 0] without experts
    energy: Mapping[str, Tensor]  # by name of a norm [n], sums to 1: the share of each coordinate in the norm's input
    shared_ffn: Tensor = field(default_factory=lambda: torch.zeros(0, 0))  # [L, S], of the MLP beside the experts
    influence: Tensor | None = None  # [L] block influence 1 - E cos(x_l, x_l+1) (ShortGPT, 2403.03853); needs a text

    def groups(self, kv_heads: int) -> Tensor:
        """[L, K]: the root of the sum of squares of the scores of a KV group's heads."""
        return self.heads.unflatten(1, (kv_heads, -1)).square().sum(-1).sqrt()


def top_indices(scores: Tensor, count: int) -> Tensor:
    """[count] int64: the places of the largest of [n] scores, in their original order; the first of equal ones (to
    rounding)."""
    return descending_order(scores)[:count].sort().values


def score_by_weights(donor: Donor, device: str = "cpu") -> Scores:
    """Scores from norms of weights. At most the matrices of one layer are in memory.

    residual   |what writes the coordinate| |what reads it|, every matrix divided by its mean
    ffn        |gate_i| |up_i| |down_i|, without a gate |up_i| |down_i|; the experts of a layer are added up
    heads      |o_h v_g|, the Frobenius norm of the map from the stream to itself
    energy     squares of what writes each coordinate, every matrix divided by its mean

    Matrices that read the stream are multiplied by the gain of the norm before them.
    """
    meta = _metadata(donor)
    scorer = _WeightScorer(donor, device, meta)
    scorer.add_vocabulary()
    layers = [scorer.add_layer(layer) for layer in range(meta.layers)]
    for spec, _ in donor.blueprint.find("norm"):
        scorer.energy.setdefault(spec.name, _divide_by_sum(scorer.writes))
    none = torch.zeros(meta.layers, 0, dtype=torch.float64)
    ffn = torch.stack([neurons["ffn"] for neurons, _ in layers])
    shared = [neurons["shared_ffn"] for neurons, _ in layers if "shared_ffn" in neurons]
    return Scores(
        residual=(scorer.writes * scorer.reads).sqrt(),
        ffn=none if meta.experts else ffn,
        heads=torch.stack([heads for _, heads in layers]),
        expert_ffn=ffn if meta.experts else none,
        energy=scorer.energy,
        shared_ffn=torch.stack(shared) if shared else none,
    )


class _WeightScorer:
    """Sums over the matrices of a donor, layer by layer. Squares of norms, float64 on the CPU."""

    def __init__(self, donor: Donor, device: str, meta: Metadata) -> None:
        self.donor, self.blueprint, self.device, self.meta = donor, donor.blueprint, device, meta
        self.writes = torch.zeros(meta.width, dtype=torch.float64)  # [d]: of what writes each residual coordinate
        self.reads = torch.zeros(meta.width, dtype=torch.float64)  # [d]: of what reads it
        self.energy: dict[str, Tensor] = {}
        blocks = [spec for spec, _ in self.blueprint.find("attn.o")]
        self.stacks = list(dict.fromkeys(stack_of(spec) for spec in blocks))  # an encoder-decoder has two

    def matrices(
        self, role: str, layer: int | None = None, site: str | None = None, stack: str | None = None
    ) -> Iterator[Tensor]:
        """The matrices [out, in] of a role, on the device; one per expert. stack: of `stacks`, None for all."""
        yield from (matrix for _, matrix in self.parts(role, layer, site, stack))

    def parts(
        self, role: str, layer: int | None = None, site: str | None = None, stack: str | None = None
    ) -> Iterator[tuple[Part, Tensor]]:
        """`matrices` with the part that each of them is."""
        for spec, part in self.blueprint.find(role, layer=layer, site=site):
            if stack is None or stack_of(spec) == stack:
                yield part, split_parts(spec, self.donor.read(spec.name, torch.float32))[role].to(self.device)

    def gain(self, layer: int, site: str, stack: str) -> Tensor | float:
        return next((g + self.meta.gain_offset for g in self.matrices("norm", layer, site, stack)), 1.0)

    def add_vocabulary(self) -> None:
        """Adds embeddings to `writes` and the head to `reads`. A donor without a head reads nothing there."""
        for table in self.matrices("embed"):
            self.writes += _divide_by_mean(_squared_columns(table))
        final: Tensor | float = 1.0
        for name in norms_before_head(self.blueprint):
            if self.blueprint[name].kind == "weight":
                final = self.donor.read(name, torch.float32).to(self.device) + self.meta.gain_offset
        if not self.blueprint.has_head:
            return
        for head in self.matrices("head" if self.blueprint.find("head") else "embed"):
            if head.shape[0] == self.meta.vocab:
                self.reads += _divide_by_mean(_squared_columns(head * final))

    def add_layer(self, layer: int) -> tuple[dict[str, Tensor], Tensor]:
        """Adds a layer of every stack to `writes`, `reads` and `energy`.

        Returns the scores of its neurons (`ffn` [F or E], `shared_ffn` [S] beside experts) and heads [H], added up over
        the stacks, which share one index map.
        """
        scores = [self._add_block(layer, stack) for stack in self.stacks]
        neurons = {axis: torch.stack([found[axis] for found, _ in scores]).sum(0) for axis in scores[0][0]}
        return neurons, torch.stack([h for _, h in scores]).sum(0)

    def _add_block(self, layer: int, stack: str) -> tuple[dict[str, Tensor], Tensor]:
        """`add_layer` for one stack."""
        gains = {f"attn.{r}": self.gain(layer, "attn", stack) for r in ("q", "k", "v")}
        mlp = "attn" if "up" in site_readers(self.meta, "attn") else "mlp"
        gains |= {f"mlp.{r}": self.gain(layer, mlp, stack) for r in ("gate", "up")}
        rows: dict[str, list[Tensor]] = {}  # role -> squared norms of the rows, one entry per expert
        neurons: dict[tuple[str, str], list[Tensor]] = {}  # (axis, role) -> squared norms of the neurons, likewise
        for role in gains:
            for part, matrix in self.parts(role, layer, stack=stack):
                self.reads += _divide_by_mean(_squared_columns(matrix * gains[role]))
                rows.setdefault(role, []).append(_squared_columns((matrix * gains[role]).mT))
                neurons.setdefault((part.axes[0], role), []).append(rows[role][-1])
        for role in ("attn.o", "mlp.down"):
            for part, matrix in self.parts(role, layer, stack=stack):
                self.writes += _divide_by_mean(_squared_columns(matrix.mT))
                rows.setdefault(role, []).append(_squared_columns(matrix.mT))
                if role == "mlp.down":
                    neurons.setdefault((part.axes[1], role), []).append(_squared_columns(matrix))
        values, outputs = self.matrices("attn.v", layer, stack=stack), self.matrices("attn.o", layer, stack=stack)
        heads = [_head_norms(v * gains["attn.v"], o, self.meta) for v, o in zip(values, outputs, strict=True)]
        for site, role in {"q": "attn.q", "k": "attn.k", "attn.out": "attn.o", "mlp.out": "mlp.down"}.items():
            for spec, part in self.blueprint.find("norm", layer=layer, site=site):
                if stack_of(spec) == stack:
                    total = torch.stack(rows[role]).sum(0).view(-1, part.shape[0]).sum(0)
                    self.energy[spec.name] = _divide_by_sum(total)
        scores = {axis: _neuron_scores(neurons, axis) for axis, role in neurons if role == "mlp.up"}
        return scores, torch.stack(heads).sum(0)


def score_by_activations(model: nn.Module, donor: Donor, windows: Tensor, weights: Scores) -> Scores:
    """Scores from a calibration text.

    model: the donor, loaded; windows: int64 [B, S]; weights: scores by weights, kept where nothing is measured.

    residual   mean |x| of the stream before every block, each divided by its mean over the coordinates
    ffn        mean |input of down| (experts cannot be observed: theirs stay)
    heads      mean |input of o|
    energy     mean share of each coordinate in the square of a norm's input (centred for LayerNorm)
    influence  1 - the mean cosine between the stream before and after a block (ShortGPT, 2403.03853)
    """
    meta = _metadata(donor)
    means = _RunningMeans()
    with ExitStack() as stack:
        for handle in _observe_blocks(model, donor, means):
            stack.callback(handle.remove)
        stack.enter_context(observe_inputs(model, _readers(donor, means)))
        run_windows(model, windows)
    layers = range(meta.layers)
    return replace(
        weights,
        residual=torch.stack([_divide_by_mean(means.mean("stream", i)) for i in layers]).mean(0),
        ffn=weights.ffn if meta.experts else torch.stack([means.mean("ffn", i) for i in layers]),
        heads=torch.stack([means.mean("heads", i).unflatten(0, (meta.heads, -1)).mean(-1) for i in layers]),
        energy={**weights.energy, **{key[1]: means.mean(*key) for key in means.sums if key[0] == "norm"}},
        influence=torch.cat([means.mean("influence", i) for i in layers]),
    )


@dataclass
class _RunningMeans:
    """Means over tokens, float64 on the CPU."""

    sums: dict[Any, Tensor] = field(default_factory=dict)
    counts: dict[Any, int] = field(default_factory=dict)

    def add(self, key: Any, values: Tensor) -> None:
        """Adds values [..., n]: one row per token."""
        values = values.flatten(0, -2) if values.ndim > 1 else values[:, None]
        self.sums[key] = self.sums.get(key, 0.0) + values.sum(0).cpu().double()
        self.counts[key] = self.counts.get(key, 0) + len(values)

    def mean(self, *key: Any) -> Tensor:
        return self.sums[key] / self.counts[key]


def _readers(donor: Donor, means: _RunningMeans) -> dict[str, Callable[[Tensor], None]]:
    """Tensor name -> what adds the input of the tensor's module to the means."""
    blueprint, meta = donor.blueprint, _metadata(donor)

    def add_share(name: str) -> Callable[[Tensor], None]:
        def add(x: Tensor) -> None:
            x = x - x.mean(-1, keepdim=True) if meta.norm == "layer" else x
            means.add(("norm", name), x.square() / x.square().sum(-1, keepdim=True).clamp_min(1e-30))

        return add

    def add_size(key: tuple[str, int]) -> Callable[[Tensor], None]:
        return lambda x: means.add(key, x.abs())

    readers = {spec.name: add_share(spec.name) for spec, _ in blueprint.find("norm")}
    readers |= {spec.name: add_size(("heads", spec.layer or 0)) for spec, _ in blueprint.find("attn.o")}
    if not meta.experts:
        readers |= {spec.name: add_size(("ffn", spec.layer or 0)) for spec, _ in blueprint.find("mlp.down")}
    return readers


def _observe_blocks(model: nn.Module, donor: Donor, means: _RunningMeans) -> Iterator[Any]:
    """Hooks every block, so that the stream before it and its influence are added to the means; yields the handles."""
    for spec, _ in donor.blueprint.find("attn.o"):

        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any, layer: int = spec.layer or 0) -> None:
            x, y = first_input(args, kwargs), output[0] if isinstance(output, tuple) else output
            means.add(("stream", layer), x.abs())
            means.add(("influence", layer), 1 - F.cosine_similarity(x.float(), y.float(), dim=-1).flatten())

        block = module_holding(model, f"{block_path(spec.name)}.weight")
        yield block.register_forward_hook(hook, with_kwargs=True)


def _neuron_scores(squares: Mapping[tuple[str, str], list[Tensor]], axis: str) -> Tensor:
    """[n]: the product of the norms of each neuron of an axis, added up over experts. squares: by (axis, role)."""
    product = torch.stack(squares[axis, "mlp.up"])
    if (axis, "mlp.gate") in squares:
        product = product * torch.stack(squares[axis, "mlp.gate"])
    return (product * torch.stack(squares[axis, "mlp.down"])).sqrt().sum(0)


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
