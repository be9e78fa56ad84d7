"""LangChain: our compressor against its own machinery, and its client of NIM against our server."""

from __future__ import annotations

import asyncio

import pytest
from helpers import READMES, ROUTER, SENTENCES, readme_code, words
from langchain_classic.retrievers.contextual_compression import ContextualCompressionRetriever
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import RunnableLambda
from langchain_nvidia_ai_endpoints import NVIDIARerank
from served import KEY, QUERY, counted

from echelon import AsyncReranker, EchelonWarning, InvalidInput, ModelNotFound
from echelon.integrations.langchain import EchelonReranker

FOUND = [Document(text, id=f"d{i}", metadata={"at": i}) for i, text in enumerate(SENTENCES)]


class Fixed(BaseRetriever):
    """A retriever that finds the same for everyone."""

    found: list[Document] = FOUND

    def _get_relevant_documents(self, query, *, run_manager):
        return self.found


def seen(documents, name="relevance_score"):
    """Place and score of each document, which must be what it was in all else."""
    for document in documents:
        place = document.metadata["at"]
        assert document.page_content == SENTENCES[place]
        assert document.id == f"d{place}"
        assert document.metadata.keys() == {"at", name}
    return [(document.metadata["at"], document.metadata[name]) for document in documents]


def expected_of(ranking, top_n=None, *, logits=False):
    return [
        (r.index, pytest.approx(r.logit if logits else r.score, abs=1e-5))
        for r in ranking.results[:top_n]
    ]


# Our compressor.


def test_a_retriever_with_the_compressor_gives_the_librarys_ranking(reranker, expected):
    retriever = ContextualCompressionRetriever(
        base_compressor=EchelonReranker(reranker), base_retriever=Fixed()
    )
    assert seen(retriever.invoke(QUERY)) == expected_of(expected)
    assert seen(asyncio.run(retriever.ainvoke(QUERY))) == expected_of(expected)
    assert all(document.metadata.keys() == {"at"} for document in FOUND)


def test_a_chain_of_runnables_takes_it(reranker, expected):
    compressor = EchelonReranker(reranker, top_n=3)
    chain = Fixed() | RunnableLambda(lambda found: compressor.compress_documents(found, QUERY))
    assert seen(chain.invoke(QUERY)) == expected_of(expected, 3)
    assert seen(chain.batch([QUERY, QUERY])[1]) == expected_of(expected, 3)


def test_a_models_name_and_options(bert, expected):
    compressor = EchelonReranker(str(bert), top_n=2, device="cpu", threads=1, max_length=100)
    assert compressor.reranker.options.max_length == 100
    assert seen(compressor.compress_documents(FOUND, QUERY)) == expected_of(expected, 2)
    assert compressor.model_dump() == {
        "model": str(bert),
        "top_n": 2,
        "device": "cpu",
        "threads": 1,
        "max_length": 100,
    }
    compressor.reranker.close()


def test_an_open_async_reranker_is_shared(bert, expected):
    async def main():
        async with AsyncReranker(bert, device="cpu", threads=1) as shared:
            compressor = EchelonReranker(shared)
            assert compressor.reranker is shared.reranker
            with counted(shared) as calls:
                found = await compressor.acompress_documents(FOUND, QUERY)
            assert calls == [QUERY]
            assert seen(compressor.compress_documents(FOUND, QUERY)) == expected_of(expected)
            return found

    assert seen(asyncio.run(main())) == expected_of(expected)


def test_order_and_scores_are_exactly_the_librarys(reranker):
    found = EchelonReranker(reranker).compress_documents(FOUND, QUERY)
    ranking = reranker.rank(QUERY, SENTENCES)
    assert seen(found) == [(r.index, r.score) for r in ranking.results]


def test_no_documents_are_no_documents(reranker):
    assert EchelonReranker(reranker, top_n=5).compress_documents([], QUERY) == []


def test_equal_documents_keep_their_order_and_ids(reranker):
    twins = [Document("the same", id=name) for name in "abc"]
    found = EchelonReranker(reranker).compress_documents(twins, QUERY)
    assert [document.id for document in found] == ["a", "b", "c"]


def test_cut_documents_are_told_of(reranker):
    long = [Document(words(400)), Document("short")]
    with pytest.warns(EchelonWarning, match="1 of 2 documents were cut to 130") as caught:
        EchelonReranker(reranker, top_n=1).compress_documents(long, QUERY)
    assert caught[0].filename == __file__


def test_what_is_wrong_is_named(reranker, tmp_path):
    with pytest.raises(InvalidInput, match="top_n: 0 is not a positive"):
        EchelonReranker(reranker, top_n=0)
    with pytest.raises(InvalidInput, match="devce: unknown option"):
        EchelonReranker("demo", devce="cpu")
    with pytest.raises(InvalidInput, match="device: cannot be set on a reranker that is open"):
        EchelonReranker(reranker, device="cpu")
    with pytest.raises(InvalidInput, match="query: is int, not a string"):
        EchelonReranker(reranker).compress_documents(FOUND, 3)
    with pytest.raises(ModelNotFound):
        EchelonReranker(tmp_path)


@pytest.mark.parametrize("readme", READMES)
def test_the_readmes_example(demo_folder, readme):
    names = {"vectors": Fixed(found=[Document(text) for text in ROUTER])}
    exec(readme_code("integrations.langchain", readme), names)
    found = names["documents"]
    assert {document.page_content for document in found} == set(ROUTER)
    scores = [document.metadata["relevance_score"] for document in found]
    assert scores == sorted(scores, reverse=True)
    if readme == "README.md":
        assert found[0].page_content == ROUTER[1]
    names["retriever"].base_compressor.reranker.close()


# NVIDIA's client, which asks as NIM's users do.


def nim(url, **settings):
    return NVIDIARerank(base_url=f"{url}/v1", model="m", **settings)


def test_nvidias_client_gets_the_librarys_ranking(live, expected):
    client = nim(live.url, api_key=KEY, top_n=len(SENTENCES), truncate="END")
    logits = expected_of(expected, logits=True)
    assert seen(client.compress_documents(FOUND, QUERY)) == logits
    assert seen(asyncio.run(client.acompress_documents(FOUND, QUERY))) == logits
    assert seen(nim(live.url, api_key=KEY, top_n=2).compress_documents(FOUND, QUERY)) == logits[:2]


def test_nvidias_client_joins_batches_by_logit(live, expected):
    client = nim(live.url, api_key=KEY, top_n=len(SENTENCES), max_batch_size=3)
    found = client.compress_documents(FOUND, QUERY)
    assert [document.metadata["at"] for document in found] == [r.index for r in expected.results]


def test_nvidias_client_takes_the_model_that_is_served(live, bert):
    with pytest.warns(UserWarning, match=f"Default model is set as: {bert.name}"):
        client = NVIDIARerank(base_url=f"{live.url}/v1", api_key=KEY)
    assert client.model == bert.name


def test_nvidias_client_says_what_is_wrong(live, full):
    with pytest.raises(Exception, match=r"\[401\] The API key is not known"):
        nim(live.url, api_key="wrong").compress_documents(FOUND, QUERY)
    long = [Document(words(400))]
    with pytest.raises(Exception, match=r"\[422\] passages\[0\]: .*130"):
        nim(live.url, api_key=KEY).compress_documents(long, QUERY)
    with pytest.raises(Exception, match=r"\[429\] the limit of \d+ requests"):
        nim(full, api_key=KEY).compress_documents(FOUND, QUERY)
