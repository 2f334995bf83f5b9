"""What the canonical form and `sliced` cost beside the decompositions that they need.

    python -m benchmarks.speed.canonical --donor FOLDER [--repeats 3]     three minutes on one core

FOLDER is a Llama-like checkpoint in Hugging Face layout, such as SmolLM2-135M. All numbers are CPU seconds of one
thread, without start-up, the least of the repeats. The references use float32 and random numbers of the same shapes:

- decompositions: the SVD of each product of output and value matrix, one for each KV head, as `torch.linalg.svd`
  computes it, and one eigendecomposition of width x width.
- products: what no program can leave out. It is the Gram matrix of all residual vectors, their rotation, the same SVDs
  computed from the factors, and the eigendecomposition.

The canonical form is computed in float64, in which a product takes twice as long as in float32: signs and the order of
heads and neurons must not depend on rounding errors.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from baselines.transfer.shrinking.sliced import Sliced
from benchmarks import paths
from zoo.donors.donor import Donor
from zoo.donors.zoo import open_standalone
from zoo.targets.blueprint import Blueprint
from zoo.tensors import Metadata
from zoo.units.aligned import read_donor_decoder
from zoo.units.canonical import canonicalise

RESULTS = paths.RESULTS / "speed_canonical.json"


def cpu_seconds(work: Callable[[], object], repeats: int) -> float:
    """The least CPU seconds of several calls."""
    found = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        found.append(time.process_time() - start)
    return min(found)


def form(donor: Donor) -> None:
    """The canonical form of a donor, layer by layer, read from its files."""
    for _ in canonicalise(read_donor_decoder(donor, lazy=True)).decoder.layers:
        pass


def slice_donor(donor_folder: Path, blueprint: Blueprint) -> None:
    """All tensors of a target, as `sliced` computes them."""
    for _ in Sliced(tie="fit").fit(open_standalone(donor_folder), blueprint).sample(blueprint):
        pass


def decompositions(meta: Metadata) -> None:
    """The SVDs of the products of output and value matrices, and one eigendecomposition."""
    group = meta.heads // meta.kv_heads
    for _ in range(meta.layers * meta.kv_heads):
        write, read = torch.randn(group * meta.width, meta.head_dim), torch.randn(meta.head_dim, meta.width)
        torch.linalg.svd(write @ read, full_matrices=False)
    torch.linalg.eigh(torch.ones(meta.width, meta.width))


def products(meta: Metadata) -> None:
    """The Gram matrix, the rotation, the SVDs from factors and the eigendecomposition."""
    group, width = meta.heads // meta.kv_heads, meta.width
    basis, gram = torch.ones(width, width), torch.zeros(width, width)
    per_layer = [2 * meta.heads * meta.head_dim, 2 * meta.kv_heads * meta.head_dim, *[meta.ffn] * 3]
    for count in [meta.vocab, meta.vocab, *per_layer * meta.layers]:
        rows = torch.ones(count, width)
        gram.addmm_(rows.mT, rows)
        rows @ basis
    for _ in range(meta.layers):
        write = torch.randn(meta.kv_heads, group * width, meta.head_dim)
        read = torch.randn(meta.kv_heads, width, meta.head_dim)
        torch.linalg.svd(torch.linalg.qr(write).R @ torch.linalg.qr(read).R.mT)
    torch.linalg.eigh(gram)


def measure(donor_folder: Path, target: dict[str, Any], repeats: int) -> list[dict[str, Any]]:
    """[{what, seconds, reference, reference_seconds, ratio, wanted}]. target: a config with the donor's head_dim."""
    donor, blueprint = open_standalone(donor_folder).donors[0], Blueprint.from_config(target)
    meta = donor.blueprint.metadata
    assert meta is not None
    slice_donor(donor_folder, blueprint)  # loads what the first call loads
    whole, cut = (
        cpu_seconds(work, repeats) for work in (lambda: form(donor), lambda: slice_donor(donor_folder, blueprint))
    )
    svds = cpu_seconds(lambda: decompositions(meta), repeats)
    least = cpu_seconds(lambda: products(meta), repeats)
    decomposed, needed = "SVDs of the products and one eigendecomposition, float32", "matrix products in float32"
    rows = [
        ("canonical form", whole, decomposed, svds, "at least 0.5"),
        ("`sliced`", cut, decomposed, svds, "at least 0.5"),
        ("canonical form", whole, needed, least, "no bound"),
    ]
    return [
        {"what": what, "seconds": seconds, "reference": name, "reference_seconds": reference,
         "ratio": reference / seconds, "wanted": wanted}
        for what, seconds, name, reference, wanted in rows
    ]  # fmt: skip


def narrower(config: dict[str, Any]) -> dict[str, Any]:
    """The config of a target of about half the layers and two thirds of the width."""
    heads, kv_heads = config["num_attention_heads"] * 2 // 3, config["num_key_value_heads"] * 2 // 3
    return config | {
        "hidden_size": config["hidden_size"] * 2 // 3,
        "intermediate_size": config["intermediate_size"] * 2 // 3,
        "num_hidden_layers": config["num_hidden_layers"] // 2 + 1,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": config.get("head_dim", config["hidden_size"] // config["num_attention_heads"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--donor", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    config = json.loads((given.donor / "config.json").read_text())
    rows = measure(given.donor, narrower(config), given.repeats)
    for row in rows:
        print(
            f"{row['what']}: {row['seconds']:.2f} s, {row['reference']}: {row['reference_seconds']:.2f} s, "
            f"ratio {row['ratio']:.2f} ({row['wanted']})"
        )
    RESULTS.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
