"""The table of architectures: how a GGUF file names and changes the tensors of a model, undone for each of them.

llama.cpp renames every tensor when it writes a GGUF file, and changes some values:

- Llama: the rows of the query and key projections are interleaved for its rotary embedding.
- Gemma 2 and 3: the norms multiply by their weight, where transformers multiplies by one plus it.
- GPT-2: matrices are those of a linear layer, the transpose of the Conv1D that transformers has.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from zoo.errors import UserError

SUFFIXES = (".weight", ".bias")
BLOCK = "blk."


@dataclass(frozen=True)
class Change:
    """What brings the values of a tensor in a GGUF file into transformers' order."""

    heads: str | None = None  # whose rows are interleaved: "q" for query heads, "k" for key heads
    offset: float = 0.0  # added in float32
    transposed: bool = False


@dataclass(frozen=True)
class Layout:
    """How the tensors of one architecture are named in a GGUF file and in transformers."""

    architecture: str  # general.architecture
    outside: dict[str, str]  # module outside the layers: name in the file -> name in transformers
    layer: str  # the prefix of layer {n} in transformers
    inside: dict[str, str]  # module in a layer: name in the file -> name in transformers
    interleaved: dict[str, str] = field(default_factory=dict)  # module in a layer -> "q" or "k"
    norm_offset: float = 0.0
    transposed: tuple[str, ...] = ()  # modules in a layer whose matrix is transposed
    rotary: tuple[str, ...] = ()  # factors of the rotary embedding, which are no weights in transformers

    def target(self, name: str) -> tuple[str, Change] | None:
        """(the name in transformers, the change) of a tensor in a GGUF file; None for one outside the layout."""
        suffix = next((s for s in SUFFIXES if name.endswith(s)), "")
        module = name.removesuffix(suffix)
        if not suffix:
            return None
        if module in self.outside:
            return self.outside[module] + suffix, Change(offset=self._offset(module, suffix))
        number, _, inner = module.removeprefix(BLOCK).partition(".")
        if not module.startswith(BLOCK) or inner not in self.inside or not (number.isascii() and number.isdigit()):
            return None
        if number != str(int(number[:9])):  # no leading zeros, and no number that Python would take long to read
            return None
        change = Change(
            self.interleaved.get(inner),
            self._offset(inner, suffix),
            suffix == ".weight" and inner in self.transposed,
        )
        return f"{self.layer.format(n=number)}.{self.inside[inner]}{suffix}", change

    def _offset(self, module: str, suffix: str) -> float:
        return self.norm_offset if suffix == ".weight" and module.endswith("norm") else 0.0


DECODER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER = "model.layers.{n}"
ATTENTION = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
GEMMA_NORMS = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
GPT2_LAYER = {
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}

LAYOUTS = {
    layout.architecture: layout
    for layout in (
        Layout(
            "llama",
            DECODER,
            LAYER,
            ATTENTION | MLP | NORMS,
            interleaved={"attn_q": "q", "attn_k": "k"},
            rotary=("rope_freqs.weight",),
        ),
        Layout("qwen2", DECODER, LAYER, ATTENTION | MLP | NORMS),
        Layout("qwen3", DECODER, LAYER, ATTENTION | MLP | NORMS | QK_NORMS),
        Layout("gemma2", DECODER, LAYER, ATTENTION | MLP | GEMMA_NORMS, norm_offset=-1.0),
        Layout("gemma3", DECODER, LAYER, ATTENTION | MLP | GEMMA_NORMS | QK_NORMS, norm_offset=-1.0),
        Layout(
            "phi3",
            DECODER,
            LAYER,
            {
                "attn_qkv": "self_attn.qkv_proj",
                "attn_output": "self_attn.o_proj",
                "ffn_up": "mlp.gate_up_proj",
                "ffn_down": "mlp.down_proj",
                **NORMS,
            },
            rotary=("rope_factors_long.weight", "rope_factors_short.weight"),
        ),
        Layout(
            "gpt2",
            {
                "token_embd": "transformer.wte",
                "position_embd": "transformer.wpe",
                "output_norm": "transformer.ln_f",
                "output": "lm_head",
            },
            "transformer.h.{n}",
            GPT2_LAYER,
            transposed=("attn_qkv", "attn_output", "ffn_up", "ffn_down"),
        ),
    )
}
TITLES = "Llama (and Mistral), Qwen2, Qwen3, Gemma 2, Gemma 3, Phi-3 and GPT-2"


def find_layout(architecture: str, where: str) -> Layout:
    """The layout of general.architecture. UserError, which names those that are read, for any other."""
    if architecture not in LAYOUTS:
        raise UserError(
            f"{where}: has the architecture {architecture!r:.60}; read from GGUF are {TITLES}; give the original model"
            " with safetensors files"
        )
    return LAYOUTS[architecture]
