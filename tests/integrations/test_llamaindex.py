"""LlamaIndex: our postprocessor against its own machinery, and its clients against our server."""

from __future__ import annotations

import asyncio
import contextlib
import json

import httpx
import pytest
from helpers import READMES, ROUTER, SENTENCES, readme_code, words
from llama_index.core import QueryBundle
from llama_index.core.callbacks import CallbackManager, CBEventType, LlamaDebugHandler
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.llms import MockLLM
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.response_synthesizers.no_text import NoText
from llama_index.core.retrievers import BaseRetriever
from llama_index.core.schema import MetadataMode, NodeWithScore, TextNode
from llama_index.postprocessor.jinaai_rerank import JinaRerank
from llama_index.postprocessor.nvidia_rerank import NVIDIARerank
from llama_index.postprocessor.tei_rerank import TextEmbeddingInference
from served import KEY, QUERY, counted

from echelon import AsyncReranker, EchelonWarning, InvalidInput
from echelon.integrations.llamaindex import EchelonRerank

ALL = len(SENTENCES)


def nodes(texts=SENTENCES, **metadata):
    return [
        NodeWithScore(node=TextNode(text=text, id_=f"n{i}", metadata=metadata), score=0.5)
        for i, text in enumerate(texts)
    ]


def seen(found):
    return [(int(node.node_id.removeprefix("n")), node.score) for node in found]


def expected_of(ranking, top_n=None, *, logits=False):
    return [
        (r.index, pytest.approx(r.logit if logits else r.score, abs=1e-5))
        for r in ranking.results[:top_n]
    ]


# Our postprocessor.


class Fixed(BaseRetriever):
    """A retriever that finds the same for everyone."""

    def __init__(self, texts=SENTENCES):
        super().__init__()
        self._texts = texts

    def _retrieve(self, query_bundle):
        return nodes(self._texts)


def test_a_query_engine_answers_from_the_librarys_ranking(reranker, expected):
    engine = RetrieverQueryEngine(
        Fixed(), NoText(llm=MockLLM()), node_postprocessors=[EchelonRerank(reranker, top_n=4)]
    )
    assert seen(engine.query(QUERY).source_nodes) == expected_of(expected, 4)
    assert seen(asyncio.run(engine.aquery(QUERY)).source_nodes) == expected_of(expected, 4)


def test_order_and_scores_are_exactly_the_librarys(reranker):
    ranking = reranker.rank(QUERY, SENTENCES)
    given = nodes()
    found = EchelonRerank(reranker).postprocess_nodes(given, query_str=QUERY)
    assert seen(found) == [(r.index, r.score) for r in ranking.results]
    assert all(node.score == 0.5 for node in given)
    assert {id(node.node) for node in found} == {id(node.node) for node in given}


def test_metadata_is_read_as_it_would_be_embedded(reranker):
    given = nodes(title="weather")
    given[0].node.excluded_embed_metadata_keys = ["title"]
    texts = [node.node.get_content(metadata_mode=MetadataMode.EMBED) for node in given]
    assert texts[0] == SENTENCES[0]
    assert texts[1].startswith("title: weather")
    found = EchelonRerank(reranker).postprocess_nodes(given, QueryBundle(QUERY))
    assert seen(found) == [(r.index, r.score) for r in reranker.rank(QUERY, texts).results]


def test_it_can_be_saved_and_made_again(bert, expected):
    first = EchelonRerank(str(bert), top_n=3, device="cpu", threads=1)
    saved = json.loads(first.to_json())
    assert saved == {
        "class_name": "EchelonRerank",
        "model": str(bert),
        "top_n": 3,
        "device": "cpu",
        "threads": 1,
    }
    second = EchelonRerank.from_dict(saved)
    assert second.reranker.options == first.reranker.options
    found = second.postprocess_nodes(nodes(), query_str=QUERY)
    assert seen(found) == expected_of(expected, 3)
    first.reranker.close()
    second.reranker.close()


class RecordingListener(BaseEventHandler):
    """Keeps what LlamaIndex's dispatcher says."""

    heard: list = []  # noqa: RUF012 - pydantic copies it

    def handle(self, event, **_):
        self.heard.append(event)


def test_observers_are_told(reranker):
    debug, listener, root = (
        LlamaDebugHandler(print_trace_on_end=False),
        RecordingListener(),
        get_dispatcher(),
    )
    reranks = EchelonRerank(reranker, top_n=2, callback_manager=CallbackManager([debug]))
    root.add_event_handler(listener)
    try:
        found = reranks.postprocess_nodes(nodes(), query_str=QUERY)
    finally:
        root.event_handlers.remove(listener)
    ((began, ended),) = debug.get_event_pairs(CBEventType.RERANKING)
    assert (began.payload["query_str"], began.payload["top_k"]) == (QUERY, 2)
    assert ended.payload["nodes"] == found
    names = [type(event).__name__ for event in listener.heard if "ReRank" in type(event).__name__]
    assert names == ["ReRankStartEvent", "ReRankEndEvent"]


def test_an_open_async_reranker_is_shared(bert, expected):
    async def main():
        async with AsyncReranker(bert, device="cpu", threads=1) as shared:
            reranks = EchelonRerank(shared, top_n=3)
            with counted(shared) as calls:
                found = await reranks.apostprocess_nodes(nodes(), query_str=QUERY)
            assert calls == [QUERY]
            assert seen(reranks.postprocess_nodes(nodes(), query_str=QUERY)) == seen(found)
            return found

    assert seen(asyncio.run(main())) == expected_of(expected, 3)


def test_no_nodes_are_no_nodes(reranker):
    assert EchelonRerank(reranker).postprocess_nodes([], query_str=QUERY) == []


def test_cut_nodes_are_told_of(reranker):
    with pytest.warns(EchelonWarning, match="1 of 2 documents were cut to 130"):
        EchelonRerank(reranker).postprocess_nodes(nodes([words(400), "short"]), query_str=QUERY)


def test_what_is_wrong_is_named(reranker):
    with pytest.raises(InvalidInput, match="query_bundle: is missing"):
        EchelonRerank(reranker).postprocess_nodes(nodes())
    with pytest.raises(InvalidInput, match="top_n: -1 is not a positive"):
        EchelonRerank(reranker, top_n=-1)
    with pytest.raises(InvalidInput, match="threads: cannot be set on a reranker"):
        EchelonRerank(reranker, threads=1)
    with pytest.raises(InvalidInput, match="topn: unknown option"):
        EchelonRerank("demo", topn=1)


@pytest.mark.parametrize("readme", READMES)
def test_the_readmes_example(demo_folder, readme):
    names = {"retriever": Fixed(ROUTER), "llm": MockLLM()}
    exec(readme_code("integrations.llamaindex", readme), names)
    found = seen(names["answer"].source_nodes)
    assert sorted(place for place, _ in found) == [0, 1]
    assert found[0][1] > found[1][1]
    if readme == "README.md":
        assert found[0][0] == 1


# Clients. Those of TEI and Jina know no errors but these.


@pytest.fixture
def tei():
    return lambda url, key=KEY, top_n=ALL: TextEmbeddingInference(
        base_url=url, auth_token=f"Bearer {key}", top_n=top_n
    )


@pytest.fixture
def jina():
    with contextlib.ExitStack() as opened:

        def made(url, key=KEY, **settings):
            client = JinaRerank(base_url=f"{url}/v1", api_key=key, **settings)
            opened.enter_context(client._session)
            return client

        yield made


@pytest.fixture
def nim(monkeypatch):
    with httpx.Client() as plain:  # NVIDIA's forgets, unclosed, the first one that it opens
        monkeypatch.setattr(httpx, "Client", lambda: plain)
        yield lambda url, key=KEY, **settings: NVIDIARerank(
            base_url=f"{url}/v1", api_key=key, **settings
        )


@pytest.mark.parametrize("kind", ["tei", "jina"])
def test_clients_get_the_librarys_ranking(live, expected, kind, request):
    make = request.getfixturevalue(kind)
    found = make(live.url, top_n=ALL).postprocess_nodes(nodes(), query_str=QUERY)
    assert seen(found) == expected_of(expected)
    found = make(live.url, top_n=2).postprocess_nodes(nodes(), query_str=QUERY)
    assert seen(found) == expected_of(expected, 2)


def test_teis_client_also_sends_the_key_alone(live, expected):
    client = TextEmbeddingInference(base_url=live.url, auth_token=KEY, top_n=1)
    assert seen(client.postprocess_nodes(nodes(), query_str=QUERY)) == expected_of(expected, 1)


def test_nvidias_client_gets_the_librarys_ranking(live, nim, bert, expected):
    client = nim(live.url, model=bert.name, top_n=ALL, truncate="END", max_batch_size=4)
    found = client.postprocess_nodes(nodes(), query_str=QUERY)
    assert seen(found) == expected_of(expected, logits=True)
    with pytest.warns(UserWarning, match=f"Default model is set as: {bert.name}"):
        assert nim(live.url).model == bert.name


def test_teis_client_takes_no_error_for_scores(live, full, tei, monkeypatch):
    """It ignores statuses; the answers have TEI's type, once the body was read."""
    answers = []

    def post(client, *arguments, **settings):
        answers.append(plain(client, *arguments, **settings))
        return answers[-1]

    plain = httpx.Client.post
    monkeypatch.setattr(httpx.Client, "post", post)
    for client, query in ((tei(live.url, "wrong"), QUERY), (tei(full), QUERY), (tei(live.url), 7)):
        with pytest.raises(AssertionError):
            client.postprocess_nodes(nodes(), QueryBundle(query))  # which is not checked
    assert [(answer.status_code, answer.json().get("error_type")) for answer in answers] == [
        (401, None),  # before the body tells whose path this is
        (429, "Overloaded"),
        (422, "Validation"),
    ]
    assert "The API key is not known" in answers[0].text
    assert "Retry-After" in answers[1].headers


def test_jinas_client_says_what_is_wrong(live, full, jina):
    with pytest.raises(RuntimeError, match="API key is not known"):
        jina(live.url, "wrong").postprocess_nodes(nodes(), query_str=QUERY)
    with pytest.raises(RuntimeError, match="top_n: -1 is negative"):
        jina(live.url, top_n=-1).postprocess_nodes(nodes(), query_str=QUERY)
    with pytest.raises(RuntimeError, match="requests at once is reached"):
        jina(full).postprocess_nodes(nodes(), query_str=QUERY)


def test_nvidias_client_says_what_is_wrong(live, full, nim, bert):
    with pytest.raises(httpx.HTTPStatusError, match="401"):
        nim(live.url, "wrong", model=bert.name)
    with pytest.raises(httpx.HTTPStatusError, match="422"):
        nim(live.url, model=bert.name).postprocess_nodes(nodes([words(400)]), query_str=QUERY)
    with pytest.raises(httpx.HTTPStatusError, match="429"):
        nim(full, model="the-model").postprocess_nodes(nodes(), query_str=QUERY)
