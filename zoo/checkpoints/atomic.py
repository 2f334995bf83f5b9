"""Folders and files that appear complete or not at all.

Whatever is written gets a hidden temporary name first, `.NAME.TOKEN.partial` with a random token. It is synced to the
disk and then renamed, and the folder that holds it is synced too. So after a power failure a name stands for all of
the bytes or for the older ones.

Whoever writes holds a lock: `.NAME.lock` beside an output, `.lock` inside a folder of work that can be continued. The
system frees the lock of a process that ends in any way. The next writer of the same output takes it and removes what
a killed one left behind. A lock that nobody can hold, because the file system has none, changes two things: nothing is
removed, and of two writers the first to rename wins. On a network file system whose locks are local to each machine,
a writer can remove the temporary folder of one on another machine. That one then ends with an error; finished outputs
are never removed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from zoo.errors import UserError
from zoo.limits import MAX_LOCK_WAIT

FOLDER_LOCK = ".lock"  # inside a folder of work
TOKEN = "[0-9a-f]{16}"
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}
NO_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
REASONS = {
    errno.ENOSPC: "the disk is full; free some space or choose another place",
    errno.EDQUOT: "the disk quota is used up; free some space or choose another place",
    errno.EFBIG: "a file would be larger than the system allows; write smaller shards or choose another place",
    errno.EIO: "the disk reports an error; choose another place",
    errno.EROFS: "the disk is read-only; choose another place",
    errno.EACCES: "permission denied; choose another place",
    errno.EPERM: "permission denied; choose another place",
    errno.ENOTDIR: "a part of this path is a file; choose another place",
    errno.ENAMETOOLONG: "the name is too long; give a shorter one",
    errno.ELOOP: "its links lead back to themselves; choose another place",
    errno.EXDEV: "lies on another disk than its folder; choose another place",
    errno.EBUSY: "is in use by the system; choose another place",
    errno.EEXIST: "exists already; give another output folder or remove it",
    errno.ENOTEMPTY: "exists already; give another output folder or remove it",
}


@contextlib.contextmanager
def new_folder(out: str | Path) -> Iterator[Path]:
    """Yields a temporary folder to fill, which becomes `out` at the end.

    On any error, Ctrl-C included, it is removed, with the parents that were missing before. `out` may exist as an
    empty folder or as a link to one. UserError where it is anything else, where another process is writing it or has
    written it meanwhile, or where the disk refuses.
    """
    given, out = Path(out), _resolved(out)
    with disk_errors(given):
        _refuse_output_folder(given, out)
        with existing_parents(out.parent), _output_lock(given, out, wait=0):
            _refuse_output_folder(given, out)
            partial = out.parent / _temporary_name(out.name)
            try:
                partial.mkdir()
                yield partial
                rename_folder(partial, out)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise


def rename_folder(partial: Path, out: Path) -> None:
    """Syncs a complete folder and gives it the name `out`, in the same parent.

    OSError where `out` is a file, or a folder that is not empty.
    """
    sync_tree(partial)
    if os.name == "nt" and out.exists():  # elsewhere a rename replaces an empty folder, and only an empty one
        out.rmdir()
    partial.rename(out)
    sync(out.parent)


@contextlib.contextmanager
def replacement_file(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path to write, which then takes the place of the file `path`. Creates missing folders.

    On any error the older file stays. Another process that writes the same file is waited for. UserError where `path`
    is something other than a file, or where the disk refuses.
    """
    given, path = Path(path), _resolved(path)
    with disk_errors(given):
        if path.exists() and not path.is_file():
            raise UserError(f"{given}: is not a file; give another name for the file to write")
        with existing_parents(path.parent), _output_lock(given, path, wait=MAX_LOCK_WAIT):
            partial = path.with_name(_temporary_name(path.name))
            try:
                yield partial
                sync(partial)
                os.replace(partial, path)
                sync(path.parent)
            finally:
                partial.unlink(missing_ok=True)


def replace_file(path: str | Path, data: bytes) -> None:
    """Writes a file in place of an older one, as `replacement_file`."""
    with replacement_file(path) as partial:
        partial.write_bytes(data)


@contextlib.contextmanager
def work_folder(folder: str | Path, check: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Makes `folder`, where it is missing, and holds its lock, so that no other process works in it.

    check  raises UserError where the folder cannot be worked in; called before the lock is taken and again under it

    Temporary files that a killed process left directly in the folder are removed. The folder stays on an error, unless
    it is new and empty. UserError where another process works in it, or where the disk refuses.
    """
    folder = Path(folder)
    with contextlib.ExitStack() as stack:
        stack.enter_context(disk_errors(folder))
        check()
        stack.enter_context(existing_parents(folder))
        locked = stack.enter_context(hold_lock(folder / FOLDER_LOCK, folder, wait=0))
        check()
        if locked:
            remove_temporaries(folder)
        yield


@contextlib.contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """Yields a folder for intermediate files inside a `work_folder`; removed at the end."""
    folder = parent / _temporary_name("work")
    try:
        folder.mkdir()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """Yields a folder for intermediate files where the system keeps temporary ones; removed at the end.

    Those that killed processes of the same user left there are removed too.
    """
    parent = Path(tempfile.gettempdir())
    for lock in parent.glob(".headstart.*.lock"):
        with contextlib.suppress(UserError, OSError), hold_lock(lock, lock, wait=0) as locked:
            if locked:
                shutil.rmtree(lock.with_suffix(".partial"), ignore_errors=True)
    folder = parent / _temporary_name("headstart")
    with disk_errors(folder), hold_lock(folder.with_suffix(".lock"), folder, wait=0):
        try:
            folder.mkdir(mode=0o700)
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def hold_lock(lock_file: Path, what: Path, wait: float | None = None) -> Iterator[bool]:
    """Holds a lock that no other process can hold at the same time. Removes the lock's file at the end.

    what  the output that it stands for, named in errors
    wait  seconds for another process to end; None for ever

    Yields False where the file system has no locks. UserError where another process holds it for longer.
    """
    import filelock

    lock = filelock.FileLock(lock_file, timeout=-1 if wait is None else wait)
    try:
        locked = lock.acquire() is not None
    except filelock.Timeout as error:
        raise UserError(f"{what}: another process is writing it; wait until it ends, or give another output") from error
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        locked = False
    try:
        yield locked
    finally:
        if locked:
            with contextlib.suppress(OSError):
                # Removed while it is held. A process that opened this file and waits notices, and opens a new one.
                if not isinstance(lock, filelock.SoftFileLock):
                    lock_file.unlink()
            with contextlib.suppress(OSError):
                lock.release()


def is_temporary(name: str) -> bool:
    """Whether a file or folder of this name is a temporary one, or a lock, of this module."""
    return re.fullmatch(rf"\.(.+\.)?lock|\..*\.{TOKEN}\.partial", name, re.DOTALL) is not None


def is_unused(folder: Path) -> bool:
    """Whether a folder is missing, or holds at most what killed processes left behind."""
    return not folder.exists() or (folder.is_dir() and all(is_temporary(p.name) for p in folder.iterdir()))


def remove_leftovers(path: Path) -> None:
    """Removes what a killed process left behind of the output `path`. Does nothing while a process writes it."""
    with contextlib.suppress(UserError, OSError):
        if _lock_file(path).exists():
            with _output_lock(path, path, wait=0):
                pass


def remove_leftovers_in(folder: Path) -> None:
    """Does `remove_leftovers` for every output in a folder."""
    for lock in folder.glob(".?*.lock"):
        remove_leftovers(folder / lock.name.removeprefix(".").removesuffix(".lock"))


def remove_temporaries(folder: Path, name: str | None = None) -> None:
    """Removes the temporary files and folders in a folder. Its lock, or that of the output `name`, must be held.

    name  only those of this output; None for those of every output, with their locks
    """
    pattern = re.compile(rf"\.{'.*' if name is None else re.escape(name)}\.{TOKEN}\.partial", re.DOTALL)
    for path in folder.iterdir() if folder.is_dir() else ():
        is_lock = name is None and path.name != FOLDER_LOCK and path.name.endswith(".lock") and is_temporary(path.name)
        if pattern.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        elif pattern.fullmatch(path.name) or (is_lock and path.lstat().st_size == 0):
            path.unlink(missing_ok=True)


def sync_tree(folder: Path) -> None:
    """Syncs every file and folder in a folder, and itself, to the disk."""
    for parent, _, files in os.walk(folder, topdown=False):
        for name in files:
            sync(Path(parent) / name)
        sync(Path(parent))


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns errors of the disk (full, over quota, read-only, permission denied) into a UserError about `path`.

    An error that names a file elsewhere is about that file.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in REASONS:
            raise
        where = path if error.filename is None or _is_of_output(error.filename, path) else error.filename
        raise UserError(f"{where}: {REASONS[error.errno]}") from error


def _resolved(path: str | Path) -> Path:
    """The absolute path without links."""
    if "\0" in str(path):
        raise UserError(f"{path}: holds a null character; give another name")
    return Path(os.path.realpath(path))


def _is_of_output(filename: str | bytes | int, path: Path) -> bool:
    """Whether a file is the output `path`, lies in it or above it, or has a temporary name."""
    if isinstance(filename, int):
        return True
    file, path = Path(os.path.realpath(os.fsdecode(filename))), Path(os.path.realpath(path))
    return path.is_relative_to(file) or file.is_relative_to(path) or any(is_temporary(part) for part in file.parts)


def _refuse_output_folder(given: Path, out: Path) -> None:
    if given.is_symlink() and not out.exists():
        raise UserError(f"{given}: is a link to a folder that is missing; create it or give another output folder")
    if not out.exists():
        return
    if not out.is_dir() or any(out.iterdir()):
        remove_leftovers(out)  # of a process that was killed after it had finished
        raise UserError(f"{given}: exists already; give another output folder or remove it")
    if os.path.ismount(out) or out == Path.cwd():
        kind = "a disk of its own" if os.path.ismount(out) else "the current folder"
        raise UserError(f"{given}: is {kind}, which cannot be replaced; give the name of a new folder inside it")


@contextlib.contextmanager
def _output_lock(given: Path, path: Path, wait: float) -> Iterator[None]:
    """Holds the lock of one output and removes what killed processes left of it."""
    with hold_lock(_lock_file(path), given, wait) as locked:
        if locked:
            remove_temporaries(path.parent, path.name)
        yield


@contextlib.contextmanager
def existing_parents(folder: Path) -> Iterator[None]:
    """Creates a folder and its missing parents. On an error those of them that are empty are removed again."""
    missing = [p for p in (folder, *folder.parents) if not p.exists()]
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder)) from error
        except FileNotFoundError as error:  # as in /proc
            raise UserError(f"{folder}: this folder cannot be created; choose another place") from error
        for new in missing:
            sync(new.parent)
        yield
    except BaseException:
        for new in missing:
            with contextlib.suppress(OSError):
                new.rmdir()
        raise


def _lock_file(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")


def _temporary_name(name: str) -> str:
    return f".{name}.{secrets.token_hex(8)}.partial"


def sync(path: Path) -> None:
    """Has the system write a file, or the names in a folder, to the disk. Some file systems refuse it for folders."""
    is_folder = path.is_dir()
    if is_folder and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not is_folder or error.errno not in NO_SYNC:
            raise
    finally:
        os.close(descriptor)
