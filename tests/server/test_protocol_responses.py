"""Responses of each protocol: answers, and errors with their statuses; no server."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest

from echelon.errors import (
    DeadlinePassed,
    InvalidInput,
    Malformed,
    OutOfMemory,
    Overloaded,
    ScoringFailed,
    TooLarge,
    Unauthorised,
    WorkerLost,
)
from echelon.server.protocols import PROTOCOLS
from echelon.server.protocols.base import ErrorResponse, RerankResponse, RerankResult

BY_NAME = {protocol.name: protocol for protocol in PROTOCOLS}

# Answers.

RESPONSE = RerankResponse(
    request_id="abc",
    created=1700000000,
    model="m",
    results=[RerankResult(1, 0.75, 1.5), RerankResult(0, 0.25, -1.5)],
    tokens=12,
)
LONG = replace(RESPONSE, results=[RerankResult(0, 0.5, 0.0, "a")], with_documents=True)
RESULTS = [{"index": 1, "relevance_score": 0.75}, {"index": 0, "relevance_score": 0.25}]
USAGE = {"prompt_tokens": 12, "total_tokens": 12}


def meta(version, **more):
    return {
        "api_version": {"version": version},
        "billed_units": {"search_units": 1},
        "tokens": {"input_tokens": 12, "output_tokens": 0},
        **more,
    }


GOLDEN = {
    "cohere_v1": {
        "id": "abc",
        "object": "rerank",
        "created": 1700000000,
        "model": "m",
        "results": RESULTS,
        "usage": USAGE,
        "meta": meta("1"),
    },
    "cohere_v2": {"id": "abc", "results": RESULTS, "meta": meta("2")},
    "jina": {"model": "m", "object": "list", "usage": USAGE, "results": RESULTS},
    "tei": [{"index": 1, "score": 0.75}, {"index": 0, "score": 0.25}],
    "vllm_score": {
        "id": "score-abc",
        "object": "list",
        "created": 1700000000,
        "model": "m",
        "data": [
            {"index": 1, "object": "score", "score": 0.75},
            {"index": 0, "object": "score", "score": 0.25},
        ],
        "usage": USAGE,
    },
    "infinity": {
        "object": "rerank",
        "results": [
            {"relevance_score": 0.75, "index": 1, "document": None},
            {"relevance_score": 0.25, "index": 0, "document": None},
        ],
        "model": "m",
        "usage": USAGE,
        "id": "infinity-abc",
        "created": 1700000000,
    },
    "voyage": {"object": "list", "data": RESULTS, "model": "m", "usage": {"total_tokens": 12}},
    "nim": {"rankings": [{"index": 1, "logit": 1.5}, {"index": 0, "logit": -1.5}], "usage": USAGE},
}


@pytest.mark.parametrize("name", GOLDEN)
def test_answers(name):
    assert BY_NAME[name].write(RESPONSE) == GOLDEN[name]
    msgspec.json.encode(BY_NAME[name].write(RESPONSE))


def test_answers_with_documents():
    result = {"index": 0, "relevance_score": 0.5, "document": "a"}
    assert BY_NAME["cohere_v1"].write(LONG)["results"] == [result]
    assert BY_NAME["jina"].write(LONG)["results"] == [result]
    assert BY_NAME["voyage"].write(LONG)["data"] == [result]
    assert BY_NAME["infinity"].write(LONG)["results"] == [result]
    assert BY_NAME["tei"].write(LONG) == [{"index": 0, "score": 0.5, "text": "a"}]
    assert BY_NAME["cohere_v2"].write(LONG)["results"] == [{"index": 0, "relevance_score": 0.5}]
    result |= {"document": {"text": "a", "multi_modal": None}}
    answer = {"id": "rerank-abc", "model": "m", "usage": USAGE, "results": [result]}
    assert BY_NAME["vllm"].write(LONG) == answer


def test_warnings_are_where_cohere_has_them():
    warned = RerankResponse("abc", 1, "m", [], 12, warnings=("1 of 2 documents were cut.",))
    expected = meta("2", warnings=["1 of 2 documents were cut."])
    assert BY_NAME["cohere_v2"].write(warned)["meta"] == expected


# Errors.

ERRORS = {
    "invalid": InvalidInput("texts[1]", "is wrong", "Mend it."),
    "large": TooLarge("documents", "are too many", "Send fewer."),
    "malformed": Malformed("body", "is no JSON object", "Send JSON."),
    "unauthorised": Unauthorised("An API key is needed."),
    "overloaded": Overloaded("full", 2.5),
    "late": DeadlinePassed("late"),
    "failed": ScoringFailed("on fire"),
    "memory": OutOfMemory("too large"),
    "lost": WorkerLost("gone"),
}
STATUS = {
    # invalid, large, malformed, unauthorised, overloaded, late, failed, memory, lost
    "cohere_v1": (422, 413, 400, 401, 429, 504, 500, 507, 503),
    "cohere_v2": (422, 413, 400, 401, 429, 504, 500, 507, 503),
    "jina": (422, 413, 400, 401, 429, 504, 500, 507, 503),
    "tei": (422, 413, 400, 401, 429, 504, 424, 424, 503),
    "vllm": (400, 413, 400, 401, 429, 504, 500, 507, 503),
    "vllm_score": (400, 413, 400, 401, 429, 504, 500, 507, 503),
    "infinity": (422, 413, 400, 401, 429, 504, 500, 507, 503),
    "voyage": (400, 413, 400, 401, 429, 504, 500, 507, 503),
    "nim": (422, 413, 400, 401, 429, 504, 500, 507, 503),
}


def written(name, error):
    return BY_NAME[name].write_error(ErrorResponse(error, str(error), "abc"))


@pytest.mark.parametrize("name", STATUS)
def test_statuses_of_errors(name):
    assert tuple(written(name, error)[0] for error in ERRORS.values()) == STATUS[name]


def test_bodies_of_errors():
    words = "texts[1]: is wrong. Mend it."
    invalid, overloaded = ERRORS["invalid"], ERRORS["overloaded"]
    body = {"id": "abc", "message": words, "detail": words}
    assert written("cohere_v1", invalid)[1] == written("cohere_v2", invalid)[1] == body
    assert written("jina", invalid)[1] == written("voyage", invalid)[1] == {"detail": words}
    assert written("tei", invalid)[1] == {"error": words, "error_type": "Validation"}
    assert written("tei", overloaded)[1]["error_type"] == "Overloaded"
    assert written("tei", ERRORS["failed"])[1]["error_type"] == "Backend"
    assert written("tei", ERRORS["lost"])[1]["error_type"] == "Unhealthy"
    assert written("vllm", invalid)[1] == {
        "error": {"message": words, "type": "BadRequestError", "param": "texts[1]", "code": 400}
    }
    assert written("infinity", invalid)[1] == {
        "detail": [{"loc": ["body", "texts[1]"], "msg": words, "type": "value_error"}]
    }
    assert written("infinity", ERRORS["unauthorised"])[1] == {"detail": "An API key is needed."}
    error = {"message": "full. Try again in 2.5 s.", "type": "Overloaded"}
    assert written("infinity", overloaded)[1] == {"error": {**error, "param": None, "code": 429}}
    assert written("nim", invalid)[1] == {
        "object": "error",
        "message": words,
        "detail": {},
        "type": "invalid_request_error",
    }
