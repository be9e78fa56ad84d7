"""The built-in texts keep the structure that demos, tuning and the ranking gates rely on."""

import json
import re
from collections import Counter
from importlib import resources
from itertools import pairwise
from statistics import mean, median

import pytest

HAN = re.compile(r"[\u4e00-\u9fff]")
LANGS = ("en", "zh")
QUERIES_PER_LANG = 12
DOCUMENTS_PER_QUERY = 12


def read_raw():
    return resources.files("echelon.data").joinpath("texts.jsonl").read_text(encoding="utf-8")


def read_entries():
    return [json.loads(line) for line in read_raw().splitlines()]


@pytest.fixture(scope="module")
def entries():
    return read_entries()


def documents(entries, lang=None):
    return [
        document
        for entry in entries
        if lang is None or entry["lang"] == lang
        for document in entry["documents"]
    ]


def test_ids_are_unique_and_name_their_language(entries):
    expected = [f"{lang}-{n:02d}" for lang in LANGS for n in range(1, QUERIES_PER_LANG + 1)]
    assert [entry["id"] for entry in entries] == expected
    assert all(entry["id"].startswith(entry["lang"] + "-") for entry in entries)


def test_every_line_has_exactly_the_documented_fields(entries):
    for entry in entries:
        assert set(entry) == {"id", "lang", "query", "documents"}
        assert len(entry["documents"]) == DOCUMENTS_PER_QUERY
        for document in entry["documents"]:
            assert set(document) == {"text", "grade"}
            assert type(document["text"]) is str
            assert type(document["grade"]) is int


def test_texts_are_distinct_trimmed_and_not_empty(entries):
    texts = [entry["query"] for entry in entries]
    texts += [document["text"] for document in documents(entries)]
    assert len(texts) == len(LANGS) * QUERIES_PER_LANG * (1 + DOCUMENTS_PER_QUERY)
    assert all(text and text == text.strip() for text in texts)
    folded = Counter(" ".join(text.lower().split()) for text in texts)
    assert [text for text, count in folded.items() if count > 1] == []


def test_grades_follow_the_documented_mix(entries):
    for entry in entries:
        grades = Counter(document["grade"] for document in entry["documents"])
        assert set(grades) <= {0, 1, 2, 3}, entry["id"]
        assert len(grades) >= 3, entry["id"]
        assert 1 <= grades[3] <= 2, entry["id"]
        assert 2 <= grades[2] <= 3, entry["id"]
        assert 4 <= grades[1] <= 5, entry["id"]


def test_order_does_not_give_the_grades_away(entries):
    firsts = set()
    for entry in entries:
        grades = [document["grade"] for document in entry["documents"]]
        assert any(a < b for a, b in pairwise(grades)), entry["id"]
        assert any(a > b for a, b in pairwise(grades)), entry["id"]
        assert grades[0] != 3, entry["id"]
        firsts.add(grades.index(3))
    assert len(firsts) >= 5


def test_length_does_not_give_the_grades_away(entries):
    """The longest document of a query is seldom its best one."""
    longest = [max(entry["documents"], key=lambda d: len(d["text"])) for entry in entries]
    assert sum(document["grade"] == 3 for document in longest) <= len(entries) // 3


def test_chinese_is_chinese_and_unescaped(entries):
    assert "\\u" not in read_raw()
    for entry in entries:
        texts = [entry["query"], *(document["text"] for document in entry["documents"])]
        if entry["lang"] == "zh":
            assert all(HAN.search(text) for text in texts), entry["id"]
        else:
            assert not any(HAN.search(text) for text in texts), entry["id"]


@pytest.mark.parametrize(("lang", "unit"), [("en", 4.5), ("zh", 1.6)])
def test_lengths_spread_like_web_passages(entries, lang, unit):
    """About ``unit`` characters make a token, so no tokenizer is needed here."""
    lengths = sorted(len(document["text"]) / unit for document in documents(entries, lang))
    assert lengths[0] < 25
    assert lengths[-1] > 300
    assert 90 < mean(lengths) < 130
    assert median(lengths) < mean(lengths), "a long tail to the right"
    assert sum(length > 250 for length in lengths) >= 5


def test_queries_are_short_and_long(entries):
    for lang in LANGS:
        lengths = sorted(len(entry["query"]) for entry in entries if entry["lang"] == lang)
        assert lengths[0] <= 12
        assert lengths[-1] >= 70
