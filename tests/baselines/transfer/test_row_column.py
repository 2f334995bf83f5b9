"""Row-column sampling: the digits table, the uncoupled control, and samplers saved by older versions."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from baselines.transfer.row_column import RowColumn
from tests.support.shaken import filled
from tests.support.tiny import config, donor
from zoo.donors.memory import load_into, zoo_of
from zoo.donors.zoo import Zoo, open_standalone
from zoo.errors import UserError
from zoo.targets.blueprint import Blueprint

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
    from tokenizers import Tokenizer

    zoo = open_standalone(shared_data / "models" / "stories260K")
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


def test_a_sampler_saved_with_the_options_of_a_pool_still_opens(tmp_path: Path) -> None:
    """Older versions saved `pool`, `mix` and `vocabulary`; without a pool the latter two said nothing."""
    blueprint = Blueprint.from_config(config().to_dict())
    donor(tmp_path / "donor", 0)
    sampler = RowColumn().fit(open_standalone(tmp_path / "donor"), blueprint)
    sampler.save(tmp_path / "saved")
    path = tmp_path / "saved" / "sampler.json"
    content = json.loads(path.read_text())
    del content["seal"]  # older samplers have none
    content["options"] |= {"pool": None, "mix": "units", "vocabulary": "first"}
    path.write_text(json.dumps(content))
    expected = dict(sampler.sample(blueprint, seed=3))
    loaded = dict(RowColumn.load(tmp_path / "saved").sample(blueprint, seed=3))
    assert all(torch.equal(expected[name], loaded[name]) for name in blueprint.names)
    content["options"]["pool"] = "a,b"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"mixes several donors \(pool\), which was removed; fit a new one"):
        RowColumn.load(tmp_path / "saved")


def test_a_word_that_is_misspelled_is_named() -> None:
    with pytest.raises(UserError, match="did you mean 'uncoupled'"):
        RowColumn(coupling="uncopled")
