"""Where a GGUF file comes from: a path, or a file of a hub repository, `org/name[@revision]:file.gguf`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from zoo.checkpoints.files import GGUF, FileHashes, content_hash
from zoo.checkpoints.hub import HUB_ID, with_retries
from zoo.checkpoints.hub_answers import is_safe_path
from zoo.checkpoints.licenses import UNKNOWN
from zoo.checkpoints.sources import (
    Source,
    SourceFile,
    folder_names,
    hub_license,
    hub_names,
    model_info,
    source_file,
)
from zoo.errors import UserError, unknown
from zoo.gguf.model import GgufModel, part_files, part_names, stem

ADDRESS = re.compile(rf"(?P<id>{HUB_ID.pattern}):(?P<file>.+)", re.ASCII)


@dataclass(frozen=True)
class GgufSource(Source):
    """The parts of one model in GGUF, before their weights are read. `files` has them in order."""


def is_gguf_address(source: str) -> bool:
    """Whether a source names a GGUF file, by its ending. A folder of that name is none."""
    return source.lower().endswith(GGUF) and not Path(source).is_dir()


def resolve_gguf(source: str, revision: str | None = None) -> GgufSource:
    """The source of a GGUF file, with the revision of a hub repository resolved to a commit.

    Reads the header of a file on this machine, and metadata of one on the hub. UserError for what is neither.
    """
    path = Path(source)
    match = ADDRESS.fullmatch(source)
    if path.exists() or match is None:
        if not path.exists():
            raise UserError(f"{source}: no such file, and not a file of a hub repository (org/name[@revision]:FILE)")
        if revision is not None:
            raise UserError(f"{source}: is a file, which has no revision {revision!r}; leave --revision out")
        return _local_source(path)
    if not is_safe_path(match["file"]):
        raise UserError(f"{source}: does not name a file inside a repository; write org/name[@revision]:FILE")
    repo, _, at = match["id"].partition("@")
    if at and revision is not None and at != revision:
        raise UserError(f"{source}: names another revision than --revision {revision}; give one of them")
    return _hub_source(repo, at or revision, match["file"])


def gguf_revision(source: GgufSource, hashes: FileHashes) -> str:
    """The commit of a source of the hub; of other files `sha256:<hash>`, of one file that of its bytes."""
    if source.commit is not None:
        return source.commit
    only = next(iter(hashes.values()))["sha256"]
    return f"sha256:{only if len(hashes) == 1 else content_hash(hashes)}"


def names_of_address(address: str) -> tuple[str, ...]:
    """Possible names for the donor from the address in its record: a path, or org/name@commit:FILE."""
    match = ADDRESS.fullmatch(address)
    if Path(address).is_absolute() or match is None:
        return folder_names(Path(address).with_name(stem(Path(address).name)))
    repo, _, commit = match["id"].partition("@")
    return hub_names(f"{repo}--{stem(Path(match['file']).name)}", commit)


def _local_source(path: Path) -> GgufSource:
    paths = part_files(path)
    model = GgufModel.open(paths)
    folder = path.parent.resolve()  # not the file: in the hub's cache it is a link to a blob without an ending
    names = folder_names(folder / stem(path.name))
    files = {part.name: SourceFile(part.stat().st_size) for part in paths}
    return GgufSource(str(folder / paths[0].name), names, model.license, files, folder=folder)


def _hub_source(repo: str, revision: str | None, file: str) -> GgufSource:
    from huggingface_hub import constants, try_to_load_from_cache

    what = f"{repo}:{file}" if revision is None else f"{repo}@{revision}:{file}"
    if constants.HF_HUB_OFFLINE:
        return _cached_source(repo, revision or "main", file)
    info, commit = model_info(repo, revision, what)
    known = {s.rfilename: source_file(s) for s in info.siblings or ()}
    if file not in known:
        raise UserError(f"{repo}: {unknown('file', file, [n for n in known if n.lower().endswith(GGUF)])}")
    parts = _parts(file)
    missing = [part for part in parts if part not in known]
    if missing:
        raise UserError(f"{what}: is split into {len(parts)} parts, of which the repository lacks {missing[0]!r}")
    cached = {part for part in parts if isinstance(try_to_load_from_cache(repo, part, revision=commit), str)}
    files = {part: known[part] for part in parts}
    return _of_hub(repo, commit, files, hub_license(info), revision or "main", frozenset(cached))


def _cached_source(repo: str, revision: str, file: str) -> GgufSource:
    """The source as it is in the hub's cache, for runs without network."""
    from huggingface_hub import hf_hub_download

    parts = _parts(file)
    paths = [
        Path(with_retries(lambda: hf_hub_download(repo, part, revision=revision, local_files_only=True), repo))  # noqa: B023
        for part in parts
    ]
    commit = paths[0].parents[len(Path(file).parts) - 1].name
    files = {part: SourceFile(path.stat().st_size) for part, path in zip(parts, paths, strict=True)}
    return _of_hub(repo, commit, files, UNKNOWN, revision, frozenset(parts))


def _of_hub(
    repo: str, commit: str, files: dict[str, SourceFile], licence: str, requested: str, cached: frozenset[str]
) -> GgufSource:
    first = next(iter(files))
    names = hub_names(f"{repo}--{stem(Path(first).name)}", commit)
    address = f"{repo}@{commit}:{first}"
    return GgufSource(address, names, licence, files, None, repo, commit, requested, cached)


def _parts(file: str) -> list[str]:
    """The paths of all parts of a file in a repository."""
    folder, _, name = file.rpartition("/")
    return [f"{folder}/{part}" if folder else part for part in part_names(name)]
