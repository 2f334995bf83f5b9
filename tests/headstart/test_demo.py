"""The whole pipeline in miniature: every stage runs, and a second call finds it done."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from headstart.config import DemoConfig
from headstart.demo import TARGET, DemoSizes, demo
from zoo.errors import UserError
from zoo.targets.blueprint import Blueprint
from zoo.training.recipes import PRESETS, DonorRecipe


def micro() -> list[DonorRecipe]:
    return [DonorRecipe(32, 2, heads=2, kv_heads=1, ffn=48, steps=4, seed=seed) for seed in (0, 1)]


MICRO = DemoSizes(
    preset="micro",
    autoencoder={"steps": 2, "warmup": 1, "reconstruction": 1, "shapes": 2, "batch": 2, "sequence": 16},
    diffusion={"steps": 2, "tuning": 1, "batch": 2, "tuning_windows": 2, "sequence": 16, "hidden": 32, "layers": 1},
    compare_steps=2,
    seeds=(0,),
    lrs=(3e-3,),
    default_scales=(1.0,),
    methods=("default", "row-column", "autoencoder", "diffusion"),
)


def test_the_demo_runs_and_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(PRESETS, "micro", micro)
    # Workers import everything anew, which takes longer than all stages.
    # They are tested in test_embedded_zoo.py and test_compare.py.
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    out = tmp_path / "demo"
    took = demo(DemoConfig(out=str(out)), sizes=MICRO, quiet=True)
    assert set(took) == {"zoo train", "train autoencoder", "train diffusion", "generate", "compare"}
    printed = capsys.readouterr().out
    assert all(name in printed for name in MICRO.methods)
    assert printed.strip().endswith(str(out / "comparison" / "report.html"))
    _, info = AutoModelForCausalLM.from_pretrained(out / "generated", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    record = json.loads((out / "generated" / "headstart.json").read_text())
    assert {d["name"] for d in record["donors"]} == {r.name for r in micro()}

    stages = json.loads((out / "demo.json").read_text())["stages"]
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*.safetensors")}
    again = demo(DemoConfig(out=str(out)), sizes=MICRO, quiet=True)
    assert "generate" not in again
    kept = json.loads((out / "demo.json").read_text())["stages"]
    assert set(kept) == set(took) and all(kept[name]["seconds"] >= stages[name]["seconds"] for name in stages)
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*.safetensors")} == before
    with pytest.raises(UserError, match="another preset or seed"):
        demo(DemoConfig(out=str(out), seed=1), sizes=MICRO, quiet=True)


def test_the_target_is_in_no_preset() -> None:
    target = Blueprint.from_config(TARGET).metadata
    assert target is not None
    shape = (target.width, target.layers, target.heads, target.kv_heads, target.ffn)
    for preset in PRESETS.values():
        assert shape not in {(r.width, r.layers, r.heads, r.kv_heads, r.ffn) for r in preset()}


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="holds no demo"):
        demo(DemoConfig(out=tmp_path, quick=True), quiet=True)
