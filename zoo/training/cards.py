"""The model cards of the donors that `headstart zoo train` trains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zoo.training.corpora import REFERENCE_TITLE

LICENSE = "mit"
SUBJECTS = {  # embedded text -> (language in the card, what it is)
    "reference": ("en", f"the {REFERENCE_TITLE}"),
    "source": ("code", "source code of Python's standard library"),
}


def donor_card(name: str, facts: Mapping[str, Any]) -> str:
    """The README.md of a donor, from its name and what its facts.json says."""
    return _specialist_card(name, facts) if "run" in facts else _general_card(name, facts)


def _general_card(name: str, facts: Mapping[str, Any]) -> str:
    return f"""---
license: {LICENSE}
language: en
library_name: transformers
pipeline_tag: text-generation
---

# {name}

A byte-level Llama-style model of headstart's embedded zoo, made to study initial weights and of no use otherwise.
Trained on the {REFERENCE_TITLE} with `headstart zoo train`: {facts["steps"]} steps of
{facts["batch_size"]} x {facts["sequence"]} bytes at a peak learning rate of {facts["lr"]:g}, seed {facts["seed"]};
held-out loss {facts["loss"]:.3f} nats per byte.
"""


def _specialist_card(name: str, facts: Mapping[str, Any]) -> str:
    corpus = facts["corpus"]
    if corpus in SUBJECTS:
        language, subject = SUBJECTS[corpus]
        front, rights = f"license: {LICENSE}\nlanguage: {language}\n", ""
    else:
        front = f"license: other\nlicense_name: not stated (learned from the text {corpus})\n"
        subject = f"a text that the user gave under the name `{corpus}`"
        rights = """
## Licence

headstart states no licence for these weights, because it does not know that of the text. Check the terms of the text
before you share the weights.
"""
    return f"""---
{front}library_name: transformers
pipeline_tag: text-generation
---

# {name}

A byte-level Llama-style model of headstart's zoo of specialists, made to study initial weights and of no use otherwise.
Trained on {subject} with `headstart zoo train`:
{facts["batch_size"]} x {facts["sequence"]} bytes a step at a peak learning rate of {facts["lr"]:g}, \
seed {facts["seed"]}.
This is checkpoint {facts["checkpoint"]} of {facts["checkpoints"]} of the run `{facts["run"]}`, \
after step {facts["step"]} of {facts["steps"]}.

Held-out loss: {facts["loss"]:.3f} nats per byte. Every ninth block of 4096 bytes of the text is held out.
SHA-256 of the whole text: `{facts["corpus_sha256"]}`, of its training part: `{facts["training_text_sha256"]}`.
{rights}"""
