"""The method `diffusion`: a trained pipeline as a sampler."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import Tensor

from diffusion.pipeline import WeightDiffusionPipeline, load_pipeline
from zoo.donors.zoo import Zoo
from zoo.errors import UserError
from zoo.options import option
from zoo.sampler import Sampler
from zoo.streams import stream
from zoo.targets.blueprint import Blueprint
from zoo.training.documents import TextSource, read_corpus
from zoo.units.family import family_of, require_served, require_target_family
from zoo.vocabularies.build import DEFAULT_RULE, RULES, VOCABULARY_HELP

SAMPLE_BYTES = 100_000  # of a text, from its start, that become a condition


@dataclass(kw_only=True)
class DiffusionSampler(Sampler):
    """Generates latents for the target's metadata, and from them its weights; reads no donor."""

    name: ClassVar[str] = "diffusion"
    family: ClassVar[str] = "generative"
    summary: ClassVar[str] = "latent diffusion over models, conditioned on the target's metadata and text"
    reference: ClassVar[str] = "diffusion/README.md"
    needs: ClassVar[tuple[str, ...]] = ("model",)
    choices: ClassVar[dict[str, tuple[str, ...]]] = {"vocabulary": RULES}

    model: str | None = option(None, "folder or hub id of a trained pipeline")
    tokenizer: str | None = option(
        None, "the target's tokenizer (folder or tokenizer.json), to match tokens by their strings"
    )
    text: str | None = option(None, "file with a sample of the text that the model will be trained on")
    excess: float = option(0.0, "nats above the held-out loss of the best donor to imitate", least=0.0)
    steps: int = option(20, "denoising steps", least=1)
    guidance: float = option(1.0, "classifier-free guidance scale; 1 is none")
    vocabulary: str = option(DEFAULT_RULE, VOCABULARY_HELP)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._pipeline: WeightDiffusionPipeline | None = None
        self._sample_of_text: bytes | None = None

    def _load(self) -> WeightDiffusionPipeline:
        if self.model is None:
            raise UserError("diffusion: needs a trained pipeline; give one with --model (`headstart train diffusion`)")
        pipeline = load_pipeline(self.model).to(self.device)
        pipeline.vocabulary_rule = self.vocabulary
        if self.text is not None:
            self._sample_of_text = read_corpus(TextSource(self.text), most=SAMPLE_BYTES).text
        return pipeline

    def fit(self, zoo: Zoo | None, blueprint: Blueprint) -> Self:
        target = require_target_family(blueprint, "target")
        self._pipeline = self._load()
        require_served(family_of(target), self._pipeline.autoencoder.sizes.families, self.name)
        known = len(self._pipeline.autoencoder.token_strings)
        if self.tokenizer is None and target.vocab != known:
            raise UserError(
                f"diffusion: the target's vocabulary has {target.vocab} tokens, the zoo's has {known}; "
                "give the target's --tokenizer to match tokens by their strings"
            )
        return self

    def sample(self, blueprint: Blueprint, seed: int = 0) -> Iterator[tuple[str, Tensor]]:
        if self._pipeline is None or blueprint.metadata is None:
            raise RuntimeError("diffusion: call fit before sample")
        output = self._pipeline(
            blueprint,
            tokenizer=self.tokenizer,
            text=self._sample_of_text,
            excess=self.excess,
            num_inference_steps=self.steps,
            guidance_scale=self.guidance,
            generator=stream(seed, "latents"),
        )
        yield from output.tensors()

    def details(self, blueprint: Blueprint) -> dict[str, Any]:
        """Under `family`: what the target has and no donor has."""
        assert self._pipeline is not None
        target = require_target_family(blueprint, "target")
        notes = require_served(family_of(target), self._pipeline.autoencoder.sizes.families, self.name)
        return {"family": notes} if notes else {}

    def provenance(self, zoo: Zoo | None) -> list[dict[str, Any]]:
        """The donors in the pipeline's training data; `zoo` is not used."""
        assert self._pipeline is not None
        return self._pipeline.donors

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return {}, {}

    def restore(self, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self._pipeline = self._load()
