"""Events of a running service, and the listeners that metrics, logs and a dashboard derive from.

A listener is called from any thread, while work waits: it must be quick.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from echelon.scheduling.token_budget import Reason
    from echelon.types import LadderStep

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
        cost_tokens: tokens computed, padding included.
        resident_bytes: memory of the worker's process.
        again: its pairs were in an earlier step that failed.
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
    """An admitted request has ended.

    Attributes:
        outcome: how.
        documents: number of its documents.
        tokens: their tokens as the model saw them, chunks' overlaps included.
        truncated_documents: documents that lost tokens.
        truncated_tokens: tokens that they lost.
        queue_s: seconds from joining the queue to the first of its steps.
        tokenise_s: seconds of tokenising, waiting for a thread included.
        compute_s: seconds of the steps that held its pairs.
        total_s: seconds from its arrival to its end.
        fallback: tokens to which its pairs were cut because the queue was long, if they were.
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
    """A request was refused.

    Attributes:
        reason: a rule of :data:`echelon.scheduling.admission.RULES`, or ``shutting_down``.
        documents: number of its documents.
        retry_after_s: seconds after which to try again; None where that does not help.
    """

    reason: str
    documents: int
    retry_after_s: float | None


@dataclass(frozen=True, slots=True)
class LadderTaken:
    """The OOM ladder took a step.

    Attributes:
        worker: number of the worker.
        step: the step.
        budget: token budget from now on.
    """

    worker: int
    step: LadderStep
    budget: int


@dataclass(frozen=True, slots=True)
class BudgetMoved:
    """The token budget has changed.

    Attributes:
        tokens: the budget from now on.
        reason: see :mod:`echelon.scheduling.token_budget`.
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
        state: its state from now on.
        detail: the reason, as text.
    """

    worker: int
    state: WorkerState
    detail: str = ""


class Listener:
    """Base of listeners: receives every event and does nothing."""

    def step_finished(self, event: StepFinished) -> None:
        """A step was scored."""

    def request_ended(self, event: RequestEnded) -> None:
        """A request ended."""

    def refused(self, event: RequestRefused) -> None:
        """A request was refused."""

    def ladder_taken(self, event: LadderTaken) -> None:
        """The OOM ladder took a step."""

    def worker_changed(self, event: WorkerChanged) -> None:
        """A worker came up or went down."""

    def budget_moved(self, event: BudgetMoved) -> None:
        """The token budget has changed."""


class ListenerGroup(Listener):
    """Passes events on to listeners, and logs their exceptions: no request fails for a metric."""

    def __init__(self, *listeners: Listener) -> None:
        self._listeners = listeners

    def step_finished(self, event: StepFinished) -> None:
        """A step was scored."""
        self._pass_on("step_finished", event)

    def request_ended(self, event: RequestEnded) -> None:
        """A request ended."""
        self._pass_on("request_ended", event)

    def refused(self, event: RequestRefused) -> None:
        """A request was refused."""
        self._pass_on("refused", event)

    def ladder_taken(self, event: LadderTaken) -> None:
        """The OOM ladder took a step."""
        self._pass_on("ladder_taken", event)

    def worker_changed(self, event: WorkerChanged) -> None:
        """A worker came up or went down."""
        self._pass_on("worker_changed", event)

    def budget_moved(self, event: BudgetMoved) -> None:
        """The token budget has changed."""
        self._pass_on("budget_moved", event)

    def _pass_on(self, method: str, event: object) -> None:
        for listener in self._listeners:
            try:
                getattr(listener, method)(event)
            except Exception:
                name = type(event).__name__
                logger.exception("A listener raised on %s. This is a bug in it.", name)
