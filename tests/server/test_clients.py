"""Clients of no framework against our server, and requests of those that cannot be installed here.

A package whose pins contradict requirements.lock is not installed. What it sends was recorded once,
from the version named, run in an environment of its own against this server; it is sent again as it
was, and the answer must hold what that version reads.
"""

from __future__ import annotations

import asyncio

import cohere
import httpx
import pytest
import requests
import voyageai
from helpers import SENTENCES, words
from served import KEY, QUERY
from voyageai.error import AuthenticationError, InvalidRequestError, RateLimitError

NO_RETRY = {"max_retries": 0}


def pairs_of(ranking, top_n=None, *, logits=False):
    return [
        (r.index, pytest.approx(r.logit if logits else r.score, abs=1e-5))
        for r in ranking.results[:top_n]
    ]


# Cohere's asynchronous clients; test_serve_command.py has the others.


async def ask_cohere(kind, url, key=KEY, **asked):
    asked = {"model": "m", "query": QUERY, "documents": list(SENTENCES), **asked}
    async with httpx.AsyncClient() as plain:
        client = kind(key, base_url=url, httpx_client=plain)
        response = await client.rerank(**asked, request_options=NO_RETRY)
    return [(result.index, result.relevance_score) for result in response.results]


@pytest.mark.parametrize("kind", [cohere.AsyncClient, cohere.AsyncClientV2])
def test_coheres_asynchronous_client(live, full, expected, kind):
    def ask(*arguments, **settings):
        return asyncio.run(ask_cohere(kind, *arguments, **settings))

    assert ask(live.url) == pairs_of(expected)
    assert ask(live.url, top_n=2) == pairs_of(expected, 2)
    with pytest.raises(cohere.UnauthorizedError, match="API key is not known"):
        ask(live.url, "wrong")
    with pytest.raises(cohere.UnprocessableEntityError, match="top_n: -1 is negative"):
        ask(live.url, top_n=-1)
    with pytest.raises(cohere.TooManyRequestsError, match="requests at once is reached") as caught:
        ask(full)
    assert int(caught.value.headers["retry-after"]) >= 1


# Voyage's own client.


@pytest.fixture(scope="module")
def voyage():
    with requests.Session() as session, pytest.MonkeyPatch.context() as patch:
        patch.setattr(voyageai, "requestssession", session)
        yield lambda url, key=KEY: voyageai.Client(key, max_retries=1, base_url=f"{url}/v1")


def test_voyages_client_gets_the_librarys_ranking(live, voyage, expected):
    for top_k in (None, 2):
        found = voyage(live.url).rerank(QUERY, list(SENTENCES), "rerank-2.5", top_k)
        assert [(r.index, r.relevance_score) for r in found.results] == pairs_of(expected, top_k)
        assert [r.document for r in found.results] == [r.document for r in expected.results[:top_k]]
        assert found.total_tokens == expected.report.tokens


def test_voyages_client_raises_its_own_errors(live, full, voyage):
    with pytest.raises(AuthenticationError, match="API key is not known"):
        voyage(live.url, "wrong").rerank(QUERY, ["a"], "m")
    with pytest.raises(InvalidRequestError, match="top_k: -1 is negative"):
        voyage(live.url).rerank(QUERY, ["a"], "m", -1)
    with pytest.raises(InvalidRequestError, match=r"documents\[0\]: .*130"):
        voyage(live.url).rerank(QUERY, [words(400)], "m", truncation=False)
    with pytest.raises(RateLimitError, match="requests at once is reached"):
        voyage(full).rerank(QUERY, ["a"], "m")


# Recorded requests.

DOCUMENTS = list(SENTENCES)
RECORDED = {
    # langchain-cohere 0.6.0, CohereRerank(model="m", top_n=2): needs cohere before 6
    "langchain-cohere": (
        "/v2/rerank",
        {
            "model": "m",
            "query": QUERY,
            "documents": DOCUMENTS,
            "top_n": 2,
            "max_tokens_per_doc": None,
        },
    ),
    # llama-index-postprocessor-cohere-rerank 0.10.0, CohereRerank(top_n=2): needs cohere before 6
    "llama-index-cohere": (
        "/v2/rerank",
        {"model": "m", "query": QUERY, "documents": DOCUMENTS, "top_n": 2},
    ),
    # infinity_client 0.0.78, RerankInput(top_n=2): needs httpx before 0.28
    "infinity_client": (
        "/rerank",
        {
            "query": QUERY,
            "documents": DOCUMENTS,
            "return_documents": False,
            "raw_scores": False,
            "model": "default/not-specified",
            "top_n": 2,
        },
    ),
    # vLLM has no client of its own; people ask with curl or requests
    "vllm": ("/vllm/v1/rerank", {"model": "m", "query": QUERY, "documents": DOCUMENTS, "top_n": 2}),
}


def send(url, name, key=KEY, **changes):
    path, body = RECORDED[name]
    headers = {"Authorization": f"Bearer {key}"}
    return httpx.post(f"{url}{path}", json={**body, **changes}, headers=headers)


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_requests_get_the_librarys_ranking(live, expected, name):
    answer = send(live.url, name).json()
    assert [(r["index"], r["relevance_score"]) for r in answer["results"]] == pairs_of(expected, 2)


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_requests_get_errors_of_their_kind(live, full, name):
    assert send(live.url, name, "wrong").status_code == 401
    assert send(live.url, name, top_n=-1).status_code == (400 if name == "vllm" else 422)
    refused = send(full, name)
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) >= 1


def test_infinitys_client_finds_the_fields_that_it_parses(live, expected):
    found = send(live.url, "infinity_client", return_documents=True, raw_scores=True).json()
    assert found["object"] == "rerank"
    assert found["usage"].keys() == {"prompt_tokens", "total_tokens"}
    assert [(r["index"], r["relevance_score"]) for r in found["results"]] == pairs_of(
        expected, 2, logits=True
    )
    assert [r["document"] for r in found["results"]] == [r.document for r in expected.results[:2]]
    (detail,) = send(live.url, "infinity_client", documents=[]).json()["detail"]
    assert detail == {
        "loc": ["body", "documents"],
        "msg": "documents: is empty. Send at least one text.",
        "type": "value_error",
    }


def test_vllms_paths_score_as_the_library_does(live, reranker):
    asked = {"model": "m", "text_1": QUERY, "text_2": DOCUMENTS, "use_activation": False}
    headers = {"Authorization": f"Bearer {KEY}"}
    answer = httpx.post(f"{live.url}/score", json=asked, headers=headers).json()
    logits = reranker.score([(QUERY, document) for document in DOCUMENTS])
    assert [d["score"] for d in answer["data"]] == pytest.approx(logits.tolist(), abs=1e-5)
    bad = httpx.post(f"{live.url}/score", json={**asked, "text_2": []}, headers=headers)
    assert (bad.status_code, bad.json()["error"]["type"]) == (400, "BadRequestError")
