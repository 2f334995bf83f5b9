"""Pareto-reshaped LoRA pairs over real adapters' blueprints: their laws, their caps, their refusals."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, MambaConfig, MambaForCausalLM

from baselines.lora.pareto import Pareto
from zoo.donors.folder import StandaloneDonor
from zoo.donors.memory import zoo_of
from zoo.donors.zoo import Zoo, open_standalone
from zoo.errors import UserError
from zoo.statistics.grouping import Grouping
from zoo.statistics.similarity import pooled_distances
from zoo.targets.blueprint import Blueprint

pytest.importorskip("peft")

MakeLlama = Callable[..., Path]
# The example of the paper: the gate is the reference weight, V, up and down are its partners.
PAPER = Grouping(
    rank=16,
    reference="mlp.gate",
    gaussian=("attn.v", "mlp.up", "mlp.down"),
    pareto=("attn.q", "attn.k", "attn.o"),
    undifferentiated=False,
    source={},
)
ALIKE = replace(PAPER, reference=None, gaussian=(), undifferentiated=True)


def gpt2(folder: Path, layers: int = 3, width: int = 32) -> Path:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=96, n_embd=width, n_layer=layers, n_head=4, n_positions=64, bos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Zoo]:
    """A Llama with two query heads to a key and tied embeddings, and a GPT-2 (fused, transposed)."""
    from tests.conftest import make_llama

    path = tmp_path_factory.mktemp("bases")
    llama = make_llama(path / "llama", num_hidden_layers=4)
    return {"llama": open_standalone(llama, quiet=True), "gpt2": open_standalone(gpt2(path / "gpt2"), quiet=True)}


def adapter(base: Zoo, rank: int = 4, alpha: float = 8.0) -> Blueprint:
    return Blueprint.from_lora(base.path, {"r": rank, "lora_alpha": alpha, "target_modules": "all-linear"})


def planted(grouping: Grouping = PAPER, **options: Any) -> Pareto:
    """A sampler that keeps this characterisation, as a saved one would."""
    sampler = Pareto(**options)
    sampler.restore({"grouping": grouping.to_json(), "donors": [], "base": None}, {})
    return sampler


def saved(folder: Path, grouping: Grouping) -> str:
    """An analysis.json that holds nothing but this."""
    path = folder / "analysis.json"
    path.write_text(json.dumps({"models": {"m": {"grouping": {str(grouping.rank): grouping.to_json()}}}}))
    return str(path)


def drawn(sampler: Pareto, blueprint: Blueprint, seed: int = 0) -> dict[str, Tensor]:
    return dict(sampler.sample(blueprint, seed))


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def change(pair: Any, tensors: dict[str, Tensor], base: Zoo) -> float:
    """||s B A|| / ||W|| by the product itself."""
    product = pair.scaling * tensors[pair.b].double() @ tensors[pair.a].double()
    weight = base.donors[0].read(pair.weight).double()
    assert product.shape == (weight.mT if pair.transposed else weight).shape
    return float(product.norm() / weight.norm())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("std", [None, 0.3])
@pytest.mark.parametrize("options", [{}, {"template": "gaussian-process", "mode": "add"}])
def test_every_pair_is_filled_to_the_deviation_asked_for(
    bases: dict[str, Zoo], name: str, std: float | None, options: dict[str, Any]
) -> None:
    blueprint = adapter(bases[name])
    tensors = drawn(planted(std=std, **options), blueprint)
    assert list(tensors) == list(blueprint.names)
    assert blueprint.adapter is not None
    for pair in blueprint.adapter.pairs:
        a, b = tensors[pair.a], tensors[pair.b]
        assert a.shape == blueprint[pair.a].shape and b.shape == blueprint[pair.b].shape
        assert a.dtype == b.dtype == torch.float32
        assert float(a.std(correction=0)) == pytest.approx(std or 1 / math.sqrt(3 * pair.columns), rel=1e-5)
        assert abs(float(a.mean())) < 1e-6
        assert not b.any()


def test_members_of_a_group_share_a_template_and_partners_are_further_from_it(tmp_path: Path) -> None:
    """On average 0.03 of a Pareto member's entries are replaced and half of a Gaussian one's; the groups of the
    reference weight and of the others have nothing to do with each other."""
    from tests.conftest import make_llama

    folder = make_llama(tmp_path / "wide", hidden_size=128, intermediate_size=128, num_hidden_layers=10)
    blueprint = Blueprint.from_lora(folder, {"r": 16, "target_modules": "all-linear"})
    tensors = drawn(planted(strategy="both_compensated"), blueprint)

    def members(module: str, which: str = "a") -> Tensor:
        assert blueprint.adapter is not None
        found = [tensors[getattr(p, which)].flatten() for p in blueprint.adapter.pairs if p.module.endswith(module)]
        return torch.nn.functional.normalize(torch.stack(found).double(), dim=1)

    def distance(one: str, other: str, which: str = "a") -> float:
        """The median over pairs of different layers, of A of the one and A (or B) of the other."""
        a, b = members(one), members(other, which)
        between = (1 - a @ b.mT)[~torch.eye(len(a), dtype=torch.bool)]
        return float(between.median())

    assert distance("q_proj", "q_proj") < 0.1 and distance("gate_proj", "gate_proj") < 0.1
    assert distance("q_proj", "o_proj") < 0.1
    assert distance("gate_proj", "v_proj") == pytest.approx(0.5, abs=0.1)
    assert distance("v_proj", "v_proj") == pytest.approx(0.75, abs=0.1)
    assert distance("up_proj", "v_proj") == pytest.approx(0.75, abs=0.1)
    assert distance("gate_proj", "q_proj") == pytest.approx(1.0, abs=0.1)
    assert distance("v_proj", "q_proj") == pytest.approx(1.0, abs=0.1)
    assert distance("q_proj", "q_proj", "b") < 0.1  # [128, 16] and [16, 128] are as long as each other


def test_pairs_without_differences_share_one_template(bases: dict[str, Zoo]) -> None:
    blueprint = adapter(bases["llama"])
    tensors = drawn(planted(ALIKE, nmin=1, exponent=20.0), blueprint)  # one entry is replaced
    gate, query = (next(t for n, t in tensors.items() if f"{m}.lora_A" in n) for m in ("gate_proj", "q_proj"))
    cosine = torch.nn.functional.cosine_similarity(gate.flatten(), query.flatten(), dim=0)
    assert float(cosine) > 0.9


def test_fused_projections_go_by_their_first_part(bases: dict[str, Zoo]) -> None:
    """c_attn (q, k, v) by q, whatever v is; c_fc is up."""
    blueprint = adapter(bases["gpt2"])
    few = {"nmin": 1, "exponent": 20.0}
    by_q = replace(PAPER, reference="attn.q", gaussian=("attn.v",), pareto=("mlp.up",))

    def cosine(grouping: Grouping, one: str, other: str) -> float:
        tensors = drawn(planted(grouping, **few), blueprint)
        a, b = (next(t for n, t in tensors.items() if f"h.{m}.lora_A" in n).flatten() for m in (one, other))
        return float(torch.nn.functional.cosine_similarity(a, b, dim=0))

    assert cosine(by_q, "0.attn.c_attn", "1.attn.c_attn") > 0.9
    assert abs(cosine(by_q, "0.attn.c_attn", "0.mlp.c_fc")) < 0.4
    assert cosine(PAPER, "0.attn.c_attn", "0.attn.c_proj") > 0.9
    assert abs(cosine(PAPER, "0.attn.c_attn", "0.mlp.c_fc")) < 0.4


@pytest.mark.parametrize("strategy", ["A_only", "both_compensated", "both_small"])
def test_bytes_do_not_depend_on_order_and_survive_saving(bases: dict[str, Zoo], tmp_path: Path, strategy: str) -> None:
    base = bases["llama"]
    blueprint = adapter(base)
    assert blueprint.adapter is not None
    backwards = replace(
        blueprint,
        specs=blueprint.specs[::-1],
        adapter=replace(blueprint.adapter, pairs=blueprint.adapter.pairs[::-1]),
    )
    sampler = Pareto(strategy=strategy, reference_model=saved(tmp_path, PAPER)).fit(base, blueprint)
    tensors = drawn(sampler, blueprint)
    assert same(tensors, drawn(sampler, backwards))
    assert not same(tensors, drawn(sampler, blueprint, seed=1))
    sampler.save(tmp_path / "sampler")
    loaded = Pareto.load(tmp_path / "sampler")
    assert loaded.grouping == sampler.grouping == PAPER
    assert loaded.donors == sampler.donors == (("llama",) if strategy == "both_small" else ())
    assert same(tensors, drawn(loaded, blueprint))
    assert loaded.compensated == (strategy == "both_compensated")


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_both_small_keeps_its_cap_on_every_pair(
    bases: dict[str, Zoo], name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = bases[name]
    blueprint = adapter(base)
    assert blueprint.adapter is not None
    uncapped = drawn(planted(ALIKE, strategy="both_compensated"), blueprint)
    ratios = sorted(change(pair, uncapped, base) for pair in blueprint.adapter.pairs)
    cap = (ratios[0] + ratios[-1]) / 2  # between: some pairs are above it and some below
    with caplog.at_level(logging.INFO, logger="baselines.lora.pareto"):
        options: dict[str, Any] = {"strategy": "both_small", "cap": cap, "reference_model": saved(tmp_path, ALIKE)}
        tensors = drawn(Pareto(**options).fit(base, blueprint), blueprint)
    changed = 0
    for pair in blueprint.adapter.pairs:
        before, after = change(pair, uncapped, base), change(pair, tensors, base)
        assert after == pytest.approx(min(before, cap), rel=1e-5)
        assert torch.equal(tensors[pair.a], uncapped[pair.a])
        assert torch.equal(tensors[pair.b], uncapped[pair.b]) == (before < cap)
        changed += before > cap
    assert 0 < changed < len(blueprint.adapter.pairs)
    assert f"from {ratios[0]:.3g} to {cap:.3g} over {len(ratios)} pairs" in caplog.text


def test_pareto_counts_have_the_exponent_of_the_reference(
    bases: dict[str, Zoo], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    blueprint = adapter(bases["llama"])
    known = drawn(planted(replace(ALIKE, exponent=2.44)), blueprint)
    assert same(known, drawn(planted(ALIKE, exponent=1.44), blueprint))
    assert not same(known, drawn(planted(replace(ALIKE, exponent=1.3)), blueprint))
    own = planted(replace(ALIKE, exponent=2.44), exponent=0.5)  # an option precedes the reference
    assert same(drawn(own, blueprint), drawn(planted(ALIKE, exponent=0.5), blueprint))
    for exponent, level, said in ((2.44, logging.INFO, "exponent - 1: 1.44"), (None, logging.WARNING, "paper's, 0.78")):
        caplog.clear()
        reference = saved(tmp_path, replace(PAPER, exponent=exponent))
        with caplog.at_level(logging.INFO, logger="baselines.lora.pareto"):
            sampler = Pareto(reference_model=reference).fit(None, blueprint)
        assert sampler.count_exponent == pytest.approx(1.44 if exponent else 0.78)
        assert [r.levelno for r in caplog.records if said in r.getMessage()] == [level]


def test_samplers_and_analyses_without_an_exponent_give_the_bytes_that_they_gave(
    bases: dict[str, Zoo], tmp_path: Path
) -> None:
    """Older versions wrote no exponent of the reference, and saved the option as 0.78."""
    blueprint = adapter(bases["llama"])
    old = ALIKE.to_json()
    del old["exponent"]
    path = tmp_path / "analysis.json"
    path.write_text(json.dumps({"models": {"m": {"grouping": {"16": old}}}}))
    expected = drawn(planted(ALIKE, exponent=0.78), blueprint)
    assert same(drawn(Pareto(reference_model=str(path)).fit(None, blueprint), blueprint), expected)
    saved_sampler = Pareto(exponent=0.78)
    saved_sampler.restore({"grouping": old, "donors": [], "base": None}, {})
    saved_sampler.save(tmp_path / "sampler")
    assert same(drawn(Pareto.load(tmp_path / "sampler"), blueprint), expected)


def test_singular_values_of_an_adapter_are_as_far_apart_as_its_entries_while_few_are_replaced(tmp_path: Path) -> None:
    """Distances between the flattened A of all pairs are the shares of replaced entries, whose law the reference gives.
    Distances between their own singular values are in proportion up to about a twentieth. Beyond, they hardly grow: so
    an adapter shows the reference's law in its entries, and in its singular values only near the template."""
    from tests.conftest import make_llama

    folder = make_llama(tmp_path / "m", hidden_size=64, intermediate_size=64, num_hidden_layers=9)
    blueprint = Blueprint.from_lora(folder, {"r": 8, "target_modules": "all-linear"})
    assert blueprint.adapter is not None
    near, beyond, far = [], [], []
    for seed in range(3):
        tensors = drawn(planted(replace(ALIKE, exponent=1.6), nmin=1), blueprint, seed)
        stack = torch.stack([tensors[p.a] for p in blueprint.adapter.pairs]).double()
        entries, values = (
            torch.nn.functional.normalize(x, dim=1) for x in (stack.flatten(1), torch.linalg.svdvals(stack))
        )
        first, second = torch.triu_indices(len(stack), len(stack), 1)
        replaced = 1 - (entries @ entries.mT)[first, second]
        ratio = 0.5 * (values[first] - values[second]).square().sum(1) / replaced
        for found, low, high in ((near, 1e-3, 0.01), (beyond, 0.01, 0.05), (far, 0.5, 1.5)):
            found.append(ratio[(replaced > low) & (replaced < high)])
    small, middle, large = (float(torch.cat(found).median()) for found in (near, beyond, far))
    assert 0.6 < middle / small < 1.6
    assert large / small < 0.3


def test_the_exponent_of_the_reference_shows_in_the_singular_values_where_few_entries_are_replaced(
    tmp_path: Path,
) -> None:
    """The exponent of the larger half of the distances between the singular values of A of all pairs."""
    from tests.conftest import make_llama

    folder = make_llama(tmp_path / "m", hidden_size=64, intermediate_size=64, num_hidden_layers=12)
    blueprint = Blueprint.from_lora(folder, {"r": 16, "target_modules": "all-linear"})
    assert blueprint.adapter is not None

    def exponent(of_reference: float, nmin: int | None) -> float:
        found = []
        for seed in range(3):
            tensors = drawn(planted(replace(ALIKE, exponent=of_reference), nmin=nmin), blueprint, seed)
            stack = torch.stack([tensors[pair.a] for pair in blueprint.adapter.pairs]).double()  # type: ignore[union-attr]
            values = pooled_distances({"a": torch.linalg.svdvals(stack)}, 16).values
            half = values[len(values) // 2 :]
            found.append(1 + 1 / float(np.log(half / half[0]).mean()))
        return sorted(found)[1]

    heavy, light, spread_out = exponent(1.6, 1), exponent(3.4, 1), exponent(1.6, None)
    assert 1.6 < heavy < 2.15
    assert light > heavy + 0.2
    assert spread_out > heavy + 0.15  # 1/384 of the entries are too many to show it


def test_the_change_at_step_0_is_logged(bases: dict[str, Zoo], caplog: pytest.LogCaptureFixture) -> None:
    blueprint = adapter(bases["llama"])
    assert blueprint.adapter is not None
    with caplog.at_level(logging.INFO, logger="baselines.lora.pareto"):
        drawn(planted(), blueprint)
        assert "B is zero" in caplog.text
        tensors = drawn(planted(strategy="both_compensated"), blueprint)
    norms = [float((p.scaling * tensors[p.b] @ tensors[p.a]).norm()) for p in blueprint.adapter.pairs]
    assert f"||s B A||, which the base's weights are less by, from {min(norms):.3g} to {max(norms):.3g}" in caplog.text


def test_a_reference_of_another_family_width_and_depth(
    bases: dict[str, Zoo], tmp_path: Path, tiny_llama: MakeLlama
) -> None:
    """Only its characterisation counts, and no weight of the base is read; a donor of the zoo will do, too."""
    reference = tiny_llama(tmp_path / "reference", hidden_size=48, intermediate_size=80, num_hidden_layers=5, seed=3)
    blueprint = adapter(bases["gpt2"])
    options: dict[str, Any] = {"bootstraps": 10, "reference_rank": 8}
    sampler = Pareto(reference_model=str(reference), **options).fit(None, blueprint)
    assert sampler.donors == () and [d["name"] for d in sampler.provenance(None)] == ["reference"]
    tensors = drawn(sampler, blueprint)
    assert all(tensors[name].shape == blueprint[name].shape for name in blueprint.names)
    zoo = replace(bases["gpt2"], members=(*bases["gpt2"].members, StandaloneDonor.open(reference, quiet=True)))
    named = Pareto(reference_model="reference", **options)
    assert named.planned_donors(zoo, blueprint) == ("reference",)
    assert same(drawn(named.fit(zoo, blueprint), blueprint), tensors)
    assert Pareto(reference_model="reference", strategy="both_small").planned_donors(zoo, blueprint) == (
        "gpt2",
        "reference",
    )


def test_without_a_reference_the_base_is_used_and_logged(
    bases: dict[str, Zoo], caplog: pytest.LogCaptureFixture
) -> None:
    blueprint = adapter(bases["llama"])
    with caplog.at_level(logging.INFO, logger="baselines.lora.pareto"):
        sampler = Pareto(bootstraps=10, reference_rank=4).fit(bases["llama"], blueprint)
    assert "the base is its own: llama" in caplog.text
    assert sampler.grouping.source["name"] == "llama" and sampler.donors == ("llama",)


def test_what_cannot_be_drawn_is_refused(bases: dict[str, Zoo], tmp_path: Path) -> None:
    reference = saved(tmp_path, ALIKE)
    with pytest.raises(UserError, match=r"length is 1e.09; give at most [0-9]+, the largest matrix's entries"):
        Pareto(reference_model=reference, template="gaussian-process", length=1e9).fit(None, adapter(bases["llama"]))


def test_a_matrix_of_one_entry_is_refused(bases: dict[str, Zoo], tmp_path: Path) -> None:
    blueprint = adapter(bases["llama"], rank=1)
    assert blueprint.adapter is not None
    pair = replace(blueprint.adapter.pairs[0], rows=1)  # as a head of one output has it
    lone = replace(blueprint, adapter=replace(blueprint.adapter, pairs=(pair,)))
    reference = saved(tmp_path, ALIKE)
    Pareto(reference_model=reference).fit(None, lone)  # B is zero there
    with pytest.raises(UserError, match="a matrix of one entry has no spread; raise the rank"):
        Pareto(reference_model=reference, strategy="both_compensated").fit(None, lone)


def test_a_base_of_zeros_gets_a_change_of_zero(
    tmp_path: Path, tiny_llama: MakeLlama, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tiny_llama(tmp_path / "zeros")
    weights = load_file(folder / "model.safetensors")
    save_file({k: torch.zeros_like(v) for k, v in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    base = open_standalone(folder, quiet=True)
    sampler = Pareto(strategy="both_small", reference_model=saved(tmp_path, ALIKE)).fit(base, adapter(base))
    tensors = drawn(sampler, adapter(base))
    assert all(torch.isfinite(t).all() for t in tensors.values())
    assert not any(t.any() for name, t in tensors.items() if "lora_B" in name)


def test_a_reference_without_a_usable_grouping_is_warned_about(
    bases: dict[str, Zoo], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for grouping, expected in ((ALIKE, True), (PAPER, False)):
        caplog.clear()
        sampler = Pareto(reference_model=saved(tmp_path, grouping)).fit(None, adapter(bases["llama"]))
        assert sampler.grouping == grouping
        warned = [r for r in caplog.records if r.levelno == logging.WARNING and "undifferentiated" in r.message]
        assert bool(warned) == expected


def test_unsuitable_references_and_bases_are_refused(
    bases: dict[str, Zoo], tmp_path: Path, tiny_llama: MakeLlama
) -> None:
    blueprint = adapter(bases["llama"])

    def refused(match: str, zoo: Any = None, target: Blueprint = blueprint, **options: Any) -> None:
        with pytest.raises(UserError, match=match) as error:
            Pareto(bootstraps=10, **options).fit(zoo, target)
        assert "\n" not in str(error.value)

    refused("headstart lora", bases["llama"], bases["llama"].donors[0].blueprint)
    refused("a zoo that contains the base")
    refused("a zoo that contains the base", strategy="both_small", reference_model=str(bases["llama"].path))
    refused("not the base of this adapter", bases["gpt2"], strategy="both_small")
    refused("layers", reference_model=str(tiny_llama(tmp_path / "shallow", num_hidden_layers=2)))
    constant = tiny_llama(tmp_path / "constant", num_hidden_layers=3)
    weights = load_file(constant / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"].fill_(0.5)
    save_file(weights, constant / "model.safetensors", {"format": "pt"})
    refused("up_proj", reference_model=str(constant))
    weights["model.layers.1.mlp.up_proj.weight"].fill_(math.nan)
    save_file(weights, constant / "model.safetensors", {"format": "pt"})
    refused("up_proj.*NaN", reference_model=str(constant))
    mamba = MambaForCausalLM(MambaConfig(vocab_size=48, hidden_size=32, num_hidden_layers=3, state_size=4))
    refused("projections", zoo_of({"mamba": mamba}), reference_model="mamba")
    refused("no such|does not exist|hub id", reference_model=str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="did you mean 'both_small'"):
        Pareto(strategy="both_smal")
