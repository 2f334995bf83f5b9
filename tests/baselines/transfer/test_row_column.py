"""Row-column sampling: the digits table, the uncoupled control, and units pooled from several donors."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from baselines.transfer.row_column import RowColumn
from tests.support.shaken import CONFIGS, filled, logits
from tests.support.shaken import donor as shaken_donor
from tests.support.tiny import config, donor
from zoo.add import add
from zoo.donors.memory import load_into, zoo_of
from zoo.donors.standalone import single
from zoo.donors.store import Zoo
from zoo.errors import UserError
from zoo.targets.blueprint import Blueprint
from zoo.units.aligned import align

WIDTHS = (64, 128, 256, 512, 1024)


def mlp(width: int) -> nn.Sequential:
    first, second, last = nn.Linear(64, width), nn.Linear(width, width), nn.Linear(width, 10)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), last)


@pytest.fixture(scope="module")
def digits() -> tuple[Zoo, Tensor, Tensor]:
    """A trained 64-128-128-10 network, and the images and labels that are held out."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    held = torch.arange(len(x)) % 4 == 0
    torch.manual_seed(0)
    model = mlp(128)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3, fused=True)
    for _ in range(500):
        batch = torch.randint(int((~held).sum()), (128,))
        optimizer.zero_grad()
        F.cross_entropy(model(x[~held][batch]), y[~held][batch]).backward()
        optimizer.step()
    return zoo_of({"source": model}), x[held], y[held]


@torch.no_grad()
def accuracies(digits: tuple[Zoo, Tensor, Tensor], **options: str) -> dict[int, float]:
    """Width -> accuracy of the sampled networks, mean of five seeds; no training."""
    zoo, x, y = digits
    found = {}
    for width in WIDTHS:
        model = mlp(width)
        blueprint = Blueprint.from_module(model)
        sampler = RowColumn(noise=0.0, **options).fit(zoo, blueprint)  # type: ignore[arg-type]
        hits = []
        for seed in range(5):
            load_into(model, sampler.sample(blueprint, seed))
            hits.append((model(x).argmax(1) == y).float().mean().item())
        found[width] = sum(hits) / len(hits)
    return found


def test_the_digits_table(digits: tuple[Zoo, Tensor, Tensor]) -> None:
    """The table of the mean-field picture; its figures are of another network of the same shape (accuracy .982), so
    that small widths, where one draw differs from the next by .05, agree loosely."""
    zoo, x, y = digits
    module = zoo.members[0].module
    source = (module(x).argmax(1) == y).float().mean().item()
    assert source > 0.96
    balanced = accuracies(digits, scale="n/N")
    assert all(abs(balanced[width] - source) < 0.01 for width in WIDTHS[1:])
    assert 0.6 < balanced[64] < source - 0.05
    iid = accuracies(digits, sampling="iid", scale="n/N")
    shared = accuracies(digits, sampling="iid", scale="1/multiplicity")
    for found, table in ((iid, (0.57, 0.80, 0.90, 0.95, 0.97)), (shared, (0.64, 0.84, 0.96, 0.985, 0.98))):
        values = [found[width] for width in WIDTHS]
        assert all(b > a - 0.01 for a, b in itertools.pairwise(values))
        for value, expected, tolerance in zip(values, table, (0.2, 0.12, 0.04, 0.03, 0.03), strict=True):
            assert abs(value - expected) < tolerance
    assert all(shared[width] > iid[width] for width in WIDTHS)
    uncoupled = accuracies(digits, scale="n/N", coupling="uncoupled")
    assert all(0.05 < value < 0.2 for value in uncoupled.values())


def test_uncoupled_transfers_nothing(tmp_path: Path, shared_data: Path) -> None:
    """Not even at the donor's own shape or twice its size, where balanced maps keep the function."""
    import json

    from tokenizers import Tokenizer

    zoo = single(shared_data / "models" / "stories260K")
    text = (shared_data / "corpora" / "tinystories_sample.txt").read_text()[:8_000]
    tokenizer = Tokenizer.from_file(str(zoo.path / "tokenizer.json"))
    tokens = torch.tensor(tokenizer.encode(text).ids[: 4 * 256]).view(4, 256)
    same = json.loads((zoo.path / "config.json").read_text())
    twice = same | {"hidden_size": 128, "num_attention_heads": 16, "num_key_value_heads": 8, "intermediate_size": 344}
    for name, target in (("same", same), ("twice", twice)):
        for coupling, low, high in (("coupled", 1.5, 2.5), ("uncoupled", 6.0, 40.0)):
            folder = filled(tmp_path / f"{name}-{coupling}", RowColumn(coupling=coupling), zoo, target)
            model = LlamaForCausalLM.from_pretrained(folder)
            with torch.no_grad():
                assert low < model(tokens, labels=tokens).loss.item() < high


# --- several donors ---------------------------------------------------------------------------------------------


def twin(folder: Path, of: Path, seed: int) -> Path:
    """The same function in other coordinates: the residual stream rotated, the neurons in another order."""
    model = LlamaForCausalLM.from_pretrained(of).double()
    generator = torch.Generator().manual_seed(seed)
    width, ffn = model.config.hidden_size, model.config.intermediate_size
    turn = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64, generator=generator)).Q
    order = torch.randperm(ffn, generator=generator)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                p.copy_(turn.mT @ p)
            elif p.ndim == 2:
                p.copy_(p @ turn)
            if "gate" in name or "up_proj" in name:
                p.copy_(p[order])
            elif "down" in name:
                p.copy_(p[:, order])
    model.float().save_pretrained(folder)
    return folder


def zoo_of_folders(path: Path, *folders: Path) -> Zoo:
    add([str(folder) for folder in folders], path, quiet=True)
    return Zoo.open(path)


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    path = tmp_path_factory.mktemp("twins")
    first = donor(path / "first", 0)
    return zoo_of_folders(path / "zoo", first, twin(path / "second", first, 1))


@pytest.fixture(scope="module")
def strangers(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    """Two functions: GQA and MHA, 32 and 24 wide, 2 and 3 layers."""
    path = tmp_path_factory.mktemp("strangers")
    return zoo_of_folders(path / "zoo", donor(path / "a", 0), donor(path / "b", 1, hidden_size=24, kv=4, layers=3))


def shape(**sizes: Any) -> dict[str, Any]:
    return config().to_dict() | sizes


TWICE = {"intermediate_size": 80, "num_attention_heads": 8, "num_key_value_heads": 4}


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ({}, TWICE),
        ({"scale": "n/N"}, TWICE),
        ({"vocabulary": "mean"}, TWICE),
        ({"mix": "layers"}, {}),
        ({"mix": "layers", "scale": "n/N"}, TWICE),
        ({"depth": "silent"}, {**TWICE, "num_hidden_layers": 4}),
        ({}, {**TWICE, "hidden_size": 40}),
    ],
)
def test_a_pool_of_twins_is_their_function(
    tmp_path: Path, twins: Zoo, options: dict[str, str], sizes: dict[str, int]
) -> None:
    """Alignment finds that two donors are one; all units of both, halved, are its function again."""
    folder = filled(tmp_path / "out", RowColumn(pool="first,second", noise=0.0, **options), twins, shape(**sizes))  # type: ignore[arg-type]
    expected = logits(twins.path / "models" / "first")
    assert expected.std() > 0.1
    torch.testing.assert_close(logits(folder), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("scale", ["1/multiplicity", "n/N"])
def test_a_layer_of_a_pool_is_the_mean_of_its_donors_layers(strangers: Zoo, scale: str) -> None:
    """What neurons and heads write, as the sums over units of outer products that no order or copy changes."""
    target = shape(hidden_size=32, **TWICE | {"num_key_value_heads": 8})  # 40 neurons and 4 query heads of each donor
    blueprint = Blueprint.from_config(target)
    got = dict(RowColumn(pool="a,b", scale=scale, noise=0.0).fit(strangers, blueprint).sample(blueprint))
    aligned = {found.name: found for found in align(strangers)}

    def products(role: str) -> tuple[Zoo, Tensor, Tensor]:
        kind, reader, writer = {"mlp": ("neuron", 1, 2), "vo": ("vo", 0, 1)}[role]
        total = torch.zeros(32, 32)
        for name, layer in (("a", 1), ("b", 2)):  # the last one of each
            found = aligned[name]
            units = found.units[kind].unflatten(0, (found.metadata.layers, -1))[layer]
            padded = F.pad(units, (0, 32 - units.shape[-1]))
            total += padded[:, writer].mT @ padded[:, reader] / 2
        last = "model.layers.1."
        if role == "mlp":
            mine = got[f"{last}mlp.down_proj.weight"] @ got[f"{last}mlp.up_proj.weight"]
        else:
            mine = got[f"{last}self_attn.o_proj.weight"] @ got[f"{last}self_attn.v_proj.weight"]
        return mine * 32**0.5, total

    for role in ("mlp", "vo"):
        mine, expected = products(role)
        torch.testing.assert_close(mine, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
    for tensor in got.values():
        assert tensor.dtype == torch.float32
    vocab = next(found for found in aligned.values() if found.name == "a").units["vocab"]
    assert torch.equal(got["model.embed_tokens.weight"], vocab[:, 0])


def test_layers_of_a_pool_come_from_one_donor_each(strangers: Zoo) -> None:
    """Half of the layers of each, in an order that the seed draws."""
    blueprint = Blueprint.from_config(shape(num_hidden_layers=4))
    narrow = []  # b is 24 wide: what it reads of the other 8 coordinates is zero
    for seed in range(6):
        got = dict(RowColumn(pool="a,b", mix="layers", noise=0.0).fit(strangers, blueprint).sample(blueprint, seed))
        narrow.append(tuple(not got[f"model.layers.{i}.mlp.up_proj.weight"][:, 24:].any() for i in range(4)))
    assert all(sum(layers) == 2 for layers in narrow) and len(set(narrow)) > 2


def test_the_vocabulary_of_a_pool(strangers: Zoo, twins: Zoo) -> None:
    blueprint = Blueprint.from_config(shape())
    aligned = {found.name: found.units["vocab"][:, 0] for found in align(strangers)}
    second = F.pad(aligned["b"], (0, 8))
    for options, expected in (
        ({"pool": "a,b"}, aligned["a"]),
        ({"pool": "b,a"}, second),
        ({"pool": "a,b", "vocabulary": "mean"}, (aligned["a"] + second) / 2),
    ):
        got = dict(RowColumn(noise=0.0, **options).fit(strangers, blueprint).sample(blueprint))  # type: ignore[arg-type]
        torch.testing.assert_close(got["model.embed_tokens.weight"], expected)
    tied = Blueprint.from_config(shape(tie_word_embeddings=True))
    names = {name for name, _ in RowColumn(pool="2").fit(twins, tied).sample(tied)}
    assert names == set(tied.names)


def test_a_pool_by_number_takes_the_nearest_in_size(tmp_path: Path) -> None:
    folders = [
        donor(tmp_path / name, i, hidden_size=8 * (3 + i)) for i, name in enumerate(("small", "middle", "large"))
    ]
    gpt2 = tmp_path / "gpt2"
    shaken_donor(gpt2, CONFIGS["gpt2"])
    zoo = zoo_of_folders(tmp_path / "zoo", *folders, gpt2)
    blueprint = Blueprint.from_config(shape(hidden_size=40))
    sampler = RowColumn(pool="2").fit(zoo, blueprint)
    assert sampler.donors == sampler.reads(zoo, blueprint) == ("large", "middle")
    sampler.save(tmp_path / "saved")
    loaded = RowColumn.load(tmp_path / "saved")
    assert loaded.donors == sampler.donors
    expected = dict(sampler.sample(blueprint, seed=3))
    assert all(torch.equal(expected[name], tensor) for name, tensor in loaded.sample(blueprint, seed=3))
    assert set(expected) == set(blueprint.names)
    for pool, reason in {
        "4": "pool=4, and 3 donors of .* fit the target",
        "1": "is not several donors",
        "large,large": "is not several donors",
        "large,gpt2": "donor 'gpt2' does not fit the pool: gpt2: it uses LayerNorm",
        "large,huge": "unknown donor",
    }.items():
        for use in (RowColumn(pool=pool).reads, RowColumn(pool=pool).fit):
            with pytest.raises(UserError, match=reason):
                use(zoo, blueprint)
    with pytest.raises(UserError, match="head_dim 8 is not the target's 16"):
        RowColumn(pool="large,small").reads(zoo, Blueprint.from_config(shape(head_dim=16)))
    with pytest.raises(UserError, match="target: it uses LayerNorm"):
        RowColumn(pool="large,small").reads(zoo, Blueprint.from_config(CONFIGS["gpt2"]))


def save_tokenizer(folder: Path, tokens: list[str]) -> Path:
    from tokenizers import Tokenizer, models

    folder.mkdir(exist_ok=True)
    vocabulary = {token: i for i, token in enumerate(tokens)}
    Tokenizer(models.WordLevel(vocabulary, unk_token=tokens[0])).save(str(folder / "tokenizer.json"))
    return folder


def test_tokens_of_a_pool_are_matched_by_string(tmp_path: Path) -> None:
    """Tokens that both donors know, that one knows, that none knows; and donors that have no token in common."""
    words = [f"t{i}" for i in range(96)]
    a, b, c = (donor(tmp_path / name, i) for i, name in enumerate("abc"))
    for folder, tokens in ((a, words[:48]), (b, words[8:56]), (c, words[48:])):
        save_tokenizer(folder, tokens)
    zoo = zoo_of_folders(tmp_path / "zoo", a, b, c)
    target = str(save_tokenizer(tmp_path / "target", ["t2", "t30", "t50", "new"]))
    blueprint = Blueprint.from_config(shape(vocab_size=4))
    aligned = {found.name: found.units["vocab"][:, 0] for found in align(zoo)}
    sampler = RowColumn(pool="a,b", vocabulary="mean", tokenizer=target, noise=0.0).fit(zoo, blueprint)
    got = dict(sampler.sample(blueprint, seed=1))["model.embed_tokens.weight"]
    torch.testing.assert_close(got[0], aligned["a"][2])
    torch.testing.assert_close(got[1], (aligned["a"][30] + aligned["b"][22]) / 2)
    torch.testing.assert_close(got[2], aligned["b"][42])
    assert got[3].isfinite().all()
    first = RowColumn(pool="a,b", tokenizer=target, noise=0.0).fit(zoo, blueprint)
    embed = [dict(first.sample(blueprint, seed=seed))["model.embed_tokens.weight"] for seed in (1, 2)]
    torch.testing.assert_close(embed[0][:2], aligned["a"][[2, 30]])
    assert not torch.equal(embed[0][2:], embed[1][2:])
    with pytest.raises(UserError, match="'a' and 'c' share no token string"):
        RowColumn(pool="a,c", tokenizer=target).reads(zoo, blueprint)


def test_options_that_exclude_each_other() -> None:
    with pytest.raises(UserError, match="pool and donor exclude each other"):
        RowColumn(pool="2", donor="a")
    with pytest.raises(UserError, match="pool and coupling=uncoupled exclude"):
        RowColumn(pool="2", coupling="uncoupled")
    with pytest.raises(UserError, match="did you mean 'uncoupled'"):
        RowColumn(coupling="uncopled")
