"""Adding: what is written, twice, after an interruption, side by side, and what is refused without a trace."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import torch
from safetensors.torch import load_file, save_file

import zoo.donors.measures
import zoo.filling.copy
import zoo.filling.publish
from zoo.add import add
from zoo.checkpoints.checkpoint import Checkpoint
from zoo.checkpoints.headers import INDEX
from zoo.donors.index import list_donors
from zoo.donors.manifest import read_manifest
from zoo.donors.verify import stray_files, verify
from zoo.donors.zoo import Zoo
from zoo.errors import UserError

Make = Callable[..., Path]
Tree = dict[str, tuple[bytes, int]]


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def stamps(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_donor_is_copied_and_described(tmp_path: Path, tiny_llama: Make) -> None:
    source = tiny_llama(tmp_path / "llama", max_shard_size="40KB")
    (source / "README.md").write_text("---\nlicense: apache-2.0\n---\n# hello\n")
    (source / "facts.json").write_text('{"loss": 1.5, "tokens": 1000, "seed": 3}')
    (source / "optimizer.pt").write_bytes(b"not ours")
    done = add([str(source)], tmp_path / "zoo", quiet=True)[0]
    assert (done["name"], done["state"], done["license"], done["tensors"]) == ("llama", "added", "apache-2.0", 20)
    zoo = Zoo.open(tmp_path / "zoo")
    donor = zoo.donor("llama")
    assert donor.revision == f"sha256:{donor.sha256}" == done["revision"]
    assert donor.facts == {"loss": 1.5, "tokens": 1000, "seed": 3}
    assert all((donor.folder / f).read_bytes() == (source / f).read_bytes() for f in donor.files)
    assert not {"optimizer.pt", "README.md"} & set(donor.files)
    assert list_donors(tmp_path / "zoo") == [
        {
            "name": "llama", "revision": donor.revision, "license": "apache-2.0", "architecture": "llama",
            "parameters": Checkpoint.open(source).parameters, "tensors": 20,
            "roles": {
                "attn.k": 2, "attn.o": 2, "attn.q": 2, "attn.v": 2, "embed": 1,
                "mlp.down": 2, "mlp.gate": 2, "mlp.up": 2, "norm": 5,
            },
        }
    ]  # fmt: skip
    rows = read_manifest(zoo.path).to_pylist()
    assert [(r["file"], r["offset"]) for r in rows] == sorted((r["file"], r["offset"]) for r in rows)
    for row in rows:
        with (donor.folder / row["file"]).open("rb") as f:
            f.seek(row["offset"])
            data = f.read(row["nbytes"])
        assert np.array_equal(
            np.frombuffer(data, np.float32).reshape(row["shape"]), donor.read(row["tensor"]).numpy(), equal_nan=True
        )
        assert row["layer"] == (int(row["tensor"].split(".")[2]) if ".layers." in row["tensor"] else None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_statistics_are_scipys(
    tmp_path: Path, tiny_llama: Make, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(zoo.donors.measures, "CHUNK", 1000)  # many chunks per tensor
    folder = tiny_llama(tmp_path / "a")
    tensors = {n: t.to(dtype) for n, t in load_file(folder / "model.safetensors").items()}
    heavy = torch.distributions.StudentT(3.0).sample(tensors["model.embed_tokens.weight"].shape)
    tensors["model.embed_tokens.weight"] = (heavy * 0.1 + 5).to(dtype)  # far from zero: a naive formula loses digits
    save_file(tensors, folder / "model.safetensors")
    add([str(folder)], tmp_path / "zoo", quiet=True)
    for row in read_manifest(tmp_path / "zoo").to_pylist():
        values = tensors[row["tensor"]].double().numpy().ravel()
        assert row["mean"] == pytest.approx(values.mean(), rel=1e-12, abs=1e-15)
        assert row["std"] == pytest.approx(values.std(), rel=1e-10)
        assert row["dtype"] == str(dtype).removeprefix("torch.")
        if values.std():
            assert row["kurtosis"] == pytest.approx(scipy.stats.kurtosis(values, fisher=False), rel=1e-9)
        else:
            assert row["kurtosis"] is None


def test_adding_twice_changes_nothing(tmp_path: Path, tiny_llama: Make) -> None:
    sources = [str(tiny_llama(tmp_path / n, seed=i)) for i, n in enumerate("ab")]
    add(sources, tmp_path / "zoo", quiet=True)
    content, times = tree(tmp_path / "zoo"), stamps(tmp_path / "zoo")
    assert [d["state"] for d in add(sources, tmp_path / "zoo", quiet=True)] == ["present", "present"]
    assert content == tree(tmp_path / "zoo") and times == stamps(tmp_path / "zoo")
    add(sources[::-1], tmp_path / "other", quiet=True)  # and the order of adding does not matter
    assert content == tree(tmp_path / "other")


def test_names_that_collide_get_their_parents(tmp_path: Path, tiny_llama: Make) -> None:
    one, two = tiny_llama(tmp_path / "x" / "run0", seed=0), tiny_llama(tmp_path / "y" / "run0", seed=1)
    same = shutil.copytree(one, tmp_path / "z" / "run0")
    names = [d["name"] for d in add([str(one), str(two), str(same)], tmp_path / "zoo", quiet=True)]
    assert names == ["run0", "y--run0", "run0"]
    assert [d["name"] for d in add([str(two)], tmp_path / "zoo", plan=True)] == ["y--run0"]
    assert [d.name for d in Zoo.open(tmp_path / "zoo").donors] == ["run0", "y--run0"]


def test_plan_does_nothing(tmp_path: Path, tiny_llama: Make) -> None:
    source = tiny_llama(tmp_path / "a")
    size = sum(p.stat().st_size for p in source.iterdir())
    new = add([str(source)], tmp_path / "zoo", plan=True)[0]
    assert not (tmp_path / "zoo").exists()
    assert (new["state"], new["name"], new["tensors"]) == ("new", "a", 20)
    assert (new["read"], new["download"], new["write"]) == (size, 0, size)
    add([str(source)], tmp_path / "zoo", quiet=True)
    content = tree(tmp_path / "zoo")
    again = add([str(source)], tmp_path / "zoo", plan=True)[0]
    assert (again["state"], again["write"]) == ("present", 0)
    (tmp_path / "zoo" / "models" / "a" / "config.json").unlink()
    assert add([str(source)], tmp_path / "zoo", plan=True)[0]["write"] == (source / "config.json").stat().st_size
    add([str(source)], tmp_path / "zoo", quiet=True)
    assert content == tree(tmp_path / "zoo")


def fork(*works: Callable[[], object]) -> list[int | None]:
    """Runs the works in forked processes, all at once; their exit codes."""
    processes = [multiprocessing.get_context("fork").Process(target=work) for work in works]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


def test_an_interrupted_add_resumes(tmp_path: Path, tiny_llama: Make) -> None:
    source = tiny_llama(tmp_path / "a", max_shard_size="20KB")
    add([str(source)], tmp_path / "whole", quiet=True)
    target, copy, copied = tmp_path / "zoo", zoo.filling.copy.copy_file, 0

    def die() -> None:
        def failing(*args: object) -> object:
            nonlocal copied
            if copied == 3:
                (target / "models" / ".half.part").write_bytes(b"x")
                os._exit(9)
            copied += 1
            return copy(*args)  # type: ignore[arg-type]

        zoo.filling.copy.copy_file = failing  # type: ignore[assignment]
        add([str(source)], target, quiet=True)

    assert fork(die) == [9]
    (target / "models" / ".half.part").unlink()
    kept = {p.name: p.stat().st_mtime_ns for p in (target / "models").glob(".a-*/*")}
    assert len(kept) == 3
    with pytest.raises(UserError, match="not a zoo"):
        Zoo.open(target)
    add([str(source)], target, quiet=True)
    now = stamps(target / "models" / "a")
    assert all(now[name] == when for name, when in kept.items())  # kept, not copied again
    left = {n: d for n, d in tree(target).items() if not n.endswith(".lock")}
    assert left == {n: d for n, d in tree(tmp_path / "whole").items() if not n.endswith(".lock")}
    assert verify(target) == [] and stray_files(target) == []


def test_processes_side_by_side_lose_no_row(tmp_path: Path, tiny_llama: Make) -> None:
    sources = [str(tiny_llama(tmp_path / f"m{i}", seed=i)) for i in range(6)]
    add(sources, tmp_path / "alone", quiet=True)
    target = tmp_path / "zoo"
    shards = [lambda i=i: add(sources, target, shard=(i, 3), quiet=True) for i in range(3)]
    same = [lambda: add(sources[:2], target, quiet=True)] * 2  # and two that want the same
    assert fork(*shards, *same) == [0] * 5
    records = {p: d for p, d in tree(tmp_path / "alone").items() if not p.endswith(".lock")}
    assert records == {p: d for p, d in tree(target).items() if not p.endswith(".lock")}


@pytest.mark.parametrize("shard", [(2, 2), (-1, 2), (0, 0)])
def test_an_invalid_shard_is_refused(tmp_path: Path, shard: tuple[int, int]) -> None:
    with pytest.raises(UserError, match="--shard"):
        add([], tmp_path / "zoo", shard=shard)


@pytest.mark.parametrize(
    "harm", ["nan", "truncated", "config", "no config", "pickle", "index", "file", "nothing", "link", "shape"]
)
def test_bad_donors_leave_no_trace(tmp_path: Path, tiny_llama: Make, harm: str) -> None:
    folder = tiny_llama(tmp_path / "donor")
    weights, source = folder / "model.safetensors", folder
    if harm == "nan":
        tensors = load_file(weights)
        tensors["model.norm.weight"][0] = float("nan")
        save_file(tensors, weights)
    elif harm == "truncated":
        os.truncate(weights, weights.stat().st_size - 1)
    elif harm == "config":
        (folder / "config.json").write_text("{")
    elif harm == "no config":
        source = tmp_path
        tiny_llama(tmp_path / "second")
    elif harm == "pickle":
        weights.rename(folder / "pytorch_model.bin")
    elif harm == "index":
        weights.unlink()
        (folder / INDEX).write_text('{"weight_map": {"a": "../model.safetensors"}}')
    elif harm == "file":
        source = weights
    elif harm == "nothing":
        source = tmp_path / "nothing-here"
    elif harm == "link":
        weights.rename(tmp_path / "elsewhere.safetensors")
        weights.symlink_to(tmp_path / "elsewhere.safetensors")
    elif harm == "shape":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 97}))
    for target in (tmp_path / "zoo", tmp_path / "plan"):
        with pytest.raises(UserError) as caught:
            add([str(source)], target, plan=target.name == "plan" and harm != "nan", quiet=True)
        assert "\n" not in str(caught.value)
        assert not target.exists()


def test_a_good_donor_stays_when_a_later_one_is_refused(tmp_path: Path, tiny_llama: Make) -> None:
    good, bad = tiny_llama(tmp_path / "good"), tiny_llama(tmp_path / "bad")
    tensors = load_file(bad / "model.safetensors")
    tensors["model.norm.weight"][0] = float("inf")
    save_file(tensors, bad / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.norm\.weight"):
        add([str(good), str(bad)], tmp_path / "zoo", quiet=True)
    assert [d.name for d in Zoo.open(tmp_path / "zoo").donors] == ["good"]
    assert verify(tmp_path / "zoo") == [] and stray_files(tmp_path / "zoo") == []


def test_revisions_belong_to_the_hub(tmp_path: Path, tiny_llama: Make) -> None:
    with pytest.raises(UserError, match="has no revision"):
        add([str(tiny_llama(tmp_path / "a"))], tmp_path / "zoo", revision="main")


def test_a_full_disk_is_one_line_and_leaves_no_partial_donor(tmp_path: Path, tiny_llama: Make) -> None:
    """A real one: a tmpfs that holds one donor and not two."""
    sources = [str(tiny_llama(tmp_path / n, seed=i)) for i, n in enumerate("ab")]
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a small disk needs privileges that this user lacks")
    try:
        with pytest.raises(UserError, match=r"are free; free some space|the disk is full"):
            add(sources, disk, quiet=True)
        assert [d.name for d in Zoo.open(disk).donors] == ["a"]
        assert verify(disk) == [] and stray_files(disk) == []
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_disk_that_is_too_small_is_noticed_before_the_copy(
    tmp_path: Path, tiny_llama: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny_llama(tmp_path / "donor")
    size = sum(p.stat().st_size for p in source.iterdir())
    monkeypatch.setattr(zoo.filling.publish.shutil, "disk_usage", lambda path: SimpleNamespace(free=size - 1))
    models = tmp_path / "zoo" / "models"
    message = f"{models}: {size} bytes are needed and {size - 1} are free; free some space or choose another place"
    with pytest.raises(UserError) as caught:
        add([str(source)], tmp_path / "zoo", quiet=True)
    assert str(caught.value) == message and not (tmp_path / "zoo").exists()


@pytest.mark.parametrize("first", [False, True])
def test_a_disk_that_fills_during_the_copy_leaves_nothing(tmp_path: Path, tiny_llama: Make, first: bool) -> None:
    """Writing ends with an error of the system at 50 kB of the weights, in a zoo with a donor and in a new one."""
    source, target = tiny_llama(tmp_path / "donor"), tmp_path / "zoo"
    assert (source / "model.safetensors").stat().st_size > 60_000
    if not first:
        add([str(tiny_llama(tmp_path / "other", seed=1))], target, quiet=True)
    before = tree(tmp_path)

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
        try:
            add([str(source)], target, quiet=True)
        except UserError as error:
            os._exit(0 if "larger than the system allows" in str(error) and "\n" not in str(error) else 1)
        os._exit(2)

    assert fork(work) == [0] and tree(tmp_path) == before and target.exists() == (not first)


def test_a_process_killed_in_the_middle_of_a_shard_is_continued(tmp_path: Path, tiny_llama: Make) -> None:
    source = tiny_llama(tmp_path / "a", max_shard_size="40KB")
    add([str(source)], tmp_path / "whole", quiet=True)
    shards = sorted(p.name for p in source.glob("*.safetensors"))
    assert len(shards) > 2
    measure, target = zoo.filling.copy.measure_file, tmp_path / "zoo"

    def die() -> None:
        zoo.donors.measures.CHUNK = 4096

        def measured(checkpoint: Checkpoint, path: Path, write: Callable[[memoryview], object]) -> object:
            written = 0

            def killing(raw: memoryview) -> None:
                nonlocal written
                write(raw)
                written += len(raw)
                if path.name == shards[1] and written > 20_000:
                    os.kill(os.getpid(), signal.SIGKILL)

            return measure(checkpoint, path, killing)

        zoo.filling.copy.measure_file = measured  # type: ignore[assignment]
        add([str(source)], target, quiet=True)

    assert fork(die) == [-signal.SIGKILL]
    (staging,) = (p for p in (target / "models").iterdir() if p.is_dir())
    assert (staging / shards[0]).exists() and not (staging / shards[1]).exists()
    assert any(p.name.endswith(".partial") and p.stat().st_size > 0 for p in staging.iterdir())
    inode = (staging / shards[0]).stat().st_ino
    add([str(source)], target, quiet=True)
    assert (target / "models" / "a" / shards[0]).stat().st_ino == inode  # kept
    assert tree(target) == tree(tmp_path / "whole")


def test_an_interrupted_add_of_a_source_that_has_changed_starts_again(tmp_path: Path, tiny_llama: Make) -> None:
    source, target, copy = tiny_llama(tmp_path / "a"), tmp_path / "zoo", zoo.filling.copy.copy_file

    def die() -> None:
        def copying(path: Path, *args: object) -> object:
            if path.name == "model.safetensors":
                os._exit(9)
            return copy(path, *args)  # type: ignore[arg-type]

        zoo.filling.copy.copy_file = copying  # type: ignore[assignment]
        (source / "facts.json").write_text("{}")
        add([str(source)], target, quiet=True)

    assert fork(die) == [9]
    assert {p.name for p in (target / "models").glob(".a-*/*")} >= {"config.json", "facts.json"}
    (source / "facts.json").unlink()
    data = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(data | {"rope_theta": 10001.0}))
    add([str(source)], target, quiet=True)
    add([str(source)], tmp_path / "whole", quiet=True)
    assert tree(target) == tree(tmp_path / "whole")


def test_the_real_checkpoints(tmp_path: Path, shared_data: Path) -> None:
    """Every folder of the shared data: added, listed, verified; then one bit of each is turned and found."""
    sources = [str(p.parent) for p in sorted((shared_data / "models").glob("**/config.json"))]
    with pytest.raises(UserError, match="give the folders inside it"):
        add([str(shared_data / "models" / "arthur")], tmp_path / "zoo")
    done = add(sources, tmp_path / "zoo", quiet=True)
    zoo = Zoo.open(tmp_path / "zoo")
    assert len(zoo.donors) == len(sources) == len({d["name"] for d in done})
    listed = {d["name"]: d for d in list_donors(zoo.path)}
    assert listed["stories260K"]["parameters"] == 260032 and listed["stories260K"]["architecture"] == "llama"
    assert listed["run0-ep025"]["roles"]["attn.qkv"] == 8  # weights and biases
    assert not any("other" in d["roles"] for d in listed.values())
    assert verify(tmp_path / "zoo") == []
    rng, rows = np.random.default_rng(0), read_manifest(zoo.path).to_pylist()
    broken = set()
    for donor in zoo.donors:
        row = rng.choice([r for r in rows if r["model"] == donor.name])
        place = row["offset"] + int(rng.integers(row["nbytes"]))
        path = donor.folder / row["file"]
        data = bytearray(path.read_bytes())
        data[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(data)
        broken.add((donor.name, row["tensor"]))
    problems = verify(tmp_path / "zoo")
    assert len(problems) == len(sources)
    assert all(any(p.startswith(f"{name}: ") and repr(tensor) in p for p in problems) for name, tensor in broken)


def test_the_health_of_what_is_added(
    tmp_path: Path, tiny_llama: Make, shared_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A warning for an untrained donor, none for a trained one; both are added and each is checked once."""
    sources = [str(tiny_llama(tmp_path / "fresh")), str(shared_data / "models" / "stories260K")]
    assert [d["health"] for d in add(sources, tmp_path / "plan", plan=True)] == [None, None]
    capsys.readouterr()
    assert [d["health"] for d in add(sources, tmp_path / "zoo")] == ["untrained", "fine"]
    lines = [line for line in capsys.readouterr().err.splitlines() if line and "%|" not in line]
    assert len(lines) == 1 and lines[0].startswith("fresh: never trained: all 15 matrices")
    assert [(d["state"], d["health"]) for d in add(sources, tmp_path / "zoo")] == [("present", None)] * 2
    assert "never trained" not in capsys.readouterr().err
    add(sources[:1], tmp_path / "quiet", quiet=True)
    assert capsys.readouterr().err == ""


def test_a_donor_that_is_not_examined_is_the_same(tmp_path: Path, tiny_llama: Make) -> None:
    source = str(tiny_llama(tmp_path / "donor"))
    (examined,) = add([source], tmp_path / "examined", quiet=True)
    (added,) = add([source], tmp_path / "added", quiet=True, health=False)
    assert examined["health"] == "untrained" and added["health"] == "not checked"
    assert {**examined, "health": None} == {**added, "health": None}
    assert tree(tmp_path / "examined") == tree(tmp_path / "added")


def test_nan_is_refused_without_an_examination_too(tmp_path: Path, tiny_llama: Make) -> None:
    source = tiny_llama(tmp_path / "donor")
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="holds NaN or infinity"):
        add([str(source)], tmp_path / "zoo", quiet=True, health=False)
