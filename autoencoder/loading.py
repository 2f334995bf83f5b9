"""Loading trained components from folders and the hub: safetensors and JSON only, of the expected class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from autoencoder.model import UnitAutoencoder
from zoo.checkpoints.files import read_json
from zoo.checkpoints.hub import HUB_ID, with_retries
from zoo.errors import UserError


def local_folder(source: str | Path, what: str) -> Path:
    """The local folder of `source`, a folder or a hub id; a hub repository is downloaded, safetensors and JSON only.

    what: what the folder should hold, for messages. Raises UserError if `source` is neither."""
    folder = Path(source)
    if folder.is_dir():
        return folder
    if folder.exists() or not HUB_ID.fullmatch(str(source)):
        raise UserError(f"{source}: no such folder; give one that holds {what}, or a hub id")
    from huggingface_hub import snapshot_download

    request = _request(str(source))
    return Path(with_retries(lambda: snapshot_download(**request), str(source)))


def download_size(source: str | Path) -> int:
    """Bytes that `local_folder` would download: of a hub repository, those of its files that are not in the cache."""
    if Path(source).exists() or not HUB_ID.fullmatch(str(source)):
        return 0
    from huggingface_hub import snapshot_download

    request = _request(str(source))
    files = with_retries(lambda: snapshot_download(**request, dry_run=True), str(source))
    return sum(file.file_size or 0 for file in files if file.will_download)


def _request(source: str) -> dict[str, Any]:
    """What to download of a hub id: JSON and safetensors files."""
    repo, _, revision = source.partition("@")
    return {"repo_id": repo, "revision": revision or None, "allow_patterns": ["*.json", "*.safetensors"]}


def load_component(cls: type[Any], folder: Path, config: str, how: str) -> Any:
    """Loads `cls` from a folder, if the class in its `config` file is `cls`.

    how: advice for messages. Raises UserError for another class, and for missing or damaged files."""
    path = folder / config
    if not path.is_file():
        raise UserError(f"{folder}: holds no {cls.__name__}; {how}")
    found = read_json(path).get("_class_name")
    if found != cls.__name__:
        raise UserError(f"{path}: describes {found or 'no class'}, not {cls.__name__}; {how}")
    try:
        model, info = cls.from_pretrained(folder, use_safetensors=True, output_loading_info=True)
    except Exception as error:  # diffusers and safetensors raise errors of many types
        raise UserError(f"{folder}: cannot be loaded ({str(error).splitlines()[0]}); {how}") from error
    if missing := info["missing_keys"]:  # diffusers would leave their initial values
        raise UserError(f"{folder}: lacks the tensor {min(missing)}, so it is damaged or from another version; {how}")
    return model


def load_autoencoder(source: str | Path) -> UnitAutoencoder:
    """Loads the autoencoder in a folder, in a pipeline's folder, or of a hub id. Raises UserError if there is none."""
    folder = local_folder(source, "an autoencoder")
    inner = folder / "autoencoder" if (folder / "model_index.json").is_file() else folder
    how = "train one with `headstart train autoencoder`"
    return load_component(UnitAutoencoder, inner, "config.json", how).eval()
