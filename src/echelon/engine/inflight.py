"""One request of a service from joining the queue to its answer, and the errors it may end with.

Pure, except that :func:`resolve` carries results from threads to the event loop.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from echelon.engine.events import RequestEnded
from echelon.engine.score_cache import DocumentScores
from echelon.errors import InvalidInput, NonFiniteScore, OutOfMemory, ScoringFailed, WorkerLost
from echelon.types import Answer, LadderStep, Timings

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from echelon.engine.events import Outcome
    from echelon.engine.score_cache import CachedScores
    from echelon.errors import EchelonError
    from echelon.scheduling.queue import FailedRequest, PlannedStep
    from echelon.tokenization.pairs import ChunkMap, EncodedPairs, TruncationImpossible
    from echelon.types import FloatArray, Priority


@dataclass(slots=True)
class InflightRequest:
    """A request that is queued or being scored; the dispatcher changes it under its lock."""

    number: int  # never used twice
    pairs: EncodedPairs
    # called once, from any thread, with the answer or the error
    done: Callable[[Answer | EchelonError], None]
    arrived: float  # when the caller came
    tokenise_s: float = 0.0
    deadline: float | None = None  # when the answer is due; None means never
    priority: Priority = "normal"
    chunk_map: ChunkMap | None = None  # where its pairs are chunks, the way back to the documents
    fallback: int | None = None  # tokens to which its pairs were cut because the queue was long
    cached: CachedScores | None = None  # scores of its other documents, whose pairs are not here
    joined: float = 0.0  # when it joined the queue
    started: float | None = None  # when the first of its steps began
    compute_s: float = 0.0  # seconds of its steps
    cost_tokens: float = 0.0  # its share of their tokens, padding included
    batch_sizes: list[int] = field(default_factory=list)  # their pairs, other requests' included
    ladder: list[LadderStep] = field(default_factory=list)
    precisions: set[str] = field(default_factory=set)  # those of its steps

    def computed(self, logits: FloatArray | None = None) -> DocumentScores:
        """Scores of the documents whose pairs are here; None where they have no logits yet."""
        lost, tokens = self.pairs.truncated_tokens, self.pairs.lengths
        if logits is None:
            logits = np.full(len(tokens), np.nan, dtype=np.float32)
        if self.chunk_map is None:
            return DocumentScores(logits, lost, tokens)
        chunks = self.chunk_map
        return DocumentScores(
            chunks.best(logits),
            chunks.truncated_tokens(lost),
            np.add.reduceat(tokens, chunks.starts, dtype=np.int32),
        )

    def scored(self, step: PlannedStep, seconds: float, now: float, precision: str) -> None:
        """Count a step with pairs of it, which took ``seconds``."""
        self.precisions.add(precision)
        self.compute_s += seconds
        pairs = zip(step.places, step.lengths, strict=True)  # each counts for its first request
        own = sum(length for (owner, _), length in pairs if owner == self.number)
        self.cost_tokens += step.cost_tokens * (own / step.tokens)
        self.batch_sizes.append(len(step.places))
        if self.started is None:
            self.started = now - seconds

    def timings(self, now: float) -> Timings:
        """Where its time went so far."""
        started = now if self.started is None else self.started
        return Timings(
            tokenise_s=self.tokenise_s,
            queue_s=max(0.0, started - self.joined),
            compute_s=self.compute_s,
            total_s=now - self.arrived,
        )

    def answer(self, logits: FloatArray, now: float) -> Answer:
        """The answer for its caller."""
        scores = self._whole(self.computed(logits))
        return Answer(
            logits=scores.logits,
            truncated_tokens=scores.truncated_tokens,
            tokens=int(scores.tokens.sum()),
            cost_tokens=round(self.cost_tokens),
            timings=self.timings(now),
            batch_sizes=tuple(self.batch_sizes),
            ladder=tuple(self.ladder),
            fallback=self.fallback,
            cached=0 if self.cached is None else self.cached.hits,
        )

    def ended(self, outcome: Outcome, now: float) -> RequestEnded:
        """The event for listeners."""
        scores = self._whole(self.computed())
        return request_ended(outcome, scores, self.timings(now), self.fallback)

    def _whole(self, computed: DocumentScores) -> DocumentScores:
        """Scores of all documents, in the caller's order."""
        return computed if self.cached is None else self.cached.completed(computed)


def request_ended(
    outcome: Outcome, scores: DocumentScores, times: Timings, fallback: int | None = None
) -> RequestEnded:
    """The event for listeners: a request has ended. Logits are not read."""
    truncated = scores.truncated_tokens
    return RequestEnded(
        outcome=outcome,
        documents=len(truncated),
        tokens=int(scores.tokens.sum()),
        truncated_documents=int((truncated > 0).sum()),
        truncated_tokens=int(truncated.sum()),
        queue_s=times.queue_s,
        tokenise_s=times.tokenise_s,
        compute_s=times.compute_s,
        total_s=times.total_s,
        fallback=fallback,
    )


def answer_from_cache(cached: CachedScores, total_s: float) -> tuple[Answer, RequestEnded]:
    """The answer to a request whose scores are all cached, and the event for listeners."""
    scores, times = cached.scores, Timings(total_s=total_s)
    answer = Answer(
        logits=scores.logits,
        truncated_tokens=scores.truncated_tokens,
        tokens=int(scores.tokens.sum()),
        cost_tokens=0,
        timings=times,
        cached=cached.hits,
    )
    return answer, request_ended("answered", scores, times)


EXPIRED = "The deadline passed while the request waited. Allow more time, or send fewer documents."


def error_of(failed: FailedRequest, name: str) -> EchelonError:
    """The error for a pair that got no score."""
    if failed.fault == "not_finite":
        return NonFiniteScore(
            f"{name}: the model gave {failed.logit}. Serve it with precision='fp32', whose range "
            "is wider; if it persists, the weights are damaged."
        )
    return ScoringFailed(f"{name}: {failed.fault}. This is a bug.")


def lost(pairs: int, name: str) -> WorkerLost:
    """The error for a step of one request during which a worker ended for the second time."""
    which, remedy = "this document", "Send the others without it"
    if pairs > 1:
        which, remedy = f"this or one of {pairs - 1} others", "Send them one at a time to find it"
    return WorkerLost(
        f"{name}: the scoring process ended twice with {which} in it. {remedy}; "
        "the server's log has the cause."
    )


def does_not_fit(tokens: int, where: str, name: str) -> OutOfMemory:
    """The error for a pair that does not fit in memory even alone."""
    return OutOfMemory(f"{name} of {tokens} tokens does not fit in the memory of {where}")


def query_too_long(error: TruncationImpossible, max_length: int) -> InvalidInput:
    """The error for a pair that, cut to fit in memory, would have no room for its document."""
    return InvalidInput(
        f"pairs[{error.index}].query",
        f"its {error.query_tokens} tokens leave no room in max_length={max_length}, to "
        "which memory pressure had to cut",
        "Shorten the query, or use truncation='longest_first'.",
    )


Result = TypeVar("Result")


def resolve(loop: asyncio.AbstractEventLoop, future: asyncio.Future[Result], value: Result) -> None:
    """Set a future's result from another thread, unless its caller no longer waits."""

    def set_result() -> None:
        if not future.done():
            future.set_result(value)

    with contextlib.suppress(RuntimeError):  # the loop has closed
        loop.call_soon_threadsafe(set_result)
