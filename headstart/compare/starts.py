"""Where training starts: how a comparison writes an initialisation and loads it, for whole models and for adapters."""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from headstart.compare.labels import adapter_method, method_name, sampler_class
from headstart.compare.nearest_donor import OTHER_COORDINATES, nearest_donor
from headstart.compare.settings import AdapterSettings, Trial, TrialSettings
from headstart.config import GenerateConfig, LoraConfig
from headstart.generate.generate import generate
from headstart.generate.sampling import build_sampler, language_model_blueprint
from headstart.lora.lora import BASE_FOLDER, fit_lora, lora
from headstart.report.scores import REFERENCE
from zoo.checkpoints.files import is_kind
from zoo.checkpoints.sources import resolve_source
from zoo.donors.donor import provenance
from zoo.donors.folder import StandaloneDonor
from zoo.donors.zoo import Zoo, open_standalone
from zoo.parallel.processes import working_alone
from zoo.targets.adapters import require_peft

if TYPE_CHECKING:
    from torch import nn

    from zoo.sampler import Sampler

UNKNOWN_FACTS: dict[str, Any] = dict.fromkeys(("parameters", "loss", "tokens"))
ADAPTER_DISTANCE = "not measured: an adapter is not compared with the weights of a model"


@dataclass(frozen=True)
class Starts(ABC):
    """The initialisations of a comparison."""

    settings: TrialSettings

    weight_decay = 0.1  # of matrices

    def sampler_class(self, label: str) -> type[Sampler]:
        """The sampler of a label."""
        return sampler_class(label, self.settings.adapter is not None)

    @abstractmethod
    def check(self, label: str, out: str | Path) -> None:
        """Raises UserError where a method does not fit. Writes nothing."""

    @abstractmethod
    def write(self, trial: Trial, folder: Path) -> dict[str, Any]:
        """Writes an initialisation. Returns where it comes from: {seconds, donors, novelty, novelty_note}."""

    @abstractmethod
    def load(self, folder: Path) -> nn.Module:
        """The written initialisation as a model in float32 on the CPU, ready to train."""

    @abstractmethod
    def dependencies(self, trial: Trial) -> dict[str, Any]:
        """What the initialisation depends on besides the seed and the scale, as JSON values."""

    def to_record(self) -> dict[str, Any]:
        """What the results of a comparison say of it, besides what all comparisons have."""
        return {}

    def method_options(self, label: str) -> dict[str, Any]:
        """The options of a label. A method that takes a text gets the beginning of the corpus."""
        own = dict(self.settings.method_options.get(label, {}))
        return {"text": self.settings.text} | own if self._takes(label, "text") else own

    def _takes(self, label: str, option: str) -> bool:
        return option in self.sampler_class(label).__dataclass_fields__


class ModelStarts(Starts):
    """Whole models, as `headstart generate` writes them."""

    def check(self, label: str, out: str | Path) -> None:
        """What a trained model fits shows only when it is loaded, so a method that has one is fitted."""
        config = self._generate_config(label, out)
        with working_alone():
            generate(config, plan=True, quiet=True)
        cls = self.sampler_class(label)
        if "model" in cls.needs:
            settings = self.settings
            given = {"donor": config.donor, "model": config.model, "tokenizer": settings.tokenizer}
            sampler = build_sampler(cls, config.set, device=settings.device, **given)
            zoo = None if settings.zoo is None else Zoo.open(settings.zoo)
            sampler.fit(zoo, language_model_blueprint(settings.target))

    def write(self, trial: Trial, folder: Path) -> dict[str, Any]:
        is_scaled = trial.label == REFERENCE and trial.scale != 1.0
        config = self._generate_config(trial.label, folder, trial.seed, **({"scale": trial.scale} if is_scaled else {}))
        start = time.perf_counter()
        generate(config, quiet=True)
        seconds = time.perf_counter() - start
        records = json.loads((folder / "headstart.json").read_text())["donors"]
        zoo = open_zoo(self.settings.zoo, self.settings.donor)
        # A pipeline may have learned from donors that this zoo does not hold.
        names = [d["name"] for d in records if zoo is not None and d["name"] in zoo.names]
        measurable = self.sampler_class(trial.label).family != "generative"
        novelty, note = nearest_donor(folder, zoo, names) if measurable else (None, OTHER_COORDINATES)
        return {
            "seconds": seconds,
            "donors": [
                UNKNOWN_FACTS | d | (donor_facts(zoo, d["name"]) if zoo and d["name"] in names else {}) for d in records
            ],
            "novelty": novelty,
            "novelty_note": note,
        }

    def load(self, folder: Path) -> nn.Module:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def dependencies(self, trial: Trial) -> dict[str, Any]:
        settings, needs = self.settings, self.sampler_class(trial.label).needs
        return {
            "target": settings.target,
            "method": method_name(trial.label),
            "settings": settings.method_options.get(trial.label, {}),
            "donor": self._donor_and_model(trial.label).get("donor"),  # the model by its content, below
            "zoo": settings.fingerprint["zoo"] if needs else None,
            "model": settings.fingerprint["model"] if "model" in needs else None,
        }

    def _generate_config(self, label: str, out: str | Path, seed: int = 0, **options: Any) -> GenerateConfig:
        """The `headstart generate` of a label; `options` are added to the label's own."""
        settings = self.settings
        return GenerateConfig(
            target=settings.target,
            method=method_name(label),
            out=out,
            zoo=settings.zoo,
            set=self.method_options(label) | options,
            seed=seed,
            dtype="float32",
            device=settings.device,
            tokenizer=settings.tokenizer,
            **self._donor_and_model(label),
        )

    def _donor_and_model(self, label: str) -> dict[str, Any]:
        """{donor, model} of the comparison, without what the method of the label does not take."""
        given = {"donor": self.settings.donor, "model": self.settings.model}
        return {key: value for key, value in given.items() if self._takes(label, key)}


class AdapterStarts(Starts):
    """LoRA adapters, as `headstart lora` writes them. Only A and B are trained; the base is frozen.

    Weights of an adapter do not decay: decay would also shrink what an initialisation moved there from the base.
    """

    weight_decay = 0.0

    @property
    def adapter(self) -> AdapterSettings:
        assert self.settings.adapter is not None
        return self.settings.adapter

    def check(self, label: str, out: str | Path) -> None:
        """Whether another model can be followed shows only when its weights are read, so such a method is fitted."""
        config = self.lora_config(label, Path(out) / "adapter")
        lora(config, plan=True, quiet=True)
        if "reference" in self.sampler_class(label).needs:
            fit_lora(config)

    def write(self, trial: Trial, folder: Path) -> dict[str, Any]:
        start = time.perf_counter()
        lora(self.lora_config(trial.label, folder, trial.seed), quiet=True)
        seconds = time.perf_counter() - start
        _, *others = json.loads((folder / "headstart.json").read_text())["donors"]  # the base comes first
        return {
            "seconds": seconds,
            "donors": [UNKNOWN_FACTS | d for d in others],
            "novelty": None,
            "novelty_note": ADAPTER_DISTANCE,
        }

    def load(self, folder: Path) -> nn.Module:
        from transformers import AutoModelForCausalLM

        changed, source = folder / BASE_FOLDER, resolve_source(self.adapter.base)
        base = changed if changed.is_dir() else StandaloneDonor.open(source, quiet=True).folder
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        return require_peft().PeftModel.from_pretrained(model, folder, is_trainable=True)

    def dependencies(self, trial: Trial) -> dict[str, Any]:
        options = dict(self.settings.method_options.get(trial.label, {}))
        options.pop("reference", None)
        reference = self.reference(trial.label)
        adapter, found = self.adapter, self.settings.fingerprint
        return {
            "adapter": [found["base"], adapter.rank, float(adapter.alpha or adapter.rank), *adapter.targets],
            "method": adapter_method(trial.label),
            "settings": options,
            "reference": None if reference is None else found["references"][reference],
        }

    def to_record(self) -> dict[str, Any]:
        """{adapter: {base, rank, alpha, targets, reference}}."""
        adapter = self.adapter
        return {
            "adapter": {**asdict(adapter), "alpha": float(adapter.alpha or adapter.rank), "targets": [*adapter.targets]}
        }

    def reference(self, label: str) -> str | None:
        """The model that the method of a label follows: its own option `reference`, else that of the comparison. None
        for the base itself, and for a method that follows no model."""
        if not self._takes(label, "reference_model"):
            return None
        return self.settings.method_options.get(label, {}).get("reference") or self.adapter.reference

    def lora_config(self, label: str, out: str | Path, seed: int = 0) -> LoraConfig:
        """The `headstart lora` of a label. A changed base is written in float32, so that nothing is lost."""
        settings, options = self.settings, self.method_options(label)
        if self._takes(label, "reference_model"):
            options.pop("reference", None)
        if self._takes(label, "tokenizer") and settings.tokenizer is not None:
            options.setdefault("tokenizer", settings.tokenizer)
        return LoraConfig(
            base=self.adapter.base,
            method=adapter_method(label),
            rank=self.adapter.rank,
            out=out,
            reference=self.reference(label),
            alpha=self.adapter.alpha,
            targets=self.adapter.targets,
            set=options,
            seed=seed,
            device=settings.device,
            dtype="float32",
        )


def starts_of(settings: TrialSettings) -> Starts:
    """The initialisations of a comparison."""
    return ModelStarts(settings) if settings.adapter is None else AdapterStarts(settings)


def open_zoo(zoo: str | Path | None, donor: str | None) -> Zoo | None:
    """The zoo, else the donor outside a zoo, else None."""
    if zoo is not None:
        return Zoo.open(zoo)
    return None if donor is None else open_standalone(resolve_source(donor), quiet=True)


def donor_facts(zoo: Zoo, name: str) -> dict[str, Any]:
    """The provenance of a donor, its parameters, and the loss and tokens of its training where they are known."""
    donor = zoo.donor(name)
    return provenance(donor) | {
        "parameters": donor.parameters,
        **{key: value if is_kind(value := donor.facts.get(key), float) else None for key in ("loss", "tokens")},
    }
