"""`WeightDiffusionPipeline`: a config, and if wanted a text, to the weights of a language model."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.utils import BaseOutput
from torch import Tensor

from autoencoder.field import Latents
from autoencoder.loading import load_component, local_folder
from autoencoder.model import WeightAutoencoder
from autoencoder.sampler import target_pairs
from diffusion.card import pipeline_card
from diffusion.conditions import Wanted, condition_values, vocabulary_features
from diffusion.denoiser import LatentDenoiser
from diffusion.solving import StepEnd, latent_noise, make_scheduler, solve
from zoo.checkpoints.hub import with_retries
from zoo.errors import UserError
from zoo.sandbox import library_errors
from zoo.targets.blueprint import Blueprint
from zoo.tensors import Metadata
from zoo.training.text_features import text_features
from zoo.units.decoder import Decoder, write_decoder
from zoo.units.family import family_of, require_served, require_target_family
from zoo.units.tables import to_checkpoint
from zoo.vocabularies.build import DEFAULT_RULE
from zoo.vocabularies.tokens import Tokens, read_tokens

log = logging.getLogger(__name__)
HOW = "train one with `headstart train diffusion`"


@dataclass
class WeightPipelineOutput(BaseOutput):
    """A generated model.

    decoder: its canonical form, whose layers are written when they are read. blueprint: what it fills."""

    decoder: Decoder
    blueprint: Blueprint

    def tensors(self) -> Any:
        """Yields (name on disk, tensor float32) in the blueprint's order, one layer at a time."""
        tied = self.blueprint.metadata is not None and self.blueprint.metadata.tied
        yield from write_decoder(to_checkpoint(self.decoder, tied), self.blueprint)

    def state_dict(self) -> dict[str, Tensor]:
        """All tensors by their name on disk."""
        return dict(self.tensors())

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes a checkpoint that `from_pretrained` of transformers loads: config.json and safetensors."""
        from transformers import AutoModelForCausalLM

        from zoo.targets.configs import names_in_memory, parse_config

        assert self.blueprint.config is not None
        model = AutoModelForCausalLM.from_config(parse_config(self.blueprint.config))
        names = names_in_memory(model)
        weights = {names.get(name, name): tensor for name, tensor in self.tensors()}
        model.load_state_dict(weights, strict=False, assign=True)
        model.tie_weights()
        model.save_pretrained(folder)


class WeightDiffusionPipeline(DiffusionPipeline):
    """Latent diffusion over language models. Components: autoencoder, denoiser, scheduler."""

    autoencoder: WeightAutoencoder
    denoiser: LatentDenoiser
    scheduler: FlowMatchEulerDiscreteScheduler
    model_cpu_offload_seq = "denoiser->autoencoder"
    vocabulary_rule = DEFAULT_RULE  # one of zoo.vocabularies.build.RULES

    def __init__(
        self, autoencoder: WeightAutoencoder, denoiser: LatentDenoiser, scheduler: FlowMatchEulerDiscreteScheduler
    ) -> None:
        super().__init__()
        self.register_modules(autoencoder=autoencoder, denoiser=denoiser, scheduler=scheduler)

    @classmethod
    def download(cls, pretrained_model_name: str, **kwargs: Any) -> str:
        """Downloads a pipeline from the hub and returns its folder: safetensors and JSON only, no code."""
        from huggingface_hub import snapshot_download

        allowed = ("cache_dir", "force_download", "local_files_only", "token", "revision")
        options = {k: v for k, v in kwargs.items() if k in allowed and v is not None}
        patterns = ["*.json", "*.safetensors"]
        return with_retries(
            lambda: snapshot_download(pretrained_model_name, allow_patterns=patterns, **options), pretrained_model_name
        )

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """Writes the components and a model card with the donors and their licences."""
        super().save_pretrained(save_directory, *args, **kwargs)
        self._write_card(save_directory)

    def _upload_folder(self, working_dir: str | Path, *args: Any, **kwargs: Any) -> Any:
        """Uploads a saved pipeline (`push_to_hub`), with our card in place of the empty one of diffusers."""
        self._write_card(working_dir)
        return super()._upload_folder(working_dir, *args, **kwargs)

    def _write_card(self, folder: str | Path) -> None:
        card = pipeline_card(self.autoencoder, self.denoiser)
        (Path(folder) / "README.md").write_text(card, encoding="utf-8")

    @property
    def donors(self) -> list[dict[str, Any]]:
        """The provenance of the donors that it learned from."""
        return list(self.autoencoder.config["donors"] or [])

    @torch.no_grad()
    def __call__(
        self,
        config: str | Path | Mapping[str, Any] | Blueprint,
        tokenizer: str | Path | None = None,
        text: str | bytes | None = None,
        excess: float = 0.0,
        num_inference_steps: int = 20,
        guidance_scale: float = 1.0,
        generator: torch.Generator | None = None,
        callback_on_step_end: StepEnd | None = None,
    ) -> WeightPipelineOutput:
        """Generates the weights of a config.

        config: a config.json, its folder, a hub id, a parsed config, or a blueprint. tokenizer: the target's (folder or
        tokenizer.json); without one its vocabulary must be the zoo's. text: a sample of the text that the model will be
        trained on. excess: nats above the best donor's held-out loss to imitate. callback_on_step_end: called with the
        number of the step, the time and the latents; what it returns replaces them. `vocabulary_rule` says how
        tokens that the zoo does not know are composed.

        Weights in bfloat16 or float16 are cast to float32, in which everything is computed; tensors are float32.

        Raises UserError for a config whose function is not in tables, for a family that no donor can serve, and for
        another vocabulary without a tokenizer."""
        self.autoencoder.float()
        self.denoiser.float()
        blueprint = config if isinstance(config, Blueprint) else Blueprint.from_config(config)
        shape = self.shape_of(blueprint)
        tokens = None if tokenizer is None else read_tokens(tokenizer)
        latents = self.sample_latents(
            self.wanted(shape, tokens, text, excess),
            generator,
            steps=num_inference_steps,
            guidance=guidance_scale,
            on_step_end=callback_on_step_end,
        )
        return self.decode(blueprint, latents, tokens)

    def shape_of(self, blueprint: Blueprint) -> Metadata:
        """The metadata of a target, with its family. Raises UserError if it is not one that the pipeline can fill."""
        shape = require_target_family(blueprint, "target")
        for line in require_served(family_of(shape), self.autoencoder.sizes.families, "diffusion"):
            log.warning("diffusion: %s", line)
        return shape

    def wanted(self, shape: Metadata, tokens: Tokens | None, text: str | bytes | None, excess: float) -> Wanted:
        """The condition that the arguments of a call ask for."""
        sample = text.encode() if isinstance(text, str) else text
        strings = self.autoencoder.token_strings if tokens is None else tuple(tokens.ids)
        return Wanted(shape, None if sample is None else text_features(sample), vocabulary_features(strings), excess)

    def sample_latents(
        self,
        wanted: Wanted,
        generator: torch.Generator | None = None,
        *,
        steps: int = 20,
        guidance: float = 1.0,
        on_step_end: StepEnd | None = None,
    ) -> Latents:
        """Latents of a model for a condition. Without a generator they are drawn from torch's global one."""
        device = self.denoiser.device
        rng = generator if generator is not None else torch.default_generator
        noise = latent_noise(self.denoiser, wanted.shape.layers, rng).to(device)
        values = condition_values(wanted, self.denoiser.config["several_families"])
        condition = self.denoiser.embed(values[None].to(device))
        return solve(
            self.denoiser, self.scheduler, noise, condition, steps=steps, guidance=guidance, on_step_end=on_step_end
        )

    def decode(self, blueprint: Blueprint, latents: Latents, tokens: Tokens | None) -> WeightPipelineOutput:
        """The model that latents make. tokens: the target's; None if it has the zoo's vocabulary."""
        shape = require_target_family(blueprint, "target")
        known = len(self.autoencoder.token_strings)
        if tokens is None and shape.vocab != known:
            raise UserError(
                f"diffusion: the target's vocabulary has {shape.vocab} tokens, the zoo's has {known}; "
                "give the target's --tokenizer to match tokens by their strings"
            )
        pairs = target_pairs(self.autoencoder, shape, latents, tokens, self.vocabulary_rule)
        return WeightPipelineOutput(self.autoencoder.decode(shape, latents, pairs), blueprint)


def load_pipeline(source: str) -> WeightDiffusionPipeline:
    """Loads the pipeline of a folder or a hub id. Raises UserError if there is none, or if it is damaged."""
    folder = local_folder(source, "a pipeline")
    if not (folder / "model_index.json").is_file():
        raise UserError(f"{source}: holds no pipeline; {HOW}")
    parts: dict[str, type] = {"autoencoder": WeightAutoencoder, "denoiser": LatentDenoiser}
    loaded = {name: load_component(cls, folder / name, "config.json", HOW).eval() for name, cls in parts.items()}
    sizes, found = loaded["autoencoder"].sizes, loaded["denoiser"].config
    with library_errors(f"{folder}: its parts do not fit together", HOW):
        if (sizes.model_latent, sizes.block_latent) != (found["model_latent"], found["block_latent"]):
            raise ValueError("the autoencoder and the denoiser have latents of different sizes")
    return WeightDiffusionPipeline(scheduler=make_scheduler(), **loaded)
