"""Valid files of every kind that headstart reads: what the fuzzers damage. Each function fills an empty folder."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tests.support.commands import analyze, compare, generate
from tests.support.gguf_files import write_gguf
from tests.support.tiny import donor as make_donor
from tests.support.tiny import make_zoo

TEXT = "the quick brown fox jumps over the lazy dog, and says that nothing is new. " * 60


def language_model(folder: Path, **options: Any) -> Path:
    from zoo.vocabulary import save_byte_tokenizer

    make_donor(folder, 0, **{"vocab_size": 256, "hidden_size": 16, **options})
    save_byte_tokenizer(folder)
    (folder / "README.md").write_text("---\nlicense: mit\ntags:\n- a\n- b\nlanguage: en\n---\n# A model\n")
    return folder


def gguf_files(folder: Path) -> None:
    """A Llama with two layers in one file, and a GPT-2 in two parts."""
    for name in ("llama", "gpt2"):
        (folder / name).mkdir()
    write_gguf(folder / "llama" / "a.gguf", "llama")
    write_gguf(folder / "gpt2" / "b.gguf", "gpt2", split=20)


def sharded_model(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    language_model(folder / "whole")
    AutoModelForCausalLM.from_pretrained(folder / "whole").save_pretrained(folder / "donor", max_shard_size="20KB")
    shutil.rmtree(folder / "whole")


CONFIGS: dict[str, dict[str, Any]] = {
    "llama": dict(
        num_hidden_layers=2, num_key_value_heads=2, intermediate_size=24,
        rope_scaling=dict(rope_type="linear", factor=2.0),
    ),
    "gpt2": dict(n_embd=16, n_layer=2, n_head=4),
    "mixtral": dict(
        num_hidden_layers=1, num_key_value_heads=2, intermediate_size=24, num_local_experts=2, num_experts_per_tok=1
    ),
    "gemma3_text": dict(num_hidden_layers=2, num_key_value_heads=1, intermediate_size=24, head_dim=4),
    "qwen3": dict(num_hidden_layers=2, num_key_value_heads=2, intermediate_size=24, head_dim=4),
    "t5": dict(d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=4),
    "bert": dict(num_hidden_layers=1, intermediate_size=24),
    "opt": dict(num_hidden_layers=1, ffn_dim=24, max_position_embeddings=32, word_embed_proj_dim=16),
    "mamba": dict(num_hidden_layers=1, state_size=4),
}  # fmt: skip


def config_files(folder: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

    heads: dict[str, Any] = {"t5": AutoModelForSeq2SeqLM, "bert": AutoModelForMaskedLM}
    for name, options in CONFIGS.items():
        sizes = {} if name in ("gpt2", "t5") else dict(hidden_size=16)
        if name not in ("gpt2", "t5", "mamba"):
            sizes["num_attention_heads"] = 4
        config = AutoConfig.for_model(name, vocab_size=64, **sizes | options)
        config.architectures = [type(heads.get(name, AutoModelForCausalLM).from_config(config)).__name__]
        config.save_pretrained(folder / name)


def tokenizer_files(folder: Path) -> None:
    """A donor of bytes, and four tokenizers of different kinds."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    language_model(folder / "donor")
    made = {
        "bpe": (Tokenizer(models.BPE(unk_token="<unk>")), trainers.BpeTrainer(vocab_size=80, special_tokens=["<unk>"])),
        "wordpiece": (
            Tokenizer(models.WordPiece(unk_token="[UNK]")),
            trainers.WordPieceTrainer(vocab_size=80, special_tokens=["[UNK]"]),
        ),
        "unigram": (
            Tokenizer(models.Unigram()),
            trainers.UnigramTrainer(vocab_size=80, special_tokens=["<unk>"], unk_token="<unk>"),
        ),
        "wordlevel": (
            Tokenizer(models.WordLevel(unk_token="[UNK]")),
            trainers.WordLevelTrainer(vocab_size=80, special_tokens=["[UNK]"]),
        ),
    }  # fmt: skip
    for name, (tokenizer, trainer) in made.items():
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace() if name == "unigram" else pre_tokenizers.Whitespace()
        tokenizer.decoder = decoders.Metaspace() if name == "unigram" else decoders.BPEDecoder()
        tokenizer.train_from_iterator([TEXT] * 5, trainer)
        (folder / name).mkdir()
        tokenizer.save(str(folder / name / "tokenizer.json"))
        (folder / name / "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "model_max_length": 64})
        )
        special = {"unk_token": {"content": "<unk>", "lstrip": False, "normalized": False}}
        (folder / name / "special_tokens_map.json").write_text(json.dumps(special))
    (folder / "text.txt").write_text(TEXT)


def lora_adapter(folder: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    language_model(folder / "base")
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], rank_pattern={"q_proj": 3}, task_type="CAUSAL_LM")
    get_peft_model(model, config).save_pretrained(folder / "adapter")


def stored_zoo(folder: Path, vocab_size: int = 32) -> None:
    from zoo.donors.index import list_donors

    make_zoo(folder, [dict(hidden_size=16, kv=2, vocab_size=vocab_size)])
    shutil.rmtree(folder / "sources")
    list_donors(folder / "zoo")
    shutil.copyfile(next((folder / "zoo" / "models").glob("*/config.json")), folder / "target.json")


def trained_pipeline(folder: Path) -> None:
    """A zoo, and an autoencoder and a pipeline trained on it."""
    from tests.support.generators import train_tiny_autoencoder, train_tiny_diffusion

    stored_zoo(folder, vocab_size=256)
    (folder / "text.txt").write_text(TEXT)
    paths = folder / "zoo", folder / "autoencoder", folder / "pipeline"
    train_tiny_autoencoder(*paths[:2], folder / "text.txt")
    train_tiny_diffusion(*paths, folder / "text.txt")


def training_state(folder: Path) -> None:
    from tests.support.generators import train_tiny_autoencoder

    stored_zoo(folder, vocab_size=256)
    (folder / "text.txt").write_text(TEXT)
    with interrupted_after_one_step():
        train_tiny_autoencoder(folder / "zoo", folder / "state", folder / "text.txt")


@contextlib.contextmanager
def interrupted_after_one_step() -> Iterator[None]:
    """Ctrl-C comes during the first step of the training of an autoencoder."""
    from autoencoder import training

    real = training._AutoencoderTrainer.train_step

    def stop(self: Any, step: int) -> None:
        real(self, step)
        signal.raise_signal(signal.SIGINT)

    with patch.object(training._AutoencoderTrainer, "train_step", stop), contextlib.suppress(KeyboardInterrupt):
        yield


def fitted_samplers(folder: Path) -> None:
    from headstart import samplers
    from zoo.donors.zoo import Zoo
    from zoo.targets.blueprint import Blueprint

    stored_zoo(folder)
    zoo = Zoo.open(folder / "zoo")
    target = Blueprint.from_config(folder / "target.json")
    for name in ("normal", "histogram", "weight-selection"):
        samplers.get(name)().fit(zoo, target).save(folder / name)


def run_records(folder: Path) -> None:
    language_model(folder / "donor")
    generate(folder / "donor", "normal", folder / "made", donor=str(folder / "donor"))
    (folder / "run.yaml").write_text(
        "subcommand: generate\ntarget: donor\nmethod: normal\ndonor: donor\nout: out\nseed: 1\nset:\n  std: 0.1\n"
    )


def question_files(folder: Path) -> None:
    rows = [
        {"query": "the capital is", "choices": ["a", "b"], "gold": 0},
        {"query": "the river is", "choices": ["c", "d", "e"], "gold": 2},
    ]
    (folder / "multiple.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def finished_comparison(folder: Path) -> None:
    language_model(folder / "donor")
    (folder / "text.txt").write_text(TEXT)
    run_comparison(folder)


def run_comparison(folder: Path) -> None:
    compare(
        target=folder / "donor", methods=("default", "normal"), donor=str(folder / "donor"), corpus=folder / "text.txt",
        out=folder / "out", steps=1, seeds=(0,), lrs=(1e-3,), default_scales=(1.0,), batch_size=1, sequence=8,
        windows=1, workers=1,
    )  # fmt: skip


def saved_analysis(folder: Path) -> None:
    language_model(folder / "donor", layers=3)
    analyze(folder / "made", donor=str(folder / "donor"), bootstraps=1, ranks=(16,))


def corpus_files(folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"text": f"line {i}: {TEXT[:200]}", "n": i} for i in range(20)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
    (folder / "plain.txt").write_text(TEXT)
