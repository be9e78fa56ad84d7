"""What callers are told whose pairs got no score. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from echelon.errors import (
    InvalidInput,
    NonFiniteScore,
    OutOfMemory,
    ScoringFailed,
    WorkerLost,
)

if TYPE_CHECKING:
    from echelon.errors import EchelonError
    from echelon.scheduling.queue import FailedRequest
    from echelon.tokenization.pairs import TruncationImpossible

EXPIRED = "The deadline passed while the request waited. Allow more time, or send fewer documents."


def error_of(broken: FailedRequest, name: str) -> EchelonError:
    """What a caller is told of a pair that got no score."""
    if broken.fault == "not_finite":
        return NonFiniteScore(
            f"{name}: the model gave {broken.logit}. Serve it with precision='fp32', whose range "
            "is wider; if it persists, the weights are damaged."
        )
    return ScoringFailed(f"{name}: {broken.fault}. This is a bug.")


def lost(pairs: int, name: str) -> WorkerLost:
    """A worker ended over a step of one request for the second time."""
    which, remedy = "this document", "Send the others without it"
    if pairs > 1:
        which, remedy = f"this or one of {pairs - 1} others", "Send them one at a time to find it"
    return WorkerLost(
        f"{name}: the scoring process ended twice with {which} in it. {remedy}; "
        "the server's log has the cause."
    )


def does_not_fit(tokens: int, words: str, name: str) -> OutOfMemory:
    """A pair does not fit in memory, even alone."""
    return OutOfMemory(f"{name} of {tokens} tokens does not fit in the memory of {words}")


def query_too_long(error: TruncationImpossible, max_length: int) -> InvalidInput:
    """Cutting a pair for want of memory would leave nothing of its document."""
    return InvalidInput(
        f"pairs[{error.index}].query",
        f"its {error.query_tokens} tokens leave no room in max_length={max_length}, to "
        "which memory pressure had to cut",
        "Shorten the query, or use truncation='longest_first'.",
    )
