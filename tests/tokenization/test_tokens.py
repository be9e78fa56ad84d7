"""Token ids against the reference tokenizers of transformers."""

from __future__ import annotations

import json
import os
import random
import shutil
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from helpers import SENTENCES, words
from hypothesis import example, given, settings
from hypothesis import strategies as st

from echelon.errors import BadCheckpoint, InvalidInput, UnsupportedModel
from echelon.tokenization.boundaries import WINDOW
from echelon.tokenization.tokenizer import MAX_FILE_BYTES, PairEncoder

V2_M3 = Path(named) if (named := os.environ.get("ECHELON_V2M3_TOKENIZER")) else None
"""Folder of bge-reranker-v2-m3's tokenizer, which is too large to be committed."""

MARKS = ("<s>", "</s>", "<pad>", "<unk>", "<mask>", "[CLS]", "[SEP]", "[PAD]", "[MASK]", "[UNK]")
ODDITIES = (
    *("\x00", "\x07", "\x1b[0m", "\x7f", "\x85", "\u200b", "\u200d", "\u2028", "\ufeff", "\ufffd"),
    *(
        "👩‍👩‍👧‍👦",
        "🏳️‍🌈",
        "🇩🇪",
        "👍🏽",
        "e\u0301",
        "ﬁ",
        "①",
        "\u202eabc",
        "\t",
        "\r\n",
        "\u3000",
        "\U0010ffff",
    ),
)

pieces = st.one_of(
    st.sampled_from(SENTENCES),
    st.sampled_from(MARKS + ODDITIES),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    st.text(st.characters(max_codepoint=0x2FF), max_size=20),
    st.just(" "),
)
texts = st.lists(pieces, max_size=8).map("".join)
modes = st.sampled_from(["longest_first", "only_second"])


@lru_cache(maxsize=8)
def both(folder: Path) -> tuple[Any, PairEncoder]:
    """The reference tokenizer and ours."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if folder == V2_M3:
        # transformers 5 does not run the model's own file but builds XLM-R's pipeline anew: it
        # takes U+0085 for a space, and breaks ties of two equally likely splits another way.
        file = str(folder / "tokenizer.json")
        return PreTrainedTokenizerFast(tokenizer_file=file), PairEncoder(folder)
    return AutoTokenizer.from_pretrained(folder), PairEncoder(folder)


def reference_ids(
    reference: Any, query: str, document: str, mode: str, max_length: int
) -> tuple[list[int], list[int]] | None:
    """Ids and types of the reference; None where it cannot cut the pair.

    In lists of one: called with two plain strings, transformers takes an empty document for none
    at all and gives no pair.
    """
    try:
        found = reference(
            [query],
            [document],
            truncation=mode,
            max_length=max_length,
            return_token_type_ids=True,
        )
    except Exception as error:
        if "too short" not in str(error):
            raise
        return None
    return found["input_ids"][0], found["token_type_ids"][0]


def check(folder: Path, query: str, document: str, mode: str, max_length: int) -> None:
    """One pair through both."""
    reference, ours = both(folder)
    expected = reference_ids(reference, query, document, mode, max_length)
    if expected is None:
        with pytest.raises(InvalidInput, match="leave no room for the document"):
            ours.encode([(query, document)], max_length, mode)
        return
    encoded = ours.encode([(query, document)], max_length, mode)
    batch = encoded.batch([0])
    assert batch.ids.tolist() == expected[0]
    assert encoded.lengths.tolist() == batch.lengths.tolist() == [len(expected[0])]
    types = [0] * len(expected[0]) if batch.type_ids is None else batch.type_ids.tolist()
    assert types == expected[1]
    whole = reference([query], [document])["input_ids"][0]
    lost, read_whole = len(whole) - len(expected[0]), len(document) <= WINDOW
    assert min(lost, 1) <= encoded.truncated_tokens[0] <= lost
    assert encoded.truncated_tokens[0] == lost or not read_whole


def sweep(folder: Path) -> None:
    """Sentences of six scripts, odd strings and special tokens against each other."""
    chance = random.Random(7)
    corpus = [*SENTENCES, *MARKS, *ODDITIES, "", " ", "\n \t", words(60), words(300, seed=1)]
    corpus.append("a</s>b [SEP] c<pad>" * 3)
    corpus += [left + right for left, right in zip(ODDITIES, reversed(SENTENCES), strict=False)]
    for _ in range(400):
        query, document = chance.choice(corpus), chance.choice(corpus)
        check(folder, query, document, chance.choice(["longest_first", "only_second"]), 8192)
        length = chance.choice([*range(5, 40), 100, 512])
        check(folder, query, document, chance.choice(["longest_first", "only_second"]), length)


@pytest.mark.parametrize("kind", ["bert", "roberta", "xlm-roberta"])
@settings(max_examples=60)
@given(query=texts, document=texts, mode=modes, max_length=st.integers(5, 90))
@example(query="", document="", mode="longest_first", max_length=5)
@example(query="a</s>b", document="[SEP]<pad>", mode="only_second", max_length=9)
@example(query="a b c d e f", document="", mode="only_second", max_length=5)
def test_toy_ids_are_the_reference_tokenizers(tokenizers, kind, query, document, mode, max_length):
    check(tokenizers[kind], query, document, mode, max_length)


@settings(max_examples=60)
@given(query=texts, document=texts, mode=modes, max_length=st.integers(4, 600))
def test_demo_ids_are_the_reference_tokenizers(demo_folder, query, document, mode, max_length):
    check(demo_folder, query, document, mode, max_length)


@pytest.mark.parametrize("kind", ["bert", "roberta", "xlm-roberta"])
def test_a_sweep_of_toy_ids(tokenizers, kind):
    sweep(tokenizers[kind])


def test_a_sweep_of_demo_ids(demo_folder):
    sweep(demo_folder)


@pytest.mark.skipif(
    V2_M3 is None,
    reason="ECHELON_V2M3_TOKENIZER does not name a folder with bge-reranker-v2-m3's tokenizer",
)
def test_v2_m3_ids_are_the_reference_tokenizers():
    from transformers import AutoTokenizer

    folder = V2_M3
    sweep(folder)
    check_long(folder)
    rebuilt, ours = AutoTokenizer.from_pretrained(folder), both(folder)[1]
    for query in SENTENCES:
        for document in (*SENTENCES, *MARKS, words(90)):
            expected = reference_ids(rebuilt, query, document, "longest_first", 60)
            encoded = ours.encode([(query, document)], 60, "longest_first")
            assert encoded.batch([0]).ids.tolist() == expected[0]

    @settings(max_examples=200)
    @given(query=texts, document=texts, mode=modes, max_length=st.integers(5, 90))
    def fuzz(query, document, mode, max_length):
        check(folder, query, document, mode, max_length)

    fuzz()


@pytest.mark.parametrize("kind", ["bert", "roberta", "xlm-roberta"])
def test_the_least_length_leaves_special_tokens_alone(tokenizers, kind):
    specials = both(tokenizers[kind])[1].template.specials
    for mode in ("longest_first", "only_second"):
        check(tokenizers[kind], "the kettle", "rain", mode, specials)
        check(tokenizers[kind], "", "rain at the window", mode, specials + 1)
        check(tokenizers[kind], "the kettle", "rain at the window", mode, specials + 1)


def check_long(folder: Path) -> None:
    """A document of 100,000 characters, with and without spaces."""
    for document in (words(16_000)[:100_000], "火车站旁边" * 20_000):
        check(folder, "how long", document, "only_second", 512)
        check(folder, "how long", document, "longest_first", 100_000)


@pytest.mark.parametrize("kind", ["bert", "roberta", "xlm-roberta"])
def test_documents_of_100_000_characters(tokenizers, kind):
    check_long(tokenizers[kind])


@pytest.mark.parametrize("kind", ["bert", "xlm-roberta"])
@pytest.mark.parametrize("mode", ["longest_first", "only_second"])
def test_truncation_side_left_keeps_the_end(tokenizers, tmp_path, kind, mode):
    folder = shutil.copytree(tokenizers[kind], tmp_path / "left")
    settings_file = folder / "tokenizer_config.json"
    content = json.loads(settings_file.read_text(encoding="utf-8"))
    settings_file.write_text(json.dumps({**content, "truncation_side": "left"}), encoding="utf-8")
    for length in range(5, 40):
        check(folder, SENTENCES[0][:20], SENTENCES[1], mode, length)


def test_pairs_of_one_call_are_encoded_as_alone(tokenizers):
    _, ours = both(tokenizers["bert"])
    pairs = [(q, d) for q in SENTENCES[:3] for d in ("", *SENTENCES)]
    together = ours.encode(pairs, 40, "longest_first")
    for index, pair in enumerate(pairs):
        alone = ours.encode([pair], 40, "longest_first")
        assert together.batch([index]).ids.tolist() == alone.batch([0]).ids.tolist()


def test_each_query_is_encoded_once(tokenizers):
    _, ours = both(tokenizers["bert"])
    encoded = ours.encode([("one", d) for d in SENTENCES], 40, "longest_first")
    assert len({id(query) for query in encoded.queries}) == 1


@given(limit=st.integers(1, 12), document=texts)
def test_max_query_tokens_keeps_the_querys_start(tokenizers, limit, document):
    _, ours = both(tokenizers["xlm-roberta"])
    plain = ours.encode([(SENTENCES[1], document)], 500, "longest_first")
    cut = ours.encode([(SENTENCES[1], document)], 500, "longest_first", max_query_tokens=limit)
    assert cut.queries[0].tolist() == plain.queries[0].tolist()[:limit]
    assert cut.documents[0].tolist() == plain.documents[0].tolist()


def test_the_impossible_pair_is_named(tokenizers):
    _, ours = both(tokenizers["bert"])
    pairs = [("a", "rain"), (SENTENCES[1], "rain " * 9)]
    with pytest.raises(InvalidInput) as caught:
        ours.encode(pairs, 8, "only_second", places=[0, 4])
    assert caught.value.field == "pairs[4].query"
    assert "max_length=8" in str(caught.value)
    assert "room for 5 besides special tokens" in str(caught.value)
    assert "longest_first" in caught.value.remedy


def test_own_padding_and_truncation_of_the_file_are_ignored(tokenizers, tmp_path):
    from tokenizers import Tokenizer

    folder = shutil.copytree(tokenizers["bert"], tmp_path / "padded")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_padding(length=64)
    tokenizer.enable_truncation(max_length=7)
    tokenizer.save(str(folder / "tokenizer.json"))
    for sentence in SENTENCES:
        ours, plain = (
            PairEncoder(path).encode([("rain", sentence)], 500, "longest_first").batch([0])
            for path in (folder, tokenizers["bert"])
        )
        assert ours.ids.tolist() == plain.ids.tolist()


def test_a_folder_with_only_a_vocabulary_file(tokenizers, tmp_path):
    from transformers import AutoTokenizer

    reference, _ = both(tokenizers["bert"])
    vocabulary = sorted(reference.get_vocab(), key=reference.get_vocab().get)
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}', encoding="utf-8")
    old = AutoTokenizer.from_pretrained(tmp_path)
    ours = PairEncoder(tmp_path)
    for sentence in SENTENCES:
        encoded = ours.encode([(sentence, SENTENCES[0])], 30, "longest_first")
        expected = reference_ids(old, sentence, SENTENCES[0], "longest_first", 30)
        assert encoded.batch([0]).ids.tolist() == expected[0]


def test_no_tokenizer_is_an_error_that_says_so(tmp_path):
    with pytest.raises(BadCheckpoint, match=r"no tokenizer\.json and no vocabulary file"):
        PairEncoder(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model": 3}', "\x00\x01"])
def test_a_damaged_tokenizer_is_an_error(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content, encoding="utf-8")
    with pytest.raises(BadCheckpoint, match="not a readable tokenizer"):
        PairEncoder(tmp_path)


def test_wrong_parts_of_a_tokenizer_are_an_error(tokenizers, tmp_path):
    """Unknown special tokens make the library panic, missing ones fail at the first odd text."""
    path = tmp_path / "tokenizer.json"
    whole = json.loads((tokenizers["bert"] / "tokenizer.json").read_text("utf-8"))
    for part, name, value in (
        ("post_processor", "special_tokens", {}),
        ("model", "unk_token", "missing"),
        ("model", "vocab", {"a": 2**40}),
    ):
        path.write_text(json.dumps({**whole, part: {**whole[part], name: value}}), "utf-8")
        with pytest.raises(BadCheckpoint, match=r"tokenizer\.json: not a readable tokenizer"):
            PairEncoder(tmp_path)
    with path.open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)  # a hole: it takes no disk
    with pytest.raises(BadCheckpoint, match="more than 268435456 bytes"):
        PairEncoder(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", '"left"'])
def test_damaged_tokenizer_settings_are_an_error(tokenizers, tmp_path, content):
    folder = shutil.copytree(tokenizers["bert"], tmp_path / "damaged")
    (folder / "tokenizer_config.json").write_text(content, encoding="utf-8")
    with pytest.raises(BadCheckpoint, match=r"tokenizer_config\.json: not "):
        PairEncoder(folder)


def test_a_vocabulary_that_cannot_be_read_is_an_error(tmp_path):
    (tmp_path / "vocab.json").write_text("{", encoding="utf-8")
    with pytest.raises(BadCheckpoint, match="transformers could not build one"):
        PairEncoder(tmp_path)


def test_a_tokenizer_without_tokens_is_refused(tmp_path):
    from tokenizers import Tokenizer, models

    Tokenizer(models.BPE()).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UnsupportedModel, match="no tokens for plain text"):
        PairEncoder(tmp_path)


def test_a_tokenizer_that_turns_pairs_round_is_refused(tokenizers, tmp_path):
    from tokenizers import Tokenizer, processors

    tokenizer = Tokenizer.from_file(str(tokenizers["bert"] / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $B [SEP] $A [SEP]",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UnsupportedModel, match="document before the query"):
        PairEncoder(tmp_path)
