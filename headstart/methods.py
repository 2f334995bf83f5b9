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
    from zoo.lora import LoraSampler
    from zoo.sampler import Sampler

METHODS: dict[str, tuple[str, str]] = {
    "default": ("baselines.default", "Default"),
    "gpt2": ("baselines.schemes", "GPT2"),
    "truncated-normal": ("baselines.schemes", "TruncatedNormal"),
    "scaled-default": ("baselines.schemes", "ScaledDefault"),
    "identity": ("baselines.schemes", "Identity"),
    "normal": ("baselines.parametric", "Normal"),
    "laplace": ("baselines.parametric", "Laplace"),
    "student-t": ("baselines.parametric", "StudentT"),
    "generalized-normal": ("baselines.parametric", "GeneralizedNormal"),
    "stable": ("baselines.parametric", "Stable"),
    "mixture": ("baselines.parametric", "Mixture"),
    "auto-fit": ("baselines.auto_fit", "AutoFit"),
    "matrix-normal": ("baselines.matrix_normal", "MatrixNormal"),
    "conv-covariance": ("baselines.conv_covariance", "ConvCovariance"),
    "histogram": ("baselines.empirical", "Histogram"),
    "kde": ("baselines.empirical", "KDE"),
    "permuted": ("baselines.empirical", "Permuted"),
    "hybrid": ("baselines.hybrid", "Hybrid"),
    "mimetic": ("baselines.mimetic", "Mimetic"),
    "weight-selection": ("baselines.weight_selection", "WeightSelection"),
    "subcloning": ("baselines.subcloning", "Subcloning"),
    "pruning": ("baselines.pruning", "Pruning"),
    "learned-pruning": ("baselines.learned_pruning", "LearnedPruning"),
    "sliced": ("baselines.sliced", "Sliced"),
    "net2wider": ("baselines.net2wider", "Net2Wider"),
    "hypercloning": ("baselines.hypercloning", "HyperCloning"),
    "stacking": ("baselines.stacking", "Stacking"),
    "row-column": ("baselines.row_column", "RowColumn"),
    "autoencoder": ("autoencoder.sampler", "AutoencoderSampler"),
    "diffusion": ("diffusion.sampler", "DiffusionSampler"),
    "pareto": ("baselines.pareto", "Pareto"),
    "peft-default": ("baselines.peft_inits", "PeftDefault"),
    "pissa": ("baselines.peft_inits", "PiSSA"),
    "olora": ("baselines.peft_inits", "OLoRA"),
    "orthogonal": ("baselines.peft_inits", "Orthogonal"),
    "gaussian": ("baselines.peft_inits", "Gaussian"),
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


def of_models(name: str) -> type[Sampler]:
    """`get` for what fills models. UserError besides for a LoRA method, with the command that takes it."""
    cls = get(name)
    if cls.family == "lora":
        raise UserError(f"{name} fills LoRA adapters, not models: use `headstart lora --base MODEL --method {name}`")
    return cls


def of_adapters(name: str) -> type[LoraSampler]:
    """`get` for what fills LoRA adapters. UserError besides for any other method, with the names of those that do."""
    from zoo.lora import LoraSampler

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
