"""headstart lora: folders that PEFT loads, logits before and after, PEFT's conversion back, plans and refusals."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

import headstart
from headstart import samplers
from headstart.lora.in_memory import initialize_lora_weights
from tests.baselines.lora.test_peft_inits import NAMES, model_of
from tests.conftest import make_llama
from tests.headstart.generate.test_every_method import TARGET
from tests.support import tiny
from tests.support.architectures import LISTED
from tests.support.commands import analyze, generate, lora
from tests.support.hub_server import Repo, files_of, serve, use_hub
from zoo.checkpoints.checkpoint import Checkpoint
from zoo.errors import UserError
from zoo.statistics.grouping import Grouping

peft = pytest.importorskip("peft")
ARCHITECTURES = ["llama-gqa-tied", "llama", "gpt2", "gpt_neox", "qwen2", "qwen2-tied", "phi3"]
ROOT = Path(__file__).resolve().parents[3]
TOKENS = torch.arange(12)[None]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return saved("llama-gqa-tied", tmp_path / "original")


def saved(architecture: str, folder: Path) -> Path:
    model_of(architecture).save_pretrained(folder)
    return folder


def written(base: Path | str, method: str, out: Path, rank: int = 4, **more: Any) -> Path:
    found = lora(base, method, rank, out, quiet=True, **more)
    assert isinstance(found, Path)
    return found


def model(folder: Path | str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(TOKENS).logits


def adapted(base: PreTrainedModel, folder: Path, **more: Any) -> Any:
    """The base with the adapter, with all of it loaded."""
    found = peft.PeftModel.from_pretrained(base, folder, **more)
    info = found.load_adapter(folder, adapter_name="again")
    assert not info.unexpected_keys and not [k for k in info.missing_keys if "lora_" in k]
    found.delete_adapter("again")
    return found


@torch.no_grad()
def trained(model: nn.Module) -> nn.Module:
    """As after training: every value of the adapter moved."""
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.add_(torch.randn_like(p), alpha=0.1)
    return model


@pytest.mark.parametrize(
    ("name", "architecture"), [("gaussian", "gpt2"), *(("peft-default", a) for a in ARCHITECTURES)]
)
def test_an_adapter_with_zero_b_leaves_the_logits_bit_equal(name: str, architecture: str, tmp_path: Path) -> None:
    original = saved(architecture, tmp_path / "original")
    out = written(original, name, tmp_path / "out")
    before = logits(model(original))
    found = adapted(model(original), out)
    assert torch.equal(logits(found), before)
    assert not torch.allclose(logits(trained(found)), before, atol=1e-2)  # the adapter is there
    record = json.loads((out / "headstart.json").read_text())
    assert record["step0"] == {"largest_change": 0.0, "module": None} and record["changed_base"] is None
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == "./original"


@pytest.mark.parametrize(
    ("name", "architecture"), [("olora", "qwen2"), ("olora", "gpt2"), *(("pissa", a) for a in ARCHITECTURES)]
)
def test_changed_base_and_adapter_are_the_original_and_convert_back(
    name: str, architecture: str, tmp_path: Path
) -> None:
    original = saved(architecture, tmp_path / "original")
    if (name, architecture) == ("olora", "gpt2"):
        with pytest.raises(UserError, match="use pissa"):
            lora(original, name, 4, tmp_path / "out")
        return
    out = written(original, name, tmp_path / "out", alpha=8)
    before = logits(model(original))
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "./base" and config["init_lora_weights"] is True
    found = adapted(model(out / config["base_model_name_or_path"]), out, is_trainable=True)
    assert (logits(found) - before).abs().max() < 1e-5 * before.abs().max()
    assert (logits(model(out / "base")) - before).abs().max() > 0.1  # something is missing there
    after = logits(trained(found))
    assert (after - before).abs().max() > 0.1
    found.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(out))
    converted = peft.PeftModel.from_pretrained(model(original), tmp_path / "converted")
    assert converted.peft_config["default"].r == 8
    assert (logits(converted) - after).abs().max() < 1e-5 * after.abs().max()
    card, record = (out / "README.md").read_text(), json.loads((out / "headstart.json").read_text())
    for words in record["changed_base"].values():
        assert words in card
    assert "path_initial_model_for_weight_conversion" in card and "base/" in card


def test_loading_as_pissa_would_take_the_part_out_twice(base: Path, tmp_path: Path) -> None:
    """Why adapter_config.json says init_lora_weights: true."""
    out = written(base, "pissa", tmp_path / "out")
    before = logits(model(base))
    path = out / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"init_lora_weights": "pissa"}))
    found = peft.PeftModel.from_pretrained(model(out / "base"), out)
    assert (logits(found) - before).abs().max() > 0.1


def test_orthogonal_changes_nothing_but_rounding(base: Path, tmp_path: Path) -> None:
    before = logits(model(base))
    after = logits(adapted(model(base), written(base, "orthogonal", tmp_path / "out")))
    assert 0 < (after - before).abs().max() < 1e-4
    record = json.loads((tmp_path / "out" / "headstart.json").read_text())
    assert 0 < record["step0"]["largest_change"] < 1e-6 and record["step0"]["module"]


@pytest.mark.parametrize(("name", "architecture"), [("pissa", "gpt2"), *((name, "llama-gqa-tied") for name in NAMES)])
def test_in_memory_gives_what_the_folder_holds(name: str, architecture: str, tmp_path: Path) -> None:
    original = saved(architecture, tmp_path / "original")
    out = written(original, name, tmp_path / "out", seed=5)
    before = logits(model(original))
    found = peft.get_peft_model(model(original), peft.LoraConfig(r=4, lora_alpha=4, target_modules="all-linear"))
    assert headstart.initialize_lora_weights is initialize_lora_weights
    initialize_lora_weights(found, samplers.get(name)(), seed=5)  # type: ignore[arg-type]
    state = peft.get_peft_model_state_dict(found)
    for key, tensor in load_file(out / "adapter_model.safetensors").items():
        torch.testing.assert_close(state[key], tensor)
    assert (logits(found) - before).abs().max() < 1e-4
    folder = json.loads((out / "headstart.json").read_text())
    loaded = adapted(model(out / "base" if folder["changed_base"] else original), out)
    torch.testing.assert_close(logits(loaded), logits(found), atol=1e-4, rtol=1e-4)
    if folder["changed_base"]:  # as the docstring says: save first, train, convert
        found.save_pretrained(tmp_path / "initial")
        after = logits(trained(found))
        found.save_pretrained(
            tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "initial")
        )
        converted = peft.PeftModel.from_pretrained(model(original), tmp_path / "converted")
        assert (logits(converted) - after).abs().max() < 1e-5 * after.abs().max()


def test_in_memory_by_name_for_another_adapter_and_in_half_precision(base: Path) -> None:
    found = peft.get_peft_model(model(base), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    found.add_adapter("second", peft.LoraConfig(r=4, target_modules=["v_proj"]))
    first = copy.deepcopy(peft.get_peft_model_state_dict(found))
    initialize_lora_weights(found, "gaussian", seed=1, adapter_name="second")
    second = peft.get_peft_model_state_dict(found, adapter_name="second")
    a = second["base_model.model.model.layers.0.self_attn.v_proj.lora_A.weight"]
    assert a.shape == (4, 32) and 0.15 < a.std() < 0.35
    assert all(torch.equal(t, first[k]) for k, t in peft.get_peft_model_state_dict(found).items())
    half = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    kept = logits(half)
    found = peft.get_peft_model(half, peft.LoraConfig(r=4, target_modules="all-linear"))
    initialize_lora_weights(found, "pissa")
    assert next(p for n, p in found.named_parameters() if "base_layer" in n).dtype == torch.bfloat16
    torch.testing.assert_close(logits(found), kept, atol=0.3, rtol=0.1)


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 24), nn.Linear(24, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())


def test_in_memory_takes_any_module_that_peft_takes() -> None:
    torch.manual_seed(0)
    plain, x = Plain(), torch.randn(5, 8)
    before = plain(x)
    found = peft.get_peft_model(plain, peft.LoraConfig(r=3, target_modules=["up", "down"]))
    initialize_lora_weights(found, "pissa")
    torch.testing.assert_close(found(x), before)
    assert found.base_model.model.up.lora_B["default"].weight.any()


def test_in_memory_refuses_what_it_cannot_do(base: Path) -> None:
    def made(**options: Any) -> Any:
        given = {"r": 4, "target_modules": ["q_proj"], **options}
        return peft.get_peft_model(model(base), peft.LoraConfig(**given))

    with pytest.raises(UserError, match="Dora"):
        initialize_lora_weights(made(use_dora=True), "pissa")
    with pytest.raises(UserError, match="bias"):
        initialize_lora_weights(made(lora_bias=True), "gaussian")
    with pytest.raises(UserError, match="init_lora_weights='pissa'"):
        initialize_lora_weights(made(init_lora_weights="pissa"), "olora")
    with pytest.raises(UserError, match="even rank"):
        initialize_lora_weights(made(r=3), "orthogonal")
    with pytest.raises(UserError, match="unknown adapter"):
        initialize_lora_weights(made(), "gaussian", adapter_name="other")
    with pytest.raises(UserError, match="leave reference out"):
        initialize_lora_weights(made(), "gaussian", reference="somewhere")
    with pytest.raises(UserError, match="not LoRA adapters"):
        initialize_lora_weights(made(), "row-column")
    merged = made()
    merged.merge_adapter()
    with pytest.raises(UserError, match="unmerge"):
        initialize_lora_weights(merged, "gaussian")
    two = made()
    two.add_adapter("second", peft.LoraConfig(r=4, target_modules=["v_proj"]))
    with pytest.raises(UserError, match="'second' relies on it"):
        initialize_lora_weights(two, "pissa")
    with torch.device("meta"):
        hollow = LlamaForCausalLM(tiny.config())
    with pytest.raises(UserError, match="meta device"):
        initialize_lora_weights(peft.get_peft_model(hollow, peft.LoraConfig(r=2, target_modules=["q_proj"])), "pissa")
    quantised = made()
    layer = quantised.base_model.model.model.layers[0].self_attn.q_proj.base_layer
    layer.weight = nn.Parameter(layer.weight.data.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(UserError, match="not quantised"):
        initialize_lora_weights(quantised, "pissa")


def test_a_half_precision_base_stays_so_unless_asked(tmp_path: Path) -> None:
    original = tmp_path / "original"
    model_of("llama-gqa-tied").bfloat16().save_pretrained(original)
    half = written(original, "pissa", tmp_path / "half")
    full = written(original, "pissa", tmp_path / "full", dtype="float32")
    assert {t.dtype for t in load_file(half / "base" / "model.safetensors").values()} == {torch.bfloat16}
    assert {t.dtype for t in load_file(half / "adapter_model.safetensors").values()} == {torch.float32}
    assert json.loads((full / "base" / "config.json").read_text())["dtype"] == "float32"
    before = logits(model(original))
    rounded, exact = (logits(adapted(model(f / "base"), f)) for f in (half, full))
    assert (exact - before).abs().max() < 1e-5 * before.abs().max() < (rounded - before).abs().max()


def test_the_changed_base_keeps_what_belongs_to_it(base: Path, tmp_path: Path) -> None:
    (base / "tokenizer.json").write_text("{}")
    out = written(base, "olora", tmp_path / "out", targets="o_proj, q_proj")
    assert (out / "base" / "tokenizer.json").read_text() == "{}"
    one, two = Checkpoint.open(base), Checkpoint.open(out / "base")
    assert set(one.names) == set(two.names) and one.config == two.config
    changed = {n for n in one.names if not torch.equal(one.read(n), two.read(n))}
    assert changed == {n for n in one.names if "o_proj" in n or "q_proj" in n}
    assert json.loads((out / "headstart.json").read_text())["adapter"]["targets"] == ["o_proj", "q_proj"]


def test_real_checkpoints(shared_data: Path, tmp_path: Path) -> None:
    """Stories, and a GPT-2 of makemore, whose weights are Conv1D."""
    for i, name in enumerate(("stories260K", "makemore-en-a")):
        original = shared_data / "models" / name
        before = logits(model(original))
        default = written(original, "peft-default", tmp_path / f"default{i}")
        assert torch.equal(logits(adapted(model(original), default)), before)
        pissa = written(original, "pissa", tmp_path / f"pissa{i}", rank=2)
        after = logits(adapted(model(pissa / "base"), pissa))
        assert (after - before).abs().max() < 1e-5 * before.abs().max()


def test_the_record_says_where_it_comes_from(base: Path, tmp_path: Path) -> None:
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    out = written(base, "gaussian", tmp_path / "out", seed=3, alpha=2.5)
    record = json.loads((out / "headstart.json").read_text())
    assert record["versions"]["peft"] == peft.__version__ and record["seed"] == 3 and record["method"] == "gaussian"
    (donor,) = record["donors"]
    assert donor["name"] == "original" and donor["license"] == "apache-2.0" and len(donor["sha256"]) == 64
    words = record["command"].split()
    assert words[:2] == ["headstart", "lora"] and words[words.index("--alpha") + 1] == "2.5"
    assert record["adapter"] == {"rank": 4, "alpha": 2.5, "targets": record["adapter"]["targets"], "pairs": 14}
    card = (out / "README.md").read_text()
    assert "license: apache-2.0" in card and "library_name: peft" in card and "pipeline_tag: text-generation" in card
    assert "BASE is the folder of `./original`" in card and "base_model:" not in card
    assert "headstart lora --base original" in card and "--out out" in card
    assert sorted(p.name for p in out.iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "headstart.json",
    ]  # fmt: skip


def test_no_published_file_names_a_folder_of_this_machine(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (base / "README.md").write_text("---\nlicense: 'Terms: of <b>use</b>'\n---\n")
    for method in ("gaussian", "pissa"):
        out = written(base, method, tmp_path / method)
        for file in (*out.rglob("*.json"), *out.rglob("README.md")):
            assert str(tmp_path) not in file.read_text() or file.name == "headstart.json", file
        for card in out.rglob("README.md"):
            assert "license: other\nlicense_name: 'Terms: of use'\n" in card.read_text()
    monkeypatch.chdir(tmp_path)  # as it was typed, where that is not absolute
    config = json.loads((written("original", "gaussian", Path("typed")) / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "original"
    snapshot = tmp_path / "models--org--some-model" / "snapshots" / ("c" * 40)
    snapshot.parent.mkdir(parents=True)
    base.rename(snapshot)
    out = written(snapshot, "gaussian", tmp_path / "cached")
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/some-model", "c" * 40)
    assert "base_model:\n- org/some-model\n" in (out / "README.md").read_text()
    assert f'from_pretrained("org/some-model", revision="{"c" * 40}")' in (out / "README.md").read_text()


def test_a_plan_counts_and_does_nothing(base: Path, tmp_path: Path) -> None:
    plain = lora(base, "gaussian", 4, tmp_path / "out", plan=True)
    changed = lora(base, "pissa", 4, tmp_path / "out", plan=True)
    assert isinstance(plain, dict) and isinstance(changed, dict) and not (tmp_path / "out").exists()
    out = written(base, "pissa", tmp_path / "out")
    adapter, whole = out / "adapter_model.safetensors", out / "base" / "model.safetensors"
    assert plain["write"]["bytes"] == changed["write"]["adapter"]["bytes"] == adapter.stat().st_size
    assert changed["write"]["base"]["bytes"] == whole.stat().st_size
    assert changed["write"]["bytes"] == adapter.stat().st_size + whole.stat().st_size
    assert changed["read"]["tensors"] == len(load_file(whole)) and changed["download"]["bytes"] == 0


def test_only_needed_files_of_a_hub_model_are_fetched(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve() as hub:
        hub.repos["org/model"] = Repo(files_of(base))
        use_hub(monkeypatch, hub.url, tmp_path / "home")
        weights = next(n for n in hub.repos["org/model"].files if n.endswith(".safetensors"))
        size = len(hub.repos["org/model"].files[weights])
        plan = json.loads(json.dumps(lora("org/model@main", "pissa", 4, tmp_path / "planned", plan=True)))
        assert plan["download"]["bytes"] > size and plan["read"]["tensors"] == 20 == plan["write"]["base"]["tensors"]
        assert lora("org/model@main", "gaussian", 4, tmp_path / "near") == tmp_path / "near"
        commit = hub.repos["org/model"].commit
        record = json.loads((tmp_path / "near" / "headstart.json").read_text())
        assert record["donors"] == [{"name": "org/model", "revision": commit, "sha256": None, "license": "mit"}]
        config = json.loads((tmp_path / "near" / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == "org/model" and config["revision"] == "main"
        assert "base_model:\n- org/model" in (tmp_path / "near" / "README.md").read_text()
        lora("org/model@main", "pissa", 4, tmp_path / "whole")
    record = json.loads((tmp_path / "whole" / "headstart.json").read_text())
    assert len(record["donors"][0]["sha256"]) == 64 and record["donors"][0]["revision"] == commit
    before = logits(model(base))
    after = logits(adapted(model(tmp_path / "whole" / "base"), tmp_path / "whole"))
    assert (after - before).abs().max() < 1e-5 * before.abs().max()


def test_a_reference_is_another_model_of_the_same_name_the_base_or_an_analysis(base: Path, tmp_path: Path) -> None:
    few = ["bootstraps=10"]
    deep = {**LISTED["gpt2"], "n_layer": 4}
    other = tmp_path / "elsewhere" / "original"
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**deep)).save_pretrained(other)
    out = written(base, "pareto", tmp_path / "out", reference=other, settings=few)
    record = json.loads((out / "headstart.json").read_text())
    one, two = record["donors"]
    assert one["name"] == "original" and two["name"] == str(other.resolve()) and one["sha256"] != two["sha256"]
    assert torch.equal(logits(adapted(model(base), out)), logits(model(base)))
    with pytest.raises(UserError, match="layers"):  # the base has two, which are no statistics
        lora(base, "pareto", 4, tmp_path / "none", settings=few)
    itself = written(other, "pareto", tmp_path / "itself", reference=str(other), settings=few)
    assert len(json.loads((itself / "headstart.json").read_text())["donors"]) == 1
    plan = lora(base, "pareto", 4, tmp_path / "plan", reference=other, plan=True)
    assert isinstance(plan, dict) and [d["name"] for d in plan["read"]["donors"]] == ["original", str(other.resolve())]
    with pytest.raises(UserError, match="headstart analyze"):
        lora(base, "pareto", 4, tmp_path / "none", reference=tmp_path / "analysis.json")
    found = peft.get_peft_model(model(base), peft.LoraConfig(r=4, lora_alpha=4, target_modules="all-linear"))
    sampler = samplers.get("pareto")(bootstraps=10)  # type: ignore[call-arg]
    initialize_lora_weights(found, sampler, reference=model(other))  # type: ignore[arg-type]
    state = peft.get_peft_model_state_dict(found)
    for key, tensor in load_file(out / "adapter_model.safetensors").items():
        torch.testing.assert_close(state[key], tensor)
    assert sampler.options()["reference_model"] is None  # the caller's sampler stays as it was


def apart(folder: Path) -> Path:
    """The gate's spectra of all layers differ evenly from those of the other projections, at random among those."""
    weights = load_file(folder / "model.safetensors")
    for name, weight in weights.items():
        layer = int(name.split(".")[2]) if "layers" in name else 0
        if weight.ndim == 2 and "layers" in name:
            u, s, v = torch.linalg.svd(weight, full_matrices=False)
            ramp = torch.linspace(1, 0, len(s))
            s = torch.exp(ramp * (4.0 + 0.3 * layer)) if "gate" in name else torch.exp(0.1 * layer**3 * ramp / 10)
            weights[name] = (u * s) @ v
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("differs", [True, False])
def test_a_reference_reduced_to_its_analysis_gives_the_same_bytes_and_is_named(
    base: Path, tmp_path: Path, differs: bool
) -> None:
    """Of a model whose matrices have fewer singular values than were asked for."""
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 4, "vocab_size": 16}
    folder = make_llama(tmp_path / "model", **small)
    if differs:
        apart(folder)
    analyze(tmp_path / "analysis", donor=str(folder), ranks=(256,), bootstraps=10, quiet=True)
    analysis = tmp_path / "analysis" / "analysis.json"
    few = ["bootstraps=10", "reference_rank=256"]
    outs = [
        written(base, "pareto", tmp_path / f"out{i}", reference=given, settings=few)
        for i, given in enumerate((folder, analysis, f"{analysis}#model"))
    ]
    first = json.loads((outs[0] / "headstart.json").read_text())
    assert first["grouping"]["undifferentiated"] != differs and first["grouping"]["source"]["name"] == "model"
    words = Grouping.from_json(first["grouping"]).description
    assert (
        f"Characterisation of model by the top {first['grouping']['rank']} singular values: {words}"
        in (outs[0] / "README.md").read_text()
    )
    for out in outs:
        assert (out / "adapter_model.safetensors").read_bytes() == (outs[0] / "adapter_model.safetensors").read_bytes()
        found = json.loads((out / "headstart.json").read_text())
        assert found["grouping"] == first["grouping"]
        assert found["donors"] == first["donors"] and [d["name"] for d in found["donors"]] == ["original", "model"]
        assert all(d["sha256"][:16] in (out / "README.md").read_text() for d in found["donors"])
    with pytest.raises(UserError, match="did you mean 'model'"):
        lora(base, "pareto", 4, tmp_path / "none", reference=f"{analysis}#modle")


def test_base_and_reference_are_no_settings(base: Path, tmp_path: Path) -> None:
    for setting, argument in (("reference_model=analysis.json", "--reference"), (f"base={base}", "--base")):
        with pytest.raises(UserError, match=f"give it as {argument}"):
            lora(base, "pareto", 4, tmp_path / "out", settings=[setting])


def test_a_reference_is_refused_by_methods_that_follow_none(base: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="takes no --reference"):
        lora(base, "pissa", 4, tmp_path / "out", reference=str(base))


def test_what_does_not_fit_is_refused_in_one_line_before_anything_is_written(base: Path, tmp_path: Path) -> None:
    def refusal(given: Path | str, method: str = "pissa", rank: int = 4, **more: Any) -> str:
        with pytest.raises(UserError) as caught:
            lora(given, method, rank, more.pop("out", tmp_path / "out"), quiet=True, **more)
        assert not (tmp_path / "out").exists() and "\n" not in str(caught.value)
        return str(caught.value)

    assert "k_proj (16 x 32)" in refusal(base, rank=17) and "at most 16" in refusal(base, rank=17)
    assert "did you mean 'q_proj'" in refusal(base, targets="q_prj")
    assert "is a LlamaMLP" in refusal(base, targets="mlp")
    assert "--rank 0" in refusal(base, rank=0)
    assert "--alpha" in refusal(base, alpha=float("nan"))
    assert "--targets" in refusal(base, targets=" , ")
    assert "pareto, peft-default" in refusal(base, "row-column")
    assert "did you mean" in refusal(base, "pisa")
    assert "even rank" in refusal(base, "orthogonal", rank=3)
    assert "dtype 'int8' cannot be written" in refusal(base, dtype="int8")
    assert "at least 0" in refusal(base, settings=["niter=-1"])
    assert "without dots" in refusal(base, out=tmp_path / "my.adapter")
    assert "default" in refusal(base, out=tmp_path / "default")
    assert "lm_head shares" in refusal(base, targets="lm_head")
    assert "no such folder" in refusal(str(tmp_path / "nowhere"))
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text((base / "config.json").read_text())
    assert "no safetensors" in refusal(bare)
    config = json.loads((base / "config.json").read_text()) | {"quantization_config": {"quant_method": "gptq"}}
    (base / "config.json").write_text(json.dumps(config))
    assert "quantised" in refusal(base)


def test_a_damaged_base_leaves_nothing_behind(base: Path, tmp_path: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj\.weight' holds NaN"):
        lora(base, "pissa", 4, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["original"]


def test_commands_for_models_send_lora_methods_on(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="headstart lora --base MODEL --method pissa"):
        generate(TARGET, "pissa", tmp_path / "out")
    from tests.support.commands import compare

    with pytest.raises(UserError, match="headstart lora"):
        compare(target=TARGET, methods=["gaussian"], corpus="no.txt", out=tmp_path / "out")


def test_without_peft_the_extra_is_named(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"pip install 'headstart\[peft\]'"):
        lora(base, "gaussian", 4, tmp_path / "out")
