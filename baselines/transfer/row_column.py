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
from baselines.transfer.gather import fixed_maps, gather_tensors
from baselines.transfer.growth.base import ends_residual_branch
from baselines.transfer.index_maps import (
    AxisMap,
    IndexMaps,
    even_layers,
    head_maps,
    multiplicity,
    random_index,
    spread_query_heads,
)
from baselines.transfer.sizes import expert_ffn_size
from zoo.donors.zoo import Zoo
from zoo.errors import UserError
from zoo.options import option
from zoo.streams import stream
from zoo.targets.blueprint import Blueprint
from zoo.tensors import Metadata, TensorSpec

log = logging.getLogger(__name__)

CHOICES = {
    "sampling": ("balanced", "iid"),
    "scale": ("1/multiplicity", "n/N", "sqrt(n/N)", "none"),
    "coupling": ("coupled", "uncoupled"),
    "depth": ("share", "repeat", "stack", "silent"),
}
REMOVED_OPTIONS = ("pool", "mix", "vocabulary")  # options of samplers that older versions saved


@dataclass(kw_only=True)
class RowColumn(Transfer):
    """The mean-field limit of a trained layer is a law over pairs (row, column): unit i of the target is unit g(i) of
    the donor, with one map g per hidden space shared by what writes it and what reads it, W'_ij = W_g(i)g(j) / c.
    The published text leaves sampling and c open [R]; they are options here.

    KV groups are drawn whole (K, V and all their query heads), and query heads within them where the group size
    changes. With balanced sampling, c = multiplicity and no noise, a whole-number growth preserves the donor's
    function exactly, and any other growth nearly (a normalisation sees some coordinates more often than others).
    Copies that are equal stay equal in training, hence the noise.

    `coupling=uncoupled` draws rows and columns apart, tensor by tensor: the control, which transfers nothing but
    marginals. A target without a config is a plain chain of matrices (`chains.py`).
    """

    name: ClassVar[str] = "row-column"
    family: ClassVar[str] = "mean-field"
    summary: ClassVar[str] = "rows and columns of donors, drawn together per hidden space, to any width and depth"
    reference: ClassVar[str] = "2408.08681"
    choices: ClassVar[dict[str, tuple[str, ...]]] = CHOICES

    sampling: str = option("balanced", "of units: balanced (equally often, up to one) or iid")
    scale: str = option("1/multiplicity", "of what reads a hidden space: 1/multiplicity, n/N, sqrt(n/N) or none")
    coupling: str = option("coupled", "rows and columns of a hidden space: coupled, or uncoupled (the control)")
    noise: float = option(0.01, "normal noise on every matrix, relative to its standard deviation", least=0.0)
    depth: str = option("share", "copies of a layer: share its output, repeat it, stack the list, or silent copies")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._chain: ChainDonor | None = None

    @property
    def grows(self) -> bool:
        return True

    @property
    def donors(self) -> tuple[str, ...]:
        if self._chain is not None:
            return (self._chain.name,)
        return super().donors

    def reads(self, zoo: Zoo | None, blueprint: Blueprint) -> tuple[str, ...]:
        if blueprint.metadata is None:
            return (chains.choose_chain_donor(zoo, blueprint, self.donor, self.name)[0].name,)
        return super().reads(zoo, blueprint)

    def fit(self, zoo: Zoo | None, blueprint: Blueprint) -> Self:
        self._source, self._chain = None, None
        if blueprint.metadata is None:
            self._chain = chains.read_chain(*chains.choose_chain_donor(zoo, blueprint, self.donor, self.name))
        else:
            super().fit(zoo, blueprint)
        return self

    def sample(self, blueprint: Blueprint, seed: int = 0) -> Iterator[tuple[str, Tensor]]:
        if self._chain is not None:
            drawn = self._of_chain(self._chain, blueprint, seed)
        else:
            drawn = self._of_donor(blueprint, seed)
        for name, tensor in drawn:
            if tensor.ndim >= 2 and self.noise:
                draws = torch.randn(tensor.shape, generator=stream(seed, f"{self.name}/noise/{name}"))
                tensor = tensor + self.noise * tensor.std(correction=min(1, tensor.numel() - 1)) * draws
            yield name, tensor

    def _of_donor(self, blueprint: Blueprint, seed: int) -> Iterator[tuple[str, Tensor]]:
        coupled = self._maps(blueprint, stream(seed, f"{self.name}/maps"))

        def maps(name: str) -> IndexMaps:
            apart = self.coupling == "uncoupled"
            return self._maps(blueprint, stream(seed, f"{self.name}/maps/{name}")) if apart else coupled

        shares = self._shares(coupled.layers)
        for name, tensor in gather_tensors(self.source, blueprint, maps, seed, self.name):
            spec = blueprint[name]
            if spec.layer is not None and shares[spec.layer] != 1.0 and ends_residual_branch(spec, blueprint):
                tensor = _scale_output(tensor, shares[spec.layer], spec, blueprint)
            yield name, tensor

    def _of_chain(self, donor: ChainDonor, blueprint: Blueprint, seed: int) -> Iterator[tuple[str, Tensor]]:
        source, target = donor.chain, chains.trace_chain(blueprint, "target")
        if found := chains.chain_mismatches(source, target):
            raise UserError(f"{self.name}: donor {donor.name!r} does not fit the target: {'; '.join(found)}")

        def axis(space: int, name: str) -> AxisMap:
            n, N = source.sizes[space], target.sizes[space]
            if space in (0, len(source.matrices)):  # inputs and outputs are what they are
                return AxisMap(torch.arange(n))
            apart = f"/{name}" if self.coupling == "uncoupled" else ""
            chosen = self._index(n, N, stream(seed, f"{self.name}/maps/{space}{apart}"))
            return AxisMap(chosen, self._scale(chosen, n, N))

        return chains.gather_chain(source, donor.tensors, target, axis)

    @classmethod
    def current_options(cls, saved: dict[str, Any]) -> dict[str, Any]:
        if saved.get("pool") is not None:
            raise UserError("row-column: this sampler mixes several donors (pool), which was removed; fit a new one")
        return {name: value for name, value in saved.items() if name not in REMOVED_OPTIONS}

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """A donor in files is named, a module's chain is kept."""
        if self._chain is not None:
            return {"name": self._chain.name, "chain": asdict(self._chain.chain)}, self._chain.tensors
        return super().state()

    def restore(self, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        if "chain" in values:
            self._chain = ChainDonor(values["name"], Chain.from_json(values["chain"]), tensors)
        else:
            super().restore(values, tensors)

    def _index(self, t: int, s: int, generator: torch.Generator) -> Tensor:
        """[s] int64: units drawn from t; sorted, but where rows and columns must not agree."""
        if self.sampling == "iid":
            chosen = torch.randint(t, (s,), generator=generator).sort().values
        else:
            chosen = random_index(t, s, generator)
        return chosen[torch.randperm(s, generator=generator)] if self.coupling == "uncoupled" else chosen

    def _maps(self, blueprint: Blueprint, generator: torch.Generator) -> IndexMaps:
        source, target = self.source.blueprint.metadata, blueprint.metadata
        assert source is not None and target is not None
        index = functools.partial(self._index, generator=generator)

        def axis(t: int, s: int) -> AxisMap:
            chosen = index(t, s)
            return AxisMap(chosen, self._scale(chosen, t, s))

        tables: dict[str, Any] = fixed_maps(self.source, blueprint, self.rows(blueprint))
        per_group, wanted = source.heads // source.kv_heads, target.heads // target.kv_heads
        residual = axis(source.width, target.width)
        heads, kv_heads, ffn, experts = [], [], [], []
        for _ in range(target.layers):
            groups = index(source.kv_heads, target.kv_heads)
            h, kv = head_maps(source, groups, spread_query_heads(groups, per_group, wanted), tables["head_dim"].index)
            heads.append(AxisMap(h.index, self._scale(h.index, source.heads, target.heads)))
            kv_heads.append(kv)
            ffn.append(axis(source.ffn, target.ffn))
            if target.experts:
                experts.append(axis(expert_ffn_size(source), expert_ffn_size(target)))
        layers = self._layers(source, target)
        scale = self._embed_scale(source, target)
        return IndexMaps(
            layers, residual, tuple(heads), tuple(kv_heads), tuple(ffn), tuple(experts), embed_scale=scale, **tables
        )

    def _scale(self, index: Tensor, n: int, N: int) -> Tensor | float:
        """What the readers of a space of n donor units and N target units multiply their columns by."""
        if self.scale == "1/multiplicity":
            return 1 / multiplicity(index)
        return {"n/N": n / N, "sqrt(n/N)": math.sqrt(n / N), "none": 1.0}[self.scale]

    def _embed_scale(self, source: Metadata, target: Metadata) -> float:
        """Gemma multiplies its embeddings by sqrt(width): undone, so that the stream keeps the donor's values."""
        return source.embed_scale / target.embed_scale if self.scale == "1/multiplicity" else 1.0

    def _layers(self, source: Metadata, target: Metadata) -> tuple[int, ...]:
        if self.depth == "stack" and target.layers > source.layers:
            return tuple(i % source.layers for i in range(target.layers))
        return even_layers(source.layers, target.layers)

    def _shares(self, layers: tuple[int, ...]) -> list[float]:
        """What each layer of the target writes of its donor layer's output."""
        if self.depth == "share":
            return [1 / Counter(layers)[layer] for layer in layers]
        if self.depth == "silent":
            return [1.0 if layer not in layers[:i] else 0.0 for i, layer in enumerate(layers)]
        return [1.0] * len(layers)


def _scale_output(tensor: Tensor, share: float, spec: TensorSpec, blueprint: Blueprint) -> Tensor:
    one = blueprint.offset(spec)
    return (tensor + one) * share - one
