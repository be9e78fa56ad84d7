"""A service's answer as results, headers and warnings. Pure.

Results are sorted by logit; the sigmoid is applied to the scores that are shown, in float64, so
that scores near 1 never tie.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

import numpy as np

from echelon.server.protocols.base import RerankResult

if TYPE_CHECKING:
    from collections.abc import Sequence

    from echelon.server.protocols.base import ResponseOptions
    from echelon.types import Answer, RerankRequest

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
"""Headers of every response with results, and their meaning."""

_PLACE = re.compile(r"pairs\[(\d+)\](\.document|\.query)?")


def results_of(answer: Answer, options: ResponseOptions) -> list[RerankResult]:
    """Results: best first unless input order was asked for, at most ``top_n``."""
    logits = answer.logits.astype(np.float64)
    order = np.argsort(-logits, kind="stable") if options.ranked else np.arange(len(logits))
    order = order[: options.top_n]
    kept = logits[order]
    shown = kept if options.raw_scores else np.exp(-np.logaddexp(0.0, -kept))
    rows = zip(order.tolist(), shown.tolist(), kept.tolist(), strict=True)
    documents = options.documents
    if documents is None:
        return [RerankResult(index, score, logit) for index, score, logit in rows]
    return [RerankResult(index, score, logit, documents[index]) for index, score, logit in rows]


def explanation(answer: Answer) -> dict[str, Any]:
    """Where a request's time went and what happened to it, for the body."""
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
    """The same, shorter, for the headers of :data:`HEADERS`."""
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


def tei_headers(answer: Answer, request: RerankRequest) -> dict[str, str]:
    """Headers that TEI's clients read: whole milliseconds, characters, tokens."""
    times = answer.timings
    characters = len(request.pairs[0][0]) + sum(len(document) for _, document in request.pairs)
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
    """Warnings for the caller: truncated documents, actions of the OOM ladder, load shedding."""
    cut = int(np.count_nonzero(answer.truncated_tokens))
    warnings = []
    if cut:
        warnings.append(f"{cut} of {len(answer.logits)} documents were cut. {_remedy(answer)}")
    elif answer.fallback is not None:
        warnings.append(_remedy(answer))
    return (*warnings, *(f"{step.detail}. {step.remedy}" for step in answer.ladder))


def _remedy(answer: Answer) -> str:
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
    """``Retry-After`` in whole seconds, rounded up, at least one."""
    return str(max(1, math.ceil(seconds)))


def with_noun(message: str, noun: str) -> str:
    """Put a protocol's name for documents into a message: ``pairs[3].document`` is ``texts[3]``."""

    def renamed(found: re.Match[str]) -> str:
        return "query" if found[2] == ".query" else f"{noun}[{found[1]}]"

    return _PLACE.sub(renamed, message)


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)
