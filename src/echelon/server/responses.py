"""A service's answer as results, headers and an explanation (pure).

Results are sorted by logit; the sigmoid is applied to what is shown, in float64, so that scores
near 1 never tie.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

import numpy as np

from echelon.server.protocols.base import RerankResult

if TYPE_CHECKING:
    from collections.abc import Sequence

    from echelon.server.protocols.base import RerankRequest
    from echelon.types import Answer

HEADERS = {
    "X-Echelon-Queue-Ms": "milliseconds in the queue",
    "X-Echelon-Tokenise-Ms": "milliseconds of tokenising",
    "X-Echelon-Compute-Ms": "milliseconds of the steps that held its pairs",
    "X-Echelon-Total-Ms": "milliseconds from its arrival at the service to the answer",
    "X-Echelon-Tokens": "tokens that the model saw",
    "X-Echelon-Truncated-Documents": "documents that lost tokens",
    "X-Echelon-Batch-Size": "pairs of the largest step that held pairs of it",
    "X-Echelon-Ladder": "memory-ladder steps that it went through, separated by commas",
    "X-Echelon-Fallback": "max_length=N where the queue was so long that pairs were cut to N "
    "tokens, as configured for low priority; else empty",
}
"""Headers of every answer with results, and what they say."""

_PLACE = re.compile(r"pairs\[(\d+)\](\.document|\.query)?")


def hits_of(answer: Answer, wanted: RerankRequest) -> list[RerankResult]:
    """Results as they go out: best first unless input order was asked for, at most ``top_n``."""
    logits = answer.logits.astype(np.float64)
    order = np.argsort(-logits, kind="stable") if wanted.ranked else np.arange(len(logits))
    order = order[: wanted.top_n]
    kept = logits[order]
    shown = kept if wanted.raw else np.exp(-np.logaddexp(0.0, -kept))
    rows = zip(order.tolist(), shown.tolist(), kept.tolist(), strict=True)
    documents = wanted.documents
    if documents is None:
        return [RerankResult(index, score, logit) for index, score, logit in rows]
    return [RerankResult(index, score, logit, documents[index]) for index, score, logit in rows]


def explanation(answer: Answer) -> dict[str, Any]:
    """What happened to a request, for its body."""
    times = answer.timings
    return {
        "queue_ms": _ms(times.queue_s),
        "tokenise_ms": _ms(times.tokenise_s),
        "compute_ms": _ms(times.compute_s),
        "total_ms": _ms(times.total_s),
        "tokens": answer.tokens,
        "cost_tokens": answer.cost_tokens,
        "truncated_documents": int(np.count_nonzero(answer.truncated_tokens)),
        "truncated_tokens": answer.truncated_tokens.tolist(),
        "batch_sizes": list(answer.batch_sizes),
        "ladder": [{"rung": s.rung, "detail": s.detail, "remedy": s.remedy} for s in answer.ladder],
        "fallback": None if answer.fallback is None else {"max_length": answer.fallback},
    }


def headers_of(answer: Answer) -> dict[str, str]:
    """What happened to a request, for its headers, in the order of :data:`HEADERS`."""
    times = answer.timings
    values: Sequence[object] = (
        _ms(times.queue_s),
        _ms(times.tokenise_s),
        _ms(times.compute_s),
        _ms(times.total_s),
        answer.tokens,
        int(np.count_nonzero(answer.truncated_tokens)),
        max(answer.batch_sizes, default=0),
        ",".join(step.rung for step in answer.ladder),
        "" if answer.fallback is None else f"max_length={answer.fallback}",
    )
    return {name: str(value) for name, value in zip(HEADERS, values, strict=True)}


def tei_headers(answer: Answer, wanted: RerankRequest) -> dict[str, str]:
    """What TEI's clients read: whole milliseconds, characters, tokens."""
    times = answer.timings
    characters = len(wanted.pairs[0][0]) + sum(len(document) for _, document in wanted.pairs)
    return {
        "x-compute-type": "echelon",
        "x-compute-characters": str(characters),
        "x-compute-tokens": str(answer.tokens),
        "x-compute-time": str(round(times.total_s * 1000)),
        "x-total-time": str(round(times.total_s * 1000)),
        "x-tokenization-time": str(round(times.tokenise_s * 1000)),
        "x-queue-time": str(round(times.queue_s * 1000)),
        "x-inference-time": str(round(times.compute_s * 1000)),
    }


def warnings_of(answer: Answer) -> tuple[str, ...]:
    """What the caller should know: cut documents, memory-ladder steps, falling back."""
    cut = int(np.count_nonzero(answer.truncated_tokens))
    words = []
    if cut:
        words.append(f"{cut} of {len(answer.logits)} documents were cut. {_remedy(answer)}")
    elif answer.fallback is not None:
        words.append(_remedy(answer))
    return (*words, *(f"{step.detail}. {step.remedy}" for step in answer.ladder))


def _remedy(answer: Answer) -> str:
    """What to do so that documents are read whole."""
    if answer.fallback is None:
        return (
            "Ask for max_tokens_per_doc to have them read in chunks, or serve with a larger "
            "max_length."
        )
    return (
        "The queue was long, so this request of low priority was read with "
        f"max_length={answer.fallback}. Ask again later, or with normal priority."
    )


def retry_after(seconds: float) -> str:
    """``Retry-After`` in whole seconds, never earlier than the truth and at least one."""
    return str(max(1, math.ceil(seconds)))


def in_callers_words(words: str, noun: str) -> str:
    """A message with the caller's names for pairs: ``pairs[3].document`` is ``texts[3]``."""

    def renamed(found: re.Match[str]) -> str:
        return "query" if found[2] == ".query" else f"{noun}[{found[1]}]"

    return _PLACE.sub(renamed, words)


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)
