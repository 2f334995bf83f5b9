"""Networks of any width from one trained MLP: the experiment behind row-column sampling (2408.08681).

A small MLP is trained once. Networks of other widths are made of its rows and columns, and their accuracy is measured
without training. A few are then trained, beside networks of the same width from the default initialisation.

    python examples/mean_field_mlp.py --mnist mnist.npz      (or a folder of the four IDX files)
    python examples/mean_field_mlp.py                        (scikit-learn's digits)
"""

from __future__ import annotations

import argparse
import gzip
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from baselines.transfer.row_column import RowColumn
from zoo.donors.memory import load_into, zoo_of
from zoo.donors.zoo import Zoo
from zoo.errors import UserError
from zoo.streams import stream
from zoo.targets.blueprint import Blueprint

VARIANTS: dict[str, dict[str, Any]] = {
    "balanced, n/N": {"sampling": "balanced", "scale": "n/N"},
    "iid, n/N": {"sampling": "iid", "scale": "n/N"},
    "iid, 1/multiplicity": {"sampling": "iid", "scale": "1/multiplicity"},
    "uncoupled": {"sampling": "balanced", "scale": "n/N", "coupling": "uncoupled"},
}
IDX_FILES = {
    "x_train": "train-images-idx3",
    "y_train": "train-labels-idx1",
    "x_test": "t10k-images-idx3",
    "y_test": "t10k-labels-idx1",
}


@dataclass(frozen=True)
class Data:
    """Images flattened to [n, pixels] in 0..1, labels [n] int64."""

    name: str
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor


def load_mnist(path: Path) -> Data:
    """path: an .npz with x_train, y_train, x_test and y_test, or a folder of the four IDX files, gzipped or not.
    UserError for anything else."""
    arrays = {key: _read_idx(path, stem) for key, stem in IDX_FILES.items()} if path.is_dir() else _read_npz(path)
    for part in ("train", "test"):
        x, y = arrays[f"x_{part}"], arrays[f"y_{part}"]
        if x.ndim < 2 or y.ndim != 1 or len(x) != len(y) or not len(y) or y.max() > 9:
            raise UserError(
                f"{path}: {part} has {x.shape} images and {y.shape} labels; give one label of 0 to 9 per image"
            )
    images = [torch.from_numpy(arrays[key]).flatten(1).float() / 255 for key in ("x_train", "x_test")]
    labels = [torch.from_numpy(arrays[key]).long() for key in ("y_train", "y_test")]
    return Data("MNIST", images[0], labels[0], images[1], labels[1])


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    advice = f"give an .npz with {', '.join(IDX_FILES)}, or a folder of the IDX files"
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path}: {'is not an .npz file' if path.exists() else 'does not exist'}; {advice}")
    try:
        with np.load(path, allow_pickle=False) as archive:
            if missing := [key for key in IDX_FILES if key not in archive.files]:
                raise UserError(f"{path}: has no {', '.join(missing)}; {advice}")
            return {key: archive[key] for key in IDX_FILES}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: cannot be read ({error}); {advice}") from error


def _read_idx(folder: Path, stem: str) -> np.ndarray:
    """An array of bytes in the IDX format: two zeros, the type (8: uint8), the rank, big-endian sizes, the data."""
    found = [p for p in (folder / f"{stem}-ubyte", folder / f"{stem}-ubyte.gz") if p.is_file()]
    if not found:
        raise UserError(f"{folder}: has no {stem}-ubyte (or .gz); give a folder of the four IDX files of MNIST")
    raw = found[0].read_bytes()
    raw = gzip.decompress(raw) if found[0].suffix == ".gz" else raw
    rank = raw[3] if raw[:3] == b"\0\0\x08" else 0
    shape = np.frombuffer(raw[4 : 4 + 4 * rank], dtype=">u4").astype(int)
    if rank == 0 or len(raw) != 4 + 4 * rank + shape.prod():
        raise UserError(f"{found[0]}: is not in the IDX format, or cut off")
    return np.frombuffer(raw, dtype=np.uint8, offset=4 + 4 * rank).reshape(shape).copy()


def load_digits() -> Data:
    """scikit-learn's 1,797 digits of 8 x 8 pixels, every fourth held out."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    held = torch.arange(len(x)) % 4 == 0
    return Data("scikit-learn digits", x[~held], y[~held], x[held], y[held])


def mlp(inputs: int, width: int, seed: int = 0) -> nn.Sequential:
    """inputs - width - width - 10 under torch's default initialisation."""
    torch.manual_seed(seed)
    first, second, last = nn.Linear(inputs, width), nn.Linear(width, width), nn.Linear(width, 10)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), last)


@torch.no_grad()
def accuracy(model: nn.Module, data: Data) -> float:
    return (model(data.x_test).argmax(1) == data.y_test).float().mean().item()


def train(model: nn.Module, data: Data, steps: int, seed: int, stop_at_accuracy: float | None = None) -> int | None:
    """Trains with Adam on batches of 128: `steps` + 1 updates, or fewer if it reaches an accuracy on the test data.

    stop_at_accuracy: measured at about 21 evenly spaced steps; None never stops early. Returns the step at which the
    accuracy was reached, or None."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    order = stream(seed, "batches")
    every = max(1, steps // 20)
    for step in range(steps + 1):
        if stop_at_accuracy is not None and step % every == 0 and accuracy(model, data) >= stop_at_accuracy:
            return step
        batch = torch.randint(len(data.x_train), (128,), generator=order)
        optimizer.zero_grad()
        F.cross_entropy(model(data.x_train[batch]), data.y_train[batch]).backward()
        optimizer.step()
    return None


def sampled_network(zoo: Zoo, data: Data, width: int, seed: int, noise: float = 0.0, **options: Any) -> nn.Sequential:
    """A network of this width, made of the rows and columns of the zoo's donor."""
    model = mlp(data.x_train.shape[1], width)
    blueprint = Blueprint.from_module(model)
    load_into(model, RowColumn(noise=noise, **options).fit(zoo, blueprint).sample(blueprint, seed))
    return model


def table(zoo: Zoo, data: Data, source: float, args: argparse.Namespace) -> list[str]:
    """The lines of the Markdown table, one per width."""
    columns = ["hidden N", *VARIANTS, "steps from row-column", "steps from default"]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for width in args.widths:
        cells = [str(width)]
        for options in VARIANTS.values():
            found = [accuracy(sampled_network(zoo, data, width, seed, **options), data) for seed in range(args.draws)]
            cells.append(f"{sum(found) / len(found):.3f}")
        if width in args.retrain:
            starts = (
                lambda seed, width=width: sampled_network(zoo, data, width, seed, noise=0.01, scale="n/N"),
                lambda seed, width=width: mlp(data.x_train.shape[1], width, 1 + seed),
            )
            for start in starts:
                reached = [train(start(seed), data, args.steps, seed, source) for seed in range(3)]
                cells.append(" / ".join(f"> {args.steps}" if step is None else str(step) for step in reached))
        else:
            cells += ["", ""]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def positive_int(text: str) -> int:
    """A positive whole number. ValueError for anything else."""
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    several: dict[str, Any] = {"type": positive_int, "nargs": "+", "metavar": "N"}
    parser.add_argument("--mnist", type=Path, help="mnist.npz or a folder of IDX files; none: scikit-learn's digits")
    parser.add_argument(
        "--steps", type=positive_int, default=1000, help="steps of the source's training; the most for others"
    )
    parser.add_argument("--hidden", type=positive_int, default=128, help="width of the source")
    parser.add_argument("--widths", default=[64, 128, 256, 512], help="widths of the sampled networks", **several)
    parser.add_argument(
        "--retrain", default=[64, 256], help="the widths that are also trained", **several | {"nargs": "*"}
    )
    parser.add_argument("--draws", type=positive_int, default=3, help="networks per accuracy")
    args = parser.parse_args(argv)
    try:
        data = load_mnist(args.mnist) if args.mnist else load_digits()
        if not args.mnist:
            print("No --mnist given: this is scikit-learn's digits.\n")
        donor = mlp(data.x_train.shape[1], args.hidden)
        train(donor, data, args.steps, seed=0)
        source = accuracy(donor, data)
        shape = f"{data.x_train.shape[1]}-{args.hidden}-{args.hidden}-10"
        print(f"{data.name}, source {shape}, {args.steps} steps: accuracy {source:.3f}. Sampled networks before any")
        print(f"training (mean of {args.draws}), and steps until they have the source's accuracy (three seeds):\n")
        print("\n".join(table(zoo_of({"source": donor}), data, source, args)))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
