"""Calibration: a short text runs through a donor while the inputs of its modules are observed."""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from zoo.checkpoints.side_files import vocabulary_file
from zoo.donors.folder import FolderDonor
from zoo.donors.memory import MemoryDonor
from zoo.errors import UserError
from zoo.progress import without_progress_bars
from zoo.sandbox import library_errors
from zoo.targets.configs import meta_model, parse_config
from zoo.training.corpora import read_for_tokenizer
from zoo.training.documents import TextSource
from zoo.vocabulary import BYTE_VOCAB, byte_tokens, encode_text

if TYPE_CHECKING:
    from zoo.donors.donor import Donor

WINDOW_TOKENS = 256  # tokens of a window; fewer where the donor has fewer positions
BYTES_PER_TOKEN = 16  # bytes of text that are read per token: no tokenizer's tokens are longer on average
BATCH_WINDOWS = 4  # windows in a forward pass


def window_length(donor: Donor) -> int:
    """Tokens of a calibration window."""
    assert donor.blueprint.config is not None
    config = parse_config(donor.blueprint.config).get_text_config()
    return min(WINDOW_TOKENS, getattr(config, "max_position_embeddings", None) or WINDOW_TOKENS)


def calibration_windows(text: TextSource, donor: Donor, tokenizer: str | None, windows: int, method: str) -> Tensor:
    """The start of a text as tokens, int64 [B, S] with B <= windows and S = window_length(donor).

    Tokens come from the donor's tokenizer, or from `tokenizer` (a folder or a tokenizer.json), or are bytes for a
    vocabulary of 256. Raises UserError where the file is missing, not UTF-8 or shorter than one window, and where no
    tokenizer is known.
    """
    length, where = window_length(donor), f"{method}: {text.address}"
    assert donor.blueprint.metadata is not None
    vocab = donor.blueprint.metadata.vocab
    if donor.blueprint.config is not None and parse_config(donor.blueprint.config).is_encoder_decoder:
        raise UserError(
            f"{method}: donor {donor.name!r} is an encoder-decoder, which cannot read a text alone: "
            "use no text, or another method"
        )
    found = None
    if isinstance(donor, FolderDonor) and vocabulary_file(donor.files) is not None:
        found = _fast_or_folder(donor.folder)
    if found is None and tokenizer is not None:
        found = _fast_or_folder(Path(tokenizer))
    if found is None and vocab != BYTE_VOCAB:
        raise UserError(
            f"{method}: donor {donor.name!r} has no tokenizer and its {vocab} tokens are not bytes: "
            "put its tokenizer into its folder, or use no text"
        )
    corpus = read_for_tokenizer(text, found, vocab, windows * length * BYTES_PER_TOKEN)
    tokens = byte_tokens(corpus.text) if found is None else encode_text(corpus.decode(where), found)
    if len(tokens) and int(tokens.max()) >= vocab:
        raise UserError(
            f"{where}: {found} produces token id {int(tokens.max())}, outside the {vocab} of {donor.name!r}"
        )
    if len(tokens) < length:
        raise UserError(f"{where}: {len(tokens)} tokens are too few for calibration; give at least {length}")
    count = min(windows, len(tokens) // length)
    return tokens[: count * length].view(count, length)


def _fast_or_folder(tokenizer: Path) -> Path:
    """The tokenizer.json of a folder, else the folder with an older format; a file stays as it is."""
    return tokenizer / "tokenizer.json" if (tokenizer / "tokenizer.json").is_file() else tokenizer


def load_model(donor: Donor, device: str) -> nn.Module:
    """The donor as a transformers model in float32 on `device`, in evaluation mode. A module in memory is copied."""
    if isinstance(donor, MemoryDonor):
        return copy.deepcopy(donor.module).float().to(device).eval()
    assert isinstance(donor, FolderDonor)
    config = parse_config(donor.blueprint.config or {}, str(donor.folder))
    cls: Any = type(meta_model(config, str(donor.folder)))
    with without_progress_bars(), library_errors(str(donor.folder), "use another donor, or use no text"):
        if donor.quantisation.weights or donor.aliases:  # read by us: dequantised, and under the model's own names
            tensors = {name: donor.read(name) for name in donor.blueprint.names}
            model = cls.from_pretrained(None, config=config, state_dict=tensors, dtype=torch.float32)
        else:
            model = cls.from_pretrained(donor.folder, dtype=torch.float32)
    return model.to(device).eval()


def module_holding(model: nn.Module, name: str) -> nn.Module:
    """The module that holds the tensor called `name` on disk.

    Raises UserError where transformers keeps the tensor elsewhere in memory, so that its input cannot be observed.
    """
    path = name.rpartition(".")[0]
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise UserError(
            f"{type(model).__name__} has no module {path!r} in memory, so that its activations cannot be measured: "
            "use no text, or another donor"
        ) from None


def block_path(name: str) -> str:
    """The block that holds a tensor: 'model.layers.3.mlp.up_proj.weight' -> 'model.layers.3'."""
    found = re.match(r"(?:.*?\.)?(?:layers?|h|blocks?)\.\d+(?=\.)", name)
    assert found is not None, name  # every spec of a layer has a block in its name
    return found[0]


def first_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The first tensor that a module was called with."""
    return args[0] if args else next(v for v in kwargs.values() if isinstance(v, Tensor))


@contextlib.contextmanager
def observe_inputs(model: nn.Module, readers: dict[str, Callable[[Tensor], None]]) -> Iterator[None]:
    """While it is open, each reader receives the input of the module that holds its tensor (by name on disk)."""

    def hook(read: Callable[[Tensor], None]) -> Callable[..., None]:
        return lambda module, args, kwargs: read(first_input(args, kwargs))

    handles = [
        module_holding(model, name).register_forward_pre_hook(hook(see), with_kwargs=True)
        for name, see in readers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def run_windows(model: nn.Module, windows: Tensor) -> None:
    """Runs windows, int64 [B, S], through a model's blocks without its head. Hooks observe the activations."""
    body: Any = getattr(model, "base_model", model)
    device = next(model.parameters()).device
    for batch in windows.split(BATCH_WINDOWS):
        body(input_ids=batch.to(device), use_cache=False)
