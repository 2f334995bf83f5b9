"""Model cards: they parse, their links lead somewhere, and nothing from elsewhere becomes HTML, YAML or a folder."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from markdown_it.token import Token

from headstart import samplers
from headstart.generate.card import checkpoint_card
from headstart.lora.card import PublishedBase, adapter_card, base_card
from zoo.cards.card import pipeline_tag
from zoo.cards.licenses import HUB_LICENSES, license_keys
from zoo.cards.markdown import (
    code_block,
    code_span,
    command_without_folders,
    escape_markdown,
    reference_links,
    table,
    without_folders,
)
from zoo.checkpoints.licenses import license_text

LINK = re.compile(
    r"https://(arxiv\.org/abs/\d{4}\.\d{4,5}(v\d+)?|doi\.org/10\.\d{4,9}/[\w.;()/-]+|github\.com/[\w-]+/[\w.-]+)"
)
NASTY = [
    "no", "null", "1.0", "a: b", "- x", "#", "'\"", "a\n---\nb", "<a href='https://x.org'>Terms</a>", "x" * 5000,
    "a | b", "`code`", "[x](javascript:alert(1))", "{{ a }}", "!!python/name:os.system", "*a", "&a", "@x", "%Y", "\x00",
    "\ud800", "a\u2028b", "Apache License, Version 2.0", "see LICENSE",
]  # fmt: skip


def tokens(markdown: str) -> list[Token]:
    found = MarkdownIt("commonmark", {"html": True}).enable("table").parse(markdown)
    return [token for outer in found for token in (outer, *(outer.children or ()))]


def links(markdown: str) -> list[str]:
    return [str(token.attrs["href"]) for token in tokens(markdown) if token.type == "link_open"]


def record(method: str, **changes: Any) -> dict[str, Any]:
    donor = {"name": "donor", "revision": "sha256:" + "a" * 64, "sha256": "a" * 64, "license": "mit"}
    return {
        "method": method, "options": {"donor": "donor", "noise": 0.1}, "seed": 3, "parameters": 1234567,
        "command": f"headstart generate --target config.json --method {method} --out out", "versions": {"torch": "2.6"},
        "donors": [donor], "tensors": {"sampled": 20, "defaulted": 1}, "grouping": None,
        "adapter": {"rank": 4, "alpha": 4.0, "targets": ["q_proj"], "pairs": 7}, "changed_base": None,
        "step0": {"largest_change": 0.0}, "base": "/home/alice/base", **changes,
    }  # fmt: skip


def card_of(method: str, base_models: tuple[str, ...] = (), **changes: Any) -> ModelCard:
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    sampler, content = samplers.get(method), record(method, **changes)
    if method in samplers.LORA_METHODS:
        base = PublishedBase(next(iter(base_models), "./base"), bool(base_models), None, "AutoModelForCausalLM", config)
        return adapter_card(content, sampler, base)
    blueprint: Any = SimpleNamespace(config=config, metadata=None)
    return checkpoint_card(content, sampler, blueprint, base_models)


@pytest.mark.parametrize("method", samplers.METHODS)
def test_the_card_of_every_method_loads_and_its_links_are_well_formed(tmp_path: Path, method: str) -> None:
    card_of(method, ("org/model",)).save(tmp_path / "README.md")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.license == "mit" and card.data.pipeline_tag == "text-generation"
    assert card.data.library_name == ("peft" if method in samplers.LORA_METHODS else "transformers")
    assert card.data.base_model == ["org/model"]
    reference = samplers.get(method).reference
    assert all(LINK.fullmatch(link) for link in links(card.text))
    named = [part for part in re.split("[,;] ", reference) if re.match(r"\d{4}\.|doi:|[\w-]+/(?!README\.md)", part)]
    assert len(links(card.text)) == len(named)
    shown = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", card.text).replace("arXiv:", "")
    assert f"({reference})" in shown


@pytest.mark.parametrize(("reference", "expected"), [
    ("2409.12903", ["https://arxiv.org/abs/2409.12903"]),
    ("2503.04626, 2110.12661, karpathy/nanochat", [
        "https://arxiv.org/abs/2503.04626", "https://arxiv.org/abs/2110.12661", "https://github.com/karpathy/nanochat",
    ]),
    ("pytorch/torchtitan, allenai/OLMo", ["https://github.com/pytorch/torchtitan", "https://github.com/allenai/OLMo"]),
    ("Dutilleul 1999, doi:10.1080/00949659908811970", ["https://doi.org/10.1080/00949659908811970"]),
    ("diffusion/README.md", []), ("Koutrouvelis 1980; Kogon & Williams 1998", []), ("1999", []), ("", []),
])  # fmt: skip
def test_a_reference_links_each_of_its_sources(reference: str, expected: list[str]) -> None:
    assert links(reference_links(reference)) == expected


@pytest.mark.parametrize("name", ["https://huggingface.co/org/tiny", "<script>[x](y)|\n# no"])
def test_the_card_says_what_a_gguf_donor_was(name: str) -> None:
    text = "5 tensors in F32, 2 in Q4_0 of a GGUF file, stored as bfloat16"
    donor = {"name": "tiny", "revision": "sha256:0", "sha256": "0" * 64, "license": "mit", "quantisation": text}
    card = card_of("row-column", donors=[{**donor, "base_models": [name]}])
    lines = [line for line in card.text.splitlines() if line.startswith("- tiny ")]
    assert lines[0].startswith(f"- tiny is quantised: {escape_markdown(text)}. Its weights were read")
    assert lines[1] == f"- tiny says that it was made from {escape_markdown(name)}."
    assert not {"html_inline", "html_block"} & {token.type for token in tokens(card.text)} and "y" not in links(
        card.text
    )


@pytest.mark.parametrize("license", NASTY)
@pytest.mark.parametrize("method", ["row-column", "pissa"])
def test_any_license_leaves_the_card_whole(tmp_path: Path, license: str, method: str) -> None:
    name = license_text(license)
    donors = [{"name": license, "revision": license, "sha256": None, "license": name}]
    card = card_of(method, donors=donors, options={"text": name})
    card.save(tmp_path / "README.md")
    loaded = ModelCard.load(tmp_path / "README.md")
    data = yaml.safe_load(loaded.content.split("\n---\n")[0])
    assert data["license"] in HUB_LICENSES and data["library_name"] and data["pipeline_tag"] == "text-generation"
    assert data["license"] == "other" and data["license_name"] == name
    assert not [t for t in tokens(loaded.text) if t.type in ("html_block", "html_inline")]
    assert all(LINK.fullmatch(link) for link in links(loaded.text))
    cells = [t.content for t in tokens(loaded.text) if t.type == "inline" and t.level == 4]
    assert len([t for t in tokens(loaded.text) if t.type == "tr_open"]) == 4 and len(cells) == 2 * 2 + 2 * 4


@pytest.mark.parametrize(("licenses", "expected"), [
    ([], {}), ([None], {"license": "unknown"}), (["Apache-2.0"], {"license": "apache-2.0"}),
    (["mit", "mit"], {"license": "mit"}), (["llama3.1"], {"license": "llama3.1"}),
    (["mit", None], {"license": "other", "license_name": "mit and unknown"}),
    (["mit or apache-2.0"], {"license": "other", "license_name": "mit or apache-2.0"}),
    (["foo-1.0"], {"license": "other", "license_name": "foo-1.0"}),
    (["foo (https://x.org/l)"], {"license": "other", "license_name": "foo", "license_link": "https://x.org/l"}),
    (["no"], {"license": "other", "license_name": "no"}),
])  # fmt: skip
def test_license_keys_are_those_of_the_hub(licenses: list[str | None], expected: dict[str, str]) -> None:
    assert license_keys(licenses) == expected


@pytest.mark.parametrize(("config", "expected"), [
    ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, "text-generation"),
    ({"model_type": "llama"}, "text-generation"),
    ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, "text-generation"),
    ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "fill-mask"),
    ({"model_type": "vit", "architectures": ["ViTModel"]}, None), (None, None),
])  # fmt: skip
def test_the_pipeline_is_that_of_the_class(config: dict[str, Any] | None, expected: str | None) -> None:
    assert pipeline_tag(config) == expected


@pytest.mark.parametrize("text", NASTY)
def test_text_from_elsewhere_stays_text(text: str) -> None:
    shown = " ".join(text.split())
    for markdown in (escape_markdown(text), code_span(text), table(["a"], [[escape_markdown(text)]])):
        found = tokens(f"x {markdown} y" if markdown[0] != "|" else markdown)
        assert not {t.type for t in found} & {"html_block", "html_inline", "link_open", "em_open", "heading_open"}
        texts = "".join(t.content for t in found if t.type in ("text", "text_special", "code_inline"))
        if shown.isprintable() and shown:
            assert shown in texts
    block = tokens(code_block(f"```\n{text}\n````\n# x"))
    assert [t.type for t in block] == ["fence"]


def test_no_folder_of_the_machine_gets_into_a_card(tmp_path: Path) -> None:
    command = "headstart lora --base /home/alice/models/base --set text=/home/alice/t.txt --out '/home/alice/a b/out'"
    for method in ("row-column", "pareto"):
        card = card_of(method, command=command, options={"text": "/home/alice/t.txt", "ratio": "1/2"})
        text = str(card)
        assert "alice" not in text and "/home" not in text and "| ratio | 1/2 |" in text
        assert "headstart lora --base base --set text=t.txt --out out" in text
    base = PublishedBase("./base", False, None, "AutoModelForCausalLM", None)
    assert "alice" not in str(base_card(record("pissa"), "mit", base))


@pytest.mark.parametrize(("text", "expected"), [
    ("/home/a/b", "b"), ("/home/a/b/", "b"), ("a/b", "a/b"), ("../b", "../b"), ("/", "/"), ("~/a/b", "b"),
    ("~bob/a", "a"),
    ("C:\\Users\\a\\b", "b"), ("D:/a/b", "b"), ("\\\\host\\a\\b", "b"), ("org/name@main", "org/name@main"),
    ("x=/home/a/b", "x=b"), ("A=/h/a,B=/h/b", "A=a,B=b"), ("https://x.org/a", "https://x.org/a"), ("1/2", "1/2"),
    ("/h/analysis.json#m", "analysis.json#m"), ("--out=/h/a", "--out=a"), ("/h/a=b/c", "a=b/c"), ("", ""),
])  # fmt: skip
def test_absolute_paths_lose_their_folders(text: str, expected: str) -> None:
    assert without_folders(text) == expected


def test_a_command_keeps_its_words() -> None:
    plain = "headstart generate --target config.json --set 'a=b c'"
    assert command_without_folders(plain) == plain
    assert command_without_folders("x --out '/h/my folder/y z'") == "x --out 'y z'"
    assert command_without_folders("not 'closed /h/a/b") == "not ''\"'\"'closed' b"
