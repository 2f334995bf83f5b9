"""SANE (2406.09997), rebuilt small: rows as tokens, a transformer autoencoder, kernel densities over latents.

    python -m benchmarks.peers.sane --zoo DIR --out DIR --seconds 300 --parameters 2600000

Every matrix is cut into its rows and every row into tokens of one size, zero-padded under a mask; a token's position is
(token, tensor, row). README.md says what is from the paper, what is smaller and what is our choice.

Letters: N tokens, T token size, R latent size, W window, B batch, M anchors.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from autoencoder.loading import load_component
from benchmarks.peers import training
from benchmarks.peers.tokens import (
    Tokens,
    from_tokens,
    halo_windows,
    layer_statistics,
    matching_tokens,
    random_permutation,
    standardize,
    to_tokens,
)
from benchmarks.peers.weights import (
    Reconstruction,
    Weights,
    learned_blueprint,
    make_reconstruction,
    provenance_records,
    read_weights,
    to_checkpoint,
)
from zoo.donors.donor import Donor
from zoo.donors.zoo import Zoo
from zoo.errors import UserError
from zoo.options import option
from zoo.sampler import Sampler
from zoo.streams import stream
from zoo.targets.blueprint import Blueprint
from zoo.units.units import require_unit_target

PEER = "sane"
ANCHORS = "anchors.safetensors"
WINDOWS_AT_ONCE = 64  # windows that are decoded at once: fixed, so that results depend on the seed alone


@dataclass(frozen=True)
class SaneTrainConfig:
    """As published unless README.md says otherwise. rate: token size over latent size."""

    rate: float = 288 / 128
    window: int = 64
    batch: int = 8
    layers: int = 2  # of the encoder, and of the decoder
    lr: float = 1e-3
    gamma: float = 0.05  # weight of the contrastive loss
    temperature: float = 0.1
    noise: float = 0.1  # multiplicative, on both views
    permutations: int = 5  # of every donor, for the first view; 0: none
    coordinates: str = "canonical"
    token: int | None = None  # None: the widest residual stream of the zoo
    seed: int = 0


class TokenAutoencoder(ModelMixin, ConfigMixin):
    """token: T; latent: R; hidden: width of the transformers; positions: rows of the three tables of position
    embeddings; window: W, which the projection head of the contrastive loss is made for."""

    CONFIG_KINDS: ClassVar = {
        **dict.fromkeys(("token", "latent", "hidden", "layers", "window"), int),
        "positions": [int],
    }

    @register_to_config
    def __init__(self, token: int, latent: int, hidden: int, layers: int, positions: list[int], window: int) -> None:
        super().__init__()
        self.into, self.compress = nn.Linear(token, hidden), nn.Linear(hidden, latent)
        self.expand, self.out = nn.Linear(latent, hidden), nn.Linear(hidden, token)
        self.encoder, self.decoder = _transformer(hidden, layers), _transformer(hidden, layers)
        self.tables = nn.ModuleList([nn.Embedding(n, hidden // 2) for n in positions])
        self.projection = nn.Sequential(
            nn.Linear(latent * window, 30, bias=False), nn.LayerNorm(30), nn.ReLU(),
            nn.Linear(30, 30, bias=False), nn.LayerNorm(30), nn.ReLU(),
        )  # fmt: skip
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for name, p in self.named_parameters():
            if name.endswith(("out_proj.weight", "linear2.weight")):
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * layers))

    def _position_embedding(self, positions: Tensor) -> Tensor:
        """int64 [..., 3] -> [..., hidden]; positions beyond those seen are the last one seen."""
        token, tensor, row = (
            table(p.clamp(max=size - 1))
            for table, size, p in zip(self.tables, self.config["positions"], positions.unbind(-1), strict=True)
        )
        return torch.cat([token + tensor, row], dim=-1)

    def encode(self, values: Tensor, positions: Tensor) -> Tensor:
        """[B, W, T], int64 [B, W, 3] -> [B, W, R]"""
        return self.compress(self.encoder(self.into(values) + self._position_embedding(positions)))

    def decode(self, latents: Tensor, positions: Tensor) -> Tensor:
        """[B, W, R], int64 [B, W, 3] -> [B, W, T]"""
        return self.out(self.decoder(self.expand(latents) + self._position_embedding(positions)))


def _transformer(hidden: int, layers: int) -> nn.TransformerEncoder:
    block = nn.TransformerEncoderLayer(
        hidden, 4, 4 * hidden, dropout=0.0, activation=F.gelu, batch_first=True, norm_first=True, bias=False
    )
    return nn.TransformerEncoder(block, layers, norm=nn.LayerNorm(hidden, bias=False), enable_nested_tensor=False)


def contrastive_loss(one: Tensor, other: Tensor, temperature: float) -> Tensor:
    """NT-Xent (2002.05709) of two views [B, C]: a scalar."""
    z = F.normalize(torch.cat([one, other]), dim=1)
    similarity = z @ z.T / temperature
    similarity = similarity.masked_fill(torch.eye(len(z), dtype=torch.bool, device=z.device), -math.inf)
    count = len(one)
    partner = torch.cat([torch.arange(count, 2 * count), torch.arange(count)]).to(z.device)
    return F.cross_entropy(similarity, partner)


@torch.no_grad()
def run_with_halos(model: TokenAutoencoder, what: str, inputs: Tensor, positions: Tensor) -> Tensor:
    """`encode` or `decode` of a whole sequence, window by window: [N, .] -> [N, .] on the CPU."""
    window = model.config["window"]
    parts = halo_windows(len(inputs), window // 2, window // 4)
    out, device = [], model.device
    for at in range(0, len(parts), WINDOWS_AT_ONCE):
        some = parts[at : at + WINDOWS_AT_ONCE]
        x = torch.stack([inputs[a:b] for a, b, _, _ in some]).to(device)
        made = getattr(model, what)(x, torch.stack([positions[a:b] for a, b, _, _ in some]).to(device)).cpu()
        out += [y[first - a : last - a] for y, (a, _, first, last) in zip(made, some, strict=True)]
    return torch.cat(out)


@dataclass(frozen=True)
class _Corpus:
    """What the autoencoder learns from: the tokens of each donor, and those of its random permutations."""

    plain: list[Tokens]
    views: list[list[Tokens]]
    window: int

    def draw(self, config: SaneTrainConfig, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """(values, mask, positions) of a batch: permuted donors first, then the same windows of the donors as they
        are, all with multiplicative noise. A function of the seed and the step."""
        rng = stream(config.seed, f"step {step}")
        share = torch.tensor([float(len(t.values)) for t in self.plain])
        picks = torch.multinomial(share, config.batch, True, generator=rng).tolist()
        one, other = [], []
        for pick in picks:
            own, again = self.plain[pick], self.views[pick]
            start = int(torch.randint(len(own.values) - self.window + 1, (1,), generator=rng))
            which = again[int(torch.randint(len(again), (1,), generator=rng))]
            part = slice(start, start + self.window)
            one.append((which.values[part], which.mask[part], which.positions[part]))
            other.append((own.values[part], own.mask[part], own.positions[part]))
        values, mask, positions = (torch.stack(parts) for parts in zip(*one, *other, strict=True))
        return values * (1 + config.noise * torch.randn(values.shape, generator=rng)), mask, positions


def _read_corpus(
    donors: list[Weights], stats: Mapping[str, list[float]], size: int, config: SaneTrainConfig
) -> _Corpus:
    plain = [_standardized_tokens(d.blueprint, d.tensors, stats, size) for d in donors]
    views = []
    for donor, own in zip(donors, plain, strict=True):
        streams = [stream(config.seed, f"{donor.name} {i}") for i in range(config.permutations)]
        permuted = [random_permutation(donor, rng) for rng in streams]
        views.append([_standardized_tokens(donor.blueprint, p, stats, size) for p in permuted] or [own])
    return _Corpus(plain, views, min(config.window, *(len(t.values) for t in plain)) // 4 * 4)


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
    """Trains the autoencoder and encodes the donors, which are the anchors; writes both to `out`.

    parameters: the largest number allowed; settings: fields of `SaneTrainConfig`. resume=True continues an interrupted
    run, with `steps` to the same bytes. UserError for an unusable zoo, too few parameters, or an `out` that exists."""
    out, opened = Path(out), Zoo.open(zoo)
    config, budget = SaneTrainConfig(seed=seed, **settings), training.Budget(steps, seconds)
    identity = training.peer_identity(PEER, asdict(config) | asdict(budget) | {"parameters": parameters}, opened)
    if training.claim_folder(out, resume, identity):
        return out
    donors = read_weights(opened, config.coordinates, quiet)
    size = config.token or max(d.metadata.width for d in donors)
    stats = layer_statistics(donors)
    corpus = _read_corpus(donors, stats, size, config)
    model = _build(_fixed_sizes(corpus, size, config), parameters, seed).to(device)
    state = out / "autoencoder.state"
    outcome = training.train_resumable(
        model, torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=3e-9),
        lambda step: _loss(model, corpus.draw(config, step), config),
        lambda spent: one_cycle_lr(config.lr, spent), budget, state, identity, PEER, quiet,
    )  # fmt: skip
    model.eval().cpu()
    model.save_pretrained(out)
    latents = {
        d.name: run_with_halos(model, "encode", t.values, t.positions)
        for d, t in zip(donors, corpus.plain, strict=True)
    }
    save_file(latents, out / ANCHORS)
    spread = torch.cat(list(latents.values())).std(0).square().mean().sqrt()
    content = {
        "peer": PEER, "identity": identity, "recipe": asdict(config), "statistics": stats,
        "donors": provenance_records(opened, donors), "anchors": {d.name: d.blueprint.config for d in donors},
        "parameters": training.parameter_count(model), "training": {"autoencoder": outcome.to_json()},
        "latent_deviation": float(spread),
    }  # fmt: skip
    training.write_record(out, content)
    state.unlink()
    return out


def _fixed_sizes(corpus: _Corpus, size: int, config: SaneTrainConfig) -> dict[str, Any]:
    """The sizes of the autoencoder that do not depend on the budget of parameters."""
    return {
        "token": size,
        "latent": max(1, round(size / config.rate)),
        "layers": config.layers,
        "positions": [int(max(t.positions[:, i].max() for t in corpus.plain)) + 1 for i in range(3)],
        "window": corpus.window,
    }


def _loss(model: TokenAutoencoder, batch: tuple[Tensor, Tensor, Tensor], config: SaneTrainConfig) -> Tensor:
    """The contrastive loss of the two views and the error of the decoded tokens, weighted by gamma."""
    values, mask, positions = (part.to(model.device) for part in batch)
    latents = model.encode(values, positions)
    error = F.mse_loss(mask * model.decode(latents, positions), values)
    first, second = model.projection(latents.flatten(1)).chunk(2)
    contrast = contrastive_loss(first, second, config.temperature)
    return config.gamma * contrast + (1 - config.gamma) * error


def one_cycle_lr(peak: float, spent: float) -> float:
    """torch's OneCycleLR as a function of the share of the budget: cosine up over 0.3 of it, and down."""
    low, end = peak / 25, peak / 25 / 1e4
    start, stop, share = (low, peak, spent / 0.3) if spent < 0.3 else (peak, end, (spent - 0.3) / 0.7)
    return stop + (start - stop) * 0.5 * (1 + math.cos(math.pi * share))


def _standardized_tokens(
    blueprint: Blueprint, tensors: Mapping[str, Tensor], stats: Mapping[str, list[float]], size: int
) -> Tokens:
    return to_tokens(blueprint, standardize(blueprint, tensors, stats), size)


def _build(fixed: dict[str, Any], parameters: int, seed: int) -> TokenAutoencoder:
    def count(hidden: int) -> int:
        with torch.device("meta"):
            return training.parameter_count(TokenAutoencoder(hidden=hidden, **fixed))

    hidden = training.widest_within(count, parameters, 4, 16)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return TokenAutoencoder(hidden=hidden, **fixed)


def load_peer(model: str | None) -> tuple[TokenAutoencoder, dict[str, Any], Path]:
    folder, content = training.open_record(model, PEER)
    coder = load_component(
        TokenAutoencoder, folder, "config.json", f"train one with `python -m benchmarks.peers.{PEER}`"
    )
    return coder.eval(), content, folder


def reconstruct_donor(model: str | Path, donor: str | Donor, zoo: Zoo, device: str = "cpu") -> Reconstruction:
    """A donor encoded and decoded by the autoencoder, in the coordinates that the autoencoder was trained in."""
    coder, content, _ = load_peer(str(model))
    coordinates = content["recipe"]["coordinates"]
    name = donor if isinstance(donor, str) else donor.name
    weights = next(w for w in read_weights(zoo, coordinates) if w.name == name)
    return reconstruct_weights(coder.to(device), content, weights)


def input_rows(coder: TokenAutoencoder, content: Mapping[str, Any], weights: Weights) -> Tensor:
    """[N, T]: a donor in the form that the autoencoder reads."""
    return _standardized_tokens(weights.blueprint, weights.tensors, content["statistics"], coder.config["token"]).values


def reconstruct_weights(
    coder: TokenAutoencoder,
    content: Mapping[str, Any],
    weights: Weights,
    replacement: Callable[[Tensor], Tensor] | None = None,
) -> Reconstruction:
    """`reconstruct_donor` with everything loaded. replacement: a function of the rows instead of the autoencoder."""
    tokens = _standardized_tokens(weights.blueprint, weights.tensors, content["statistics"], coder.config["token"])
    if replacement is None:
        latents = run_with_halos(coder, "encode", tokens.values, tokens.positions)
        values = run_with_halos(coder, "decode", latents, tokens.positions)
    else:
        values = replacement(tokens.values)
    made = from_tokens(weights.blueprint, values)
    made = standardize(weights.blueprint, made, content["statistics"], inverse=True)
    return make_reconstruction(weights, made, len(values) * coder.config["latent"], content["recipe"]["coordinates"])


@dataclass(kw_only=True)
class SANE(Sampler):
    """Every token's latent is drawn from a kernel density over the anchors' latents of the corresponding token, and
    the sequence decoded with halos. Our choice: anchors are the donors as wide as the target, or the widest ones."""

    name: ClassVar[str] = "benchmarks.peers.sane.SANE"
    family: ClassVar[str] = "generative"
    summary: ClassVar[str] = (
        "SANE: row tokens through a transformer autoencoder, a kernel density over anchors' latents"
    )
    reference: ClassVar[str] = "2406.09997"
    needs: ClassVar[tuple[str, ...]] = ("model",)
    choices: ClassVar[dict[str, tuple[str, ...]]] = {"mode": ("token", "individual", "joint")}

    model: str | None = option(None, "folder of a trained SANE")
    mode: str = option("token", "what is drawn at once: the latent of a token, each number of it, or a whole anchor")
    bandwidth: float = option(0.2, "deviation of the normal kernel", least=0.0)
    candidates: int = option(1, "models drawn; the best on the text is kept (sub-sampling); 1: no choice", least=1)
    text: str | None = option(None, "file on which several candidates are compared")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._coder: TokenAutoencoder | None = None
        self._content: dict[str, Any] = {}
        self._anchors: dict[str, Tensor] = {}

    def fit(self, zoo: Zoo | None, blueprint: Blueprint) -> Self:
        require_unit_target(blueprint, "target")
        if self.candidates > 1 and self.text is None:
            raise UserError(f"{PEER}: several candidates are compared on a text; give --set text=FILE")
        self._open()
        return self

    def _open(self) -> None:
        self._coder, self._content, folder = load_peer(self.model)
        self._coder.to(self.device)
        self._anchors = load_file(folder / ANCHORS)

    def sample(self, blueprint: Blueprint, seed: int = 0) -> Iterator[tuple[str, Tensor]]:
        if self._coder is None:
            raise RuntimeError(f"{PEER}: call fit before sample")
        if self.candidates == 1:
            yield from self._draw(blueprint, seed, 0)
            return
        from benchmarks.peers.scoring import loss_on_file

        assert self.text is not None
        losses = [
            loss_on_file(blueprint, dict(self._draw(blueprint, seed, i)), self.text) for i in range(self.candidates)
        ]
        yield from self._draw(blueprint, seed, min(range(len(losses)), key=lambda i: losses[i]))

    def _draw(self, blueprint: Blueprint, seed: int, candidate: int) -> Iterator[tuple[str, Tensor]]:
        assert self._coder is not None
        size, coordinates = self._coder.config["token"], self._content["recipe"]["coordinates"]
        target = learned_blueprint(blueprint, coordinates)
        latents = self._latents(target, size, stream(seed, f"{PEER} {candidate}"))
        positions = to_tokens(target, {s.name: torch.zeros(s.shape) for s in target.specs}, size).positions
        tokens = run_with_halos(self._coder, "decode", latents, positions)
        tensors = standardize(target, from_tokens(target, tokens), self._content["statistics"], inverse=True)
        yield from to_checkpoint(tensors.items(), blueprint, coordinates)

    def _latents(self, target: Blueprint, size: int, rng: torch.Generator) -> Tensor:
        """[N, R] of the target, drawn in the option's mode."""
        assert target.metadata is not None
        coordinates = self._content["recipe"]["coordinates"]
        shapes = {
            n: learned_blueprint(Blueprint.from_config(c), coordinates) for n, c in self._content["anchors"].items()
        }
        widths = {name: b.metadata.width for name, b in shapes.items() if b.metadata is not None}
        enough = min(target.metadata.width, max(widths.values()))
        chosen = sorted(name for name, width in widths.items() if width >= enough)
        anchors = torch.stack([self._anchors[n][matching_tokens(target, shapes[n], size)] for n in chosen])  # [M, N, R]
        return draw_from_kernel_density(anchors, self.mode, self.bandwidth, rng)

    def provenance(self, zoo: Zoo | None) -> list[dict[str, Any]]:
        """The donors that the peer learned from, not those of `zoo`."""
        return list(self._content["donors"])

    def restore(self, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self._open()


def draw_from_kernel_density(anchors: Tensor, mode: str, bandwidth: float, rng: torch.Generator) -> Tensor:
    """[M, N, R] -> [N, R]: one draw from normal kernel densities over the anchors, independent between tokens (mode
    token), between all numbers (individual), or of the whole sequence (joint)."""
    count, tokens, latent = anchors.shape
    shape = {"token": (tokens, 1), "individual": (tokens, latent), "joint": (1, 1)}[mode]
    pick = torch.randint(count, shape, generator=rng).expand(tokens, latent)
    return anchors.gather(0, pick[None])[0] + bandwidth * torch.randn(tokens, latent, generator=rng)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    training.add_training_arguments(parser)
    given = vars(parser.parse_args())
    began = time.perf_counter()
    print(train(**given, quiet=False), f"{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
