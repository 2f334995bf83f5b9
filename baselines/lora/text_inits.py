"""The initialisations of PEFT that run a text through the base. PEFT's own functions read activations or gradients.

A, B of all pairs are made in `fit`, with the whole base in memory, and `sample` returns them. Each pair has a random
stream of its own, so that its bytes do not depend on which others there are.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from baselines.calibration import BATCH_WINDOWS, calibration_windows, load_model
from baselines.lora.peft_inits import PeftInit, initialize_pair, settle_signs
from zoo.errors import UserError
from zoo.lora.adapters import base_donor, base_weight, lora_pairs, refuse_tied_weights
from zoo.lora.bases import without_adapters
from zoo.options import option
from zoo.streams import stream_seed
from zoo.targets.adapters import Pair, require_peft
from zoo.training.documents import TextSource
from zoo.training.loop import next_token_loss

if TYPE_CHECKING:
    from zoo.donors.donor import Donor
    from zoo.donors.zoo import Zoo
    from zoo.targets.blueprint import Blueprint

# Batches until the directions of EVA must agree. PEFT itself would go on for ever where they never do.
MOST_BATCHES = 200


@dataclass(kw_only=True)
class TextInit(PeftInit):
    """What they share. A subclass implements `_fill`. The base is in memory in float32, on `device`."""

    needs: ClassVar[tuple[str, ...]] = ("base", "text")

    text: str | None = option(None, "text, a folder or a data set to run through the base; it must be given")
    split: str | None = option(None, "split of a data set; none: train")
    text_column: str | None = option(None, "column of a data set; none: text")
    tokenizer: str | None = option(None, "tokenizer of a base that has none (folder or tokenizer.json)")
    windows: int = option(32, "windows of 256 tokens, read from the start of the text", least=1, most=1_000_000)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._filled: dict[str, Tensor] = {}  # A and B by their names on disk
        self._donors: tuple[str, ...] = ()

    @property
    def init(self) -> str:
        return self.name

    @property
    def reads_base(self) -> bool:
        return True

    @property
    def donors(self) -> tuple[str, ...]:
        return self._donors

    def check(self, blueprint: Blueprint) -> tuple[Pair, ...]:
        pairs = super().check(blueprint)
        if self.text is None:
            raise UserError(f"{self.name}: runs a text through the base; give one with --set text=FILE")
        return pairs

    def planned_donors(self, zoo: Zoo | None, blueprint: Blueprint) -> tuple[str, ...]:
        return (base_donor(zoo, self.base, self.name).name,)

    def fit(self, zoo: Zoo | None, blueprint: Blueprint) -> Self:
        """UserError: no text, or one that is too short; no base; a layer whose activations PEFT cannot use."""
        super().fit(zoo, blueprint)
        assert blueprint.adapter is not None
        if self.compensated:
            refuse_tied_weights(blueprint.adapter)
        base = base_donor(zoo, self.base, self.name)
        source = TextSource(str(self.text), self.split, self.text_column)
        windows = calibration_windows(source, base, self.tokenizer, self.windows, self.name)
        with torch.random.fork_rng(devices=[]), _peft_errors(self.name, base.name):
            torch.default_generator.manual_seed(stream_seed(0, self.name))
            model = without_adapters(load_model(base, self.device))
            self._filled = dict(self._fill(model, base, blueprint.adapter.pairs, windows.to(self.device)))
        self._donors = (base.name,)
        return self

    def sample(self, blueprint: Blueprint, seed: int = 0) -> Iterator[tuple[str, Tensor]]:
        """The seed changes nothing: A and B follow from the base and the text."""
        for pair in lora_pairs(blueprint, self.name):
            for name, shape in ((pair.a, (pair.rank, pair.columns)), (pair.b, (pair.rows, pair.rank))):
                found = self._filled.get(name)
                if found is None or tuple(found.shape) != shape:
                    raise UserError(f"{self.name}: is not fitted to {name} {list(shape)}; call fit(zoo, blueprint)")
                yield name, found.clone()

    def _fill(
        self, model: nn.Module, base: Donor, pairs: tuple[Pair, ...], windows: Tensor
    ) -> Iterator[tuple[str, Tensor]]:
        """A and B of every pair, float32 on the CPU, under their names on disk. windows: int64 [B, S]."""
        raise NotImplementedError

    def _one_by_one(
        self, model: nn.Module, base: Donor, pairs: tuple[Pair, ...], measured: Mapping[str, Any], **config: Any
    ) -> Iterator[tuple[str, Tensor]]:
        """Each pair from what PEFT has left in its module, {attribute: whether it lies as the weight does}."""
        for pair in pairs:
            module = model.get_submodule(pair.module)
            missing = next((name for name in measured if not hasattr(module, name)), None)
            if missing is not None:
                raise UserError(f"{self.name}: the text does not reach {pair.module}; give a longer text")
            attributes = {
                name: getattr(module, name).mT if lies_as_weight and pair.transposed else getattr(module, name)
                for name, lies_as_weight in measured.items()
            }
            seed = stream_seed(0, f"{self.name}/{pair.module}")
            weight = base_weight(base, pair).to(self.device)
            a, b = self.settle_basis(*initialize_pair(self.init, pair, weight, seed, attributes, **config))
            yield pair.a, a
            yield pair.b, b

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return {"donors": list(self._donors)}, dict(self._filled)

    def restore(self, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self._filled, self._donors = tensors, tuple(values["donors"])


@dataclass(kw_only=True)
class EVA(TextInit):
    """init_lora_weights="eva": A the first principal directions of what the layer reads in the text, B = 0.

    Every pair keeps its rank (PEFT's rho is 1), as an adapter's blueprint says how large each one is.
    """

    name: ClassVar[str] = "eva"
    summary: ClassVar[str] = "A the principal directions of a layer's inputs on a text, B zero"
    reference: ClassVar[str] = "2410.07170"

    def check(self, blueprint: Blueprint) -> tuple[Pair, ...]:
        pairs = super().check(blueprint)
        _refuse_large_ranks(self.name, pairs, {pair.module: pair.columns for pair in pairs})
        return pairs

    def _fill(
        self, model: nn.Module, base: Donor, pairs: tuple[Pair, ...], windows: Tensor
    ) -> Iterator[tuple[str, Tensor]]:
        peft = require_peft()
        config = _lora_config(pairs, init_lora_weights="eva", eva_config=peft.EvaConfig(rho=1.0))
        adapted = peft.get_peft_model(model, config)
        peft.initialize_lora_eva_weights(
            adapted,
            _EndlessBatches(self.name, windows),
            forward_fn=lambda network, inputs: network(**inputs, use_cache=False),
            show_progress_bar=False,
        )
        for pair in pairs:
            layer: Any = adapted.get_base_model().get_submodule(pair.module)
            yield pair.a, layer.lora_A["default"].weight.detach().to("cpu", torch.float32).contiguous()
            yield pair.b, torch.zeros(pair.rows, pair.rank)


@dataclass(kw_only=True)
class CorDA(TextInit):
    """init_lora_weights="corda": the first singular vectors of W C in A and B, where C is the covariance of what the
    layer reads in the text. The base keeps the rest: `compensated`."""

    name: ClassVar[str] = "corda"
    summary: ClassVar[str] = "principal directions of the base's weights on a text, the rest stays in the base"
    reference: ClassVar[str] = "2406.05223"

    @property
    def compensated(self) -> bool:
        return True

    def settle_basis(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return settle_signs(a, b)

    def _fill(
        self, model: nn.Module, base: Donor, pairs: tuple[Pair, ...], windows: Tensor
    ) -> Iterator[tuple[str, Tensor]]:
        from peft.tuners.lora.config import CordaConfig
        from peft.tuners.lora.corda import preprocess_corda

        corda = CordaConfig(corda_method="ipm")

        def run_model() -> None:
            for window in windows.split(1):  # PEFT takes one window at a time
                model(input_ids=window, use_cache=False)

        preprocess_corda(model, _lora_config(pairs, init_lora_weights="corda", corda_config=corda), run_model)
        yield from self._one_by_one(model, base, pairs, {"eigens": False}, corda_config=corda)


@dataclass(kw_only=True)
class LoraGA(TextInit):
    """init_lora_weights="lora_ga": singular vectors of the gradient on the text in A and B, so that the first steps
    follow those of full training. B A is subtracted from the base: `compensated`.

    B is scaled by the fourth root of the number of outputs, also for Conv1D (GPT-2), where PEFT takes that of inputs.
    """

    name: ClassVar[str] = "lora_ga"
    summary: ClassVar[str] = "singular vectors of the base's gradient on a text, subtracted from the base"
    reference: ClassVar[str] = "2407.05000"

    @property
    def compensated(self) -> bool:
        return True

    def check(self, blueprint: Blueprint) -> tuple[Pair, ...]:
        pairs = super().check(blueprint)
        _refuse_large_ranks(self.name, pairs, {pair.module: min(pair.rows, pair.columns) for pair in pairs})
        return pairs

    def _fill(
        self, model: nn.Module, base: Donor, pairs: tuple[Pair, ...], windows: Tensor
    ) -> Iterator[tuple[str, Tensor]]:
        from peft import LoraGAConfig
        from peft.tuners.lora.loraga import preprocess_loraga

        config = LoraGAConfig()

        def train_step() -> None:
            for batch in windows.split(BATCH_WINDOWS):
                next_token_loss(model, batch).backward()

        preprocess_loraga(model, _lora_config(pairs, init_lora_weights="lora_ga", lora_ga_config=config), train_step)
        yield from self._one_by_one(model, base, pairs, {"_peft_loraga_grad": True}, lora_ga_config=config)


class _EndlessBatches:
    """Batches of windows for PEFT, which reads them in turns until the directions agree. UserError after too many."""

    def __init__(self, method: str, windows: Tensor) -> None:
        self.method, self.batches = method, windows.split(BATCH_WINDOWS)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for i in range(MOST_BATCHES):
            yield {"input_ids": self.batches[i % len(self.batches)]}
        raise UserError(
            f"{self.method}: its directions still change after {MOST_BATCHES} batches of text; "
            "give a lower rank or a longer text"
        )


def _lora_config(pairs: tuple[Pair, ...], **init: Any) -> Any:
    """PEFT's config of these pairs."""
    peft = require_peft()
    pair = pairs[0]
    ranks = {p.module: p.rank for p in pairs if p.rank != pair.rank}
    return peft.LoraConfig(
        r=pair.rank,
        lora_alpha=pair.scaling * pair.rank,
        rank_pattern=ranks,
        target_modules=[p.module for p in pairs],
        **init,
    )


def _refuse_large_ranks(method: str, pairs: tuple[Pair, ...], sides: Mapping[str, int]) -> None:
    """UserError where PEFT's randomised SVD has no room for twice the rank. sides: module -> its room."""
    pair = next((pair for pair in pairs if 2 * pair.rank > sides[pair.module]), None)
    if pair is not None:
        raise UserError(
            f"{method}: rank {pair.rank} is above half of {sides[pair.module]}, a side of {pair.module}; "
            f"give at most {min(sides.values()) // 2}, or other targets"
        )


@contextmanager
def _peft_errors(method: str, base: str) -> Iterator[None]:
    """Silences PEFT's warnings, and turns what it refuses into a UserError."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except (ValueError, TypeError, torch.linalg.LinAlgError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"{method}: PEFT cannot use this text with {base}: {reason}") from error
