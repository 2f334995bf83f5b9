"""Written folders: complete, loadable, the same bytes for the same input, or not there at all."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from zoo.checkpoints.atomic import new_folder, replace_file
from zoo.checkpoints.checkpoint import Checkpoint
from zoo.checkpoints.headers import INDEX
from zoo.checkpoints.writer import fill_folder, write_checkpoint
from zoo.errors import UserError
from zoo.targets.blueprint import Blueprint

Make = Callable[..., Path]


def values(blueprint: Blueprint, seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {s.name: torch.randn(s.shape, generator=g) * 0.02 for s in blueprint.specs}


@pytest.fixture
def blueprint(tmp_path: Path, tiny_llama: Make) -> Blueprint:
    return Blueprint.from_config(tiny_llama(tmp_path / "made"))


@pytest.mark.parametrize("size", ["5GB", "40KB", "1KB"])
def test_what_is_written_loads_with_transformers_and_the_library(
    tmp_path: Path, blueprint: Blueprint, size: str
) -> None:
    from transformers import AutoModelForCausalLM

    tensors = values(blueprint)
    write_checkpoint(tmp_path / "out", blueprint, tensors.items(), max_shard_size=size, metadata={"seed": "0"})
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert ([f.name for f in files] == ["model.safetensors"]) == (size == "5GB")
    found = {n: t for f in files for n, t in load_file(f).items()}
    assert found.keys() == tensors.keys() and all(torch.equal(found[n], t) for n, t in tensors.items())
    for file in files:
        with safe_open(file, "pt") as f:
            assert f.metadata() == {"format": "pt", "seed": "0"}
    if size != "5GB":
        index = json.loads((tmp_path / "out" / INDEX).read_text())
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert all(torch.equal(model.state_dict()[n], t) for n, t in tensors.items())
    checkpoint = Checkpoint.open(tmp_path / "out")
    assert all(torch.equal(checkpoint.read(n), t) for n, t in tensors.items())


def test_order_of_the_tensors_changes_no_byte(tmp_path: Path, blueprint: Blueprint) -> None:
    tensors = values(blueprint)
    write_checkpoint(tmp_path / "a", blueprint, tensors.items(), max_shard_size="40KB")
    write_checkpoint(tmp_path / "b", blueprint, reversed(list(tensors.items())), max_shard_size="40KB")
    a, b = ({p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in "ab")
    assert a == b and len(a) > 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_dtype_is_cast_to_and_said_in_the_config(tmp_path: Path, blueprint: Blueprint, dtype: torch.dtype) -> None:
    from transformers import AutoModelForCausalLM

    tensors = values(blueprint)
    write_checkpoint(tmp_path / "out", blueprint, tensors.items(), dtype=dtype)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[n], t.to(dtype)) for n, t in tensors.items())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == dtype


def test_memory_is_a_tensor_and_not_the_model(tmp_path: Path, tiny_llama: Make) -> None:
    """A sampler whose tensors come one by one: never more than two of them are alive."""
    import weakref

    blueprint = Blueprint.from_config(tiny_llama(tmp_path / "made"))
    alive: list[weakref.ref[torch.Tensor]] = []

    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        for spec in blueprint.specs:
            assert sum(r() is not None for r in alive) <= 1
            tensor = torch.zeros(spec.shape)
            alive.append(weakref.ref(tensor))
            yield spec.name, tensor
            del tensor

    write_checkpoint(tmp_path / "out", blueprint, stream(), max_shard_size="40KB")


@pytest.mark.parametrize("case", ["shape", "nan", "overflow", "twice", "unknown", "missing"])
def test_wrong_tensors_leave_nothing_behind(tmp_path: Path, blueprint: Blueprint, case: str) -> None:
    tensors = values(blueprint)
    name = "model.layers.1.mlp.up_proj.weight"
    items = list(tensors.items())
    dtype = None
    if case == "shape":
        items = [(n, t.T if n == name else t) for n, t in items]
    elif case == "nan":
        tensors[name][0, 0] = float("nan")
    elif case == "overflow":
        tensors[name][0, 0], dtype = 1e6, torch.float16
    elif case == "twice":
        items.append((name, tensors[name]))
    elif case == "unknown":
        items.append((name + "s", tensors[name]))
    else:
        items = [(n, t) for n, t in items if n != name]
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        write_checkpoint(tmp_path / "out", blueprint, items, dtype=dtype)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["made"]


def test_an_output_that_exists_is_left_alone(tmp_path: Path, blueprint: Blueprint) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        write_checkpoint(tmp_path / "out", blueprint, values(blueprint).items())
    with pytest.raises(UserError, match="exists already"), new_folder(tmp_path / "out" / "mine.txt"):
        pass
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine.txt"]
    (tmp_path / "empty").mkdir()
    write_checkpoint(tmp_path / "empty", blueprint, values(blueprint).items())
    assert (tmp_path / "empty" / "model.safetensors").exists()


def test_a_checkpoint_can_be_one_part_of_a_new_folder(tmp_path: Path, blueprint: Blueprint) -> None:
    with new_folder(tmp_path / "a" / "b" / "out") as folder:
        fill_folder(folder, blueprint, values(blueprint).items())
        (folder / "README.md").write_text("card")
        assert not (tmp_path / "a" / "b" / "out").exists()
    assert (tmp_path / "a" / "b" / "out" / "model.safetensors").exists()
    assert [p.name for p in (tmp_path / "a" / "b").iterdir()] == ["out"]


def in_a_process(work: Callable[[], None], limit: int | None = None, interrupt: Event | None = None) -> str:
    """Runs `work` in a forked process whose files may have at most `limit` bytes, and sends it Ctrl-C once it has set
    `interrupt`. Returns what it raised."""
    context = multiprocessing.get_context("fork")
    answer = context.SimpleQueue()

    def child() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            work()
            answer.put("nothing was raised")
        except BaseException as error:
            answer.put(f"{type(error).__name__}: {error}")

    process = context.Process(target=child)
    process.start()
    if interrupt is not None:
        assert interrupt.wait(20) and process.pid is not None
        os.kill(process.pid, signal.SIGINT)
    process.join(20)
    return answer.get()


def test_a_file_that_cannot_grow_is_one_line_and_leaves_nothing(tmp_path: Path, blueprint: Blueprint) -> None:
    def work() -> None:
        write_checkpoint(tmp_path / "out", blueprint, values(blueprint).items())

    said = in_a_process(work, limit=50_000)
    assert said.startswith("UserError") and "larger than the system allows" in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["made"]


def test_an_interruption_leaves_nothing(tmp_path: Path, blueprint: Blueprint) -> None:
    begun = multiprocessing.get_context("fork").Event()

    def slowly() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in values(blueprint).items():
            yield name, tensor
            begun.set()
            time.sleep(5)

    said = in_a_process(lambda: write_checkpoint(tmp_path / "out", blueprint, slowly()), interrupt=begun)
    assert said.startswith("KeyboardInterrupt")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["made"]


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, blueprint: Blueprint) -> None:
    """A real one: a tmpfs of 64 KB, where we may mount it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a small disk needs privileges that this user lacks")
    try:
        with pytest.raises(UserError, match="the disk is full"):
            write_checkpoint(disk / "out", blueprint, values(blueprint).items())
        assert os.listdir(disk) == []
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "found.json"
    replace_file(path, b"first")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        replace_file(path, b"second")
    assert path.read_bytes() == b"first" and list(path.parent.iterdir()) == [path]
