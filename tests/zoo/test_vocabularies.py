"""Normal forms of tokens, matching of vocabularies, and rows that are composed of a donor's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from zoo.vocabularies.build import RULES, build_row_map
from zoo.vocabularies.forms import guess_format
from zoo.vocabularies.matching import match_rows
from zoo.vocabularies.pieces import longest_pieces, split_tokens
from zoo.vocabularies.similarity import (
    combine_anchors,
    matching_pursuit,
    sparse_similarity,
    sparsemax,
    spelling_vectors,
)
from zoo.vocabularies.tokens import Tokens, read_tokens
from zoo.vocabulary import encode_strings

METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
LLAMA_NORMALIZER = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ],
}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
FALLBACK = {f"<0x{byte:02X}>": byte + 3 for byte in range(256)}
SPECIAL = ("<unk>", "<s>", "</s>")


def write(
    folder: Path, model: dict[str, Any], special: dict[str, int] | None = None, roles: dict[str, str] | None = None,
    **parts: Any,
) -> Path:  # fmt: skip
    """A tokenizer of this model and these parts. special: token -> id; roles: bos, eos, … -> token."""
    folder.mkdir(parents=True, exist_ok=True)
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [{"content": token, "id": i, "special": True, **flags} for token, i in (special or {}).items()]
    content = {"version": "1.0", "added_tokens": added, "model": model, **parts}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    names = {f"{role}_token": token for role, token in (roles or {}).items()}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **names}))
    return folder


def sentencepiece(folder: Path) -> Path:
    """Llama's layout: BPE with byte fallback and a prefix before every text."""
    tokens = ["▁", "t", "h", "e", "r", "i", "n", "g", "th", "he", "the", "▁the", "re", "in", "ing", "▁th"]
    vocab = dict(zip(SPECIAL, range(3), strict=True)) | FALLBACK | {token: 259 + i for i, token in enumerate(tokens)}
    merges = [["t", "h"], ["▁", "th"], ["▁th", "e"], ["th", "e"], ["r", "e"], ["i", "n"], ["in", "g"], ["h", "e"]]
    model = {"type": "BPE", "vocab": vocab, "merges": merges, "unk_token": "<unk>", "byte_fallback": True}
    roles = {"bos": "<s>", "eos": "</s>", "unk": "<unk>"}
    return write(folder, model, dict(zip(SPECIAL, range(3), strict=True)), roles, normalizer=LLAMA_NORMALIZER)


def byte_level(folder: Path) -> Path:
    """GPT-2's layout, with an end-of-text token, a part of a character, and words that Llama's layout lacks."""
    tokens = ["<|endoftext|>", "<|mask|>", "Ġ", "t", "h", "e", "Ġthe", "ing", "Ġthere", "here", "Ã", "Ãī", "©"]
    model = {"type": "BPE", "vocab": {token: i for i, token in enumerate(tokens)}, "merges": []}
    roles = {"eos": "<|endoftext|>", "bos": "<|endoftext|>", "mask": "<|mask|>"}
    special = {"<|endoftext|>": 0, "<|mask|>": 1}
    return write(folder, model, special, roles, pre_tokenizer=BYTE_LEVEL, decoder=BYTE_LEVEL)


def wordpiece(folder: Path) -> Path:
    """BERT's layout, uncased."""
    tokens = ["[UNK]", "[CLS]", "[SEP]", "the", "re", "##re", "##ing", "r", "##i", "##n", "##g", "in", ",", "中"]
    model = {
        "type": "WordPiece", "vocab": {token: i for i, token in enumerate(tokens)}, "unk_token": "[UNK]",
        "continuing_subword_prefix": "##", "max_input_chars_per_word": 100,
    }  # fmt: skip
    normalizer = {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "lowercase": True}
    roles = {"cls": "[CLS]", "sep": "[SEP]", "unk": "[UNK]"}
    special = {"[UNK]": 0, "[CLS]": 1, "[SEP]": 2}
    return write(folder, model, special, roles, normalizer=normalizer, pre_tokenizer={"type": "BertPreTokenizer"})


def unigram(folder: Path) -> Path:
    """T5's layout: Unigram, a word marker, no byte fallback; it splits at spaces before it marks words."""
    tokens = ["<pad>", "</s>", "<unk>", "▁", "▁the", "re", "ing", "t", "h", "e", "r"]
    vocab = [[token, -float(i + 1)] for i, token in enumerate(tokens)]
    pre = {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, METASPACE]}
    roles = {"pad": "<pad>", "eos": "</s>", "unk": "<unk>"}
    special = {"<pad>": 0, "</s>": 1, "<unk>": 2}
    model = {"type": "Unigram", "vocab": vocab, "unk_id": 2}
    return write(folder, model, special, roles, pre_tokenizer=pre, decoder=METASPACE)


LAYOUTS = {"sentencepiece": sentencepiece, "byte-level": byte_level, "wordpiece": wordpiece, "unigram": unigram}
FORMS: dict[str, dict[str, bytes]] = {
    "sentencepiece": {"▁the": b" the", "the": b"the", "▁": b" ", "<0xC3>": b"\xc3", "<0x20>": b" "},
    "byte-level": {"Ġthe": b" the", "ing": b"ing", "Ġ": b" ", "Ã": b"\xc3", "Ãī": "É".encode(), "©": b"\xa9"},
    "wordpiece": {"the": b" the", "##ing": b"ing", ",": b",", "中": "中".encode(), "r": b" r"},
    "unigram": {"▁the": b" the", "re": b"re"},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_normal_form_of_a_token_is_its_bytes_of_text(layout: str, tmp_path: Path) -> None:
    tokens = read_tokens(LAYOUTS[layout](tmp_path))
    assert tokens.form.kind == {"unigram": "sentencepiece"}.get(layout, layout)
    assert {token: tokens.bytes_of_id[tokens.ids[token]] for token in FORMS[layout]} == FORMS[layout]
    special = [token for token in tokens.ids if token[0] in "<[" and not token.startswith("<0x")]
    assert special and not any(tokens.ids[token] in tokens.bytes_of_id for token in special)


def test_the_format_of_mere_strings_is_guessed_from_their_word_marks() -> None:
    assert guess_format(["▁a", "b", "<0x0A>"]).byte_fallback
    kinds = [guess_format(tokens).kind for tokens in (["▁a", "b"], ["Ġa", "b"], ["a", "##b"], ["a", "b"])]
    assert kinds == ["sentencepiece", "byte-level", "wordpiece", "plain"]


def test_a_real_tokenizer_decodes_its_tokens_to_their_normal_forms(shared_data: Path) -> None:
    from tokenizers import Tokenizer

    path = shared_data / "models" / "stories260K"
    tokens, library = read_tokens(path), Tokenizer.from_file(str(path / "tokenizer.json"))
    one = tokens.ids["▁"]
    for i, data in tokens.bytes_of_id.items():  # a text begins with a space, which the decoder takes away
        assert library.decode([one, i]).encode() in (data, data.decode(errors="replace").encode())
    assert tokens.roles == {"bos": 1, "eos": 2, "unk": 0} and tokens.id_of_bytes[b"a"] == tokens.ids["a"]


def test_equal_texts_match_whatever_marks_the_words(tmp_path: Path) -> None:
    tokens = {name: read_tokens(make(tmp_path / name)) for name, make in LAYOUTS.items()}
    for name, word in (("byte-level", "Ġthe"), ("wordpiece", "the"), ("unigram", "▁the")):
        donor, target = tokens["sentencepiece"], tokens[name]
        rows = match_rows(donor, target, 275, len(target.ids))
        assert rows[target.ids[word]] == donor.ids["▁the"]
    target = tokens["byte-level"]
    assert rows_of(tokens["sentencepiece"], target, "Ã", "©", "ing", "Ġthere") == [FALLBACK["<0xC3>"], 172, 273, -1]
    assert rows_of(tokens["wordpiece"], target, "ing", "Ġthe") == [6, 3]
    assert match_rows(tokens["sentencepiece"], target, 200, 13)[target.ids["Ġthe"]] == -1, "the donor has fewer rows"


def rows_of(donor: Tokens, target: Tokens, *names: str) -> list[int]:
    rows = match_rows(donor, target, len(donor.ids), len(target.ids))
    return [int(rows[target.ids[name]]) for name in names]


def test_special_tokens_match_by_their_role(tmp_path: Path) -> None:
    tokens = {name: read_tokens(make(tmp_path / name)) for name, make in LAYOUTS.items()}
    llama, gpt2, bert, t5 = tokens.values()
    assert rows_of(llama, gpt2, "<|endoftext|>", "<|mask|>") == [2, -1]  # the end of a text; nothing masks
    assert rows_of(llama, bert, "[CLS]", "[SEP]", "[UNK]") == [1, 2, 0]
    assert rows_of(bert, llama, *SPECIAL) == [0, 1, 2]
    assert rows_of(llama, t5, "<pad>", "</s>", "<unk>") == [-1, 2, 0]


def test_ids_in_the_models_config_name_roles_of_special_tokens_only(tmp_path: Path) -> None:
    folder = sentencepiece(tmp_path)
    (folder / "tokenizer_config.json").write_text("{}")
    config = {"bos_token_id": 1, "eos_token_id": [2, 5], "pad_token_id": 260}
    assert read_tokens(folder).roles == {"unk": 0}
    assert read_tokens(folder, config).roles == {"unk": 0, "bos": 1, "eos": 2}, "260 is a letter"


def test_the_donors_tokenizer_splits_a_token_as_a_part_of_a_text(tmp_path: Path) -> None:
    """No prefix, no space and no special token come before it; a word of WordPiece goes on in its inside."""
    llama, bert, t5 = (
        read_tokens(make(tmp_path / str(i))) for i, make in enumerate((sentencepiece, wordpiece, unigram))
    )

    def pieces(donor: Tokens, *forms: bytes) -> list[list[str]]:
        names = {i: token for token, i in donor.ids.items()}
        counts, ids = split_tokens(forms, donor, len(donor.ids))
        return [[names[i] for i in part.tolist()] for part in ids.split(counts.tolist())]

    assert pieces(llama, b" there", b"there", b"  the") == [["▁the", "re"], ["the", "re"], ["▁", "▁the"]]
    assert pieces(llama, "É".encode(), b"\xc3") == [["<0xC3>", "<0x89>"], ["<0xC3>"]]
    assert pieces(bert, b" There", b"ning", b" in", b"xx") == [["the", "##re"], ["##n", "##ing"], ["in"], []]
    assert pieces(t5, b" there", b"there", b"q") == [["▁the", "re"], ["t", "h", "e", "re"], []]
    assert longest_pieces(b"there!", llama.id_of_bytes, 4) == [llama.ids["the"], llama.ids["re"], FALLBACK["<0x21>"]]


def test_a_composed_row_is_the_mean_of_the_pieces(tmp_path: Path) -> None:
    donor, target = read_tokens(sentencepiece(tmp_path / "a")), read_tokens(byte_level(tmp_path / "b"))
    table = torch.randn(280, 6, dtype=torch.float64)
    nan = torch.full((16, 6), torch.nan, dtype=torch.float64)
    made = {rule: build_row_map(donor, target, 280, 16, rule) for rule in RULES}
    got = made["mean"].apply(table, nan)
    the, re, he = (table[donor.ids[token]] for token in ("▁the", "re", "he"))
    assert torch.equal(got[target.ids["Ġthe"]], the), "a copied row keeps its bits"
    torch.testing.assert_close(got[target.ids["Ġthere"]], (the + re) / 2)
    torch.testing.assert_close(got[target.ids["here"]], (he + re) / 2)
    accented = table[[FALLBACK["<0xC3>"], FALLBACK["<0x89>"]]].mean(0)
    torch.testing.assert_close(got[target.ids["Ãī"]], accented)
    assert got.isnan().all(1).nonzero().flatten().tolist() == [1, 13, 14, 15], (
        "the mask and the padding are the caller's"
    )
    weighted = made["length-weighted"].apply(table, nan)
    torch.testing.assert_close(weighted[target.ids["Ġthere"]], (4 * the + 2 * re) / 6)
    coverage = made["mean"].coverage
    assert (coverage.tokens, coverage.copied, coverage.composed, coverage.from_bytes, coverage.drawn) == (
        13,
        9,
        3,
        1,
        1,
    )
    assert coverage.share == pytest.approx(11 / 13) and made["match"].coverage.composed == 0
    assert (made["strings"].index >= 0).sum() == 4  # t, h, e, ing
    bias = made["mean"].apply(table[:, 0], nan[:, 0])
    assert torch.equal(bias.nan_to_num(), got[:, 0].nan_to_num()), "a bias is served like the rows"


@pytest.mark.parametrize("rule", RULES)
def test_the_same_tokens_in_another_order_need_no_composing(tmp_path: Path, rule: str) -> None:
    donor = read_tokens(sentencepiece(tmp_path / "donor"))
    model = json.loads((tmp_path / "donor" / "tokenizer.json").read_text())["model"]
    last = len(model["vocab"]) - 1
    model["vocab"] = {token: i if i < 259 else 259 + last - i for token, i in model["vocab"].items()}
    special = dict(zip(SPECIAL, range(3), strict=True))
    roles = {"bos": "<s>", "eos": "</s>", "unk": "<unk>"}
    target = read_tokens(write(tmp_path / "target", model, special, roles, normalizer=LLAMA_NORMALIZER))
    found = build_row_map(donor, target, last + 1, last + 1, rule)
    assert found.index.tolist() == [*range(259), *range(last, 258, -1)]
    assert not len(found.composed) and not len(found.sums) and found.coverage.copied == last + 1


def test_similar_tokens_are_combined_from_shared_ones(tmp_path: Path) -> None:
    donor, target = read_tokens(sentencepiece(tmp_path / "a")), read_tokens(byte_level(tmp_path / "b"))
    vectors = torch.zeros(13, 4)
    vectors[[target.ids["Ġthe"], target.ids["ing"], target.ids["Ġthere"]]] = torch.tensor(
        [[1.0, 0, 0, 0], [0, 1.0, 0, 0], [0.6, 0.8, 0, 0]]
    )
    table = torch.randn(280, 6, dtype=torch.float64)
    the, ing = table[donor.ids["▁the"]], table[donor.ids["ing"]]
    drawn = torch.zeros(13, 6, dtype=torch.float64)
    omp, focus = (build_row_map(donor, target, 280, 13, rule, vectors) for rule in ("omp", "focus"))
    torch.testing.assert_close(omp.apply(table, drawn)[target.ids["Ġthere"]], 0.6 * the + 0.8 * ing, rtol=0, atol=1e-3)
    torch.testing.assert_close(focus.apply(table, drawn)[target.ids["Ġthere"]], 0.4 * the + 0.6 * ing)
    assert omp.composed.tolist() == focus.composed.tolist() == [target.ids["Ġthere"]], "the others are like no token"


def test_matching_pursuit_finds_the_terms_of_a_sum() -> None:
    anchors = torch.nn.functional.normalize(torch.randn(50, 200, generator=torch.Generator().manual_seed(0)), dim=1)
    expected = torch.zeros(3, 50)
    expected[0, [3, 7]], expected[1, 20], expected[2, [1, 2, 40]] = (
        torch.tensor([2.0, -1]),
        1.0,
        torch.tensor([1.0, 1, 1]),
    )
    columns, weights = matching_pursuit(expected @ anchors, anchors)
    torch.testing.assert_close(torch.zeros(3, 50).scatter_add_(1, columns, weights), expected, rtol=0, atol=2e-3)


def test_sparsemax_is_the_nearest_point_of_the_simplex() -> None:
    scores = torch.tensor([[2.0, 0.5, 0.1], [0.5, 0.4, 0.3], [0.7, 0.6, -3.0]])
    torch.testing.assert_close(
        sparsemax(scores), torch.tensor([[1.0, 0, 0], [13 / 30, 1 / 3, 7 / 30], [0.55, 0.45, 0]])
    )


def test_spelling_says_which_tokens_are_alike() -> None:
    forms = [b" walking", b" walked", b" talking", b" the", b"\xc3"]
    vectors = spelling_vectors(forms)
    assert torch.allclose(vectors.norm(dim=1), torch.ones(5))
    cosines = vectors @ vectors.mT
    assert cosines[0, 1] > 0.35 and cosines[0, 2] > 0.35 and cosines[0, 3] < 0.25 and cosines[0, 4].abs() < 0.2
    sums, made = combine_anchors(vectors[:1], vectors[1:], torch.arange(1, 5), sparse_similarity)
    assert made.all() and set(sums.columns.tolist()) >= {1, 2} and float(sums.weights.sum()) == pytest.approx(1)


def test_many_strings_are_encoded_at_once_in_the_child(tmp_path: Path) -> None:
    """Without the space that the tokenizer puts before a text. Characters that it does not know have no id."""
    counts, ids = encode_strings(["the", " the", "", "ing the"] * 2500, byte_level(tmp_path))
    assert counts.tolist() == [3, 4, 0, 4] * 2500 and ids.tolist() == [3, 4, 5, 2, 3, 4, 5, 2, 3, 4, 5] * 2500
    assert counts.dtype == ids.dtype == torch.int64
