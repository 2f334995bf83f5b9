"""The tasks of the benchmark: donors, targets of unseen shapes, texts, budgets.

A  embedded zoo -> unseen shapes, the donors' own text (Python's language reference, a part that they never saw)
B  the same targets on other domains: source code of Python's library, and Shakespeare
C  real donors -> unseen shapes on children's stories, with the donors' tokenizer and with another one
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from headstart import samplers
from zoo.checkpoints.atomic import replace_file
from zoo.training.corpora import library_source, reference_corpus
from zoo.training.recipes import DonorRecipe, bench_recipes
from zoo.vocabulary import save_byte_tokenizer

SEEDS = (0, 1, 2)
TUNING_SEEDS = 1  # the number of seeds, from the first, on which learning rate and scale are chosen
LRS = {
    "short": (6e-4, 2e-3, 6e-3, 2e-2, 6e-2),
    "long": (6e-4, 2e-3, 6e-3, 2e-2),
    "ladder": (2e-3, 6e-3, 2e-2, 6e-2, 2e-1),  # to find the largest stable rate
}
SCALES = (1.0, 4.0, 8.0, 16.0)  # of the default; the embedded donors started from 0.8 / sqrt(width), 3 to 6 times it
BUDGETS = {"short": 50, "long": 200}
BATCH_SIZE, SEQUENCE = 4, 64  # as the embedded donors were trained
WINDOWS = 32  # held-out windows at each measurement
# Methods that refuse some targets with their default options, with the option that lifts the refusal.
VARIANTS = {
    "embedded": ("weight-selection:wider=repeat",),
    "real": ("weight-selection:wider=repeat", "sliced:tie=fit"),
}
# Committed runs of code that was removed stay, and nothing makes them again. `retrieval`: the pipeline that was called
# `diffusion`, in which a trained network chose the blocks; the method `retrieval` of today chooses them by a formula.
RETRIEVAL = "retrieval"
RETRIEVAL_CONTROLS = tuple(f"{RETRIEVAL}:condition={condition}" for condition in ("shape", "shuffled", "mean"))
EARLIER_VERSIONS = {"autoencoder-v1": "autoencoder"}  # label -> the method of which it is an earlier version
EARLIER_LABELS = (RETRIEVAL, *RETRIEVAL_CONTROLS, *EARLIER_VERSIONS)
SMALL_METHODS = (  # the default, and the eight that were strongest on the main target
    "default", "sliced", "autoencoder", "subcloning", "learned-pruning", "pruning", "row-column", "weight-selection",
    "diffusion",
)  # fmt: skip
LEARNED_DONORS = ("stories260K", "llama2xs-260K")  # autoencoder and diffusion learn from these: one size of heads
OTHER_DONORS = ("babyllama-tok105", "arthur/run3-ep183", "makemore-en-a", "makemore-ar-nombres")
DIFFUSION_STEPS = 2000  # of flow matching: the default of the training


@dataclass(frozen=True)
class Comparison:
    """One target on one text with one budget: a call of `headstart compare`."""

    task: str  # A | B | C
    target: str
    text: str
    budget: str  # short | long | ladder | donors
    zoo: str  # embedded | real
    config: dict[str, Any] = field(hash=False)
    tokenizer: str  # bytes, or the name of a donor in the data folder
    lrs: tuple[float, ...]
    methods: tuple[str, ...] = ()  # empty: all methods

    @property
    def steps(self) -> int:
        return BUDGETS[{"ladder": "short", "donors": "long"}.get(self.budget, self.budget)]

    @property
    def name(self) -> str:
        return f"{self.task}-{self.target}-{self.text}-{self.budget}"


def gpt2(width: int, layers: int, heads: int, ffn: int, vocab: int) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": vocab, "n_embd": width,
        "n_layer": layers, "n_head": heads, "n_inner": ffn, "n_positions": 128, "activation_function": "gelu",
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0,
        "tie_word_embeddings": False,
    }  # fmt: skip


def llama(
    width: int, layers: int, heads: int, kv_heads: int, ffn: int, vocab: int = 256, tied: bool = False, head: int = 16
) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": vocab, "hidden_size": width,
        "intermediate_size": ffn, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "head_dim": head, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": tied, "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip


# The embedded donors are 48 to 128 wide and 2 to 6 layers deep, with as many heads of dimension 16 as fill the width.
UNSEEN_TARGETS = {
    "heads": llama(80, 4, 8, 8, 112),  # attention wider than the stream, FFN 1.4 times it; the donors': 1 and 2.6
    "gqa": llama(96, 3, 6, 2, 256),  # no donor shares keys and values among heads
    "deeper": llama(64, 8, 4, 4, 160),
    "narrower": llama(32, 4, 2, 2, 96),
    "wider": llama(160, 3, 10, 10, 416),
}
MAIN_TARGET = "heads"  # most methods accept it: used for costs, stability, novelty, peers and --small
DONOR_CHOICE_TARGET, DONOR_CHOICE_METHOD = (
    "gqa",
    "row-column",
)  # donors must be repeated to fit; from each donor, by this method
SEEN_TARGET = llama(80, 3, 5, 5, 208)  # the shape of four donors, for controls that need donors of one shape
# The real Llamas are 64, 64 and 128 wide, with 5 layers of 8 heads. Those 64 wide have heads of 8 and the tokenizer of
# the first two targets.
STORY_TARGETS = {
    "between": (llama(96, 6, 12, 6, 256, vocab=512, tied=True, head=8), "stories260K"),
    "narrower": (llama(48, 4, 6, 3, 128, vocab=512, tied=True, head=8), "stories260K"),
    "bytes": (llama(56, 4, 7, 7, 160, tied=True, head=8), "bytes"),
    # The GPT-2s are 64 and 128 wide with 4 layers; the one 128 wide learned a small text by heart, and no stories.
    "gpt2": (gpt2(96, 4, 3, 192, vocab=102), "arthur/run3-ep183"),
}


def donor_recipes() -> list[DonorRecipe]:
    """The donors of the embedded zoo: the preset `bench` without shared keys and values, so that GQA is unseen, and two
    more seeds of one shape."""
    plain = [replace(recipe, kv_heads=recipe.heads) for recipe in bench_recipes()]
    return plain + [replace(r, seed=r.seed + 2) for r in plain if r.width == SEEN_TARGET["hidden_size"]]


def language_model_methods() -> list[str]:
    """All methods that fill language models. conv-covariance needs convolutions, the LoRA methods fill adapters."""
    return [name for name in samplers.METHODS if name not in ("conv-covariance", *samplers.LORA_METHODS)]


def method_labels(zoo: str = "embedded") -> list[str]:
    """The methods that a comparison runs, with their options."""
    methods = [name for name in language_model_methods() if name not in EARLIER_LABELS]
    return [*methods, *VARIANTS[zoo]]


def row_labels(zoo: str = "embedded") -> list[str]:
    """The labels that rows may have: those of `method_labels`, and of the committed runs of removed code."""
    return [*method_labels(zoo), *EARLIER_LABELS]


def method_of_label(label: str) -> str:
    """The method of a label, without options and version."""
    name = label.partition(":")[0]
    return EARLIER_VERSIONS.get(name, name)


def comparisons() -> Iterator[Comparison]:
    """All comparisons, the most important first."""
    for budget in BUDGETS:
        for target, config in UNSEEN_TARGETS.items():
            yield Comparison("A", target, "reference", budget, "embedded", config, "bytes", LRS[budget])
    for budget in BUDGETS:  # the bar of the novelty audit at that shape
        yield Comparison("A", "seen", "reference", budget, "embedded", SEEN_TARGET, "bytes", LRS[budget], ("default",))
    for budget in BUDGETS:
        for target, (config, tokenizer) in STORY_TARGETS.items():
            yield Comparison("C", target, "stories", budget, "real", config, tokenizer, LRS[budget])
    yield Comparison(
        "A", MAIN_TARGET, "reference", "ladder", "embedded", UNSEEN_TARGETS[MAIN_TARGET], "bytes", LRS["ladder"]
    )
    each = tuple(f"{DONOR_CHOICE_METHOD}:donor={recipe.name}" for recipe in donor_recipes())
    yield Comparison(
        "A",
        DONOR_CHOICE_TARGET,
        "reference",
        "donors",
        "embedded",
        UNSEEN_TARGETS[DONOR_CHOICE_TARGET],
        "bytes",
        LRS["long"],
        ("default", *each),
    )
    for text in ("source", "shakespeare"):
        for budget in BUDGETS:
            for target, config in UNSEEN_TARGETS.items():
                yield Comparison("B", target, text, budget, "embedded", config, "bytes", LRS[budget])


def main_comparison(budget: str) -> Comparison:
    return next(c for c in comparisons() if (c.task, c.target, c.budget) == ("A", MAIN_TARGET, budget))


def small_comparison() -> Comparison:
    """The comparison of `--small`."""
    return replace(main_comparison("long"), lrs=LRS["long"][1:3], methods=SMALL_METHODS)


def corpus_bytes(name: str, data: Path | None) -> bytes:
    """The corpus called `name`; shakespeare and stories are in the data folder."""
    sources: dict[str, Callable[[], bytes]] = {"reference": reference_corpus, "source": library_source}
    if name in sources:
        return sources[name]()
    if data is None:
        raise SystemExit(f"the text {name!r} is in the data folder; give it with --data DIR")
    files = {"shakespeare": "tinyshakespeare.txt", "stories": "tinystories_sample.txt"}
    return (data / "corpora" / files[name]).read_bytes()


def corpus_file(work: Path, name: str, data: Path | None) -> Path:
    """The file of a corpus in the work folder; written by the first call."""
    path = work / "texts" / f"{name}.txt"
    if not path.exists():
        replace_file(path, corpus_bytes(name, data))
    return path


def target_folder(work: Path, comparison: Comparison, data: Path | None) -> Path:
    """A folder with the target's config and tokenizer, as a user would have it."""
    from headstart.generate.tokenizer_files import TOKENIZER_FILES

    folder = work / "targets" / f"{comparison.zoo}-{comparison.target}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(comparison.config, indent=2) + "\n")
    if comparison.tokenizer == "bytes":
        save_byte_tokenizer(folder)
        return folder
    assert data is not None
    for path in (data / "models" / comparison.tokenizer).iterdir():
        if path.name in TOKENIZER_FILES:
            (folder / path.name).write_bytes(path.read_bytes())
    return folder
