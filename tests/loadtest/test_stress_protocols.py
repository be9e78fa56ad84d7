"""What is sent and accepted in each protocol: read by Echelon's own server, and checked closely."""

from __future__ import annotations

import asyncio
import contextlib
import json

import numpy as np
import pytest
import uvicorn
from hypothesis import given
from hypothesis import strategies as st
from services import service
from stand_in_reranker import TOPICS, good, plan_of, run

from echelon.data import Topic, load_texts
from echelon.errors import InvalidInput
from echelon.loadtest.client import CLIENT_PROTOCOLS, protocol_of, route_of
from echelon.loadtest.run import opened
from echelon.loadtest.texts import TOKENS_OF_MARKS, TextSource, TokenLengths, of_words
from echelon.server.app import make_app
from echelon.server.context import ServerContext
from echelon.server.metrics import Metrics
from echelon.server.protocols import PATHS, PROTOCOLS, choose
from echelon.simulation.workload import Arrival, FixedSize, UniformSize
from echelon.tokenization.tokenizer import PairEncoder

SPOKEN = {name: name.replace("-", "_").replace("cohere", "cohere_v2") for name in CLIENT_PROTOCOLS}
SPOKEN["cohere-v1"] = "cohere_v1"


@contextlib.asynccontextmanager
async def real_server():
    """Echelon's application on a socket, with the scorer that has no weights."""
    metrics = Metrics()
    made = service(listener=metrics)

    async def launch():
        await made.start()
        return made

    house = ServerContext(launch, "the-model", metrics, None)
    await house.open()
    config = uvicorn.Config(make_app(house), port=0, lifespan="off", log_config=None)
    server = uvicorn.Server(config)
    # Its own signal handlers belong to a process, not to a test.
    serving = asyncio.create_task(server._serve())
    while not server.started:  # noqa: ASYNC110 - it has no event
        await asyncio.sleep(0.005)
    try:
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}", metrics
    finally:
        server.should_exit = True
        await serving
        await house.close()


def test_echelon_answers_every_protocol_and_knows_it_by_its_body():
    async def main():
        async with real_server() as (url, metrics):
            for name in CLIENT_PROTOCOLS:
                plan = plan_of(url, dialect=name, rate=40.0, documents=UniformSize(1, 5))
                async with opened(plan) as tester:
                    summary = (await tester.measure()).summary
                assert summary.requests > 0, name
                assert summary.failures == 0, (name, summary.problems)
            return metrics.text().decode()

    metrics = run(main())
    for dialect in SPOKEN.values():
        assert f'dialect="{dialect}",status="200"' in metrics


def test_every_protocol_of_the_server_is_spoken():
    assert set(SPOKEN.values()) == {protocol.name for protocol in PROTOCOLS}


@pytest.mark.parametrize("name", CLIENT_PROTOCOLS)
def test_bodies_differ_on_shared_paths(name):
    protocol = CLIENT_PROTOCOLS[name]
    body = protocol.body("how?", ["a", "b"])
    assert choose(PATHS[protocol.path], body).name == SPOKEN[name]
    assert b'"model": "mine"' in protocol.body("how?", ["a"], "mine")


@pytest.mark.parametrize("name", CLIENT_PROTOCOLS)
def test_an_answer_must_score_every_document_once_with_a_number(name):
    protocol = CLIENT_PROTOCOLS[name]
    body = json.loads(protocol.body("q", ["a", "b", "c"]))

    def checked(change):
        answer = good(body, name)
        rows = answer if protocol.results is None else answer[protocol.results]
        change(rows)
        return protocol.check(json.dumps(answer).encode(), 3)

    assert checked(lambda rows: None) is None
    assert checked(lambda rows: rows.reverse()) is None
    assert checked(lambda rows: rows.pop()) == "2 results for 3 documents"
    assert "indices" in checked(lambda rows: rows[0].update(index=2))
    assert "indices" in checked(lambda rows: rows[1].update(index=True))
    assert "indices" in checked(lambda rows: rows[0].pop("index"))
    for score in (None, "0.5", float("nan"), float("inf"), True):
        assert "not a finite number" in checked(
            lambda rows, s=score: rows[1].update({protocol.score: s})
        )
    assert "no list" in protocol.check(b'"text"', 3)
    assert "no list" in protocol.check(b'{"other": []}', 3)
    assert protocol.check(b"<html>", 3) == "the answer is not JSON"


def test_the_error_for_an_unknown_protocol_names_the_known_ones():
    with pytest.raises(InvalidInput, match="cohere, cohere-v1, jina"):
        protocol_of("klingon")


@pytest.mark.parametrize(
    ("url", "path", "route"),
    [
        ("http://h:1", None, "http://h:1/v2/rerank"),
        ("http://h:1/", None, "http://h:1/v2/rerank"),
        ("https://h/gate", None, "https://h/gate/v2/rerank"),
        ("http://h/cohere/v2/rerank", None, "http://h/cohere/v2/rerank"),
        ("http://[::1]:80", "my/route", "http://[::1]:80/my/route"),
    ],
)
def test_routes(url, path, route):
    assert route_of(url, CLIENT_PROTOCOLS["cohere"], path) == route


@pytest.mark.parametrize("url", ["h:1", "ftp://h", "http://", "http://h:x", "http://h?a=b", ""])
def test_what_is_no_address_is_refused(url):
    with pytest.raises(InvalidInput) as raised:
        route_of(url, CLIENT_PROTOCOLS["cohere"])
    assert raised.value.field == "URL"


@pytest.mark.parametrize("port", [80, 99999])
def test_a_password_in_an_address_is_refused_and_not_repeated(port):
    with pytest.raises(InvalidInput, match="holds a name or password") as caught:
        route_of(f"http://me:s3cret@localhost:{port}", CLIENT_PROTOCOLS["cohere"])
    assert "s3cret" not in str(caught.value)


# Texts.


def test_no_two_requests_share_a_query_or_a_document_unless_asked_to():
    texts = TextSource(TOPICS)
    asked = [texts.request(Arrival(0.0, 7)) for _ in range(50)]
    again = TextSource(TOPICS).request(Arrival(0.0, 7))
    documents = [text for _, texts in [*asked, again] for text in texts]
    assert len(set(documents)) == len(documents)
    assert len({query for query, _ in [*asked, again]}) == 51
    plain = TextSource(TOPICS, marked=False).request(Arrival(0.0, 7))
    assert set(plain[1]) == {"a b c", "d e f g", "h i"}


def test_a_request_has_its_querys_own_documents_first_and_the_seed_decides():
    drawn = [
        [TextSource(TOPICS, seed=s, marked=False).request(Arrival(0, n)) for n in (1, 2)]
        for s in (3, 3, 4, 5, 6)
    ]
    assert drawn[0] == drawn[1]
    for requests in drawn:
        for query, documents in requests:
            own = {"one query": ("a b c", "d e f g"), "another": ("h i", "a b c")}[query]
            assert tuple(documents) == own[: len(documents)]
    assert len({query for requests in drawn for query, _ in requests}) == 2


@given(st.text(), st.integers(1, 300))
def test_texts_have_as_many_words_as_asked(text, words):
    cut = of_words(text, words)
    again = of_words(cut, words)
    assert cut
    assert again == cut


@pytest.mark.parametrize(
    ("text", "words", "cut"),
    [
        ("one two  three", 2, "one two"),
        ("one two", 5, "one two one two one"),
        ("重排器很快", 3, "重排器"),
        ("重排 is fast", 3, "重排 is"),
        ("", 2, "word word"),
    ],
)
def test_words_are_words_in_any_script(text, words, cut):
    assert of_words(text, words) == cut


@pytest.mark.parametrize("tokens", [40, 120, 300])
def test_lengths_in_tokens_are_met_about(demo_folder, tokens):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(demo_folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    texts = TextSource(load_texts(None, "en").topics, salt="3f2a")
    lengths = tuple(FixedSize(tokens).draw(None, 10))
    pairs = [texts.request(Arrival(0, 10, lengths)) for _ in range(10)]
    found = [len(tokenizer.encode(query, text).ids) for query, texts in pairs for text in texts]
    assert sum(found) / len(found) == pytest.approx(tokens, rel=0.15)
    assert TOKENS_OF_MARKS < 40


@pytest.mark.parametrize("marked", [True, False])
def test_with_the_tokenizer_lengths_are_met_exactly(demo_folder, marked):
    encoder = PairEncoder(demo_folder)
    topics = [*load_texts(None, "en").topics, Topic("what", ("", "one", "two words"))]
    length_policy = TokenLengths(encoder.ends, encoder.template.specials)
    texts = TextSource(topics, marked=marked, length_policy=length_policy)
    lengths = tuple(UniformSize(30, 400).draw(np.random.default_rng(0), 20))
    for _ in range(30):
        query, documents = texts.request(Arrival(0, 20, lengths))
        pairs = [(query, document) for document in documents]
        found = encoder.encode(pairs, 512, "longest_first").lengths
        # A word that is cut in two may be as many tokens more or fewer.
        assert np.abs(found - lengths).max() <= 3
        assert np.mean(found) == pytest.approx(np.mean(lengths), rel=0.01)
        assert all(documents)
