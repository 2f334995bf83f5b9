"""The table of methods: one explicit dict from name to class, imported when asked for."""

from __future__ import annotations

import json
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.errors import UserError, unknown

if TYPE_CHECKING:
    from zoo.lora.adapters import LoraSampler
    from zoo.sampler import Sampler

METHODS: dict[str, tuple[str, str]] = {
    "default": ("baselines.schemes.default", "Default"),
    "gpt2": ("baselines.schemes.rules", "GPT2"),
    "truncated-normal": ("baselines.schemes.rules", "TruncatedNormal"),
    "scaled-default": ("baselines.schemes.rules", "ScaledDefault"),
    "identity": ("baselines.schemes.rules", "Identity"),
    "normal": ("baselines.distributions.parametric", "Normal"),
    "laplace": ("baselines.distributions.parametric", "Laplace"),
    "student-t": ("baselines.distributions.parametric", "StudentT"),
    "generalized-normal": ("baselines.distributions.parametric", "GeneralizedNormal"),
    "stable": ("baselines.distributions.parametric", "Stable"),
    "mixture": ("baselines.distributions.parametric", "Mixture"),
    "auto-fit": ("baselines.distributions.auto_fit", "AutoFit"),
    "matrix-normal": ("baselines.distributions.matrix_normal", "MatrixNormal"),
    "conv-covariance": ("baselines.distributions.conv_covariance", "ConvCovariance"),
    "histogram": ("baselines.distributions.empirical", "Histogram"),
    "kde": ("baselines.distributions.empirical", "KDE"),
    "permuted": ("baselines.distributions.empirical", "Permuted"),
    "hybrid": ("baselines.distributions.hybrid", "Hybrid"),
    "mimetic": ("baselines.schemes.mimetic", "Mimetic"),
    "weight-selection": ("baselines.transfer.weight_selection", "WeightSelection"),
    "subcloning": ("baselines.transfer.shrinking.subcloning", "Subcloning"),
    "pruning": ("baselines.transfer.shrinking.pruning", "Pruning"),
    "learned-pruning": ("baselines.transfer.shrinking.learned_pruning", "LearnedPruning"),
    "sliced": ("baselines.transfer.shrinking.sliced", "Sliced"),
    "net2wider": ("baselines.transfer.growth.net2wider", "Net2Wider"),
    "hypercloning": ("baselines.transfer.growth.hypercloning", "HyperCloning"),
    "stacking": ("baselines.transfer.growth.stacking", "Stacking"),
    "row-column": ("baselines.transfer.row_column", "RowColumn"),
    "autoencoder": ("autoencoder.sampler", "AutoencoderSampler"),
    "diffusion": ("diffusion.sampler", "DiffusionSampler"),
    "pareto": ("baselines.lora.pareto", "Pareto"),
    "peft-default": ("baselines.lora.peft_inits", "PeftDefault"),
    "pissa": ("baselines.lora.peft_inits", "PiSSA"),
    "olora": ("baselines.lora.peft_inits", "OLoRA"),
    "orthogonal": ("baselines.lora.peft_inits", "Orthogonal"),
    "gaussian": ("baselines.lora.peft_inits", "Gaussian"),
}


LORA = ("pareto", "peft-default", "pissa", "olora", "orthogonal", "gaussian")  # fill adapters, not models


def get(name: str) -> type[Sampler]:
    """The sampler class called `name`, or `package.module.Class` for one of your own, which is imported, from the
    working directory too. Raises UserError with the nearest name if there is none."""
    if name in METHODS:
        module, attribute = METHODS[name]
        return getattr(import_module(module), attribute)
    if "." not in name:
        raise unknown("method", name, METHODS)
    return _own(name)


def model_sampler(name: str) -> type[Sampler]:
    """`get` for what fills models. UserError besides for a LoRA method, with the command that takes it."""
    cls = get(name)
    if cls.family == "lora":
        raise UserError(f"{name} fills LoRA adapters, not models: use `headstart lora --base MODEL --method {name}`")
    return cls


def lora_sampler(name: str) -> type[LoraSampler]:
    """`get` for what fills LoRA adapters. UserError besides for any other method, with the names of those that do."""
    from zoo.lora.adapters import LoraSampler

    cls = get(name)
    if not issubclass(cls, LoraSampler):
        raise UserError(f"{name} fills models, not LoRA adapters: choose from {', '.join(LORA)}")
    return cls


def _own(path: str) -> type[Sampler]:
    from zoo.sampler import Sampler

    module, _, attribute = path.rpartition(".")
    if os.getcwd() not in sys.path:  # `python -m` has it there, the command does not; last, so that it hides nothing
        sys.path.append(os.getcwd())
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"method {path}: cannot be imported ({error}); write it as package.module.Class") from error
    if not (isinstance(found, type) and issubclass(found, Sampler)):
        raise UserError(f"method {path}: is no subclass of zoo.sampler.Sampler")
    return found


def describe() -> list[dict[str, Any]]:
    """The list that `headstart methods --json` prints: {name, family, summary, reference, needs, options} each."""
    rows = []
    for name in METHODS:
        method = get(name)
        rows.append(
            {
                "name": method.name,
                "family": method.family,
                "summary": method.summary,
                "reference": method.reference,
                "needs": list(method.needs),
                "options": method.option_table(),
            }
        )
    return rows


def load(folder: Path) -> Sampler:
    """A fitted sampler that `Sampler.save` wrote."""
    path = Path(folder) / "sampler.json"
    if not path.is_file():
        raise UserError(f"{folder}: has no sampler.json; give a folder that a fitted sampler was saved to")
    return get(json.loads(path.read_text())["method"]).load(Path(folder))
