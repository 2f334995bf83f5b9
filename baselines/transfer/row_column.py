"""Row-column sampling: a model of any width drawn from the rows and columns of one donor (2408.08681)."""

from __future__ import annotations

import functools
import logging
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from baselines.transfer import chains
from baselines.transfer.base import Transfer
from baselines.transfer.chains import Chain, ChainDonor
from baselines.transfer.gather import copy_tensors
from baselines.transfer.growth.base import ends_residual_branch
from baselines.transfer.index_maps import AxisMap, IndexMaps
from baselines.transfer.index_rules import (
    even_layers,
    head_maps,
    multiplicity,
    random_index,
    repeated_layer_list,
    spread_query_heads,
)
from baselines.transfer.sizes import expert_ffn_size, metadata_pair, shared_ffn_size
from zoo.donors.zoo import Zoo
from zoo.errors import UserError
from zoo.options import option
from zoo.streams import stream
from zoo.targets.blueprint import Blueprint
from zoo.tensors import Metadata, TensorSpec
from zoo.vocabularies.build import RULES

log = logging.getLogger(__name__)

CHOICES = {
    "sampling": ("balanced", "iid"),
    "scale": ("1/multiplicity", "n/N", "sqrt(n/N)", "none"),
    "coupling": ("coupled", "uncoupled"),
    "depth": ("share", "repeat", "stack", "silent"),
}
REMOVED_OPTIONS = ("pool", "mix")  # options of samplers that older versions saved


@dataclass(kw_only=True)
class RowColumn(Transfer):
    """Draws the hidden units of a target from the units of a donor (2408.08681).

    In the mean-field limit a trained layer is a distribution of pairs (row, column). Unit i of the target copies unit
    g(i) of the donor: W'_ij = W_g(i)g(j) / c. One map g per hidden space is shared by all matrices that write or read
    the space. Our choice: how g samples and what c is are options, because the paper leaves both open.

    KV groups are drawn whole (K, V and all their query heads), and query heads within a group where the group size
    changes. A target that is a whole number of times larger computes the donor's function exactly, with balanced
    sampling, c = multiplicity and no noise. At other sizes it does so nearly: norms see some coordinates more often
    than others. Noise is on by default because equal copies would receive equal gradients and stay equal.

    `coupling=uncoupled` is the control: it draws rows and columns separately for every tensor, so that only marginal
    distributions are transferred. A target without a config must be a plain chain of matrices (`chains.py`).
    """

    name: ClassVar[str] = "row-column"
    family: ClassVar[str] = "mean-field"
    summary: ClassVar[str] = "rows and columns of a donor, drawn together per hidden space, to any width and depth"
    reference: ClassVar[str] = "2408.08681"
    choices: ClassVar[dict[str, tuple[str, ...]]] = CHOICES

    sampling: str = option("balanced", "how units are drawn: balanced (equally often, up to one) or iid")
    scale: str = option(
        "1/multiplicity", "factor of matrices that read a hidden space: 1/multiplicity, n/N, sqrt(n/N) or none"
    )
    coupling: str = option("coupled", "whether rows and columns share one map: coupled, or uncoupled (the control)")
    noise: float = option(
        0.01, "standard deviation of normal noise on every matrix, relative to the matrix's own", least=0.0
    )
    depth: str = option("share", "copies of a layer: share its output, repeat it, stack the list, or silent copies")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._chain: ChainDonor | None = None

    @property
    def allow_larger(self) -> bool:
        return True

    @property
    def copies_own_shape(self) -> bool:
        return self.coupling == "coupled" and self.sampling == "balanced"

    @property
    def donors(self) -> tuple[str, ...]:
        if self._chain is not None:
            return (self._chain.name,)
        return super().donors

    def planned_donors(self, zoo: Zoo | None, blueprint: Blueprint) -> tuple[str, ...]:
        if blueprint.metadata is None:
            return (chains.choose_chain_donor(zoo, blueprint, self.donor, self.name)[0].name,)
        return super().planned_donors(zoo, blueprint)

    def fit(self, zoo: Zoo | None, blueprint: Blueprint) -> Self:
        self._source, self._chain = None, None
        if blueprint.metadata is None:
            self._chain = chains.read_chain(*chains.choose_chain_donor(zoo, blueprint, self.donor, self.name))
        else:
            super().fit(zoo, blueprint)
        return self

    def sample(self, blueprint: Blueprint, seed: int = 0) -> Iterator[tuple[str, Tensor]]:
        if self._chain is not None:
            drawn = self._sample_chain(self._chain, blueprint, seed)
        elif self.is_copy(blueprint):
            drawn = copy_tensors(self.source, blueprint, self.only)
        else:
            drawn = self._sample_donor(blueprint, seed)
        for name, tensor in drawn:
            if tensor.ndim >= 2 and self.noise and tensor.is_floating_point():
                draws = torch.randn(tensor.shape, generator=stream(seed, f"{self.name}/noise/{name}"))
                tensor = tensor + self.noise * tensor.std(correction=min(1, tensor.numel() - 1)) * draws
            yield name, tensor

    def _sample_donor(self, blueprint: Blueprint, seed: int) -> Iterator[tuple[str, Tensor]]:
        coupled = self._draw_maps(blueprint, stream(seed, f"{self.name}/maps"))

        def maps_of(name: str) -> IndexMaps:
            if self.coupling == "coupled":
                return coupled
            return self._draw_maps(blueprint, stream(seed, f"{self.name}/maps/{name}"))

        shares = self._output_shares(coupled.layers)
        for name, tensor in self.gather(blueprint, maps_of, seed):
            spec = blueprint[name]
            if spec.layer is not None and shares[spec.layer] != 1.0 and ends_residual_branch(spec, blueprint):
                tensor = _scale_output(tensor, shares[spec.layer], spec, blueprint)
            yield name, tensor

    def _sample_chain(self, donor: ChainDonor, blueprint: Blueprint, seed: int) -> Iterator[tuple[str, Tensor]]:
        source, target = donor.chain, chains.trace_chain(blueprint, "target")
        if found := chains.chain_mismatches(source, target):
            raise UserError(f"{self.name}: donor {donor.name!r} does not fit the target: {'; '.join(found)}")

        def axis(space: int, name: str) -> AxisMap:
            n_source, n_target = source.sizes[space], target.sizes[space]
            if space in (0, len(source.matrices)):  # inputs and outputs stay
                return AxisMap(torch.arange(n_source))
            own_stream = f"/{name}" if self.coupling == "uncoupled" else ""
            index = self._draw_index(n_source, n_target, stream(seed, f"{self.name}/maps/{space}{own_stream}"))
            return AxisMap(index, self._read_scale(index, n_source, n_target))

        return chains.gather_chain(source, donor.tensors, target, axis)

    @classmethod
    def current_options(cls, saved: dict[str, Any]) -> dict[str, Any]:
        if saved.get("pool") is not None:
            raise UserError("row-column: this sampler mixes several donors (pool), which was removed; fit a new one")
        saved = {name: value for name, value in saved.items() if name not in REMOVED_OPTIONS}
        if saved.get("vocabulary") not in RULES:  # the option of a pool, which had this name
            saved.pop("vocabulary", None)
        return super().current_options(saved)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """A reference to a donor in files, or all tensors of a module's chain."""
        if self._chain is not None:
            return {"name": self._chain.name, "chain": asdict(self._chain.chain)}, self._chain.tensors
        return super().state()

    def restore(self, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        if "chain" in values:
            self._chain = ChainDonor(values["name"], Chain.from_json(values["chain"]), tensors)
        else:
            super().restore(values, tensors)

    def _draw_index(self, n_source: int, n_target: int, generator: torch.Generator) -> Tensor:
        """[n_target] int64: units of the donor, sorted, or shuffled for `coupling=uncoupled`."""
        if self.sampling == "iid":
            index = torch.randint(n_source, (n_target,), generator=generator).sort().values
        else:
            index = random_index(n_source, n_target, generator)
        return index[torch.randperm(n_target, generator=generator)] if self.coupling == "uncoupled" else index

    def _draw_maps(self, blueprint: Blueprint, generator: torch.Generator) -> IndexMaps:
        source, target = metadata_pair(self.source, blueprint)
        draw_index = functools.partial(self._draw_index, generator=generator)

        def draw_axis(n_source: int, n_target: int) -> AxisMap:
            index = draw_index(n_source, n_target)
            return AxisMap(index, self._read_scale(index, n_source, n_target))

        fixed: dict[str, Any] = self.fixed_maps(blueprint)
        source_queries, target_queries = source.heads // source.kv_heads, target.heads // target.kv_heads
        residual = draw_axis(source.width, target.width)
        heads, kv_heads, ffn, experts, shared = [], [], [], [], []
        for _ in range(target.layers):
            groups = draw_index(source.kv_heads, target.kv_heads)
            queries = spread_query_heads(groups, source_queries, target_queries)
            h, kv = head_maps(source, groups, queries, fixed["head_dim"].index)
            heads.append(AxisMap(h.index, self._read_scale(h.index, source.heads, target.heads)))
            kv_heads.append(kv)
            ffn.append(draw_axis(source.ffn, target.ffn))
            if target.experts:
                experts.append(draw_axis(expert_ffn_size(source), expert_ffn_size(target)))
            if shared_ffn_size(target):
                shared.append(draw_axis(shared_ffn_size(source), shared_ffn_size(target)))
        layers = self._layers(source, target)
        scale = self._embed_scale(source, target)
        fixed |= {"expert_ffn": tuple(experts), "shared_ffn": tuple(shared), "embed_scale": scale}
        return IndexMaps(layers, residual, tuple(heads), tuple(kv_heads), tuple(ffn), **fixed)

    def _read_scale(self, index: Tensor, n_source: int, n_target: int) -> Tensor | float:
        """The factor of the columns of matrices that read a hidden space."""
        if self.scale == "1/multiplicity":
            return 1 / multiplicity(index)
        return {"n/N": n_source / n_target, "sqrt(n/N)": math.sqrt(n_source / n_target), "none": 1.0}[self.scale]

    def _embed_scale(self, source: Metadata, target: Metadata) -> float:
        """Undoes Gemma's multiplication of embeddings by sqrt(width), so that the stream keeps the donor's values."""
        return source.embed_scale / target.embed_scale if self.scale == "1/multiplicity" else 1.0

    def _layers(self, source: Metadata, target: Metadata) -> tuple[int, ...]:
        if self.depth == "stack" and target.layers > source.layers:
            return repeated_layer_list(source.layers, target.layers)
        return even_layers(source.layers, target.layers)

    def _output_shares(self, layers: tuple[int, ...]) -> list[float]:
        """The share of its donor layer's output that each layer of the target writes."""
        if self.depth == "share":
            return [1 / Counter(layers)[layer] for layer in layers]
        if self.depth == "silent":
            return [1.0 if layer not in layers[:i] else 0.0 for i, layer in enumerate(layers)]
        return [1.0] * len(layers)


def _scale_output(tensor: Tensor, share: float, spec: TensorSpec, blueprint: Blueprint) -> Tensor:
    """The tensor that ends a residual branch, with the branch's output multiplied by `share`."""
    offset = blueprint.offset(spec)
    return (tensor + offset) * share - offset
