"""The code of README.md and docs/ runs unchanged, in an empty folder, on a smaller zoo and with fewer steps."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.launched import fork
from zoo.training.embedded_zoo import train_zoo
from zoo.training.recipes import DonorRecipe, quick_recipes

ROOT = Path(__file__).resolve().parents[2]
TRAIN = "headstart zoo train --zoo zoo --preset quick"  # replaced by two donors of a few steps
PAGES = ("README.md", *(f"docs/{name}.md" for name in ("concepts", "how-to-add-a-method", "how-to-read-an-analysis")))


def code_blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)


def execute(command: list[str], folder: Path) -> str:
    """What a command prints that runs in `folder`, with the `headstart` and `python` of these tests."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def run_python(code: str, folder: Path) -> str:
    """What Python code prints that runs in `folder`, in a process that need not import everything again."""
    fork(1, _run_python, code, folder)
    return (folder / "printed.txt").read_text()


def _run_python(code: str, folder: Path) -> None:
    os.chdir(folder)
    with open("printed.txt", "w") as printed, contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the shell part of the quickstart has run."""
    folder = tmp_path_factory.mktemp("quickstart")
    first = DonorRecipe(48, 2, heads=3, kv_heads=3, ffn=128, steps=5)
    second = DonorRecipe(96, 4, heads=6, kv_heads=6, ffn=256, steps=5)
    train_zoo(folder / "zoo", [first, second], workers=1, quiet=True)
    (script,) = code_blocks("README.md", "bash")
    assert TRAIN in script and len(quick_recipes()) == 4
    execute(["bash", "-e", "-c", script.replace(TRAIN, "")], folder)
    return folder


def test_the_quickstart_ends_with_a_training_loop(quickstart: Path) -> None:
    training, sampling = code_blocks("README.md", "python")
    fewer = training.replace("max_steps=100", "max_steps=3").replace("logging_steps=10", "logging_steps=1")
    assert fewer != training and len(training.splitlines()) <= 12
    losses = re.findall(r"'loss': '?([\d.]+)", run_python(fewer, quickstart))
    assert len(losses) == 3 and 0 < float(losses[-1]) < 8
    check = "\nassert len(weights) == 1 + 3 * 9 + 2, len(weights)\n"
    run_python(sampling + check, quickstart)


def test_the_method_of_the_page_works(quickstart: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from safetensors.torch import load_file

    from headstart import Blueprint, Zoo, samplers

    (code,), (command,) = (code_blocks("docs/how-to-add-a-method.md", language) for language in ("python", "bash"))
    (quickstart / "rms.py").write_text(code)
    execute(["bash", "-e", "-c", command.replace("--out init", "--out own")], quickstart)
    written = load_file(quickstart / "own" / "model.safetensors")
    monkeypatch.syspath_prepend(str(quickstart))
    blueprint, zoo = Blueprint.from_config(quickstart / "config.json"), Zoo.open(quickstart / "zoo")
    sampler = samplers.get("rms.MatchedRMS")(gain=0.5).fit(zoo, blueprint)
    drawn = dict(sampler.sample(blueprint, 0))
    assert drawn.keys() == {s.name for s in blueprint.specs if len(s.shape) == 2}
    assert all(torch.equal(written[name], tensor) for name, tensor in drawn.items())
    name = "model.layers.1.mlp.up_proj.weight"
    read = [d.read(spec.name).float() for d in zoo.donors for spec in d.blueprint.specs if spec.role == "mlp.up"]
    expected = 0.5 * sum(float(t.square().mean().sqrt()) for t in read) / len(read)
    assert float(drawn[name].square().mean().sqrt()) == pytest.approx(expected, rel=0.02)
    sampler.save(quickstart / "saved")
    again = samplers.get("rms.MatchedRMS").load(quickstart / "saved")
    assert all(torch.equal(tensor, drawn[name]) for name, tensor in again.sample(blueprint, 0))
    assert again.donors == zoo.names and not torch.equal(dict(sampler.sample(blueprint, 1))[name], drawn[name])


@pytest.mark.parametrize("page", [*PAGES, "BENCHMARKS.md", "benchmarks/README.md", "examples/README.md"])
def test_links_lead_to_files(page: str) -> None:
    path = ROOT / page
    links = re.findall(r"\]\(([^)#\s]+)", path.read_text())
    assert not [link for link in links if "://" not in link and not (path.parent / link).exists()]
    assert len(path.read_text().splitlines()) <= (150 if page == "BENCHMARKS.md" else 120)
