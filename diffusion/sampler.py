"""The method `diffusion`: a trained pipeline as a sampler."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import Tensor

from diffusion.pipeline import CONDITIONS, Request, WeightDiffusionPipeline, load_pipeline
from zoo.donors.zoo import Zoo
from zoo.errors import UserError
from zoo.options import option
from zoo.sampler import Sampler
from zoo.targets.blueprint import Blueprint
from zoo.units.decoder import write_decoder
from zoo.units.gains import tie_head
from zoo.units.units import require_unit_target
from zoo.vocabularies.matching import match_rows
from zoo.vocabularies.tokens import Tokens, read_tokens

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class DiffusionSampler(Sampler):
    """Generates all units of the target; reads no donor."""

    name: ClassVar[str] = "diffusion"
    family: ClassVar[str] = "generative"
    summary: ClassVar[str] = "latent diffusion over residual-stream units, conditioned on the target's metadata"
    reference: ClassVar[str] = "diffusion/README.md"
    needs: ClassVar[tuple[str, ...]] = ("model",)
    choices: ClassVar[dict[str, tuple[str, ...]]] = {"condition": tuple(CONDITIONS)}

    model: str | None = option(None, "folder or hub id of a trained pipeline")
    tokenizer: str | None = option(
        None, "the target's tokenizer (folder or tokenizer.json), to match tokens by their strings"
    )
    steps: int = option(20, "denoising steps", least=1)
    guidance: float = option(1.0, "classifier-free guidance scale; 1 is none")
    temperature: float = option(1.0, "scale of the initial noise of units; below 1 the units are nearer to their mean")
    loss: float | None = option(None, "held-out loss of the donors to imitate; none: the lowest of the zoo")
    condition: str = option(
        "true", "true, or a control: shape (of another donor), shuffled addresses, or mean metadata"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._pipeline: WeightDiffusionPipeline | None = None
        self._tokens: tuple[str, ...] | None = None

    def _load(self) -> WeightDiffusionPipeline:
        if self.model is None:
            raise UserError("diffusion: needs a trained pipeline; give one with --model (`headstart train diffusion`)")
        return load_pipeline(self.model).to(self.device)

    def fit(self, zoo: Zoo | None, blueprint: Blueprint) -> Self:
        target = require_unit_target(blueprint, "target")
        self._pipeline = self._load()
        known = self._pipeline.memory.row_of_token
        if self.tokenizer is None:
            if target.vocab != len(known):
                raise UserError(
                    f"diffusion: the target's vocabulary has {target.vocab} tokens, the zoo's has {len(known)}; "
                    "give the target's --tokenizer to match tokens by their strings"
                )
            self._tokens = None
        else:
            self._tokens = zoo_strings(read_tokens(self.tokenizer), known, target.vocab)
            shared = sum(token in known for token in self._tokens)
            if shared < target.vocab:
                log.info(
                    "diffusion: the zoo knows %d of the target's %d tokens; the others are generated freely",
                    shared,
                    target.vocab,
                )
        widest = self._pipeline.autoencoder.width
        if target.width > widest:
            log.info("diffusion: the widest donor has width %d; the coordinates beyond it start as small noise", widest)
        return self

    def sample(self, blueprint: Blueprint, seed: int = 0) -> Iterator[tuple[str, Tensor]]:
        if self._pipeline is None or blueprint.metadata is None:
            raise RuntimeError("diffusion: call fit before sample")
        request = Request(
            metadata=blueprint.metadata,
            tokens=self._tokens,
            loss=self.loss,
            seed=seed,
            steps=self.steps,
            guidance=self.guidance,
            temperature=self.temperature,
            condition=self.condition,
        )
        decoder = self._pipeline(request)
        yield from write_decoder(tie_head(decoder) if blueprint.metadata.tied else decoder, blueprint)

    def provenance(self, zoo: Zoo | None) -> list[dict[str, Any]]:
        """The donors in the pipeline's training data; `zoo` is not used."""
        assert self._pipeline is not None
        return list(self._pipeline.memory.config["donors"] or [])

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return {"tokens": self._tokens}, {}

    def restore(self, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self._pipeline = self._load()
        self._tokens = None if values["tokens"] is None else tuple(values["tokens"])


def zoo_strings(target: Tokens, known: dict[str, int], n_target: int) -> tuple[str, ...]:
    """The zoo's string of each token of a target, [n_target]; the target's own string for a token unknown to the zoo.

    known: the zoo's token strings -> row. A row without a token is `<row i>`."""
    strings = {i: token for token, i in target.ids.items()}
    names = {row: token for token, row in known.items()}
    rows = match_rows(Tokens.of_strings(known), target, len(known), n_target).tolist()
    return tuple(names[row] if row >= 0 else strings.get(i, f"<row {i}>") for i, row in enumerate(rows))
