"""The donors that `headstart zoo train` trains: shapes, texts and training, by preset."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from zoo.streams import stream_seed
from zoo.training.corpora import EMBEDDED_TEXTS
from zoo.training.loop import TrainingConfig

SPECIALISTS = "specialists"  # the preset that takes texts
CHECKPOINT_SHARES = (1 / 9, 1 / 3, 1.0)  # of a run's steps, after which a specialist is written
HELD_OUT_WINDOWS = 1024  # at most, for the loss of a specialist: texts differ in length


@dataclass(frozen=True)
class DonorRecipe:
    """One training run: the shape, the text, and how it is trained. Two seeds of one shape share only the text."""

    width: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    steps: int
    seed: int = 0
    head_dim: int = 16
    lr: float = 4e-3
    init: float = 0.8  # std of the initial matrices times sqrt(width); 0.02 is too small for narrow models
    batch_size: int = 4
    sequence: int = 64

    @property
    def name(self) -> str:
        return f"nursery-{self.shape}-s{self.seed}"

    @property
    def shape(self) -> str:
        return f"w{self.width}-l{self.layers}-h{self.heads}-kv{self.kv_heads}"

    @property
    def text_name(self) -> str:
        """The text that the run learns from: an embedded one, or a given one."""
        return "reference"

    @property
    def donor_names(self) -> dict[int, str]:
        """{number of steps: name of the donor that is written then}."""
        return {self.steps: self.name}

    @property
    def held_out_windows(self) -> int | None:
        """The largest number of windows for the held-out loss; None for all."""
        return None

    @property
    def training(self) -> TrainingConfig:
        return TrainingConfig(
            self.steps, self.lr, self.batch_size, self.sequence, seed=stream_seed(self.seed, self.name)
        )

    @property
    def cost(self) -> float:
        """Rough amount of work in arbitrary units, to start the longest first."""
        return (self.layers * self.width * (4 * self.width + 3 * self.ffn) + 4e4) * self.training.tokens


@dataclass(frozen=True)
class SpecialistRecipe(DonorRecipe):
    """A training run on a text of its own, which gives three donors: early, in between, and at the end."""

    corpus: str = "reference"

    @property
    def name(self) -> str:
        return f"specialist-{self.corpus}-{self.shape}-s{self.seed}"

    @property
    def text_name(self) -> str:
        return self.corpus

    @property
    def donor_names(self) -> dict[int, str]:
        steps = sorted({max(1, round(share * self.steps)) for share in CHECKPOINT_SHARES})
        return {step: f"{self.name}-t{step}" for step in steps}

    @property
    def held_out_windows(self) -> int | None:
        return HELD_OUT_WINDOWS


def demo_recipes() -> list[DonorRecipe]:
    """Twelve donors for `headstart demo`: six shapes with two seeds each."""
    shapes = [
        DonorRecipe(48, 2, heads=3, kv_heads=3, ffn=128, steps=1000),
        DonorRecipe(48, 4, heads=3, kv_heads=1, ffn=144, steps=1000),
        DonorRecipe(64, 3, heads=4, kv_heads=4, ffn=176, steps=1000),
        DonorRecipe(64, 6, heads=4, kv_heads=2, ffn=160, steps=1000),
        DonorRecipe(96, 4, heads=6, kv_heads=3, ffn=256, steps=1000),
        DonorRecipe(128, 4, heads=8, kv_heads=8, ffn=336, steps=1000),
    ]
    return _with_seeds(shapes, 2)


def quick_recipes() -> list[DonorRecipe]:
    """Four small donors for `headstart demo --quick` and for experiments."""
    shapes = [
        DonorRecipe(48, 2, heads=3, kv_heads=3, ffn=128, steps=450),
        DonorRecipe(96, 4, heads=6, kv_heads=6, ffn=256, steps=350),
    ]
    return _with_seeds(shapes, 2)


def bench_recipes() -> list[DonorRecipe]:
    """Twelve donors for the benchmark's target: width 96, 4 layers, 6 heads, FFN 256.

    Every method finds a donor among them: half as wide and as deep (hypercloning), half as deep and as wide
    (stacking), larger in every size (pruning)."""
    shapes = [
        DonorRecipe(48, 4, heads=3, kv_heads=3, ffn=128, steps=1000),
        DonorRecipe(64, 3, heads=4, kv_heads=4, ffn=176, steps=1000),
        DonorRecipe(64, 6, heads=4, kv_heads=2, ffn=160, steps=1000),
        DonorRecipe(80, 3, heads=5, kv_heads=5, ffn=208, steps=1000),
        DonorRecipe(96, 2, heads=6, kv_heads=6, ffn=256, steps=1000),
        DonorRecipe(128, 4, heads=8, kv_heads=8, ffn=336, steps=1000),
    ]
    return _with_seeds(shapes, 2)


def specialist_recipes(texts: Iterable[str] = EMBEDDED_TEXTS) -> list[DonorRecipe]:
    """Runs on each of the texts: five shapes with two seeds each, so 30 donors a text. Four texts take about an hour
    of one CPU core.

    Batch and learning rates were chosen on Shakespeare. At 96 wide and 4 layers deep, 16 x 64 bytes a step reached a
    loss of 1.72 in 58 seconds, and 8 x 64 reached 1.77 in 50. The best rate falls with the width: 8e-3 against 4e-3
    gave 1.88 and 1.93 at a width of 48, but 1.76 and 1.72 at 96."""
    shapes = [
        SpecialistRecipe(48, 2, heads=3, kv_heads=3, ffn=128, steps=1080, lr=8e-3),
        SpecialistRecipe(64, 6, heads=4, kv_heads=2, ffn=160, steps=1080, lr=6e-3),
        SpecialistRecipe(80, 3, heads=5, kv_heads=5, ffn=208, steps=1080, lr=5e-3),
        SpecialistRecipe(96, 4, heads=6, kv_heads=3, ffn=256, steps=1080, lr=4e-3),
        SpecialistRecipe(128, 4, heads=8, kv_heads=8, ffn=336, steps=1080, lr=3.5e-3),
    ]
    return _with_seeds([replace(shape, batch_size=16, corpus=text) for text in texts for shape in shapes], 2)


PRESETS: dict[str, Callable[[], list[DonorRecipe]]] = {
    "demo": demo_recipes,
    "quick": quick_recipes,
    "bench": bench_recipes,
    SPECIALISTS: specialist_recipes,
}


def _with_seeds(shapes: Iterable[DonorRecipe], seeds: int) -> list[DonorRecipe]:
    return [replace(shape, seed=seed) for shape in shapes for seed in range(seeds)]
