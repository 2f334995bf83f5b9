"""Convolution filters from a donor's covariance, on scikit-learn's digits: networks of another width, at equal steps.

    python -m benchmarks.convolutions     two minutes on one core; writes convolutions.json and prints the table

Three plain 5 x 5 networks, 12 channels wide, are the zoo; the target is 20 wide. Every method is trained on the same
batches per seed with a learning rate out of one grid, the default over its scale too (lowest mean final loss).
"""

from __future__ import annotations

import json
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import paths
from benchmarks.head_start.costs import fit_and_sample_rates
from headstart import samplers
from headstart.report.scores import interval
from zoo.checkpoints.atomic import replace_file
from zoo.donors.memory import load_into, zoo_of
from zoo.donors.zoo import Zoo
from zoo.targets.blueprint import Blueprint
from zoo.training.loop import reproducible

RESULTS = paths.RESULTS / "convolutions.json"
STEPS, SEEDS, LRS, SCALES, WIDTH = 80, (0, 1, 2), (1e-3, 2e-3, 5e-3, 1e-2), (1.0, 1.5, 2.0, 3.0), 20
TRAINING_DIGITS = 1300  # digits for training, out of 1,797; the rest is held out


def build_network(width: int) -> nn.Sequential:
    """Four plain 5 x 5 convolutions."""
    layers: list[nn.Module] = []
    for i in range(4):
        layers += [nn.Conv2d(width if i else 1, width, 5, padding="same"), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


def load_digits_split() -> tuple[Tensor, Tensor]:
    """[1797, 1, 8, 8] float32 of unit variance and [1797] int64, shuffled."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8)[order]
    return (x - x.mean()) / x.std(), torch.tensor(labels)[order]


def train(
    model: nn.Module, data: tuple[Tensor, Tensor], seed: int, steps: int, lr: float, weight_decay: float = 0.01
) -> float:
    """The loss on held-out digits after training; batches depend on the seed alone."""
    x, y = data
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        i = torch.randint(TRAINING_DIGITS, (32,), generator=generator)
        loss = F.cross_entropy(model(x[i]), y[i])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return float(F.cross_entropy(model(x[TRAINING_DIGITS:]), y[TRAINING_DIGITS:]))


def train_donors(data: tuple[Tensor, Tensor]) -> Zoo:
    """Three trained networks that are narrower than the target."""
    found: dict[str, nn.Module] = {}
    for seed in range(100, 103):
        torch.manual_seed(seed)
        found[str(seed)] = build_network(12)
        train(found[str(seed)], data, seed, steps=400, lr=3e-3, weight_decay=0.1)
    return zoo_of(found)


def sample_filters(method: str, zoo: Zoo, seed: int) -> dict[str, Tensor]:
    """The target's four convolutions from a method; `conv-covariance, permuted`: its values in random places."""
    blueprint = Blueprint.from_module(build_network(WIDTH))
    name, _, control = method.partition(", ")
    sampler = samplers.get(name)().fit(zoo, blueprint)
    drawn = {k: t for k, t in sampler.sample(blueprint, seed) if t.ndim == 4}
    if control:
        generator = torch.Generator().manual_seed(seed)
        for k, t in drawn.items():
            drawn[k] = t.flatten()[torch.randperm(t.numel(), generator=generator)].view(t.shape)
    return drawn


def initialised_network(method: str, scale: float, zoo: Zoo, seed: int) -> nn.Sequential:
    """torch's default network of the seed, convolutions times `scale`, or replaced by those of the method."""
    torch.manual_seed(seed)
    model = build_network(WIDTH)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale if parameter.ndim == 4 else 1.0)
    if method != "default":
        load_into(model, sample_filters(method, zoo, seed).items())
    return model


def measure(progress: Callable[[str], None] = lambda line: None) -> dict[str, dict[str, object]]:
    """method -> {lr, scale, finals, mean, std, ci95}."""
    data = load_digits_split()
    zoo = train_donors(data)
    found: dict[str, dict[str, object]] = {}
    for method in ("default", "normal", "permuted", "conv-covariance", "conv-covariance, permuted"):
        runs = {
            (scale, lr): [train(initialised_network(method, scale, zoo, seed), data, seed, STEPS, lr) for seed in SEEDS]
            for scale in (SCALES if method == "default" else (1.0,))
            for lr in LRS
        }
        (scale, lr), finals = min(runs.items(), key=lambda run: sum(run[1]))
        found[method] = {"lr": lr, "scale": scale, "finals": finals, **interval(finals)}
        progress(f"{method:28s} lr {lr:g} scale {scale:g}  " + "  ".join(f"{loss:.3f}" for loss in finals))
        if method == "default":
            at_one = {run: losses for run, losses in runs.items() if run[0] == 1.0}
            (_, lr), finals = min(at_one.items(), key=lambda run: sum(run[1]))
            found["default, scale 1"] = {"lr": lr, "scale": 1.0, "finals": finals, **interval(finals)}
    return found


def table(found: dict[str, dict[str, object]]) -> str:
    rows = ["| filters | learning rate | held-out loss, 80 steps |", "|---|---|---|"]
    for method, m in sorted(found.items(), key=lambda item: item[1]["mean"]):  # type: ignore[arg-type,return-value]
        label = f"default, tuned (scale {m['scale']:g})" if method == "default" else method
        rows.append(f"| {label} | {m['lr']:g} | {m['mean']:.3f} ± {m['std']:.3f} |")
    return "\n".join(rows)


def main() -> None:
    with reproducible():
        found = measure(print)
        sampler = samplers.get("conv-covariance")()
        cost = fit_and_sample_rates(
            sampler, train_donors(load_digits_split()), Blueprint.from_module(build_network(WIDTH))
        )
    content = {"steps": STEPS, "seeds": SEEDS, "lrs": LRS, "scales": SCALES, "torch": torch.__version__}
    replace_file(RESULTS, (json.dumps(content | {"cost": cost, "methods": found}, indent=1) + "\n").encode())
    print(table(found))


if __name__ == "__main__":
    main()
