"""Hashes of what every command computes, to show that a change of the code changes no result.

    OMP_NUM_THREADS=1 python -m benchmarks.unchanged WORK > before.txt
    ... change the code ...
    OMP_NUM_THREADS=1 python -m benchmarks.unchanged OTHER_WORK > after.txt
    diff before.txt after.txt

Covers every method on Llama and GPT-2 targets with two seeds, `analyze`, `lora`, a short `compare`, a trained
autoencoder and a trained pipeline. A line is the name of a result and a hash of its tensors or numbers; names, paths,
pages and times are left out. The hashes hold for one machine and one version of torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

SEEDS = (0, 1)
TIMES = ("seconds", "donor_cost")  # keys whose numbers depend on the clock
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
}
GPT2 = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "vocab_size": 256,
    "n_positions": 128,
    "n_embd": 64,
    "n_layer": 4,
    "n_head": 4,
    "bos_token_id": None,
    "eos_token_id": None,
}
TARGETS: dict[str, tuple[str, dict[str, Any]]] = {  # name -> (zoo, config)
    "llama-narrow": ("llama", LLAMA | {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3,
                                       "num_attention_heads": 4, "num_key_value_heads": 4}),
    "llama-wide": ("llama", LLAMA | {"num_hidden_layers": 2}),
    "llama-deep": ("llama", LLAMA | {"num_hidden_layers": 8}),
    "gpt2-narrow": ("gpt2", GPT2 | {"n_embd": 48, "n_head": 3}),
    "gpt2-wide": ("gpt2", GPT2 | {"n_embd": 128, "n_head": 8}),
    "gpt2-deep": ("gpt2", GPT2 | {"n_layer": 8}),
}  # fmt: skip
QUICK = {"learned-pruning": ["--set", "steps=4"]}  # options that keep a method short


def main(work: Path) -> None:
    work.mkdir(parents=True)
    corpus = _corpus(work / "corpus.txt")
    run("zoo", "train", "--zoo", work / "llama", "--preset", "quick")
    run("zoo", "add", *_gpt2_donors(work / "sources"), "--zoo", work / "gpt2")
    for zoo in ("llama", "gpt2"):
        for donor in sorted((work / zoo / "models").iterdir()):
            print_hash(f"zoo {zoo} {donor.name}", tensors(donor))
    run("train", "autoencoder", "--zoo", work / "llama", "--out", work / "autoencoder", "--steps", 20)
    print_hash("train autoencoder", tensors(work / "autoencoder"))
    run("train", "diffusion", "--zoo", work / "llama", "--autoencoder", work / "autoencoder",
        "--out", work / "pipeline", "--steps", 30)  # fmt: skip
    print_hash("train diffusion", tensors(work / "pipeline"))
    for target in TARGETS:
        _generate_all(work, target, corpus)
    _convolutions()
    for donor in ("llama", "gpt2"):
        out = work / f"analysis-{donor}"
        run("analyze", "--zoo", work / donor, "--out", out, "--ranks", "4,8", "--bootstraps", 20)
        found = json.loads((out / "analysis.json").read_text())
        print_hash(f"analyze {donor}", numbers([found["models"], found["signatures"]]))
    _lora_all(work, corpus)
    _compare(work, corpus)


def run(*words: object) -> int:
    """A command of the program in this process; returns its exit code."""
    from headstart.cli import app

    with contextlib.redirect_stdout(sys.stderr):  # stdout holds the hashes only
        try:
            return int(app([str(word) for word in words] + ["--quiet"], standalone_mode=False) or 0)
        except SystemExit as stop:
            return int(stop.code or 0)


def print_hash(name: str, values: Iterator[bytes]) -> None:
    """Prints the name of a result and the hash of its bytes."""
    digest = hashlib.sha256()
    for value in values:
        digest.update(value)
    print(f"{digest.hexdigest()[:16]}  {name}", flush=True)


def tensors(folder: Path) -> Iterator[bytes]:
    """Names, shapes and bytes of every tensor in the safetensors files of a folder and its subfolders."""
    for path in sorted(folder.rglob("*.safetensors")):
        with safe_open(path, framework="pt") as f:
            for name in sorted(f.keys()):
                tensor = f.get_tensor(name)
                yield f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode()
                yield tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def numbers(value: Any) -> Iterator[bytes]:
    """Every number in a JSON value, sorted, so that a renamed key changes nothing."""
    yield " ".join(sorted(_numbers(value))).encode()


def _numbers(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            if key not in TIMES:
                yield from _numbers(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _numbers(inner)
    elif isinstance(value, int | float):
        yield repr(value)


def _generate_all(work: Path, target: str, corpus: Path) -> None:
    from headstart import samplers

    zoo, config = TARGETS[target]
    path = work / f"{target}.json"
    path.write_text(json.dumps(config))
    known = [name for name in samplers.METHODS if name not in samplers.LORA_METHODS]
    for method in known:
        options = {field["name"] for field in samplers.get(method).option_table()}
        extra: list[object] = list(QUICK.get(method, []))
        if "text" in options:
            extra += ["--set", f"text={corpus}"]
        if method in ("autoencoder", "diffusion"):
            extra += ["--model", work / ("pipeline" if method == "diffusion" else "autoencoder")]
        for seed in SEEDS:
            out = work / "out" / f"{target}-{method}-{seed}"
            code = run("generate", "--target", path, "--method", method, "--zoo", work / zoo, "--out", out,
                       "--seed", seed, *extra)  # fmt: skip
            if code:
                print(f"refused ({code})      generate {target} {method} seed {seed}", flush=True)
            else:
                print_hash(f"generate {target} {method} seed {seed}", tensors(out))


def _convolutions() -> None:
    """Samples of conv-covariance, the only method for convolutions, through the Python API."""
    from headstart import Blueprint, samplers
    from zoo.donors.memory import zoo_of

    def network(seed: int, width: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(3, width, 5), nn.ReLU(), nn.Conv2d(width, 2 * width, 5))

    donors = {f"trained {seed}": network(seed, 16) for seed in range(2)}
    blueprint = Blueprint.from_module(network(9, 24))
    sampler = samplers.get("conv-covariance")().fit(zoo_of(donors), blueprint)
    for seed in SEEDS:
        found = sorted(sampler.sample(blueprint, seed=seed))
        print_hash(f"sample conv-covariance seed {seed}", (t.contiguous().numpy().tobytes() for _, t in found))


def _lora_all(work: Path, corpus: Path) -> None:
    from headstart import samplers

    donors = sorted((work / "llama" / "models").glob("*-w96-*"))
    base, reference = donors[0], donors[1]
    for method in samplers.LORA_METHODS:
        extra: list[object] = ["--reference", reference] if method == "pareto" else []
        if "text" in {field["name"] for field in samplers.get(method).option_table()}:
            extra += ["--set", f"text={corpus}"]
        for seed in SEEDS:
            out = work / "lora" / f"{method}{seed}"
            run("lora", "--base", base, "--method", method, "--rank", 4, "--out", out, "--seed", seed, *extra)
            print_hash(f"lora {method} seed {seed}", tensors(out))


def _compare(work: Path, corpus: Path) -> None:
    out = work / "comparison"
    run("compare", "--target", work / "llama-narrow.json", "--zoo", work / "llama", "--corpus", corpus, "--out", out,
        "--methods", "default,normal:rescale=none,weight-selection,row-column,pruning", "--steps", 8, "--seeds", "0,1",
        "--lrs", "1e-3,4e-3", "--workers", 1)  # fmt: skip
    found = json.loads((out / "results.json").read_text())
    for method, entry in sorted(found["methods"].items()):
        print_hash(f"compare {method}", numbers(entry))
    print_hash("compare all", numbers([found["threshold"], found["parameters"], found["grid"]]))


def _corpus(path: Path) -> Path:
    from pydoc_data.topics import topics

    path.write_text("\n\n".join(topics[name] for name in sorted(topics))[:60_000])
    return path


def _gpt2_donors(folder: Path) -> list[Path]:
    """Three random GPT-2s whose rows and columns differ in scale, as those of trained models do."""
    from transformers import GPT2Config, GPT2LMHeadModel

    shapes = [{}, {"n_embd": 96, "n_head": 6}, {"n_embd": 64, "n_layer": 6}]
    for i, shape in enumerate(shapes):
        torch.manual_seed(i)
        model = GPT2LMHeadModel(GPT2Config(**{k: v for k, v in (GPT2 | shape).items() if k != "model_type"}))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.mul_(torch.rand(parameter.shape[0], 1) + 0.5).mul_(torch.rand(parameter.shape[1]) + 0.5)
        model.save_pretrained(folder / f"gpt2-{i}")
    return [folder / f"gpt2-{i}" for i in range(len(shapes))]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
