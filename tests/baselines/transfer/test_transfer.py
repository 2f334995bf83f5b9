"""Weight selection and row-column sampling against loops, exact symmetries and real donors."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from baselines.distributions.matrix_normal import MatrixNormal
from baselines.transfer.row_column import RowColumn
from baselines.transfer.shrinking.sliced import Sliced
from baselines.transfer.weight_selection import WeightSelection
from tests.support.shaken import CONFIGS, donor, filled, logits
from zoo.add import add
from zoo.donors.donor import size_gap
from zoo.donors.zoo import Zoo, open_standalone
from zoo.errors import UserError
from zoo.sampler import Sampler
from zoo.targets.blueprint import Blueprint

EXACT = list(CONFIGS)
GPT2_NAMES = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}


def grown(name: str, **sizes: int) -> dict[str, Any]:
    """A config of CONFIGS with other sizes, whatever its names for them; head_dim stays."""
    config = dict(CONFIGS[name])
    for key, value in sizes.items():
        if name == "gpt2":
            key = GPT2_NAMES.get(key, key)
        key = "ffn_dim" if name == "opt" and key == "intermediate_size" else key
        if key in config or key == "n_inner":
            config[key] = value
    if name == "opt":
        config["word_embed_proj_dim"] = config["hidden_size"]
    return config


@pytest.mark.parametrize("name", EXACT)
def test_the_same_shape_is_the_donor_itself(tmp_path: Path, name: str) -> None:
    zoo = donor(tmp_path / "donor", CONFIGS[name])
    same = logits(filled(tmp_path / "same", WeightSelection(), zoo, CONFIGS[name]))
    assert torch.equal(same, logits(zoo.path))


@pytest.mark.parametrize("name", EXACT)
def test_twice_the_size_is_the_same_function(tmp_path: Path, name: str) -> None:
    """Residual stream, heads, KV heads, FFN and depth doubled: readers divide by the multiplicity, norms see the same
    energy, a tied head takes the scale from the norm before it, Gemma's embedding scale is undone, new layers are
    silent."""
    zoo = donor(tmp_path / "donor", CONFIGS[name])
    target = grown(
        name, hidden_size=64, intermediate_size=96, num_attention_heads=8, num_key_value_heads=4, num_hidden_layers=4
    )
    wide = filled(tmp_path / "wide", RowColumn(noise=0.0, depth="silent"), zoo, target)
    expected = logits(zoo.path)
    assert expected.std() > 0.1
    torch.testing.assert_close(logits(wide), expected, rtol=1e-4, atol=1e-4)


def test_untied_from_tied_and_mha_from_gqa_keep_the_function(tmp_path: Path) -> None:
    zoo = donor(tmp_path / "donor", CONFIGS["llama-tied"])
    target = CONFIGS["llama-tied"] | {"tie_word_embeddings": False, "num_key_value_heads": 4, "hidden_size": 64}
    wide = filled(tmp_path / "wide", RowColumn(noise=0.0), zoo, target)
    torch.testing.assert_close(logits(wide), logits(zoo.path), rtol=1e-4, atol=1e-4)


def select(w: np.ndarray, *axes: list[int]) -> np.ndarray:
    """The published selection on one array, one loop per entry."""
    out = np.empty([len(a) for a in axes], dtype=w.dtype)
    for place in np.ndindex(out.shape):
        out[place] = w[tuple(axis[i] for axis, i in zip(axes, place, strict=True))]
    return out


def test_weight_selection_on_a_gqa_llama_is_the_published_rule(tmp_path: Path) -> None:
    config = CONFIGS["llama"] | {"num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 3}
    zoo = donor(tmp_path / "donor", config)
    small = config | {
        "hidden_size": 20, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 4,
        "num_hidden_layers": 2,
    }  # fmt: skip
    blueprint = Blueprint.from_config(small)
    got = dict(WeightSelection().fit(zoo, blueprint).sample(blueprint))

    def w(name: str) -> np.ndarray:
        return zoo.donors[0].read(name).numpy()

    residual = [0, 2, 3, 5, 7, 8, 10, 11, 13, 15, 16, 18, 20, 21, 23, 24, 26, 28, 29, 31]  # 32 -> 20
    ffn = list(range(0, 48, 2))
    within = [0, 2, 4, 6]  # 8 -> 4: pairs (0, 4) and (2, 6) stay pairs
    keys = [8 * head + i for head in (0, 2) for i in within]  # KV heads 0 and 2 of 4
    queries = [8 * head + i for head in (0, 4) for i in within]  # of each, the first of its two query heads
    layer = "model.layers.1."
    everything = list(range(60))
    for name, axes in {
        "model.embed_tokens.weight": (everything, residual),
        "lm_head.weight": (everything, residual),
        "model.norm.weight": (residual,),
        f"{layer}input_layernorm.weight": (residual,),
        f"{layer}self_attn.q_proj.weight": (queries, residual),
        f"{layer}self_attn.k_proj.weight": (keys, residual),
        f"{layer}self_attn.v_proj.weight": (keys, residual),
        f"{layer}self_attn.o_proj.weight": (residual, queries),
        f"{layer}mlp.gate_proj.weight": (ffn, residual),
        f"{layer}mlp.up_proj.weight": (ffn, residual),
        f"{layer}mlp.down_proj.weight": (residual, ffn),
    }.items():
        np.testing.assert_array_equal(got[name].numpy(), select(w(name), *axes), err_msg=name)
    assert set(got) == set(blueprint.names)


def test_weight_selection_of_fused_transposed_tensors(tmp_path: Path) -> None:
    """GPT-2's c_attn is [in, 3 out]: queries, keys and values are selected apart, by whole heads."""
    zoo = donor(tmp_path / "donor", CONFIGS["gpt2"])
    small = grown("gpt2", hidden_size=16, num_attention_heads=2) | {"n_positions": 20}
    blueprint = Blueprint.from_config(small)
    got = dict(WeightSelection().fit(zoo, blueprint).sample(blueprint))
    heads = [*range(8), *range(16, 24)]  # heads 0 and 2 of 4
    columns = [part * 32 + row for part in range(3) for row in heads]
    every_second = list(range(0, 32, 2))
    fused = zoo.donors[0].read("transformer.h.0.attn.c_attn.weight").numpy()
    bias = zoo.donors[0].read("transformer.h.0.attn.c_attn.bias").numpy()
    np.testing.assert_array_equal(got["transformer.h.0.attn.c_attn.weight"], select(fused, every_second, columns))
    np.testing.assert_array_equal(got["transformer.h.0.attn.c_attn.bias"], select(bias, columns))
    positions = zoo.donors[0].read("transformer.wpe.weight").numpy()
    np.testing.assert_array_equal(got["transformer.wpe.weight"], select(positions, list(range(20)), every_second))


def test_experts_are_selected_with_their_rows_of_the_router(tmp_path: Path) -> None:
    zoo = donor(tmp_path / "donor", CONFIGS["mixtral"])
    blueprint = Blueprint.from_config(CONFIGS["mixtral"] | {"num_local_experts": 2, "intermediate_size": 24})
    got = dict(WeightSelection().fit(zoo, blueprint).sample(blueprint))
    assert set(blueprint.names) == set(got)
    name = "model.layers.1.block_sparse_moe.experts.{}.w2.weight"
    assert torch.equal(got[name.format(1)], zoo.donors[0].read(name.format(2))[:, ::2])
    router = "model.layers.1.block_sparse_moe.gate.weight"
    assert torch.equal(got[router], zoo.donors[0].read(router)[::2])


def test_one_residual_index_set_unless_asked_otherwise(tmp_path: Path) -> None:
    zoo = donor(tmp_path / "donor", CONFIGS["llama"])
    blueprint = Blueprint.from_config(CONFIGS["llama"] | {"hidden_size": 16})
    gains = [name for name in blueprint.names if name.endswith("norm.weight")]

    def chosen(variant: str) -> set[tuple[int, ...]]:
        got = dict(WeightSelection(variant=variant).fit(zoo, blueprint).sample(blueprint, seed=1))
        found = set()
        for name in gains:
            places = {value: i for i, value in enumerate(zoo.donors[0].read(name).tolist())}
            found.add(tuple(places[value] for value in got[name].tolist()))
        return found

    assert chosen("uniform") == {tuple(range(0, 32, 2))}
    assert chosen("consecutive") == {tuple(range(16))}
    assert len(chosen("random")) == 1
    assert len(chosen("random-inconsistent")) == len(gains)


def test_layers_first_or_even(tmp_path: Path) -> None:
    zoo = donor(tmp_path / "donor", CONFIGS["llama"] | {"num_hidden_layers": 5})
    blueprint = Blueprint.from_config(CONFIGS["llama"] | {"num_hidden_layers": 3})
    name = "model.layers.{}.mlp.up_proj.weight"
    for layers, expected in (("first", (0, 1, 2)), ("even", (0, 2, 4))):
        got = dict(WeightSelection(layers=layers).fit(zoo, blueprint).sample(blueprint))
        assert all(torch.equal(got[name.format(i)], zoo.donors[0].read(name.format(e))) for i, e in enumerate(expected))


def save_tokenizer(folder: Path, tokens: list[str]) -> Path:
    from tokenizers import Tokenizer, models

    folder.mkdir(exist_ok=True)
    vocabulary = {token: i for i, token in enumerate(tokens)}
    Tokenizer(models.WordLevel(vocabulary, unk_token=tokens[0])).save(str(folder / "tokenizer.json"))
    return folder


def test_other_tokenizers_are_matched_by_string(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokens = [f"t{i}" for i in range(60)]
    donor(tmp_path / "donor", CONFIGS["llama"])
    zoo = open_standalone(save_tokenizer(tmp_path / "donor", tokens))
    target = save_tokenizer(tmp_path / "target", ["t7", "new", *tokens[20:58]])
    blueprint = Blueprint.from_config(CONFIGS["llama"] | {"vocab_size": 40})
    caplog.set_level(logging.INFO)
    sampler = WeightSelection(tokenizer=str(target)).fit(zoo, blueprint)
    assert "39 of 40 tokens are in the donor's vocabulary; the other 1 rows" in caplog.text
    got = dict(sampler.sample(blueprint, seed=0))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        table = zoo.donors[0].read(name)
        assert torch.equal(got[name][[0, *range(2, 40)]], table[[7, *range(20, 58)]])
        assert (got[name][1] - table.mean(0)).abs().max() < 6 * table.std(0).max()
        assert not torch.equal(got[name][1], dict(sampler.sample(blueprint, seed=1))[name][1])

    foreign = save_tokenizer(tmp_path / "foreign", [f"x{i}" for i in range(40)])
    with pytest.raises(UserError, match="shares no token"):
        WeightSelection(tokenizer=str(foreign)).fit(zoo, blueprint)
    with pytest.raises(UserError, match="vocab 60 is not the target's 40"):
        WeightSelection().fit(zoo, blueprint)


@pytest.mark.parametrize("vocab", [58, 60, 96])
def test_a_padded_vocabulary_without_a_tokenizer_takes_the_donors(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, vocab: int
) -> None:
    """50 tokens, in a donor with 60 rows: a target with other padding has the same tokens in the same rows."""
    donor(tmp_path / "donor", CONFIGS["llama"])
    zoo = open_standalone(save_tokenizer(tmp_path / "donor", [f"t{i}" for i in range(50)]))
    blueprint = Blueprint.from_config(CONFIGS["llama"] | {"vocab_size": vocab})
    caplog.set_level(logging.INFO)
    got = dict(WeightSelection().fit(zoo, blueprint).sample(blueprint))
    assert ("it is taken to have the donor's, with rows of padding" in caplog.text) == (vocab != 60)
    table = zoo.donors[0].read("model.embed_tokens.weight")
    rows = min(vocab, 60)
    assert torch.equal(got["model.embed_tokens.weight"][:rows], table[:rows])
    drawn = got["model.embed_tokens.weight"][rows:]
    assert ((drawn - table.mean(0)).abs() < 6 * table.std(0).max()).all()


@pytest.mark.parametrize("vocab", [49, 50 + 1025])
def test_a_vocabulary_that_is_not_the_donors_with_padding_needs_a_tokenizer(tmp_path: Path, vocab: int) -> None:
    donor(tmp_path / "donor", CONFIGS["llama"])
    zoo = open_standalone(save_tokenizer(tmp_path / "donor", [f"t{i}" for i in range(50)]))
    with pytest.raises(UserError, match=f"vocab 60 is not the target's {vocab}, .*give the target's --tokenizer"):
        WeightSelection().fit(zoo, Blueprint.from_config(CONFIGS["llama"] | {"vocab_size": vocab}))


def test_a_donor_of_the_same_vocabulary_comes_before_one_with_padding(tmp_path: Path) -> None:
    sources = []
    for name, vocab in (("larger", 96), ("own", 60)):
        donor(tmp_path / name, CONFIGS["llama"] | {"vocab_size": vocab, "hidden_size": 32 if name == "larger" else 64})
        sources.append(str(save_tokenizer(tmp_path / name, [f"t{i}" for i in range(50)])))
    add(sources, tmp_path / "zoo", quiet=True)
    blueprint = Blueprint.from_config(CONFIGS["llama"])
    assert WeightSelection().planned_donors(Zoo.open(tmp_path / "zoo"), blueprint) == ("own",)


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"hidden_size": 64}, "width 32 is smaller than the target's 64"),
    ("llama", {"intermediate_size": 64}, "ffn 48 is smaller than the target's 64"),
    ("llama", {"num_key_value_heads": 4}, "kv_heads 2 is smaller than the target's 4"),
    ("llama", {"num_key_value_heads": 1}, "heads per KV head 2 is smaller than the target's 4"),
    ("llama", {"head_dim": 6}, "head_dim 8 must be a whole multiple of the target's 6"),
    ("llama", {"vocab_size": 61}, "vocab 60 is not the target's 61"),
    ("llama", {"attention_bias": True}, "the target has attn.k bias and the donor has none"),
    ("llama", {"model_type": "qwen3"}, r"the target has norm weight \(k\) and the donor has none"),
    ("qwen3", {"model_type": "llama"}, r"the donor has norm weight \(k\) and the target has none"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "reason"), REFUSED)
def test_a_donor_that_does_not_fit_is_refused_by_axis_and_sizes(
    tmp_path: Path, name: str, changes: dict[str, Any], reason: str
) -> None:
    zoo = donor(tmp_path / "donor", CONFIGS[name])
    with pytest.raises(UserError, match=reason):
        WeightSelection().fit(zoo, Blueprint.from_config(CONFIGS[name] | changes))


@pytest.mark.parametrize("sampler", [WeightSelection(), Sliced(), MatrixNormal()])
def test_the_error_names_the_most_similar_donor(tmp_path: Path, sampler: Sampler) -> None:
    """Not of a GPT-2 of the target's size, which lacks ten kinds of tensors, but of the smaller Llama."""
    configs = {"a-gpt2": CONFIGS["gpt2"], "llama": CONFIGS["llama"]}
    members = tuple(donor(tmp_path / name, config).donors[0] for name, config in configs.items())
    zoo = Zoo.of_donors(members, tmp_path)
    target = Blueprint.from_config(CONFIGS["llama"] | {"hidden_size": 64, "head_dim": 6})
    assert size_gap(members[0], target) < size_gap(members[1], target)
    with pytest.raises(UserError, match=r"'.*llama'.*(smaller than the target's 64|head_dim 8)") as caught:
        sampler.fit(zoo, target)
    assert "gpt2" not in str(caught.value)


def test_a_larger_head_is_refused_by_growth_too(tmp_path: Path) -> None:
    zoo = donor(tmp_path / "donor", CONFIGS["llama"])
    with pytest.raises(UserError, match="head_dim 8 must be a whole multiple of the target's 16"):
        RowColumn().fit(zoo, Blueprint.from_config(CONFIGS["llama"] | {"head_dim": 16}))


def test_wider_repeat_grows_a_target_that_refuse_rejects(tmp_path: Path) -> None:
    zoo = donor(tmp_path / "donor", CONFIGS["llama"])
    target = CONFIGS["llama"] | {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4}
    wide = filled(tmp_path / "wide", WeightSelection(wider="repeat"), zoo, target)
    torch.testing.assert_close(logits(wide), logits(zoo.path), rtol=1e-4, atol=1e-4)


def test_statistics_of_uneven_growth(tmp_path: Path) -> None:
    """iid sampling and the scales of the mean-field limit do what they say, seen on one matrix."""
    zoo = donor(tmp_path / "donor", CONFIGS["llama"])
    target = CONFIGS["llama"] | {"hidden_size": 48}
    blueprint = Blueprint.from_config(target)
    up = "model.layers.0.mlp.up_proj.weight"
    scaled = {}
    for scale in ("1/multiplicity", "n/N", "sqrt(n/N)", "none"):
        got = dict(RowColumn(noise=0.0, scale=scale).fit(zoo, blueprint).sample(blueprint, seed=3))
        scaled[scale] = got[up]
    ratio = 32 / 48
    torch.testing.assert_close(scaled["n/N"], scaled["none"] * ratio)
    torch.testing.assert_close(scaled["sqrt(n/N)"], scaled["none"] * ratio**0.5)
    # divided by multiplicity, what a constant stream gives stays what it was
    assert torch.allclose(
        scaled["1/multiplicity"].sum(1).sort().values, zoo.donors[0].read(up).sum(1).sort().values, atol=1e-4
    )
    iid = dict(RowColumn(noise=0.0, sampling="iid", scale="none").fit(zoo, blueprint).sample(blueprint))
    columns = torch.unique(iid["model.norm.weight"])
    assert len(columns) < 32  # some coordinates are never drawn


def test_noise_is_relative_and_seeded(tmp_path: Path) -> None:
    zoo = donor(tmp_path / "donor", CONFIGS["llama"])
    blueprint = Blueprint.from_config(CONFIGS["llama"])
    clean = dict(RowColumn(noise=0.0).fit(zoo, blueprint).sample(blueprint))
    noisy = dict(RowColumn(noise=0.1).fit(zoo, blueprint).sample(blueprint, seed=1))
    again = dict(RowColumn(noise=0.1).fit(zoo, blueprint).sample(blueprint, seed=1))
    for name, tensor in clean.items():
        assert torch.equal(noisy[name], again[name])
        if tensor.ndim == 1:
            assert torch.equal(noisy[name], tensor)
        else:
            assert abs((noisy[name] - tensor).std() / (0.1 * tensor.std()) - 1) < 0.1


@pytest.mark.parametrize("cls", [WeightSelection, RowColumn])
def test_a_fitted_sampler_is_saved_and_loaded(tmp_path: Path, cls: type) -> None:
    zoo = donor(tmp_path / "donor", CONFIGS["llama"])
    blueprint = Blueprint.from_config(CONFIGS["llama"] | {"hidden_size": 16})
    sampler = cls().fit(zoo, blueprint)
    sampler.save(tmp_path / "saved")
    loaded = cls.load(tmp_path / "saved")
    expected = dict(sampler.sample(blueprint, seed=5))
    assert all(torch.equal(expected[name], tensor) for name, tensor in loaded.sample(blueprint, seed=5))
    donor(tmp_path / "donor", CONFIGS["llama"], seed=1)  # other weights in the same place
    with pytest.raises(UserError, match="is not the donor"):
        cls.load(tmp_path / "saved")


def test_unknown_words_in_options_are_refused() -> None:
    with pytest.raises(UserError, match="did you mean 'uniform'"):
        WeightSelection(variant="unifrom")
    with pytest.raises(UserError, match="known: 1/multiplicity, n/N"):
        RowColumn(scale="N/n")


def loss(folder: Path, tokens: torch.Tensor) -> float:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        return model(tokens, labels=tokens).loss.item()


def resized(zoo: Zoo, **changes: Any) -> dict[str, Any]:
    return json.loads((zoo.path / "config.json").read_text()) | changes


@pytest.fixture(scope="module")
def stories(shared_data: Path) -> Zoo:
    """A really trained donor: 64 wide, 5 layers, 8 heads on 4 KV heads."""
    return open_standalone(shared_data / "models" / "stories260K")


@pytest.fixture(scope="module")
def tokens(shared_data: Path) -> torch.Tensor:
    """[4, 256] of text of the kind that it was trained on."""
    from tokenizers import Tokenizer

    text = (shared_data / "corpora" / "tinystories_sample.txt").read_text()[:20_000]
    tokenizer = Tokenizer.from_file(str(shared_data / "models" / "stories260K" / "tokenizer.json"))
    return torch.tensor(tokenizer.encode(text).ids[: 4 * 256]).view(4, 256)


def test_row_column_keeps_the_loss(tmp_path: Path, stories: Zoo, tokens: torch.Tensor) -> None:
    twice = resized(stories, hidden_size=128, num_attention_heads=16, num_key_value_heads=8, intermediate_size=344)
    uneven = resized(stories, hidden_size=96, num_attention_heads=12, num_key_value_heads=6, intermediate_size=256)
    before = loss(stories.path, tokens)
    assert before < 2.2
    exact = loss(filled(tmp_path / "twice", RowColumn(noise=0.0), stories, twice), tokens)
    assert abs(exact - before) < 1e-4
    assert loss(filled(tmp_path / "noisy", RowColumn(), stories, twice), tokens) < before + 0.02
    assert loss(filled(tmp_path / "uneven", RowColumn(), stories, uneven), tokens) < before + 0.1
    deeper = uneven | {"num_hidden_layers": 8}
    losses = {
        depth: loss(filled(tmp_path / depth, RowColumn(depth=depth), stories, deeper), tokens)
        for depth in ("share", "repeat", "stack")
    }
    assert losses["share"] < min(before + 0.15, losses["repeat"], losses["stack"])


def test_coupled_selection_beats_uncoupled(tmp_path: Path, stories: Zoo, tokens: torch.Tensor) -> None:
    small = resized(stories, hidden_size=48, num_attention_heads=6, num_key_value_heads=3, intermediate_size=128)
    losses = {
        variant: loss(filled(tmp_path / variant, WeightSelection(variant=variant), stories, small), tokens)
        for variant in ("uniform", "random-inconsistent")
    }
    assert losses["uniform"] < 6.3 < losses["random-inconsistent"]  # 6.24 is to know nothing
