"""Plain feed-forward modules: what is a chain, what is not and why, and that rows and columns stay together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from baselines.transfer.chains import trace_chain
from baselines.transfer.row_column import RowColumn
from tests.support.shaken import CONFIGS, donor
from zoo.donors.memory import load_into, zoo_of
from zoo.errors import UserError
from zoo.targets.blueprint import Blueprint


class Named(nn.Module):
    """Layers registered in another order than that of the forward, functions instead of modules."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.out = nn.Linear(width, 3, bias=False)
        self.body = nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width))
        self.first = nn.Linear(12, width)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.first(x.flatten(1)))
        return self.out(torch.tanh(self.body(x)) * 2)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(12, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.c(x + self.b(x))


class Twice(Residual):
    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.relu(self.b(F.relu(self.b(F.relu(self.a(x)))))))


class Mixing(Residual):
    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.a(x).roll(1, 1))


class Deciding(Residual):
    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.a(x)) if x.sum() > 0 else self.c(self.b(self.a(x)))


class Loose(Residual):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.a(x) * self.scale)


def named(width: int, seed: int = 0) -> Named:
    """Shaken, so that no gain is one and no bias zero."""
    torch.manual_seed(seed)
    module = Named(width)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def filled(module: nn.Module, source: nn.Module, seed: int = 0, **options: object) -> nn.Module:
    blueprint = Blueprint.from_module(module)
    sampler = RowColumn(noise=0.0, **options).fit(zoo_of({"source": source}), blueprint)  # type: ignore[arg-type]
    assert sorted(load_into(module, sampler.sample(blueprint, seed))) == sorted(blueprint.names)
    return module


def test_the_chain_follows_the_forward() -> None:
    chain = trace_chain(Blueprint.from_module(Named(8)), "net")
    assert chain.matrices == ("first.weight", "body.0.weight", "out.weight")
    assert chain.sizes == (12, 8, 8, 3)
    norm = (("LayerNorm weight", "body.1.weight"), ("LayerNorm bias", "body.1.bias"))
    assert chain.vectors == ((), (("bias", "first.bias"),), (("bias", "body.0.bias"), *norm), ())


BROKEN: list[tuple[nn.Module, str]] = [
    (nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)), "0 is a Conv2d"),
    (nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)), "1 is a BatchNorm1d"),
    (nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 3)), "0 is a Embedding"),
    (nn.Sequential(nn.Linear(12, 8), nn.GLU(), nn.Linear(4, 3)), "2 reads 4 values, but 8 come before it"),
    (nn.Sequential(nn.Linear(12, 8), nn.LayerNorm((2, 4)), nn.Linear(8, 3)), r"1 normalises \(2, 4\)"),
    (nn.Sequential(nn.Linear(12, 8), nn.ChannelShuffle(2), nn.Linear(8, 3)), "1 between 0.weight and 2 may mix"),
    (nn.Sequential(nn.Flatten(), nn.ReLU()), "no linear layer"),
    (Residual(), "the forward of Residual branches at a"),
    (Twice(), "b.weight is used twice"),
    (Mixing(), "roll between a.weight and c may mix"),
    (Deciding(), "the forward of Deciding cannot be traced"),
    (Loose(), "Loose uses scale outside any layer"),
]


@pytest.mark.parametrize(
    ("module", "reason"), BROKEN, ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else ""
)
def test_a_module_that_is_not_a_chain_is_refused_with_the_reason(module: nn.Module, reason: str) -> None:
    blueprint, zoo = Blueprint.from_module(module), zoo_of({"source": named(8)})
    for use in (RowColumn().fit, RowColumn().planned_donors):
        with pytest.raises(UserError, match=f"target: .*{reason}"):
            use(zoo, blueprint)
    with pytest.raises(UserError, match=f"row-column: source: .*{reason}"):
        RowColumn().fit(zoo_of({"source": module}), Blueprint.from_module(named(8)))


def rival(*vectors: nn.Module, inputs: int = 12, outputs: int = 3, bias: bool = False) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 8), nn.Linear(8, 8), *vectors, nn.Linear(8, outputs, bias))


MISFIT: list[tuple[nn.Module, str]] = [
    (nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)), "it has 3 matrices and the target 2"),
    (rival(nn.LayerNorm(8), inputs=11), "12 inputs and the target 11"),
    (rival(nn.LayerNorm(8), outputs=4), "3 outputs and the target 4"),
    (rival(nn.LayerNorm(8), bias=True), "in hidden space 3 it has no vector and the target bias"),
    (rival(), "in hidden space 2 it has bias, LayerNorm weight, LayerNorm bias and the target bias"),
]


@pytest.mark.parametrize(("module", "reason"), MISFIT)
def test_a_donor_that_does_not_fit_is_refused_with_both_sizes(module: nn.Module, reason: str) -> None:
    with pytest.raises(UserError, match=f"donor 'source' does not fit the target: .*{reason}"):
        RowColumn().planned_donors(zoo_of({"source": named(8)}), Blueprint.from_module(module))


@pytest.mark.parametrize("scale", ["1/multiplicity", "n/N"])
@pytest.mark.parametrize("width", [8, 16, 24])
def test_a_whole_number_growth_is_the_same_function(scale: str, width: int) -> None:
    source = named(8)
    x = torch.randn(5, 3, 4)
    torch.testing.assert_close(filled(Named(width), source, scale=scale)(x), source(x), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(filled(Named(24), source, scale="none")(x), source(x), atol=0.1)


def coded(width: int) -> nn.Sequential:
    """Every weight tells its row and column, every bias its row."""
    net = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2))
    with torch.no_grad():
        for layer in (net[0], net[2], net[4]):
            rows, columns = (torch.arange(n, dtype=torch.float32) for n in layer.weight.shape)  # type: ignore[union-attr]
            layer.weight.copy_(100 * rows[:, None] + columns)  # type: ignore[operator, union-attr]
            layer.bias.copy_(rows)  # type: ignore[operator, union-attr]
    return net


@pytest.mark.parametrize("sampling", ["iid", "balanced"])
def test_one_map_per_hidden_space(sampling: str) -> None:
    """W'[i, j] = W[g(i), g(j)] / c with g read off the biases, and c the multiplicity of j."""
    got = {k: p.detach() for k, p in filled(coded(9), coded(6), sampling=sampling).named_parameters()}
    first, second = got["0.bias"].long(), got["2.bias"].long()
    if sampling == "balanced":
        assert first.bincount(minlength=6).tolist().count(1) == 3 and first.bincount().max() == 2
    else:
        assert first.tolist() != second.tolist()
    copies = [torch.tensor([(g == i).sum() for i in g]) for g in (first, second)]
    assert torch.equal(got["0.weight"], 100.0 * first[:, None] + torch.arange(4))
    torch.testing.assert_close(got["2.weight"], (100.0 * second[:, None] + first) / copies[0])
    torch.testing.assert_close(got["4.weight"], (100.0 * torch.arange(2)[:, None] + second) / copies[1])
    assert torch.equal(got["4.bias"], torch.arange(2.0))


def test_uncoupled_draws_every_axis_of_every_tensor_apart() -> None:
    """Where sorted and balanced maps of whole-number growth would agree by chance of order, too."""
    got = {k: p.detach() for k, p in filled(coded(12), coded(6), coupling="uncoupled", scale="none").named_parameters()}
    written = got["0.weight"][:, 0].div(100).round().long()
    read = got["2.weight"][0].remainder(100).long()
    for index in (written, read, got["0.bias"].long()):
        assert index.bincount().tolist() == [2] * 6
    assert (written == read).sum() < 8 and (written == got["0.bias"]).sum() < 8
    assert torch.equal(got["0.weight"].remainder(100)[0], torch.arange(4.0))  # inputs stay inputs


def test_the_nearest_donor_in_size_or_the_one_that_is_named() -> None:
    zoo = zoo_of({"small": named(6), "large": named(40), "other": nn.Sequential(nn.Conv2d(1, 1, 3))})
    blueprint = Blueprint.from_module(Named(10))
    assert RowColumn().planned_donors(zoo, blueprint) == RowColumn().fit(zoo, blueprint).donors == ("small",)
    assert RowColumn(donor="large").fit(zoo, blueprint).donors == ("large",)
    with pytest.raises(UserError, match="unknown donor"):
        RowColumn(donor="huge").planned_donors(zoo, blueprint)
    with pytest.raises(UserError, match="0 is a Conv2d"):
        RowColumn(donor="other").planned_donors(zoo, blueprint)


def test_language_models_and_chains_do_not_mix(tmp_path: Path) -> None:
    llama = donor(tmp_path / "llama", CONFIGS["llama"])
    with pytest.raises(UserError, match="neither a config nor a module in memory"):
        RowColumn().planned_donors(llama, Blueprint.from_module(Named(8)))
    with pytest.raises(UserError, match="must both have a config"):
        RowColumn().planned_donors(zoo_of({"mlp": named(8)}), Blueprint.from_config(CONFIGS["llama"]))


def test_a_module_donor_is_saved_with_its_tensors(tmp_path: Path) -> None:
    source = named(8)
    blueprint = Blueprint.from_module(Named(13))
    sampler = RowColumn(sampling="iid").fit(zoo_of({"source": source}), blueprint)
    expected = dict(sampler.sample(blueprint, seed=4))
    sampler.save(tmp_path)
    with torch.no_grad():
        source.first.weight.zero_()
    loaded = RowColumn.load(tmp_path)
    assert loaded.donors == ("source",)
    got = dict(loaded.sample(blueprint, seed=4))
    assert got.keys() == expected.keys() and all(torch.equal(got[name], expected[name]) for name in expected)
    assert not torch.equal(dict(loaded.sample(blueprint, seed=5))["first.weight"], expected["first.weight"])
    with pytest.raises(UserError, match="3 matrices and the target 2"):
        list(loaded.sample(Blueprint.from_module(nn.Sequential(nn.Linear(12, 5), nn.Linear(5, 3)))))
