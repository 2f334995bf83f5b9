"""Every donor-free method on modules that are no language model."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from baselines.schemes.default import Default
from baselines.schemes.mimetic import Mimetic
from baselines.schemes.rules import GPT2, Identity, ScaledDefault, TruncatedNormal
from zoo.donors.memory import load_into
from zoo.sampler import Sampler
from zoo.targets.blueprint import Blueprint


class Odd(nn.Module):
    """Bare parameters, a transposed and a depthwise convolution, a tied table, a layer used twice, nested lists."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((12,), 0.1))
        self.token = nn.Parameter(torch.full((1, 1, 12), 0.3))
        self.table = nn.Embedding(20, 12)
        self.towers = nn.ModuleList([nn.ModuleList([nn.Linear(12, 12), nn.RMSNorm(12)]) for _ in range(2)])
        self.mix = nn.Conv1d(12, 12, 3, padding=1, groups=12)
        self.up = nn.ConvTranspose1d(12, 24, 2, stride=2)
        self.down = nn.Conv1d(24, 12, 2, stride=2)
        self.twice = nn.Bilinear(12, 12, 12)
        self.act = nn.PReLU(12)
        self.head = nn.Linear(12, 20, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids) + self.token
        for tower in self.towers:
            x = x + self.scale * tower[0](tower[1](x))  # type: ignore[index]
        x = x + self.down(self.up(self.mix(x.mT))).mT
        return self.head(self.act(self.twice(x, x).mT).mT)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.LayerNorm(32), nn.Linear(32, 4))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=2),
        nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 6, 1), nn.Flatten(), nn.Linear(6 * 64, 5),
    )  # fmt: skip


def encoder() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 48, batch_first=True), 2, norm=nn.LayerNorm(32))


MODULES: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "mlp": (mlp, torch.linspace(-1, 1, 48).view(3, 16)),
    "cnn": (cnn, torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))),
    "encoder": (encoder, torch.linspace(-1, 1, 2 * 5 * 32).view(2, 5, 32)),
    "odd": (Odd, torch.arange(18).view(3, 6)),
}
SAMPLERS: dict[str, Sampler] = {
    "default": Default(),
    "gpt2": GPT2(),
    "torchtitan": TruncatedNormal(),
    "olmo": TruncatedNormal(recipe="olmo"),
    "olmo2": TruncatedNormal(recipe="olmo2"),
    "scaled": ScaledDefault(),
    "idinit": Identity(),
    "zero": Identity(scheme="zero"),
    "nanochat": Identity(scheme="nanochat"),
    "mimetic": Mimetic(),
}
BARE = {"scale", "token"}  # only the constructor sets them
CASES = [(m, s) for m in MODULES for s in SAMPLERS if s != "mimetic" or m == "encoder"]


@pytest.mark.parametrize(("module_name", "method"), CASES)
def test_any_module_is_filled_and_runs(module_name: str, method: str) -> None:
    make, given = MODULES[module_name]
    module, sampler = make(), SAMPLERS[method]
    blueprint = Blueprint.from_module(module)
    sampler.fit(None, blueprint)
    pairs = dict(sampler.sample(blueprint, seed=1))
    for name, tensor in pairs.items():
        assert tensor.shape == blueprint[name].shape and tensor.isfinite().all() and tensor.device.type == "cpu", name
    left = set(blueprint.names) - set(pairs)
    if method == "mimetic":
        assert len(pairs) == 4 and all("attn" in name for name in pairs)
    elif method in ("default", "scaled"):
        assert left == (BARE if module_name == "odd" else set())
    else:
        other = {"twice.weight", "twice.bias", "act.weight"} | BARE if module_name == "odd" else set()
        assert left - {"table.weight"} == other
    again = dict(sampler.sample(Blueprint.from_module(make()), seed=1))
    assert all(torch.equal(again[name], tensor) for name, tensor in pairs.items())
    assert set(load_into(module, pairs.items())) == set(pairs)
    out = module(given)
    assert out.isfinite().all() and out.std() > 1e-9
    if method not in ("idinit", "zero"):
        assert any(not torch.equal(pairs[name], tensor) for name, tensor in sampler.sample(blueprint, seed=2))


@pytest.mark.parametrize("method", ["gpt2", "torchtitan", "idinit", "zero", "nanochat"])
def test_norms_and_biases_of_a_plain_module(method: str) -> None:
    for make, norms in ((cnn, {"1.weight", "4.weight"}), (mlp, {"2.weight"})):
        pairs = dict(SAMPLERS[method].sample(Blueprint.from_module(make())))
        assert {name for name, t in pairs.items() if t.ndim == 1 and (t == 1).all()} == norms
        assert all(not t.any() for name, t in pairs.items() if name.endswith("bias"))


def test_spreads_follow_the_fan_in_of_a_plain_module() -> None:
    net = nn.Sequential(nn.Conv2d(16, 64, 3), nn.Flatten(), nn.Linear(400, 64))
    for method, cut in (("olmo", 0.9866), ("nanochat", 1.0)):
        pairs = dict(SAMPLERS[method].sample(Blueprint.from_module(net)))
        assert abs(pairs["0.weight"].std() * math.sqrt(16 * 9) / cut - 1) < 0.03
        assert abs(pairs["2.weight"].std() * math.sqrt(400) / cut - 1) < 0.03


def test_torchs_encoder_layer_is_read_as_a_residual_block() -> None:
    """Silent writers: a pre-norm layer is the identity under ZerO; GPT-2's writers are divided by sqrt(2 L)."""
    module = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(32, 4, 48, norm_first=True), 2, enable_nested_tensor=False
    )
    blueprint = Blueprint.from_module(module)
    pairs = dict(GPT2().sample(blueprint))
    for name in ("self_attn.out_proj", "linear2"):
        assert abs(pairs[f"layers.1.{name}.weight"].std() / 0.01 - 1) < 0.08, name
    assert abs(pairs["layers.1.self_attn.in_proj_weight"].std() / 0.02 - 1) < 0.05
    zero = dict(Identity(scheme="zero").sample(blueprint))
    assert torch.equal(zero["layers.0.self_attn.in_proj_weight"], torch.eye(32).repeat(3, 1))
    load_into(module, zero.items())
    given = torch.randn(5, 2, 32)
    assert torch.equal(module.eval()(given), given)


def test_identity_convolutions_pass_their_input_on() -> None:
    given = torch.randn(2, 6, 9, 9)
    for groups in (1, 2, 6):
        conv = nn.Conv2d(6, 6, 3, padding=1, groups=groups)
        load_into(conv, Identity(scheme="zero").sample(Blueprint.from_module(conv)))
        assert torch.allclose(conv(given), given, atol=1e-6)


def test_the_default_of_a_plain_module_is_torchs_own() -> None:
    torch.manual_seed(0)
    reference, blueprint = encoder(), Blueprint.from_module(encoder())
    ours = dict(Default().sample(blueprint))
    for name, tensor in reference.named_parameters():
        if tensor.std() == 0:
            assert torch.equal(ours[name], tensor), name
        else:
            assert abs(ours[name].std() / tensor.std() - 1) < (0.06 if tensor.ndim > 1 else 0.35), name


def test_bare_parameters_keep_what_the_module_holds() -> None:
    module = Odd()
    load_into(module, Default().sample(Blueprint.from_module(module), seed=0))
    assert (module.scale == 0.1).all() and (module.token == 0.3).all()
    assert module.head.weight is module.table.weight
