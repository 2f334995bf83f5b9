"""Signatures on donors of known spread, on planted clusters, and on families of real checkpoints."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support.tiny import STD, make_zoo
from zoo.donors.folder import StandaloneDonor
from zoo.donors.memory import zoo_of
from zoo.errors import UserError
from zoo.statistics.signature import clustering_vector, signature_distances, std_vector
from zoo.statistics.similarity import PROJECTIONS, singular_value_stacks


def test_standard_deviations_are_those_of_the_donor(tmp_path: Path) -> None:
    donor = make_zoo(tmp_path, [dict(hidden_size=64, kv=2)]).donors[0]
    found = std_vector(donor)
    assert tuple(found) == PROJECTIONS
    assert sum(found.values()) == pytest.approx(1)
    known = {role: STD[role.split(".")[1]] for role in PROJECTIONS}
    for role, share in found.items():
        assert share == pytest.approx(known[role] / sum(known.values()), rel=0.05), role


def test_fused_and_transposed_projections_are_split(shared_data: Path) -> None:
    donor = StandaloneDonor.open(shared_data / "models" / "makemore-en-a", quiet=True)
    weights = [donor.read(f"transformer.h.{i}.attn.c_attn.weight").double() for i in range(4)]
    pooled = torch.stack([torch.cat([w.chunk(3, dim=1)[i].flatten() for w in weights]).std() for i in range(3)])
    found = std_vector(donor)
    assert "mlp.gate" not in found
    ratio = torch.tensor([found["attn.q"], found["attn.k"], found["attn.v"]], dtype=torch.float64) / pooled
    assert (ratio / ratio[0] - 1).abs().max() < 1e-4


def test_a_model_that_is_not_a_transformer_is_refused() -> None:
    donor = zoo_of({"plain": torch.nn.Linear(4, 4)}).donors[0]
    with pytest.raises(UserError, match="no recognisable projections"):
        std_vector(donor)


def planted(where: dict[str, list[int]], seed: int = 0, scale: float = 1.0) -> dict[str, Tensor]:
    """Stacks of vectors about three centres; `where` says which centre each layer is at."""
    centres = torch.tensor([[2.0, 1.0, 0.5], [5.0, 1.0, 1.0], [9.0, 8.0, 1.0]], dtype=torch.float64)
    noise = torch.Generator().manual_seed(seed)
    return {
        role: scale * (centres[layers] + 0.1 * torch.randn(len(layers), 3, generator=noise, dtype=torch.float64))
        for role, layers in where.items()
    }


WHERE = {"attn.q": [0, 0, 1, 1], "attn.v": [2, 2, 2, 2], "mlp.down": [0, 1, 2, 2]}


def test_clusters_are_found_and_numbered_by_the_norm_of_their_centre() -> None:
    expected = {"attn.q": [0.5, 0.5, 0], "attn.v": [0, 0, 1], "mlp.down": [0.25, 0.25, 0.5]}
    assert clustering_vector(planted(WHERE)) == expected
    assert clustering_vector(planted(WHERE, seed=1, scale=1e-3), seed=1) == expected


def test_too_few_layers_for_the_clusters_are_refused() -> None:
    with pytest.raises(UserError, match="too few for 4 clusters"):
        clustering_vector(planted({"attn.q": [0, 1, 2]}), clusters=4)
    with pytest.raises(UserError, match="too few"):
        clustering_vector({"attn.q": torch.ones(5, 3)})
    with pytest.raises(UserError, match="too few"):
        clustering_vector({})


def test_distances_are_cosines_over_what_both_have() -> None:
    a, b = {"attn.q": 0.6, "mlp.up": 0.8}, {"attn.q": 0.8, "mlp.up": 0.6, "mlp.gate": 3.0}
    table = signature_distances({"a": a, "b": b, "c": {"mlp.gate": 1.0}})
    assert table["models"] == ["a", "b", "c"]
    assert table["distances"][0][1] == pytest.approx(1 - 0.96)
    assert table["distances"][0][2] is None
    assert table["distances"][1][2] == table["distances"][2][2] == 0
    lists = signature_distances({"a": {"attn.q": [1.0, 0.0]}, "b": {"attn.q": [0.0, 1.0]}})
    assert lists["distances"] == [[0, 1], [1, 0]]
    with pytest.raises(UserError, match="numbers of clusters"):
        signature_distances({"a": {"attn.q": [1.0, 0.0]}, "b": {"attn.q": [0.0, 0.0, 1.0]}})


ARTHUR = ["arthur/run0-ep050", "arthur/run1-ep050", "arthur/run2-ep050", "arthur/run3-ep050"]
MAKEMORE = ["makemore-ar-nombres", "makemore-en-a", "makemore-en-b"]
LLAMA = ["babyllama-tok105", "llama2xs-260K", "stories260K"]


def test_independent_runs_of_one_recipe_are_near_and_an_architecture_alone_is_no_family(shared_data: Path) -> None:
    """The four Arthur runs, and the three Makemore models, are GPT-2 of 4 layers, and yet lie apart. The Llamas were
    trained by three people in three ways: they are no nearer to each other than to any other model."""
    folders = {name: shared_data / "models" / name for name in ARTHUR + MAKEMORE + LLAMA}
    donors = {name: StandaloneDonor.open(folder, quiet=True) for name, folder in folders.items()}
    for signatures in (
        {name: std_vector(donor) for name, donor in donors.items()},
        {name: clustering_vector(singular_value_stacks(donor, [16])) for name, donor in donors.items()},
    ):
        table = signature_distances(signatures)
        near = dict(zip(product(donors, donors), np.ravel(table["distances"]), strict=True))
        for family in (ARTHUR, MAKEMORE):
            within = max(near[a, b] for a in family for b in family)
            assert within < min(near[a, b] for a in family for b in donors if b not in family)
        within = np.mean([near[a, b] for a in LLAMA for b in LLAMA if a != b])
        assert within > 0.8 * np.mean([near[a, b] for a in LLAMA for b in ARTHUR + MAKEMORE])
