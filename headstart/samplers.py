"""The table of methods: one dict from name to class. A method is imported when it is used.

methods.json holds the descriptions of all methods, so that `headstart methods` imports none. After a change of a
method's summary or options, `python -m headstart.samplers` writes it again.
"""

from __future__ import annotations

import json
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.checkpoints.atomic import replace_file
from zoo.checkpoints.files import expect, read_json
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
    "retrieval": ("baselines.retrieval.sampler", "Retrieval"),
    "pareto": ("baselines.lora.pareto", "Pareto"),
    "peft-default": ("baselines.lora.peft_inits", "PeftDefault"),
    "pissa": ("baselines.lora.peft_inits", "PiSSA"),
    "olora": ("baselines.lora.peft_inits", "OLoRA"),
    "orthogonal": ("baselines.lora.peft_inits", "Orthogonal"),
    "gaussian": ("baselines.lora.peft_inits", "Gaussian"),
    "eva": ("baselines.lora.text_inits", "EVA"),
    "corda": ("baselines.lora.text_inits", "CorDA"),
    "lora_ga": ("baselines.lora.text_inits", "LoraGA"),
}


DESCRIPTIONS = Path(__file__).with_name("methods.json")
LORA_METHODS = (
    "pareto", "peft-default", "pissa", "olora", "orthogonal", "gaussian", "eva", "corda", "lora_ga",
)  # fmt: skip  # methods that fill adapters
# Initialisations of PEFT that are no methods, and why.
REFUSED = {
    "loftq": "loftq: replaces the base's weights by 4-bit values, so that the start is not the base; use pissa",
}


def get(name: str) -> type[Sampler]:
    """The sampler class of a method, or of `package.module.Class` for one of your own, which is imported from the
    working directory too. Raises UserError with the nearest name where there is none."""
    check_method(name)
    if name in METHODS:
        module, attribute = METHODS[name]
        return getattr(import_module(module), attribute)
    return _import_class(name)


def check_method(name: str) -> None:
    """Raises UserError for a name that is neither a method nor package.module.Class. Imports nothing."""
    if name in REFUSED:
        raise UserError(REFUSED[name])
    is_class = "." in name and all(part.isidentifier() for part in name.split("."))
    if name not in METHODS and not is_class:
        raise unknown("method", name, METHODS)


def check_model_method(name: str) -> None:
    """`check_method`, and UserError for a LoRA method. Imports nothing."""
    check_method(name)
    if name in LORA_METHODS:
        raise _fills_adapters(name)


def check_lora_method(name: str) -> None:
    """`check_method`, and UserError for a method that fills models. Imports nothing."""
    check_method(name)
    if name in METHODS and name not in LORA_METHODS:
        raise _fills_models(name)


def check_compared_method(name: str, adapters: bool) -> None:
    """`check_lora_method` where adapters are compared, else `check_model_method`. Imports nothing."""
    if not adapters and name in LORA_METHODS:
        raise UserError(f"{name} fills LoRA adapters, not models: give --base MODEL and --rank R instead of --target")
    if not adapters:
        check_model_method(name)
    elif name != "default":  # PEFT's own initialisation there
        check_lora_method(name)


def model_sampler(name: str) -> type[Sampler]:
    """The sampler class of a method that fills models. Raises UserError for any other."""
    cls = get(name)
    if cls.family == "lora":
        raise _fills_adapters(name)
    return cls


def lora_sampler(name: str) -> type[LoraSampler]:
    """The sampler class of a method that fills LoRA adapters. Raises UserError for any other."""
    from zoo.lora.adapters import LoraSampler

    cls = get(name)
    if not issubclass(cls, LoraSampler):
        raise _fills_models(name)
    return cls


def _fills_adapters(name: str) -> UserError:
    return UserError(f"{name} fills LoRA adapters, not models: use `headstart lora --base MODEL --method {name}`")


def _fills_models(name: str) -> UserError:
    return UserError(f"{name} fills models, not LoRA adapters: choose from {', '.join(LORA_METHODS)}")


def _import_class(path: str) -> type[Sampler]:
    from zoo.sampler import Sampler

    module, _, attribute = path.rpartition(".")
    if os.getcwd() not in sys.path:  # `python -m` has it there, the command does not; last, so that it hides nothing
        sys.path.append(os.getcwd())
    try:
        found = getattr(import_module(module), attribute)
    except Exception as error:  # the module is the user's own
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"method {path}: cannot be imported ({reason}); write it as package.module.Class") from error
    if not (isinstance(found, type) and issubclass(found, Sampler)):
        raise UserError(f"method {path}: is not a subclass of zoo.sampler.Sampler; give a sampler class")
    return found


def described_methods() -> list[dict[str, Any]]:
    """What `describe` returns, read from the file that `python -m headstart.samplers` wrote. Imports no method."""
    return json.loads(DESCRIPTIONS.read_text())


def describe() -> list[dict[str, Any]]:
    """The methods as `headstart methods --json` prints them: [{name, family, summary, reference, needs, options}]."""
    classes = [get(name) for name in METHODS]
    return [
        {
            "name": cls.name,
            "family": cls.family,
            "summary": cls.summary,
            "reference": cls.reference,
            "needs": list(cls.needs),
            "options": cls.option_table(),
        }
        for cls in classes
    ]


def load(folder: Path) -> Sampler:
    """A fitted sampler that `Sampler.save` wrote."""
    path = Path(folder) / "sampler.json"
    if not path.is_file():
        raise UserError(f"{folder}: has no sampler.json; give a folder that a fitted sampler was saved to")
    method = expect(read_json(path), "method", str, str(path))
    if method not in METHODS and method.rpartition(".")[0] not in sys.modules:  # a file must not make us run code
        raise UserError(f"{path}: is of the method {method[:60]!r}, which is none of ours; import its module first")
    return get(method).load(Path(folder))


if __name__ == "__main__":
    replace_file(DESCRIPTIONS, (json.dumps(describe(), indent=1, ensure_ascii=False) + "\n").encode())
