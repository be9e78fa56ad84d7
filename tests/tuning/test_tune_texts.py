"""Reading the texts that tuning measures with."""

from __future__ import annotations

import json

import pytest

from echelon.data import Texts, Topic, load_texts
from echelon.errors import InvalidInput


def write(path, *records):
    path.write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in records), "utf-8")
    return path


def test_the_built_in_set_has_both_languages():
    both, english, chinese = (load_texts(language=lang) for lang in (None, "en", "zh"))
    assert len(both.pairs) == len(english.pairs) + len(chinese.pairs)
    assert english.pairs
    assert chinese.pairs
    assert all(topic.grades is not None for topic in both.topics)


def test_both_forms_of_a_line_and_lines_of_one_query_are_joined(tmp_path):
    path = write(
        tmp_path / "x.jsonl",
        {"query": "q1", "documents": ["a", {"text": "b", "grade": 2}]},
        {"query": "q2", "document": "c"},
        {"query": "q1", "document": "d"},
    )
    texts = load_texts(path)
    assert texts.topics == (Topic("q1", ("a", "b", "d")), Topic("q2", ("c",)))
    assert texts.name == "x.jsonl"


def test_grades_are_kept_where_all_documents_have_one(tmp_path):
    documents = [{"text": "a", "grade": 0}, {"text": "b", "grade": 3}]
    texts = load_texts(write(tmp_path / "x.jsonl", {"query": "q", "documents": documents}))
    assert texts.topics[0].grades == (0, 3)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("not json", "x.jsonl:1"),
        ('{"query": "q", "document": "d"}\n{"query": 3, "document": "d"}', "x.jsonl:2"),
        ('{"query": "q"}', "'documents'"),
        ('{"query": "q", "documents": "d"}', "'documents'"),
        ('{"query": "q", "documents": ["d", 5]}', "documents[1]"),
        ("", "no documents"),
    ],
)
def test_a_bad_line_is_named(tmp_path, content, said):
    path = tmp_path / "x.jsonl"
    path.write_text(content, "utf-8")
    with pytest.raises(InvalidInput) as caught:
        load_texts(path)
    assert said in str(caught.value)
    assert '{"query"' in str(caught.value)


def test_a_missing_or_undecodable_file_is_an_error(tmp_path):
    with pytest.raises(InvalidInput, match="nowhere"):
        load_texts(tmp_path / "nowhere.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(InvalidInput, match="UTF-8"):
        load_texts(tmp_path / "latin.jsonl")


def test_samples_of_any_size_have_the_same_mix_of_lengths():
    texts = Texts("t", (Topic("q", tuple("x" * n for n in range(1, 201))),))
    for count in (1, 10, 50, 200, 450):
        sample = texts.sample(count)
        assert len(sample) == count
        mean = sum(len(document) for _, document in sample) / count
        assert mean == pytest.approx(100.5, rel=0.12)
    assert len(set(texts.sample(200))) == 200
    assert texts.sample(10) == texts.sample(10)
