"""The rebuilt peers: cutting and joining is exact, training learns, sampling is a function of the seed, and the whole
measurement runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.peers import chunks, d2nwg, measure, sane, training
from benchmarks.peers import tokens as row_tokens
from benchmarks.peers.scoring import held_out_loss
from benchmarks.peers.weights import fit_pca_reconstruction, make_reconstruction, read_weights, stored_tensors
from tests.support.commands import generate
from tests.support.generators import train_tiny_autoencoder, train_tiny_diffusion
from tests.support.tiny import config, make_zoo
from zoo.donors.zoo import Zoo
from zoo.errors import UserError
from zoo.streams import stream
from zoo.targets.blueprint import Blueprint

ROOT = Path(__file__).resolve().parents[2]
PEERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "sane": (sane, {"parameters": 30_000, "window": 16, "batch": 8, "layers": 1, "lr": 3e-3}),
    "d2nwg": (d2nwg, {"parameters": 160_000, "chunk": 64, "batch": 16, "share": 0.6, "lr": 3e-3, "lr_unet": 3e-3}),
}
CLASSES: dict[str, Any] = {"sane": sane.SANE, "d2nwg": d2nwg.D2NWG}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return make_zoo(tmp_path_factory.mktemp("zoo"))


@pytest.fixture(scope="module")
def trained(zoo: Zoo) -> dict[str, Path]:
    steps = {"sane": 60, "d2nwg": 70}
    return {
        name: module.train(zoo.path, zoo.path.parent / name, steps=steps[name], **settings)
        for name, (module, settings) in PEERS.items()
    }


def target(**shape: Any) -> Blueprint:
    return Blueprint.from_pretrained_config(config(**({"hidden_size": 28, "layers": 3} | shape)))


def drawn(name: str, folder: Path, blueprint: Blueprint, seed: int = 0, **options: Any) -> dict[str, torch.Tensor]:
    return dict(CLASSES[name](model=str(folder), **options).fit(None, blueprint).sample(blueprint, seed))


@pytest.mark.parametrize("size", [7, 16, 32, 64])
@pytest.mark.parametrize("coordinates", ["raw", "canonical"])
def test_cutting_and_joining_is_exact(zoo: Zoo, size: int, coordinates: str) -> None:
    for donor in read_weights(zoo, coordinates):
        tokens = row_tokens.to_tokens(donor.blueprint, donor.tensors, size)
        assert int(tokens.mask.sum()) == sum(s.numel for s in donor.blueprint.specs)
        assert not tokens.values[~tokens.mask].any()
        assert tokens.positions[:, 0].tolist() == list(range(len(tokens.values)))
        for made in (
            row_tokens.from_tokens(donor.blueprint, tokens.values),
            chunks.from_chunks(donor.blueprint, chunks.to_chunks(donor.blueprint, donor.tensors, size)),
        ):
            assert made.keys() == donor.tensors.keys()
            assert all(torch.equal(made[name], t) for name, t in donor.tensors.items())


def test_canonical_donors_compute_what_they_did(zoo: Zoo) -> None:
    tokens = torch.randint(48, (2000,), generator=stream(0, "text"))
    for donor in zoo.donors:
        own = held_out_loss(donor.config, stored_tensors(donor), tokens)
        weights = next(w for w in read_weights(zoo, "canonical") if w.name == donor.name)
        whole = make_reconstruction(weights, weights.tensors, 1, "canonical")
        assert held_out_loss(whole.config, whole.own, tokens) == pytest.approx(own, abs=1e-4)
        assert whole.error == 0.0


def test_permuted_donors_compute_what_they_did(zoo: Zoo) -> None:
    tokens = torch.randint(48, (2000,), generator=stream(0, "text"))
    donor = read_weights(zoo, "raw")[0]
    assert donor.blueprint.config is not None
    other = row_tokens.random_permutation(donor, stream(1, "order"))
    name = "model.layers.0.mlp.down_proj.weight"
    assert not torch.equal(other[name], donor.tensors[name])
    own = held_out_loss(donor.blueprint.config, donor.tensors, tokens)
    assert held_out_loss(donor.blueprint.config, other, tokens) == pytest.approx(own, abs=1e-5)


@pytest.mark.parametrize("count", [5, 16, 17, 63, 64, 100])
def test_halos_keep_every_token_once_with_neighbours(count: int) -> None:
    parts = row_tokens.halo_windows(count, 16, 8)
    assert [i for _, _, first, last in parts for i in range(first, last)] == list(range(count))
    assert all(start <= first and last <= stop <= count for start, stop, first, last in parts)
    assert {stop - start for start, stop, _, _ in parts} == {min(32, count)}
    inner = [p for p in parts if p[0] > 0 and p[1] < count]
    assert all(first - start == 8 and stop - last == 8 for start, stop, first, last in inner)


def test_contrast_is_least_where_views_agree() -> None:
    z = torch.eye(6)
    assert float(sane.contrastive_loss(z, z, 0.1)) < 0.01 < float(sane.contrastive_loss(z, z.roll(1, 0), 0.1))
    assert float(sane.contrastive_loss(torch.ones(4, 3), torch.ones(4, 3), 0.1)) == pytest.approx(
        torch.log(torch.tensor(7.0))
    )


def test_kernel_densities_are_drawn_as_asked() -> None:
    anchors = torch.tensor([-10.0, 0.0, 10.0])[:, None, None].expand(3, 3000, 4)
    for mode in ("token", "individual", "joint"):
        z = sane.draw_from_kernel_density(anchors, mode, 0.2, stream(0, mode))
        pick = (z / 10).round()
        assert float((z - 10 * pick).std()) == pytest.approx(0.2, rel=0.05)
        whole = bool((pick == pick[0, 0]).all())
        within = bool((pick == pick[:, :1]).all())
        assert (whole, within) == {"token": (False, True), "individual": (False, False), "joint": (True, True)}[mode]
        if mode != "joint":
            assert torch.bincount(pick.flatten().long() + 1).div(pick.numel()).sub(1 / 3).abs().max() < 0.05


def test_pca_of_rows_is_the_best_linear_code() -> None:
    rows = torch.randn(200, 8, generator=stream(0, "rows")) * torch.arange(1, 9)
    wrong = (fit_pca_reconstruction(rows, 5)(rows) - rows).square().sum()
    left = torch.linalg.svdvals(rows - rows.mean(0))[5:].square().sum()
    assert float(wrong) == pytest.approx(float(left), rel=1e-4)


@pytest.mark.parametrize("name", PEERS)
def test_training_learns_within_its_budget(zoo: Zoo, trained: dict[str, Path], name: str) -> None:
    content = json.loads((trained[name] / "peer.json").read_text())
    for run in content["training"].values():
        assert run["loss"][1] < 0.95 * run["loss"][0]
    if name == "sane":  # random donors: nothing but the shares of numbers that are kept can be learned
        assert sane.reconstruct_donor(trained[name], "d0", zoo).error < 0.97
    assert 0.5 * PEERS[name][1]["parameters"] < content["parameters"] <= PEERS[name][1]["parameters"]
    assert not [p for p in trained[name].rglob("*") if p.suffix not in (".json", ".safetensors", "")]


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("tied", [False, True])
def test_any_shape_is_filled_by_the_seed(trained: dict[str, Path], name: str, tied: bool) -> None:
    few = {"steps": 3} if name == "d2nwg" else {}
    for shape in ({}, {"hidden_size": 40, "layers": 5, "kv": 4}):
        blueprint = target(tie_word_embeddings=tied, **shape)
        once, again, other = (drawn(name, trained[name], blueprint, seed, **few) for seed in (3, 3, 4))
        assert {n: tuple(t.shape) for n, t in once.items()} == {s.name: s.shape for s in blueprint.specs}
        assert all(torch.equal(once[n], again[n]) and torch.isfinite(once[n]).all() for n in once)
        assert not torch.equal(once["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


@pytest.mark.parametrize("name", PEERS)
def test_an_interrupted_run_ends_with_the_same_bytes(zoo: Zoo, tmp_path: Path, name: str) -> None:
    module, settings = PEERS[name]
    whole = module.train(zoo.path, tmp_path / "whole", steps=6, **settings)
    halt = tmp_path / "halted"
    real = training.save_state

    def halting(path: Path, tensors: Any, step: int, identity: str) -> None:
        real(path, tensors, step, identity)
        if step == 2:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "SAVE_SECONDS", 0.0)
        patch.setattr(training, "save_state", halting)
        with pytest.raises(KeyboardInterrupt):
            module.train(zoo.path, halt, steps=6, **settings)
    with pytest.raises(UserError, match="not empty"):
        module.train(zoo.path, halt, steps=6, **settings)
    module.train(zoo.path, halt, steps=6, resume=True, **settings)
    for path in sorted(whole.rglob("*.safetensors")):
        assert path.read_bytes() == (halt / path.relative_to(whole)).read_bytes()
    with pytest.raises(UserError, match="other settings"):
        module.train(zoo.path, halt, steps=7, resume=True, **settings)


def test_a_saved_sampler_and_sub_sampling(trained: dict[str, Path], tmp_path: Path) -> None:
    blueprint = target()
    sampler = sane.SANE(model=str(trained["sane"]), mode="joint").fit(None, blueprint)
    sampler.save(tmp_path)
    again = sane.SANE.load(tmp_path)
    assert all(torch.equal(t, dict(again.sample(blueprint, 1))[n]) for n, t in sampler.sample(blueprint, 1))
    with pytest.raises(UserError, match="text=FILE"):
        sane.SANE(model=str(trained["sane"]), candidates=3).fit(None, blueprint)
    with pytest.raises(UserError, match="holds sane, not d2nwg"):
        d2nwg.D2NWG(model=str(trained["sane"])).fit(None, blueprint)
    with pytest.raises(UserError, match="too few"):
        training.widest_within(lambda width: 100 * width, 500, 8, 8)


def test_a_peer_is_a_method_by_its_path(trained: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(config(28, layers=3).to_json_string())
    generate(
        tmp_path, "benchmarks.peers.sane.SANE", tmp_path / "out", settings=[f"model={trained['sane']}"], quiet=True
    )
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and model.config.hidden_size == 28
    record = json.loads((tmp_path / "out" / "headstart.json").read_text())
    assert {d["name"] for d in record["donors"]} == {"d0", "d1", "d2"}


def test_the_command_finds_a_method_in_the_working_directory(tmp_path: Path) -> None:
    """The installed command, unlike `python -m`, does not begin with the working directory on its path."""
    (tmp_path / "mine.py").write_text("from zoo.sampler import Sampler\nclass Own(Sampler):\n    name = 'mine.Own'\n")
    look = "import sys; sys.path[:] = [p for p in sys.path if p]; from headstart import samplers; "
    look += "print(samplers.get('mine.Own').name)"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", look], check=True, cwd=tmp_path, env=environment, capture_output=True)
    assert done.stdout.strip() == b"mine.Own"


def test_the_measurement_runs_and_goes_on(zoo: Zoo, tmp_path: Path) -> None:
    coder = train_tiny_autoencoder(zoo.path, tmp_path / "autoencoder")
    pipeline = train_tiny_diffusion(zoo.path, coder, tmp_path / "pipeline")
    tokens = torch.randint(48, (1000,), generator=stream(0, "text"))
    blueprint = target()
    assert blueprint.config is not None
    setup = measure.PeerMeasurement(
        zoo, pipeline, tokens, blueprint.config, tmp_path / "work", None, steps=2, seeds=(0,), shapes=1, rebuilds=1,
        variants={
            "sane": measure.Variant("sane", "small", {"window": 16, "layers": 1}),
            "d2nwg": measure.Variant("d2nwg", "small", {"chunk": 64, "batch": 8}, {"steps": 3}),
        },
    )  # fmt: skip
    found = measure.measure(setup)
    assert set(found["models"]) == {"diffusion", "sane", "d2nwg"}
    ours = found["models"]["diffusion"]
    assert ours["rate"] > 100 and "pca_error" not in ours  # only latents are stored for each donor
    assert found["models"]["sane"]["pca_error"] > 0
    for entry in found["models"].values():
        assert entry["target_loss"] > 1 and entry["error"] > 0 and entry["speed"] > 0 and entry["novelty"] > 0
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "work").rglob("*") if p.is_file()}
    assert measure.measure(setup) == found
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "work").rglob("*") if p.is_file()} == before
    assert measure.format_table(found).count("\n") == 6
