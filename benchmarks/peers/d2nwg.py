"""D2NWG (2402.18153), rebuilt small: chunks of flattened weights, a VAE on chunks, a UNet on its latents.

    python -m benchmarks.peers.d2nwg --zoo DIR --out DIR --seconds 300 --parameters 2600000

Every layer is flattened, zero-padded and cut into chunks. README.md says what is from the paper, what is smaller and
what is our choice.

Letters: N chunks, C chunk size, Z channels and S side of a latent, F features of a condition.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from diffusers import AutoencoderKL, ConfigMixin, DDIMScheduler, DDPMScheduler, ModelMixin, UNet2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.nn import functional as F

from autoencoder.loading import load_component
from benchmarks.peers import training
from benchmarks.peers.chunks import FEATURES, chunk_conditions, chunk_counts, from_chunks, to_chunks
from benchmarks.peers.conditions import MODEL_FEATURES, model_features
from benchmarks.peers.weights import (
    Reconstruction,
    Weights,
    learned_blueprint,
    make_reconstruction,
    provenance_records,
    read_weights,
    to_checkpoint,
)
from zoo.donors.zoo import Zoo
from zoo.options import option
from zoo.sampler import Sampler
from zoo.streams import stream
from zoo.targets.blueprint import Blueprint
from zoo.units.units import require_unit_target

PEER = "d2nwg"
NOISE_STEPS = 1024
SCHEDULE: dict[str, Any] = dict(
    num_train_timesteps=NOISE_STEPS, beta_start=0.0015, beta_end=0.0155, beta_schedule="scaled_linear"
)
CHUNKS_AT_ONCE = 256  # chunks: bounds memory, and is fixed, so that results depend on the seed alone


@dataclass(frozen=True)
class D2NWGTrainConfig:
    """As published unless README.md says otherwise.

    rate: chunk size over latent size; share: the VAE's part of parameters and budget; chunk None: the largest power of
    two whose linear maps leave 40 % of the VAE to convolutions.
    """

    rate: float = 2864 / 1024
    share: float = 0.4
    batch: int = 64
    lr: float = 1.115e-3  # of the VAE
    kl: float = 1e-6
    lr_unet: float = 1e-3
    warmup: float = 0.05
    ema: float = 0.9999
    coordinates: str = "raw"
    chunk: int | None = None
    seed: int = 0


def plane_side(chunk: int) -> int:
    """Side of the plane of a chunk: 1.43 times the chunk's size, as published (2864 to 64 x 64), in steps of 8."""
    return max(8, 8 * round(math.sqrt(4096 / 2864 * chunk) / 8))


class ChunkAutoencoder(ModelMixin, ConfigMixin):
    """A linear map to a plane, a convolutional VAE with two halvings, a linear map back. channels: its width."""

    CONFIG_KINDS: ClassVar = dict.fromkeys(("chunk", "latent", "channels"), int)

    @register_to_config
    def __init__(self, chunk: int, latent: int, channels: int) -> None:
        super().__init__()
        self.side = plane_side(chunk)
        self.into, self.out = nn.Linear(chunk, self.side**2), nn.Linear(self.side**2, chunk)
        self.vae = AutoencoderKL(
            in_channels=1, out_channels=1, latent_channels=latent, norm_num_groups=4, layers_per_block=1,
            down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(channels, channels, 2 * channels),
        )  # fmt: skip

    @property
    def latent_size(self) -> int:
        """Z S S"""
        return self.config["latent"] * (self.side // 4) ** 2

    def encode(self, chunks: Tensor) -> Any:
        """[N, C] -> a diagonal normal distribution of latents [N, Z, S, S]"""
        plane = self.into(chunks).view(-1, 1, self.side, self.side)
        return self.vae.encode(plane).latent_dist

    def decode(self, latents: Tensor) -> Tensor:
        """[N, Z, S, S] -> [N, C]"""
        return self.out(self.vae.decode(latents).sample.flatten(1))


class ChunkDenoiser(ModelMixin, ConfigMixin):
    """A UNet with one more input channel, the embedded condition."""

    CONFIG_KINDS: ClassVar = dict.fromkeys(("latent", "side", "channels", "features"), int)

    @register_to_config
    def __init__(self, latent: int, side: int, channels: int, features: int) -> None:
        super().__init__()
        self.condition = nn.Sequential(nn.Linear(features, 256), nn.SiLU(), nn.Linear(256, side**2))
        self.unet = UNet2DModel(
            sample_size=side, in_channels=latent + 1, out_channels=latent, layers_per_block=1, norm_num_groups=4,
            block_out_channels=(channels, 2 * channels), down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"), resnet_time_scale_shift="scale_shift",
        )  # fmt: skip

    def forward(self, noised: Tensor, times: Tensor, features: Tensor) -> Tensor:
        """[N, Z, S, S], int64 [N], [N, F] -> the noise, [N, Z, S, S]"""
        plane = self.condition(features).view(-1, 1, *noised.shape[2:])
        return self.unet(torch.cat([noised, plane], dim=1), times).sample


def train(
    zoo: str | Path,
    out: str | Path,
    seconds: float | None = None,
    steps: int | None = None,
    parameters: int = 2_500_000,
    seed: int = 0,
    resume: bool = False,
    quiet: bool = True,
    device: str = "cpu",
    **settings: Any,
) -> Path:
    """Trains the VAE, then the UNet on its latents; writes both to `out`.

    parameters: the largest number in both together; settings: fields of `D2NWGTrainConfig`. resume=True continues an
    interrupted run, with `steps` to the same bytes. UserError for an unusable zoo, too few parameters, or an `out` that
    exists."""
    out, opened = Path(out), Zoo.open(zoo)
    config, budget = D2NWGTrainConfig(seed=seed, **settings), training.Budget(steps, seconds)
    identity = training.peer_identity(PEER, asdict(config) | asdict(budget) | {"parameters": parameters}, opened)
    if training.claim_folder(out, resume, identity):
        return out
    donors = read_weights(opened, config.coordinates, quiet)
    size = config.chunk or _default_chunk_size(config.share * parameters)
    parts = [to_chunks(d.blueprint, d.tensors, size) for d in donors]
    chunks = torch.cat(parts)
    scale = float(chunks.square().mean().sqrt())
    chunks = (chunks / scale).to(device)
    features = torch.cat([chunk_conditions(d.blueprint, size, d.loss) for d in donors]).to(device)
    coder, first = _vae(out, chunks, config, round(config.share * parameters), budget, identity, device, quiet)
    rest = parameters - training.parameter_count(coder)
    denoiser, spread, second = _unet(out, coder, chunks, features, config, rest, budget, identity, device, quiet)
    denoiser.save_pretrained(out / "unet")
    content = {
        "peer": PEER, "identity": identity, "recipe": asdict(config), "donors": provenance_records(opened, donors),
        "scale": scale, "latent_deviation": spread,
        "features": [model_features(d.metadata, d.loss).tolist() for d in donors],
        "best_loss": min((d.loss for d in donors if d.loss is not None), default=None),
        "most_chunks": max(n for d in donors for n in chunk_counts(d.blueprint, size)) - 1,
        "parameters": training.parameter_count(coder) + training.parameter_count(denoiser),
        "training": {"vae": first, "unet": second},
    }  # fmt: skip
    training.write_record(out, content)
    for path in out.glob("*.state"):
        path.unlink()
    return out


def _default_chunk_size(parameters: float) -> int:
    sizes = [c for c in (64, 128, 256, 512, 1024, 2048) if 2 * c * plane_side(c) ** 2 <= 0.6 * parameters]
    return max(sizes, default=64)


def _build(cls: type[Any], fixed: dict[str, Any], parameters: int, seed: int) -> Any:
    def count(channels: int) -> int:
        with torch.device("meta"):
            return training.parameter_count(cls(channels=channels, **fixed))

    channels = training.widest_within(count, parameters, 4, 8)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return cls(channels=channels, **fixed)


def _vae(
    out: Path,
    chunks: Tensor,
    config: D2NWGTrainConfig,
    parameters: int,
    budget: training.Budget,
    identity: str,
    device: str,
    quiet: bool,
) -> tuple[ChunkAutoencoder, dict[str, Any]]:
    """The trained VAE and a record of its training; reads it if an earlier run finished it."""
    if (out / "vae").is_dir():
        return ChunkAutoencoder.from_pretrained(out / "vae").to(device).eval(), json.loads(
            (out / "vae.json").read_text()
        )
    size = chunks.shape[1]
    latent = max(1, round(size / config.rate / (plane_side(size) // 4) ** 2))
    model = _build(ChunkAutoencoder, {"chunk": size, "latent": latent}, parameters, config.seed).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr, betas=(0.5, 0.9))

    def loss(step: int) -> Tensor:
        """Summed absolute error, 1000 times the mean squared error and the KL, over the chunk's size."""
        rng = stream(config.seed, f"vae {step}")
        x = chunks[torch.randint(len(chunks), (config.batch,), generator=rng).to(device)]
        posterior = model.encode(x)
        noise = torch.randn(posterior.mean.shape, generator=rng).to(device)
        made = model.decode(posterior.mean + posterior.std * noise)
        return (made - x).abs().mean() + (1000 * F.mse_loss(made, x) + config.kl * posterior.kl().mean()) / size

    outcome = training.train_resumable(
        model, optimizer, loss, lambda spent: config.lr, budget.part(config.share), out / "vae.state", identity,
        f"{PEER} vae", quiet,
    )  # fmt: skip
    (out / "vae.json").write_text(json.dumps(outcome.to_json()) + "\n")
    model.eval().save_pretrained(out / ".vae")
    os.replace(out / ".vae", out / "vae")
    return model, outcome.to_json()


def _unet(
    out: Path, coder: ChunkAutoencoder, chunks: Tensor, features: Tensor, config: D2NWGTrainConfig, parameters: int,
    budget: training.Budget, identity: str, device: str, quiet: bool,
) -> tuple[ChunkDenoiser, float, dict[str, Any]]:  # fmt: skip
    """The trained UNet (its moving average), the deviation of the latents, and a record of its training."""
    with torch.no_grad():
        posteriors = [coder.encode(part) for part in chunks.split(CHUNKS_AT_ONCE)]
        mean, std = (torch.cat([getattr(p, name) for p in posteriors]) for name in ("mean", "std"))
        spread = float((mean.square() + std.square()).mean().sub(mean.mean().square()).sqrt())
    fixed = {"latent": mean.shape[1], "side": mean.shape[2], "features": FEATURES}
    model = _build(ChunkDenoiser, fixed, parameters, config.seed).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr_unet)
    ema = EMAModel(model.parameters(), decay=config.ema, use_ema_warmup=True, power=0.75)
    schedule = DDPMScheduler(**SCHEDULE)

    def loss(step: int) -> Tensor:
        rng = stream(config.seed, f"unet {step}")
        rows = torch.randint(len(mean), (config.batch,), generator=rng).to(device)
        shape = (config.batch, *mean.shape[1:])
        clean = (mean[rows] + std[rows] * torch.randn(shape, generator=rng).to(device)) / spread
        noise = torch.randn(shape, generator=rng).to(device)
        times = torch.randint(NOISE_STEPS, (config.batch,), generator=rng).to(device)
        return F.mse_loss(model(schedule.add_noise(clean, noise, times), times, features[rows]), noise)

    def restore(tensors: Mapping[str, Tensor], step: int) -> None:
        ema.optimization_step = step
        for i, p in enumerate(ema.shadow_params):
            p.copy_(tensors[f"ema.{i}"])

    outcome = training.train_resumable(
        model, optimizer, loss, lambda spent: config.lr_unet * min(1.0, (spent + 1e-3) / config.warmup),
        budget.part(1 - config.share), out / "unet.state", identity, f"{PEER} unet", quiet,
        after=lambda: ema.step(model.parameters()),
        extra=lambda: {f"ema.{i}": p for i, p in enumerate(ema.shadow_params)}, restore=restore,
    )  # fmt: skip
    ema.copy_to(model.parameters())
    return model.eval(), spread, outcome.to_json()


def load_peer(model: str | None) -> tuple[ChunkAutoencoder, ChunkDenoiser, dict[str, Any]]:
    folder, content = training.open_record(model, PEER)
    how = f"train one with `python -m benchmarks.peers.{PEER}`"
    coder = load_component(ChunkAutoencoder, folder / "vae", "config.json", how)
    return coder.eval(), load_component(ChunkDenoiser, folder / "unet", "config.json", how).eval(), content


def input_rows(coder: ChunkAutoencoder, content: Mapping[str, Any], weights: Weights) -> Tensor:
    """[N, C]: a donor in the form that the VAE reads."""
    return to_chunks(weights.blueprint, weights.tensors, coder.config["chunk"]) / content["scale"]


@torch.no_grad()
def reconstruct_weights(
    coder: ChunkAutoencoder,
    content: Mapping[str, Any],
    weights: Weights,
    replacement: Callable[[Tensor], Tensor] | None = None,
) -> Reconstruction:
    """A donor encoded and decoded by the VAE (means of the latents), in the coordinates that the VAE was trained in.
    replacement: a function of the rows that takes the VAE's place."""
    chunks = input_rows(coder, content, weights)
    if replacement is None:
        latents = [coder.encode(part.to(coder.device)).mean for part in chunks.split(CHUNKS_AT_ONCE)]
        made = torch.cat([coder.decode(part) for part in latents]).cpu()
    else:
        made = replacement(chunks)
    tensors = from_chunks(weights.blueprint, made * content["scale"])
    return make_reconstruction(weights, tensors, len(chunks) * coder.latent_size, content["recipe"]["coordinates"])


@dataclass(kw_only=True)
class D2NWG(Sampler):
    """Denoises and decodes every chunk of the target on its own, given the target's metadata and the chunk's place."""

    name: ClassVar[str] = "benchmarks.peers.d2nwg.D2NWG"
    family: ClassVar[str] = "generative"
    summary: ClassVar[str] = "D2NWG: latent diffusion over chunks of flattened weights, a VAE and a UNet"
    reference: ClassVar[str] = "2402.18153"
    needs: ClassVar[tuple[str, ...]] = ("model",)
    choices: ClassVar[dict[str, tuple[str, ...]]] = {"condition": ("true", "shape", "mean")}

    model: str | None = option(None, "folder of a trained D2NWG")
    steps: int = option(100, "denoising steps (DDIM)", least=1, most=1024)
    loss: float | None = option(None, "held-out loss of the donors to imitate; none: the best")
    condition: str = option("true", "true, or a control: a random donor's metadata, or the donors' mean")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._parts: tuple[ChunkAutoencoder, ChunkDenoiser, dict[str, Any]] | None = None

    def fit(self, zoo: Zoo | None, blueprint: Blueprint) -> Self:
        require_unit_target(blueprint, "target")
        self._parts = load_peer(self.model)
        return self

    @torch.no_grad()
    def sample(self, blueprint: Blueprint, seed: int = 0) -> Iterator[tuple[str, Tensor]]:
        if self._parts is None:
            raise RuntimeError(f"{PEER}: call fit before sample")
        coder, denoiser, content = self._parts
        coder, denoiser = coder.to(self.device), denoiser.to(self.device)
        coordinates = content["recipe"]["coordinates"]
        target = learned_blueprint(blueprint, coordinates)
        features = self._conditions(target, content, coder.config["chunk"], seed)
        side = denoiser.config["side"]
        noise = torch.randn(len(features), denoiser.config["latent"], side, side, generator=stream(seed, PEER))
        schedule = DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
        schedule.set_timesteps(self.steps)
        made = []
        for x, condition in zip(noise.split(CHUNKS_AT_ONCE), features.split(CHUNKS_AT_ONCE), strict=True):
            x, condition = x.to(self.device), condition.to(self.device)
            for t in schedule.timesteps:
                x = schedule.step(denoiser(x, t.to(x.device).expand(len(x)), condition), t, x).prev_sample
            made.append(coder.decode(x * content["latent_deviation"]).cpu() * content["scale"])
        yield from to_checkpoint(from_chunks(target, torch.cat(made)).items(), blueprint, coordinates)

    def _conditions(self, target: Blueprint, content: Mapping[str, Any], size: int, seed: int) -> Tensor:
        loss = self.loss if self.loss is not None else content["best_loss"]
        features = chunk_conditions(target, size, loss, content["most_chunks"])
        known = torch.tensor(content["features"])
        if self.condition == "shape":
            features[:, :MODEL_FEATURES] = known[torch.randint(len(known), (1,), generator=stream(seed, "shape"))]
        elif self.condition == "mean":
            features[:, :MODEL_FEATURES] = known.mean(0)
        return features

    def provenance(self, zoo: Zoo | None) -> list[dict[str, Any]]:
        """The donors that the peer learned from, not those of `zoo`."""
        assert self._parts is not None
        return list(self._parts[2]["donors"])

    def restore(self, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self._parts = load_peer(self.model)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    training.add_training_arguments(parser)
    given = vars(parser.parse_args())
    began = time.perf_counter()
    print(train(**given, quiet=False), f"{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
