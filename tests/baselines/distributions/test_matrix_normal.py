"""The flip-flop against an independent reference and known covariances; the sampler on zoos and plain modules."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GPT2Config

from baselines.distributions.kronecker import (
    FitRules,
    color_noise,
    covariance_factor,
    flip_flop,
    rescale_to_unit_rms,
    shrink_covariance,
)
from baselines.distributions.matrix_normal import MatrixNormal
from tests.support.architectures import LISTED
from tests.support.tiny import config, make_zoo
from tests.zoo.targets.test_blueprint import real_model
from zoo.add import add
from zoo.donors.memory import load_into, zoo_of
from zoo.donors.zoo import Zoo
from zoo.errors import UserError
from zoo.targets.blueprint import Blueprint


def spd(size: int, seed: int, decay: float = 1.0) -> Tensor:
    """A covariance with correlations and falling variances."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(size, 3 * size, generator=generator, dtype=torch.float64)
    fall = torch.linspace(0, -decay, size, dtype=torch.float64).exp()
    return a @ a.mT / (3 * size) * fall * fall[:, None]


def samples(u: Tensor, v: Tensor, n: int, seed: int) -> list[Tensor]:
    a, b = covariance_factor(u), covariance_factor(v)
    generator = torch.Generator().manual_seed(seed)
    return [color_noise(a, b, torch.randn(len(a), len(b), generator=generator, dtype=torch.float64)) for _ in range(n)]


def relative(found: Tensor, true: Tensor) -> float:
    return float((found - true).norm() / true.norm())


def full(p: int, n: int) -> Tensor:
    return torch.full((p,), float(n))


def test_the_flip_flop_is_the_textbook_one() -> None:
    """Against explicit inverses and loops in numpy, without shrinkage."""
    xs = samples(spd(6, 0), spd(4, 1), 9, seed=2)
    u, v = flip_flop(lambda: xs, full(6, 9), 4, FitRules(amount=0.0, steps=100, tolerance=1e-12))
    row, column = np.eye(6), np.eye(4)
    for _ in range(100):
        row = sum(x.numpy() @ np.linalg.inv(column) @ x.numpy().T for x in xs) / (9 * 4)
        row *= 6 / np.trace(row)
        column = sum(x.numpy().T @ np.linalg.inv(row) @ x.numpy() for x in xs) / (9 * 6)
    np.testing.assert_allclose(u.numpy(), row, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(v.numpy(), column, rtol=1e-5, atol=1e-7)


def test_known_covariances_are_found() -> None:
    """The error falls as 1 / sqrt(n); at n = 12 on 48 x 32 it is a third without shrinkage, and less with."""
    u = spd(48, 0, decay=0.0)
    u, v = u * 48 / u.trace(), spd(32, 1)
    errors = {}
    for n in (3, 12, 48):
        xs = samples(u, v, n, seed=n)
        for amount in (0.0, None):
            found = flip_flop(lambda xs=xs: xs, full(48, n), 32, FitRules(amount=amount))  # type: ignore[misc]
            errors[n, amount] = relative(found[0], u), relative(found[1], v)
    assert 0.28 < errors[12, 0.0][0] < 0.4
    assert errors[12, None][0] < 0.9 * errors[12, 0.0][0]
    assert errors[3, None][0] < 0.6 * errors[3, 0.0][0]
    assert errors[48, 0.0][0] < 0.6 * errors[12, 0.0][0] and errors[48, 0.0][1] < 0.6 * errors[12, 0.0][1]


def test_draws_have_the_moments_of_a_kronecker_product() -> None:
    """cov(vec X) = V ⊗ U, vec by columns, within four standard errors everywhere."""
    u, v = spd(3, 0), spd(2, 1)
    n = 40000
    stacked = torch.stack([x.mT.flatten() for x in samples(u, v, n, seed=0)])
    expected = torch.kron(v, u)
    error = ((expected**2 + expected.diagonal()[:, None] * expected.diagonal()) / n).sqrt()
    assert ((stacked.mT @ stacked / n - expected).abs() < 4 * error).all()


def test_shrinkage_of_correlations() -> None:
    covariance = torch.tensor([[4.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    half = shrink_covariance(covariance, 10, amount=0.5)
    torch.testing.assert_close(half, torch.tensor([[4.0, 0.5], [0.5, 1.0]], dtype=torch.float64))
    half = shrink_covariance(covariance, 10, toward="identity", amount=0.5)
    torch.testing.assert_close(half, torch.tensor([[3.25, 0.5], [0.5, 1.75]], dtype=torch.float64))
    few, many = (shrink_covariance(covariance, n)[0, 1] for n in (3, 1e6))
    assert few < 0.5 and abs(many - 1) < 1e-3
    # a coordinate without variance stays so and can be divided by
    assert torch.isfinite(
        covariance_factor(shrink_covariance(torch.diag(torch.tensor([1.0, 0.0], dtype=torch.float64)), 5))
    ).all()


def test_the_estimated_amount_is_that_of_the_paper() -> None:
    """Against a public implementation of 0907.4698."""
    covariance_ = pytest.importorskip("sklearn.covariance")
    x = np.random.default_rng(0).normal(size=(20, 8)) @ np.diag(np.linspace(1, 2, 8))
    empirical = torch.from_numpy(x.T @ x / 20)
    theirs, _ = covariance_.oas(x, assume_centered=True)
    ours = shrink_covariance(empirical, 20, toward="identity")
    # scikit-learn leaves out the terms with 2 / p, as the paper's equation for large p does
    assert relative(ours, torch.from_numpy(theirs)) < 0.02


def test_rows_that_some_lack() -> None:
    """Diagonal rows: each variance from the samples that know the row; one that none knows gets the mean."""
    u, v = torch.diag(torch.tensor([4.0, 1.0, 1.0], dtype=torch.float64)), spd(20, 1)
    xs = samples(u, v, 2000, seed=0)
    for x in xs[:1000]:
        x[1] = 0
    for x in xs:
        x[2] = 0
    rows, columns = flip_flop(lambda: xs, torch.tensor([2000.0, 1000.0, 0.0]), 20, diagonal_rows=True)
    assert rows.shape == (3,)
    assert abs(rows[0] / rows[1] - 4) < 0.25 and torch.isclose(rows[2], rows[:2].mean())
    assert relative(columns / columns.trace(), v / v.trace()) < 0.12


def test_a_fitted_distribution_has_the_scale_of_its_samples() -> None:
    """Half of the rows vary in a few directions and little, as tokens that never occur do: the likelihood's product of
    covariances is too large."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 60, generator=generator, dtype=torch.float64) * torch.logspace(0, -3, 60)
    x[200:] = torch.randn(200, 60, generator=generator, dtype=torch.float64) * torch.logspace(-4, -2, 60)
    x[:100] = 0  # not known
    x /= x[100:].square().mean().sqrt()
    counts = torch.cat([torch.zeros(100), torch.ones(300)])
    rows, columns = flip_flop(lambda: [x], counts, 60, diagonal_rows=True)
    assert rows[100:].mean() * columns.trace() / 60 > 2
    own = rescale_to_unit_rms(rows, columns, counts)
    assert torch.allclose(own / own.trace(), columns / columns.trace())
    drawn = [
        color_noise(covariance_factor(rows), covariance_factor(own), torch.randn(400, 60, generator=generator).double())
        for _ in range(20)
    ]
    assert abs(float(torch.stack(drawn)[:, 100:].square().mean()) - 1) < 0.2


# --- the sampler ------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self, u: Tensor, v: Tensor, seed: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 12), nn.Conv2d(3, 4, 2)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.first.weight.copy_(
                color_noise(
                    covariance_factor(u), covariance_factor(v), torch.randn(12, 8, generator=generator).double()
                )
                + 3.0
            )
            self.first.bias.fill_(float(seed))


def test_modules_in_stored_coordinates() -> None:
    """Draws have the donors' mean and covariances; what has one axis is their mean."""
    u, v = spd(12, 0), spd(8, 1)
    zoo = zoo_of({f"n{i}": Net(u, v, i) for i in range(60)})
    target = Net(u, v, 999)
    blueprint = Blueprint.from_module(target)
    sampler = MatrixNormal().fit(zoo, blueprint)
    drawn = [dict(sampler.sample(blueprint, seed)) for seed in range(300)]
    assert set(drawn[0]) == {"first.weight", "first.bias", "second.weight", "second.bias"}
    assert torch.allclose(drawn[0]["first.bias"], torch.full((12,), 29.5))
    stacked = torch.stack([d["first.weight"].double() for d in drawn])
    assert abs(float(stacked.mean()) - 3) < 0.1
    left = stacked - stacked.mean(0)
    rows, columns = torch.einsum("nij,nkj->ik", left, left), torch.einsum("nji,njk->ik", left, left)
    assert relative(rows / rows.trace(), u / u.trace()) < 0.15
    assert relative(columns / columns.trace(), v / v.trace()) < 0.15
    assert abs(float(left.square().sum() / 299 / (u.trace() * v.trace())) - 1) < 0.15
    assert len(load_into(target, drawn[0].items())) == 4


def test_a_zoo_in_canonical_form(tmp_path: Path) -> None:
    """Donors of several widths and depths, to a shape that none has: roles keep their scale (tests.tiny.STD, far
    apart), the seed decides the bytes, saving keeps them, and a layer's stream does not depend on the others."""
    zoo = make_zoo(tmp_path)
    blueprint = Blueprint.from_pretrained_config(config(hidden_size=28, kv=4, layers=3))
    sampler = MatrixNormal(mean="zero").fit(zoo, blueprint)
    assert (
        len(sampler.donors) == 2 and sampler.planned_donors(zoo, blueprint) == sampler.donors
    )  # those that are wide enough
    tensors = dict(sampler.sample(blueprint, 1))
    assert set(tensors) == set(blueprint.names)
    assert all(t.dtype == torch.float32 and t.shape == blueprint[name].shape for name, t in tensors.items())
    again, other = dict(sampler.sample(blueprint, 1)), dict(sampler.sample(blueprint, 2))
    assert all(torch.equal(tensors[name], again[name]) for name in tensors)
    assert not torch.equal(tensors["lm_head.weight"], other["lm_head.weight"])
    sampler.save(tmp_path / "saved")
    loaded = MatrixNormal.load(tmp_path / "saved")
    assert loaded.donors == sampler.donors
    assert all(torch.equal(t, tensors[name]) for name, t in loaded.sample(blueprint, 1))


def products(tensors: dict[str, Tensor]) -> dict[str, float]:
    """RMS of what canonical form leaves alone: of the products of a layer's balanced factors."""
    up, down = tensors["model.layers.0.mlp.up_proj.weight"], tensors["model.layers.0.mlp.down_proj.weight"]
    v, o = tensors["model.layers.0.self_attn.v_proj.weight"], tensors["model.layers.0.self_attn.o_proj.weight"]
    rms = {"mlp": (up.norm(dim=1) * down.norm(dim=0)).square().mean().sqrt()}
    rms["vo"] = (v.norm(dim=1) * o.norm(dim=0)).square().mean().sqrt()
    rms["embed"] = tensors["model.embed_tokens.weight"].square().mean().sqrt()
    return {name: float(value) for name, value in rms.items()}


def test_draws_are_as_large_as_the_donors(tmp_path: Path) -> None:
    shapes = [dict(hidden_size=32, kv=4)] * 3
    zoo = make_zoo(tmp_path, shapes)
    blueprint = zoo.donors[0].blueprint
    own = products({name: zoo.donors[0].read(name) for name in zoo.donors[0].names})
    for sampler in (MatrixNormal(mean="zero"), MatrixNormal(), MatrixNormal(mean="zero", granularity="layer")):
        drawn = products(dict(sampler.fit(zoo, blueprint).sample(blueprint, 0)))
        for name, value in own.items():
            assert 0.7 < drawn[name] / value < 1.4, (sampler, name)


def test_a_unit_keeps_what_it_reads_and_writes_together(tmp_path: Path) -> None:
    """Donors whose neurons write along what they read: so do drawn ones."""
    zoo = make_zoo(tmp_path, [dict(hidden_size=32, kv=4)] * 2)
    for donor in zoo.donors:
        path = donor.folder / "model.safetensors"
        tensors = load_file(path)
        for layer in range(2):
            tensors[f"model.layers.{layer}.mlp.down_proj.weight"] = (
                tensors[f"model.layers.{layer}.mlp.up_proj.weight"].mT.contiguous() * 2
            )
        save_file(tensors, path, {"format": "pt"})
    blueprint = zoo.donors[0].blueprint
    drawn = dict(MatrixNormal(mean="zero", shrinkage=0.05).fit(zoo, blueprint).sample(blueprint, 0))
    up = drawn["model.layers.0.mlp.up_proj.weight"]
    down = drawn["model.layers.0.mlp.down_proj.weight"].mT
    assert torch.cosine_similarity(up, down, dim=1).abs().mean() > 0.8


def test_refusals(tmp_path: Path) -> None:
    zoo = make_zoo(tmp_path)
    own = zoo.donors[0].config
    targets = {
        "LayerNorm.*basis=stored": Blueprint.from_pretrained_config(GPT2Config(n_embd=32, n_layer=1, n_head=4)),
        "no embedding .vocabulary, width. found.*OPT-350M's is narrower": Blueprint.from_config(LISTED["opt-350m"]),
        "head_dim 8 is not the target's 16": Blueprint.from_config({**own, "head_dim": 16}),
        "vocab 48 is not the target's 50": Blueprint.from_config({**own, "vocab_size": 50}),
        "no matrix with the name and shape": Blueprint.from_module(nn.Linear(3, 3)),
    }
    for message, blueprint in targets.items():
        for work in (MatrixNormal().fit, MatrixNormal().planned_donors):
            with pytest.raises(UserError, match=message):
                work(zoo, blueprint)
    with pytest.raises(UserError, match="needs donors"):
        MatrixNormal().fit(None, zoo.donors[0].blueprint)
    with pytest.raises(UserError, match="shrinkage"):
        MatrixNormal(shrinkage=1.5)


def test_a_model_without_units_is_drawn_as_it_is_stored(tmp_path: Path) -> None:
    """OPT-350M, whose embedding is narrower than its stream."""
    for seed in (0, 1):
        torch.manual_seed(seed)
        real_model(LISTED["opt-350m"]).save_pretrained(tmp_path / f"d{seed}")
    add([str(tmp_path / f"d{seed}") for seed in (0, 1)], tmp_path / "zoo", quiet=True)
    zoo, blueprint = Zoo.open(tmp_path / "zoo"), Blueprint.from_config(LISTED["opt-350m"])
    drawn = dict(MatrixNormal(basis="stored").fit(zoo, blueprint).sample(blueprint))
    assert set(drawn) == set(blueprint.names)
    name = "model.decoder.project_in.weight"
    mean, spread = (f(torch.stack([d.read(name) for d in zoo.donors])) for f in (torch.mean, torch.std))
    assert (drawn[name].mean() - mean).abs() < 0.01 and 0.7 < drawn[name].std() / spread < 1.4


def test_a_tied_target_and_a_single_donor(tmp_path: Path) -> None:
    """A single donor's units are spread around zero; the tied head has the scale that the embedding allows."""
    zoo = make_zoo(tmp_path, [dict(hidden_size=32, kv=4)])
    blueprint = Blueprint.from_pretrained_config(config(hidden_size=32, kv=4, tie_word_embeddings=True))
    sampler = MatrixNormal().fit(zoo, blueprint)
    assert not any(key.startswith("mean/") for key in sampler.state()[1])
    tensors = dict(sampler.sample(blueprint))
    assert set(tensors) == set(blueprint.names) and "lm_head.weight" not in tensors
    assert all(t.isfinite().all() for t in tensors.values())
