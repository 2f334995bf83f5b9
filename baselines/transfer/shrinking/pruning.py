"""Structured pruning without training, as an initialisation (2310.06694, 2403.03853, 2407.14679)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from baselines.calibration import load_model, observe_inputs, run_windows
from baselines.transfer.gather import copy_tensors
from baselines.transfer.index_maps import IndexMaps
from baselines.transfer.matching import DonorParts
from baselines.transfer.shrinking.base import KeptParts, Shrinking, select_layers, select_parts, spread_ratio
from baselines.transfer.shrinking.importance import Scores, score_by_activations
from baselines.transfer.shrinking.kept_scores import kept_or_scored
from baselines.transfer.sizes import metadata_pair
from zoo.errors import UserError
from zoo.options import option
from zoo.targets.blueprint import Blueprint
from zoo.tensors import join_parts, split_parts

if TYPE_CHECKING:
    from zoo.donors.donor import Donor

MAX_GRAM_ENTRIES = 1 << 27  # entries of second moments in memory; more take several passes over the text
WRITER_INPUTS = {"attn.o": "heads", "mlp.down": "ffn"}


@dataclass(kw_only=True)
class Pruning(Shrinking):
    """Removes the least important parts of a larger donor (2407.14679, 2310.06694):

    layers     by block influence on a text (ShortGPT, 2403.03853), or those in the middle, or evenly
    KV groups  whole, by |o v| of their heads; query heads within a group likewise
    neurons    by mean |activation| on a text, or without one by |gate| |up| |down|
    residual   by mean |activation| on a text, or without one by norms of what writes and reads; or every n-th

    `correct` multiplies the gain of each norm by sqrt(e n_source / n_target), where e is the share of the norm's input
    in the kept coordinates, measured on the text or estimated from the weights. The kept coordinates then have the same
    values as in the donor, and removing coordinates that do nothing changes nothing.

    `compensate` refits o and down of every layer by ridge regression, so that they write from the kept inputs what the
    donor's write on the text. It is off by default: it helps short training, but made results worse in one study. The
    refitted matrices are in memory and in the saved sampler.
    """

    name: ClassVar[str] = "pruning"
    family: ClassVar[str] = "pruning"
    summary: ClassVar[str] = "a larger donor without its least important layers, heads, neurons and coordinates"
    reference: ClassVar[str] = "2407.14679"
    choices: ClassVar[dict[str, tuple[str, ...]]] = {
        "layers": ("auto", "influence", "middle", "even"),
        "residual": ("importance", "index"),
    }

    layers: str = option(
        "auto",
        "which layers go: influence (least, needs text), middle, even; auto: influence with a text",
    )
    residual: str = option("importance", "which residual coordinates stay: by importance, or every n-th by index")
    correct: bool = option(True, "gains of norms are corrected for the coordinates that are gone")
    compensate: bool = option(False, "refit o and down to the donor's outputs on the text")
    ridge: float = option(1e-3, "ridge penalty of the refit, relative to the mean square of its inputs", above=0.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._gains: dict[str, float] = {}  # by name in the target, of norms
        self._refitted: dict[str, Tensor] = {}  # by name in the target, as on disk
        for setting, is_set in (("layers=influence", self.layers == "influence"), ("compensate", self.compensate)):
            if is_set and self.text is None:
                raise UserError(f"{self.name}: {setting} needs a text: give a UTF-8 file with --set text=FILE")

    def extra_mismatches(self, donor: Donor, blueprint: Blueprint) -> list[str]:
        found = super().extra_mismatches(donor, blueprint)
        assert donor.blueprint.metadata is not None
        if self.compensate and donor.blueprint.metadata.experts:
            found.append("it has experts, whose outputs cannot be refitted: leave compensate out")
        return found

    def _choose_parts(self, blueprint: Blueprint, windows: Tensor | None) -> KeptParts:
        source, target = metadata_pair(self.source, blueprint)
        scores = kept_or_scored(self.source, self.device)
        model = None
        if windows is not None:
            model = load_model(self.source, self.device)
            scores = replace(score_by_activations(model, self.source, windows, scores), heads=scores.heads)
        rule = self.layers if self.layers != "auto" else "middle" if windows is None else "influence"
        layers = select_layers(rule, scores.influence, source.layers, target.layers)
        self._kept = select_parts(scores, layers, source, target, self.residual == "index")
        maps = self.index_maps(blueprint, rescale=False)
        self._gains = norm_gains(self.source, blueprint, maps, scores) if self.correct else {}
        self._refitted = {}
        if self.compensate and model is not None and windows is not None:
            self._refitted = refit_outputs(self.source, model, windows, blueprint, maps, self.ridge)
        return self._kept

    def sample(self, blueprint: Blueprint, seed: int = 0) -> Iterator[tuple[str, Tensor]]:
        if self.is_copy(blueprint):
            yield from copy_tensors(self.source, blueprint, self.only)
            return
        maps = self.index_maps(blueprint, rescale=False)
        assert blueprint.metadata is not None
        offset = blueprint.metadata.gain_offset
        for name, tensor in self.gather(blueprint, lambda _: maps, seed):
            if name in self._gains:
                tensor = (tensor + offset) * self._gains[name] - offset
            yield name, self._refitted.get(name, tensor)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        values, tensors = super().state()
        return values | {"gains": self._gains}, tensors | {f"refitted.{k}": t for k, t in self._refitted.items()}

    def restore(self, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        super().restore(values, tensors)
        self._gains = dict(values["gains"])
        self._refitted = {k.removeprefix("refitted."): t for k, t in tensors.items() if k.startswith("refitted.")}


def norm_gains(donor: Donor, blueprint: Blueprint, maps: IndexMaps, scores: Scores) -> dict[str, float]:
    """Disk name -> the factor sqrt(e n_source / n_target) of the gain, for norms that lose coordinates."""
    source, gains = DonorParts(donor.blueprint, blueprint), {}
    for spec, part in blueprint.find("norm"):
        index = maps.axis(part.axes[0], spec.layer).index
        match = source.find(spec, part, None if spec.layer is None else maps.layers[spec.layer], None)
        assert match is not None, spec.name  # `donor_choice.mismatches` refuses such a donor
        energy = scores.energy[match[0].name]
        if len(index) < len(energy):
            gains[spec.name] = spread_ratio(len(energy), len(index)) * float(energy[index].sum()) ** 0.5
    return gains


def refit_outputs(
    donor: Donor, model: nn.Module, windows: Tensor, blueprint: Blueprint, maps: IndexMaps, ridge: float
) -> dict[str, Tensor]:
    """Disk name -> refitted tensor, for every o and down of the target that reads fewer coordinates than the donor's.

    Let x be the donor's input of such a matrix W on the text, x_k its kept coordinates, and W_k the gathered matrix.
    The refit W' minimises E|W x - W' x_k|^2 + ridge E[x_k^2] |W' - W_k|^2, in closed form from E[x x^T]. A bias
    stays.
    """
    source, to_refit = DonorParts(donor.blueprint, blueprint), []
    for role, axis in WRITER_INPUTS.items():
        for spec, part in blueprint.find(role):
            assert spec.layer is not None
            match = source.find(spec, part, maps.layers[spec.layer], None)
            assert match is not None, spec.name  # `donor_choice.mismatches` refuses such a donor
            donor_spec, donor_part = match
            if part.shape[1] < donor_part.shape[1]:
                to_refit.append((spec, maps.axis(axis, spec.layer).index, donor_spec, donor_part.shape[1]))
    found: dict[str, Tensor] = {}
    per_pass = max(1, MAX_GRAM_ENTRIES // max((size**2 for *_, size in to_refit), default=1))
    for start in range(0, len(to_refit), per_pass):
        batch = to_refit[start : start + per_pass]
        grams = second_moments(model, {donor_spec.name: size for _, _, donor_spec, size in batch}, windows)
        for spec, index, donor_spec, _ in batch:
            gram = grams.pop(donor_spec.name)  # [n_source, n_source]
            matrix = split_parts(donor_spec, donor.read(donor_spec.name, torch.float32))[donor_spec.role]
            matrix = matrix.index_select(0, maps.residual.index).to(gram)
            index = index.to(gram.device)
            kept = gram[index][:, index]
            weight = ridge * kept.diagonal().mean().clamp_min(1e-30) * torch.eye(len(index)).to(gram)
            right = matrix @ gram[:, index] + matrix[:, index] @ weight
            fitted = torch.linalg.solve(kept + weight, right, left=False)
            found[spec.name] = join_parts(spec, {spec.role: fitted.float().cpu()})
    return found


def second_moments(model: nn.Module, sizes: dict[str, int], windows: Tensor) -> dict[str, Tensor]:
    """Disk name of a matrix -> E[x x^T] [n, n] of its inputs x on the windows, on the model's device.

    windows: int64 [B, S]; sizes: the n of each matrix. In float64 where the device has it.
    """
    device = next(model.parameters()).device
    wide = torch.float32 if device.type == "mps" else torch.float64
    sums = {name: torch.zeros(n, n, dtype=wide, device=device) for name, n in sizes.items()}

    def add(name: str) -> Callable[[Tensor], None]:
        def add_input(x: Tensor) -> None:
            x = x.flatten(0, -2)
            sums[name] += (x.mT @ x).to(wide)

        return add_input

    with observe_inputs(model, {name: add(name) for name in sizes}):
        run_windows(model, windows)
    return {name: total / windows.numel() for name, total in sums.items()}
