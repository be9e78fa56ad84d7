"""Admission: a request is taken whole or refused at once.

Pure: it is told what waits and what is asked, and answers with the reason or None. The reasons
are the table :data:`RULES`; the first that applies is given. A request is judged twice by the same
table: at the door with estimated tokens, so that a full house costs no tokenising, and with its
true tokens before it joins the queue.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from echelon.errors import DeadlinePassed, InvalidInput, Overloaded, TooLarge
from echelon.scheduling.cost_model import Work
from echelon.scheduling.fair_queue import WEIGHTS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from echelon.errors import EchelonError
    from echelon.scheduling.cost_model import CostModel
    from echelon.scheduling.queue import CompletionEstimate, QueueLoad
    from echelon.types import Priority


@dataclass(frozen=True, slots=True)
class AdmissionLimits:
    """What is taken in at most.

    Attributes:
        max_requests: requests at once. Each holds a connection, its texts and its token ids, about
            a megabyte: 512 hold half a gigabyte.
        max_tokens: tokens that wait. Their ids take 4 bytes each and a pair some 500 bytes of
            records: 8 million tokens are about 100 MB.
        max_wait_s: predicted seconds a request may wait before its first step. A caller would
            rather ask another server than wait longer than most HTTP clients do (30 s).
        max_documents: documents of one request; Cohere's API allows as many.
        max_request_tokens: tokens of one request: 8,192 documents of 512.
    """

    max_requests: int = 512
    max_tokens: int = 8 * 2**20
    max_wait_s: float = 30.0
    max_documents: int = 10_000
    max_request_tokens: int = 4 * 2**20

    def __post_init__(self) -> None:
        for name in ("max_requests", "max_tokens", "max_documents", "max_request_tokens"):
            if getattr(self, name) < 1:
                raise InvalidInput(
                    name, f"{getattr(self, name)} is not positive", "Give 1 or more."
                )
        if not self.max_wait_s > 0:
            raise InvalidInput("max_wait_s", f"{self.max_wait_s} is not positive", "Give seconds.")
        if self.max_request_tokens > self.max_tokens:
            raise InvalidInput(
                "max_request_tokens",
                f"{self.max_request_tokens} is more than max_tokens={self.max_tokens}, so the "
                "largest request could never come in",
                "Raise max_tokens or lower max_request_tokens.",
            )


@dataclass(frozen=True, slots=True)
class RequestCost:
    """What a request asks for.

    Attributes:
        documents: its pairs.
        tokens: their tokens.
        squares: their squared tokens.
        deadline: when the answer is due; None means never.
        priority: its share of the device.
    """

    documents: int
    tokens: int
    squares: int
    deadline: float | None = None
    priority: Priority = "normal"


def _unknown(places: int, workers: int) -> Sequence[CompletionEstimate]:
    """Nothing is known of single requests."""
    del places, workers
    return ()


@dataclass(frozen=True, slots=True)
class SystemLoad:
    """What is there already.

    Attributes:
        load: what waits and runs.
        cost: predicts step times.
        workers: workers that are up.
        coming: requests still being tokenised.
        coming_tokens: their estimated tokens.
        next_completions: see :meth:`echelon.scheduling.batcher.Batcher.next_completions`; called
            only if the limit of requests is reached.
    """

    load: QueueLoad
    cost: CostModel
    workers: int = 1
    coming: int = 0
    coming_tokens: int = 0
    next_completions: Callable[[int, int], Sequence[CompletionEstimate]] = _unknown

    @property
    def requests(self) -> int:
        """Requests inside, tokenised or not."""
        return self.load.requests + self.coming

    @property
    def tokens(self) -> int:
        """Tokens that wait or soon will."""
        return self.load.tokens + self.coming_tokens

    @property
    def backlog_s(self) -> float:
        """Predicted seconds until everything inside is scored, if nothing else comes."""
        load = self.load
        share = self.tokens / load.tokens if load.tokens else 0.0
        squares = int(load.squares * share)
        waiting = self.seconds(self.tokens, squares) if self.tokens else 0.0
        return (waiting + load.running_s) / max(1, self.workers)

    def seconds(self, tokens: int, squares: int) -> float:
        """Predicted seconds of so much work on one worker, in full steps."""
        steps = -(-tokens // self.load.budget)
        return self.cost.seconds(Work(max(1, steps), tokens, squares))

    def free_s(self, places: int) -> float:
        """Predicted seconds until so many of the requests inside have ended.

        Of those that are still tokenised nothing single is known: they count as all alike.
        """
        workers = max(1, self.workers)
        soon = self.next_completions(places, workers)
        if len(soon) < places:
            return self.backlog_s * places / max(1, self.requests)
        last = soon[places - 1]
        queued_s = self.seconds(last.tokens, last.squares) if last.tokens else 0.0
        return last.running_s + queued_s / workers

    def own_s(self, ask: RequestCost) -> float:
        """Predicted seconds of a request alone on idle workers."""
        steps = max(1, -(-ask.tokens // self.load.budget))
        return self.seconds(ask.tokens, ask.squares) / min(max(1, self.workers), steps)

    def wait_s(self, ask: RequestCost) -> float:
        """Predicted seconds that others hold a request up.

        In the fair order nobody receives more than the request itself, by weight, before it ends;
        so a short request does not wait for the backlog.
        """
        if not self.tokens:
            return self.load.running_s / max(1, self.workers)
        weight = self.load.weight + self.coming * WEIGHTS["normal"]
        ahead = min(self.tokens, ask.tokens * weight / WEIGHTS[ask.priority])
        running = self.load.running_s / max(1, self.workers)
        return running + (self.backlog_s - running) * ahead / self.tokens


Reason = Literal[
    "deadline_passed",
    "too_many_documents",
    "too_many_tokens",
    "requests_full",
    "tokens_full",
    "deadline_impossible",
    "deadline_too_near",
    "wait_too_long",
]


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request is not taken.

    Attributes:
        reason: the rule's name.
        error: what the caller is told.
    """

    reason: Reason
    error: EchelonError


def _deadline_passed(
    ask: RequestCost, house: SystemLoad, bounds: AdmissionLimits, now: float
) -> EchelonError | None:
    del house, bounds
    if ask.deadline is None or ask.deadline > now:
        return None
    return DeadlinePassed("The deadline had passed before the request began. Allow more time.")


def _too_many_documents(
    ask: RequestCost, house: SystemLoad, bounds: AdmissionLimits, now: float
) -> EchelonError | None:
    del house, now
    if ask.documents <= bounds.max_documents:
        return None
    return TooLarge(
        "documents",
        f"{ask.documents} are more than the {bounds.max_documents} of one request",
        "Send them in several requests.",
    )


def _too_many_tokens(
    ask: RequestCost, house: SystemLoad, bounds: AdmissionLimits, now: float
) -> EchelonError | None:
    del house, now
    if ask.tokens <= bounds.max_request_tokens:
        return None
    return TooLarge(
        "documents",
        f"their {ask.tokens} tokens are more than the {bounds.max_request_tokens} of one request",
        "Send fewer or shorter documents.",
    )


def _requests_full(
    ask: RequestCost, house: SystemLoad, bounds: AdmissionLimits, now: float
) -> EchelonError | None:
    del ask, now
    if house.requests < bounds.max_requests:
        return None
    places = house.requests - bounds.max_requests + 1
    return Overloaded(
        f"as many requests are inside as there may be ({house.requests})",
        house.free_s(places),
    )


def _tokens_full(
    ask: RequestCost, house: SystemLoad, bounds: AdmissionLimits, now: float
) -> EchelonError | None:
    del now
    excess = house.tokens + ask.tokens - bounds.max_tokens
    if excess <= 0:
        return None
    return Overloaded(
        f"{house.tokens} tokens wait, and {ask.tokens} more would be over {bounds.max_tokens}",
        house.backlog_s * excess / max(1, house.tokens),
    )


def _deadline_impossible(
    ask: RequestCost, house: SystemLoad, bounds: AdmissionLimits, now: float
) -> EchelonError | None:
    del bounds
    own_s = house.own_s(ask)
    if ask.deadline is None or own_s <= ask.deadline - now:
        return None
    return DeadlinePassed(
        f"{ask.documents} documents take about {own_s:.2f} s even on an idle server, and "
        f"{ask.deadline - now:.2f} s are left. Allow more time or send fewer."
    )


def _deadline_too_near(
    ask: RequestCost, house: SystemLoad, bounds: AdmissionLimits, now: float
) -> EchelonError | None:
    del bounds
    if ask.deadline is None:
        return None
    late_s = house.wait_s(ask) + house.own_s(ask) - (ask.deadline - now)
    if late_s <= 0:
        return None
    return Overloaded(
        f"The answer would be {late_s:.2f} s too late for its deadline: "
        f"{house.wait_s(ask):.2f} s of work are ahead of it",
        late_s,
    )


def _wait_too_long(
    ask: RequestCost, house: SystemLoad, bounds: AdmissionLimits, now: float
) -> EchelonError | None:
    del now
    excess_s = house.wait_s(ask) - bounds.max_wait_s
    if excess_s <= 0:
        return None
    return Overloaded(
        f"The request would wait {house.wait_s(ask):.1f} s, and {bounds.max_wait_s:g} s is the "
        "longest there may be",
        excess_s,
    )


RULES: dict[
    Reason, Callable[[RequestCost, SystemLoad, AdmissionLimits, float], EchelonError | None]
] = {
    "deadline_passed": _deadline_passed,
    "too_many_documents": _too_many_documents,
    "too_many_tokens": _too_many_tokens,
    "requests_full": _requests_full,
    "tokens_full": _tokens_full,
    "deadline_impossible": _deadline_impossible,
    "deadline_too_near": _deadline_too_near,
    "wait_too_long": _wait_too_long,
}
"""Why a request is refused, in the order of asking: what no retry would change comes before what
one would, except that an impossible deadline is only predicted and a full queue is a fact."""


def refuse(
    ask: RequestCost, house: SystemLoad, bounds: AdmissionLimits, now: float
) -> Refusal | None:
    """The first reason to refuse a request; None takes it in."""
    for reason, rule in RULES.items():
        error = rule(ask, house, bounds, now)
        if error is not None:
            return Refusal(reason, error)
    return None


class TokenEstimate:
    """Tokens from characters, before anything is tokenised; learns from what tokenising gives.

    One ratio with forgetting: texts of one service are of a kind.
    """

    def __init__(self, tokens_per_character: float = 0.25) -> None:
        self.ratio = tokens_per_character

    def tokens(self, characters: int, documents: int, max_length: int) -> int:
        """Estimated tokens of so many documents; none is longer than ``max_length``."""
        return min(int(characters * self.ratio) + documents, documents * max_length)

    def observe(self, characters: int, tokens: int) -> None:
        """Learn from one request: a tenth of what is new, so that no odd text counts for much."""
        if characters > 0:
            self.ratio += 0.1 * (min(tokens / characters, 1.0) - self.ratio)
