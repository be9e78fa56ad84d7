"""Load shedding in a service: low priority is read shorter, reported, counted, and ended."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from dataclasses import replace
from functools import partial

import pytest
from scorers import Held
from served import metric, run_app
from services import LetterEncoder, RecordingListener, run, scores, service, submit, texts, until

from echelon.engine.admission_pipeline import AdmissionPipeline
from echelon.engine.events import ServiceSettings
from echelon.errors import InvalidInput
from echelon.models.base import FakeScorer
from echelon.scheduling.admission import QUIET_S, AdmissionLimits
from echelon.server.limits import ServerLimits
from echelon.server.protocols import PROTOCOLS, read
from echelon.server.protocols.base import RequestTexts
from echelon.types import Chunking, monotonic

SHORT = 30
LONG = [("query", f"{i}" + "d" * 100) for i in range(3)]
LOST = 101 + 5 + 3 - SHORT


class Clock:
    """The real time, and what a test adds to it."""

    def __init__(self):
        self.added = 0.0

    def __call__(self):
        return monotonic() + self.added


@pytest.fixture
def hold(tmp_path):
    return tmp_path / "hold"


@contextlib.asynccontextmanager
async def pressed(made, hold):
    """A service whose only worker scores nothing for the time being, with a step under way."""
    hold.touch()
    waiting = asyncio.create_task(submit(made, texts(0)))
    try:
        await until(lambda: made.snapshot().load.running_s)
        yield
    finally:
        hold.unlink(missing_ok=True)
        await waiting


def made_for(hold, **settings):
    """Any work at all is more than half of the goal, which is a microsecond."""
    settings = {"fallback_max_length": SHORT, "goal_s": 1e-6, **settings}
    return service(partial(Held, str(hold.parent)), **settings)


def cut_scores(pairs):
    encoded = LetterEncoder().encode(pairs, SHORT, "longest_first")
    return [FakeScorer().score(encoded.batch([i]))[0] for i in range(len(pairs))]


async def asked(made, hold, *each, pairs=LONG):
    """Answers to requests that all came while nothing was scored."""
    async with pressed(made, hold):
        asking = [asyncio.create_task(submit(made, pairs, **fields)) for fields in each]
        await until(lambda: made.snapshot().load.requests == 1 + len(each))
        hold.unlink()
        return await asyncio.gather(*asking)


def test_only_low_priority_is_cut_and_that_is_reported(hold, caplog):
    caplog.set_level(logging.INFO, "echelon")
    listener, clock = RecordingListener(), Clock()

    async def main(made):
        assert not made.snapshot().fallback
        assert (await submit(made, LONG, priority="low")).fallback is None
        each = [{"priority": priority} for priority in ("low", "normal", "high", "low")]
        first, *others, last = await asked(made, hold, *each)
        for low in (first, last):
            assert low.fallback == SHORT
            assert low.truncated_tokens.tolist() == [LOST] * 3
            assert low.logits.tolist() == cut_scores(LONG)
            assert low.tokens == 3 * SHORT
        for other in others:
            assert other.fallback is None
            assert other.truncated_tokens.tolist() == [0] * 3
            assert other.logits.tolist() == scores(LONG)
        assert made.snapshot().fallback
        clock.added += QUIET_S
        assert not made.snapshot().fallback
        again = await submit(made, LONG, priority="low")
        assert again.fallback is None
        assert again.logits.tolist() == scores(LONG)

    run(main, made_for(hold, listener=listener, clock=clock))
    ended = listener.of("RequestEnded")
    assert [event.fallback for event in ended].count(SHORT) == 2
    assert sum(event.truncated_documents for event in ended) == 6
    lines = [
        r.getMessage() for r in caplog.records if r.name == "echelon.engine.admission_pipeline"
    ]
    assert len(lines) == 2
    assert (
        f"the goal is 1e-06 s: requests of low priority are read with max_length={SHORT}"
        in lines[0]
    )
    assert "in full again" in lines[1]


@pytest.mark.parametrize(
    "settings",
    [
        {"fallback_max_length": None},
        {"goal_s": 3600.0},
        {"goal_s": None, "bounds": AdmissionLimits(max_wait_s=3600.0)},
    ],
)
def test_not_without_configuration_and_not_without_pressure(hold, settings):
    async def main(made):
        (answer,) = await asked(made, hold, {"priority": "low"})
        assert answer.fallback is None
        assert answer.logits.tolist() == scores(LONG)
        assert not made.snapshot().fallback

    run(main, made_for(hold, **settings))


@pytest.mark.parametrize("goal_s", [None, 4.0])
def test_the_goal_is_the_latency_goal_or_else_the_longest_wait(goal_s):
    settings = ServiceSettings(
        fallback_max_length=64, goal_s=goal_s, bounds=AdmissionLimits(max_wait_s=10.0)
    )
    shedding = AdmissionPipeline(None, settings, None, None).shedding
    assert (shedding.goal_s, shedding.max_length) == (goal_s or 10.0, 64)


@pytest.mark.parametrize(
    "asked_fields",
    [
        {"refuse_truncation": True},
        {"max_length": SHORT},
        {"max_length": SHORT - 9},
    ],
)
def test_requests_for_all_or_for_less_are_not_cut(hold, asked_fields):
    async def main(made):
        expected = await submit(made, LONG, **asked_fields)
        (answer,) = await asked(made, hold, {"priority": "low", **asked_fields})
        assert answer.fallback is None
        assert answer.logits.tolist() == expected.logits.tolist()
        assert answer.truncated_tokens.tolist() == expected.truncated_tokens.tolist()

    run(main, made_for(hold))


def test_load_shedding_refuses_no_request_whose_query_must_stay_whole(hold):
    pairs = [("q" * 40, "d" * 100), ("q", "d" * 100)]

    async def main(made):
        for chunking in (None, Chunking()):
            low = {"priority": "low", "chunking": chunking}
            (answer,) = await asked(made, hold, low, pairs=pairs)
            assert answer.fallback is None
            assert answer.truncated_tokens.tolist() == [0, 0]

    run(main, made_for(hold, truncation="only_second"))


@pytest.mark.parametrize("max_tokens", [None, 10])
def test_of_documents_in_chunks_the_first_is_read(hold, max_tokens):
    how = Chunking(max_tokens=max_tokens)

    async def main(made):
        first = replace(how, max_chunks=1)
        expected = await submit(made, LONG, max_length=SHORT, chunking=first)
        (answer,) = await asked(made, hold, {"priority": "low", "chunking": how})
        assert answer.fallback == SHORT
        assert answer.logits.tolist() == expected.logits.tolist()
        assert answer.truncated_tokens.tolist() == [91 if max_tokens else LOST] * 3
        (answer,) = await asked(made, hold, {"priority": "normal", "chunking": how})
        assert answer.truncated_tokens.tolist() == [91 if max_tokens else 0] * 3

    run(main, made_for(hold))


def test_the_side_to_cut_at(hold):
    async def main(made):
        expected = await submit(made, LONG, side="left", max_length=SHORT)
        (answer,) = await asked(made, hold, {"priority": "low", "side": "left"})
        assert answer.fallback == SHORT
        assert answer.logits.tolist() == expected.logits.tolist()
        assert answer.truncated_tokens.tolist() == [LOST] * 3

    run(main, made_for(hold))


@pytest.mark.parametrize("asked_for", [3, 60, 512])
def test_an_invalid_fallback_is_refused_at_the_start(asked_for):
    made = service(max_length=60, fallback_max_length=asked_for)
    with pytest.raises(InvalidInput, match=r"fallback_max_length: .* Use 4 to 59, or leave it out"):
        run(lambda _: None, made)


# Over HTTP.


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=lambda d: d.name)
def test_priorities_are_names_or_numbers(protocol):
    def priority(value):
        body = json.dumps({**protocol.example, "priority": value}).encode()
        texts = RequestTexts(ServerLimits(), lambda _: None)
        return read(protocol, body, {}, 0.0, texts)[0].priority

    names = {None: "normal", "low": "low", "Normal": "normal", "high": "high"}
    for given, meant in (names | {0: "normal", 5: "low", -1: "high"}).items():
        assert priority(given) == meant
    with pytest.raises(InvalidInput, match=r"priority: 'soon' is unknown\. Use low, normal or"):
        priority("soon")


def test_every_protocol_takes_a_priority_and_reports_the_fallback(hold, caplog):
    caplog.set_level(logging.INFO, "echelon")

    async def main(client, server):
        made = server.service
        async with pressed(made, hold):
            posts = []
            for protocol in PROTOCOLS:
                path = protocol.own_paths[0]
                example = {**protocol.example, "explain": True}
                low, header = {**example, "priority": "low"}, {"X-Request-Priority": "LOW"}
                posts += [
                    client.post(path, json=example),
                    client.post(path, json=low),
                    client.post(path, json=example, headers=header),
                    client.post(path, json={**example, "priority": 0}, headers=header),
                ]
            asking = [asyncio.create_task(post) for post in posts]
            await until(lambda: made.snapshot().load.requests == 1 + len(posts))
            caplog.clear()
            board = (await client.get("/dashboard/data")).json()
            assert board["now"]["fallback"] is True
            assert metric(server, "echelon_fallback_on") == 1
            hold.unlink()
            answers = await asyncio.gather(*asking)
        flags = [answer.headers["X-Echelon-Fallback"] for answer in answers]
        assert {answer.status_code for answer in answers} == {200}
        assert flags == ["", f"max_length={SHORT}", f"max_length={SHORT}", ""] * len(PROTOCOLS)
        for answer in answers:
            flag = answer.headers["X-Echelon-Fallback"]
            assert (answer.headers["X-Echelon-Truncated-Documents"] != "0") is bool(flag)
            if isinstance(answer.json(), dict):
                expected = {"max_length": SHORT} if flag else None
                assert answer.json()["echelon"]["fallback"] == expected
        (warned,) = answers[1].json()["meta"]["warnings"]
        assert warned == (
            "2 of 2 documents were cut. The queue was long, so this request of low priority was "
            f"read with max_length={SHORT}. Ask again later, or with normal priority."
        )
        assert "warnings" not in answers[0].json()["meta"]
        assert metric(server, "echelon_fallback_requests_total") == 2 * len(PROTOCOLS)
        logged = [
            r.fields.get("fallback") for r in caplog.records if r.name == "echelon.server.routes"
        ]
        assert logged.count({"max_length": SHORT}) == 2 * len(PROTOCOLS)
        assert logged.count(None) == 2 * len(PROTOCOLS)

    run_app(main, opener=partial(Held, str(hold.parent)), fallback_max_length=SHORT, goal_s=1e-6)


def test_an_unknown_priority_is_refused():
    async def main(client, server):
        body = {"query": "q", "documents": ["d"]}
        headers = {"X-Request-Priority": "soon"}
        refused = await client.post("/v1/rerank", json=body, headers=headers)
        assert refused.status_code == 422
        assert refused.json()["message"] == (
            "X-Request-Priority: 'soon' is unknown. Use low, normal or high."
        )
        first = await client.post("/v1/rerank", json=body)
        assert first.headers["X-Echelon-Fallback"] == ""

    run_app(main)
