"""Hashes, moments and ranges of tensors: against NumPy, with any number of threads, and what is refused."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.support.tiny import config
from zoo.add import add
from zoo.checkpoints.checkpoint import Checkpoint
from zoo.checkpoints.headers import INDEX
from zoo.donors import measures
from zoo.donors.measures import Measure, measure_checkpoint, measure_file
from zoo.errors import UserError

LARGE = 3 * (1 << 16) + 1000  # several blocks of sums and a rest, and enough for counts of bit patterns


def write(folder: Path, tensors: dict[str, Tensor]) -> Checkpoint:
    folder.mkdir()
    config().save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return Checkpoint.open(folder)


def all_measures(checkpoint: Checkpoint) -> dict[str, Measure]:
    return {name: m for file in measure_checkpoint(checkpoint) for name, m in file.measures.items()}


@pytest.mark.parametrize("chunk", [1 << 22, 1 << 16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_moments_of_large_tensors_are_scipys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, chunk: int
) -> None:
    monkeypatch.setattr(measures, "CHUNK", chunk)
    torch.manual_seed(0)
    heavy = torch.distributions.StudentT(3.0).sample((LARGE,)) * 0.1
    tensors = {"heavy": heavy.to(dtype), "far": (heavy + 5).to(dtype), "one": torch.full((LARGE,), 0.5, dtype=dtype)}
    tensors["signs"] = torch.where(heavy > 0, 0.0, -0.0).to(dtype)
    found = all_measures(write(tmp_path / "a", tensors))
    for name, tensor in tensors.items():
        values = tensor.double().numpy()
        assert found[name].sha256 == hashlib.sha256(tensor.view(torch.uint8).numpy().tobytes()).hexdigest()
        assert (found[name].low, found[name].high) == (values.min(), values.max())
        assert found[name].mean == pytest.approx(values.mean(), rel=1e-13, abs=1e-16)
        assert found[name].std == pytest.approx(values.std(), rel=1e-12)
        if values.std() > 0:
            assert found[name].kurtosis == pytest.approx(scipy.stats.kurtosis(values, fisher=False), rel=1e-11)
        else:
            assert found[name].kurtosis is None


def test_the_number_of_threads_changes_no_bit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    values = torch.randn(5 * LARGE)
    checkpoint = write(tmp_path / "a", {"wide": values, "short": values.bfloat16(), "small": values[:1000].clone()})
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = all_measures(checkpoint)
        torch.set_num_threads(3)
        assert all_measures(checkpoint) == alone
    finally:
        torch.set_num_threads(threads)


def test_every_byte_is_hashed_and_passed_on_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those of a tensor that the index leaves out, and in threads."""
    monkeypatch.setattr(measures, "CHUNK", 1 << 16)
    monkeypatch.setattr(measures, "SMALL", 0)
    tensors = {name: torch.randn(70_000) for name in "abc"}
    folder = write(tmp_path / "a", tensors).folder
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys("ac", "part.safetensors")}))
    passed: list[bytes] = []
    found = measure_file(Checkpoint.open(folder), folder / "part.safetensors", lambda raw: passed.append(bytes(raw)))
    data = (folder / "part.safetensors").read_bytes()
    assert b"".join(passed) == data and len(passed) > 10
    assert (found.size, found.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert {n: m.sha256 for n, m in found.measures.items()} == {
        n: hashlib.sha256(tensors[n].numpy().tobytes()).hexdigest() for n in "ac"
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("size", [1000, LARGE])
def test_nan_and_infinity_are_refused_wherever_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, value: float, size: int
) -> None:
    monkeypatch.setattr(measures, "CHUNK", 1 << 16)
    for place in (0, size // 2, size - 1):
        values = torch.zeros(size, dtype=dtype)
        values[place] = value
        checkpoint = write(tmp_path / f"{place}", {"good": torch.zeros(3), "bad": values})
        with pytest.raises(UserError, match=f"{checkpoint.folder}: tensor 'bad' holds NaN or infinity"):
            all_measures(checkpoint)


def test_tensors_without_values_and_integers(tmp_path: Path) -> None:
    tensors = {"none": torch.zeros(0, 4), "counts": torch.arange(5), "flags": torch.tensor([True, False])}
    found = all_measures(write(tmp_path / "a", tensors))
    assert found["none"] == Measure(sha256=hashlib.sha256().hexdigest())
    assert (found["counts"].mean, found["counts"].low, found["counts"].high) == (2.0, 0.0, 4.0)
    assert found["flags"].mean == 0.5 and found["counts"].std == pytest.approx(np.sqrt(2))


@pytest.mark.parametrize("change", ["time", "bytes", "file", "gone"])
def test_a_source_that_changes_while_it_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str, tiny_source: Path
) -> None:
    """The config, which is read before the weights, and changes when they are."""
    import zoo.filling.copy

    copy, path = zoo.filling.copy.copy_file, tiny_source / "config.json"

    def change_source(target: Path, *args: object) -> object:
        result = copy(target, *args)  # type: ignore[arg-type]
        if target.name == "model.safetensors":
            if change == "time":
                os.utime(path, ns=(1, 1))
            elif change == "bytes":
                path.write_bytes(path.read_bytes() + b"\n")
            elif change == "file":
                data, state = path.read_bytes(), path.stat()
                path.rename(path.with_name("older"))
                path.write_bytes(data)
                os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
            else:
                path.unlink()
        return result

    monkeypatch.setattr(zoo.filling.copy, "copy_file", change_source)
    with pytest.raises(UserError, match="changed while it was read; add it again when nothing writes to it"):
        add([str(tiny_source)], tmp_path / "zoo", quiet=True)
    assert not (tmp_path / "zoo").exists()
