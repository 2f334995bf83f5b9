"""Where a checkpoint comes from: a folder, or a repository of the Hugging Face hub at a commit."""

from __future__ import annotations

import glob
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.checkpoints.atomic import disk_errors
from zoo.checkpoints.checkpoint import Checkpoint
from zoo.checkpoints.files import GGUF, PICKLES, FileHashes, file_hash, refuse_other_formats
from zoo.checkpoints.headers import INDEX, read_index
from zoo.checkpoints.hub import HUB_ID, with_retries
from zoo.checkpoints.licenses import KEYS, UNKNOWN, folder_license, license_text
from zoo.checkpoints.quantised import count_weights
from zoo.checkpoints.side_files import side_files
from zoo.errors import UserError
from zoo.words import shortened_list

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo, RepoSibling


@dataclass(frozen=True)
class SourceFile:
    """What a source states about one of its files before the file is read."""

    size: int
    sha256: str | None = None  # the hub's hash of an LFS file
    blob: str | None = None  # the hub's git hash of a small file

    def problem(self, path: Path, sha256: str) -> str | None:
        """Why the file at `path`, whose hash is `sha256`, is not this file; None where it is."""
        size = path.stat().st_size
        if self.size and size != self.size:  # some mirrors state no size
            return f"has {size} bytes instead of {self.size}"
        if self.sha256 is not None and sha256 != self.sha256:
            return f"has sha256 {sha256} instead of {self.sha256}"
        if self.sha256 is None and self.blob is not None:
            data = path.read_bytes()
            if hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest() != self.blob:
                return f"is not git blob {self.blob}"
        return None


@dataclass(frozen=True)
class Source:
    """A folder, or a hub repository at a commit, before its weights are read."""

    address: str  # `headstart zoo add ADDRESS` gets the same checkpoint again
    names: tuple[str, ...]  # possible names for the donor; the first that is free is used
    license: str
    files: dict[str, SourceFile]
    folder: Path | None = None  # where the source is a folder
    repo: str | None = None  # where it is a hub repository
    commit: str | None = None
    requested: str = "main"  # the branch, tag or commit that the user named
    cached: frozenset[str] = frozenset()  # files that need no download

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(f.size for f in self.files.values())

    @property
    def download(self) -> int:
        """Bytes to download."""
        return 0 if self.repo is None else sum(f.size for n, f in self.files.items() if n not in self.cached)


def resolve_source(source: str, revision: str | None = None) -> Source:
    """The source of a folder, or of a hub id `org/name[@revision]` with its revision resolved to a commit.

    Reads headers and metadata only. UserError for what is neither, or cannot be used.
    """
    path = Path(source)
    if path.is_dir():
        if revision is not None:
            raise UserError(f"{source}: is a folder, which has no revision {revision!r}; leave --revision out")
        return _folder_source(path)
    if path.exists() or not HUB_ID.fullmatch(source):
        refuse_other_formats(path)
    if path.exists():
        raise UserError(f"{source}: is a file; give the folder that contains it")
    if not HUB_ID.fullmatch(source):
        raise UserError(f"{source}: no such folder, and not a hub id (org/name or org/name@revision)")
    repo, _, at = source.partition("@")
    if at and revision is not None and at != revision:
        raise UserError(f"{source}: names another revision than --revision {revision}; give one of them")
    return _hub_source(repo, at or revision)


def fetch_files(source: Source, quiet: bool = False, force: bool = False) -> Path:
    """The folder with the source's files: its own, or the snapshot in the hub's cache.

    Files that the cache lacks are downloaded; with `force`, all files.
    """
    if source.folder is not None:
        return source.folder
    from huggingface_hub import constants, hf_hub_download, snapshot_download
    from huggingface_hub.utils import tqdm

    repo, commit = source.repo, source.commit
    assert repo is not None

    class Silent(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs | {"disable": True})

    with disk_errors(Path(constants.HF_HUB_CACHE)):
        if not constants.HF_HUB_OFFLINE:  # under the requested revision, so that the cache finds it when offline
            first = "config.json" if "config.json" in source.files else next(iter(source.files))
            with_retries(lambda: hf_hub_download(repo, first, revision=source.requested), source.address)
        folder = with_retries(
            lambda: snapshot_download(
                repo,
                revision=commit,
                allow_patterns=[glob.escape(name) for name in source.files],
                force_download=force,
                tqdm_class=Silent if quiet else None,
            ),
            f"{repo}@{commit}",
        )
    missing = [name for name in source.files if not (Path(folder) / name).exists()]
    if missing:  # the hub's client uses what its cache has when the hub does not answer
        raise UserError(f"{repo}@{commit}: {missing[0]} could not be downloaded; check the network and try again")
    return Path(folder)


def open_source(source: Source, quiet: bool = False) -> tuple[Checkpoint, FileHashes]:
    """The source's checkpoint on this machine, downloaded if needed, and the hashes of its files.

    UserError as `fetch_checked_files`.
    """
    folder, hashes = fetch_checked_files(source, quiet)
    checkpoint = Checkpoint.open(folder)
    return checkpoint, {f: hashes[f] for f in checkpoint.files}


def fetch_checked_files(source: Source, quiet: bool = False) -> tuple[Path, FileHashes]:
    """The folder with the source's files, downloaded if needed, and their hashes.

    Files that differ from what the hub states are downloaded once more. UserError where they differ again.
    """
    for force in (False, True):
        folder = fetch_files(source, quiet, force=force)
        hashes: FileHashes = {
            f: {"size": (folder / f).stat().st_size, "sha256": file_hash(folder / f)} for f in source.files
        }
        found = {f: file.problem(folder / f, str(hashes[f]["sha256"])) for f, file in source.files.items()}
        problems = [f"{f} {problem}" for f, problem in found.items() if problem]
        if not problems:
            return folder, hashes
        if source.folder is not None:
            break
    raise UserError(
        f"{source.address}: {problems[0]}; it changes while it is read or the download is damaged; try later"
    )


def count_tensors(source: Source) -> int:
    """The number of tensors of a source, read from its headers or its index (of a hub file, from its first bytes)."""
    if source.folder is not None:
        return len(Checkpoint.open(source.folder).names)
    from huggingface_hub import HfApi, hf_hub_download

    what = f"{source.repo}@{source.commit}"
    repo, commit = source.repo, source.commit
    assert repo is not None
    if INDEX in source.files:
        index = Path(with_retries(lambda: hf_hub_download(repo, INDEX, revision=commit), what))
        return count_weights(read_index(index))
    weights = next(n for n in source.files if n.endswith(".safetensors"))
    header = with_retries(lambda: HfApi().parse_safetensors_file_metadata(repo, weights, revision=commit), what)
    return count_weights(header.tensors)


def _folder_source(path: Path) -> Source:
    checkpoint = Checkpoint.open(path)
    files = {name: SourceFile((path / name).stat().st_size) for name in checkpoint.files}
    return Source(str(path.resolve()), folder_names(path.resolve()), folder_license(path), files, folder=path)


def folder_names(path: Path) -> tuple[str, ...]:
    """Possible names for the donor from a folder, or from a file without its ending: its name, then more of its path.

    path: absolute.
    """
    parts = [safe_name(part) for part in path.parts[1:]]
    return tuple("--".join(parts[-n:]) for n in range(1, len(parts) + 1))


def safe_name(name: str) -> str:
    """A folder's name or a hub id as the name of a donor: letters, digits and ._-@, not hidden."""
    return re.sub(r"[^\w.@-]+", "-", name.replace("/", "--"), flags=re.ASCII).lstrip(".-") or "donor"


def model_info(repo: str, revision: str | None, what: str) -> tuple[ModelInfo, str]:
    """(what the hub says of a repository and its files, the commit). what: for messages. UserError without a commit."""
    from huggingface_hub import HfApi

    info: ModelInfo = with_retries(lambda: HfApi().model_info(repo, revision=revision, files_metadata=True), what)
    if info.sha is None:
        raise UserError(f"{what}: the hub names no commit; try again later, or set another HF_ENDPOINT")
    return info, info.sha


def _hub_source(repo: str, revision: str | None) -> Source:
    from huggingface_hub import constants, try_to_load_from_cache

    what = repo if revision is None else f"{repo}@{revision}"
    if constants.HF_HUB_OFFLINE:
        return _cached_source(repo, revision or "main", what)
    info, commit = model_info(repo, revision, what)
    sizes = {s.rfilename: source_file(s) for s in info.siblings or ()}
    names = _checkpoint_files(repo, commit, sizes, what)
    found = {name: try_to_load_from_cache(repo, name, revision=commit) for name in names}
    return Source(
        f"{repo}@{commit}",
        hub_names(repo, commit),
        hub_license(info),
        {name: sizes[name] for name in names},
        repo=repo,
        commit=commit,
        requested=revision or "main",
        cached=frozenset(name for name, path in found.items() if isinstance(path, str)),
    )


def hub_license(info: ModelInfo) -> str:
    """The licence in a repository's model card, else the one in its tags."""
    card = info.card_data
    found = UNKNOWN if card is None else license_text(*(card.get(key) for key in KEYS))
    tags = (tag for tag in info.tags or () if isinstance(tag, str) and tag.startswith("license:"))
    return found if found != UNKNOWN else license_text(next(tags, "").removeprefix("license:"))


def hub_names(repo: str, commit: str) -> tuple[str, ...]:
    """Possible names for the donor from a hub repository at a commit."""
    return safe_name(repo), f"{safe_name(repo)}@{commit[:8]}", f"{safe_name(repo)}@{commit}"


def source_file(sibling: RepoSibling) -> SourceFile:
    return SourceFile(sibling.size or 0, sibling.lfs.sha256 if sibling.lfs else None, sibling.blob_id)


def _checkpoint_files(repo: str, commit: str, sizes: dict[str, SourceFile], what: str) -> list[str]:
    """The files of a repository that belong to its checkpoint: safetensors and JSON files at its top."""
    from huggingface_hub import hf_hub_download

    quantised = sorted(n for n in sizes if n.lower().endswith(GGUF))
    if quantised and not any(n.endswith(".safetensors") for n in sizes):
        raise UserError(
            f"{what}: holds only GGUF files; add one of them with `headstart zoo add {what}:FILE` ("
            f"{shortened_list(quantised)})"
        )
    if "config.json" not in sizes:
        raise UserError(f"{what}: has no config.json; give a model repository in Hugging Face layout")
    side = [name for name in side_files(sizes) if name != "facts.json"]
    if "model.safetensors" in sizes:
        return [*side, "model.safetensors"]
    if INDEX in sizes:
        index = with_retries(lambda: hf_hub_download(repo, INDEX, revision=commit), what)
        shards = sorted(set(read_index(Path(index)).values()))
        missing = [s for s in shards if s not in sizes]
        if missing:
            raise UserError(
                f"{repo}@{commit}: its index names {missing[0]!r}, which the repository has not; give another revision"
            )
        return [*side, INDEX, *shards]
    weights = [n for n in sizes if n.endswith(".safetensors") and "/" not in n]
    if len(weights) == 1:
        return [*side, *weights]
    pickles = sorted(n for n in sizes if n.endswith(PICKLES))
    if not weights and pickles:
        raise UserError(
            f"{what}: has only pickles ({pickles[0]}), which can run code when loaded; convert them to safetensors"
        )
    raise UserError(f"{what}: has {len(weights)} safetensors files and no {INDEX}; give another repository")


def _cached_source(repo: str, revision: str, what: str) -> Source:
    """The source as it is in the hub's cache, for runs without network."""
    from huggingface_hub import snapshot_download

    folder = Path(
        with_retries(
            lambda: snapshot_download(
                repo, revision=revision, allow_patterns=["config.json", INDEX], local_files_only=True
            ),
            what,
        )
    )
    try:
        found = _folder_source(folder)
    except UserError as error:
        raise UserError(f"{what}: is only partly in the local cache ({error}); unset HF_HUB_OFFLINE") from error
    commit = folder.name
    return Source(
        f"{repo}@{commit}",
        hub_names(repo, commit),
        found.license,
        found.files,
        repo=repo,
        commit=commit,
        cached=frozenset(found.files),
    )
