"""Health of donors: real checkpoints are fine; planted faults are found, named and distinguished."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import init
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from zoo.donors.measures import measure_checkpoint
from zoo.donors.memory import zoo_of
from zoo.donors.model_checkpoint import ModelCheckpoint
from zoo.statistics.health import Finding, check_health, summarise_findings

Change = Callable[[str, Tensor], Tensor]


def llama() -> nn.Module:
    sizes = {"vocab_size": 120, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0))


def gpt2() -> nn.Module:
    ids = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=120, n_embd=48, n_layer=3, n_head=4, n_positions=32, **ids))


def writes(name: str) -> bool:
    return any(word in name for word in ("o_proj", "down_proj", "c_proj"))


SCHEMES: dict[str, Callable[[str, Tensor], object]] = {
    "its own": lambda name, p: None,
    "kaiming uniform": lambda name, p: init.kaiming_uniform_(p, a=5**0.5),
    "xavier normal": lambda name, p: init.xavier_normal_(p),
    "truncated": lambda name, p: init.trunc_normal_(p, std=0.02, a=-0.04, b=0.04),
    "orthogonal": lambda name, p: init.orthogonal_(p),
    "zeros": lambda name, p: init.zeros_(p) if writes(name) else init.normal_(p, std=0.02),
    "depth-scaled": lambda name, p: init.normal_(p, std=0.02 / 6**0.5 if writes(name) else 0.02),
    "bfloat16": lambda name, p: p.data.copy_(p.bfloat16().float()),
}


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("scheme", sorted(SCHEMES))
@torch.no_grad()
def test_every_initialisation_is_untrained(make: Callable[[], nn.Module], scheme: str) -> None:
    torch.manual_seed(0)
    model = make()
    for name, p in model.named_parameters():
        if p.ndim > 1:
            SCHEMES[scheme](name, p)
    (finding,) = check_health(zoo_of({"x": model}).donors[0])
    assert finding.kind == "untrained" and finding.whole and finding.text.startswith("never trained: all ")
    assert "\n" not in finding.text
    matrices = sum(
        p.ndim > 1 and bool(p.any()) for n, p in model.named_parameters() if "wpe" not in n and "head" not in n
    )
    assert len(finding.tensors) == matrices + (make is llama)  # GPT-2's head is tied


def test_real_checkpoints_are_fine(shared_data: Path) -> None:
    folders = [p.parent for p in sorted((shared_data / "models").glob("**/config.json"))]
    assert len(folders) > 25
    found = {folder.name: check_health(ModelCheckpoint.open(folder), most=256) for folder in folders}
    assert {name: findings for name, findings in found.items() if findings} == {}


def changed(source: Path, target: Path, change: Change) -> list[Finding]:
    """The health of a checkpoint with its tensors changed."""
    shutil.copytree(source, target)
    weights = target / "model.safetensors"
    save_file({n: change(n, t).contiguous() for n, t in load_file(weights).items()}, weights, {"format": "pt"})
    return check_health(ModelCheckpoint.open(target))


def shuffle(tensor: Tensor) -> Tensor:
    """Every matrix of a fused tensor is shuffled with the others here, which is as random."""
    order = torch.randperm(tensor.numel(), generator=torch.Generator().manual_seed(tensor.numel()))
    return tensor.flatten()[order].view_as(tensor)


@pytest.mark.parametrize("name", ["stories260K", "babyllama-tok105", "makemore-en-a", "arthur/run2-ep002"])
def test_shuffled_entries_differ_from_initial_ones(shared_data: Path, tmp_path: Path, name: str) -> None:
    source = shared_data / "models" / name
    (whole,) = changed(source, tmp_path / "a", lambda n, t: shuffle(t) if t.ndim > 1 else t)
    assert whole.kind == "permuted" and whole.text.startswith("structure lost: all ")
    (layer,) = changed(source, tmp_path / "b", lambda n, t: shuffle(t) if t.ndim > 1 and ".1." in n else t)
    assert layer.kind == "permuted" and "layer 1:" in layer.text
    assert layer.tensors and all(".1." in n for n in layer.tensors)


@pytest.mark.parametrize("mark", ["heavy tails", "gains"])
@torch.no_grad()
def test_noise_of_trained_values_is_no_initialisation(mark: str) -> None:
    """Either sign is enough: values that no scheme draws, in one matrix, or gains that are not all the same."""
    torch.manual_seed(0)
    model = llama()
    if mark == "gains":
        model.model.norm.weight.mul_(torch.linspace(0.5, 2, 48))
    else:
        model.model.layers[1].mlp.up_proj.weight.copy_(torch.distributions.Laplace(0, 0.02).sample((96, 48)))
    (finding,) = check_health(zoo_of({"x": model}).donors[0])
    assert finding.kind == "permuted" and finding.text.startswith("structure lost: all 23 matrices")


def test_one_structured_matrix_is_enough(shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "models" / "stories260K"
    assert changed(source, tmp_path / "a", lambda n, t: shuffle(t) if t.ndim > 1 and "down" not in n else t) == []


def test_a_newly_inserted_layer_is_reported_as_untrained(shared_data: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)

    def renew(name: str, tensor: Tensor) -> Tensor:
        if ".2." not in name and ".3." not in name:
            return tensor
        return torch.randn_like(tensor) * 0.1 if tensor.ndim > 1 else torch.ones_like(tensor)

    (finding,) = changed(shared_data / "models" / "stories260K", tmp_path / "a", renew)
    assert finding.kind == "untrained" and "layers 2, 3: 14 matrices" in finding.text
    assert not finding.whole and summarise_findings([finding]) == "untrained layers"


DEAD: dict[str, tuple[Change, str, str]] = {
    "zero writer": (lambda n, t: t * 0 if "layers.3.self_attn.o_proj" in n else t, "attention", "o_proj"),
    "small product": (
        lambda n, t: t / 20 if "layers.3.mlp.up_proj" in n or "layers.3.mlp.down_proj" in n else t, "MLP", "down_proj",
    ),
    "zero gain": (lambda n, t: t * 0 if n == "model.layers.3.input_layernorm.weight" else t, "attention", "layernorm"),
}  # fmt: skip


@pytest.mark.parametrize("how", sorted(DEAD))
def test_a_dead_block_is_found(shared_data: Path, tmp_path: Path, how: str) -> None:
    change, block, culprit = DEAD[how]
    (finding,) = changed(shared_data / "models" / "stories260K", tmp_path / "a", change)
    assert finding.kind == "dead" and f"layer 3: the output of its {block} is" in finding.text
    assert any(culprit in name for name in finding.tensors) and all(".3." in name for name in finding.tensors)


@pytest.mark.parametrize("kill", [None, 0, 2])
@torch.no_grad()
def test_dense_and_expert_layers_are_compared_separately(kill: int | None) -> None:
    """In one model of sixteen experts, layers 0 and 2 dense: the dense ones write what one expert does, and are dead
    only beside each other, or where they write nothing."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 120, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 5}
    experts = {"num_experts": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "mlp_only_layers": [0, 2]}
    model = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**sizes, **experts, num_attention_heads=4, num_key_value_heads=2, head_dim=12)
    )
    for p in model.parameters():
        if p.ndim > 1:
            p[0].mul_(3)  # structure, as if it was trained
    if kill is not None:
        model.model.layers[kill].mlp.down_proj.weight.mul_(1e-3)
    found = check_health(zoo_of({"x": model}).donors[0])
    assert [f.text.partition(" is")[0] for f in found] == [f"layer {kill}: the output of its MLP"] * (kill is not None)


def test_faults_side_by_side(shared_data: Path, tmp_path: Path) -> None:
    def change(name: str, tensor: Tensor) -> Tensor:
        if name.endswith("1.self_attn.q_proj.weight"):
            return torch.full_like(tensor, 0.02)
        if name.endswith("2.mlp.up_proj.weight"):
            tensor[3, 4] = torch.nan
        if name.endswith("final.weight") or name == "model.norm.weight":
            tensor[0] = torch.inf
        return tensor * 0 if name.endswith("3.mlp.down_proj.weight") else tensor

    found = changed(shared_data / "models" / "stories260K", tmp_path / "a", change)
    assert {f.kind: f.tensors for f in found} == {
        "non-finite": ("model.layers.2.mlp.up_proj.weight", "model.norm.weight"),
        "constant": ("model.layers.1.self_attn.q_proj.weight",),
        "dead": ("model.layers.3.mlp.down_proj.weight",),
    }
    assert summarise_findings(found) == "non-finite, constant, dead" and summarise_findings([]) == "fine"
    assert all(f.tensors[0] in f.text and "\n" not in f.text for f in found)


@torch.no_grad()
def test_modules_and_empty_rows() -> None:
    """A plain module has no layers and is judged as a whole; rows of padding are no structure, not even many."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(90, 40), nn.Linear(40, 60), nn.ReLU(), nn.Linear(60, 40))
    model[0].weight[50:] = 0
    assert summarise_findings(check_health(zoo_of({"x": model}).donors[0])) == "untrained"
    model[3].weight[:10] *= 2
    assert check_health(zoo_of({"x": model}).donors[0]) == []


@pytest.mark.parametrize("most", [8, 24, 512])
@pytest.mark.parametrize("name", ["stories260K", "makemore-en-a", "arthur/run2-ep002"])
def test_measures_stand_for_reading_every_value(shared_data: Path, tmp_path: Path, name: str, most: int) -> None:
    """With what was measured when the donor was added, fewer bytes are read and the same is found.

    GPT-2 is among them, whose matrices are transposed and partly fused; so is a dead block and a constant matrix.
    """

    def damage(name: str, tensor: Tensor) -> Tensor:
        if ".1." in name and tensor.ndim > 1:
            return shuffle(tensor)
        return tensor * (1e-4 if "layers.0.mlp" in name or "h.0.mlp" in name else 1)

    source = shared_data / "models" / name
    for change in (damage, lambda n, t: torch.zeros_like(t) if "wte" in n or "embed" in n else t):
        target = tmp_path / str(len(list(tmp_path.iterdir())))
        changed(source, target, change)
        donor = ModelCheckpoint.open(target)
        measures = {name: m for file in measure_checkpoint(donor) for name, m in file.measures.items()}
        findings = check_health(donor, most=most)
        assert findings and check_health(ModelCheckpoint.open(target), most=most, measures=measures) == findings


def test_only_a_sample_of_values_is_examined(tmp_path: Path, tiny_llama: Callable[..., Path]) -> None:
    donor = ModelCheckpoint.open(tiny_llama(tmp_path / "a", hidden_size=64, intermediate_size=160))
    values: list[int] = []
    (finding,) = check_health(donor, most=24, progress=values.append)
    assert finding.kind == "untrained" and sum(values) == donor.parameters
    assert check_health(donor, most=24, seed=1) != [finding]  # other rows have another kurtosis
