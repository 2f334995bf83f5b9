"""Tiny GGUF files of every layout that is read, written by the `gguf` library as llama.cpp's converter writes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np

VOCAB, WIDTH, FFN, LAYERS, HEADS, KV_HEADS = 320, 256, 512, 2, 4, 2
HEAD = WIDTH // HEADS
Q = gguf.GGMLQuantizationType
# What the library can quantise; the K types that it only reads are filled with bytes.
MIXED = (Q.Q4_0, Q.Q4_1, Q.Q5_0, Q.Q5_1, Q.Q8_0, Q.F16, Q.BF16, Q.F32)
ONLY_READ = (Q.Q4_K, Q.Q6_K, Q.Q5_K, Q.Q3_K, Q.Q2_K, Q.IQ4_XS)
ADD_ONE = ("gemma2", "gemma3")  # whose norms are stored plus one


@dataclass(frozen=True)
class TinyModel:
    """One GGUF file to write: an architecture, its metadata and the shapes of its tensors in torch's order."""

    architecture: str
    numbers: Mapping[str, Any]  # under the architecture's name
    shapes: Mapping[str, tuple[int, ...]]
    tokenizer: str = "gpt2"
    general: Mapping[str, Any] = field(default_factory=dict)


def decoder_shapes(extra: Callable[[int], dict[str, tuple[int, ...]]] = lambda n: {}, head: int = HEAD) -> dict:
    shapes = {"token_embd.weight": (VOCAB, WIDTH), "output_norm.weight": (WIDTH,)}
    for n in range(LAYERS):
        shapes |= {
            f"blk.{n}.attn_norm.weight": (WIDTH,),
            f"blk.{n}.attn_q.weight": (HEADS * head, WIDTH),
            f"blk.{n}.attn_k.weight": (KV_HEADS * head, WIDTH),
            f"blk.{n}.attn_v.weight": (KV_HEADS * head, WIDTH),
            f"blk.{n}.attn_output.weight": (WIDTH, HEADS * head),
            f"blk.{n}.ffn_norm.weight": (WIDTH,),
            f"blk.{n}.ffn_gate.weight": (FFN, WIDTH),
            f"blk.{n}.ffn_up.weight": (FFN, WIDTH),
            f"blk.{n}.ffn_down.weight": (WIDTH, FFN),
            **{f"blk.{n}.{name}": shape for name, shape in extra(n).items()},
        }
    return shapes


DECODER = {
    "block_count": LAYERS, "context_length": 128, "embedding_length": WIDTH, "feed_forward_length": FFN,
    "attention.head_count": HEADS, "attention.head_count_kv": KV_HEADS,
    "attention.layer_norm_rms_epsilon": 1e-6, "rope.freq_base": 50000.0,
}  # fmt: skip
QK_NORMS = {"attn_q_norm.weight": (HEAD,), "attn_k_norm.weight": (HEAD,)}
GEMMA = {"post_attention_norm.weight": (WIDTH,), "post_ffw_norm.weight": (WIDTH,)}
BIASES = {"attn_q.bias": (WIDTH,), "attn_k.bias": (KV_HEADS * HEAD,), "attn_v.bias": (KV_HEADS * HEAD,)}
KEYS = {"attention.key_length": HEAD, "attention.value_length": HEAD}
QKV = (HEADS + 2 * KV_HEADS) * HEAD
QWEN3_HEAD = 128  # transformers reads no other from a GGUF file


def _phi3_shapes() -> dict[str, tuple[int, ...]]:
    shapes = {"token_embd.weight": (VOCAB, WIDTH), "output_norm.weight": (WIDTH,), "output.weight": (VOCAB, WIDTH)}
    for n in range(LAYERS):
        shapes |= {
            f"blk.{n}.attn_norm.weight": (WIDTH,), f"blk.{n}.attn_qkv.weight": (QKV, WIDTH),
            f"blk.{n}.attn_output.weight": (WIDTH, WIDTH), f"blk.{n}.ffn_norm.weight": (WIDTH,),
            f"blk.{n}.ffn_up.weight": (2 * FFN, WIDTH), f"blk.{n}.ffn_down.weight": (WIDTH, FFN),
        }  # fmt: skip
    return shapes


def _gpt2_shapes() -> dict[str, tuple[int, ...]]:
    shapes = {
        "token_embd.weight": (VOCAB, WIDTH), "position_embd.weight": (1024, WIDTH), "output.weight": (VOCAB, WIDTH),
        "output_norm.weight": (WIDTH,), "output_norm.bias": (WIDTH,),
    }  # fmt: skip
    inner = {
        "attn_norm": (WIDTH,), "attn_qkv": (3 * WIDTH, WIDTH), "attn_output": (WIDTH, WIDTH), "ffn_norm": (WIDTH,),
        "ffn_up": (4 * WIDTH, WIDTH), "ffn_down": (WIDTH, 4 * WIDTH),
    }  # fmt: skip
    for n in range(LAYERS):
        for name, shape in inner.items():
            shapes |= {f"blk.{n}.{name}.weight": shape, f"blk.{n}.{name}.bias": shape[:1]}
    return shapes


GPT2 = {
    "block_count": LAYERS, "context_length": 1024, "embedding_length": WIDTH, "feed_forward_length": 4 * WIDTH,
    "attention.head_count": HEADS, "attention.layer_norm_epsilon": 1e-5,
}  # fmt: skip
MODELS = {
    "llama": TinyModel("llama", DECODER | {"rope.dimension_count": HEAD}, decoder_shapes(), "llama"),
    "mistral": TinyModel(
        "llama",
        DECODER | {"rope.dimension_count": HEAD},
        decoder_shapes() | {"output.weight": (VOCAB, WIDTH)},
        "llama",
        {"name": "Tiny Mistral 7B"},
    ),
    "qwen2": TinyModel("qwen2", DECODER, decoder_shapes(lambda n: BIASES)),
    "qwen3": TinyModel(
        "qwen3",
        DECODER | {"attention.key_length": QWEN3_HEAD, "attention.value_length": QWEN3_HEAD},
        decoder_shapes(lambda n: {name: (QWEN3_HEAD,) for name in QK_NORMS}, QWEN3_HEAD),
    ),
    "gemma2": TinyModel(
        "gemma2", DECODER | KEYS | {"attention.sliding_window": 64}, decoder_shapes(lambda n: GEMMA), "llama"
    ),
    "gemma3": TinyModel(
        "gemma3",
        DECODER | KEYS | {"attention.sliding_window": 64},
        decoder_shapes(lambda n: GEMMA | QK_NORMS),
        "llama",
    ),
    "phi3": TinyModel("phi3", DECODER | {"rope.dimension_count": HEAD}, _phi3_shapes(), "llama"),
    "gpt2": TinyModel("gpt2", GPT2, _gpt2_shapes()),
}  # fmt: skip


def write_gguf(
    path: Path,
    model: TinyModel | str = "llama",
    seed: int = 0,
    split: int = 0,
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a model with random weights, its matrices in all types in turn. Returns the (first) file.

    split: the most tensors of a part, 0 for one file. metadata: more keys, or other values; None removes one.
    """
    model = MODELS[model] if isinstance(model, str) else model
    writer = gguf.GGUFWriter(path, model.architecture, split_max_tensors=split)
    for key, value in model.general.items():
        add(writer, f"general.{key}", value)
    for key, value in model.numbers.items():
        add(writer, f"{model.architecture}.{key}", value)
    add_tokenizer(writer, model.tokenizer)
    for key, value in (metadata or {}).items():
        writer.kv_data[0].pop(key, None)
        if value is not None:
            add(writer, key, value)
    rng = np.random.default_rng(seed)
    for number, (name, shape) in enumerate(model.shapes.items()):
        add_tensor(writer, name, shape, number, rng, model.architecture in ADD_ONE)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path if not split else sorted(path.parent.glob(f"{path.stem}-*-of-*.gguf"))[0]


def add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    (writer.add_array if isinstance(value, list) else kinds[type(value)])(key, value)


def add_tensor(
    writer: gguf.GGUFWriter, name: str, shape: tuple[int, ...], number: int, rng: np.random.Generator, add_one: bool
) -> None:
    """Norms and biases in F32, as llama.cpp keeps them; matrices in the types in turn."""
    values = rng.normal(0, 0.02, shape).astype(np.float32)
    if len(shape) == 1:
        writer.add_tensor(name, values + np.float32(1.0 if add_one else 0.0))
        return
    kinds = MIXED + ONLY_READ
    kind = kinds[number % len(kinds)]
    data = random_blocks(shape, kind, rng) if kind in ONLY_READ else gguf.quantize(values, kind)
    writer.add_tensor(name, data, raw_dtype=kind)


def random_blocks(shape: tuple[int, ...], kind: gguf.GGMLQuantizationType, rng: np.random.Generator) -> np.ndarray:
    """Bytes of a type that the library does not write: any codes, and scales that are small finite numbers."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    data = rng.integers(0, 256, (*shape[:-1], shape[-1] // block, size), dtype=np.uint8)
    scale = np.frombuffer(np.float16(0.001).tobytes(), np.uint8)
    places = {Q.Q4_K: (0, 2), Q.Q5_K: (0, 2), Q.Q6_K: (208,), Q.Q3_K: (108,), Q.Q2_K: (80, 82), Q.IQ4_XS: (0,)}
    for place in places[kind]:
        data[..., place : place + 2] = scale
    return data.reshape(*shape[:-1], -1)


def add_tokenizer(writer: gguf.GGUFWriter, kind: str) -> None:
    """A vocabulary of VOCAB tokens: special tokens, the bytes, and merges of them."""
    from zoo.vocabulary import byte_characters

    special = ["<unk>", "<s>", "</s>", "<|user|>"]
    letters = byte_characters() if kind == "gpt2" else [f"<0x{byte:02X}>" for byte in range(256)]
    words = ["th", "the", "in", "ing", "an", "and", "er", "on", "re", "he"]
    if kind == "llama":
        words = ["▁", *"abcdefghijklmnopqrstuvw", *words, "▁th", "▁the", "▁a", "▁an", "▁and"]
    tokens = special + letters + words
    tokens += [f"<unused{n}>" for n in range(VOCAB - len(tokens))]
    types = [2, 3, 3, 4] + [1 if kind == "gpt2" else 6] * 256 + [1] * len(words)
    types += [5] * (VOCAB - len(types))
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if kind == "gpt2":
        writer.add_token_merges(["t h", "th e", "i n", "in g", "a n", "an d", "e r", "o n", "r e", "h e"])
    else:
        writer.add_token_scores([float(-n) for n in range(VOCAB)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{% for m in messages %}<|user|>{{ m['content'] }}{% endfor %}")
