"""Merging: the same bytes as one `zoo add`, names that collide, links and copies, interruptions, refusals."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import zoo.filling.merge
from tests.support.commands import invoke
from tests.support.gguf_files import write_gguf
from tests.zoo.test_add import fork, stamps, tree
from zoo.add import add
from zoo.donors.manifest import read_manifest
from zoo.donors.verify import stray_files, verify
from zoo.donors.zoo import Zoo
from zoo.errors import UserError
from zoo.filling.merge import merge

Make = Callable[..., Path]


@pytest.fixture
def apart(tmp_path: Path, tiny_llama: Make) -> tuple[list[str], list[Path]]:
    """(the sources, the zoos `one` and `two` that were filled with two of them each)."""
    sources = [str(tiny_llama(tmp_path / "src" / f"m{i}", seed=i)) for i in range(4)]
    zoos = [tmp_path / "one", tmp_path / "two"]
    for zoo_folder, own in zip(zoos, (sources[:2], sources[2:]), strict=True):
        add(own, zoo_folder, quiet=True)
    return sources, zoos


def no_links(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise OSError(errno.EXDEV, "another disk")

    monkeypatch.setattr(zoo.filling.merge.os, "link", refuse)


@pytest.fixture(params=[True, False])
def links(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the disk allows hard links."""
    if not request.param:
        no_links(monkeypatch)
    return request.param


def test_zoos_filled_apart_become_the_zoo_of_one_add(
    tmp_path: Path, apart: tuple[list[str], list[Path]], monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    sources, zoos = apart
    add(sources, tmp_path / "whole", quiet=True)
    before = [stamps(folder) for folder in zoos]
    done = merge(zoos, tmp_path / "zoo", quiet=True)
    assert tree(tmp_path / "zoo") == tree(tmp_path / "whole")  # manifest.parquet and index.json too
    assert before == [stamps(folder) for folder in zoos]
    assert [d["name"] for d in done] == ["m0", "m1", "m2", "m3"] and {d["state"] for d in done} == {"added"}
    weights = [folder / "models" / "m0" / "model.safetensors" for folder in (zoos[0], tmp_path / "zoo")]
    assert os.path.samefile(*weights) == links
    size = sum(p.stat().st_size for p in Path(sources[0]).iterdir())
    assert [done[0][key] for key in ("files", "read", "write")] == (
        ["linked", 0, 0] if links else ["copied", size, size]
    )
    assert not os.path.samefile(*(p.with_name("donor.json") for p in weights))  # it may be written again
    content, times = tree(tmp_path / "zoo"), stamps(tmp_path / "zoo")
    assert {d["state"] for d in merge(zoos[::-1], tmp_path / "zoo", quiet=True)} == {"present"}
    assert (content, times) == (tree(tmp_path / "zoo"), stamps(tmp_path / "zoo"))
    assert verify(tmp_path / "zoo") == [] and stray_files(tmp_path / "zoo") == []


def test_two_machines_that_share_one_folder_fill_it_as_one(tmp_path: Path, tiny_llama: Make) -> None:
    sources = [str(tiny_llama(tmp_path / f"m{i}", seed=i)) for i in range(3)]
    add(sources, tmp_path / "alone", quiet=True)
    shards = [lambda i=i: add(sources, tmp_path / "zoo", shard=(i, 2), quiet=True) for i in range(2)]
    assert fork(*shards) == [0, 0]
    assert tree(tmp_path / "zoo") == tree(tmp_path / "alone")


def test_a_name_that_is_taken_and_a_content_that_is_there(
    tmp_path: Path, tiny_llama: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two, third = (tiny_llama(tmp_path / n / "run0", seed=i) for i, n in enumerate("xyz"))
    shutil.copytree(one, tmp_path / "copy")
    for name, sources in (("a", [one]), ("b", [two, tmp_path / "copy"]), ("c", [third])):
        add([str(source) for source in sources], tmp_path / name, quiet=True)
    zoos = [tmp_path / "a", tmp_path / "b", tmp_path / "c"]
    planned = merge(zoos, tmp_path / "zoo", plan=True, quiet=True)
    assert not (tmp_path / "zoo").exists()
    capsys.readouterr()
    done = merge(zoos, tmp_path / "zoo")
    assert [d["name"] for d in done] == [d["name"] for d in planned] == ["run0", "run0", "y--run0", "z--run0"]
    assert [d["state"] for d in done] == ["added", "present", "added", "added"]
    assert [d["state"] for d in planned] == ["new", "present", "new", "new"]
    homes = [tmp_path / z / "models" / n for z, n in (("b", "copy"), ("b", "run0"), ("c", "run0"))]
    assert capsys.readouterr().err.splitlines() == [
        f"{homes[0]}: is the donor run0 already",
        f"{homes[1]}: is called y--run0, because its name is taken",
        f"{homes[2]}: is called z--run0, because its name is taken",
    ]
    add([str(one), str(two), str(third)], tmp_path / "whole", quiet=True)
    assert tree(tmp_path / "zoo") == tree(tmp_path / "whole") and verify(tmp_path / "zoo") == []


def test_names_without_a_path_get_a_number(tmp_path: Path, tiny_llama: Make) -> None:
    """As those of donors that `zoo train` made, whose record has no path."""
    for seed, name in enumerate("abc"):
        source = tiny_llama(tmp_path / name / "run", seed=seed)
        add([str(source)], tmp_path / f"zoo-{name}", quiet=True, origin="headstart zoo train")
    done = merge([tmp_path / f"zoo-{name}" for name in "abc"], tmp_path / "zoo", quiet=True)
    assert [d["name"] for d in done] == ["run", "run-2", "run-3"] and verify(tmp_path / "zoo") == []
    assert [d.source for d in Zoo.open(tmp_path / "zoo").donors] == ["headstart zoo train"] * 3


def test_a_zoo_without_the_column_of_gguf_files_joins_one_with_it(tmp_path: Path, tiny_llama: Make) -> None:
    plain = str(tiny_llama(tmp_path / "plain"))
    file = str(write_gguf(tmp_path / "small.gguf", "llama"))
    add([plain], tmp_path / "old", quiet=True)
    add([file], tmp_path / "new", quiet=True)
    add([plain, file], tmp_path / "whole", quiet=True)
    merge([tmp_path / "old", tmp_path / "new"], tmp_path / "zoo", quiet=True)
    assert tree(tmp_path / "zoo") == tree(tmp_path / "whole")
    rows = read_manifest(tmp_path / "zoo").to_pylist()
    assert {row["model"]: row["gguf_type"] is None for row in rows} == {"plain": True, "small": False}


def test_an_interrupted_merge_continues(
    tmp_path: Path, apart: tuple[list[str], list[Path]], monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    sources, zoos = apart
    add(sources, tmp_path / "whole", quiet=True)
    step = "_link" if links else "_copy"
    work = getattr(zoo.filling.merge, step)

    def die() -> None:
        done = 0

        def failing(*args: object) -> object:
            nonlocal done
            done += 1
            if done == 3:
                os._exit(9)
            return work(*args)

        setattr(zoo.filling.merge, step, failing)
        merge(zoos, tmp_path / "zoo", quiet=True)

    assert fork(die) == [9]
    kept = {p.name: p.stat().st_ino for p in (tmp_path / "zoo" / "models").glob(".m0-*/*")}
    assert len(kept) == 2
    merge(zoos, tmp_path / "zoo", quiet=True)
    assert {name: (tmp_path / "zoo" / "models" / "m0" / name).stat().st_ino for name in kept} == kept
    assert tree(tmp_path / "zoo") == tree(tmp_path / "whole") and stray_files(tmp_path / "zoo") == []


@pytest.mark.parametrize("harm", ["no zoo", "missing", "short", "rows", "bytes", "inside", "holds", "itself", "file"])
def test_what_cannot_be_merged_is_one_line_and_leaves_nothing(
    tmp_path: Path, apart: tuple[list[str], list[Path]], monkeypatch: pytest.MonkeyPatch, harm: str
) -> None:
    _, (one, two) = apart
    weights, out = two / "models" / "m3" / "model.safetensors", tmp_path / "zoo"
    expected = f"{weights}: is missing, or is not as it was when the donor was added; run `headstart zoo verify --zoo"
    if harm == "no zoo":
        two, expected = tmp_path / "src", f"{tmp_path / 'src'}: is not a zoo (no manifest.parquet)"
    elif harm == "missing":
        weights.unlink()
    elif harm == "short":
        os.truncate(weights, 100)
    elif harm == "rows":
        (weights.parent / "tensors.parquet").write_bytes(b"x")
        expected = f"{weights.parent / 'tensors.parquet'}: is missing, or is not as it was"
    elif harm == "bytes":
        no_links(monkeypatch)
        data = weights.read_bytes()
        weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        expected = f"{weights}: has changed since the donor was added; run `headstart zoo verify` on its zoo"
    elif harm == "inside":
        out = two / "models" / "merged"
        expected = f"{out}: lies inside {two}, which is merged into it; give a folder outside of it"
    elif harm == "holds":
        shutil.move(two, out / "models" / "two")
        two = out / "models" / "two"
        expected = f"{two}: lies inside {out}, where its donors go; give a folder outside of it"
    elif harm == "itself":
        out, expected = two, f"{two}: is the zoo that --zoo names; leave it out, its donors stay"
    elif harm == "file":
        out.write_text("x")
        expected = f"{out}: is a file; give a folder for the merged zoo"
    before = tree(tmp_path)
    with pytest.raises(UserError) as caught:
        merge([one, two], out, quiet=True)
    assert str(caught.value).startswith(expected) and "\n" not in str(caught.value)
    if harm == "bytes":  # which is noticed when it is copied: what came before it stays
        assert [d.name for d in Zoo.open(out).donors] == ["m0", "m1", "m2"]
        assert verify(out) == [] and stray_files(out) == []
        return
    assert tree(tmp_path) == before


def test_the_command(tmp_path: Path, apart: tuple[list[str], list[Path]]) -> None:
    _, zoos = apart
    words = ["zoo", "merge", *map(str, zoos), "--zoo", str(tmp_path / "zoo")]
    planned = invoke(*words, "--plan", "--json")
    assert planned.exit_code == 0 and not (tmp_path / "zoo").exists()
    done = invoke(*words, "--json", "--quiet")
    assert done.exit_code == 0 and done.stderr == ""
    rows = json.loads(done.stdout)
    assert [{**row, "state": "new"} for row in rows] == json.loads(planned.stdout)
    assert list(rows[0]) == ["source", "name", "revision", "license", "state", "tensors", "files", "read", "write"]
    again = invoke(*words)
    assert again.exit_code == 0 and again.stdout.splitlines()[0].split()[:3] == ["name", "state", "files"]
    refused = invoke("zoo", "merge", tmp_path / "no", "--zoo", tmp_path / "zoo")
    assert refused.exit_code == 2 and refused.stderr.startswith(f"headstart: {tmp_path / 'no'}: is not a zoo")
