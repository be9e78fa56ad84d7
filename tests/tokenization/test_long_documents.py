"""Long texts are read in windows, as far as needed, and give the tokens of the whole text."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import textwrap
from contextlib import suppress
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from helpers import SENTENCES, TEMPLATE
from hypothesis import example, given, settings
from hypothesis import strategies as st
from services import LetterEncoder, service, submit, until
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers

from echelon.errors import InvalidInput, TooLarge
from echelon.scheduling.admission import AdmissionLimits
from echelon.tokenization import boundaries as rules
from echelon.tokenization.boundaries import LONGEST_RUN, WINDOW, Boundaries
from echelon.tokenization.pairs import chunk, cut_at, encode_pairs
from echelon.tokenization.reading import Reading
from echelon.tokenization.tokenizer import PairEncoder
from echelon.types import Chunking

SPACES = normalizers.Replace(Regex(" {2,}"), " ")
RUNS = [AddedToken(" " * count, normalized=True) for count in (2, 3)]
KINDS = {  # each rule of tokenization.boundaries: kind of vocabulary, normalizer, pre-tokenizer
    "bert": ("bert", None, None),
    "roberta": ("roberta", None, None),
    "xlm-roberta": ("xlm-roberta", None, None),
    "cased": ("bert", normalizers.BertNormalizer(handle_chinese_chars=False), None),
    "words": ("bert", normalizers.NFD(), pre_tokenizers.Whitespace()),
    "prefixed": ("roberta", normalizers.NFKC(), pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "digits": (
        "roberta",
        normalizers.NFC(),
        pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        ),
    ),
    "stripped": (
        "xlm-roberta",
        normalizers.Sequence([normalizers.Strip(), normalizers.StripAccents(), SPACES]),
        pre_tokenizers.Metaspace(),
    ),
    "first": (
        "xlm-roberta",
        normalizers.Sequence([normalizers.Strip(left=False), SPACES]),
        pre_tokenizers.Metaspace(prepend_scheme="first"),
    ),
    "split": (
        "xlm-roberta",
        normalizers.Sequence([normalizers.Replace(Regex(r"\s{2,}|[\n\r\t]"), " "), SPACES]),
        pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), pre_tokenizers.Metaspace()]),
    ),
}

ODDITIES = (
    *"\u0301ﬁ①ﷺ\ufe70\u0600\u06dd\u0d4e\u1160\u3164\uff9eำ्াั\u309a가İΣ²½▁Ġ_'🇩👩\ufe0f\u200d",
    *"\x00\x07\x7f\x85\u00a0\u200b\u2028\u202e\u3000\ufeff\t\r\n",
    *("👩‍👩‍👧‍👦", "🏳️‍🌈", "🇩🇪", "e\u0301", "か\u3099", "'s", "``", "''", "\r\n", "  ", "   "),
    *("<s>", "</s>", "<pad>", "<unk>", "<mask>", "<left>", "[CLS]", "[SEP]", "[MASK]"),
)
WORDS = " ".join(SENTENCES)
pieces = st.one_of(
    st.sampled_from(list(" \n,.。，!x1的火车かガไทย")),
    st.sampled_from(ODDITIES),
    st.integers(0, len(WORDS) - 1).flatmap(
        lambda at: st.integers(1, 12).map(lambda size: WORDS[at : at + size])
    ),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=3),
)
texts = st.lists(pieces, min_size=3, max_size=30).map("".join)
sides = st.sampled_from(["left", "right"])
modes = st.sampled_from(["longest_first", "only_second"])


def tokenizer_of(folder, kind) -> Tokenizer:
    base, normalizer, pre_tokenizer = KINDS[kind]
    made = Tokenizer.from_file(str(folder[base] / "tokenizer.json"))
    if normalizer is not None:
        made.normalizer = normalizer
    if pre_tokenizer is not None:
        made.pre_tokenizer = pre_tokenizer
    if base == "roberta":
        made.add_tokens([*RUNS, AddedToken("<left>", lstrip=True)])
    return made


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request, tokenizers) -> Tokenizer:
    return tokenizer_of(tokenizers, request.param)


def ids(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    return [e.ids for e in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


@settings(max_examples=30)
@given(text=texts)
@example("x \u0301")
@example("x \x07 的 \x00 <mask> [SEP] 的的, a,b\nc  d")
def test_the_tokens_at_a_boundary_are_those_of_both_parts(tokenizer, text):
    places = [*Boundaries(tokenizer).places(text, 0, len(text))]
    parts = [part for place in places for part in (text[:place], text[place:])]
    whole, *found = ids(tokenizer, [text, *parts])
    for left, right in zip(found[::2], found[1::2], strict=True):
        assert left + right == whole


@settings(max_examples=30)
@given(text=texts, side=sides, enough=st.none() | st.integers(1, 20), window=st.integers(2, 9))
@example("a " * 9 + "火车站旁边" * 30, "right", 40, 5)
@example("rain, at the window. " * 9, "left", None, 4)
def test_windows_give_the_tokens_of_the_whole_text(tokenizer, text, side, enough, window):
    reading = Reading("text", text, enough, side, Boundaries(tokenizer, window, 20 * window))
    (whole,) = ids(tokenizer, [text])
    while not reading.done:
        try:
            parts = reading.windows()
        except TooLarge:
            assert len(text) > 20 * window
            return
        assert max(map(len, parts)) <= 20 * window
        reading.add([np.array(part, dtype=np.int32) for part in ids(tokenizer, parts)])
    found = reading.ids.tolist()
    assert len(found) >= min(enough or len(whole), len(whole))
    assert found == (whole[len(whole) - len(found) :] if side == "left" else whole[: len(found)])


def test_the_pieces_of_one_long_word_are_whole(tokenizers):
    tokenizer = tokenizer_of(tokenizers, "xlm-roberta")
    piece = max((name for name in tokenizer.get_vocab() if re.fullmatch("[a-z]+", name)), key=len)
    assert len(piece) > 1
    (whole,) = ids(tokenizer, [piece * 100])
    known = 0
    for window in range(5, 12):
        reading = Reading("t", piece * 100, None, "right", Boundaries(tokenizer, window, 90))
        with suppress(TooLarge):
            while not reading.done:
                parts = ids(tokenizer, reading.windows())
                reading.add([np.array(part, dtype=np.int32) for part in parts])
                assert reading.ids.tolist() == whole[: len(reading.ids)]
                known = max(known, len(reading.ids))
    assert known


def test_every_kind_divides_every_script(tokenizer):
    places = Boundaries(tokenizer).places
    for sentence in SENTENCES:
        if " " in sentence:
            assert any(places(sentence, 0, len(sentence))), sentence


@pytest.mark.parametrize(
    ("base", "change"),
    [
        ("xlm-roberta", {"pre_tokenizer": pre_tokenizers.Metaspace(split=False)}),
        ("bert", {"pre_tokenizer": pre_tokenizers.Split(" ", "isolated")}),
        ("bert", {"pre_tokenizer": pre_tokenizers.Punctuation()}),
        ("bert", {"normalizer": normalizers.Prepend("x")}),
        ("bert", {"normalizer": normalizers.Replace("a ", "b")}),
        ("roberta", {"normalizer": normalizers.Strip()}),
        ("roberta", {"token": AddedToken("to ken")}),
        ("roberta", {"token": AddedToken("token", single_word=True)}),
        ("roberta", {"token": AddedToken("token", rstrip=True)}),
        ("roberta", {"dropout": 0.1}),
    ],
)
def test_an_unknown_part_leaves_no_boundaries(tokenizers, base, change):
    tokenizer = Tokenizer.from_file(str(tokenizers[base] / "tokenizer.json"))
    assert any(Boundaries(tokenizer).places("one two three", 0, 13))
    for name, value in change.items():
        if name == "token":
            tokenizer.add_tokens([value])
        else:
            setattr(tokenizer.model if name == "dropout" else tokenizer, name, value)
    assert not any(Boundaries(tokenizer).places("one two three", 0, 13))


def test_a_rule_that_fails_on_the_sample_is_not_used(tokenizers, monkeypatch):
    tokenizer = Tokenizer.from_file(str(tokenizers["bert"] / "tokenizer.json"))
    monkeypatch.setattr(rules, "_WORD", r"\w(?=\w)|.")
    assert not any(Boundaries(tokenizer).places("one two three", 0, 13))


def test_letters_that_become_spaces_end_no_part(tokenizers, monkeypatch):
    boundaries = Boundaries(tokenizer_of(tokenizers, "first"))
    assert [*boundaries.places("buz one two", 0, 11)] == [3, 7]
    monkeypatch.setattr(rules, "_normalized", lambda _, text: text.replace("z", " "))
    assert [*boundaries.places("buz one two", 0, 11)] == [7]


@cache
def both(folder, side):
    """An encoder that reads all texts whole, and one with short windows."""
    whole, short = PairEncoder(folder), PairEncoder(folder)
    whole.template = short.template = replace(whole.template, side=side)
    whole.boundaries = Boundaries(whole._tokenizer, 10**6)
    short.boundaries = Boundaries(short._tokenizer, 4, 10**6)
    return whole, short


@pytest.mark.parametrize("kind", ["bert", "roberta", "xlm-roberta"])
@settings(max_examples=25)
@given(
    pairs=st.lists(st.tuples(texts, texts), min_size=1, max_size=4),
    lengths=st.tuples(st.integers(5, 60), st.integers(5, 60)),
    cut=st.tuples(modes, sides),
    how=st.builds(Chunking, st.none() | st.integers(1, 90), st.none() | st.integers(1, 4)),
)
@example([("a " * 40, "b " * 100)], (24, 10), ("longest_first", "right"), Chunking(7, 1))
@example([("a " * 40, "b " * 100)], (25, 10), ("longest_first", "left"), Chunking(7, 1))
def test_pairs_of_long_texts_are_those_of_whole_texts(tokenizers, kind, pairs, lengths, cut, how):
    (mode, side), longer, shorter = cut, max(lengths), min(lengths)
    results = []
    for encoder in both(tokenizers[kind], side):
        wanted = min(how.max_tokens or 10**6, (how.max_chunks or 10**6) * longer)
        try:
            turns = encoder.turns(pairs, longer, mode, document_tokens=wanted)
            chunks, chunk_map = chunk([*turns][-1], longer, how)
            found = encoder.encode(pairs, longer, mode)
            turned = cut_at([*encoder.turns(pairs, longer, mode, side="left")][-1], "left")[0]
            fallback = found.shortened(shorter, range(len(pairs)))
        except ValueError as error:
            results.append([str(error)])
            continue
        batches = [part.batch(range(len(part))) for part in (found, turned, fallback, chunks)]
        results.append([*(batch.ids.tolist() for batch in batches), chunk_map.starts.tolist()])
        results[-1].append([bool(lost) for lost in chunk_map.cut])
    assert results[0] == results[1]


@given(st.integers(0, 200), st.integers(0, 400), st.integers(1, 150), modes)
def test_truncation_needs_no_more_than_one_token_beyond(query, document, room, mode):
    known = min(document, max(room, query) + 1)
    arrays = [np.arange(length, dtype=np.int32) for length in (query, document, known)]
    ends = []
    for read in arrays[1:]:
        try:
            pairs = encode_pairs(TEMPLATE, [arrays[0]], [read], room + 3, mode)
        except ValueError as error:
            ends.append(str(error))
        else:
            ends.append((pairs.kept.tolist(), pairs.truncated_tokens.any()))
    assert ends[0] == ends[1]


def counted(encoder, monkeypatch) -> list[int]:
    """Characters of each text that the encoder tokenizes from now on."""
    tokens, seen = encoder._tokens, []
    monkeypatch.setattr(
        encoder, "_tokens", lambda parts: (seen.extend(map(len, parts)), tokens(parts))[1]
    )
    return seen


@pytest.mark.parametrize("kind", ["bert", "roberta", "xlm-roberta"])
@pytest.mark.parametrize("unit", ["x ", "the kettle, ", "火车站旁边的天气很好，", "дождь\n", "a;b"])
def test_a_long_document_costs_what_the_model_reads(tokenizers, monkeypatch, kind, unit):
    encoder = PairEncoder(tokenizers[kind])
    text = unit * (150_000 // len(unit))
    expected = PairEncoder(tokenizers[kind])
    expected.boundaries = Boundaries(expected._tokenizer, len(text))
    pairs = [("tea", text), ("tea", "short")]
    seen = counted(encoder, monkeypatch)
    found = encoder.encode(pairs, 512, "longest_first")
    one_word = kind == "xlm-roberta" and " " not in unit  # its parts are read several times
    assert sum(seen) <= WINDOW * (8 if one_word else 1) + 200
    whole = expected.encode(pairs, 512, "longest_first")
    assert found.batch([0, 1]).ids.tolist() == whole.batch([0, 1]).ids.tolist()
    assert 0 < found.truncated_tokens[0] <= whole.truncated_tokens[0]


def test_text_that_cannot_be_divided_is_refused_where_it_is_needed(tokenizers):
    encoder = PairEncoder(tokenizers["roberta"])
    run = "x" * (LONGEST_RUN + 1)
    with pytest.raises(TooLarge, match=r"^pairs\[7\]\.document: the 131072 characters after"):
        encoder.encode(
            [("tea", "short"), ("tea", "a b " + run)], 512, "longest_first", None, [3, 7]
        )
    with pytest.raises(TooLarge, match=r"^pairs\[0\]\.query: it has 131073 characters"):
        encoder.encode([(run, "short")], 512, "longest_first")
    assert len(encoder.encode([("tea", "a b " * WINDOW + run)], 512, "longest_first")) == 1
    assert encoder.encode([("tea", run[1:])], 512, "longest_first").lengths.tolist() == [512]
    query = encoder.encode([("a b " * WINDOW, "x")], 512, "longest_first", 9).queries[0]
    assert len(query) == 9


LIMITED = """
    import resource, sys
    from pathlib import Path
    from echelon.tokenization.tokenizer import PairEncoder
    encoder = PairEncoder(Path(sys.argv[1]))
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 300 * 2**20,) * 2)
    for unit in ("x ", "the kettle ", "火车站旁边 "):
        text = unit * (16 * 2**20 // len(unit))
        for side in ("right", "left"):
            *_, pairs = encoder.turns([("tea", text)], 512, "longest_first", side=side)
            assert pairs.lengths.tolist() == [512]
"""


@pytest.mark.parametrize("kind", ["bert", "roberta", "xlm-roberta"])
def test_the_longest_documents_need_little_memory(tokenizers, kind):
    command = [sys.executable, "-c", textwrap.dedent(LIMITED), str(tokenizers[kind])]
    subprocess.run(command, check=True, timeout=300)


class SlowEncoder(LetterEncoder):
    """Requests for ``long`` take turns for ever; the turns are counted."""

    turn_count = 0

    def turns(self, pairs, *args, **settings):
        while pairs[0][0] == "long":
            self.turn_count += 1
            yield None
        yield from super().turns(pairs, *args, **settings)


def test_requests_take_turns_and_stop_when_their_caller_has_gone():
    encoder = SlowEncoder()

    async def main():
        async with service(encoder=encoder) as made, asyncio.timeout(60):
            long = [asyncio.create_task(submit(made, [("long", "text")])) for _ in range(3)]
            await until(lambda: encoder.turn_count > 5)
            assert len((await submit(made, [("short", "text")])).logits) == 1
            for task in long:
                task.cancel()
            await asyncio.gather(*long, return_exceptions=True)
            for _ in range(3):  # the turns that ran have ended
                await submit(made, [("short", "text")])
            count = encoder.turn_count
            await submit(made, [("short", "text")])
            assert encoder.turn_count == count

    asyncio.run(main())


def test_errors_say_whether_texts_were_tokenised():
    async def main():
        bounds = AdmissionLimits(max_request_tokens=60)
        async with service(max_length=60, bounds=bounds) as made:
            for pairs, settings, tokenised in (
                ([("query", 5)], {}, False),
                ([("query", "x" * 900)] * 40, {}, False),
                ([("query", "x" * 50), ("query", "x" * 50)], {}, True),
                ([("query", "x" * 70)], {"refuse_truncation": True}, True),
                (
                    [("q" * 50, "x" * 9)],
                    {"truncation": "only_second", "chunking": Chunking()},
                    True,
                ),
            ):
                with pytest.raises(InvalidInput) as caught:
                    await submit(made, pairs, **settings)
                assert caught.value.tokenised is tokenised, caught.value

    asyncio.run(main())
