"""Calibration: a little text through a donor, read where its blocks read and write."""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from zoo.donors.folder import FolderDonor
from zoo.donors.memory import MemoryDonor
from zoo.errors import UserError
from zoo.targets.configs import meta_model, parse
from zoo.training.corpora import byte_tokens
from zoo.vocabulary import BYTE_VOCAB

if TYPE_CHECKING:
    from zoo.donors.donor import Donor

WINDOW_TOKENS = 256  # tokens of a window, fewer where the donor knows fewer positions
BYTES_PER_TOKEN = 16  # of a text no more than this is read: no tokenizer's tokens are longer on average
BATCH_WINDOWS = 4  # windows in a forward pass


def window_length(donor: Donor) -> int:
    """Tokens of a calibration window."""
    assert donor.blueprint.config is not None
    config = parse(donor.blueprint.config).get_text_config()
    return min(WINDOW_TOKENS, getattr(config, "max_position_embeddings", None) or WINDOW_TOKENS)


def calibration_windows(text: str | Path, donor: Donor, tokenizer: str | None, windows: int, who: str) -> Tensor:
    """The beginning of a UTF-8 file -> int64 [B, S], B <= windows, S that of `window_length`.

    Tokens are the donor's: by its tokenizer.json, by `tokenizer` (a folder or a tokenizer.json) where it has none, or
    bytes for a vocabulary of 256. Raises UserError where the file is missing, no UTF-8 or shorter than one window,
    and where the donor's tokens are not known."""
    length, path = window_length(donor), Path(text)
    assert donor.blueprint.metadata is not None
    vocab = donor.blueprint.metadata.vocab
    if donor.blueprint.config is not None and parse(donor.blueprint.config).is_encoder_decoder:
        raise UserError(
            f"{who}: donor {donor.name!r} is an encoder-decoder, which a text is not read by: leave text out"
        )
    if not path.is_file():
        raise UserError(f"{who}: {path}: no such text; give a UTF-8 file with --set text=FILE")
    with path.open("rb") as f:
        data = f.read(min(windows * length * BYTES_PER_TOKEN, path.stat().st_size))
    found = None
    if isinstance(donor, FolderDonor) and "tokenizer.json" in donor.files:
        found = donor.folder / "tokenizer.json"
    if found is None and tokenizer is not None:
        given = Path(tokenizer)
        found = given / "tokenizer.json" if given.is_dir() else given
    if found is not None:
        tokens = _encode(found, data, path)
    elif vocab == BYTE_VOCAB:
        tokens = byte_tokens(data)
    else:
        raise UserError(
            f"{who}: donor {donor.name!r} has no tokenizer.json and its vocabulary of {vocab} is not one of bytes: "
            "put its tokenizer beside it, or leave text out"
        )
    if len(tokens) and int(tokens.max()) >= vocab:
        raise UserError(f"{who}: {found} makes id {int(tokens.max())} on {path}, but {donor.name!r} has {vocab} tokens")
    if len(tokens) < length:
        raise UserError(f"{who}: {path}: {len(tokens)} tokens are too few for calibration; give at least {length}")
    count = min(windows, len(tokens) // length)
    return tokens[: count * length].view(count, length)


def _encode(tokenizer: Path, data: bytes, path: Path) -> Tensor:
    from tokenizers import Tokenizer

    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        if error.start < len(data) - 3:  # else a character that the end of what was read cuts
            raise UserError(f"{path}: not UTF-8 text at byte {error.start}; convert it") from error
        text = data[: error.start].decode()
    try:
        encoder = Tokenizer.from_file(str(tokenizer))
    except Exception as error:  # the tokenizers library has no exception of its own
        raise UserError(f"{tokenizer}: is no tokenizer; save it again with save_pretrained") from error
    return torch.tensor(encoder.encode(text, add_special_tokens=False).ids, dtype=torch.int64)


def load_model(donor: Donor, device: str) -> nn.Module:
    """The donor as a module of transformers in float32 on `device`, in evaluation mode; a copy where it is one in
    memory."""
    from transformers.utils import logging

    if isinstance(donor, MemoryDonor):
        return copy.deepcopy(donor.module).float().to(device).eval()
    assert isinstance(donor, FolderDonor)
    cls: Any = type(meta_model(parse(donor.config, str(donor.folder)), str(donor.folder)))
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        return cls.from_pretrained(donor.folder, dtype=torch.float32).to(device).eval()
    finally:
        if bars:
            logging.enable_progress_bar()


def module_holding(model: nn.Module, name: str) -> nn.Module:
    """The module that holds the tensor called `name` on disk. Raises UserError where transformers keeps it elsewhere
    in memory, so that its activations cannot be read."""
    path = name.rpartition(".")[0]
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise UserError(
            f"{type(model).__name__} has no module {path!r} in memory, so that its activations cannot be read: "
            "leave text out, or use another donor"
        ) from None


def block_path(name: str) -> str:
    """'model.layers.3.mlp.up_proj.weight' -> 'model.layers.3'."""
    found = re.match(r"(?:.*?\.)?(?:layers?|h|blocks?)\.\d+(?=\.)", name)
    assert found is not None, name  # a spec with a layer has one in its name
    return found[0]


def first_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What a module was given."""
    return args[0] if args else next(v for v in kwargs.values() if isinstance(v, Tensor))


@contextlib.contextmanager
def observe_inputs(model: nn.Module, readers: dict[str, Callable[[Tensor], None]]) -> Iterator[None]:
    """Inside, each of `readers` (by a tensor's name on disk) sees the input of the module that holds that tensor."""

    def hook(see: Callable[[Tensor], None]) -> Callable[..., None]:
        return lambda module, args, kwargs: see(first_input(args, kwargs))

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
    """Runs int64 [B, S] through a model's blocks, without its head: what comes out is for hooks to see."""
    body: Any = getattr(model, "base_model", model)
    device = next(model.parameters()).device
    for batch in windows.split(BATCH_WINDOWS):
        body(input_ids=batch.to(device), use_cache=False)
