"""The initialisations that run a text through the base, against PEFT on the whole model and against plain algebra."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from baselines.calibration import calibration_windows
from baselines.lora import text_inits
from headstart import initialize_lora_weights, samplers
from tests.conftest import make_llama
from zoo.donors.zoo import Zoo, open_standalone
from zoo.errors import UserError
from zoo.lora.adapters import compensated_weight
from zoo.targets.blueprint import Blueprint
from zoo.training.corpora import python_reference
from zoo.training.documents import TextSource
from zoo.training.loop import next_token_loss

peft = pytest.importorskip("peft")
NAMES = ["eva", "corda", "lora_ga"]
WINDOWS = 8


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama and a GPT-2, whose weights lie transposed, and a text."""
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("text-inits")
    make_llama(folder / "llama", vocab_size=256)
    torch.manual_seed(0)
    dropout = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
    sizes = {"vocab_size": 256, "n_embd": 16, "n_head": 2, "n_layer": 1, "n_positions": 64}
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, **dropout)).save_pretrained(folder / "gpt2")
    (folder / "text.txt").write_bytes(python_reference()[:10_000])
    return folder


def options(rank: int = 4, **more: Any) -> dict[str, Any]:
    return {"r": rank, "lora_alpha": 2 * rank, "target_modules": "all-linear", **more}


def fitted(name: str, folder: Path, lora_config: dict[str, Any] | None = None, **more: Any) -> Any:
    text = {"text": str(folder.parent / "text.txt"), "windows": WINDOWS} | more
    return samplers.get(name)(**text).fit(
        open_standalone(folder), Blueprint.from_lora(folder, lora_config or options())
    )


def filled(name: str, folder: Path, lora_config: dict[str, Any] | None = None, **more: Any) -> dict[str, Tensor]:
    return dict(fitted(name, folder, lora_config, **more).sample(Blueprint.from_lora(folder, lora_config or options())))


def windows_of(folder: Path) -> Tensor:
    (donor,) = open_standalone(folder).donors
    return calibration_windows(TextSource(str(folder.parent / "text.txt")), donor, None, WINDOWS, "test")


def peft_itself(name: str, folder: Path) -> Any:
    """The whole model as PEFT initialises it on the same windows."""
    from peft.tuners.lora.corda import preprocess_corda
    from peft.tuners.lora.loraga import preprocess_loraga

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    targets = [pair.module for pair in Blueprint.from_lora(folder, options()).adapter.pairs]  # type: ignore[union-attr]
    windows, given = windows_of(folder), options(target_modules=targets, init_lora_weights=name)
    if name == "corda":
        config = peft.LoraConfig(**given, corda_config=peft.tuners.lora.config.CordaConfig())
        preprocess_corda(model, config, lambda: [model(input_ids=window) for window in windows.split(1)])
    else:
        config = peft.LoraConfig(**given, lora_ga_config=peft.LoraGAConfig())
        steps = windows.split(text_inits.BATCH_WINDOWS)
        preprocess_loraga(model, config, lambda: [next_token_loss(model, batch).backward() for batch in steps])
    return peft.get_peft_model(model, config)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("name", ["corda", "lora_ga"])
def test_pairs_and_changed_base_are_those_of_peft_on_the_whole_model(name: str, architecture: str, place: Path) -> None:
    folder = place / architecture
    found, theirs = filled(name, folder), peft_itself(name, folder)
    state = peft.get_peft_model_state_dict(theirs)
    before = dict(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).named_parameters())
    after = dict(theirs.get_base_model().named_parameters())
    for pair in Blueprint.from_lora(folder, options()).adapter.pairs:  # type: ignore[union-attr]
        a, b = found[pair.a].double(), found[pair.b].double()
        their_a, their_b = state[pair.a].double(), state[pair.b].double()
        if name == "lora_ga" and pair.transposed:  # PEFT scales by the inputs there, as the weight lies transposed
            their_b = their_b * (pair.rows / pair.columns) ** 0.25
        # Singular vectors have no sign of their own. CorDA takes both sides of a vector, LoRA-GA different ones.
        torch.testing.assert_close(a.norm(dim=1), their_a.norm(dim=1), rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(b.norm(dim=0), their_b.norm(dim=0), rtol=1e-3, atol=1e-6)
        assert torch.cosine_similarity(a, their_a, dim=1).abs().min() > 0.999
        assert torch.cosine_similarity(b, their_b, dim=0).abs().min() > 0.999
        weight = before[f"{pair.module}.weight"].detach()
        ours = compensated_weight(weight, pair, found[pair.a], found[pair.b])
        if name == "corda":
            torch.testing.assert_close(ours, after[f"{pair.module}.base_layer.weight"].detach(), atol=1e-4, rtol=1e-3)
        assert (ours - weight).norm() > 1e-4 * weight.norm()


@pytest.mark.filterwarnings("ignore")
def test_eva_finds_the_principal_directions_of_what_a_layer_reads(place: Path) -> None:
    folder = place / "llama"
    found = filled("eva", folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for pair in Blueprint.from_lora(folder, options()).adapter.pairs:  # type: ignore[union-attr]
        seen: list[Tensor] = []
        handle = model.get_submodule(pair.module).register_forward_pre_hook(
            lambda module, args, seen=seen: seen.append(args[0].detach().flatten(0, -2))
        )
        with torch.no_grad():
            model(input_ids=windows_of(folder))
        handle.remove()
        inputs = torch.cat(seen).double()
        variances = torch.linalg.svdvals(inputs - inputs.mean(0)).square()
        a = found[pair.a].double()
        torch.testing.assert_close(a @ a.mT, torch.eye(pair.rank).double(), atol=1e-3, rtol=0)
        explained = ((inputs - inputs.mean(0)) @ a.mT).square().sum()
        assert explained > 0.97 * variances[: pair.rank].sum(), "no directions explain more"
        assert not found[pair.b].any()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
def test_bytes_do_not_depend_on_which_other_modules_are_adapted(name: str, place: Path) -> None:
    state = torch.random.get_rng_state()
    whole = filled(name, place / "llama")
    assert torch.equal(torch.random.get_rng_state(), state)  # the global random state is left as it was
    torch.rand(7)
    part = filled(name, place / "llama", options(target_modules=["o_proj", "k_proj"]))
    assert set(part) < set(whole) and all(torch.equal(whole[key], part[key]) for key in part)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
def test_a_model_in_memory_is_filled_as_a_folder_is(name: str, place: Path) -> None:
    folder = place / "llama"
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = torch.arange(30)[None]
    with torch.no_grad():
        before = base(tokens).logits
    adapted = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**options()))
    sampler = samplers.get(name)(text=str(place / "text.txt"), windows=WINDOWS)
    initialize_lora_weights(adapted, sampler)  # type: ignore[arg-type]
    state, expected = peft.get_peft_model_state_dict(adapted), filled(name, folder)
    assert all(torch.equal(state[key], tensor) for key, tensor in expected.items()) and set(state) == set(expected)
    with torch.no_grad():
        assert (adapted(tokens).logits - before).abs().max() < 1e-5 * before.abs().max()


@pytest.mark.filterwarnings("ignore")
def test_what_does_not_fit_is_refused_in_one_line(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = place / "llama"
    with pytest.raises(UserError, match=r"eva: runs a text through the base; give one with --set text=FILE"):
        filled("eva", folder, text=None)
    (place / "short.txt").write_text("short")
    with pytest.raises(UserError, match=r"corda: .*short\.txt: 5 tokens are too few"):
        filled("corda", folder, text=str(place / "short.txt"))
    with pytest.raises(UserError, match=r"lora_ga: rank 9 is above half of 16, .*k_proj; give at most 8"):
        filled("lora_ga", folder, options(9))
    with pytest.raises(UserError, match=r"eva: rank 17 is above half of 32, a side of .*q_proj; give at most 16"):
        filled("eva", folder, options(17, target_modules=["q_proj"]))
    with pytest.raises(UserError, match="give it a zoo that contains the base"):
        text = str(place / "text.txt")
        samplers.get("eva")(text=text).fit(Zoo.of_donors([]), Blueprint.from_lora(folder, options()))
    other = Blueprint.from_lora(folder, options(5))
    with pytest.raises(UserError, match=r"eva: is not fitted to .*lora_A.weight \[5, 32\]"):
        dict(fitted("eva", folder).sample(other))
    monkeypatch.setattr(text_inits, "MOST_BATCHES", 2)
    with pytest.raises(UserError, match="its directions still change after 2 batches of text; give a lower rank"):
        filled("eva", folder)
