"""Load control: admission of whole requests, and load shedding. Pure.

The first rule of :data:`RULES` that applies gives the reason. A request is judged twice: with
estimated tokens, so that an overloaded server tokenises nothing in vain, and with its true tokens
before it is queued. Load shedding reads pairs of low priority shorter while the queue is long.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from echelon.errors import DeadlinePassed, InvalidInput, Overloaded, TooLarge, check_positive
from echelon.scheduling.cost_model import Work
from echelon.scheduling.queue import WEIGHTS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from echelon.errors import EchelonError
    from echelon.scheduling.cost_model import CostModel
    from echelon.scheduling.queue import CompletionEstimate, QueueLoad
    from echelon.types import Priority


MAX_WAIT_S = 5.0
"""Predicted wait of a request where no latency goal is known: callers who wait longer have often
given up, and at twenty times the capacity every answer is as late as this allows."""


@dataclass(frozen=True, slots=True)
class AdmissionLimits:
    """How much may be admitted."""

    # requests at once. Each holds a connection, its texts and its token ids, about a megabyte: 512
    # hold half a gigabyte
    max_requests: int = 512
    # queued tokens. Their ids take 4 bytes each and a pair some 500 bytes of records: 8 million
    # tokens are about 100 MB
    max_tokens: int = 8 * 2**20
    # predicted seconds that a request may wait before its first step
    max_wait_s: float = MAX_WAIT_S
    max_documents: int = 10_000  # documents of one request; Cohere's API allows as many
    max_request_tokens: int = 4 * 2**20  # tokens of one request: 8,192 documents of 512

    def __post_init__(self) -> None:
        check_positive("Give seconds.", max_wait_s=self.max_wait_s)
        counts = ("max_requests", "max_tokens", "max_documents", "max_request_tokens")
        check_positive(**{name: getattr(self, name) for name in counts})
        if self.max_request_tokens > self.max_tokens:
            raise InvalidInput(
                "max_request_tokens",
                f"{self.max_request_tokens} is more than max_tokens={self.max_tokens}, so the "
                "largest request could never be admitted",
                "Raise max_tokens or lower max_request_tokens.",
            )


@dataclass(frozen=True, slots=True)
class RequestCost:
    """The size of a request, and how urgent it is."""

    documents: int
    tokens: int
    squares: int  # sum of its pairs' squared tokens
    deadline: float | None = None  # when the answer is due; None means never
    priority: Priority = "normal"


@dataclass(frozen=True, slots=True)
class SystemLoad:
    """The requests that are admitted already."""

    queue: QueueLoad
    cost: CostModel
    workers: int = 1  # workers that are up
    tokenising: int = 0  # requests that are being tokenised
    tokenising_tokens: int = 0  # their estimated tokens
    # see :meth:`echelon.scheduling.batcher.Batcher.next_completions`; called only if the limit of
    # requests is reached
    next_completions: Callable[[int, int], Sequence[CompletionEstimate]] = lambda *_: ()

    @property
    def requests(self) -> int:
        """All requests, tokenised or not."""
        return self.queue.requests + self.tokenising

    @property
    def tokens(self) -> int:
        """Tokens that are queued or soon will be."""
        return self.queue.tokens + self.tokenising_tokens

    @property
    def backlog_s(self) -> float:
        """Predicted seconds until all requests are scored, if no others come."""
        queue = self.queue
        share = self.tokens / queue.tokens if queue.tokens else 0.0
        waiting = self.seconds(self.tokens, int(queue.squares * share)) if self.tokens else 0.0
        return (waiting + queue.running_s) / max(1, self.workers)

    def seconds(self, tokens: int, squares: int) -> float:
        """Predicted seconds of an amount of work on one worker, in full steps."""
        steps = -(-tokens // self.queue.budget)
        return self.cost.seconds(Work(max(1, steps), tokens, squares))

    def free_s(self, places: int) -> float:
        """Predicted seconds until this many of the requests have ended.

        Requests that are still being tokenised count as all alike.
        """
        workers = max(1, self.workers)
        completions = self.next_completions(places, workers)
        if len(completions) < places:
            return self.backlog_s * places / max(1, self.requests)
        last = completions[places - 1]
        queued_s = self.seconds(last.tokens, last.squares) if last.tokens else 0.0
        return last.running_s + queued_s / workers

    def own_s(self, cost: RequestCost) -> float:
        """Predicted seconds of a request alone on idle workers."""
        steps = max(1, -(-cost.tokens // self.queue.budget))
        return self.seconds(cost.tokens, cost.squares) / min(max(1, self.workers), steps)

    def wait_s(self, cost: RequestCost) -> float:
        """Predicted seconds for which other requests delay one.

        In the fair order no other request receives more than the request itself, by weight, before
        it ends; so a short request does not wait for the whole backlog.
        """
        running = self.queue.running_s / max(1, self.workers)
        if not self.tokens:
            return running
        weight = self.queue.weight + self.tokenising * WEIGHTS["normal"]
        ahead = min(self.tokens, cost.tokens * weight / WEIGHTS[cost.priority])
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
    """The name of the rule that refuses a request, and the error for its caller."""

    reason: Reason
    error: EchelonError


class _Case(NamedTuple):
    cost: RequestCost
    load: SystemLoad
    limits: AdmissionLimits
    now: float


def _deadline_passed(case: _Case) -> EchelonError | None:
    if case.cost.deadline is None or case.cost.deadline > case.now:
        return None
    return DeadlinePassed("The deadline had passed before the request began. Allow more time.")


def _too_many_documents(case: _Case) -> EchelonError | None:
    documents, limit = case.cost.documents, case.limits.max_documents
    if documents <= limit:
        return None
    problem = f"{documents} are more than the {limit} of one request"
    error = TooLarge("documents", problem, "Send them in several requests.")
    error.limit = "max_documents"
    return error


def _too_many_tokens(case: _Case) -> EchelonError | None:
    tokens, limit = case.cost.tokens, case.limits.max_request_tokens
    if tokens <= limit:
        return None
    problem = f"their {tokens} tokens are more than the {limit} of one request"
    return TooLarge("documents", problem, "Send fewer or shorter documents.")


def _requests_full(case: _Case) -> EchelonError | None:
    excess = case.load.requests - case.limits.max_requests + 1
    if excess <= 0:
        return None
    problem = f"the limit of {case.limits.max_requests} requests at once is reached"
    return Overloaded(problem, case.load.free_s(excess))


def _tokens_full(case: _Case) -> EchelonError | None:
    queued, tokens, limit = case.load.tokens, case.cost.tokens, case.limits.max_tokens
    excess = queued + tokens - limit
    if excess <= 0:
        return None
    problem = f"{queued} tokens are queued, and {tokens} more would exceed the limit of {limit}"
    return Overloaded(problem, case.load.backlog_s * excess / max(1, queued))


def _deadline_impossible(case: _Case) -> EchelonError | None:
    deadline, own_s = case.cost.deadline, case.load.own_s(case.cost)
    if deadline is None or own_s <= deadline - case.now:
        return None
    return DeadlinePassed(
        f"{case.cost.documents} documents take about {own_s:.2f} s even on an idle server, and "
        f"{deadline - case.now:.2f} s are left. Allow more time or send fewer."
    )


def _deadline_too_near(case: _Case) -> EchelonError | None:
    if case.cost.deadline is None:
        return None
    wait_s = case.load.wait_s(case.cost)
    late_s = wait_s + case.load.own_s(case.cost) - (case.cost.deadline - case.now)
    if late_s <= 0:
        return None
    return Overloaded(
        f"The answer would be {late_s:.2f} s too late for its deadline: {wait_s:.2f} s of work "
        "are ahead of it",
        late_s,
    )


def _wait_too_long(case: _Case) -> EchelonError | None:
    wait_s, limit_s = case.load.wait_s(case.cost), case.limits.max_wait_s
    if wait_s <= limit_s:
        return None
    problem = f"The request would wait {wait_s:.1f} s, longer than the limit of {limit_s:g} s"
    return Overloaded(problem, wait_s - limit_s)


RULES: dict[Reason, Callable[[_Case], EchelonError | None]] = {
    "deadline_passed": _deadline_passed,
    "too_many_documents": _too_many_documents,
    "too_many_tokens": _too_many_tokens,
    "requests_full": _requests_full,
    "tokens_full": _tokens_full,
    "deadline_impossible": _deadline_impossible,
    "deadline_too_near": _deadline_too_near,
    "wait_too_long": _wait_too_long,
}
"""Rules in the order in which they are applied: those that no retry would change come first, except
that an impossible deadline is only predicted and a full queue is a fact."""


def refuse(
    cost: RequestCost, load: SystemLoad, limits: AdmissionLimits, now: float
) -> Refusal | None:
    """The first reason to refuse a request; None admits it."""
    case = _Case(cost, load, limits, now)
    for reason, rule in RULES.items():
        if (error := rule(case)) is not None:
            return Refusal(reason, error)
    return None


class TokenEstimate:
    """Estimates tokens from characters, and learns their ratio from tokenised requests.

    One ratio with forgetting: the texts of one service are alike.
    """

    def __init__(self, tokens_per_character: float = 0.25) -> None:
        self.ratio = tokens_per_character

    def tokens(self, characters: Sequence[int], max_length: int) -> int:
        """Estimated tokens of pairs, each at most ``max_length``, from the characters of each."""
        return sum(min(int(count * self.ratio) + 1, max_length) for count in characters)

    def observe(self, characters: int, tokens: int) -> None:
        """Learn from pairs read whole: a tenth of the difference, so an odd text counts little."""
        if characters > 0:
            self.ratio += 0.1 * (min(tokens / characters, 1.0) - self.ratio)


ON_SHARE, OFF_SHARE = 0.5, 0.25
"""Shares of the goal: above the first it begins, below the second it may end. It has to begin by
half of the goal, since requests that are already queued stay as they are."""

QUIET_S = 10.0
"""Seconds below the lower threshold before it ends: bursts come again, and two callers within a
second should not be read differently."""


class LoadShedding:
    """Decides whether pairs of low priority are read shorter.

    Two thresholds and a quiet time keep it from going on and off with each burst.

    Args:
        max_length: tokens that such a pair may then have; None never sheds load.
        goal_s: seconds that the queue should not exceed.
    """

    def __init__(self, max_length: int | None, goal_s: float) -> None:
        self.max_length = max_length
        self.goal_s = goal_s
        self.on = False
        self._last_busy = 0.0

    def update(self, backlog_s: float, now: float) -> Literal["on", "off"] | None:
        """Decide anew, and return what changed, if anything did; ``now`` never goes back."""
        if self.max_length is None:
            return None
        if backlog_s >= OFF_SHARE * self.goal_s:
            self._last_busy = now
        if not self.on and backlog_s > ON_SHARE * self.goal_s:
            self.on = True
            return "on"
        if self.on and now - self._last_busy >= QUIET_S:
            self.on = False
            return "off"
        return None

    def fallback(self, priority: Priority, max_length: int) -> int | None:
        """Tokens to which pairs of at most ``max_length`` are cut; None leaves them as they are."""
        if not self.on or priority != "low" or self.max_length is None:
            return None
        return self.max_length if self.max_length < max_length else None
