"""A hub that lies, on the loopback interface.

Every command accepts the answer or refuses it in one line, writes nothing outside the cache and the given folders, and
ends in time, with little work and memory."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import make_llama
from tests.support.hub_lies import LIES, VICTIM, endless_body, next_page, redirect, with_status
from tests.support.hub_server import Answer, Handler, Hub, Lie, Repo, files_of, serve
from tests.support.json_worker import json_worker

KINDS = ("info", "info", "tree", "head config.json", "get config.json", "head model.safetensors", "*")
VALUES = ("", "0", "-1", "9" * 25, VICTIM, "/tmp/headstart-victim", "a\tb", "W/", '"', "\xb2", "x" * 3000)
HEADERS = (
    "ETag", "X-Linked-Etag", "X-Linked-Size", "X-Repo-Commit", "Location", "Link", "Content-Range", "Content-Encoding",
    "Retry-After", "X-Error-Code", "X-Error-Message", "X-HF-Warning", "X-Xet-Hash", "Set-Cookie", "Content-Type",
)  # fmt: skip
STRANGE = (None, True, 0, -1, 2**63, 1e300, "", VICTIM, "a\x00b", "\ud800", [], {}, [None], {"": 0}, "x" * 2000)
TIMEOUT, PATIENCE = 0.4, 20.0  # seconds of --timeout where a hub stalls, and where a loaded machine must not
MUTATIONS = int(os.environ.get("HEADSTART_FUZZ_HUB", "40"))
TOKEN = "hf_secret_of_the_user"

# Runs a command for each line of JSON on stdin: {"error", "kind", "cpu", "peak"}; error is null if it is accepted.
WORKER = """
import contextlib, io, json, resource, sys, time, traceback
from headstart.commands import Invocation, run_config
from headstart.config import config_of
from zoo.checkpoints.hub import hub_session
from zoo.targets.blueprint import Blueprint
import zoo.add, headstart.generate.generate, headstart.lora.lora, headstart.samplers

sleep = time.sleep
time.sleep = lambda seconds: sleep(min(seconds, 0.02))  # between retries

def run(timeout, blueprint=None, **record):
    if record:
        run_config(config_of(record), Invocation(quiet=True, timeout=timeout))
    else:
        with hub_session(timeout):
            Blueprint.from_config(blueprint)

def peak():
    if sys.platform == "linux":  # ru_maxrss would count what the parent had when it started this process
        with open("/proc/self/status") as status:
            return int(status.read().split("VmHWM:")[1].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

for line in sys.stdin:
    before, error, kind = time.process_time(), None, None
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        try:
            run(**json.loads(line))
        except BaseException as found:
            error, kind = str(found), type(found).__name__
            if kind not in ("UserError", "BadAnswer"):
                error = traceback.format_exc()
    answer = {"error": error, "kind": kind, "cpu": time.process_time() - before, "peak": peak()}
    print(json.dumps(answer), flush=True)
"""

Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with serve() as running:
        yield running


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with HF_HOME, the folders that commands write, and files of the user at every level of it."""
    place = tmp_path_factory.mktemp("user")
    for folder in (place, place / "home", place / "out"):
        folder.mkdir(exist_ok=True)
        (folder / "victim.txt").write_text("the user's own")
    return place


@pytest.fixture(scope="module")
def run(hub: Hub, place: Path) -> Iterator[Run]:
    hub_settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(place / "home"), "HF_TOKEN": TOKEN}
    with json_worker(WORKER, place, **hub_settings) as ask:
        yield lambda **command: ask({"timeout": PATIENCE, **command})


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    sizes = {"vocab_size": 32, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    return files_of(make_llama(tmp_path_factory.mktemp("llama"), **sizes, num_attention_heads=2, num_key_value_heads=1))


def command(name: str, repo: str, place: Path) -> dict[str, Any]:
    out = str(place / "out" / f"{repo.replace('/', '-')}-{name}")
    commands: dict[str, dict[str, Any]] = {
        "config": {"blueprint": repo},
        "add": {"subcommand": "zoo add", "sources": [repo], "zoo": out},
        "generate": {"subcommand": "generate", "target": repo, "donor": repo, "method": "normal", "out": out},
        "lora": {"subcommand": "lora", "base": repo, "method": "gaussian", "rank": 2, "out": out},
    }
    return commands[name]


def outside(place: Path) -> dict[str, str]:
    """Hashes of all files beside the cache and the folders that commands write."""
    ours = (place / "home" / "hub", place / "out")
    found = {}
    for path in sorted(place.rglob("*")):
        if path.is_file() and (path.name == "victim.txt" or not any(path.is_relative_to(folder) for folder in ours)):
            found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def check(answer: dict[str, Any]) -> None:
    """A verdict: accepted, or refused in one line; in little time and memory."""
    if answer["error"] is not None:
        assert answer["kind"] in ("UserError", "BadAnswer"), answer["error"]
        assert answer["error"].isprintable() and 0 < len(answer["error"]) <= 400, answer
    assert answer["cpu"] < 15 and answer["peak"] < 1 << 30, answer


def commands_for(kind: str) -> tuple[str, ...]:
    """The commands that make such a request, the first of which a slow lie is tried on."""
    if kind == "head model.safetensors":
        return ("add", "generate")
    if kind == "info":
        return ("add", "generate", "lora")
    return ("add",) if kind == "tree" else ("config", "add", "generate", "lora")


@pytest.mark.parametrize("name", LIES)
def test_a_lie_is_refused_in_one_line(hub: Hub, run: Run, place: Path, files: dict[str, bytes], name: str) -> None:
    kinds, lie, word = LIES[name]
    slow = word is not None and "no progress" in word
    before = outside(place)
    for kind in kinds:
        for tried in commands_for(kind)[: 1 if slow else None]:
            repo = f"lies/{name}-{kind.replace(' ', '-').replace('*', 'all')}-{tried}"
            hub.repos[repo] = Repo(files, lies={kind: lie})
            answer = run(**command(tried, repo, place), timeout=TIMEOUT if slow else PATIENCE)
            check(answer)
            assert (answer["error"] is None) == (word is None), (kind, tried, answer)
            assert word is None or (re.search(word, answer["error"]) and repo in answer["error"]), (kind, tried, answer)
            assert outside(place) == before
            if word is not None and tried != "config":
                assert not any((place / "out").glob(f"*{repo.partition('/')[2]}*"))


def test_an_honest_hub_is_believed(hub: Hub, run: Run, place: Path, files: dict[str, bytes]) -> None:
    for tried in ("config", "add", "generate", "lora"):
        repo = f"org/honest-{tried}"
        hub.repos[repo] = Repo(files, redirect=True)
        answer = run(**command(tried, repo, place))
        check(answer)
        assert answer["error"] is None, answer
    stored = place / "out" / "org-honest-add-add" / "models" / "org--honest-add"
    assert (stored / "model.safetensors").read_bytes() == files["model.safetensors"]


def test_the_token_goes_to_the_hub_alone(hub: Hub, run: Run, place: Path, files: dict[str, bytes]) -> None:
    def other(handler: Handler) -> str:
        return f"{handler.hub.cdn}{handler.path}"

    hub.repos["org/cdn"] = Repo(files, redirect=True)

    def away(handler: Handler, answer: Answer) -> Answer | None:
        return redirect(other)(handler, answer) if handler.headers["Host"].startswith("127.0.0.1") else answer

    hub.repos["org/leads-away"] = Repo(files, lies={"info": away})
    hub.repos["org/pages-away"] = Repo(files, lies={"tree": next_page(other)})
    hub.repos["org/xet"] = Repo(
        files,
        lies={
            "head model.safetensors": lambda handler, answer: Answer(
                answer.status,
                {
                    **answer.headers,
                    "X-Xet-Hash": "0" * 64,
                    "Link": f'<{handler.hub.cdn}/token>; rel="xet-auth"',
                },
                answer.body,
            )
        },
    )
    del hub.log[:], hub.tokens[:]
    refused = {repo: run(**command("add", repo, place))["error"] is not None for repo in list(hub.repos)[-4:]}
    assert refused == {"org/cdn": False, "org/leads-away": False, "org/pages-away": True, "org/xet": False}
    hosts = {host for host, token in hub.tokens if TOKEN in token}
    assert hosts == {hub.url.removeprefix("http://")}
    assert "GET /cdn/org/cdn/model.safetensors" in hub.log  # on the other host, without a token
    assert "GET /token" not in hub.log


def test_a_missing_file_is_named_with_its_commit(hub: Hub, run: Run, place: Path, files: dict[str, bytes]) -> None:

    repo = hub.repos["org/lost"] = Repo(
        files, lies={"head model.safetensors": with_status(404, X_Error_Code="EntryNotFound")}
    )
    error = run(**command("add", "org/lost", place))["error"]
    assert f"no file 'model.safetensors' at revision {repo.commit}" in error and "org/lost" in error


def test_a_revision_that_climbs_is_refused(hub: Hub, run: Run, place: Path, files: dict[str, bytes]) -> None:
    hub.repos["org/climbs"] = Repo(files, branches={"../../../../victim.txt": "…", "/tmp/headstart-victim": "…"})
    before = outside(place)
    for revision in hub.repos["org/climbs"].branches:
        answer = run(**command("add", "org/climbs", place), revision=revision)
        check(answer)
        assert "is not the name of a branch" in answer["error"]
    assert outside(place) == before and not Path("/tmp/headstart-victim").exists()


def test_a_body_larger_than_its_file_ends_early(hub: Hub, run: Run, place: Path, files: dict[str, bytes]) -> None:
    """The HEAD request states a few hundred bytes, and the body goes on for gigabytes."""

    hub.repos["org/grows"] = Repo(files, lies={"get model.safetensors": endless_body(chunked=True)})
    answer = run(**command("add", "org/grows", place))
    check(answer)
    assert f"more than {len(files['model.safetensors'])} bytes" in answer["error"]
    cached = [p for p in (place / "home" / "hub" / "models--org--grows").rglob("*") if p.is_file()]
    assert all(p.stat().st_size < 100_000 for p in cached)


def test_a_slow_hub_that_makes_progress_is_waited_for(hub: Hub, run: Run, place: Path, files: dict[str, bytes]) -> None:
    """Each answer takes most of the timeout, all together several times as long."""

    def slow(handler: Handler, answer: Answer) -> Answer:
        handler.hub.closing.wait(TIMEOUT * 0.5)
        return answer

    hub.repos["org/slow"] = Repo(files, lies={"*": slow})
    assert run(**command("add", "org/slow", place), timeout=TIMEOUT)["error"] is None


def mutated(rng: random.Random) -> Lie:
    """A random change of the headers or the JSON of an answer."""
    changes = [(rng.choice(HEADERS), rng.choice(VALUES)) for _ in range(rng.choice((1, 1, 2, 4)))]
    status = rng.choice((None, None, None, 200, 204, 206, 301, 302, 304, 307, 400, 401, 404, 416, 418, 451, 501))
    seed, edits = rng.random(), rng.choice((0, 1, 1, 2, 3))
    as_bytes = rng.random() < 0.3

    def lie(handler: Handler, answer: Answer) -> Answer:
        inner = random.Random(seed)
        headers, body = dict(answer.headers), answer.body
        if edits and body:
            body = flipped(inner, body) if as_bytes or not body.startswith((b"{", b"[")) else edited(inner, body, edits)
            headers["Content-Length"] = str(len(body))
        if not edits or inner.random() < 0.3:
            headers |= dict(changes)
        return Answer(answer.status if status is None or inner.random() < 0.5 else status, headers, body)

    return lie


def flipped(rng: random.Random, body: bytes) -> bytes:
    at = rng.randrange(len(body))
    return body[:at] + bytes([body[at] ^ (1 << rng.randrange(8))]) + body[at + rng.choice((1, 1, 1, 0, 50)) :]


def edited(rng: random.Random, body: bytes, edits: int) -> bytes:
    """The JSON with some of its nodes replaced, removed or repeated."""
    root = {"root": json.loads(body)}
    for _ in range(edits):
        holder: Any = root
        key: Any = "root"
        while isinstance(holder[key], dict | list) and holder[key] and rng.random() < 0.85:
            holder = holder[key]
            key = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        action = rng.random()
        if action < 0.6:
            holder[key] = copy.deepcopy(rng.choice(STRANGE))
        elif action < 0.8 and holder is not root:
            del holder[key]
        else:
            holder[key] = [holder[key]] * 3
    return json.dumps(root["root"]).encode()


def test_random_lies(hub: Hub, run: Run, place: Path, files: dict[str, bytes]) -> None:
    """HEADSTART_FUZZ_HUB sets how many, HEADSTART_FUZZ_SEED the seed."""
    seed = int(os.environ.get("HEADSTART_FUZZ_SEED", "0"))
    before, refused = outside(place), 0
    for number in range(MUTATIONS):
        rng = random.Random(seed * 1_000_003 + number)
        kind = rng.choice(KINDS)
        tried = rng.choice(commands_for(kind))
        repo = f"random/{seed}-{number}"
        hub.repos[repo] = Repo(files, lies={kind: mutated(rng)})
        answer = run(**command(tried, repo, place), timeout=TIMEOUT / 2)
        try:
            check(answer)
            assert outside(place) == before
        except AssertionError as error:
            raise AssertionError(f"seed {seed}, number {number}, {tried}, {kind}: {error}") from error
        refused += answer["error"] is not None
    assert 0.2 * MUTATIONS < refused < MUTATIONS
