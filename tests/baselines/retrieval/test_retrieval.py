"""Units of all donors chosen by a formula: the draws, what computes a donor's function, other shapes, refusals."""

from __future__ import annotations

import gc
import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from baselines.retrieval.bank import disagreement
from baselines.retrieval.choice import depth_distances, donor_distances, drawn_groups, drawn_order
from baselines.retrieval.sampler import Retrieval
from headstart import samplers
from tests.support.shaken import CONFIGS, build, donor, filled, logits
from tests.support.tiny import make_zoo
from tests.zoo.test_vocabularies import byte_level, sentencepiece, wordpiece
from zoo.donors.folder import StandaloneDonor
from zoo.donors.zoo import Zoo
from zoo.errors import UserError
from zoo.streams import stream
from zoo.targets.blueprint import Blueprint
from zoo.tensors import Metadata
from zoo.vocabularies.tokens import read_tokens

LLAMA = CONFIGS["llama"] | {"num_hidden_layers": 3, "num_key_value_heads": 4}
META = Metadata("llama", layers=3, width=32, heads=4, kv_heads=4, head_dim=8, ffn=48, vocab=60)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return donor(tmp_path_factory.mktemp("one") / "donor", LLAMA)


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    """Donors 32, 32 and 24 wide, one with as many KV heads as heads, without tokenizers."""
    return make_zoo(tmp_path_factory.mktemp("three"))


def same_function(got: Tensor, expected: Tensor, tolerance: float = 1e-4) -> bool:
    return bool((got - expected).abs().max() < tolerance * expected.std())


def test_probabilities_fall_with_the_distance() -> None:
    squared, bandwidth = torch.tensor([0.0, 0.5, 2.0, math.inf], dtype=torch.float64), 0.8
    orders = [drawn_order(squared, bandwidth, stream(seed, "draw")).tolist() for seed in range(4000)]
    expected = (-squared / (2 * bandwidth**2)).softmax(0)
    first = Counter(order[0] for order in orders)
    assert torch.allclose(torch.tensor([first[i] / 4000 for i in range(4)]).double(), expected, atol=0.025)
    second = Counter(order[1] for order in orders if order[0] == 0)  # without replacement
    assert second[1] / first[0] == pytest.approx(float(expected[1] / (1 - expected[0])), abs=0.03)
    assert all(sorted(order) == [0, 1, 2, 3] and order[3] == 3 for order in orders)
    assert drawn_order(torch.tensor([3.0, 1.0, 1.0]), 0.0, stream(0, "draw")).tolist() == [1, 2, 0], "the nearest first"


def test_distances_count_blocks_sizes_and_losses() -> None:
    assert depth_distances(3, 5).tolist() == [[0, 4, 16], [1, 1, 9], [4, 0, 4], [9, 1, 1], [16, 4, 0]]
    assert depth_distances(2, 1).tolist() == [[0.25, 0.25]] and depth_distances(1, 3).tolist() == [[1], [0], [1]]
    sources = [META, replace(META, width=64, layers=6, ffn=12), replace(META, heads=2, kv_heads=1)]
    assert donor_distances(sources, [None, None, None], META, None).tolist() == [0, 6, 5]
    assert donor_distances([META], [2.0], replace(META, rope_theta=1e6), None).tolist() == [4]
    assert donor_distances(sources, [2.0, 2.1, None], META, None).tolist() == pytest.approx([0, 7, 6]), "as the highest"
    assert donor_distances(sources, [2.0, 2.1, None], META, 2.2).tolist() == pytest.approx([4, 7, 6])
    one, other = {"a": torch.eye(2), "b": torch.ones(2, 2)}, {"a": 3 * torch.eye(2, 5), "c": torch.ones(2, 5)}
    pairs = [(one, one, 0), (one, other, 0), (one, {"a": torch.eye(2).flip(1)}, 1), (one, {"a": -torch.eye(2)}, 2)]
    for a, b, expected in [*pairs, (one, {"d": torch.ones(2, 2)}, 1)]:
        assert disagreement(a, b) == pytest.approx(expected, abs=1e-6)


def test_each_head_is_taken_once_before_any_is_repeated(one: Zoo) -> None:
    orders = [drawn_groups(6, n, 0.5, stream(seed, "heads")).tolist() for seed in range(20) for n in (2, 6, 9)]
    assert all(sorted(order) == list(range(6)) for order in orders) and len(set(map(tuple, orders))) > 5
    assert drawn_groups(6, 4, 0.0, stream(0, "heads")).tolist() == list(range(6)), "the heads of most energy"
    target = Blueprint.from_config(LLAMA | {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 6})
    found = dict(Retrieval(noise=0.0, bandwidth=0.5).fit(one, target).sample(target, 1))
    heads = found["model.layers.1.self_attn.k_proj.weight"].unflatten(0, (6, 8))
    assert len(heads[:4].unique(dim=0)) == 4 and torch.equal(heads[4:], heads[:2]), (
        "four heads of the donor, then again"
    )


@pytest.mark.parametrize(
    ("donor_config", "target", "tolerance"),
    [
        ({}, {}, 1e-4),
        ({"num_key_value_heads": 2}, {"num_key_value_heads": 2}, 1e-4),
        ({"tie_word_embeddings": True}, {}, 1e-4),
        ({}, {"num_attention_heads": 8, "num_key_value_heads": 8, "intermediate_size": 101}, 1e-4),
        ({"num_key_value_heads": 2}, {"num_attention_heads": 16, "num_key_value_heads": 4}, 1e-4),
        ({}, {"hidden_size": 40}, 1e-3),  # the norm's eps has more weight
        ({}, {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 6}, 1e-3),
    ],
    ids=["own shape", "shared keys", "tied donor", "more units", "more groups", "wider", "wider with more heads"],
)
def test_one_donor_without_noise_computes_its_function(
    tmp_path: Path, donor_config: dict[str, Any], target: dict[str, Any], tolerance: float
) -> None:
    """At its own shape, and at shapes of the same depth with more of everything."""
    zoo = donor(tmp_path / "donor", LLAMA | donor_config)
    for seed in range(2):
        folder = filled(tmp_path / f"{seed}", Retrieval(noise=0.0), zoo, LLAMA | target, seed)
        assert same_function(logits(folder), logits(tmp_path / "donor"), tolerance)


def test_blocks_that_are_repeated_share_their_output(one: Zoo) -> None:
    target = Blueprint.from_config(LLAMA | {"num_hidden_layers": 5})  # of three blocks
    sampler = Retrieval(noise=0.0, bandwidth=0.0).fit(one, target)
    found = dict(sampler.sample(target, 0))
    for layer, (block, copies) in enumerate([(0, 2), (0, 2), (1, 2), (1, 2), (2, 1)]):
        units = sampler._bank.members[0].block(block)
        names = (f"model.layers.{layer}.mlp.down_proj.weight", f"model.layers.{layer}.self_attn.o_proj.weight")
        for name, written in zip(names, (units["neuron"][:, 2], units["vo"][:, 1]), strict=True):
            assert torch.equal(found[name], written.mT / copies)
        torch.testing.assert_close(found[names[0].replace("down", "up")], units["neuron"][:, 1] / 32**0.5)


def test_blocks_come_from_donors_that_agree(tmp_path: Path) -> None:
    """Two independent donors and a copy of one with noise: blocks of the copy may stand beside those of the donor."""
    donors = [donor(tmp_path / name, LLAMA, seed).donors[0] for name, seed in (("first", 0), ("other", 1))]
    copy = build(LLAMA, 0)
    with torch.no_grad():
        for parameter in copy.parameters():
            parameter.add_(1e-3 * torch.randn_like(parameter))
    copy.save_pretrained(tmp_path / "copy")
    target = Blueprint.from_config(LLAMA | {"num_hidden_layers": 12})
    zoo = Zoo.of_donors([*donors, StandaloneDonor.open(tmp_path / "copy", quiet=True)])
    sampler = Retrieval().fit(zoo, target)
    names = [member.donor.name for member in sampler._bank.members]
    between = sampler._bank.disagreement[names.index("first")]
    assert between[names.index("first")] < 1e-6 and between[names.index("copy")] < 0.01 < 0.3 < between.max()
    drawn = [sampler._draw_blocks(between / 0.25**2, target.metadata, seed) for seed in range(5)]  # type: ignore[arg-type]
    taken = Counter(block.donor.donor.name for blocks in drawn for block in blocks)
    assert set(taken) == {"first", "copy"} and min(taken.values()) > 15, "of sixty blocks"


def test_a_narrower_target_keeps_the_axes_that_are_used(tmp_path: Path) -> None:
    """A donor of 24 coordinates that was grown to 40 is cut back to its own function."""
    small = LLAMA | {"hidden_size": 24}
    zoo = donor(tmp_path / "small", small)
    grown = filled(tmp_path / "grown", Retrieval(noise=0.0), zoo, LLAMA | {"hidden_size": 40})
    wide = Zoo.of_donors([StandaloneDonor.open(grown, quiet=True)])
    again = filled(tmp_path / "again", Retrieval(noise=0.0), wide, small)
    assert same_function(logits(again), logits(tmp_path / "small"), 1e-3)


def test_noise_is_relative_to_each_vector(one: Zoo) -> None:
    target = Blueprint.from_config(LLAMA | {"hidden_size": 48})
    exact, noisy = (dict(Retrieval(noise=noise).fit(one, target).sample(target, 3)) for noise in (0.0, 0.2))
    for name in ("model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight"):
        scale = exact[name].square().mean(1, keepdim=True).mul(48 / 32).sqrt()  # RMS over the donor's coordinates
        change = (noisy[name] - exact[name]) / scale
        assert float(change.std()) == pytest.approx(0.2, rel=0.05) and abs(float(change.mean())) < 0.02
        assert float(noisy[name][:, 32:].abs().min()) > 0 == float(exact[name][:, 32:].abs().max())


def test_the_same_bytes_whatever_the_order_of_donors(three: Zoo) -> None:
    target = Blueprint.from_config(dict(three.donors[0].config) | {"num_hidden_layers": 5, "hidden_size": 28})
    found = []
    for donors in (three.donors, three.donors[::-1]):
        sampler = Retrieval(bandwidth=2.0).fit(Zoo.of_donors(donors), target)
        values, tensors = sampler.state()
        again = Retrieval(bandwidth=2.0)
        again.restore(json.loads(json.dumps(values)), tensors)
        again.only = frozenset(name for name in target.names if "layers.3." in name)  # a share of several processes
        found += [dict(sampler.sample(target, 0)), dict(again.sample(target, 0))]
        other = dict(sampler.sample(target, 1))
    names = {name for name in target.names if "layers.3." in name}
    assert all(torch.equal(found[0][name], tensors[name]) for tensors in found for name in names)
    assert all(torch.equal(found[0][name], found[2][name]) for name in target.names)
    assert not torch.equal(found[0]["lm_head.weight"], other["lm_head.weight"])
    assert (
        sampler.details(target) == {}
        and set(sampler.donors) == {d.name for d in three.donors}
        and len(sampler.provenance(three)) == 3
    )
    assert all(record["sha256"] and record["license"] for record in sampler.provenance(three))


@pytest.mark.parametrize(
    "shape",
    [
        {"num_hidden_layers": 5},
        {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 20},
        {"hidden_size": 48, "num_attention_heads": 8, "num_key_value_heads": 2},
        {"hidden_size": 28, "num_key_value_heads": 1, "tie_word_embeddings": True},
        {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None},
    ],
    ids=["deeper", "narrower", "wider", "tied", "mistral"],
)
def test_targets_of_other_shapes_load(three: Zoo, tmp_path: Path, shape: dict[str, Any]) -> None:
    target = dict(three.donors[0].config) | shape
    for seed in range(2):
        found = logits(filled(tmp_path / f"{seed}", Retrieval(), three, target, seed))
        assert bool(found.isfinite().all()) and float(found.std()) > 0.01


def test_a_token_comes_from_the_first_drawn_donor_that_has_it(tmp_path: Path) -> None:
    """Two tokenizers; the target has that of the donor that is drawn second, and a token that neither has."""
    sizes = {"sentencepiece": 280, "bytes": 13}
    for name, write in (("sentencepiece", sentencepiece), ("bytes", byte_level)):
        donor(tmp_path / name, LLAMA | {"vocab_size": sizes[name]}, seed=sizes[name])
        write(tmp_path / name)
        (tmp_path / name / "facts.json").write_text(json.dumps({"loss": 1.0 if name == "sentencepiece" else 2.0}))
    zoo = Zoo.of_donors(StandaloneDonor.open(tmp_path / name, quiet=True) for name in sizes)
    target = Blueprint.from_config(LLAMA | {"vocab_size": 14})  # one row of padding
    sampler = Retrieval(noise=0.0, bandwidth=0.0, tokenizer=str(tmp_path / "bytes")).fit(zoo, target)
    embed = dict(sampler.sample(target, 0))["model.embed_tokens.weight"]
    tables = {member.donor.name: member.vocabulary()[:, 0] for member in sampler._bank.members}
    old, new = (read_tokens(tmp_path / name).ids for name in sizes)
    assert torch.equal(embed[new["Ġthe"]], tables["sentencepiece"][old["▁the"]]), "both have it: from the lower loss"
    assert torch.equal(embed[new["Ġthere"]], tables["bytes"][new["Ġthere"]]), "only the second has it"
    expected = {"rule": "mean", "tokens": 14, "copied": 13}
    assert sampler.details(target) == {"vocabulary": expected}, "the rest is padding"
    assert 0.3 < float(embed[13].std() / tables["sentencepiece"].std()) < 3, "padding is drawn"


def test_a_donor_in_other_coordinates_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Two donors whose tokens have nothing in common cannot be aligned."""
    for name, write, size, width in (("bytes", byte_level, 13, 32), ("words", wordpiece, 14, 24)):
        donor(tmp_path / name, LLAMA | {"vocab_size": size, "hidden_size": width})
        write(tmp_path / name)
    zoo = Zoo.of_donors(StandaloneDonor.open(tmp_path / name, quiet=True) for name in ("bytes", "words"))
    target = Blueprint.from_config(LLAMA | {"vocab_size": 13})
    sampler = Retrieval(tokenizer=str(tmp_path / "bytes"))
    assert sampler.planned_donors(zoo, target) == ("bytes", "words")
    assert sampler.fit(zoo, target).donors == ("bytes",)
    assert "retrieval: left out, because damaged or without a token of bytes: words" in caplog.text


def test_no_vocabulary_stays_in_memory(tmp_path: Path) -> None:
    zoo = make_zoo(tmp_path, [{"hidden_size": width, "vocab_size": 3000} for width in (32, 24)])
    target = Blueprint.from_config(dict(zoo.donors[0].config))
    sampler = Retrieval().fit(zoo, target)
    gc.collect()
    held = [o for o in gc.get_objects() if type(o) is Tensor and o.ndim >= 2 and 3000 in o.shape]
    assert len(sampler.donors) == 2 and not held


REFUSED = [
    ({}, CONFIGS["gpt2"], "retrieval: the target: it uses LayerNorm, so units do not describe its whole function"),
    ({}, CONFIGS["qwen2"], "retrieval: the target: it has biases"),
    (CONFIGS["qwen3"], {}, "retrieval: donor 'donor': its norms at k, q do not fold into readers"),
    ({}, {"head_dim": 16}, "donor 'donor': head_dim 8 is not the target's 16, and heads stay whole"),
    ({}, {"vocab_size": 61}, "donor 'donor': vocab 60 is not the target's 61"),
]


@pytest.mark.parametrize(("donor_config", "target", "message"), REFUSED)
def test_what_cannot_be_filled_is_refused(
    tmp_path: Path, donor_config: dict[str, Any], target: dict[str, Any], message: str
) -> None:
    """Before any weight is read."""
    zoo = donor(tmp_path / "donor", donor_config or LLAMA)
    blueprint = Blueprint.from_config(target if "model_type" in target else LLAMA | target)
    for call in (Retrieval().planned_donors, Retrieval().fit):
        with pytest.raises(UserError) as raised:
            call(zoo, blueprint)
        assert message in str(raised.value) and "\n" not in str(raised.value)


def test_no_donors_are_refused(one: Zoo) -> None:
    blueprint = Blueprint.from_config(LLAMA)
    with pytest.raises(UserError, match=r"^retrieval needs donors: give --zoo DIR, or --donor FOLDER$"):
        Retrieval().fit(None, blueprint)
    with pytest.raises(UserError, match=r"^unknown donor in .*known: donor$"):
        Retrieval(donor="nothing").fit(one, blueprint)
    with pytest.raises(UserError, match="noise is -1"):
        Retrieval(noise=-1.0)
    assert samplers.get("retrieval") is Retrieval and "model" not in Retrieval.needs
