"""The README's commands on really trained checkpoints, in small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support.commands import compare, generate
from zoo.add import add
from zoo.training.corpora import encode_corpus
from zoo.training.loop import evaluate

WIDER_AND_DEEPER = {
    "hidden_size": 96,
    "num_hidden_layers": 7,
    "num_attention_heads": 12,
    "num_key_value_heads": 6,
    "intermediate_size": 256,
}


@pytest.fixture(scope="module")
def target(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = json.loads((shared_data / "models" / "stories260K" / "config.json").read_text())
    path = tmp_path_factory.mktemp("target") / "config.json"
    path.write_text(json.dumps(config | WIDER_AND_DEEPER))
    return path


@pytest.fixture(scope="module")
def zoo(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("zoo")
    add([str(p.parent) for p in sorted((shared_data / "models").rglob("config.json"))], path, quiet=True)
    return path


@pytest.mark.parametrize(("method", "settings"), [("row-column", ()), ("weight-selection", ("wider=repeat",))])
def test_a_wider_deeper_llama_starts_near_its_donor(
    shared_data: Path, zoo: Path, target: Path, tmp_path: Path, method: str, settings: tuple[str, ...]
) -> None:
    out = generate(target, method, tmp_path / "out", zoo=zoo, donor="stories260K", settings=settings, quiet=True)
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    tokens = encode_corpus(shared_data / "corpora" / "tinystories_sample.txt", out, 512)[:20_000]
    with torch.no_grad():
        loss = evaluate(model, tokens, limit=32)
    assert loss < 3.0  # the donor has about 1.9, the default initialisation 6.2


def test_compare_on_real_text(shared_data: Path, zoo: Path, target: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "stories.txt"
    corpus.write_text((shared_data / "corpora" / "tinystories_sample.txt").read_text()[:200_000])
    results = compare(
        target=target,
        zoo=zoo,
        methods=["default", "row-column"],
        corpus=corpus,
        steps=3,
        seeds=(0,),
        lrs=(1e-3,),
        out=tmp_path / "out",
        tokenizer=shared_data / "models" / "stories260K",
        default_scales=(1.0,),
        windows=8,
        workers=1,
        quiet=True,
    )
    assert results["methods"]["row-column"]["step0_loss"] < results["methods"]["default"]["step0_loss"] - 2
    assert (tmp_path / "out" / "report.html").is_file()
