"""What a running service tells whoever listens: metrics, logs, a dashboard. Plain data.

A listener is called from any thread, while work waits: it must be quick.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

    from echelon.scheduling.token_budget import Reason
    from echelon.types import LadderStep

Event = TypeVar("Event")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StepFinished:
    """A step was scored.

    Attributes:
        worker: number of the worker, from 0.
        predicted_s: seconds that the cost model expected.
        actual_s: seconds that the scorer took.
        pairs: pairs in it.
        requests: requests that waited for them.
        tokens: useful tokens.
        cost_tokens: tokens paid for, padding included.
        resident_bytes: memory of the worker's process.
        again: its pairs were in a step before that did not end well.
    """

    worker: int
    predicted_s: float
    actual_s: float
    pairs: int
    requests: int
    tokens: int
    cost_tokens: int
    resident_bytes: int
    again: bool


Outcome = Literal["answered", "failed", "expired", "cancelled"]


@dataclass(frozen=True, slots=True)
class RequestEnded:
    """A request that was taken in has ended.

    Attributes:
        outcome: how.
        documents: its documents.
        tokens: their tokens as the model saw them, chunks' overlaps included.
        truncated_documents: documents that lost tokens.
        truncated_tokens: tokens that they lost.
        queue_s: seconds from joining the queue to the first of its steps.
        tokenise_s: seconds of tokenising, waiting for a thread included.
        compute_s: seconds of the steps that held its pairs.
        total_s: seconds from its arrival to its end.
        fallback: tokens that its pairs were cut to because the queue was long; None: they were not.
    """

    outcome: Outcome
    documents: int
    tokens: int
    truncated_documents: int
    truncated_tokens: int
    queue_s: float
    tokenise_s: float
    compute_s: float
    total_s: float
    fallback: int | None = None


@dataclass(frozen=True, slots=True)
class RequestRefused:
    """A request was not taken in.

    Attributes:
        reason: a rule of :data:`echelon.scheduling.admission.RULES`, or ``shutting_down``.
        documents: its pairs.
        retry_after_s: what the caller was told; None where no retry helps.
    """

    reason: str
    documents: int
    retry_after_s: float | None


@dataclass(frozen=True, slots=True)
class LadderTaken:
    """The memory ladder took a step.

    Attributes:
        worker: number of the worker.
        step: what was done.
        budget: token budget in force now.
    """

    worker: int
    step: LadderStep
    budget: int


@dataclass(frozen=True, slots=True)
class BudgetMoved:
    """The token budget has changed.

    Attributes:
        tokens: what a step may cost now.
        reason: why, see :mod:`echelon.scheduling.token_budget`.
    """

    tokens: int
    reason: Reason


WorkerState = Literal[
    "starting", "up", "died", "wedged", "recycled", "renewed", "failed", "stopped"
]


@dataclass(frozen=True, slots=True)
class WorkerChanged:
    """A worker came up or went down.

    Attributes:
        worker: its number.
        state: what it is now.
        detail: why, in words.
    """

    worker: int
    state: WorkerState
    detail: str = ""


class Listener(Protocol):
    """Hears what happens."""

    def step_finished(self, event: StepFinished) -> None:
        """A step was scored."""
        ...

    def request_ended(self, event: RequestEnded) -> None:
        """A request ended."""
        ...

    def refused(self, event: RequestRefused) -> None:
        """A request was refused."""
        ...

    def ladder_taken(self, event: LadderTaken) -> None:
        """Memory trouble was dealt with."""
        ...

    def worker_changed(self, event: WorkerChanged) -> None:
        """A worker came up or went down."""
        ...

    def budget_moved(self, event: BudgetMoved) -> None:
        """The token budget has changed."""
        ...


class NullListener:
    """Hears everything and does nothing; a base for listeners that care for some events only."""

    def step_finished(self, event: StepFinished) -> None:
        """A step was scored."""

    def request_ended(self, event: RequestEnded) -> None:
        """A request ended."""

    def refused(self, event: RequestRefused) -> None:
        """A request was refused."""

    def ladder_taken(self, event: LadderTaken) -> None:
        """Memory trouble was dealt with."""

    def worker_changed(self, event: WorkerChanged) -> None:
        """A worker came up or went down."""

    def budget_moved(self, event: BudgetMoved) -> None:
        """The token budget has changed."""


class SafeListener:
    """Hands events on, and outlives a listener that raises: no request may hang for a metric."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener

    def step_finished(self, event: StepFinished) -> None:
        """A step was scored."""
        _tell(self._listener.step_finished, event)

    def request_ended(self, event: RequestEnded) -> None:
        """A request ended."""
        _tell(self._listener.request_ended, event)

    def refused(self, event: RequestRefused) -> None:
        """A request was refused."""
        _tell(self._listener.refused, event)

    def ladder_taken(self, event: LadderTaken) -> None:
        """Memory trouble was dealt with."""
        _tell(self._listener.ladder_taken, event)

    def worker_changed(self, event: WorkerChanged) -> None:
        """A worker came up or went down."""
        _tell(self._listener.worker_changed, event)

    def budget_moved(self, event: BudgetMoved) -> None:
        """The token budget has changed."""
        _tell(self._listener.budget_moved, event)


class ListenerGroup:
    """Hands events on to several listeners; one that raises does not keep them from the others."""

    def __init__(self, *listeners: Listener) -> None:
        self._listeners = tuple(SafeListener(listener) for listener in listeners)

    def step_finished(self, event: StepFinished) -> None:
        """A step was scored."""
        for listener in self._listeners:
            listener.step_finished(event)

    def request_ended(self, event: RequestEnded) -> None:
        """A request ended."""
        for listener in self._listeners:
            listener.request_ended(event)

    def refused(self, event: RequestRefused) -> None:
        """A request was refused."""
        for listener in self._listeners:
            listener.refused(event)

    def ladder_taken(self, event: LadderTaken) -> None:
        """Memory trouble was dealt with."""
        for listener in self._listeners:
            listener.ladder_taken(event)

    def worker_changed(self, event: WorkerChanged) -> None:
        """A worker came up or went down."""
        for listener in self._listeners:
            listener.worker_changed(event)

    def budget_moved(self, event: BudgetMoved) -> None:
        """The token budget has changed."""
        for listener in self._listeners:
            listener.budget_moved(event)


def _tell(hear: Callable[[Event], None], event: Event) -> None:
    try:
        hear(event)
    except Exception:
        logger.exception("A listener raised on %s. This is a bug in it.", type(event).__name__)
