"""SANE (2406.09997), rebuilt small: rows as tokens, a transformer autoencoder, kernel densities over latents.

    python -m benchmarks.peers.sane --zoo DIR --out DIR --seconds 300 --parameters 2600000

Every matrix is cut into its rows and every row into tokens of one size, zero-padded under a mask; a token's position is
(token, tensor, row). README.md says what is from the paper, what is smaller and what is reconstructed.

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
    correspondence,
    detokenise,
    permuted,
    standardised,
    statistics,
    tokenise,
    windows,
)
from benchmarks.peers.weights import Rebuilt, Weights, finish, modelled, read, rebuilt, records
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
DECODED = 64  # windows that are decoded at once: fixed, so that results depend on the seed alone


@dataclass(frozen=True)
class Recipe:
    """As published where README.md does not say otherwise. rate: token size over latent size."""

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

    def _where(self, positions: Tensor) -> Tensor:
        """int64 [..., 3] -> [..., hidden]; positions beyond those seen are the last one seen."""
        token, tensor, row = (
            table(p.clamp(max=size - 1))
            for table, size, p in zip(self.tables, self.config["positions"], positions.unbind(-1), strict=True)
        )
        return torch.cat([token + tensor, row], dim=-1)

    def encode(self, values: Tensor, positions: Tensor) -> Tensor:
        """[B, W, T], int64 [B, W, 3] -> [B, W, R]"""
        return self.compress(self.encoder(self.into(values) + self._where(positions)))

    def decode(self, latents: Tensor, positions: Tensor) -> Tensor:
        """[B, W, R], int64 [B, W, 3] -> [B, W, T]"""
        return self.out(self.decoder(self.expand(latents) + self._where(positions)))


def _transformer(hidden: int, layers: int) -> nn.TransformerEncoder:
    block = nn.TransformerEncoderLayer(
        hidden, 4, 4 * hidden, dropout=0.0, activation=F.gelu, batch_first=True, norm_first=True, bias=False
    )
    return nn.TransformerEncoder(block, layers, norm=nn.LayerNorm(hidden, bias=False), enable_nested_tensor=False)


def contrast(one: Tensor, other: Tensor, temperature: float) -> Tensor:
    """NT-Xent (2002.05709) of two views [B, C]: a scalar."""
    z = F.normalize(torch.cat([one, other]), dim=1)
    similarity = z @ z.T / temperature
    similarity = similarity.masked_fill(torch.eye(len(z), dtype=torch.bool, device=z.device), -math.inf)
    count = len(one)
    partner = torch.cat([torch.arange(count, 2 * count), torch.arange(count)]).to(z.device)
    return F.cross_entropy(similarity, partner)


@torch.no_grad()
def haloed(model: TokenAutoencoder, what: str, inputs: Tensor, positions: Tensor) -> Tensor:
    """`encode` or `decode` of a whole sequence, window by window: [N, .] -> [N, .] on the CPU."""
    window = model.config["window"]
    parts = windows(len(inputs), window // 2, window // 4)
    out, device = [], model.device
    for at in range(0, len(parts), DECODED):
        some = parts[at : at + DECODED]
        x = torch.stack([inputs[a:b] for a, b, _, _ in some]).to(device)
        made = getattr(model, what)(x, torch.stack([positions[a:b] for a, b, _, _ in some]).to(device)).cpu()
        out += [y[first - a : last - a] for y, (a, _, first, last) in zip(made, some, strict=True)]
    return torch.cat(out)


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

    parameters: at most so many; settings: fields of `Recipe`. An interrupted run is continued with resume=True; under
    `steps` to the same bytes. Raises UserError for an unusable zoo, too few parameters, or an `out` that exists."""
    out, opened = Path(out), Zoo.open(zoo)
    recipe, budget = Recipe(seed=seed, **settings), training.Budget(steps, seconds)
    known = training.identity_of(PEER, asdict(recipe) | asdict(budget) | {"parameters": parameters}, opened)
    if training.begin(out, resume, known):
        return out
    donors = read(opened, recipe.coordinates, quiet)
    size = recipe.token or max(d.metadata.width for d in donors)
    stats = statistics(donors)
    plain = [_tokens(d.blueprint, d.tensors, stats, size) for d in donors]
    views = [
        [_tokens(d.blueprint, permuted(d, stream(seed, f"{d.name} {i}")), stats, size)
         for i in range(recipe.permutations)] or [own]
        for d, own in zip(donors, plain, strict=True)
    ]  # fmt: skip
    window = min(recipe.window, *(len(t.values) for t in plain)) // 4 * 4
    fixed = dict(
        token=size,
        latent=max(1, round(size / recipe.rate)),
        layers=recipe.layers,
        positions=[int(max(t.positions[:, i].max() for t in plain)) + 1 for i in range(3)],
        window=window,
    )
    model = _sized(fixed, parameters, seed).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, weight_decay=3e-9)
    share = torch.tensor([float(len(t.values)) for t in plain])

    def loss(step: int) -> Tensor:
        rng = stream(seed, f"step {step}")
        picks = torch.multinomial(share, recipe.batch, True, generator=rng).tolist()
        one, other = [], []
        for pick in picks:
            own, again = plain[pick], views[pick]
            start = int(torch.randint(len(own.values) - window + 1, (1,), generator=rng))
            which = again[int(torch.randint(len(again), (1,), generator=rng))]
            cut = slice(start, start + window)
            one.append((which.values[cut], which.mask[cut], which.positions[cut]))
            other.append((own.values[cut], own.mask[cut], own.positions[cut]))
        values, mask, positions = (torch.stack(parts) for parts in zip(*one, *other, strict=True))
        values = values * (1 + recipe.noise * torch.randn(values.shape, generator=rng))
        values, mask, positions = values.to(device), mask.to(device), positions.to(device)
        latents = model.encode(values, positions)
        wrong = F.mse_loss(mask * model.decode(latents, positions), values)
        told = model.projection(latents.flatten(1))
        first, second = told.chunk(2)
        return recipe.gamma * contrast(first, second, recipe.temperature) + (1 - recipe.gamma) * wrong

    state = out / "autoencoder.state"
    outcome = training.run(
        model, optimizer, loss, lambda spent: one_cycle(recipe.lr, spent), budget, state, known, PEER, quiet
    )
    model.eval().cpu()
    model.save_pretrained(out)
    latents = {d.name: haloed(model, "encode", t.values, t.positions) for d, t in zip(donors, plain, strict=True)}
    save_file(latents, out / ANCHORS)
    spread = torch.cat(list(latents.values())).std(0).square().mean().sqrt()
    content = {
        "peer": PEER, "identity": known, "recipe": asdict(recipe), "statistics": stats,
        "donors": records(opened, donors), "anchors": {d.name: d.blueprint.config for d in donors},
        "parameters": training.parameters(model), "training": {"autoencoder": outcome.to_json()},
        "latent_deviation": float(spread),
    }  # fmt: skip
    training.write_record(out, content)
    state.unlink()
    return out


def one_cycle(peak: float, spent: float) -> float:
    """torch's OneCycleLR as a function of the share of the budget: cosine up over 0.3 of it, and down."""
    low, end = peak / 25, peak / 25 / 1e4
    start, stop, share = (low, peak, spent / 0.3) if spent < 0.3 else (peak, end, (spent - 0.3) / 0.7)
    return stop + (start - stop) * 0.5 * (1 + math.cos(math.pi * share))


def _tokens(blueprint: Blueprint, tensors: Mapping[str, Tensor], stats: Mapping[str, list[float]], size: int) -> Tokens:
    return tokenise(blueprint, standardised(blueprint, tensors, stats), size)


def _sized(fixed: dict[str, Any], parameters: int, seed: int) -> TokenAutoencoder:
    def count(hidden: int) -> int:
        with torch.device("meta"):
            return training.parameters(TokenAutoencoder(hidden=hidden, **fixed))

    hidden = training.widest(count, parameters, 4, 16)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return TokenAutoencoder(hidden=hidden, **fixed)


def load(model: str | None) -> tuple[TokenAutoencoder, dict[str, Any], Path]:
    folder, content = training.open_record(model, PEER)
    coder = load_component(
        TokenAutoencoder, folder, "config.json", f"train one with `python -m benchmarks.peers.{PEER}`"
    )
    return coder.eval(), content, folder


def reconstruct(model: str | Path, donor: str | Donor, zoo: Zoo, device: str = "cpu") -> Rebuilt:
    """A donor of the zoo through the autoencoder, in the coordinates that it was trained in."""
    coder, content, _ = load(str(model))
    coordinates = content["recipe"]["coordinates"]
    name = donor if isinstance(donor, str) else donor.name
    weights = next(w for w in read(zoo, coordinates) if w.name == name)
    return through(coder.to(device), content, weights)


def rows(coder: TokenAutoencoder, content: Mapping[str, Any], weights: Weights) -> Tensor:
    """[N, T]: a donor as the autoencoder is given it."""
    return _tokens(weights.blueprint, weights.tensors, content["statistics"], coder.config["token"]).values


def through(
    coder: TokenAutoencoder,
    content: Mapping[str, Any],
    weights: Weights,
    instead: Callable[[Tensor], Tensor] | None = None,
) -> Rebuilt:
    """`reconstruct`, with everything loaded. instead: what is done with the rows in the autoencoder's place."""
    tokens = _tokens(weights.blueprint, weights.tensors, content["statistics"], coder.config["token"])
    if instead is None:
        latents = haloed(coder, "encode", tokens.values, tokens.positions)
        values = haloed(coder, "decode", latents, tokens.positions)
    else:
        values = instead(tokens.values)
    made = detokenise(weights.blueprint, values)
    made = standardised(weights.blueprint, made, content["statistics"], inverse=True)
    return rebuilt(weights, made, len(values) * coder.config["latent"], content["recipe"]["coordinates"])


@dataclass(kw_only=True)
class SANE(Sampler):
    """Every token's latent is drawn from a kernel density over the anchors' latents of the corresponding token, and
    the sequence decoded with halos. Anchors: the donors as wide as the target, or the widest ones [R]."""

    name: ClassVar[str] = "benchmarks.peers.sane.SANE"
    family: ClassVar[str] = "generative"
    summary: ClassVar[str] = (
        "SANE: row tokens through a transformer autoencoder, a kernel density over anchors' latents"
    )
    reference: ClassVar[str] = "2406.09997"
    needs: ClassVar[tuple[str, ...]] = ("model",)
    choices: ClassVar[dict[str, tuple[str, ...]]] = {"mode": ("token", "individual", "joint")}

    model: str | None = option(None, "folder of a trained SANE")
    mode: str = option("token", "what is drawn as one: a token's latent, every number of it, or a whole anchor")
    bandwidth: float = option(0.2, "deviation of the normal kernel", least=0.0)
    candidates: int = option(1, "models drawn, of which the best on the text is kept (sub-sampling); 1: none", least=1)
    text: str | None = option(None, "file that candidates are measured on (only where there are several)")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._coder: TokenAutoencoder | None = None
        self._content: dict[str, Any] = {}
        self._anchors: dict[str, Tensor] = {}

    def fit(self, zoo: Zoo | None, blueprint: Blueprint) -> Self:
        require_unit_target(blueprint, "target")
        if self.candidates > 1 and self.text is None:
            raise UserError(f"{PEER}: several candidates are told apart on a text; give --set text=FILE")
        self._open()
        return self

    def _open(self) -> None:
        self._coder, self._content, folder = load(self.model)
        self._coder.to(self.device)
        self._anchors = load_file(folder / ANCHORS)

    def sample(self, blueprint: Blueprint, seed: int = 0) -> Iterator[tuple[str, Tensor]]:
        if self._coder is None:
            raise RuntimeError("sane: call fit before sample")
        if self.candidates == 1:
            yield from self._draw(blueprint, seed, 0)
            return
        from benchmarks.peers.scoring import text_loss

        assert self.text is not None
        losses = [text_loss(blueprint, dict(self._draw(blueprint, seed, i)), self.text) for i in range(self.candidates)]
        yield from self._draw(blueprint, seed, min(range(len(losses)), key=lambda i: losses[i]))

    def _draw(self, blueprint: Blueprint, seed: int, candidate: int) -> Iterator[tuple[str, Tensor]]:
        assert self._coder is not None
        size, coordinates = self._coder.config["token"], self._content["recipe"]["coordinates"]
        target = modelled(blueprint, coordinates)
        latents = self._latents(target, size, stream(seed, f"{PEER} {candidate}"))
        positions = tokenise(target, {s.name: torch.zeros(s.shape) for s in target.specs}, size).positions
        tokens = haloed(self._coder, "decode", latents, positions)
        tensors = standardised(target, detokenise(target, tokens), self._content["statistics"], inverse=True)
        yield from finish(tensors.items(), blueprint, coordinates)

    def _latents(self, target: Blueprint, size: int, rng: torch.Generator) -> Tensor:
        """[N, R] of the target, drawn in the option's mode."""
        assert target.metadata is not None
        coordinates = self._content["recipe"]["coordinates"]
        shapes = {n: modelled(Blueprint.from_config(c), coordinates) for n, c in self._content["anchors"].items()}
        widths = {name: b.metadata.width for name, b in shapes.items() if b.metadata is not None}
        enough = min(target.metadata.width, max(widths.values()))
        chosen = sorted(name for name, width in widths.items() if width >= enough)
        anchors = torch.stack([self._anchors[n][correspondence(target, shapes[n], size)] for n in chosen])  # [M, N, R]
        return kernel_draw(anchors, self.mode, self.bandwidth, rng)

    def provenance(self, zoo: Zoo | None) -> list[dict[str, Any]]:
        """The donors that it learned from, not those of `zoo`."""
        return list(self._content["donors"])

    def restore(self, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self._open()


def kernel_draw(anchors: Tensor, mode: str, bandwidth: float, rng: torch.Generator) -> Tensor:
    """[M, N, R] -> [N, R]: one draw from normal kernel densities over the anchors, independent between tokens (mode
    token), between all numbers (individual), or of the whole sequence (joint)."""
    count, tokens, latent = anchors.shape
    shape = {"token": (tokens, 1), "individual": (tokens, latent), "joint": (1, 1)}[mode]
    pick = torch.randint(count, shape, generator=rng).expand(tokens, latent)
    return anchors.gather(0, pick[None])[0] + bandwidth * torch.randn(tokens, latent, generator=rng)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    training.add_arguments(parser)
    given = vars(parser.parse_args())
    began = time.perf_counter()
    print(train(**given, quiet=False), f"{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
