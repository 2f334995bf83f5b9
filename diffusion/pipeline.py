"""Generating a decoder: first its context, then its vocabulary, then layer by layer.

For each layer, a block and heads of a donor are chosen first, then its units are generated.

Letters: N units, T token size, M units of a bank, X context size, V vocabulary, W width of the autoencoder, d width of
the target, K KV heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
from typing import Any

import torch
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler
from torch import Tensor

from autoencoder.loading import check_kinds, load_component, local_folder
from autoencoder.model import UnitAutoencoder
from diffusion.conditions import (
    MODEL_ADDRESS,
    MODEL_FEATURES,
    SHAPE_FEATURES,
    Address,
    query_heads_per_group,
    unit_features,
)
from diffusion.denoiser import CONTEXT, Candidates, UnitDenoiser, mask_to_group
from diffusion.memory import Bank, ZooMemory
from diffusion.views import first_head_unit
from zoo.checkpoints.hub import with_retries
from zoo.errors import UserError
from zoo.sandbox import library_errors
from zoo.streams import stream
from zoo.tensors import Metadata
from zoo.units.decoder import Decoder, Layer
from zoo.units.resizing import principal_axes, project_to_axes, residual_energy
from zoo.units.units import ROLES, unit_addresses, units_to_decoder

UNITS_PER_BATCH = 1024  # units that are denoised at once; a constant, so results depend on the seed only
CANDIDATES_PER_UNIT = 64  # components of a unit's mixture: the units of the bank with the highest prior
MAX_CACHED_NUMBERS = 1 << 26  # a narrower target's units are cached up to this size, else generated twice
PROBED_UNITS = 256  # units of a kind whose priors choose the block
CONDITIONS = ("true", "shape", "shuffled", "mean")


@dataclass(frozen=True)
class Request:
    """What to generate."""

    metadata: Metadata
    tokens: tuple[str, ...] | None = None  # token string of each row of the vocabulary; None for the zoo's
    loss: float | None = None  # held-out loss of the donors to imitate, nats per token; None for the zoo's lowest
    seed: int = 0
    steps: int = 20
    guidance: float = 1.0
    temperature: float = 1.0
    condition: str = "true"  # one of CONDITIONS; all but "true" are controls that measure the use of conditioning


class WeightDiffusionPipeline(DiffusionPipeline):
    """Latent diffusion over the units of decoders. Components: autoencoder, denoiser, memory, scheduler."""

    autoencoder: UnitAutoencoder
    denoiser: UnitDenoiser
    memory: ZooMemory
    scheduler: DPMSolverMultistepScheduler
    model_cpu_offload_seq = "denoiser->autoencoder"

    def __init__(
        self,
        autoencoder: UnitAutoencoder,
        denoiser: UnitDenoiser,
        memory: ZooMemory,
        scheduler: DPMSolverMultistepScheduler,
    ) -> None:
        super().__init__()
        self.register_modules(autoencoder=autoencoder, denoiser=denoiser, memory=memory, scheduler=scheduler)

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

    @torch.no_grad()
    def __call__(self, request: Request) -> Decoder:
        """Generates a canonical decoder of the requested shape: float32, unit gains, untied head.

        A layer is generated when it is read, and only the last one is kept. The same request gives the same bytes in
        any order. For a target narrower than the zoo's units, all layers are generated here to find the principal axes,
        and again when they are read if they are too large to be cached."""
        context = self._context(request)
        pairs = self._vocabulary(request, context)
        units: Callable[[int], dict[str, Tensor]] = partial(self._units, request, context)
        width, axes = request.metadata.width, None
        if width < self.autoencoder.width:
            units = cache(units) if self._size(request.metadata) <= MAX_CACHED_NUMBERS else units
            axes = self._axes(request.metadata, pairs, units)
            pairs = project_to_axes({"vocab": pairs}, axes)["vocab"]
        return Decoder(
            metadata=replace(request.metadata, tied=False),
            embed=pairs[:, 0],
            head=pairs[:, 1] * width**-0.5,
            layers=_LazyLayers(request.metadata, units, axes),  # type: ignore[arg-type]
            gain={"final": torch.ones(width)},
        )

    def _context(self, request: Request) -> Tensor:
        features = self._unit_features(request, "vocab", MODEL_ADDRESS, "context")
        return self._solve(request, CONTEXT, "context", features, None, None, self.memory.bank(CONTEXT))[0]

    def _axes(self, shape: Metadata, pairs: Tensor, units: Callable[[int], dict[str, Tensor]]) -> Tensor:
        """The principal axes of all generated units, [W, d], for a target that is narrower than they are."""
        total = residual_energy({"vocab": pairs}, shape)
        for index in range(shape.layers):
            total += residual_energy(units(index), shape)
        return principal_axes(total, shape.width)

    def _size(self, shape: Metadata) -> int:
        """How many numbers the units of all blocks of a shape hold, at the zoo's width."""
        block = unit_addresses(replace(shape, layers=1, vocab=0))
        vectors = sum(len(address[0]) * len(ROLES[kind]) for kind, address in block.items())
        return shape.layers * vectors * self.autoencoder.width

    def _vocabulary(self, request: Request, context: Tensor) -> Tensor:
        """The vocabulary pairs, [V, 2, W], or wider for a wider target."""
        shape = request.metadata
        names = request.tokens if request.tokens is not None else tuple(self.memory.config["tokens"])
        features = self._unit_features(request, "vocab", unit_addresses(shape)["vocab"], "vocab")
        strings = self.memory.rows(names)
        bank = self.memory.bank("vocab")
        tokens = self._solve(request, "vocab", "vocab", features, context, self.memory.lookup(strings), bank, strings)
        return self._decode("vocab", tokens, request, "vocab")

    @torch.no_grad()
    def _units(self, request: Request, context: Tensor, index: int) -> dict[str, Tensor]:
        """The units of block number `index`, [N, P, W] by kind, from random streams of their own.

        The priors of single units would mix units of several donor blocks and heads, and a mixture of two heads does
        not attend. So all units of a block come from one block of one donor, and all units of a head from one head."""
        shape = request.metadata
        features, heads = {}, {}
        for kind in ("neuron", "qk", "vo"):
            layer, heads[kind], slot = (t.unflatten(0, (shape.layers, -1))[index] for t in unit_addresses(shape)[kind])
            features[kind] = self._unit_features(request, kind, (layer, heads[kind], slot), f"layer {index} {kind}")
        banks = {kind: self.memory.bank(kind) for kind in features}
        required: dict[str, Tensor] = {}
        if self.denoiser.config["bandwidth"] is not None:
            banks = self._block(request, features, context, banks, f"layer {index} block")
            required = self._heads(request, features, heads, context, banks, f"layer {index} heads")

        def solve(kind: str, name: str, partner: Tensor | None) -> Tensor:
            return self._solve(request, kind, name, features[kind], context, partner, banks[kind], required.get(kind))

        tokens = {kind: solve(kind, f"layer {index} {kind}", None) for kind in features}
        if shape.heads > shape.kv_heads:  # the other query heads of a group have the first one's units as partners
            for kind in ("qk", "vo"):
                row = first_head_unit(replace(shape, layers=1), kind)
                again = solve(kind, f"layer {index} {kind} siblings", tokens[kind][row])
                tokens[kind] = torch.where((row >= 0)[:, None], again, tokens[kind])
        return {kind: self._decode(kind, tokens[kind], request, f"layer {index} {kind}") for kind in tokens}

    def _block(
        self, request: Request, features: dict[str, Tensor], context: Tensor, banks: dict[str, Bank], name: str
    ) -> dict[str, Bank]:
        """By kind, the bank's units of one block of one donor, drawn from the mean prior of the units."""
        priors = []
        for kind, bank in banks.items():
            assert bank.block is not None
            blocks, block_index = torch.unique(bank.block, return_inverse=True)  # every kind has the same blocks
            probed = torch.linspace(0, len(features[kind]) - 1, min(PROBED_UNITS, len(features[kind]))).long()
            prior = self._prior(request, kind, features[kind][probed], context, bank).mean(0)
            priors.append(torch.zeros(len(blocks)).index_add_(0, block_index.cpu(), prior.cpu()))
        block = blocks[torch.multinomial(torch.stack(priors).sum(0), 1, generator=stream(request.seed, name))]
        return {kind: bank[bank.block == block] for kind, bank in banks.items()}

    def _heads(
        self,
        request: Request,
        features: dict[str, Tensor],
        heads: dict[str, Tensor],
        context: Tensor,
        banks: dict[str, Bank],
        name: str,
    ) -> dict[str, Tensor]:
        """The donor's query head for each unit of Q/K and V/O, int64 [N] by kind.

        For each KV head one of the donor's is drawn from the mean prior of its units, without replacement until all are
        taken. The query heads of a group take those of the donor's group in order."""
        shape = request.metadata
        total = torch.zeros(shape.heads, 1)
        for kind in ("qk", "vo"):
            bank = banks[kind]
            assert bank.group is not None
            prior = self._prior(request, kind, features[kind], context, bank).cpu()
            by_donor_head = torch.zeros(len(prior), int(bank.group.max()) + 1).index_add_(1, bank.group.cpu(), prior)
            total = total + torch.zeros(len(total), by_donor_head.shape[1]).index_add_(0, heads[kind], by_donor_head)
        per_group, donor_per_group = shape.heads // shape.kv_heads, query_heads_per_group(banks["qk"].features)
        weights = total[::per_group].unflatten(1, (-1, donor_per_group)).sum(2)  # [K, the donor's K]
        rng, available = stream(request.seed, name), torch.ones(weights.shape[1])
        first = []
        for weight in weights:
            available = available if available.any() else torch.ones_like(available)
            drawn = int(torch.multinomial(weight.clamp_min(1e-12) * available, 1, generator=rng))
            available[drawn] = 0
            first.append(drawn * donor_per_group)
        donor_head = (torch.tensor(first)[:, None] + torch.arange(per_group) % donor_per_group).flatten()
        return {kind: donor_head[heads[kind]] for kind in ("qk", "vo")}

    def _prior(self, request: Request, kind: str, features: Tensor, context: Tensor, bank: Bank) -> Tensor:
        """The probability of each unit of a bank for each of N units with these features: [N, M]."""
        bank = bank.to(self.denoiser.device)
        condition = self._condition(request, kind, features, context, None)
        return self.denoiser.log_prior(kind, condition, self.denoiser.bank_embedding(kind, bank)).softmax(1)

    def _condition(
        self, request: Request, kind: str, features: Tensor, context: Tensor | None, partner: Tensor | None
    ) -> Tensor:
        """The embedded condition of units, [N, H]. features [N, FEATURES], context [X], partner [N, T]."""
        device = self.denoiser.device
        family = torch.full((len(features),), self.denoiser.family.get(request.metadata.architecture, 0), device=device)
        shared = None if context is None else context.to(device).expand(len(features), -1)
        return self.denoiser.condition_embedding(
            kind, features.to(device), family, shared, None if partner is None else partner.to(device)
        )

    def _unit_features(self, request: Request, kind: str, address: Address, name: str) -> Tensor:
        """The features of units, [N, FEATURES], changed by the request's control condition.

        `shape`: shape and quality of a random donor, the same for the whole model, out of the half of donors that are
        least similar to the target. `shuffled`: also the addresses of a random layer in random order. `mean`: the zoo's
        mean shape and quality, and the mean address."""
        shape, shapes = request.metadata, self.memory.get_buffer("features_context").cpu()
        if request.condition == "shuffled":
            rng = stream(request.seed, f"shuffled {name}")
            layer, head, slot = (t[torch.randperm(len(t), generator=rng)] for t in address)
            layer = torch.where(layer < 0, layer, torch.randint(shape.layers, (1,), generator=rng))
            address = (layer, head, slot)
        features = unit_features(kind, address, shape, self._quality(request))
        if request.condition in ("shape", "shuffled"):
            own, others = features[0, :SHAPE_FEATURES], shapes[:, :SHAPE_FEATURES]
            farthest = (others - own).norm(dim=1).argsort(descending=True, stable=True)[: (len(shapes) + 1) // 2]
            drawn = torch.randint(len(farthest), (1,), generator=stream(request.seed, "shuffled shape"))
            features[:, :MODEL_FEATURES] = shapes[farthest[drawn], :MODEL_FEATURES]
        elif request.condition == "mean":
            features = features.mean(0, keepdim=True).repeat(len(features), 1)
            features[:, :MODEL_FEATURES] = shapes.mean(0)[:MODEL_FEATURES]
        return features

    def _quality(self, request: Request) -> float | None:
        return request.loss if request.loss is not None else self.memory.config["best_loss"]

    def _decode(self, kind: str, tokens: Tensor, request: Request, name: str) -> Tensor:
        """Tokens [N, T] -> vectors [N, P, W], or wider for a wider target.

        Coordinates that no donor has get noise of a tenth of the vector's RMS, because training cannot move exact zeros
        away from zero."""
        width, known = request.metadata.width, self.autoencoder.width
        latents, norms = self.memory.scale[kind].from_token(tokens)
        device = self.autoencoder.device
        vectors = self.autoencoder.decode(kind, latents.to(device), norms.to(device), known).cpu()
        if width > known:
            rms = vectors.norm(dim=-1, keepdim=True) / known**0.5
            noise = torch.randn(*vectors.shape[:2], width - known, generator=stream(request.seed, f"beyond {name}"))
            return torch.cat([vectors, 0.1 * rms * noise], dim=-1)
        return vectors

    def _solve(
        self,
        request: Request,
        kind: str,
        name: str,
        features: Tensor,
        context: Tensor | None,
        partner: Tensor | None,
        bank: Bank,
        required: Tensor | None = None,
    ) -> Tensor:
        """Denoises tokens [N, T] from the random stream (seed, name); the result is on the CPU.

        features [N, FEATURES], context [X], partner [N, T]. required: each unit's group of the bank, int64 [N]."""
        denoiser: UnitDenoiser = self.denoiser
        device = denoiser.device
        noise = torch.randn(len(features), denoiser.config["tokens"][kind], generator=stream(request.seed, name))
        bank_condition = None
        if denoiser.config["bandwidth"] is not None:
            bank = bank.to(device)
            bank_condition = denoiser.bank_embedding(kind, bank)
        out = []
        for start in range(0, len(features), UNITS_PER_BATCH):
            rows = slice(start, start + UNITS_PER_BATCH)
            chunk_partner = None if partner is None else partner[rows]
            condition = self._condition(request, kind, features[rows], context, chunk_partner)
            candidates: list[Candidates | None] = [None, None]  # with the condition, and without
            if bank_condition is not None:
                unconditional = denoiser.unconditional.expand_as(condition)
                groups = None if required is None else required[rows].to(device)
                candidates = [self._nearest(kind, condition, bank, bank_condition, groups)]
                if request.guidance != 1.0:  # a head was chosen without the condition; a string is part of it
                    groups = None if kind == "vocab" else groups
                    candidates.append(self._nearest(kind, unconditional, bank, bank_condition, groups))
            x = noise[rows].to(device) * (1.0 if kind == CONTEXT else request.temperature)
            out.append(self._denoise(request, kind, x, condition, candidates))
        return torch.cat(out)

    def _nearest(
        self, kind: str, condition: Tensor, bank: Bank, bank_condition: Tensor, required: Tensor | None = None
    ) -> Candidates:
        """The bank's units with the highest prior for each condition."""
        log_prior = mask_to_group(self.denoiser.log_prior(kind, condition, bank_condition), required, bank.group)
        best = log_prior.topk(min(CANDIDATES_PER_UNIT, log_prior.shape[1]), dim=1)
        return Candidates(bank.tokens[best.indices], best.values)

    def _denoise(
        self, request: Request, kind: str, x: Tensor, condition: Tensor, candidates: list[Candidates | None]
    ) -> Tensor:
        scheduler = DPMSolverMultistepScheduler.from_config(self.scheduler.config)
        scheduler.set_timesteps(request.steps)
        dropped = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        for t in scheduler.timesteps:
            sigma = torch.full((len(x),), float(t) / scheduler.config["num_train_timesteps"], device=x.device)
            velocity = self.denoiser(kind, x, sigma, condition, candidates[0])
            if request.guidance != 1.0:
                unconditional = self.denoiser(kind, x, sigma, condition, candidates[1], dropped)
                velocity = unconditional + request.guidance * (velocity - unconditional)
            x = scheduler.step(velocity, t, x).prev_sample
        return x.cpu()


class _LazyLayers(Sequence[Layer]):
    """The layers of a decoder, generated when they are read; the last one is kept.

    axes: principal axes [W, d] of a target that is narrower than its units."""

    def __init__(self, shape: Metadata, units: Callable[[int], dict[str, Tensor]], axes: Tensor | None) -> None:
        self.size = shape.layers

        @lru_cache(maxsize=1)
        def make(index: int) -> Layer:
            found = units(index) if axes is None else project_to_axes(units(index), axes)
            found = {**found, "vocab": torch.zeros(shape.vocab, 2, shape.width)}
            return units_to_decoder(found, replace(shape, layers=1)).layers[0]

        self.make = make

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(self.size)))
        if not 0 <= index < self.size:
            raise IndexError(index)
        return self.make(index)


def make_scheduler() -> DPMSolverMultistepScheduler:
    """The solver. It has second order, because first-order steps shrink the variance of what they generate."""
    return DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, solver_order=2)


def load_pipeline(source: str) -> WeightDiffusionPipeline:
    """Loads the pipeline of a folder or a hub id. Raises UserError if there is none, or if it is damaged."""
    how = "train one with `headstart train diffusion`"
    folder = local_folder(source, "a pipeline")
    if not (folder / "model_index.json").is_file():
        raise UserError(f"{source}: holds no pipeline; {how}")
    parts: dict[str, type] = {"autoencoder": UnitAutoencoder, "denoiser": UnitDenoiser, "memory": ZooMemory}
    loaded = {name: load_component(cls, folder / name, "config.json", how).eval() for name, cls in parts.items()}
    check_kinds(folder, loaded["autoencoder"], how)
    with library_errors(f"{folder}: its parts do not fit together", how):
        _check_parts(**loaded)
    return WeightDiffusionPipeline(scheduler=make_scheduler(), **loaded)


def _check_parts(autoencoder: UnitAutoencoder, denoiser: UnitDenoiser, memory: ZooMemory) -> None:
    """ValueError where the parts of a pipeline have different sizes, or an index of the memory points at nothing."""
    sizes = {kind: autoencoder.latent_size(kind) + len(roles) for kind, roles in ROLES.items()}
    stored = {kind: size for kind, (_, size) in memory.config["sizes"].items()}
    expected = sizes | {CONTEXT: memory.config["context"]}
    if stored != sizes or denoiser.config["tokens"] != expected:
        raise ValueError(f"the tokens have the sizes {expected}, {stored} and {denoiser.config['tokens']}")
    for kind, roles in ROLES.items():
        scale = memory.scale[kind]
        if not (len(scale.mean) == len(scale.std) == len(roles)):
            raise ValueError(f"the scale of {kind} has {len(scale.mean)} means for {len(roles)} vectors")
        torch.tensor([scale.latent, *scale.mean, *scale.std], dtype=torch.float32)
    donors, families = len(memory.config["donors"]), len(denoiser.config["families"]) + 1
    limits = {f"donor_{kind}": donors for kind in ROLES} | {"families": families}
    for name, most in (limits | {"strings_vocab": len(memory.config["tokens"])}).items():
        index = memory.get_buffer(name)
        if len(index) == 0 or index.min() < 0 or index.max() >= most:
            raise ValueError(f"{name} has a value that is not from 0 to {most - 1}")
