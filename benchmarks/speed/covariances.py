"""What `matrix-normal` costs at real widths beside the eigendecompositions of its covariances.

    python -m benchmarks.speed.covariances [--width 2048] [--layers 2] [--vocab 8192]     five minutes on one core

The donor is random: heavy-tailed rows whose columns are correlated, in the shapes of Llama. All numbers are CPU seconds
of one thread, without start-up. The time is that of a whole fit, which brings the donor into canonical form. It grows
with the layers and the tokens of the donor; the reference does not. The reference is `torch.linalg.eigh`, in float64,
of each covariance. A side longer than 4096 has a covariance of low rank plus diagonal. One row adds nothing for it to
the reference, the other what the whole matrix would take, from the time of the largest smaller one.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from baselines.distributions.matrix_normal import MatrixNormal
from benchmarks import paths
from benchmarks.speed.children import peak_bytes
from zoo.donors.zoo import open_standalone
from zoo.targets.blueprint import Blueprint

RESULTS = paths.RESULTS / "speed_covariances.json"


def llama(width: int, layers: int, vocab: int) -> dict[str, Any]:
    """A config in the proportions of SmolLM2-1.7B."""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": vocab, "hidden_size": width,
        "intermediate_size": 4 * width, "num_hidden_layers": layers, "num_attention_heads": width // 64,
        "num_key_value_heads": width // 64, "head_dim": 64, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip


def write_donor(folder: Path, config: dict[str, Any]) -> None:
    """A checkpoint in bfloat16. Rows have scales of a heavy tail, columns are correlated by 32 shared directions."""
    generator = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int) -> Tensor:
        shared = torch.randn(rows, 32, generator=generator) @ torch.randn(32, columns, generator=generator) / 32**0.5
        scales = torch.randn(rows, 1, generator=generator).mul(0.5).exp()
        return scales * (torch.randn(rows, columns, generator=generator) + shared) * 0.02

    def value(shape: tuple[int, ...]) -> Tensor:
        return (torch.ones(shape) if len(shape) == 1 else matrix(*shape)).bfloat16()

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    specs = Blueprint.from_config(config).specs
    save_file({spec.name: value(spec.shape) for spec in specs}, folder / "model.safetensors", {"format": "pt"})


def full_covariances(sampler: MatrixNormal) -> list[Tensor]:
    """The covariances, float64 [p, p], that a fitted sampler holds as full matrices, the largest last."""
    factors = [t for name, t in sampler.state()[1].items() if t.ndim == 2 and name.split("/")[0] in ("rows", "columns")
               and not name.endswith("/axes")]  # fmt: skip
    return sorted(((f @ f.mT).double() for f in factors), key=len)


def long_sides(sampler: MatrixNormal) -> list[int]:
    """The sizes of the covariances that are low rank plus diagonal."""
    return sorted(len(t) for name, t in sampler.state()[1].items() if name.endswith("/axes"))


def measure(width: int, layers: int, vocab: int) -> list[dict[str, Any]]:
    """[{what, seconds, reference, reference_seconds, ratio, wanted, gigabytes}]. gigabytes: the peak of the process."""
    config = llama(width, layers, vocab)
    with tempfile.TemporaryDirectory() as folder:
        write_donor(Path(folder), config)
        zoo, blueprint = open_standalone(Path(folder)), Blueprint.from_config(config)
        start = time.process_time()
        sampler = MatrixNormal().fit(zoo, blueprint)
        seconds = time.process_time() - start
    peak = peak_bytes()
    took: list[tuple[int, float]] = []
    for covariance in full_covariances(sampler):
        start = time.process_time()
        torch.linalg.eigh(covariance)
        took.append((len(covariance), time.process_time() - start))
    full, long = sum(seconds for _, seconds in took), long_sides(sampler)
    size, largest = took[-1]
    dense = full + sum(largest * (side / size) ** 3 for side in long)
    what = f"`matrix-normal` at width {width}, {layers} layers, {vocab} tokens"
    sides = ", ".join(str(side) for side, _ in took)
    references = [
        (f"eigendecompositions of its covariances ({sides}; {', '.join(map(str, long))} from the cube of the size)",
         dense, "at least 0.5"),
        (f"those of the covariances that it holds in full alone ({sides})", full, "no bound"),
    ]  # fmt: skip
    return [
        {"what": what, "seconds": seconds, "reference": name, "reference_seconds": reference,
         "ratio": reference / seconds, "wanted": wanted, "gigabytes": peak / 1e9}
        for name, reference, wanted in references
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocab", type=int, default=8192)
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(given.width, given.layers, given.vocab)
    for row in rows:
        print(
            f"{row['what']}: {row['seconds']:.1f} s, {row['reference']}: {row['reference_seconds']:.1f} s, "
            f"ratio {row['ratio']:.2f} ({row['wanted']}), {row['gigabytes']:.1f} GB"
        )
    kept = json.loads(RESULTS.read_text())["rows"] if RESULTS.is_file() else []
    rows = [old for old in kept if old["what"] not in {row["what"] for row in rows}] + rows
    RESULTS.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
