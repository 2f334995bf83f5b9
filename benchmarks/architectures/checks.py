"""What a transfer method makes of a donor of one architecture, compared with what it promises."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from headstart import samplers
from headstart.generate.sampling import sample_with_defaults
from zoo.checkpoints.writer import write_checkpoint
from zoo.donors.zoo import Zoo, open_standalone
from zoo.errors import UserError
from zoo.sampler import Sampler
from zoo.targets.blueprint import Blueprint
from zoo.targets.configs import meta_model, parse_config, quiet_transformers
from zoo.targets.roles import parse_name
from zoo.tensors import TensorSpec

TOLERANCE = 1e-3  # of logits, relative to their standard deviation; wrong tensors give more than 0.1


@dataclass(frozen=True)
class Outcome:
    """What a method did: `ok`, or not; `text` says what happened."""

    ok: bool
    text: str


def random_donor(folder: Path, model: nn.Module, seed: int = 0) -> Path:
    """Saves a model with noise on every tensor: no gain is one, no bias is zero and no two tensors are equal."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    with quiet_transformers():
        model.save_pretrained(folder)  # type: ignore[operator]
    return folder


def coded_donor(folder: Path, donor: Path) -> tuple[Path, dict[str, float]]:
    """A copy of a donor whose tensors are constants, and {pattern of a name: its constant}.

    Tensors whose names differ in layer or expert alone have the same constant, all others have another.
    """
    shutil.copytree(donor, folder)
    codes: dict[str, float] = {}
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            code = codes.setdefault(_pattern(name), len(codes) + 1.0)
            if tensor.is_floating_point():
                tensors[name] = torch.full_like(tensor, code)
        save_file(tensors, path, metadata={"format": "pt"})
    return folder, codes


def own_shape(method: str, donor: Path, work: Path) -> Outcome:
    """Whether a donor into its own config is the donor, bit for bit."""
    try:
        written = _fill(samplers.get(method)(), open_standalone(donor), Blueprint.from_config(donor), work / method)
    except UserError as error:
        return Outcome(False, f"refused: {error}")
    expected, found = _tensors(donor), _tensors(written)
    shutil.rmtree(written)
    changed = [name for name, tensor in found.items() if not _same_bits(tensor, expected.get(name))]
    if changed:
        return Outcome(False, f"{len(changed)} of {len(found)} tensors differ, the first is {changed[0]}")
    return Outcome(True, "identity")


def same_name_values(sampler: Sampler, donor: Path, codes: dict[str, float], target: dict[str, Any]) -> Outcome:
    """Whether each tensor of a target of another shape only has values of the donor's tensor of its name.

    donor, codes: of `coded_donor`. The sampler must not scale what it copies.
    """
    zoo = open_standalone(donor)
    try:
        blueprint = Blueprint.from_config(target)
        tensors = dict(sampler.fit(zoo, blueprint).sample(blueprint, 0))
    except UserError as error:
        return Outcome(True, f"refused: {error}")
    source = zoo.donors[0].blueprint
    for name, tensor in tensors.items():
        code = codes.get(_pattern(name), math.nan)
        values = _copied_values(blueprint[name], code, source, blueprint)
        if tensor.is_floating_point() and not any(torch.allclose(tensor, torch.full_like(tensor, v)) for v in values):
            return Outcome(False, f"{name} has other values than the donor's tensor of its name")
    drawn = len(blueprint.names) - len(tensors)
    return Outcome(True, "values of the same name" + (f", {drawn} of {len(blueprint.names)} drawn" if drawn else ""))


def same_function(sampler: Sampler, donor: Path, target: dict[str, Any], work: Path) -> Outcome:
    """Whether a grown target computes the donor's function, where the method does not say that it will not."""
    zoo = open_standalone(donor)
    try:
        blueprint = Blueprint.from_config(target)
        written = _fill(sampler, zoo, blueprint, work / sampler.name)
    except UserError as error:
        return Outcome(True, f"refused: {error}")
    if said := sampler.function_differences(blueprint):  # type: ignore[attr-defined]
        return Outcome(True, f"says that the function differs: {said[0]}")
    try:
        before, after = logits(donor), logits(written)
    except Exception as error:  # models that need more inputs than tokens
        return Outcome(True, f"written; no logits from tokens alone ({type(error).__name__})")
    finally:
        shutil.rmtree(written)
    distance = float((before - after).abs().max() / before.std())
    same = distance < TOLERANCE
    return Outcome(same, "same function" if same else f"logits differ by {distance:.1e} of their standard deviation")


@torch.no_grad()
def logits(folder: Path) -> Tensor:
    """[2, 12, V] float64 of fixed tokens."""
    config = Blueprint.from_config(folder).config
    assert config is not None
    cls: Any = type(meta_model(parse_config(config)))
    tokens = torch.arange(3, 27).view(2, 12)
    try:
        return _logits(cls, folder, tokens, torch.float64)
    except RuntimeError:  # a model that mixes dtypes (XGLM's positions)
        return _logits(cls, folder, tokens, torch.float32)


def _logits(cls: Any, folder: Path, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    with quiet_transformers():
        model = cls.from_pretrained(folder, dtype=dtype).eval()
    more = {"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {}
    return model(input_ids=tokens, **more).logits.double()


def _fill(sampler: Sampler, zoo: Zoo, blueprint: Blueprint, folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    write_checkpoint(folder, blueprint, sample_with_defaults(sampler.fit(zoo, blueprint), blueprint, 0))
    return folder


def _pattern(name: str) -> str:
    return parse_name(name)[0] + (".bias" if name.endswith("bias") else "")


def _tensors(folder: Path) -> dict[str, Tensor]:
    return dict(_read(folder))


def _read(folder: Path) -> Iterator[tuple[str, Tensor]]:
    for path in sorted(folder.glob("*.safetensors")):
        yield from load_file(path).items()


def _same_bits(tensor: Tensor, other: Tensor | None) -> bool:
    if other is None or tensor.dtype != other.dtype or tensor.shape != other.shape:
        return False
    return torch.equal(tensor.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def _copied_values(spec: TensorSpec, code: float, donor: Blueprint, target: Blueprint) -> list[float]:
    """The values that a tensor copied from a constant may have.

    A model that multiplies its embeddings by sqrt(width) (Gemma) may have its embedding divided by the ratio of the
    factors, and its final norm multiplied by it where the head is tied.
    """
    assert donor.metadata is not None and target.metadata is not None
    ratio = donor.metadata.embed_scale / target.metadata.embed_scale
    if spec.role == "embed" and spec.parts[0].axes[0] == "vocab":
        return [code, code * ratio]
    if spec.role == "norm" and spec.site == "final":
        offset = target.offset(spec)
        return [code, (code + offset) / ratio - offset]
    return [code]
