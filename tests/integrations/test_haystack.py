"""Haystack: our ranker in its pipelines, and its clients of other servers against ours."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace

import cohere
import cohere.core.http_client
import httpx
import pytest
from haystack import Document, Pipeline
from haystack.utils import Secret
from haystack_integrations.components.rankers.cohere import CohereRanker
from haystack_integrations.components.rankers.huggingface_api import (
    HuggingFaceTEIRanker,
    TruncationDirection,
)
from haystack_integrations.components.rankers.jina import JinaRanker
from haystack_integrations.components.rankers.nvidia import NvidiaRanker
from helpers import READMES, ROUTER, SENTENCES, readme_code, words
from served import KEY, QUERY, counted

from echelon import AsyncReranker, EchelonWarning, InvalidInput, ModelNotFound
from echelon.integrations.haystack import EchelonRanker

ALL = len(SENTENCES)
FOUND = [Document(content=text, id=f"d{i}", score=0.5) for i, text in enumerate(SENTENCES)]
LONG = [Document(content=words(400))]
ALLOWED = ["echelon.integrations.haystack"]


def seen(answer):
    return [(int(d.id.removeprefix("d")), d.score) for d in answer["documents"]]


def expected_of(ranking, top_n=None, *, logits=False):
    return [
        (r.index, pytest.approx(r.logit if logits else r.score, abs=1e-5))
        for r in ranking.results[:top_n]
    ]


# Our ranker.


def test_a_pipeline_gives_the_librarys_ranking_also_when_it_was_saved(bert, expected):
    first = Pipeline()
    options = {"device": "cpu", "threads": 1, "allow": ("precision",)}
    first.add_component("ranker", EchelonRanker(bert, top_k=4, **options))
    second = Pipeline.loads(first.dumps(), allowed_modules=ALLOWED)
    for pipeline in (first, second):
        asked = {"query": QUERY, "documents": FOUND}
        assert seen(pipeline.run({"ranker": asked})["ranker"]) == expected_of(expected, 4)
        answer = pipeline.run({"ranker": {**asked, "top_k": 2}})["ranker"]
        assert seen(answer) == expected_of(expected, 2)
        pipeline.get_component("ranker").close()
    assert second.to_dict() == first.to_dict()
    assert all(document.score == 0.5 for document in FOUND)


def test_what_is_saved(bert, tmp_path):
    made = EchelonRanker(bert, 3, ["title"], " | ", profile=tmp_path, allow=("precision",))
    assert made.to_dict()["init_parameters"] == {
        "model": str(bert),
        "top_k": 3,
        "meta_fields_to_embed": ["title"],
        "embedding_separator": " | ",
        "profile": str(tmp_path),
        "allow": ["precision"],
    }
    assert EchelonRanker.from_dict(made.to_dict()).to_dict() == made.to_dict()


def test_order_and_scores_are_exactly_the_librarys(reranker):
    ranking = reranker.rank(QUERY, SENTENCES)
    for answer in (
        EchelonRanker(reranker).run(QUERY, FOUND),
        asyncio.run(EchelonRanker(reranker).run_async(QUERY, FOUND)),
    ):
        assert seen(answer) == [(r.index, r.score) for r in ranking.results]


def test_fields_of_meta_are_read(reranker):
    documents = [
        Document(content="plain", id="d0", meta={"year": None}),
        Document(content="text", id="d1", meta={"title": "weather", "year": 2020, "no": "x"}),
    ]
    ranker = EchelonRanker(reranker, meta_fields_to_embed=["year", "title"])
    texts = ["plain", "2020\nweather\ntext"]
    ranking = reranker.rank(QUERY, texts)
    assert seen(ranker.run(QUERY, documents)) == [(r.index, r.score) for r in ranking.results]


def test_the_model_is_loaded_once_and_freed_where_it_is_ours(bert, reranker):
    ranker = EchelonRanker(bert, device="cpu", threads=1)
    assert ranker._reranker is None
    ranker.warm_up()
    first = ranker._reranker
    ranker.warm_up()
    assert ranker._reranker is first
    ranker.close()
    with pytest.raises(InvalidInput, match="it is closed"):
        first.rank("q", ["d"])
    assert ranker.run("q", FOUND[:1])["documents"]
    ranker.close()
    shared = EchelonRanker(reranker)
    shared.warm_up()
    shared.close()
    assert reranker.rank("q", ["d"]).results


def test_an_open_async_reranker_is_shared(bert, expected):
    async def main():
        async with AsyncReranker(bert, device="cpu", threads=1) as shared:
            pipeline = Pipeline()
            pipeline.add_component("ranker", EchelonRanker(shared, top_k=3))
            asked = {"ranker": {"query": QUERY, "documents": FOUND}}
            with counted(shared) as calls:
                answer = await pipeline.run_async(asked)
            assert calls == [QUERY]
            pipeline.get_component("ranker").close()
            assert (await shared.rank("q", ["d"])).results
            return answer["ranker"]

    assert seen(asyncio.run(main())) == expected_of(expected, 3)


def test_no_documents_are_no_documents(reranker):
    assert EchelonRanker(reranker).run(QUERY, []) == {"documents": []}


def test_cut_documents_are_told_of(reranker):
    with pytest.warns(EchelonWarning, match="1 of 1 documents were cut to 130"):
        EchelonRanker(reranker).run(QUERY, LONG)


def test_what_is_wrong_is_named(reranker, tmp_path):
    with pytest.raises(InvalidInput, match="top_k: 0 is not a positive"):
        EchelonRanker("demo", 0)
    with pytest.raises(InvalidInput, match="top_k: -1 is not a positive"):
        EchelonRanker(reranker).run(QUERY, FOUND, top_k=-1)
    with pytest.raises(InvalidInput, match="devce: unknown option"):
        EchelonRanker("demo", devce="cpu")
    with pytest.raises(InvalidInput, match="device: cannot be set on a reranker"):
        EchelonRanker(reranker, device="cpu")
    with pytest.raises(InvalidInput, match=r"documents\[1\]: has no content"):
        EchelonRanker(reranker).run(QUERY, [FOUND[0], Document(content=None)])
    with pytest.raises(InvalidInput, match="model: is an open reranker, which cannot be saved"):
        EchelonRanker(reranker).to_dict()
    with pytest.raises(ModelNotFound):
        EchelonRanker(tmp_path).warm_up()


@pytest.mark.parametrize("readme", READMES)
def test_the_readmes_example(demo_folder, readme):
    names = {"documents": [Document(content=text, id=f"d{i}") for i, text in enumerate(ROUTER)]}
    exec(readme_code("integrations.haystack", readme), names)
    found = seen(names["found"]["ranker"])
    assert sorted(place for place, _ in found) == [0, 1]
    assert found[0][1] > found[1][1]
    if readme == "README.md":
        assert found[0][0] == 1
    names["pipeline"].close()


# Clients.


def tei(url, key=KEY, top_k=ALL):
    token = Secret.from_token(key)
    return HuggingFaceTEIRanker(url=url, token=token, top_k=top_k, max_retries=1)


def jina(url, key=KEY, top_k=ALL):
    base = f"{url}/v1/rerank"
    return JinaRanker(api_key=Secret.from_token(key), base_url=base, top_k=top_k)


@pytest.fixture
def slept():
    return []


@pytest.fixture
def ours(monkeypatch, slept):
    """Makes Cohere's rankers, closed at the end; how long they would sleep is in ``slept``."""
    made_up = SimpleNamespace(sleep=slept.append, time=time.time)
    monkeypatch.setattr(cohere.core.http_client, "time", made_up)
    with httpx.Client() as plain:

        def made(url, key=KEY, top_k=ALL):
            ranker = CohereRanker("m", top_k, Secret.from_token(key), url)
            ranker._cohere_client = cohere.ClientV2(key, base_url=url, httpx_client=plain)
            return ranker

        yield made


@pytest.fixture
def nim():
    """Makes NVIDIA's rankers, closed at the end."""
    rankers = []

    def made(url, key=KEY, top_k=ALL, truncate="END"):
        token = Secret.from_token(key)
        rankers.append(NvidiaRanker("m", truncate, api_url=f"{url}/v1", api_key=token, top_k=top_k))
        return rankers[-1]

    yield made
    for ranker in rankers:
        ranker.close()


@pytest.mark.parametrize("make", [tei, jina])
def test_clients_get_the_librarys_ranking(live, expected, make):
    assert seen(make(live.url).run(QUERY, FOUND)) == expected_of(expected)
    assert seen(make(live.url, top_k=2).run(QUERY, FOUND)) == expected_of(expected, 2)
    assert seen(asyncio.run(make(live.url).run_async(QUERY, FOUND))) == expected_of(expected)


def test_coheres_ranker_gets_the_librarys_ranking(live, expected, ours):
    assert seen(ours(live.url).run(QUERY, FOUND)) == expected_of(expected)
    assert seen(ours(live.url, top_k=2).run(QUERY, FOUND)) == expected_of(expected, 2)


def test_nvidias_ranker_gets_the_librarys_ranking(live, expected, nim):
    assert seen(nim(live.url).run(QUERY, FOUND)) == expected_of(expected, logits=True)
    assert seen(nim(live.url, top_k=2).run(QUERY, FOUND)) == expected_of(expected, 2, logits=True)


def test_teis_ranker_cuts_where_it_says(live, reranker):
    right, left = (
        tei(live.url).run(QUERY, LONG, truncation_direction=side)["documents"][0].score
        for side in (TruncationDirection.RIGHT, TruncationDirection.LEFT)
    )
    assert right == pytest.approx(
        reranker.rank(QUERY, [LONG[0].content]).results[0].score, abs=1e-5
    )
    assert left != right


def test_teis_ranker_says_what_is_wrong(live, full):
    with pytest.raises(RuntimeError, match=r"401.*API key is not known"):
        tei(live.url, "wrong").run(QUERY, FOUND)
    with pytest.raises(RuntimeError, match=r"413.*more than max_documents=50"):
        tei(live.url).run(QUERY, [Document(content=f"d{i}") for i in range(51)])
    client = tei(live.url)
    client.raw_scores = 3
    with pytest.raises(RuntimeError, match=r"422.*raw_scores: Expected bool"):
        client.run(QUERY, FOUND)
    with pytest.raises(RuntimeError, match=r"429.*Overloaded"):
        tei(full).run(QUERY, FOUND)


def test_jinas_ranker_says_what_is_wrong(live, full):
    with pytest.raises(RuntimeError, match="API key is not known"):
        jina(live.url, "wrong").run(QUERY, FOUND)
    with pytest.raises(RuntimeError, match="51 documents are more than max_documents=50"):
        jina(live.url).run(QUERY, [Document(content=f"d{i}") for i in range(51)])
    client = jina(live.url)
    client.model = 3
    with pytest.raises(RuntimeError, match="model: Expected str"):
        client.run(QUERY, FOUND)
    with pytest.raises(RuntimeError, match="requests at once is reached"):
        jina(full).run(QUERY, FOUND)


def test_coheres_ranker_says_what_is_wrong(live, full, ours, slept):
    with pytest.raises(cohere.UnauthorizedError):
        ours(live.url, "wrong").run(QUERY, FOUND)
    ranker = ours(live.url)
    ranker.max_tokens_per_doc = 0
    with pytest.raises(cohere.UnprocessableEntityError, match="max_tokens_per_doc: 0"):
        ranker.run(QUERY, FOUND)
    assert slept == []
    with pytest.raises(cohere.TooManyRequestsError):
        ours(full).run(QUERY, FOUND)
    assert slept
    assert all(1 <= seconds < 1.5 for seconds in slept)  # what Retry-After said


def test_nvidias_ranker_says_what_is_wrong(live, full, nim):
    with pytest.raises(ValueError, match="API key is not known"):
        nim(live.url, "wrong").run(QUERY, FOUND)
    with pytest.raises(ValueError, match=r"passages\[0\]: .*130"):
        nim(live.url, truncate="NONE").run(QUERY, LONG)
    with pytest.raises(ValueError, match="requests at once is reached"):
        nim(full).run(QUERY, FOUND)
