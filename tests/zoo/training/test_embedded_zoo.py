"""The embedded zoo: donors that depend on their recipe alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from zoo.donors.verify import verify
from zoo.donors.zoo import Zoo
from zoo.errors import UserError
from zoo.training import embedded_zoo
from zoo.training.embedded_zoo import train_zoo
from zoo.training.recipes import PRESETS, DonorRecipe, SpecialistRecipe

MICRO = [DonorRecipe(16, 1, heads=2, kv_heads=1, head_dim=8, ffn=32, steps=12, seed=seed) for seed in (0, 1)]
SPECIALIST = SpecialistRecipe(16, 1, heads=2, kv_heads=1, head_dim=8, ffn=32, steps=9, corpus="source")
RECIPES = [*MICRO, SPECIALIST]
FILES = {"manifest.parquet", "index.json", "config.json", "donor.json", "facts.json", "model.safetensors"}


def contents(zoo: Path) -> dict[str, bytes]:
    """Every file of a zoo, by its path."""
    return {str(p.relative_to(zoo)): p.read_bytes() for p in zoo.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("embedded") / "zoo"
    names = [*(r.name for r in MICRO), *(f"specialist-source-w16-l1-h2-kv1-s0-t{step}" for step in (1, 3, 9))]
    assert train_zoo(path, RECIPES, workers=1, quiet=True) == names
    return path


def test_donors_are_checkpoints_of_the_zoo(zoo: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    opened = Zoo.open(zoo)
    assert [d.name for d in opened.donors[:2]] == ["nursery-w16-l1-h2-kv1-s0", "nursery-w16-l1-h2-kv1-s1"]
    assert verify(zoo) == []
    assert not (zoo / embedded_zoo.STAGING).exists()
    for donor in opened.donors[:2]:
        assert donor.license == "mit" and donor.facts["tokens"] == 12 * 4 * 64
        model, info = AutoModelForCausalLM.from_pretrained(donor.folder, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"] and model.dtype == torch.float32
        assert not model.config.tie_word_embeddings and model.config.vocab_size == 256
        tokenizer = AutoTokenizer.from_pretrained(donor.folder)
        assert tokenizer("né")["input_ids"] == [110, 195, 169]
        text = torch.tensor([tokenizer("The assert statement")["input_ids"]])
        with torch.no_grad():
            assert float(model(text, labels=text).loss) < 5.5, "below log 256"


def test_seeds_are_lineages_of_their_own(zoo: Path) -> None:
    first, second, *_ = Zoo.open(zoo).donors
    for spec in first.blueprint.specs:
        if len(spec.shape) == 2:
            pair = torch.stack([d.read(spec.name).flatten() for d in (first, second)])
            assert abs(float(torch.corrcoef(pair)[0, 1])) < 0.3


def test_the_number_of_processes_changes_no_byte(zoo: Path, tmp_path: Path) -> None:
    """Nor does the folder of the zoo."""
    train_zoo(tmp_path / "zoo", RECIPES, workers=2, quiet=True)
    assert contents(tmp_path / "zoo") == contents(zoo)
    assert {Path(name).name for name in contents(zoo)} > FILES
    assert {donor.source for donor in Zoo.open(zoo).donors} == {"headstart zoo train"}


def test_an_interrupted_run_gives_the_same_donors(zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = embedded_zoo.train_steps, []

    def interrupted(*args: object) -> object:
        for step in real(*args):  # type: ignore[arg-type]
            calls.append(step.number)
            if len(calls) == 17:  # in the middle of the second donor
                raise KeyboardInterrupt
            yield step

    monkeypatch.setattr(embedded_zoo, "train_steps", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_zoo(tmp_path / "zoo", RECIPES, workers=1, quiet=True)
    train_zoo(tmp_path / "zoo", RECIPES, workers=1, quiet=True)
    assert len(calls) == 17 + 12 + 9, "the donor that was complete is not trained again"
    assert contents(tmp_path / "zoo") == contents(zoo)
    assert not (tmp_path / "zoo" / embedded_zoo.STAGING).exists()


def test_a_zoo_that_is_complete_is_left_alone(zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(zoo)
    monkeypatch.setattr(embedded_zoo, "train_run", lambda *_: pytest.fail("trained again"))
    train_zoo(zoo, RECIPES, workers=1, quiet=True)
    assert contents(zoo) == before


def test_another_recipe_under_the_same_name_is_refused(zoo: Path) -> None:
    with pytest.raises(UserError, match="another recipe"):
        train_zoo(zoo, [replace(MICRO[0], steps=13)], workers=1, quiet=True)
    with pytest.raises(UserError, match="did you mean 'quick'"):
        train_zoo(zoo, "quikc", quiet=True)


def test_seed_makes_new_donors() -> None:
    names = {r.name for r in PRESETS["demo"]()}
    assert len(names) == 12
    assert len({r.training.seed for r in PRESETS["demo"]()}) == 12


def test_presets_cover_what_a_zoo_needs() -> None:
    demo, quick, bench = (PRESETS[name]() for name in ("demo", "quick", "bench"))
    assert len(demo) >= 12 and len(quick) >= 4 and len(bench) >= 12
    assert {r.width for r in demo} >= {48, 128} and {2, 6} <= {r.layers for r in demo}
    assert any(r.kv_heads == r.heads for r in demo) and any(r.kv_heads < r.heads for r in demo)
    for recipes in (demo, quick, bench, PRESETS["specialists"]()):
        assert len({r.name for r in recipes}) == len(recipes)
        assert all(r.heads % r.kv_heads == 0 and r.width == r.heads * r.head_dim for r in recipes)
