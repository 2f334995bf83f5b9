"""Scores against direct computations, and the calibration text against the tokenizer and its refusals."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from baselines.calibration import calibration_windows, load_model
from baselines.transfer.shrinking.importance import score_by_activations, score_by_weights, top_indices
from tests.support.planted import config
from tests.support.shaken import CONFIGS, build, donor
from zoo.donors.folder import StandaloneDonor
from zoo.donors.memory import zoo_of
from zoo.errors import UserError
from zoo.targets.blueprint import Blueprint
from zoo.training.corpora import encode_corpus
from zoo.training.documents import TextSource

WINDOWS = torch.randint(0, 60, (6, 16), generator=torch.Generator().manual_seed(0))


def test_the_best_keep_their_order_and_the_first_of_equals_wins() -> None:
    assert top_indices(torch.tensor([1.0, 3.0, 2.0, 3.0, 2.0]), 3).tolist() == [1, 2, 3]


def test_scores_from_weights_are_norms() -> None:
    """Against dense products of the module's own matrices, gains and all."""
    model = build(CONFIGS["llama"])
    scores = score_by_weights(zoo_of({"m": model}).donors[0])
    layer = model.model.layers[1]
    g = layer.post_attention_layernorm.weight
    gate, up, down = layer.mlp.gate_proj.weight * g, layer.mlp.up_proj.weight * g, layer.mlp.down_proj.weight
    torch.testing.assert_close(scores.ffn[1].float(), gate.norm(dim=1) * up.norm(dim=1) * down.norm(dim=0))
    v = layer.self_attn.v_proj.weight * layer.input_layernorm.weight
    for head in range(4):
        group = head // 2
        product = layer.self_attn.o_proj.weight[:, 8 * head : 8 * head + 8] @ v[8 * group : 8 * group + 8]
        torch.testing.assert_close(scores.heads[1, head].float(), product.norm())
    torch.testing.assert_close(scores.groups(2)[1], scores.heads[1].view(2, 2).norm(dim=1))
    model.model.layers[0].self_attn.o_proj.weight.data[3] *= 100  # now a coordinate that much is written to
    assert score_by_weights(zoo_of({"m": model}).donors[0]).residual.argmax() == 3


def test_a_donor_without_a_head_reads_nothing_there() -> None:
    model = build(CONFIGS["llama"])
    base = score_by_weights(zoo_of({"m": model.model}).donors[0])
    assert not torch.equal(base.residual, score_by_weights(zoo_of({"m": model}).donors[0]).residual)
    torch.nn.init.zeros_(model.lm_head.weight)
    torch.testing.assert_close(base.residual, score_by_weights(zoo_of({"m": model}).donors[0]).residual)


def test_experts_and_fused_transposed_tensors_have_scores() -> None:
    experts = score_by_weights(zoo_of({"m": build(CONFIGS["mixtral"])}).donors[0])
    assert experts.expert_ffn.shape == (2, 48) and experts.ffn.shape == (2, 0) and bool((experts.expert_ffn > 0).all())
    model = build(CONFIGS["gpt2"])
    scores = score_by_weights(zoo_of({"m": model}).donors[0])
    block = model.transformer.h[1]
    up, down = block.mlp.c_fc.weight.T * block.ln_2.weight, block.mlp.c_proj.weight
    torch.testing.assert_close(scores.ffn[1].float(), up.norm(dim=1) * down.norm(dim=1))
    v = block.attn.c_attn.weight[:, 64:72].T * block.ln_1.weight
    torch.testing.assert_close(scores.heads[1, 0].float(), (block.attn.c_proj.weight[:8].T @ v).norm())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_scores_from_activations_are_means_over_the_text(name: str) -> None:
    """Against transformers' own hidden states, for which the last norm is taken out."""
    model = build(CONFIGS[name])
    source = zoo_of({"m": model}).donors[0]
    weights = score_by_weights(source)
    scores = score_by_activations(load_model(source, "cpu"), source, WINDOWS, weights)
    seen = {}
    last_name = "model.norm" if name == "llama" else "transformer.ln_f"
    last = model.get_submodule(last_name)
    down = model.model.layers[1].mlp.down_proj if name == "llama" else model.transformer.h[1].mlp.c_proj
    o = model.model.layers[0].self_attn.o_proj if name == "llama" else model.transformer.h[0].attn.c_proj
    for key, module in (("final", last), ("ffn", down), ("heads", o)):
        module.register_forward_pre_hook(lambda _, args, key=key: seen.update({key: args[0]}))
    with torch.no_grad():
        hidden = model(WINDOWS, output_hidden_states=True).hidden_states
    stream = [*hidden[:2], seen["final"]]
    influence = [1 - torch.cosine_similarity(a, b, dim=-1).mean() for a, b in pairwise(stream)]
    torch.testing.assert_close(scores.influence.float(), torch.stack(influence), rtol=1e-4, atol=1e-6)
    sizes = [x.abs().mean((0, 1)) for x in stream[:2]]
    torch.testing.assert_close(scores.residual.float(), sum(s / s.mean() for s in sizes) / 2, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(scores.ffn[1].float(), seen["ffn"].abs().mean((0, 1)), rtol=1e-4, atol=1e-6)
    heads = seen["heads"].abs().mean((0, 1)).view(4, 8).mean(1)
    torch.testing.assert_close(scores.heads[0].float(), heads, rtol=1e-4, atol=1e-6)
    x = seen["final"] - (seen["final"].mean(-1, keepdim=True) if name == "gpt2" else 0)
    share = (x.square() / x.square().sum(-1, keepdim=True)).mean((0, 1))
    torch.testing.assert_close(scores.energy[f"{last_name}.weight"].float(), share, rtol=1e-4, atol=1e-6)
    assert all(abs(float(e.sum()) - 1) < 1e-5 for e in [*scores.energy.values(), *weights.energy.values()])


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in ("llama", "gpt2")])
def test_every_architecture_can_be_watched(name: str) -> None:
    source = zoo_of({"m": build(CONFIGS[name])}).donors[0]
    scores = score_by_activations(load_model(source, "cpu"), source, WINDOWS, score_by_weights(source))
    assert scores.influence is not None and bool((scores.influence > 0).all())
    assert bool((scores.residual > 0).all()) and bool((scores.heads > 0).all())


def test_the_text_is_read_by_the_donors_tokenizer(shared_data: Path) -> None:
    folder, text = shared_data / "models" / "stories260K", shared_data / "corpora" / "tinystories_sample.txt"
    windows = calibration_windows(TextSource(str(text)), StandaloneDonor.open(folder), None, 8, "x")
    assert windows.shape == (8, 256)
    # less of the file is read: the same tokens
    short = calibration_windows(TextSource(str(text)), StandaloneDonor.open(folder), None, 2, "x")
    assert torch.equal(short, windows[:2])
    whole = encode_corpus(text, folder, 512)
    assert torch.equal(windows.flatten(), whole[: 8 * 256])


def test_texts_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    bytewise = donor(tmp_path / "bytes", config("llama")).donors[0]
    (tmp_path / "good.txt").write_text("ä" * 40)  # 80 bytes
    good, missing, short, latin = (
        TextSource(str(tmp_path / f"{n}.txt")) for n in ("good", "missing", "short", "latin")
    )
    assert calibration_windows(good, bytewise, None, 64, "x").shape == (2, 32)  # the donor knows 32 positions
    with pytest.raises(UserError, match=r"missing\.txt: no such corpus; give a file, a folder, or a hub data set"):
        calibration_windows(missing, bytewise, None, 64, "x")
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(UserError, match="9 tokens are too few for calibration; give at least 32"):
        calibration_windows(short, bytewise, None, 64, "x")
    wordwise = donor(tmp_path / "words", CONFIGS["llama"]).donors[0]
    with pytest.raises(UserError, match="has no tokenizer and its 60 tokens are not bytes"):
        calibration_windows(good, wordwise, None, 64, "x")
    from tests.baselines.transfer.test_transfer import save_tokenizer

    given = save_tokenizer(tmp_path / "tokenizer", ["a", "b"])
    with pytest.raises(UserError, match="1 tokens are too few"):  # the target's tokenizer stands in: one unknown word
        calibration_windows(good, wordwise, str(given), 64, "x")
    (tmp_path / "latin.txt").write_bytes("naïve ".encode("latin-1") * 200)
    with pytest.raises(UserError, match="is not UTF-8 at byte 2"):
        calibration_windows(latin, wordwise, str(given), 64, "x")


def test_an_architecture_kept_elsewhere_in_memory_is_refused() -> None:
    from baselines.calibration import module_holding

    model = build(CONFIGS["mixtral"])
    name = next(s.name for s, _ in Blueprint.from_module(model).find("mlp.down"))
    with pytest.raises(UserError, match="its activations cannot be measured"):
        module_holding(model, name)
