"""The hub path against a real HTTP server on the loopback interface."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from tests.conftest import make_llama
from tests.support.gguf_files import write_gguf
from tests.support.hub_server import Hub, Repo, files_of, serve, use_hub
from zoo.add import add
from zoo.donors.verify import verify
from zoo.donors.zoo import Zoo

Add = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with serve() as running:
        yield running


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hf-home")


def adding(hub: Hub, home: Path, offline: bool) -> Add:
    """A function that calls `add` and returns {"ok": …} or {"error": …, "kind": …}."""

    def ask(*sources: str, zoo: Path, **options: Any) -> dict[str, Any]:
        with pytest.MonkeyPatch.context() as patch:
            use_hub(patch, hub.url, home)
            patch.setattr(constants, "HF_HUB_OFFLINE", offline)
            patch.setattr("zoo.checkpoints.hub.WAITS", (0.05, 0.05, 0.05))
            try:
                return {"ok": json.loads(json.dumps(add(list(sources), zoo, quiet=True, **options)))}
            except Exception as error:
                return {"error": str(error), "kind": type(error).__name__}

    return ask


@pytest.fixture(scope="module")
def online(hub: Hub, home: Path) -> Add:
    return adding(hub, home, offline=False)


@pytest.fixture(scope="module")
def offline(hub: Hub, home: Path) -> Add:
    return adding(hub, home, offline=True)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """One safetensors file, with other files of a repository that must not be fetched."""
    files = files_of(make_llama(tmp_path_factory.mktemp("llama")))
    return files | {"README.md": b"# hello", "pytorch_model.bin": b"pickle", "onnx/model.onnx": b"x", "train.py": b""}


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    files = files_of(make_llama(tmp_path_factory.mktemp("sharded"), seed=1, max_shard_size="40KB"))
    assert sum(name.endswith(".safetensors") for name in files) > 2
    return files | {"consolidated.safetensors": b"not to be fetched"}


def bodies(hub: Hub, repo: str) -> list[str]:
    return [line.rpartition("/")[2] for line in hub.log if line.startswith(f"GET /{repo}/resolve/")]


def test_add_pins_the_commit_and_fetches_nothing_but_safetensors_and_json(
    hub: Hub, online: Add, llama: dict[str, bytes], tmp_path: Path
) -> None:
    repo = hub.repos["org/normal"] = Repo(llama)
    assert online("org/normal", zoo=tmp_path)["ok"][0]["state"] == "added"
    donor = Zoo.open(tmp_path).donor("org--normal")
    assert (donor.revision, donor.license) == (repo.commit, "mit")
    assert donor.files == ("config.json", "generation_config.json", "model.safetensors")
    assert sorted(bodies(hub, "org/normal")) == sorted(donor.files)
    assert all((donor.folder / f).read_bytes() == llama[f] for f in donor.files)
    assert verify(tmp_path) == []


def test_adding_again_asks_for_the_commit_and_downloads_nothing(
    hub: Hub, online: Add, llama: dict[str, bytes], tmp_path: Path
) -> None:
    hub.repos["org/again"] = Repo(llama)
    online("org/again", zoo=tmp_path)
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in tmp_path.rglob("*") if p.is_file()}
    asked = len(hub.log)
    answer = online("org/again", zoo=tmp_path)["ok"][0]
    assert (answer["state"], answer["write"]) == ("present", 0)
    assert [line.split("?")[0] for line in hub.log[asked:]] == ["GET /api/models/org/again"]
    assert before == {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in tmp_path.rglob("*") if p.is_file()}


def test_a_branch_and_a_new_commit_are_donors_of_their_own(
    hub: Hub, online: Add, llama: dict[str, bytes], sharded: dict[str, bytes], tmp_path: Path
) -> None:
    first = hub.repos["org/moving"] = Repo(llama)
    online("org/moving", zoo=tmp_path)
    second = hub.repos["org/moving"] = Repo(sharded, branches={"step/1": "…"})
    answer = online("org/moving@step/1", zoo=tmp_path)["ok"][0]
    assert (answer["name"], answer["revision"]) == (f"org--moving@{second.commit[:8]}", second.commit)
    assert {d.revision for d in Zoo.open(tmp_path).donors} == {first.commit, second.commit}


def test_the_files_of_the_index_are_fetched_and_no_others(
    hub: Hub, online: Add, sharded: dict[str, bytes], tmp_path: Path
) -> None:
    hub.repos["org/sharded"] = Repo(sharded)
    online("org/sharded", zoo=tmp_path)
    files = Zoo.open(tmp_path).donor("org--sharded").files
    assert set(files) == sharded.keys() - {"consolidated.safetensors"}
    assert "consolidated.safetensors" not in bodies(hub, "org/sharded")


def test_a_gguf_file_of_a_repository_is_fetched_alone_and_known_by_its_commit(
    hub: Hub, online: Add, offline: Add, tmp_path: Path
) -> None:
    file = write_gguf(tmp_path / "tiny-Q4.gguf", "llama").read_bytes()
    write_gguf(tmp_path / "half.gguf", "llama", split=12)
    parts = {f"split/{p.name}": p.read_bytes() for p in sorted(tmp_path.glob("half-*"))}
    repo = hub.repos["org/gguf"] = Repo({"tiny-Q4.gguf": file, "tiny-Q8.gguf": b"GGUF", **parts})
    address = "org/gguf:tiny-Q4.gguf"
    plan = online(address, zoo=tmp_path / "zoo", plan=True)["ok"][0]
    assert (plan["state"], plan["download"], plan["tensors"]) == ("new", len(file), None)
    assert not bodies(hub, "org/gguf")
    done = online(address, zoo=tmp_path / "zoo")["ok"][0]
    assert (done["name"], done["revision"], done["license"]) == ("org--gguf--tiny-Q4", repo.commit, "mit")
    assert done["source"] == f"org/gguf@{repo.commit}:tiny-Q4.gguf" and bodies(hub, "org/gguf") == ["tiny-Q4.gguf"]
    asked = len(hub.log)
    assert online(address, zoo=tmp_path / "zoo")["ok"][0]["state"] == "present"
    assert [line.split("?")[0] for line in hub.log[asked:]] == ["GET /api/models/org/gguf"]
    assert offline(address, zoo=tmp_path / "zoo")["ok"][0]["state"] == "present"
    first = next(iter(parts))
    split = online(f"org/gguf@{repo.commit}:{first}", zoo=tmp_path / "zoo")["ok"][0]
    assert (split["name"], split["state"]) == ("org--gguf--half", "added")
    donors = [Zoo.open(tmp_path / "zoo").donor(name) for name in ("org--gguf--tiny-Q4", "org--gguf--half")]
    assert all(donors[0].read(n).equal(donors[1].read(n)) for n in donors[0].names) and not verify(tmp_path / "zoo")
    unknown = online("org/gguf:tiny-Q5.gguf", zoo=tmp_path / "zoo")
    assert "unknown file 'tiny-Q5.gguf': did you mean" in unknown["error"]
    hub.repos["org/part"] = Repo(dict([*parts.items()][:-1]))
    lost = online(f"org/part:{first}", zoo=tmp_path / "zoo")
    assert f"is split into {len(parts)} parts, of which the repository lacks {[*parts][-1]!r}" in lost["error"]


def test_a_damaged_gguf_download_is_fetched_again(hub: Hub, online: Add, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "a.gguf", "qwen2").read_bytes()
    hub.repos["org/corrupt-gguf"] = Repo({"a.gguf": file}, faults={"get a.gguf": ["corrupt"]})
    assert online("org/corrupt-gguf:a.gguf", zoo=tmp_path / "zoo")["ok"][0]["state"] == "added"
    assert bodies(hub, "org/corrupt-gguf") == ["a.gguf", "a.gguf"]


def test_plan_counts_without_downloading(
    hub: Hub, online: Add, llama: dict[str, bytes], sharded: dict[str, bytes], tmp_path: Path
) -> None:
    hub.repos["org/plan"], hub.repos["org/plans"] = Repo(llama), Repo(sharded)
    whole, parts = online("org/plan", "org/plans", zoo=tmp_path / "zoo", plan=True)["ok"]
    size = sum(len(llama[n]) for n in ("config.json", "generation_config.json", "model.safetensors"))
    assert (whole["download"], whole["write"], whole["tensors"], whole["state"]) == (size, size, 20, "new")
    assert parts["tensors"] == 20
    assert parts["write"] == sum(len(d) for n, d in sharded.items() if n != "consolidated.safetensors")
    assert not any(b.endswith(".safetensors") for b in bodies(hub, "org/plans"))
    assert not (tmp_path / "zoo").exists()


def test_a_redirect_to_another_place_is_followed(
    hub: Hub, online: Add, llama: dict[str, bytes], tmp_path: Path
) -> None:
    hub.repos["org/cdn"] = Repo(llama, redirect=True)
    assert "ok" in online("org/cdn", zoo=tmp_path)
    assert "GET /cdn/org/cdn/model.safetensors" in hub.log
    assert verify(tmp_path) == []


@pytest.mark.parametrize(
    "faults",
    [
        {"info": ["429", "503"]},
        {"info": ["drop"]},
        {"tree": ["429"]},
        {"get model.safetensors": ["429"]},
        {"get model.safetensors": ["503", "502"]},
        {"head model.safetensors": ["503"]},
        {"get model.safetensors": ["truncate"]},
        {"get model.safetensors": ["short"]},
        {"get model.safetensors": ["corrupt"]},
        {"get config.json": ["corrupt"]},
    ],
    ids=lambda faults: "-".join(f"{k}-{'-'.join(v)}" for k, v in faults.items()).replace(" ", "-"),
)
def test_temporary_faults_are_retried(
    hub: Hub, online: Add, llama: dict[str, bytes], tmp_path: Path, faults: dict[str, list[str]]
) -> None:
    name = "org/" + "-".join(f"{k} {'-'.join(v)}" for k, v in faults.items()).replace(" ", "-")
    repo = hub.repos[name] = Repo(llama, faults={k: list(v) for k, v in faults.items()})
    assert "ok" in online(name, zoo=tmp_path)
    assert not any(repo.faults.values())  # each was met
    assert verify(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "repo", "words"),
    [
        ("org/nowhere", None, "no such model"),
        ("org/gated", Repo({}, gated=True), "access is restricted"),
        ("org/pickles", Repo({"config.json": b"{}", "pytorch_model.bin": b"\x80"}), "only pickles"),
        ("org/gguf", Repo({"model-Q4.gguf": b"GGUF"}), "zoo add org/gguf:FILE` (model-Q4.gguf)"),
        ("org/bare", Repo({"model.safetensors": b""}), "no config.json"),
        ("org/down", Repo({"config.json": b"{}"}, faults={"info": ["503"] * 9}), "answered 503"),
        ("org/silent", Repo({"config.json": b"{}"}, faults={"info": ["drop"] * 9}), "cannot reach"),
        ("not an id", None, "no such folder"),
    ],
)
def test_user_errors_are_one_line(
    hub: Hub, online: Add, tmp_path: Path, name: str, repo: Repo | None, words: str
) -> None:
    if repo is not None:
        hub.repos[name] = repo
    answer = online(name, zoo=tmp_path / "zoo")
    assert answer["kind"] == "UserError" and words in answer["error"] and "\n" not in answer["error"]
    assert name in answer["error"]
    assert not (tmp_path / "zoo").exists()


def test_an_unknown_revision_is_reported(hub: Hub, online: Add, llama: dict[str, bytes], tmp_path: Path) -> None:
    hub.repos["org/revision"] = Repo(llama)
    assert "no such revision" in online("org/revision", zoo=tmp_path / "zoo", revision="v9")["error"]


def test_a_file_that_always_arrives_damaged_is_refused(
    hub: Hub, online: Add, llama: dict[str, bytes], tmp_path: Path
) -> None:
    hub.repos["org/damaged"] = Repo(llama, faults={"get model.safetensors": ["corrupt"] * 9})
    answer = online("org/damaged", zoo=tmp_path / "zoo")
    assert answer["kind"] == "UserError" and "model.safetensors has sha256" in answer["error"]
    assert not (tmp_path / "zoo").exists()


def test_an_index_that_leads_outside_is_refused_before_anything_is_fetched(
    hub: Hub, online: Add, llama: dict[str, bytes], tmp_path: Path
) -> None:
    index = json.dumps({"weight_map": {"a": "../../../model.safetensors"}}).encode()
    hub.repos["org/outside"] = Repo({"config.json": b"{}", "model.safetensors.index.json": index})
    answer = online("org/outside", zoo=tmp_path)
    assert answer["kind"] == "UserError" and "only files in its own folder" in answer["error"]
    assert bodies(hub, "org/outside") == ["model.safetensors.index.json"]


def test_offline_uses_the_cache_and_nothing_else(
    hub: Hub, online: Add, offline: Add, llama: dict[str, bytes], tmp_path: Path
) -> None:
    repo = hub.repos["org/offline"] = Repo(llama)
    online("org/offline", zoo=tmp_path / "first")
    asked = len(hub.log)
    assert "ok" in offline("org/offline", zoo=tmp_path / "second")
    assert len(hub.log) == asked
    donor = Zoo.open(tmp_path / "second").donor("org--offline")
    assert donor.revision == repo.commit
    assert donor.sha256 == Zoo.open(tmp_path / "first").donor("org--offline").sha256


def test_offline_without_a_cached_copy_says_so(offline: Add, tmp_path: Path) -> None:
    answer = offline("org/never-seen", zoo=tmp_path / "zoo")
    assert answer["kind"] == "UserError" and "HF_HUB_OFFLINE" in answer["error"] and "\n" not in answer["error"]
