"""The novelty audit: controls do what they say, samples are measured and counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.head_start import rows, tasks
from benchmarks.head_start.results import BenchmarkResults
from benchmarks.novelty import audits, controls, verdict
from benchmarks.pages import audit_tables
from benchmarks.peers.scoring import held_out_loss
from benchmarks.peers.weights import Weights, stored_tensors
from headstart.generate.sampling import sample_with_defaults
from tests.headstart.compare.test_compare import run
from tests.support.tiny import config, make_zoo
from zoo.donors.zoo import Zoo
from zoo.errors import UserError
from zoo.targets.blueprint import Blueprint
from zoo.training.corpora import python_reference
from zoo.vocabulary import byte_tokens


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return make_zoo(tmp_path_factory.mktemp("zoo"))


def loss(sampler: Any, zoo: Zoo, blueprint: Blueprint, seed: int = 0) -> float:
    assert blueprint.config is not None and blueprint.metadata is not None
    tokens = byte_tokens(python_reference()[:4000]) % blueprint.metadata.vocab
    tensors = {name: t.float() for name, t in sample_with_defaults(sampler, blueprint, seed)}
    return held_out_loss(blueprint.config, tensors, tokens, windows=8)


def test_with_little_noise_the_control_equals_the_donor(zoo: Zoo) -> None:
    blueprint = zoo.donors[0].blueprint
    alike = [d for d in zoo.donors if [s.shape for s in d.blueprint.specs] == [s.shape for s in blueprint.specs]]
    assert blueprint.config is not None and blueprint.metadata is not None
    tokens = byte_tokens(python_reference()[:4000]) % blueprint.metadata.vocab
    own = {d.name: held_out_loss(d.config, stored_tensors(d), tokens, windows=8) for d in alike}
    sampler = controls.Noise(amount=1e-6).fit(zoo, blueprint)
    assert set(sampler.donors) == set(own)
    for seed in range(4):
        assert loss(sampler, zoo, blueprint, seed) == pytest.approx(
            own[sampler.donors[sampler.picked_donor(seed)]], abs=1e-4
        )
    loud = controls.Noise(amount=0.5).fit(zoo, blueprint)
    assert loss(loud, zoo, blueprint) != pytest.approx(loss(sampler, zoo, blueprint), abs=1e-3)


def test_mixing_asks_for_two_donors_of_the_shape(zoo: Zoo) -> None:
    with pytest.raises(UserError, match="needs 2 donors of the target's shape, has 0"):
        controls.Average().fit(zoo, Blueprint.from_pretrained_config(config(hidden_size=28, layers=3)))


def test_heads_and_neurons_are_matched() -> None:
    """A model whose heads and neurons are in another order is brought back to the first's order, tensor by tensor."""
    blueprint = Blueprint.from_config(tasks.llama(32, 2, 4, 4, 40, vocab=48, head=8))
    generator = torch.Generator().manual_seed(0)
    tensors = {s.name: torch.randn(s.shape, generator=generator) for s in blueprint.specs if s.role != "norm"}
    first = Weights("first", blueprint, tensors, None)
    moved = dict(tensors)
    heads, neurons = torch.randperm(4, generator=generator), torch.randperm(40, generator=generator)
    for name, tensor in tensors.items():
        axis = 1 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0
        if "self_attn" in name:
            moved[name] = controls._reorder_blocks(tensor, axis, 4, heads)
        elif "mlp" in name:
            moved[name] = controls._reorder_blocks(tensor, axis, 40, neurons)
    assert not torch.equal(moved["model.layers.1.mlp.up_proj.weight"], tensors["model.layers.1.mlp.up_proj.weight"])
    found = controls.match_units(Weights("moved", blueprint, moved, None), first)
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in tensors.items())
    tokens = torch.randint(48, (400,), generator=generator)
    norms = {s.name: torch.ones(s.shape) for s in blueprint.specs if s.role == "norm"}
    losses = [held_out_loss(blueprint.config, t | norms, tokens, windows=4) for t in (tensors, moved)]  # type: ignore[arg-type]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_mixtures_of_donors_in_numbers() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(3, 40, 50, generator=generator)
    donors = [Weights(str(i), None, {"w": v}, None) for i, v in enumerate(values)]  # type: ignore[arg-type]
    made = {}
    for cls in (controls.Noise, controls.Average, controls.Interpolation, controls.PerDimension):
        sampler = cls()
        sampler._donors = donors
        made[cls] = sampler.mix("w", 0), sampler.mix("w", 0), sampler.mix("w", 1)
        assert torch.equal(*made[cls][:2])
    assert torch.allclose(made[controls.Average][0], values.mean(0))
    noise = controls.Noise()
    noise._donors = donors
    change = made[controls.Noise][0] - values[noise.picked_donor(0)]
    assert float(change.square().mean().sqrt()) == pytest.approx(
        0.1 * float(values[noise.picked_donor(0)].square().mean().sqrt()), rel=0.05
    )
    many = torch.stack([_mixed(controls.PerDimension(), donors, seed) for seed in range(300)])
    assert torch.allclose(many.mean(0), values.mean(0), atol=0.4)
    assert float((many.std(0) / values.std(0)).mean()) == pytest.approx(1.0, abs=0.03)
    between = made[controls.Interpolation][0]
    distances = [(between - v).norm() for v in values]
    pairs = [(i, j) for i in range(3) for j in range(i) if torch.isclose(
        distances[i] + distances[j], (values[i] - values[j]).norm(), rtol=1e-4)]  # fmt: skip
    assert len(pairs) == 1


def _mixed(sampler: Any, donors: Any, seed: int) -> torch.Tensor:
    sampler._donors = donors
    return sampler.mix("w", seed)


def sample(distance: float, trained: float | None, loss: float = 3.0, digest: str = "a", **more: Any) -> dict[str, Any]:
    errors = {"error_iou": 0.5, "error_same": 0.2, "error_expected": 0.3, "mosaic": distance / 2}
    known = {"shape": "seen", "label": "x", "sizes": {"vocab": 1.0, "qk": 0.5}, "digest": digest}
    ends = {"0.002": trained, "0.006": None}
    return known | errors | {"distance": distance, "trained": ends, "loss": loss} | more


def test_novel_and_performant_are_counted() -> None:
    drawn = [sample(0.5, 1.0), sample(1.5, 1.0, 1.0), sample(2.5, None, digest="b"), sample(4.5, 1.9)]
    others = [sample(9, 1, label="y"), sample(9, 1, shape="unseen")]
    found = {"donors": {"median": 1.0, "mosaic": 1.0}, "samples": [*drawn, *others]}
    s = verdict.count_novel(found, "x", "seen", ready=2.5, trains=2.0)
    assert (s["n"], s["distinct"], s["ready"], s["performant"]) == (4, 2, 1, 3)
    assert s["distance"] == pytest.approx(2.25) and s["size"] == 0.75 and s["trained"] is None
    both = [sample(1.5, 3.0) | {"trained": {"0.002": 3.0, "0.006": end}} for end in (1.0, 2.0)]
    better = verdict.count_novel(found | {"samples": both}, "x", "seen", ready=2.5, trains=2.0)
    assert (better["rate"], better["trained"], better["performant"]) == ("0.006", 1.5, 2)
    assert s["mosaic"] == pytest.approx(1.125) and s["beyond"] == 1
    assert s["novel"] == {"1": 3, "2": 2, "3": 1, "4": 1} and s["both"] == {"1": 2, "2": 1, "3": 1, "4": 1}


def test_novelty_table() -> None:
    found, facts = [], {"comparisons": {}, "made_from": {"embedded": "a"}}
    for c in tasks.comparisons():
        if c.task == "A" and c.target in ("seen", tasks.MAIN_TARGET) and c.budget in tasks.BUDGETS:
            runs = [run("default", seed, 1e-3, [5.0, 4.0, 3.0 if c.budget == "short" else 2.0]) for seed in tasks.SEEDS]
            found += [rows.to_row(c, f"{c.name}-{r['seed']}", r) for r in runs]
            digest = rows.runs_digest(r["file"] for r in rows.of_comparison(found, c))
            facts["comparisons"][c.name] = {"runs": digest, "made_from": "a"}
    drawn = [
        sample(1.5, 1.9, 2.9, shape=shape, label=label)
        for shape in audits.SHAPES
        for label in (*audits.sample_labels(shape), *tasks.EARLIER_VERSIONS)
        if label != "diffusion"  # not sampled yet
        for _ in range(2)
    ]
    apart = {"median": 1.0, "mosaic": 0.7, "iou": 0.7, "expected": 0.5, "same": 0.4}
    facts["novelty"] = {"donors": apart, "samples": drawn, "steps": 50, "made_from": "a"}
    text = audit_tables.novelty_table(BenchmarkResults.from_rows(found, facts))
    assert not audit_tables.novelty_table(
        BenchmarkResults.from_rows(found, facts | {"made_from": {"embedded": "b"}})
    ), "other donors"
    line = "2 (1) | 2.90 | 1.900 (0.002) | 0.75 | 1.500 | 0.750 | 0.50 (0.30; 0.20) | 2 | 2 | 2, 2 | 0, 0 | 0, 0 | 0, 0"
    assert f"| seen | retrieval | {line} | 2 |" in text and "| diffusion |" not in text
    assert text.count("\n| seen |") == len(audits.sample_labels("seen"))
    assert (
        text.index("| seen | autoencoder |") < text.index("| seen | autoencoder-v1 |") < text.index("| seen | row-co")
    )


def test_samples_are_measured(zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One control and one method, on the shape of a donor."""
    (tmp_path / "text.txt").write_bytes(python_reference()[:30_000])
    (tmp_path / "model").mkdir()
    shape = zoo.donors[0].blueprint.config
    assert shape is not None
    monkeypatch.setattr(audits, "SHAPES", {"seen": shape})
    monkeypatch.setattr(audits, "encode_corpus", lambda path, *rest: byte_tokens(Path(path).read_bytes()) % 48)
    monkeypatch.setattr(tasks, "BUDGETS", {"short": 2, "long": 8})
    inputs = audits.audit_inputs(
        zoo.path, tmp_path / "model", tmp_path / "model", tmp_path / "text.txt", tmp_path / "kept"
    )
    Path(inputs.folder).mkdir(parents=True)
    found = {}
    for label in ("a donor with 5% noise", "normal"):
        one = audits.Sample("seen", label, 0)
        audits.measure_sample(inputs, one, lambda n: None)
        found[label] = json.loads((Path(inputs.folder) / one.file).read_text())
    noisy, normal = found.values()
    assert noisy["distance"] < 0.2 < 0.5 < normal["distance"] and noisy["loss"] not in noisy["trained"].values()
    assert noisy["mosaic"] <= noisy["distance"] and set(noisy["trained"]) == {"0.002", "0.006"}
    assert 0 <= noisy["error_iou"] <= 1 and noisy["digest"] != normal["digest"]
    assert noisy["error_iou"] > normal["error_iou"] or noisy["error_same"] > normal["error_same"]
    assert 0.4 < audits.donor_distances(inputs)["mosaic"] <= audits.donor_distances(inputs)["median"]
