"""What clients of each dialect send, and what they get. Pure; no HTTP, no texts of its own.

Written from the client's side and without the server's code, so that it can also be pointed at the
originals, and so that a mistake of ours is not made twice.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from echelon.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Fields = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Shape:
    """One dialect.

    Attributes:
        name: as ``--dialect`` takes it.
        path: the route that its clients use.
        model: the model that they name unless told; None leaves it out.
        write: the body's fields for a query and its documents, without the model.
        results: where an answer holds its results; None: the answer is the list itself.
        score: what a result calls its score.
    """

    name: str
    path: str
    model: str | None
    write: Callable[[str, Sequence[str]], Fields]
    results: str | None
    score: str

    def body(self, query: str, documents: Sequence[str], model: str | None = None) -> bytes:
        """A request as it goes over the wire."""
        named = model or self.model
        fields = {} if named is None else {"model": named}
        return json.dumps(fields | self.write(query, documents), ensure_ascii=False).encode()

    def check(self, answer: bytes, documents: int) -> str | None:
        """What is wrong with an answer; None if it scores every document once, with a number."""
        try:
            found = json.loads(answer)
        except ValueError:
            return "the answer is no JSON"
        rows = found
        if self.results is not None:
            rows = found.get(self.results) if isinstance(found, dict) else None
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            where = f"list {self.results!r}" if self.results else "list of results"
            return f"the answer has no {where}"
        if len(rows) != documents:
            return f"{len(rows)} results for {documents} documents"
        if {_index(row) for row in rows} != set(range(documents)):
            return "the results' indices are not those of the documents"
        if not all(_is_score(row.get(self.score)) for row in rows):
            return f"a result's {self.score!r} is no finite number"
        return None


def _index(row: Fields) -> int | None:
    index = row.get("index")
    return index if type(index) is int else None


def _is_score(value: Any) -> bool:
    return type(value) in {int, float} and math.isfinite(value)


def _cohere(query: str, documents: Sequence[str]) -> Fields:
    return {"query": query, "documents": list(documents)}


def _cohere_v1(query: str, documents: Sequence[str]) -> Fields:
    return {"query": query, "documents": list(documents), "return_documents": False}


def _infinity(query: str, documents: Sequence[str]) -> Fields:
    return _cohere_v1(query, documents) | {"raw_scores": False}


def _voyage(query: str, documents: Sequence[str]) -> Fields:
    return _cohere_v1(query, documents) | {"truncation": True}


def _tei(query: str, documents: Sequence[str]) -> Fields:
    more = {"truncate": True, "raw_scores": False, "return_text": False}
    return {"query": query, "texts": list(documents), **more}


def _vllm_score(query: str, documents: Sequence[str]) -> Fields:
    return {"text_1": query, "text_2": list(documents)}


def _nim(query: str, documents: Sequence[str]) -> Fields:
    passages = [{"text": document} for document in documents]
    return {"query": {"text": query}, "passages": passages, "truncate": "END"}


_SCORE = "relevance_score"

_ALL = (
    Shape("cohere", "/v2/rerank", "rerank-v3.5", _cohere, "results", _SCORE),
    Shape("cohere-v1", "/v1/rerank", "rerank-v3.5", _cohere_v1, "results", _SCORE),
    Shape(
        "jina", "/v1/rerank", "jina-reranker-v2-base-multilingual", _cohere_v1, "results", _SCORE
    ),
    Shape("tei", "/rerank", None, _tei, None, "score"),
    Shape("vllm", "/rerank", None, _cohere, "results", _SCORE),
    Shape("vllm-score", "/score", None, _vllm_score, "data", "score"),
    Shape("infinity", "/rerank", "default/not-specified", _infinity, "results", _SCORE),
    Shape("voyage", "/v1/rerank", "rerank-2.5", _voyage, "data", _SCORE),
    Shape("nim", "/v1/ranking", "nvidia/llama-3.2-nv-rerankqa-1b-v2", _nim, "rankings", "logit"),
)

SHAPES: dict[str, Shape] = {shape.name: shape for shape in _ALL}


def shape_of(name: str) -> Shape:
    """A dialect by its name.

    Raises:
        InvalidInput: there is none of that name.
    """
    if name not in SHAPES:
        raise InvalidInput("--dialect", f"{name!r} is unknown", f"Use one of {', '.join(SHAPES)}.")
    return SHAPES[name]
