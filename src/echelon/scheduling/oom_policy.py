"""The out-of-memory policy: what to try when a step does not fit, least harm first. Pure.

:data:`RUNGS` is the ladder; library calls, async calls and services climb it by the same rules, see
docs/decisions/0011-one-oom-policy.md.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable

    from echelon.options import Allowance
    from echelon.scheduling.token_budget import Reason, TokenBudget

MIN_MAX_LENGTH = 64
"""Tokens below which a shorter document would leave nothing worth scoring."""

Rung = Literal[
    "drop_caches",
    "halve_budget",
    "one_pair",
    "fresh_worker",
    "lower_precision",
    "shorten",
    "give_up",
]


@dataclass(frozen=True, slots=True)
class StepFailure:
    """A step that did not fit."""

    pairs: int
    cost_tokens: int  # padding included
    longest: int  # tokens of its longest pair
    precision: str
    allow: tuple[Allowance, ...] = ()  # what the user allows to be given up
    lower_precision: str = "bf16"  # below fp32, on this device
    caches_dropped: bool = False  # dropping caches again would not help
    fresh_may_help: bool = False  # a fresh process can be started and may have room for the step
    crowded: bool = False  # other processes hold memory of the device, and may give it back


@dataclass(frozen=True, slots=True)
class OomAction:
    """What to try next."""

    rung: Rung
    detail: str  # what changes, with the numbers
    remedy: str  # what the user can do to prevent it
    budget: int | None = None  # new token budget (``halve_budget``, ``one_pair``)
    precision: str | None = None  # precision to reopen the model in (``lower_precision``)
    max_length: int | None = None  # new limit in tokens for the pairs left (``shorten``)


def _drop_caches(failure: StepFailure) -> OomAction | None:
    if failure.caches_dropped:
        return None
    return OomAction(
        "drop_caches",
        f"dropped caches and retried a step of {failure.cost_tokens} tokens",
        "Leave the device more free memory, or set a smaller token_budget.",
    )


def _halve_budget(failure: StepFailure) -> OomAction | None:
    budget = failure.cost_tokens // 2
    if failure.pairs == 1 or budget <= failure.longest:
        return None
    return OomAction(
        "halve_budget",
        f"token budget {failure.cost_tokens} -> {budget}",
        f"Set token_budget={budget}, or run `echelon tune` to find the best that fits.",
        budget=budget,
    )


def _one_pair(failure: StepFailure) -> OomAction | None:
    if failure.pairs == 1:
        return None
    return OomAction(
        "one_pair",
        f"one pair at a time for pairs of {failure.longest} tokens",
        "Free memory, lower max_length, or use a smaller model or precision.",
        budget=failure.longest,
    )


def _fresh_worker(failure: StepFailure) -> OomAction | None:
    if not failure.fresh_may_help:
        return None
    return OomAction(
        "fresh_worker",
        f"a fresh process for a pair of {failure.longest} tokens",
        "Leave the device more free memory, or set a smaller token_budget.",
    )


def _lower_precision(failure: StepFailure) -> OomAction | None:
    lower = failure.lower_precision
    if "precision" not in failure.allow or failure.precision != "fp32":
        return None  # there is none below the half-width ones yet
    return OomAction(
        "lower_precision",
        f"precision {failure.precision} -> {lower}",
        f"Set precision={lower!r} from the start, or free memory.",
        precision=lower,
    )


def _shorten(failure: StepFailure) -> OomAction | None:
    shorter = failure.longest // 2
    if "max_length" not in failure.allow or shorter < MIN_MAX_LENGTH:
        return None
    return OomAction(
        "shorten",
        f"max_length {failure.longest} -> {shorter} for the pairs still to score",
        f"Set max_length={shorter} from the start, or free memory.",
        max_length=shorter,
    )


def _give_up(failure: StepFailure) -> OomAction:
    return OomAction(
        "give_up",
        f"a pair of {failure.longest} tokens does not fit in memory alone",
        "Free memory, set a smaller max_length, or allow more with "
        "allow=('precision', 'max_length').",
    )


RUNGS: tuple[Callable[[StepFailure], OomAction | None], ...] = (
    _drop_caches,
    _halve_budget,
    _one_pair,
    _fresh_worker,
    _lower_precision,
    _shorten,
    _give_up,
)


def next_action(failure: StepFailure) -> OomAction:
    """The first rung that applies; the last one always does."""
    return next(action for rung in RUNGS if (action := rung(failure)) is not None)


@dataclass(slots=True)
class _Tried:
    """What was tried for a request: whether caches were dropped, and the processes renewed."""

    dropped: bool = False
    renewed: set[int] = field(default_factory=set)


class OomPolicy:
    """Decides what to do about steps that did not fit, and how large steps may be.

    Caches are dropped at most once until a step of the same process has fitted, and at most once
    for a request until one of its own pairs has been scored. The second rule ends the ladder: a
    request has finitely many pairs, whatever other requests do in between.

    A lone pair may be tried in a fresh process, since an old one keeps compiled code for each size
    of step (docs/LOG.md): in place of each process once for a request until one of its pairs has
    been scored, and not if a fresh process had no room for a pair as short. So a client that
    repeats a pair that cannot fit restarts nothing, and one whose pairs fit is not refused because
    the pairs of others fill the processes between them.

    Safe to use from several threads.

    Args:
        budget: the token budget while steps run.
        usual: token budget without memory pressure; None is the maximum of ``budget``.
        learned: called with the token budget that memory allows, at once when it falls and each
            time it rises again; with None once it is ``usual`` again. What falls because of other
            processes is not learned: they may be gone at the next start.
    """

    def __init__(
        self,
        budget: TokenBudget,
        usual: int | None = None,
        learned: Callable[[int | None], None] | None = None,
    ) -> None:
        self.budget = budget
        self._usual = budget.max_tokens if usual is None else usual
        self._report = learned
        self._learned: int | None = None
        self._dropped: set[int] = set()  # processes without a step that fitted since then
        self._tried: dict[Hashable, _Tried] = {}  # by request, since a pair of it was scored
        self._refused = math.inf  # tokens of the shortest pair that a fresh process had no room for
        self._lock = threading.Lock()

    def fitted(
        self,
        requests: Iterable[Hashable],
        cost_tokens: int,
        longest: int,
        *,
        worker: int = 0,
        predicted_s: float = math.inf,
        actual_s: float = 0.0,
    ) -> Reason | None:
        """Take note of a step that fitted, with pairs of ``requests``; ``longest`` is in tokens.

        Returns:
            Why the token budget has changed; None if it has not.
        """
        with self._lock:
            self._dropped.discard(worker)
            for request in requests:
                self._tried.pop(request, None)
            if longest >= self._refused:
                self._refused = math.inf
            reason = self.budget.ended(cost_tokens, predicted_s, actual_s)
            if reason == "recovered" and self.budget.tokens > (self._learned or math.inf):
                self._learn()
            return reason

    def failed(
        self,
        failure: StepFailure,
        requests: Iterable[Hashable],
        *,
        worker: int = 0,
        fresh: bool = False,
        renewable: bool = False,
    ) -> OomAction:
        """Decide what to try after a step did not fit; a smaller token budget holds at once.

        Args:
            failure: the step.
            requests: the requests that had pairs in it.
            worker: number of the process that ran it.
            fresh: whether it was the first step of its process.
            renewable: whether the process can be replaced by a fresh one.
        """
        with self._lock:
            tried = [self._tried.setdefault(request, _Tried()) for request in requests]
            if fresh and failure.pairs == 1:
                self._refused = min(self._refused, failure.longest)
            may_renew = renewable and not any(worker in one.renewed for one in tried)
            action = next_action(
                replace(
                    failure,
                    caches_dropped=worker in self._dropped or any(one.dropped for one in tried),
                    fresh_may_help=may_renew and failure.longest < self._refused,
                )
            )
            for one in tried:
                one.dropped |= action.rung == "drop_caches"
                one.renewed |= {worker} if action.rung == "fresh_worker" else set()
            self._dropped.add(worker)  # every action drops them
            lowered = action.budget is not None and self.budget.out_of_memory(action.budget)
            if lowered and not failure.crowded:
                self._learn()
            return action

    def forget(self, request: Hashable) -> None:
        """Drop what is remembered of a request that has ended."""
        with self._lock:
            self._tried.pop(request, None)

    def _learn(self) -> None:
        tokens = self.budget.tokens if self.budget.tokens < self._usual else None
        if tokens != self._learned:
            self._learned = tokens
            if self._report is not None:
                self._report(tokens)
