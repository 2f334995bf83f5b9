"""Generating a decoder: the model's context first, then its vocabulary, then every layer: which block and heads of the
zoo it is like, then unit by unit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
from typing import Any

import torch
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler
from torch import Tensor

from autoencoder.loading import load_component, local_folder
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
from zoo.errors import UserError
from zoo.streams import stream
from zoo.tensors import Metadata
from zoo.units.decoder import Decoder, Layer
from zoo.units.units import ROLES, principal_axes, project_to_axes, residual_energy, unit_addresses, units_to_decoder

# Units that are denoised at once: bounds memory, and is fixed, so that results depend on the seed alone.
CHUNK_SIZE = 1024
CANDIDATES_PER_UNIT = 64  # units of the bank that a unit may be like: those of highest prior
MAX_CACHED_NUMBERS = 1 << 26  # numbers of a narrower target's units that are kept, so as not to be generated again
PROBED_UNITS = 256  # units of a kind whose priors choose the block that all of them are of
CONDITIONS = ("true", "shape", "shuffled", "mean")


@dataclass(frozen=True)
class Request:
    """What to generate: `tokens` are the token strings of the vocabulary's rows, None where they are those of the
    zoo; `loss` is the quality asked for (held-out nats per token of the donors), None for the best of the zoo."""

    metadata: Metadata
    tokens: tuple[str, ...] | None = None
    loss: float | None = None
    seed: int = 0
    steps: int = 20
    guidance: float = 1.0
    temperature: float = 1.0
    condition: str = "true"  # of CONDITIONS; the others are controls: what is conditioning worth?


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
        """A hub repository's pipeline -> its local folder; safetensors and JSON only, nothing is executed."""
        from huggingface_hub import snapshot_download

        allowed = ("cache_dir", "force_download", "local_files_only", "token", "revision")
        return snapshot_download(
            pretrained_model_name,
            allow_patterns=["*.json", "*.safetensors"],
            **{k: v for k, v in kwargs.items() if k in allowed and v is not None},
        )

    @torch.no_grad()
    def __call__(self, request: Request) -> Decoder:
        """A canonical decoder (float32, unit gains, untied head) of the requested shape. Its layers are generated
        when they are asked for, one in memory at a time; the same request gives the same bytes in any order. Those of
        a target narrower than the zoo's units are generated here, and again where they are too large to be kept."""
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
        told = self._unit_features(request, "vocab", MODEL_ADDRESS, "context")
        return self._solve(request, CONTEXT, "context", told, None, None, self.memory.bank(CONTEXT))[0]

    def _axes(self, shape: Metadata, pairs: Tensor, units: Callable[[int], dict[str, Tensor]]) -> Tensor:
        """[W, d] for a target narrower than the units of the zoo: the principal axes of what is generated, which takes
        generating it once before it is written."""
        total = residual_energy({"vocab": pairs}, shape)
        for index in range(shape.layers):
            total += residual_energy(units(index), shape)
        return principal_axes(total, shape.width)

    def _size(self, shape: Metadata) -> int:
        """Numbers in the units of all blocks of a shape, as wide as the zoo's."""
        block = unit_addresses(replace(shape, layers=1, vocab=0))
        vectors = sum(len(address[0]) * len(ROLES[kind]) for kind, address in block.items())
        return shape.layers * vectors * self.autoencoder.width

    def _vocabulary(self, request: Request, context: Tensor) -> Tensor:
        """[V, 2, W], wider for a wider target."""
        shape = request.metadata
        names = request.tokens if request.tokens is not None else tuple(self.memory.config["tokens"])
        told = self._unit_features(request, "vocab", unit_addresses(shape)["vocab"], "vocab")
        strings = self.memory.rows(names)
        bank = self.memory.bank("vocab")
        tokens = self._solve(request, "vocab", "vocab", told, context, self.memory.lookup(strings), bank, strings)
        return self._decode("vocab", tokens, request, "vocab")

    @torch.no_grad()
    def _units(self, request: Request, context: Tensor, index: int) -> dict[str, Tensor]:
        """The units of a block, [N, P, W] by kind, generated from its own random streams. Each is like a unit that its
        prior chooses, but all are of one block of one donor, and all of a head of one of its heads: what is half of
        one head and half of another attends to nothing."""
        shape = request.metadata
        told, heads = {}, {}
        for kind in ("neuron", "qk", "vo"):
            layer, heads[kind], slot = (t.unflatten(0, (shape.layers, -1))[index] for t in unit_addresses(shape)[kind])
            told[kind] = self._unit_features(request, kind, (layer, heads[kind], slot), f"layer {index} {kind}")
        banks = {kind: self.memory.bank(kind) for kind in told}
        wanted: dict[str, Tensor] = {}
        if self.denoiser.config["bandwidth"] is not None:
            banks = self._block(request, told, context, banks, f"layer {index} block")
            wanted = self._heads(request, told, heads, context, banks, f"layer {index} heads")

        def solved(kind: str, name: str, partner: Tensor | None) -> Tensor:
            return self._solve(request, kind, name, told[kind], context, partner, banks[kind], wanted.get(kind))

        tokens = {kind: solved(kind, f"layer {index} {kind}", None) for kind in told}
        if shape.heads > shape.kv_heads:  # query heads that share k and v are told the first's
            for kind in ("qk", "vo"):
                row = first_head_unit(replace(shape, layers=1), kind)
                again = solved(kind, f"layer {index} {kind} siblings", tokens[kind][row])
                tokens[kind] = torch.where((row >= 0)[:, None], again, tokens[kind])
        return {kind: self._decode(kind, tokens[kind], request, f"layer {index} {kind}") for kind in told}

    def _block(
        self, request: Request, told: dict[str, Tensor], context: Tensor, banks: dict[str, Bank], name: str
    ) -> dict[str, Bank]:
        """By kind, the units of one block of one donor, drawn from the mean of the priors of all units."""
        priors = []
        for kind, bank in banks.items():
            assert bank.block is not None
            blocks, of = torch.unique(bank.block, return_inverse=True)  # every kind has the same blocks
            asked = torch.linspace(0, len(told[kind]) - 1, min(PROBED_UNITS, len(told[kind]))).long()
            prior = self._prior(request, kind, told[kind][asked], context, bank).mean(0)
            priors.append(torch.zeros(len(blocks)).index_add_(0, of.cpu(), prior.cpu()))
        block = blocks[torch.multinomial(torch.stack(priors).sum(0), 1, generator=stream(request.seed, name))]
        return {kind: bank[bank.block == block] for kind, bank in banks.items()}

    def _heads(
        self,
        request: Request,
        told: dict[str, Tensor],
        heads: dict[str, Tensor],
        context: Tensor,
        banks: dict[str, Bank],
        name: str,
    ) -> dict[str, Tensor]:
        """int64 [N] for Q/K and V/O: of the heads of the banks, the one for each unit. For every KV head in turn one of
        the donor's is drawn from the mean of the priors of its units, none twice before all are taken; its query heads
        take that one's in their order."""
        shape = request.metadata
        total = torch.zeros(shape.heads, 1)
        for kind in ("qk", "vo"):
            bank = banks[kind]
            assert bank.group is not None
            prior = self._prior(request, kind, told[kind], context, bank).cpu()
            of_head = torch.zeros(len(prior), int(bank.group.max()) + 1).index_add_(1, bank.group.cpu(), prior)
            total = total + torch.zeros(len(total), of_head.shape[1]).index_add_(0, heads[kind], of_head)
        share, theirs = shape.heads // shape.kv_heads, query_heads_per_group(banks["qk"].features)
        weights = total[::share].unflatten(1, (-1, theirs)).sum(2)  # [K, the donor's K]
        rng, left = stream(request.seed, name), torch.ones(weights.shape[1])
        first = []
        for weight in weights:
            left = left if left.any() else torch.ones_like(left)
            drawn = int(torch.multinomial(weight.clamp_min(1e-12) * left, 1, generator=rng))
            left[drawn] = 0
            first.append(drawn * theirs)
        wanted = (torch.tensor(first)[:, None] + torch.arange(share) % theirs).flatten()
        return {kind: wanted[heads[kind]] for kind in ("qk", "vo")}

    def _prior(self, request: Request, kind: str, told: Tensor, context: Tensor, bank: Bank) -> Tensor:
        """[N, M]: how likely each unit of a bank is for each of N that are told so much."""
        bank = bank.to(self.denoiser.device)
        condition = self._condition(request, kind, told, context, None)
        return self.denoiser.log_prior(kind, condition, self.denoiser.bank_embedding(kind, bank)).softmax(1)

    def _condition(
        self, request: Request, kind: str, told: Tensor, context: Tensor | None, partner: Tensor | None
    ) -> Tensor:
        """[N, H]: what the denoiser is told. told [N, FEATURES], context [X], partner [N, T]."""
        device = self.denoiser.device
        family = torch.full((len(told),), self.denoiser.family.get(request.metadata.architecture, 0), device=device)
        shared = None if context is None else context.to(device).expand(len(told), -1)
        return self.denoiser.condition_embedding(
            kind, told.to(device), family, shared, None if partner is None else partner.to(device)
        )

    def _unit_features(self, request: Request, kind: str, address: Address, name: str) -> Tensor:
        """The features of units, [N, FEATURES], or what the controls tell instead. `shape`: shape and quality of a
        random donor, one for the whole model, of that half whose shapes are least like the target's. `shuffled`:
        besides, the addresses of a random layer in random order. `mean`: the zoo's mean, the mean address."""
        shape, shapes = request.metadata, self.memory.get_buffer("features_context").cpu()
        if request.condition == "shuffled":
            rng = stream(request.seed, f"shuffled {name}")
            layer, head, slot = (t[torch.randperm(len(t), generator=rng)] for t in address)
            layer = torch.where(layer < 0, layer, torch.randint(shape.layers, (1,), generator=rng))
            address = (layer, head, slot)
        told = unit_features(kind, address, shape, self._quality(request))
        if request.condition in ("shape", "shuffled"):
            own, others = told[0, :SHAPE_FEATURES], shapes[:, :SHAPE_FEATURES]
            far = (others - own).norm(dim=1).argsort(descending=True, stable=True)[: (len(shapes) + 1) // 2]
            drawn = torch.randint(len(far), (1,), generator=stream(request.seed, "shuffled shape"))
            told[:, :MODEL_FEATURES] = shapes[far[drawn], :MODEL_FEATURES]
        elif request.condition == "mean":
            told = told.mean(0, keepdim=True).repeat(len(told), 1)
            told[:, :MODEL_FEATURES] = shapes.mean(0)[:MODEL_FEATURES]
        return told

    def _quality(self, request: Request) -> float | None:
        return request.loss if request.loss is not None else self.memory.config["best_loss"]

    def _decode(self, kind: str, tokens: Tensor, request: Request, name: str) -> Tensor:
        """Tokens [N, T] -> vectors [N, P, W], whole units whatever the target. Those of a wider target go on, in
        coordinates that no donor has, with noise of a tenth of their own RMS: exact zeros would never leave zero."""
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
        told: Tensor,
        context: Tensor | None,
        partner: Tensor | None,
        bank: Bank,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """Noise of stream (seed, name) -> tokens [N, T] on the CPU, each like one of the bank, of the group that is
        wanted, int64 [N]. told [N, FEATURES], context [X], partner [N, T]."""
        denoiser: UnitDenoiser = self.denoiser
        device = denoiser.device
        noise = torch.randn(len(told), denoiser.config["tokens"][kind], generator=stream(request.seed, name))
        known = None
        if denoiser.config["bandwidth"] is not None:
            bank = bank.to(device)
            known = denoiser.bank_embedding(kind, bank)
        out = []
        for start in range(0, len(told), CHUNK_SIZE):
            rows = slice(start, start + CHUNK_SIZE)
            mate = None if partner is None else partner[rows]
            condition = self._condition(request, kind, told[rows], context, mate)
            pair: list[Candidates | None] = [None, None]
            if known is not None:
                free = denoiser.unconditional.expand_as(condition)
                own = None if wanted is None else wanted[rows].to(device)
                pair = [self._nearest(kind, condition, bank, known, own)]
                if request.guidance != 1.0:  # heads are chosen without it; of a string it is told, or of any
                    pair.append(self._nearest(kind, free, bank, known, None if kind == "vocab" else own))
            x = noise[rows].to(device) * (1.0 if kind == CONTEXT else request.temperature)
            out.append(self._denoise(request, kind, x, condition, pair))
        return torch.cat(out)

    def _nearest(
        self, kind: str, condition: Tensor, bank: Bank, known: Tensor, wanted: Tensor | None = None
    ) -> Candidates:
        log_prior = mask_to_group(self.denoiser.log_prior(kind, condition, known), wanted, bank.group)
        best = log_prior.topk(min(CANDIDATES_PER_UNIT, log_prior.shape[1]), dim=1)
        return Candidates(bank.tokens[best.indices], best.values)

    def _denoise(
        self, request: Request, kind: str, x: Tensor, condition: Tensor, candidates: list[Candidates | None]
    ) -> Tensor:
        scheduler = DPMSolverMultistepScheduler.from_config(self.scheduler.config)
        scheduler.set_timesteps(request.steps)
        null = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        for t in scheduler.timesteps:
            sigma = torch.full((len(x),), float(t) / scheduler.config["num_train_timesteps"], device=x.device)
            velocity = self.denoiser(kind, x, sigma, condition, candidates[0])
            if request.guidance != 1.0:
                free = self.denoiser(kind, x, sigma, condition, candidates[1], null)
                velocity = free + request.guidance * (velocity - free)
            x = scheduler.step(velocity, t, x).prev_sample
        return x.cpu()


class _LazyLayers(Sequence[Layer]):
    """The layers of a decoder of a shape, made of their units when asked for, in the coordinates `axes` [W, d] if it
    is narrower than those; the last one is kept."""

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
    """The solver: second order, because first-order steps shrink what they generate (an initialisation is its
    variance)."""
    return DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, solver_order=2)


def load_pipeline(source: str) -> WeightDiffusionPipeline:
    """The pipeline of a folder or a hub id. Raises UserError where there is none, or where it is damaged."""
    how = "make one with `headstart train diffusion`"
    folder = local_folder(source, "a pipeline")
    if not (folder / "model_index.json").is_file():
        raise UserError(f"{source}: holds no pipeline; {how}")
    parts: dict[str, type] = {"autoencoder": UnitAutoencoder, "denoiser": UnitDenoiser, "memory": ZooMemory}
    loaded = {name: load_component(cls, folder / name, "config.json", how).eval() for name, cls in parts.items()}
    return WeightDiffusionPipeline(scheduler=make_scheduler(), **loaded)
