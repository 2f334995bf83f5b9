"""Outputs appear complete or not at all, whoever else writes them, and nothing temporary stays."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from zoo.checkpoints import atomic
from zoo.checkpoints.atomic import (
    disk_errors,
    is_temporary,
    new_folder,
    remove_leftovers,
    replace_file,
    replacement_file,
    scratch_folder,
    work_folder,
)
from zoo.errors import UserError


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def run_killed(work: Callable[[], object]) -> None:
    """Runs `work` in a forked process that kills itself in the middle of it (`die`)."""
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(20)
    assert process.exitcode == -signal.SIGKILL


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@contextlib.contextmanager
def another_process(hold: Callable[[], contextlib.AbstractContextManager[object]]) -> Iterator[None]:
    """Inside, another process has entered `hold()`; it leaves it at the end, without an error."""
    context = multiprocessing.get_context("fork")
    entered, leave = context.Event(), context.Event()

    def child() -> None:
        with hold():
            entered.set()
            leave.wait(20)

    process = context.Process(target=child)
    process.start()
    try:
        assert entered.wait(20)
        yield
    finally:
        leave.set()
        process.join(20)
        assert process.exitcode == 0


def write_folder(out: Path, text: str = "whole") -> None:
    with new_folder(out) as folder:
        (folder / "file").write_text(text)


def test_a_second_process_is_refused_while_the_first_writes(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with another_process(lambda: new_folder(out)):
        before = names(tmp_path)
        with pytest.raises(UserError, match=r"out: another process is writing it; wait until it ends, or give another"):
            write_folder(out)
        assert names(tmp_path) == before, "nothing that a living process holds is removed"
        write_folder(tmp_path / "other")
    assert names(tmp_path) == ["other", "out"] and names(out) == []


def test_of_many_processes_one_writes(tmp_path: Path) -> None:
    out, context = tmp_path / "new" / "out", multiprocessing.get_context("fork")
    answers, start = context.SimpleQueue(), context.Event()

    def child(number: int) -> None:
        start.wait(20)
        try:
            write_folder(out, str(number))
            answers.put(f"wrote {number}")
        except BaseException as error:
            answers.put(f"{type(error).__name__}: {error}")

    processes = [context.Process(target=child, args=(number,)) for number in range(6)]
    for process in processes:
        process.start()
    start.set()
    said = [answers.get() for _ in processes]
    for process in processes:
        process.join(20)
    (winner,) = [line for line in said if line.startswith("wrote")]
    assert (out / "file").read_text() == winner.split()[1]
    assert all(line.startswith(f"UserError: {out}: ") for line in said if line != winner)
    assert names(out.parent) == ["out"]


@pytest.mark.parametrize("exists", [False, True])
def test_without_locks_the_first_to_rename_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exists: bool) -> None:
    """A file system without locks: the loser gets a line, the winner's folder stays whole."""
    import filelock

    def no_locks(*_: object, **__: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(filelock.FileLock, "acquire", no_locks)
    out = tmp_path / "out"
    if exists:
        out.mkdir()
    with pytest.raises(UserError, match="out: exists already"), new_folder(out) as folder:
        (folder / "file").write_text("loser")
        write_folder(out, "winner")
    assert (out / "file").read_text() == "winner" and names(tmp_path) == ["out"]


def test_the_next_writer_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    out, file = tmp_path / "out", tmp_path / "file.json"

    def killed_folder() -> None:
        with new_folder(out) as folder:
            (folder / "half").write_text("half")
            die()

    def killed_file() -> None:
        with replacement_file(file) as partial:
            partial.write_text("half")
            die()

    run_killed(killed_folder)
    run_killed(killed_file)
    left = names(tmp_path)
    assert len(left) == 4 and all(is_temporary(name) for name in left)
    assert all(name.startswith((".out.", ".file.json.")) for name in left), "to be recognised"
    write_folder(out)
    replace_file(file, b"whole")
    assert names(tmp_path) == ["file.json", "out"]
    assert (out / "file").read_text() == "whole" and file.read_bytes() == b"whole"


def test_a_process_killed_after_it_had_finished_leaves_nothing_for_long(tmp_path: Path) -> None:
    """Its output is there and complete. The next writer is refused, and what was left is removed all the same."""
    out = tmp_path / "out"
    write_folder(out)
    (tmp_path / ".out.lock").touch()
    (tmp_path / ".out.0123456789abcdef.partial").mkdir()
    with pytest.raises(UserError, match="exists already"):
        write_folder(out)
    assert names(tmp_path) == ["out"]
    (tmp_path / ".file.lock").touch()
    remove_leftovers(tmp_path / "file")
    assert names(tmp_path) == ["out"]


def test_files_of_the_user_with_similar_names_stay(tmp_path: Path) -> None:
    kept = [".out.partial", ".out.0123.partial", ".out.0123456789ABCDEF.partial", ".other.0123456789abcdef.partial"]
    kept += ["out.0123456789abcdef.partial", ".out.txt", "out.lock"]
    for name in kept:
        (tmp_path / name).write_text("mine")
    write_folder(tmp_path / "out")
    assert names(tmp_path) == sorted([*kept, "out"])
    (tmp_path / "work").mkdir()
    for name in ("0.lock", ".editor.lock"):
        (tmp_path / "work" / name).write_text("4711")  # a lock of ours is empty
    with work_folder(tmp_path / "work"):
        pass
    assert names(tmp_path / "work") == [".editor.lock", "0.lock"]


def test_an_error_leaves_nothing_not_even_the_parents(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "a" / "b" / "out") as folder:
        (folder / "half").write_text("half")
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt), replacement_file(tmp_path / "a" / "b" / "file"):
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt), work_folder(tmp_path / "a" / "work"):
        raise KeyboardInterrupt
    assert names(tmp_path) == []


def test_a_link_to_an_empty_folder_is_followed(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    write_folder(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "empty" / "file").read_text() == "whole"
    assert names(tmp_path) == ["empty", "link"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("dangling", "is a link to a folder that is missing; create it or give another output folder"),
        ("loop", "is a link to a folder that is missing"),
        ("file", "exists already"),
        ("file/out", "a part of this path is a file"),
        ("full", "exists already"),
        ("x" * 250, "the name is too long; give a shorter one"),
        ("nul\0l", "holds a null character"),
        (".", "is the current folder, which cannot be replaced"),
    ],
)
def test_an_output_folder_that_cannot_be_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, said: str
) -> None:
    (tmp_path / "dangling").symlink_to("nothing")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full" / "of").mkdir(parents=True)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    before = names(tmp_path)
    with pytest.raises(UserError, match=said) as caught, new_folder(given if given == "." else f"{tmp_path}/{given}"):
        pytest.fail("the work begins")
    assert "\n" not in str(caught.value) and names(tmp_path) == before and names(tmp_path / "here") == []


@contextlib.contextmanager
def mounted(folder: Path, *options: str) -> Iterator[None]:
    folder.mkdir(exist_ok=True)
    if subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting a disk needs privileges that this user lacks")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_disk_of_its_own_cannot_be_replaced_but_holds_outputs(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk"):
        with pytest.raises(
            UserError, match="disk: is a disk of its own, which cannot be replaced; give the name of a new"
        ):
            write_folder(tmp_path / "disk")
        with work_folder(tmp_path / "disk"):
            replace_file(tmp_path / "disk" / "state", b"whole")
        write_folder(tmp_path / "disk" / "out")
        assert names(tmp_path / "disk") == ["out", "state"]
    assert names(tmp_path) == ["disk"]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a file system that takes no folders")
def test_a_place_that_cannot_be_created_is_one_line() -> None:
    with pytest.raises(UserError, match=r"^/proc/none: this folder cannot be created; choose another place$"):
        write_folder(Path("/proc/none/out"))


def test_a_read_only_disk_is_one_line(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "-o", "ro"):
        for write in (
            lambda: write_folder(tmp_path / "disk" / "out"),
            lambda: write_folder(tmp_path / "disk" / "new" / "out"),
            lambda: replace_file(tmp_path / "disk" / "file", b""),
        ):
            with pytest.raises(
                UserError, match=r"disk/(out|new/out|file): the disk is read-only; choose another place$"
            ):
                write()


def test_an_output_that_moved_to_another_disk_meanwhile_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crossing(self: Path, target: Path) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link", str(self), None, str(target))

    monkeypatch.setattr(Path, "rename", crossing)
    with pytest.raises(UserError, match="out: lies on another disk than its folder; choose another place"):
        write_folder(tmp_path / "out")
    assert names(tmp_path) == []


@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "link to a device"])
def test_what_is_no_file_is_not_replaced_by_one(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "out"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "link to a device":
        path.symlink_to("/dev/null")
    else:
        path = Path("/dev/null")
    with pytest.raises(UserError, match="is not a file; give another name"):
        replace_file(path, b"data")
    assert Path("/dev/null").is_char_device() and not path.is_file()


def test_a_link_to_a_file_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    (tmp_path / "link").symlink_to("file")
    replace_file(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "new"


def test_the_writer_of_a_file_waits_for_another_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    context = multiprocessing.get_context("fork")
    second = context.Process(target=lambda: replace_file(file, b"second"))
    with replacement_file(file) as partial:
        partial.write_text("first")
        second.start()
        second.join(0.2)
        assert second.is_alive() and not file.exists()
    second.join(20)
    assert second.exitcode == 0 and file.read_bytes() == b"second" and names(tmp_path) == ["file"]
    monkeypatch.setattr(atomic, "MAX_LOCK_WAIT", 0.1)

    @contextlib.contextmanager
    def stuck() -> Iterator[None]:
        with replacement_file(tmp_path / "stuck") as partial:
            partial.write_text("late")
            yield

    with another_process(stuck):
        with pytest.raises(UserError, match="stuck: another process is writing it"):
            replace_file(tmp_path / "stuck", b"")
        assert len(list(tmp_path.glob(".stuck.*.partial"))) == 1, "that of the living process"
    assert (tmp_path / "stuck").read_text() == "late" and names(tmp_path) == ["file", "stuck"]


def test_one_process_works_in_a_folder_and_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    folder = tmp_path / "work"

    def killed() -> None:
        with work_folder(folder), atomic.temporary_folder(folder) as inner:
            replace_file(folder / "state", b"kept")
            (inner / "tokens").write_text("many")
            die()

    run_killed(killed)
    assert ".lock" in names(folder) and len(names(folder)) == 3
    with another_process(lambda: work_folder(folder)):
        assert names(folder) == [".lock", "state"]
        with pytest.raises(UserError, match="work: another process is writing it"), work_folder(folder):
            pass
    assert names(folder) == ["state"]


def test_scratch_files_of_killed_processes_are_removed_and_others_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def killed() -> None:
        with scratch_folder() as folder:
            (folder / "gigabytes").write_text("many")
            die()

    run_killed(killed)
    assert len(names(tmp_path)) == 2
    with another_process(scratch_folder):
        living = names(tmp_path)
        assert len(living) == 2
        with scratch_folder() as folder:
            assert set(living) < set(names(tmp_path)) and folder.stat().st_mode & 0o777 == 0o700
        assert names(tmp_path) == living
    assert names(tmp_path) == []


def test_an_error_about_another_file_names_that_file(tmp_path: Path) -> None:
    donor, out = tmp_path / "donor" / "model.safetensors", tmp_path / "out"
    with pytest.raises(UserError) as caught, disk_errors(out):
        raise PermissionError(errno.EACCES, "Permission denied", str(donor))
    assert str(caught.value) == f"{donor}: permission denied; choose another place"
    for ours in (out, out / "file", tmp_path, tmp_path / ".out.0123456789abcdef.partial" / "file"):
        with pytest.raises(UserError) as caught, disk_errors(out):
            raise PermissionError(errno.EACCES, "Permission denied", str(ours))
        assert str(caught.value) == f"{out}: permission denied; choose another place"
    with pytest.raises(FileNotFoundError), disk_errors(out):
        raise FileNotFoundError(errno.ENOENT, "No such file", str(donor))
