"""Requests of each protocol: which one a body is in, what it asks for, its limits; no server."""

from __future__ import annotations

import json
from sys import getsizeof

import msgspec
import pytest

from echelon.errors import InvalidInput, Malformed, Overloaded, TooLarge
from echelon.server.limits import ServerLimits
from echelon.server.protocols import PATHS, PROTOCOLS, SHARED, choose, read
from echelon.server.protocols.base import ErrorResponse, RequestTexts, memory_of
from echelon.types import Chunking

BY_NAME = {protocol.name: protocol for protocol in PROTOCOLS}
PAIRS = [("q", "a"), ("q", "b")]


def body(**fields) -> bytes:
    return json.dumps(fields).encode()


def parsed(protocol, text, headers=None, now=0.0, use_memory=lambda _: None, **limits):
    texts = RequestTexts(ServerLimits(**limits), use_memory)
    return read(protocol, text, headers or {}, now, texts)


def read_as(name, **fields):
    return parsed(BY_NAME[name], body(**fields))[0]


def options_as(name, **fields):
    return parsed(BY_NAME[name], body(**fields))[1]


def written(protocol, error):
    return protocol.write_error(ErrorResponse(error, str(error), "abc"))


# Which protocol a body is in.


@pytest.mark.parametrize(
    ("path", "fields", "name"),
    [
        ("/v1/rerank", {"query": "q", "documents": ["a"], "model": "rerank-v3.5"}, "cohere_v1"),
        ("/v1/rerank", {"query": "q", "documents": ["a"], "model": "jina-reranker-v2"}, "jina"),
        ("/v1/rerank", {"query": "q", "documents": ["a"], "top_k": 2}, "voyage"),
        ("/v1/rerank", {"query": "q", "documents": ["a"], "truncation": True}, "voyage"),
        ("/v1/rerank", {"query": "q", "documents": ["a"], "raw_scores": False}, "infinity"),
        ("/v1/rerank", {"query": "q", "documents": ["a"], "truncate_prompt_tokens": 9}, "vllm"),
        ("/v2/rerank", {"query": "q", "documents": ["a"], "model": "m"}, "cohere_v2"),
        ("/v2/rerank", {"query": "q", "documents": ["a"], "use_activation": True}, "vllm"),
        ("/rerank", {"query": "q", "texts": ["a"]}, "tei"),
        ("/rerank", {"query": "q", "texts": ["a"], "raw_scores": True}, "tei"),
        ("/rerank", {"query": "q", "documents": ["a"]}, "vllm"),
        ("/rerank", {"query": "q", "documents": ["a"], "raw_scores": True}, "infinity"),
        ("/score", {"text_1": "q", "text_2": "a"}, "vllm_score"),
        ("/v1/ranking", {"query": {"text": "q"}, "passages": [{"text": "a"}]}, "nim"),
        ("/jina/v1/rerank", {"query": "q", "documents": ["a"], "top_k": 2}, "jina"),
        ("/infinity/rerank", {"query": "q", "documents": ["a"]}, "infinity"),
    ],
)
def test_bodies_tell_their_protocol(path, fields, name):
    assert choose(PATHS[path], body(**fields)).name == name


def test_every_protocol_has_a_path_of_its_own_and_an_example_that_leads_to_it():
    for protocol in PROTOCOLS:
        alone = [path for path, protocols in PATHS.items() if protocols == (protocol,)]
        assert alone
        shared = [path for path, protocols in SHARED.items() if protocol in protocols]
        assert shared
        text = body(**protocol.example)
        assert choose(SHARED[shared[0]], text) is protocol
        assert len(parsed(protocol, text)[0].pairs) == 2


# Bodies in.


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("cohere_v1", {"query": "q", "documents": ["a", {"text": "b", "title": "t"}]}),
        ("cohere_v2", {"query": "q", "documents": ["a", "b"], "model": "m"}),
        ("jina", {"query": "q", "documents": ["a", {"text": "b"}]}),
        ("tei", {"query": "q", "texts": ["a", "b"], "unknown": {"x": 1}}),
        ("vllm", {"query": "q", "documents": ["a", {"text": "b"}], "user": "me"}),
        ("vllm_score", {"text_1": "q", "text_2": ["a", "b"]}),
        ("vllm_score", {"queries": ["q", "q"], "documents": ["a", "b"]}),
        ("vllm_score", {"data_1": "q", "items": [{"text": "a"}, "b"]}),
        ("infinity", {"query": "q", "documents": ["a", "b"]}),
        ("voyage", {"query": "q", "documents": ["a", "b"]}),
        ("nim", {"query": {"text": "q"}, "passages": [{"text": "a"}, {"text": "b"}]}),
    ],
)
def test_the_pairs_are_the_same_in_every_protocol(name, fields):
    request, options = read_as(name, **fields), options_as(name, **fields)
    assert list(request.pairs) == PAIRS
    assert (request.deadline, request.priority) == (None, "normal")
    assert (options.top_n, options.ranked) == (None, name != "vllm_score")


def test_documents_come_back_as_each_protocol_has_them():
    objects = [{"text": "a"}, {"text": "b", "title": "t"}]
    base = {"query": "q", "documents": ["a", objects[1]]}
    assert options_as("cohere_v1", **base).documents is None
    assert options_as("cohere_v1", **base, return_documents=True).documents == objects
    assert options_as("jina", **base).documents == [{"text": "a"}, {"text": "b"}]
    assert options_as("jina", **base, return_documents=False).documents is None
    assert options_as("vllm", **base).documents == ["a", "b"]
    plain = {"query": "q", "documents": ["a", "b"]}
    assert options_as("cohere_v2", **plain).documents is None
    for name in ("infinity", "voyage"):
        assert options_as(name, **plain).documents is None
        assert options_as(name, **plain, return_documents=True).documents == ["a", "b"]
    texts = {"query": "q", "texts": ["a", "b"]}
    assert options_as("tei", **texts).documents is None
    assert options_as("tei", **texts, return_text=True).documents == ["a", "b"]


def test_cohere_ranks_named_fields():
    documents = [{"title": "t", "text": "b", "n": 3}, "plain"]
    fields = ["title", "n", "none"]
    request = read_as("cohere_v1", query="q", documents=documents, rank_fields=fields)
    assert [document for _, document in request.pairs] == ["title: t\nn: 3", "plain"]
    with pytest.raises(InvalidInput, match=r"documents\[0\]: has none of the rank_fields"):
        read_as("cohere_v1", query="q", documents=documents, rank_fields=["none"])


def test_fields_find_their_meaning():
    plain = {"query": "q", "documents": ["a"]}
    assert read_as("cohere_v1", **plain, max_chunks_per_doc=3).chunking == Chunking(None, 3)
    assert read_as("cohere_v2", **plain, max_tokens_per_doc=9).chunking == Chunking(9)
    assert read_as("vllm", **plain, max_tokens_per_doc=9).chunking == Chunking(9)
    assert read_as("vllm", **plain, max_tokens_per_query=5).max_query_tokens == 5
    assert read_as("vllm", **plain, truncate_prompt_tokens=-1).max_length is None
    assert read_as("vllm", **plain, truncate_prompt_tokens=64).max_length == 64
    assert options_as("vllm", **plain, use_activation=False).raw_scores
    assert read_as("voyage", **plain, top_k=1, truncation=False).refuse_truncation
    assert options_as("infinity", **plain, raw_scores=True).raw_scores
    assert read_as("tei", query="q", texts=["a"], truncate=False, raw_scores=True).refuse_truncation
    for word, side in (("right", "right"), ("Left", "left"), (None, None)):
        assert read_as("tei", query="q", texts=["a"], truncation_direction=word).side == side
        assert read_as("vllm", **plain, truncation_side=word).side == side
    nim = {"query": {"text": "q"}, "passages": [{"text": "a"}]}
    assert read_as("nim", **nim).refuse_truncation
    assert not read_as("nim", **nim, truncate="END").refuse_truncation


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=lambda p: p.name)
def test_every_protocol_has_the_common_fields(protocol):
    text = body(**protocol.example, timeout_ms=50, explain=True, priority="low")
    request, options = parsed(protocol, text, {"x-request-timeout-ms": "70"}, 10.0)
    assert (request.deadline, request.priority, options.explain) == (10.05, "low", True)


def test_headers_give_what_the_body_leaves_open():
    headers = {"x-request-timeout-ms": "70", "x-request-priority": "HIGH"}
    request, _ = parsed(BY_NAME["tei"], body(query="q", texts=["a"]), headers, 10.0)
    assert (request.deadline, request.priority) == (10.07, "high")


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=lambda p: p.name)
def test_null_means_left_out(protocol):
    needed = {"query", "documents", "texts", "passages", "text_1", "text_2"}
    base = {name: value for name, value in protocol.example.items() if name in needed}
    optional = [field.name for field in msgspec.structs.fields(protocol.body)]
    nulls = dict.fromkeys(name for name in optional if name not in base)
    assert parsed(protocol, body(**base, **nulls)) == parsed(protocol, body(**base))


@pytest.mark.parametrize(("given", "kept"), [(None, None), (0, None), (1, 1), (99, 99)])
def test_top_n(given, kept):
    for name in ("cohere_v1", "cohere_v2", "jina", "vllm", "infinity"):
        assert options_as(name, query="q", documents=["a"], top_n=given).top_n == kept
    assert options_as("voyage", query="q", documents=["a"], top_k=given).top_n == kept


# Wrong bodies.


@pytest.mark.parametrize(
    ("name", "fields", "words"),
    [
        ("cohere_v1", {"documents": ["a"]}, "query: is missing"),
        ("cohere_v2", {"query": "q"}, "documents: is missing"),
        ("cohere_v2", {"query": 3, "documents": ["a"]}, "query: Expected str, got int"),
        ("cohere_v2", {"query": "q", "documents": ["a", 3]}, "documents[1]: Expected"),
        ("cohere_v2", {"query": "q", "documents": []}, "documents: is empty"),
        ("cohere_v2", {"query": "q", "documents": ["a", {"x": 1}]}, "documents[1]: has no 'text'"),
        ("cohere_v2", {"query": "q", "documents": ["a"], "top_n": -1}, "top_n: -1 is negative"),
        ("cohere_v2", {"query": "q", "documents": ["a"], "max_tokens_per_doc": 0}, "is not pos"),
        ("voyage", {"query": "q", "documents": ["a"], "top_k": -1}, "top_k: -1 is negative"),
        ("tei", {"query": "q", "texts": ["a"], "truncation_direction": "up"}, "'up' is unknown"),
        ("nim", {"query": {}, "passages": []}, "query.text: is missing"),
        ("nim", {"query": {"text": "q"}, "passages": [], "truncate": "NONE"}, "passages: is empty"),
        ("nim", {"query": {"text": "q"}, "passages": [], "truncate": "x"}, "truncate: 'x' is unk"),
        (
            "vllm",
            {"query": "q", "documents": ["a"], "chat_template_kwargs": {"x": 1}},
            "kwargs.x: ",
        ),
        ("vllm", {"query": "q", "documents": ["a"], "normalize": True}, "normalize: means nothing"),
        ("vllm", {"query": "q", "documents": ["a"], "truncate_prompt_tokens": 0}, "not positive"),
        ("vllm_score", {"text_2": ["a"]}, "text_1: is missing"),
        ("vllm_score", {"text_1": ["q", "r"], "text_2": ["a"]}, "text_1: has 2 texts and text_2"),
        ("vllm_score", {"text_1": [], "text_2": []}, "text_1: is empty"),
        ("vllm_score", {"text_1": "q", "text_2": []}, "text_2: is empty"),
    ],
)
def test_the_wrong_field_is_named(name, fields, words):
    with pytest.raises(InvalidInput) as caught:
        read_as(name, **fields)
    assert words in str(caught.value)
    assert caught.value.status == 422


def test_tei_answers_400_to_no_texts():
    with pytest.raises(InvalidInput) as caught:
        read_as("tei", query="q", texts=[])
    status, answer = written(BY_NAME["tei"], caught.value)
    assert (status, answer["error_type"]) == (400, "Empty")


@pytest.mark.parametrize("text", [b"", b"{", b"\xff", b'{"query": "\\ud800"}'])
def test_a_body_that_is_no_json(text):
    for path in ("/v1/rerank", "/score"):
        with pytest.raises(Malformed, match="body: is no JSON object") as caught:
            parsed(choose(PATHS[path], text), text)
        assert caught.value.status == 400


def test_a_body_that_is_no_text():
    for text in (b'{"query": "\xff", "documents": []}', b'{"query": "q", "documents": ["\xff"]}'):
        with pytest.raises(Malformed, match="body: is no JSON object"):
            parsed(choose(PATHS["/v1/rerank"], text), text)


@pytest.mark.parametrize("text", [b"[]", b"3", b"null"])
def test_a_body_that_is_no_object(text):
    for path in ("/v1/rerank", "/score"):
        with pytest.raises(InvalidInput, match="body: "):
            parsed(choose(PATHS[path], text), text)


# Limits.


def texts_of(request) -> set[str]:
    return {text for pair in request.pairs for text in pair}


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=lambda p: p.name)
def test_every_protocol_keeps_the_limits(protocol):
    text, used = body(**protocol.example), []
    request, _ = parsed(protocol, text, use_memory=used.append)
    count = sum(map(len, texts_of(request)))
    assert parsed(protocol, text, max_documents=2, max_characters=count)[0] == request
    assert used[-1] >= sum(map(getsizeof, texts_of(request)))
    for name, most, value in (
        ("max_documents", 1, f"{protocol.noun}: 2 {protocol.noun}"),
        ("max_characters", count - 1, f"{protocol.noun}: {count} characters or more"),
    ):
        with pytest.raises(TooLarge) as caught:
            parsed(protocol, text, **{name: most})
        assert caught.value.limit == name
        assert str(caught.value).startswith(f"{value} are more than {name}={most}.")
        status, answer = written(protocol, caught.value)
        assert status == 413
        assert f"{name}={most}" in json.dumps(answer)

    def full(size):
        raise Overloaded("full", 1.0)

    with pytest.raises(Overloaded):
        parsed(protocol, text, use_memory=full)


def test_both_sides_of_a_score_count():
    sides = {"text_1": ["aaa", "bbb"], "text_2": ["cc", {"text": "dd"}]}
    text = body(**sides)
    score = BY_NAME["vllm_score"]
    assert len(parsed(score, text, max_characters=10)[0].pairs) == 2
    with pytest.raises(TooLarge, match="text_2: 10 characters or more"):
        parsed(score, text, max_characters=9)
    with pytest.raises(TooLarge, match="text_1: 2 text_1 are more than max_documents=1"):
        parsed(score, text, max_documents=1)


def ranked(documents, fields, **settings):
    text = body(query="q", documents=documents, rank_fields=fields)
    return parsed(BY_NAME["cohere_v1"], text, **settings)[0]


def test_fields_are_counted_as_they_are_joined():
    documents = [{"a": "xx", "b": ["y", 1]}, {"b": None}]
    request = ranked(documents, ["a", "b"], max_rank_fields=2)
    assert [text for _, text in request.pairs] == ["a: xx\nb: ['y', 1]", "b: None"]
    characters = len("q") + len("a: xx\nb: ['y', 1]\n") + len("b: None\n")
    assert ranked(documents, ["a", "b"], max_characters=characters) == request
    with pytest.raises(TooLarge, match=f"{characters} characters or more are more than max_char"):
        ranked(documents, ["a", "b"], max_characters=characters - 1)
    with pytest.raises(TooLarge, match="rank_fields: 3 names are more than max_rank_fields=2"):
        ranked(documents, ["a", "b", "c"], max_rank_fields=2)
    with pytest.raises(InvalidInput, match="rank_fields: 'a' is twice in it"):
        ranked(documents, ["a", "b", "a"])


def test_texts_are_not_joined_beyond_the_memory():
    made = []

    def use_memory(size):
        made.append(size)
        if size > made[0] + 100_000:  # of what was decoded
            raise Overloaded("full", 1.0)

    document = {f"field-{number}": "x" * 1000 for number in range(60)}
    with pytest.raises(Overloaded):
        ranked([document] * 100, list(document), use_memory=use_memory)
    assert made[0] + 100_000 < made[-1] < made[0] + 105_000
    made.clear()
    with pytest.raises(Overloaded):  # as a text it would take four times as much
        ranked([{"a": ["\x7f" * 50_000]}], ["a"], use_memory=use_memory)
    assert made[-1] > made[0] + 4 * 50_000


def test_memory_of_texts_is_what_they_take():
    for text, width in (("x" * 10_000, 1), ("é" * 10_000, 1), ("x" * 9999 + "😀", 4)):
        assert 10_000 * width <= memory_of([{"text": text}]) <= 10_000 * width + 1000


@pytest.mark.parametrize("name", BY_NAME)
def test_every_protocol_takes_an_instruction(name):
    fields = dict(BY_NAME[name].example)
    assert read_as(name, **fields).instruction is None
    assert read_as(name, **fields, instruction="").instruction is None  # as clients that send all
    assert read_as(name, **fields, instruction="Judge.").instruction == "Judge."


def test_vllms_template_values_may_hold_the_instruction():
    fields = {"query": "q", "documents": ["a"], "chat_template_kwargs": {"instruction": "Judge."}}
    assert read_as("vllm", **fields).instruction == "Judge."
    assert read_as("vllm", **fields, instruction="Own.").instruction == "Own."
