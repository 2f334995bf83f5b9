"""Slicing against the donor's own function, the paper's axes, and selection from real checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from baselines.transfer.shrinking.pruning import Pruning
from baselines.transfer.shrinking.sliced import Sliced, cut_decoder, select_layers
from baselines.transfer.weight_selection import WeightSelection
from tests.support.shaken import CONFIGS, GQA, donor, filled, logits
from zoo.donors.zoo import Zoo, open_standalone
from zoo.errors import UserError
from zoo.sampler import Sampler
from zoo.targets.blueprint import Blueprint
from zoo.training.corpora import encode_corpus
from zoo.training.loop import evaluate
from zoo.units.canonical import canonicalise
from zoo.units.decoder import read_decoder
from zoo.vocabulary import save_byte_tokenizer

UNTIED = {name: {**CONFIGS[name], "tie_word_embeddings": False} for name in CONFIGS}
BIASED = {**UNTIED["llama-tied"], "mlp_bias": True}
EXACT = {n: UNTIED[n] for n in ("llama", "qwen2", "qwen3", "phi3", "gemma2", "gemma3_text", "olmo2")} | {
    "biased": BIASED
}


@pytest.mark.parametrize("name", EXACT)
def test_a_target_of_the_donors_sizes_is_the_donors_function(tmp_path: Path, name: str) -> None:
    zoo = donor(tmp_path / "donor", EXACT[name])
    same = logits(filled(tmp_path / "same", Sliced(), zoo, EXACT[name]))
    expected = logits(zoo.path)
    assert expected.std() > 0.1
    assert (same - expected).abs().max() < 1e-5 * max(1.0, float(expected.abs().max()))


def test_a_tied_donor_is_exact_in_an_untied_target(tmp_path: Path) -> None:
    zoo = donor(tmp_path / "donor", CONFIGS["qwen3"])
    assert zoo.donors[0].config["tie_word_embeddings"]
    same = logits(filled(tmp_path / "same", Sliced(), zoo, UNTIED["qwen3"]))
    torch.testing.assert_close(same, logits(zoo.path), rtol=0, atol=1e-5)


def silent(zoo: Zoo, rank: int, neurons: int, groups: int, folder: Path) -> Zoo:
    """A copy of a Llama donor whose function lives in `rank` rotated residual coordinates, the first `neurons` neurons
    and the first `groups` KV groups: what a slice of those sizes must find."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(zoo.path)
    turn = torch.linalg.qr(torch.randn(32, 32, generator=torch.manual_seed(3))).Q[:, :rank]
    with torch.no_grad():
        for tensor_name, p in model.named_parameters():
            if p.ndim == 1:
                p.fill_(1.0)
            elif "o_proj" in tensor_name or "down_proj" in tensor_name:
                p.copy_(turn @ turn.mT @ p)
            else:
                p.copy_(p @ turn @ turn.mT)
            if "down_proj" in tensor_name:
                p[:, :-neurons] = 0.0
            if "o_proj" in tensor_name:
                p[:, : -16 * groups] = 0.0
    model.save_pretrained(folder)
    return open_standalone(folder)


def test_what_a_donor_does_not_use_is_what_is_cut(tmp_path: Path) -> None:
    """A donor that only uses 20 directions, 12 of its 48 neurons and the last of its two KV groups: the slice of these
    sizes is its function, up to the norms' eps."""
    full = donor(tmp_path / "full", {**UNTIED["llama"], "rms_norm_eps": 1e-9})
    zoo = silent(full, 20, 12, 1, tmp_path / "silent")
    target = {**UNTIED["llama"], "rms_norm_eps": 1e-9, "hidden_size": 20, "intermediate_size": 12}
    target |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    small = logits(filled(tmp_path / "small", Sliced(), zoo, target))
    expected = logits(zoo.path)
    assert expected.std() > 0.1
    torch.testing.assert_close(small, expected, rtol=1e-4, atol=1e-4)


def test_layers_kept() -> None:
    assert select_layers("middle", 8, 5) == (0, 1, 2, 6, 7)
    assert select_layers("first", 8, 3) == (0, 1, 2)
    assert select_layers("even", 7, 3) == (0, 3, 6)
    assert all(select_layers(rule, 4, 4) == (0, 1, 2, 3) for rule in ("middle", "first", "even"))


def test_post_norms_and_embedding_scales_follow_the_width(tmp_path: Path) -> None:
    """What cannot rotate: Gemma's writers are normed again, and its embedding is scaled by the root of the width."""
    zoo = donor(tmp_path / "donor", UNTIED["gemma2"])
    source = zoo.donors[0]
    target = Blueprint.from_config({**UNTIED["gemma2"], "hidden_size": 24})
    decoder = canonicalise(read_decoder(source.blueprint, source.read)).decoder
    assert target.metadata is not None
    small = cut_decoder(decoder, target.metadata, (0, 1))
    x = torch.randn(5, 24, dtype=torch.float64)
    wide = torch.cat([x, torch.zeros(5, 8, dtype=torch.float64)], dim=1)
    for site in ("attn.out", "mlp.out"):
        normed = [
            y / y.square().mean(-1, keepdim=True).sqrt() * layer.gain[site]
            for y, layer in ((x, small.layers[1]), (wide, decoder.layers[1]))
        ]
        torch.testing.assert_close(normed[0], normed[1][:, :24])
    torch.testing.assert_close(small.embed * 24**0.5, decoder.embed[:, :24] * 32**0.5)


def loss(folder: Path, sampler: Sampler, zoo: Zoo, config: dict[str, Any], tokens: torch.Tensor) -> float:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(filled(folder, sampler, zoo, config))
    return evaluate(model, tokens, limit=32)


@pytest.mark.parametrize("name", ["babyllama-tok105", "llama2xs-260K", "stories260K"])
def test_three_quarters_of_a_real_checkpoint_beats_selection(shared_data: Path, tmp_path: Path, name: str) -> None:
    """Its loss before any training, on the text that it was trained for, is below that of every n-th and of the first
    coordinates, and of pruning by index. The axes of stories260K show in its activations only: those of its weights
    lose to selection."""
    zoo = open_standalone(shared_data / "models" / name)
    own = zoo.donors[0].config
    heads = own["hidden_size"] // own["num_attention_heads"]
    config = {**own, "hidden_size": own["hidden_size"] * 3 // 4, "head_dim": heads, "tie_word_embeddings": False}
    words = (shared_data / "corpora/tinystories_sample.txt").read_bytes()
    for part, start in (("calibration", 1_000_000), ("own", 0)):
        (tmp_path / part).write_text(words[start : start + 30_000].decode(errors="ignore"))
    tokens = encode_corpus(tmp_path / "own", zoo.path, own["vocab_size"])
    axes = {"activations": Sliced(text=str(tmp_path / "calibration"), windows=16)}
    if name != "stories260K":
        axes["weights"] = Sliced()
    sliced = {k: loss(tmp_path / k, sampler, zoo, config, tokens) for k, sampler in axes.items()}
    others: list[Sampler] = [
        WeightSelection(),
        WeightSelection(variant="consecutive"),
        WeightSelection(rescale="sqrt"),
        Pruning(residual="index"),
    ]
    selected = [loss(tmp_path / str(i), sampler, zoo, config, tokens) for i, sampler in enumerate(others)]
    assert max(sliced.values()) < min(selected) - 0.5


@pytest.mark.parametrize("name", ["babyllama-tok105", "stories260K"])
@pytest.mark.parametrize("axes", ["weights", "activations"])
def test_a_real_checkpoint_at_its_own_sizes(shared_data: Path, tmp_path: Path, name: str, axes: str) -> None:
    zoo = open_standalone(shared_data / "models" / name)
    config = {**zoo.donors[0].config, "tie_word_embeddings": False}
    text = str(shared_data / "corpora/tinystories_sample.txt") if axes == "activations" else None
    if text:
        (tmp_path / "text.txt").write_bytes(Path(text).read_bytes()[:20000])
        text = str(tmp_path / "text.txt")
    same = logits(filled(tmp_path / "same", Sliced(axes=axes, text=text, windows=8), zoo, config))
    expected = logits(zoo.path)
    assert (same - expected).abs().max() < 1e-5 * float(expected.abs().max())


def test_activation_axes_are_those_of_what_the_norms_see(tmp_path: Path) -> None:
    """Against hidden states that transformers returns itself: of a model without blocks that write, all norms see the
    embedding."""
    from transformers import AutoModelForCausalLM

    config = {**UNTIED["llama"], "vocab_size": 256}
    zoo = donor(tmp_path / "full", config)
    model = AutoModelForCausalLM.from_pretrained(zoo.path)
    with torch.no_grad():
        for tensor_name, p in model.named_parameters():
            if "o_proj" in tensor_name or "down_proj" in tensor_name:
                p.zero_()
    model.save_pretrained(tmp_path / "donor")
    save_byte_tokenizer(tmp_path / "donor")
    (tmp_path / "text").write_bytes(bytes(range(97, 123)) * 100)
    zoo = open_standalone(tmp_path / "donor")
    sampler = Sliced(axes="activations", text=str(tmp_path / "text"), windows=40)
    sampler.fit(zoo, Blueprint.from_config(config))
    basis = sampler.state()[1]["basis"]
    x = model.state_dict()["model.embed_tokens.weight"][97:123].double()
    x = x / x.norm(dim=1, keepdim=True)
    energy = (x @ basis).square().sum(0)
    assert (energy[26:] < 1e-9).all()  # 26 letters span 26 directions
    exact = torch.linalg.eigvalsh(x.mT @ x).flip(0)  # letters are equally frequent, up to the ends of windows
    assert (energy - exact).abs().max() < 0.05 * exact.max()
    sampler.save(tmp_path / "sampler")
    again = Sliced.load(tmp_path / "sampler")
    target = Blueprint.from_config({**config, "hidden_size": 24})
    first, second = (dict(s.sample(target)) for s in (sampler, again))
    assert first and all(torch.equal(first[k], second[k]) for k in first)


def test_tokens_are_matched_by_their_strings(tmp_path: Path) -> None:
    """Rows of shared tokens move to where the target has them; `new` is the mean of its letters; a row without a token
    is drawn, differently for every seed."""
    config = {**UNTIED["llama"], "vocab_size": 256}
    zoo = donor(tmp_path / "donor", config)
    save_byte_tokenizer(tmp_path / "donor")
    zoo = open_standalone(tmp_path / "donor")
    save_byte_tokenizer(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    old = content["model"]["vocab"]
    content["model"]["vocab"] = {("new" if i < 2 else token): 255 - i for token, i in old.items() if i != 1}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    blueprint = Blueprint.from_config(config)
    plain = dict(Sliced().fit(zoo, blueprint).sample(blueprint, 0))["lm_head.weight"]
    sampler = Sliced(tokenizer=str(tmp_path)).fit(zoo, blueprint)
    matched, other = (dict(sampler.sample(blueprint, seed))["lm_head.weight"] for seed in (0, 1))
    assert torch.equal(matched[:254], plain.flip(0)[:254])
    torch.testing.assert_close(matched[255], plain[list(b"new")].mean(0))
    assert torch.equal(matched[255], other[255]) and (matched[254] != other[254]).all()
    assert 0.5 < matched[254].std() / plain.std() < 2


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("gpt2", {}, "LayerNorm.*pruning"),
    ("llama", {"hidden_size": 40}, "width 32 is smaller than the target's 40: use row-column or net2wider"),
    ("llama", {"num_hidden_layers": 3}, "2 layers are fewer than the target's 3: use stacking"),
    ("llama", {"head_dim": 4}, "head_dim 8 is not the target's 4"),
    ("llama", {"num_key_value_heads": 1}, "query heads per KV head"),
    ("llama", {"vocab_size": 50}, "vocab 60 is not the target's 50"),
    ("mixtral", {}, "experts"),
    ("llama", {"attention_bias": True}, "the target has attn.q bias and the donor has none"),
]


@pytest.mark.parametrize(("name", "changed", "message"), REFUSED)
def test_refusals(tmp_path: Path, name: str, changed: dict[str, Any], message: str) -> None:
    zoo = donor(tmp_path / "donor", CONFIGS[name])
    config = {**CONFIGS[name], **({} if name in ("gpt2", "mixtral") else {"tie_word_embeddings": False}), **changed}
    if name == "gpt2":
        config["tie_word_embeddings"] = False
    blueprint = Blueprint.from_config(config)
    for work in (Sliced().fit, Sliced().planned_donors):
        with pytest.raises(UserError, match=message):
            work(zoo, blueprint)


@pytest.mark.parametrize("text", [False, True])
def test_a_tied_donor_is_exact_in_a_tied_target_of_its_sizes(tmp_path: Path, text: bool) -> None:
    """Its own coordinates are sorted, and nothing is rotated."""
    config = {"model_type": "llama", **GQA, "tie_word_embeddings": True, "vocab_size": 256}
    zoo = donor(tmp_path / "donor", config)
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 120)
    sampler = Sliced(text=str(tmp_path / "text.txt") if text else None, windows=4)
    same = filled(tmp_path / "same", sampler, zoo, config)
    torch.testing.assert_close(logits(same), logits(zoo.path), rtol=0, atol=1e-5)
    before, after = (open_standalone(path).donors[0].read("model.embed_tokens.weight") for path in (zoo.path, same))
    # The same columns in another order, some with the other sign.
    torch.testing.assert_close(after.abs().sum(0).sort().values, before.abs().sum(0).sort().values)
    if not text:
        with pytest.raises(UserError, match="ties its head"):
            Sliced(tie="refuse").fit(zoo, Blueprint.from_config(config))


def test_a_tied_target_is_fitted_when_asked_for(tmp_path: Path) -> None:
    """A head that is its embedding times one number stays so under rotation: then fitting is exact."""
    from transformers import AutoModelForCausalLM

    config = {"model_type": "llama", **GQA, "tie_word_embeddings": True}
    donor(tmp_path / "shaken", config)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "shaken")
    torch.nn.init.constant_(model.model.norm.weight, 0.7)
    model.save_pretrained(tmp_path / "donor")
    zoo = open_standalone(tmp_path / "donor")
    same = logits(filled(tmp_path / "same", Sliced(tie="fit"), zoo, config))
    torch.testing.assert_close(same, logits(zoo.path), rtol=0, atol=1e-5)


def test_activations_need_a_text(tmp_path: Path) -> None:
    zoo = donor(tmp_path / "donor", UNTIED["llama"])
    blueprint = Blueprint.from_config(UNTIED["llama"])
    for sampler, message in (
        (Sliced(axes="activations"), "needs a text"),
        (Sliced(text=str(tmp_path / "none")), "has no tokenizer and its 60 tokens are not bytes"),
    ):
        for work in (sampler.fit, sampler.planned_donors):
            with pytest.raises(UserError, match=message):
                work(zoo, blueprint)
    with pytest.raises(UserError, match="sliced: windows is 0; give at least 1"):
        Sliced(windows=0)
