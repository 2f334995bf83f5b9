"""The canonical form must not change what a model computes."""

from __future__ import annotations

import copy
import tempfile
import types
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from zoo.donors.model_checkpoint import ModelCheckpoint
from zoo.errors import UserError
from zoo.targets.blueprint import Blueprint
from zoo.units.canonical import canonicalise, undo_canonical
from zoo.units.decoder import Decoder, read_decoder, write_decoder
from zoo.units.gains import fold_gains, tie_head
from zoo.units.residual_basis import make_anchor, mean_last_basis, residual_vectors, to_disk_basis
from zoo.units.symmetry import rotate_residual

BASE = dict(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
GPT2 = dict(model_type="gpt2", vocab_size=40, n_embd=32, n_layer=2, n_head=4, n_positions=24)
CONFIGS = {
    "llama-mha": dict(model_type="llama", **BASE),
    "llama-gqa-tied": dict(model_type="llama", num_key_value_heads=2, tie_word_embeddings=True, **BASE),
    "llama-mqa-biased": dict(model_type="llama", num_key_value_heads=1, attention_bias=True, mlp_bias=True, **BASE),
    "llama-odd-head-dim": dict(model_type="llama", head_dim=6, num_key_value_heads=2, **BASE),
    "llama-wide-heads": dict(model_type="llama", head_dim=48, num_key_value_heads=2, **BASE),
    "qwen2": dict(model_type="qwen2", num_key_value_heads=2, **BASE),
    "qwen3": dict(model_type="qwen3", num_key_value_heads=2, head_dim=8, **BASE),
    "mistral": dict(model_type="mistral", num_key_value_heads=2, **BASE),
    "phi3": dict(model_type="phi3", num_key_value_heads=2, pad_token_id=0, **BASE),
    "gemma2": dict(model_type="gemma2", attn_logit_softcapping=None, num_key_value_heads=2, head_dim=8, **BASE),
    "gemma3": dict(model_type="gemma3_text", num_key_value_heads=2, head_dim=8, **BASE),
    "olmo2": dict(model_type="olmo2", num_key_value_heads=2, **BASE),
    "gpt2": GPT2,
    "gpt2-untied": dict(GPT2, tie_word_embeddings=False),
    "gpt_neox": dict(model_type="gpt_neox", use_parallel_residual=True, **BASE),
    "gpt_neox-serial": dict(model_type="gpt_neox", use_parallel_residual=False, **BASE),
    "opt": dict(model_type="opt", ffn_dim=48, word_embed_proj_dim=32, pad_token_id=0, **BASE),
}  # fmt: skip


def attention(model_type: str) -> str:
    """sdpa computes in the dtype of its input; the eager softmax is always float32, but Gemma 2 has no other."""
    return "eager" if model_type == "gemma2" else "sdpa"


def in_own_dtype(model: torch.nn.Module) -> torch.nn.Module:
    """RMSNorms and embedding scales that compute in the dtype of their input: transformers' use float32 whatever they
    are given."""

    def forward(self, x: Tensor) -> Tensor:
        eps = getattr(self, "eps", getattr(self, "variance_epsilon", None))
        gain = self.weight + 1 if "Gemma" in type(self).__name__ else self.weight
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * gain

    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = types.MethodType(forward, module)
        if hasattr(module, "scalar_embed_scale"):
            module.embed_scale = torch.tensor(module.scalar_embed_scale, dtype=torch.float64)
    return model


def random_model(config: dict, seed: int = 0) -> torch.nn.Module:
    """Weights far from any initialisation, gains and biases included: a symmetry that is not exact has to show."""
    torch.manual_seed(seed)
    model = (
        AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**config), attn_implementation=attention(config["model_type"])
        )
        .double()
        .eval()
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.3 if parameter.ndim == 1 else 1.2 / parameter.shape[-1] ** 0.5
            offset = (
                1.0 if parameter.ndim == 1 and name.endswith("weight") and "gemma" not in config["model_type"] else 0.0
            )
            parameter.copy_(offset + spread * torch.randn_like(parameter))
    return model


def decoder_of(model: torch.nn.Module) -> tuple[Decoder, Blueprint]:
    blueprint = Blueprint.from_pretrained_config(model.config)
    state = revert_weight_conversion(model, model.state_dict())
    return read_decoder(blueprint, lambda name: state[name]), blueprint


def logits(decoder: Decoder, config: AutoConfig, ids: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """The logits of transformers' own model, loaded from a folder that holds the decoder; the head is untied unless
    the decoder ties it."""
    config = copy.deepcopy(config)
    config.tie_word_embeddings = decoder.metadata.tied
    tensors = {n: t.to(dtype) for n, t in write_decoder(decoder, Blueprint.from_pretrained_config(config))}
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        save_file(tensors, Path(folder) / "model.safetensors", {"format": "pt"})
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, output_loading_info=True, attn_implementation=attention(config.model_type)
        )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        return in_own_dtype(model.eval())(ids).logits


IDS = torch.arange(40).reshape(2, 20) * 7 % 40


@pytest.mark.parametrize("name", CONFIGS)
def test_canonical_form_keeps_the_logits(name: str) -> None:
    model = random_model(CONFIGS[name])
    decoder, _ = decoder_of(model)
    with torch.no_grad():
        expected = in_own_dtype(model)(IDS).logits
    canonical = canonicalise(decoder)
    exact = 1e-8 if attention(model.config.model_type) == "sdpa" else 1e-5
    assert (logits(to_disk_basis(canonical.decoder), model.config, IDS) - expected).abs().max() < exact
    in_float32 = logits(to_disk_basis(canonical.decoder), model.config, IDS, torch.float32)
    assert (in_float32 - expected).abs().max() < 1e-4 * max(1.0, float(expected.abs().max()))
    restored = undo_canonical(canonical, tied=decoder.metadata.tied)
    assert (logits(restored, model.config, IDS) - expected).abs().max() < exact


@pytest.mark.parametrize("name", ["llama-gqa-tied", "qwen3", "gemma3", "olmo2", "gpt_neox"])
def test_the_inverse_gives_the_weights_back(name: str) -> None:
    decoder, blueprint = decoder_of(random_model(CONFIGS[name]))
    restored = undo_canonical(canonicalise(decoder), tied=decoder.metadata.tied)
    before, after = dict(write_decoder(decoder, blueprint)), dict(write_decoder(restored, blueprint))
    for tensor_name, tensor in before.items():
        if decoder.metadata.norm == "layer" and blueprint[tensor_name].role in ("embed", "attn.o", "mlp.down"):
            continue  # LayerNorm hides what these put along the mean
        assert torch.allclose(after[tensor_name], tensor, atol=1e-9), tensor_name


def test_energy_falls_along_the_coordinates() -> None:
    decoder, _ = decoder_of(random_model(CONFIGS["llama-gqa-tied"]))
    canonical = canonicalise(decoder).decoder
    energy = residual_vectors(canonical).square().sum(0)
    assert (energy.diff() <= 1e-9).all()
    layer = canonical.layers[0]
    assert layer.gate is not None
    importance = layer.gate.norm(dim=1) * layer.up.norm(dim=1) * layer.down.norm(dim=1)
    assert (importance.diff() <= 1e-9).all()
    value = layer.v.norm(dim=2) * layer.o.unflatten(0, (2, -1)).square().sum((1, 3)).sqrt()
    assert (value.diff(dim=1) <= 1e-9).all()


def test_canonical_form_forgets_the_coordinates() -> None:
    """A model and its copy, rotated, reordered and rescaled by a random symmetry, have one canonical form."""
    decoder, _ = decoder_of(random_model(CONFIGS["llama-gqa-tied"]))
    folded, _ = fold_gains(decoder)
    turned = rotate_residual(folded, torch.linalg.qr(torch.randn(32, 32, dtype=torch.float64)).Q)
    order = torch.randperm(48)
    scale = torch.randn(48, 1, dtype=torch.float64).exp() * torch.randn(48, 1, dtype=torch.float64).sign()
    mix = torch.randn(2, 8, 8, dtype=torch.float64)
    layers = tuple(
        replace(
            layer,
            gate=layer.gate[order],
            up=layer.up[order] * scale,
            down=layer.down[order] / scale,
            v=mix @ layer.v,
            o=torch.linalg.inv(mix).mT.repeat_interleave(2, 0) @ layer.o,
        )
        for layer in turned.layers
        if layer.gate is not None
    )
    one, other = canonicalise(decoder).decoder, canonicalise(replace(turned, layers=layers)).decoder
    assert torch.allclose(one.embed, other.embed, atol=1e-8)
    for a, b in zip(one.layers, other.layers, strict=True):
        for role in ("q", "k", "v", "o", "gate", "up", "down"):
            assert torch.allclose(getattr(a, role), getattr(b, role), atol=1e-7), role


def test_alignment_finds_a_rotated_copy() -> None:
    decoder, _ = decoder_of(random_model(CONFIGS["llama-mha"]))
    tokens = tuple(f"t{i}" for i in range(40))
    one = canonicalise(decoder).decoder
    turned = rotate_residual(fold_gains(decoder)[0], torch.linalg.qr(torch.randn(32, 32, dtype=torch.float64)).Q)
    reordered = torch.randperm(40)
    shuffled = replace(turned, embed=turned.embed[reordered], head=turned.head[reordered])
    names = tuple(tokens[i] for i in reordered)
    other = canonicalise(shuffled, names, make_anchor(one, tokens)).decoder
    assert torch.allclose(other.embed, one.embed[reordered], atol=1e-8)
    assert torch.allclose(other.layers[1].down, one.layers[1].down, atol=1e-8)
    with pytest.raises(UserError, match="shares no token"):
        canonicalise(shuffled, tuple("x" * (i + 1) for i in range(40)), make_anchor(one, tokens))


@pytest.mark.parametrize("name", ["llama-gqa-tied", "gpt2"])
def test_a_narrower_and_a_wider_donor_align_exactly(name: str) -> None:
    """Alignment to an anchor of another width is still an exact symmetry."""
    model = random_model(CONFIGS[name])
    decoder, _ = decoder_of(model)
    tokens = tuple(str(i) for i in range(40))
    with torch.no_grad():
        expected = in_own_dtype(model)(IDS).logits
    for width in (16, 48):
        key = "n_embd" if name == "gpt2" else "hidden_size"
        reference, _ = decoder_of(random_model({**CONFIGS[name], key: width}, seed=1))
        to = make_anchor(canonicalise(reference).decoder, tokens)
        aligned = canonicalise(decoder, tokens, to).decoder
        assert (logits(to_disk_basis(aligned), model.config, IDS) - expected).abs().max() < 1e-8


@pytest.mark.parametrize("name", ["llama-gqa-tied", "gpt2", "gemma3", "phi3"])
def test_lazy_layers_give_the_same_form_one_layer_at_a_time(name: str) -> None:
    config = {**CONFIGS[name], "n_layer" if name == "gpt2" else "num_hidden_layers": 3}
    model = random_model(config)
    eager, blueprint = decoder_of(model)
    state, alive, reads = revert_weight_conversion(model, model.state_dict()), weakref.WeakSet[Tensor](), []
    holds_all = False

    def read(name: str) -> Tensor:
        layer = blueprint[name].layer
        reads.append(layer)
        others = {t.layer for t in alive if t.layer not in (None, layer)}
        assert not others or holds_all, f"layers {others} are in memory while {layer} is read"
        tensor = state[name].clone()
        tensor.layer = layer
        alive.add(tensor)
        return tensor

    expected = canonicalise(eager)
    found = canonicalise(read_decoder(blueprint, read, lazy=True))
    assert reads.count(1) == reads.count(2)
    before = reads.count(2)
    written = dict(write_decoder(found.decoder, Blueprint.from_pretrained_config(model.config)))
    assert reads.count(2) == 2 * before, "once for the axes, once for what is written"
    for tensor_name, tensor in write_decoder(expected.decoder, Blueprint.from_pretrained_config(model.config)):
        assert torch.equal(written[tensor_name], tensor), tensor_name
    holds_all = True
    restored = dict(write_decoder(undo_canonical(found, tied=eager.metadata.tied), blueprint))
    for tensor_name, tensor in write_decoder(undo_canonical(expected, tied=eager.metadata.tied), blueprint):
        assert torch.equal(restored[tensor_name], tensor), tensor_name


def test_layernorm_forbids_the_sign_of_one_coordinate() -> None:
    """The table's negative claim: what RMSNorm allows changes a LayerNorm model."""
    flip = torch.eye(32, dtype=torch.float64)
    flip[3, 3] = -1
    for name, same in (("llama-mha", True), ("gpt2-untied", False)):
        model = random_model(CONFIGS[name])
        decoder = fold_gains(decoder_of(model)[0])[0]
        with torch.no_grad():
            difference = (
                (logits(rotate_residual(decoder, flip), model.config, IDS) - in_own_dtype(model)(IDS).logits)
                .abs()
                .max()
            )
        assert (difference < 1e-8) == same


def test_mean_last_is_orthonormal() -> None:
    basis = mean_last_basis(7)
    assert torch.allclose(basis.mT @ basis, torch.eye(7, dtype=torch.float64))
    assert torch.allclose(basis[:, -1], torch.full((7,), 7**-0.5, dtype=torch.float64))


def test_tying_is_exact_where_it_can_be() -> None:
    decoder, _ = decoder_of(random_model(CONFIGS["llama-gqa-tied"]))
    folded, _ = fold_gains(decoder)
    assert torch.allclose(tie_head(folded).gain["final"], decoder.gain["final"])


def test_real_checkpoints_keep_their_logits(shared_data: Path) -> None:
    folders = [shared_data / "models" / n for n in ("stories260K", "llama2xs-260K", "babyllama-tok105")]
    folders += [shared_data / "models" / "makemore-en-a", shared_data / "models" / "arthur" / "run0-ep100"]
    for folder in folders:
        checkpoint = ModelCheckpoint.open(folder)
        config = AutoConfig.from_pretrained(folder)
        ids = torch.arange(14)[None] * 5 % config.vocab_size
        model = in_own_dtype(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval())
        with torch.no_grad():
            expected = model(ids).logits
        canonical = canonicalise(read_decoder(checkpoint.blueprint, checkpoint.read, where=str(folder)))
        ours = to_disk_basis(canonical.decoder)
        assert (logits(ours, config, ids) - expected).abs().max() < 1e-8, folder.name
        assert (logits(ours, config, ids, torch.float32) - expected).abs().max() < 1e-4, folder.name


@pytest.mark.parametrize(
    "changes",
    [{"layer_norm_elementwise_affine": False}, {"_remove_final_layer_norm": True}, {"do_layer_norm_before": False}],
)
def test_opt_variants_whose_norms_do_not_show_are_refused(changes: dict[str, bool]) -> None:
    with pytest.raises(UserError, match="canonical form"):
        canonicalise(decoder_of(random_model({**CONFIGS["opt"], **changes}))[0])


def test_an_architecture_whose_symmetries_are_not_known_is_refused() -> None:
    with pytest.raises(UserError, match="'granite' are unknown"):
        canonicalise(decoder_of(random_model(dict(model_type="granite", num_key_value_heads=2, **BASE)))[0])
