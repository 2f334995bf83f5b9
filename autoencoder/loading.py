"""Loading trained components from folders and the hub: safetensors and JSON only, of the expected class."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from zoo.checkpoints.checkpoint import is_finite
from zoo.checkpoints.files import expect, expect_all, read_json
from zoo.checkpoints.headers import read_header
from zoo.checkpoints.hub import HUB_ID, with_retries
from zoo.errors import UserError
from zoo.limits import MAX_MODULES
from zoo.sandbox import library_errors
from zoo.targets.config_bounds import limited_modules

if TYPE_CHECKING:
    from autoencoder.model import WeightAutoencoder


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

    how: advice for messages. Raises UserError for another class, for missing or damaged files, and for a config that
    describes other tensors than the files hold, before any of them is read."""
    path = folder / config
    if not path.is_file():
        raise UserError(f"{folder}: holds no {cls.__name__}; {how}")
    values = read_json(path)
    found = values.get("_class_name")
    if found != cls.__name__:
        raise UserError(f"{path}: describes {_short(found)}, not {cls.__name__}; {how}")
    expect_all(values, cls.CONFIG_KINDS, str(path), how)
    for donor in values.get("donors") or ():
        expect(donor, "name", str, f"{path}: donors", how)
        for key in ("revision", "sha256", "license"):
            expect(donor, key, (None, str), f"{path}: donors", how)
    _check_shapes(cls, folder, values, how)
    with library_errors(f"{folder}: cannot be loaded", how):
        model = cls.from_pretrained(folder, use_safetensors=True)
    odd = next((name for name, tensor in model.state_dict().items() if not is_finite(tensor)), None)
    if odd is not None:
        raise UserError(f"{folder}: tensor {odd!r} holds NaN or infinity; {how}")
    return model


def _check_shapes(cls: type[Any], folder: Path, values: dict[str, Any], how: str) -> None:
    """UserError where the tensors in a folder have other shapes than a config gives, which may be of any size."""
    errors = library_errors(f"{folder}: its config cannot be used", how)
    with errors, torch.device("meta"), limited_modules(MAX_MODULES, str(folder)):
        described = cls.from_config(values).state_dict()
    stored = {name: entry for path in sorted(folder.glob("*.safetensors")) for name, entry in read_header(path).items()}
    for name, tensor in described.items():
        if name in stored and stored[name].shape != tuple(tensor.shape):
            raise UserError(
                f"{folder}: {name!r} has shape {list(stored[name].shape)}, its config gives {list(tensor.shape)}; {how}"
            )
        if name not in stored:
            raise UserError(f"{folder}: lacks the tensor {name}, so it is damaged or from another version; {how}")


def _short(value: object) -> str:
    return value[:60] if isinstance(value, str) else "no class"


def load_autoencoder(source: str | Path) -> WeightAutoencoder:
    """Loads the autoencoder in a folder, in a pipeline's folder, or of a hub id. Raises UserError if there is none."""
    from autoencoder.model import WeightAutoencoder  # imports diffusers, which takes seconds

    folder = local_folder(source, "an autoencoder")
    inner = folder / "autoencoder" if (folder / "model_index.json").is_file() else folder
    how = "train one with `headstart train autoencoder`"
    model: WeightAutoencoder = load_component(WeightAutoencoder, inner, "config.json", how).eval()
    return model
