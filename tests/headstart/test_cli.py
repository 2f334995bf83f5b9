"""The command line as a user meets it: a subprocess, its exit code, its streams and what it leaves on disk."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer
from tqdm import tqdm

from headstart import samplers
from headstart.cli import main
from headstart.terminal import session
from tests.support.commands import invoke
from tests.support.shaken import CONFIGS, donor

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


def headstart(
    *arguments: object,
    stdout: int | None = None,
    interrupt: Callable[[], bool] | None = None,
    number: int = signal.SIGINT,
) -> Done:
    """The command in a process of its own, forked from this one, because to import transformers takes seconds.

    stdout: a file descriptor instead of what is returned; interrupt: sends the signal `number` once this is true."""
    import transformers.modeling_utils  # noqa: F401

    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if child == 0:
            tqdm.set_lock(threading.RLock())  # tqdm's own lock is shared across fork: an interrupt could leave it held
            os.dup2(stdout or out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
            sys.argv = ["headstart", *map(str, arguments)]
            code: object = 1
            try:
                main()
            except SystemExit as end:
                code = end.code or 0
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code if isinstance(code, int) else 1)
        if interrupt is not None:
            deadline = time.monotonic() + 60
            while not interrupt() and time.monotonic() < deadline:
                time.sleep(0.02)
            os.kill(child, number)
        _, status = os.waitpid(child, 0)
        out.seek(0)
        err.seek(0)
        return Done(os.waitstatus_to_exitcode(status), out.read().decode(), err.read().decode())


@pytest.fixture
def target(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIGS["llama"]))
    return path


def test_help_needs_no_heavy_import() -> None:
    code = (
        "import sys; sys.argv = ['headstart', '--help']; from headstart import cli\n"
        "try: cli.main()\n"
        "except SystemExit as end: assert not end.code\n"
        "heavy = {'torch', 'transformers', 'diffusers', 'numpy', 'pyarrow', 'scipy', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for command in ("demo", "methods", "zoo", "train", "generate", "compare"):
        assert command in done.stdout


@pytest.mark.parametrize(
    "command",
    ["demo", "methods", "zoo add", "zoo merge", "zoo train", "zoo list", "zoo verify", "train autoencoder",
     "train diffusion", "generate", "compare", "analyze", "lora", "evaluate", "run"],
)  # fmt: skip
def test_every_command_has_help_with_an_example(command: str) -> None:
    shown, short = (invoke(*command.split(), option) for option in ("--help", "-h"))
    assert short.stdout == shown.stdout and (command == "run" or "--config" in shown.stdout)
    assert shown.exit_code == 0 and f"Example: headstart {command}" in shown.stdout and "--quiet" in shown.stdout


def test_generate_from_a_zoo_end_to_end(tmp_path: Path, target: Path) -> None:
    donor(tmp_path / "donor", CONFIGS["llama"] | {"hidden_size": 64})
    zoo, out = tmp_path / "zoo", tmp_path / "out"
    assert headstart("zoo", "add", tmp_path / "donor", "--zoo", zoo).returncode == 0
    listed = headstart("zoo", "list", "--zoo", zoo, "--json")
    (row,) = json.loads(listed.stdout)
    assert set(row) == {"name", "revision", "license", "architecture", "parameters", "tensors", "roles"}
    done = headstart("generate", "--target", target, "--method", "weight-selection", "--zoo", zoo, "--out", out)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and "donor donor" in done.stderr
    record = json.loads((out / "headstart.json").read_text())
    assert (
        record["command"] == f"headstart generate --target {target} --method weight-selection --zoo {zoo} --out {out}"
    )
    again = headstart("generate", "--target", target, "--method", "weight-selection", "--zoo", zoo, "--out", out)
    assert again.returncode == 2 and f"headstart: {out}: exists already" in again.stderr
    plan = headstart(
        "generate", "--target", target, "--method", "row-column", "--zoo", zoo, "--out", tmp_path / "p", "--plan"
    )
    assert json.loads(plan.stdout)["read"]["donors"][0]["name"] == "donor" and not (tmp_path / "p").exists()
    assert headstart("zoo", "verify", "--zoo", zoo, "--quiet").stderr == ""
    (zoo / "models" / "stray").mkdir()
    verified = headstart("zoo", "verify", "--zoo", zoo)
    assert verified.returncode == 0 and "stray: is not in the manifest" in verified.stderr and verified.stdout == ""


def test_methods_as_json_and_as_table() -> None:
    done = headstart("methods", "--json")
    assert done.returncode == 0 and {"default", "diffusion"} <= {row["name"] for row in json.loads(done.stdout)}
    table = headstart("methods").stdout
    assert "weight-selection" in table and "2311.18823" in table and "every n-th weight" not in table.split("growth")[1]
    one = headstart("methods", "row-column").stdout
    assert "noise" in one and "0.01" in one and "weight-selection" not in one
    wrong = headstart("methods", "row-colum")
    assert wrong.returncode == 2 and "did you mean 'row-column'" in wrong.stderr


def test_the_version_is_that_of_the_package() -> None:
    import importlib.metadata

    done = headstart("--version")
    assert done.stdout == f"headstart {importlib.metadata.version('headstart')}\n" and done.returncode == 0


@pytest.mark.parametrize("arguments", [
    ["-h"], ["methods"], ["methods", "--json"], ["--version"],
    ["generate", "--target", "c", "--method", "defualt", "--out", "o"],
    ["generate", "--target", "c", "--method", "normal", "--zoo", "nowhere", "--out", "o"],
    ["generate", "--target", "c", "--method", "pissa", "--out", "o"],
    ["lora", "--base", "b", "--method", "normal", "--rank", "4", "--out", "o"],
    ["compare", "--target", "c", "--methods", "normal", "--corpus", "t", "--out", "o", "--lrs", "fast"],
    ["zoo", "list", "--zoo", "nowhere"], ["analyze", "--out", "o"], ["run", "nowhere.yaml"],
])  # fmt: skip
def test_lists_and_refusals_need_no_heavy_import(arguments: list[str], tmp_path: Path) -> None:
    code = (
        f"import sys; sys.argv = ['headstart', *{arguments!r}]; from headstart import cli\n"
        "try: cli.main()\n"
        "except SystemExit as end: assert end.code in (None, 0, 2), end.code\n"
        "heavy = {'torch', 'transformers', 'diffusers', 'numpy', 'pyarrow', 'scipy', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("\n") == (1 if "headstart: " in done.stderr else 0)


def test_what_is_piped_is_not_cut() -> None:
    rows = json.loads(headstart("methods", "--json").stdout)
    table = headstart("methods").stdout
    assert all(row["summary"] in table for row in rows)


@pytest.mark.parametrize(("arguments", "reason"), [
    ("--target {target} --method defualt", "unknown method 'defualt': did you mean 'default'?"),
    ("--target {empty} --method default", "config.json"),
    ("--target {target} --method default --set scael=2", "unknown option of default 'scael': did you mean 'scale'?"),
    ("--target {target} --method weight-selection --donor {donor}", "width 16 is smaller than the target's 32"),
    ("--target {target} --method weight-selection", "needs a donor"),
    ("--target {broken} --method default", "num_key_value_heads"),
])  # fmt: skip
def test_user_errors_are_one_line_and_exit_code_2(tmp_path: Path, target: Path, arguments: str, reason: str) -> None:
    places = {name: tmp_path / name for name in ("empty", "donor", "broken.json")}
    places["empty"].mkdir()
    if "{donor}" in arguments:
        donor(places["donor"], CONFIGS["llama"] | {"hidden_size": 16})
    places["broken.json"].write_text(json.dumps(CONFIGS["llama"] | {"num_key_value_heads": 3}))
    before = sorted(tmp_path.rglob("*"))
    line = arguments.format(
        target=target, empty=places["empty"], donor=places["donor"], broken=places["broken.json"]
    ).split()
    done = headstart("generate", *line, "--out", tmp_path / "out")
    assert done.returncode == 2, done.stderr
    assert done.stdout == "" and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("headstart: ") and reason in done.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_usage_errors_are_exit_code_2(tmp_path: Path) -> None:
    assert headstart("generate", "--nonsense").returncode == 2
    assert headstart("nonsense").returncode == 2
    assert headstart("zoo", "add", tmp_path, "--zoo", tmp_path / "zoo", "--shard", "first").returncode == 2


def test_an_output_in_an_existing_folder_is_refused_untouched(tmp_path: Path, target: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    done = headstart("generate", "--target", target, "--method", "default", "--out", out)
    assert done.returncode == 2 and "exists already" in done.stderr
    assert [p.name for p in out.iterdir()] == ["mine.txt"] and len(list(tmp_path.iterdir())) == 2


def test_our_own_faults_are_exit_code_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samplers, "DESCRIPTIONS", Path("no-such-file"))
    done = headstart("methods")
    assert done.returncode == 1 and "Traceback" in done.stderr and done.stdout == ""


def test_a_file_without_permission_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Python's Path.exists raises for a file in a folder that may not be entered."""
    with pytest.raises(typer.Exit) as ended, session(quiet=True):
        raise PermissionError(13, "Permission denied", "model/config.json")
    assert ended.value.exit_code == 2
    assert capsys.readouterr().err == (
        "headstart: model/config.json: permission denied; check its permissions and those of the folders above it\n"
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupt_is_exit_code_130_and_leaves_nothing(tmp_path: Path, number: int) -> None:
    config = CONFIGS["llama"] | {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 120}
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = headstart(
        "generate", "--target", tmp_path, "--method", "default", "--out", tmp_path / "out",
        interrupt=lambda: any(tmp_path.rglob("*.safetensors")), number=number,
    )  # fmt: skip
    assert done.returncode == 130 and done.stderr.endswith("interrupted; run the same command again to continue\n")
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize("command", ["autoencoder", "diffusion --autoencoder a"])
def test_interrupted_training_explains_how_to_resume(monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    def interrupted(*arguments: object, **more: object) -> None:
        raise KeyboardInterrupt

    kind, *rest = command.split()
    monkeypatch.setattr(f"{kind}.training.train_{kind}", interrupted)
    monkeypatch.setattr("headstart.commands.check_early", lambda config: None)  # there is no zoo
    done = headstart("train", kind, *rest, "--zoo", "z", "--out", "o", "--device", "cpu")
    assert done.returncode == 130
    assert done.stderr.endswith("interrupted; run the same command with --resume to continue\n")


def test_compare_takes_the_scales_of_the_default(tmp_path: Path, target: Path) -> None:
    line = (
        "compare",
        "--target",
        target,
        "--zoo",
        "z",
        "--methods",
        "default",
        "--corpus",
        "c",
        "--out",
        tmp_path / "o",
    )
    done = headstart(*line, "--default-scales", "2,4")
    assert done.returncode == 2 and "--default-scales" in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "o").exists()


def test_a_closed_pipe_is_quiet() -> None:
    read, write = os.pipe()
    os.close(read)
    done = headstart("methods", stdout=write)
    os.close(write)
    assert done.returncode == 0 and done.stderr == ""


def test_the_module_runs_as_accelerate_launches_it() -> None:
    command = [sys.executable, "-m", "headstart", "generate", "--target", "x", "--method", "defualt", "--out", "y"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and done.stderr == "headstart: unknown method 'defualt': did you mean 'default'?\n"


def test_lora_writes_an_adapter_plans_it_and_refuses_in_one_line(
    tmp_path: Path, tiny_llama: Callable[..., Path]
) -> None:
    pytest.importorskip("peft")
    base, out = tiny_llama(tmp_path / "base"), tmp_path / "adapter"
    line = ("lora", "--base", base, "--rank", "4", "--out", out)
    planned = headstart(*line, "--method", "pissa", "--plan")
    assert planned.returncode == 0 and not out.exists()
    assert json.loads(planned.stdout)["write"]["base"]["tensors"] == 20
    refused = headstart(*line, "--method", "pissa", "--targets", "q_proj,nothing")
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and "'nothing'" in refused.stderr
    wrong = headstart("generate", "--target", base, "--method", "pissa", "--out", out)
    assert wrong.returncode == 2 and "headstart lora --base MODEL --method pissa" in wrong.stderr
    done = headstart(*line, "--method", "gaussian", "--seed", "7")
    assert done.returncode == 0 and done.stdout == "" and done.stderr.endswith(f"wrote {out}\n")
    record = json.loads((out / "headstart.json").read_text())
    assert record["seed"] == 7 and record["command"].startswith("headstart lora --base")
