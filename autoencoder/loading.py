"""Components from folders and the hub: safetensors and JSON of the expected class, or one line that says why not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from autoencoder.model import UnitAutoencoder
from zoo.checkpoints.files import read_json
from zoo.checkpoints.hub import with_retries
from zoo.errors import UserError


def local_folder(source: str | Path, what: str) -> Path:
    """A folder, or a hub id fetched to one (safetensors and JSON only). `what` is what should be there.
    Raises UserError where there is neither."""
    folder = Path(source)
    if folder.is_dir():
        return folder
    if folder.exists() or str(source).count("/") != 1 or str(source).startswith((".", "/")):
        raise UserError(f"{source}: no such folder; give one that holds {what}, or a hub id")
    from huggingface_hub import snapshot_download

    name, _, revision = str(source).partition("@")
    patterns = ["*.json", "*.safetensors"]
    return Path(with_retries(lambda: snapshot_download(name, revision=revision or None, allow_patterns=patterns), name))


def load_component(cls: type[Any], folder: Path, config: str, how: str) -> Any:
    """`cls.from_pretrained(folder)`, after its `config` file has been found to be of that class.
    Raises UserError for another class, or for files that are damaged; `how` says how to make one."""
    path = folder / config
    if not path.is_file():
        raise UserError(f"{folder}: holds no {cls.__name__}; {how}")
    found = read_json(path).get("_class_name")
    if found != cls.__name__:
        raise UserError(f"{path}: is of {found or 'another kind'}, not {cls.__name__}; {how}")
    try:
        model, told = cls.from_pretrained(folder, use_safetensors=True, output_loading_info=True)
    except Exception as error:  # diffusers and safetensors raise whatever the file makes them
        raise UserError(f"{folder}: cannot be loaded ({str(error).splitlines()[0]}); {how}") from error
    if lacking := told["missing_keys"]:  # diffusers would leave them as they were made
        raise UserError(f"{folder}: lacks {min(lacking)}, so it is of another version, or damaged; {how}")
    return model


def load_autoencoder(source: str | Path) -> UnitAutoencoder:
    """The autoencoder of a folder, of a pipeline's folder, or of a hub id. Raises UserError where there is none."""
    folder = local_folder(source, "an autoencoder")
    inner = folder / "autoencoder" if (folder / "model_index.json").is_file() else folder
    how = "make one with `headstart train autoencoder`"
    return load_component(UnitAutoencoder, inner, "config.json", how).eval()
