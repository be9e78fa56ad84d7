"""One request of a service, from joining the queue to its end, and what its caller is told."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from echelon.serve.events import RequestEnded
from echelon.types import Answer, LadderStep, Timings

if TYPE_CHECKING:
    from collections.abc import Callable

    from echelon.errors import EchelonError
    from echelon.scheduling.fair_queue import Priority
    from echelon.scheduling.queue import PlannedStep
    from echelon.serve.events import Outcome
    from echelon.tokenization.chunking import Whole
    from echelon.tokenization.pairs import EncodedPairs
    from echelon.types import FloatArray, IntArray


@dataclass(slots=True)
class Job:
    """One request; :mod:`echelon.serve.dispatch` changes it under its lock.

    Attributes:
        number: its number, never used twice.
        pairs: what to score.
        done: called once, from any thread, with the answer or the error.
        arrived: when the caller came.
        tokenise_s: seconds of tokenising.
        deadline: when the answer is due; None means never.
        priority: its share of the device.
        whole: where its pairs are chunks, the way back to the documents.
        fallback: tokens that its pairs were cut to because the queue was long.
        joined: when it joined the queue.
        started: when the first of its steps began.
        compute_s: seconds of its steps.
        cost_tokens: its share of what they were paid for.
        batch_sizes: their pairs, other requests' included.
        ladder: memory-ladder actions that they went through.
    """

    number: int
    pairs: EncodedPairs
    done: Callable[[Answer | EchelonError], None]
    arrived: float
    tokenise_s: float = 0.0
    deadline: float | None = None
    priority: Priority = "normal"
    whole: Whole | None = None
    fallback: int | None = None
    joined: float = 0.0
    started: float | None = None
    compute_s: float = 0.0
    cost_tokens: float = 0.0
    batch_sizes: list[int] = field(default_factory=list)
    ladder: list[LadderStep] = field(default_factory=list)

    @property
    def truncated_tokens(self) -> IntArray:
        """int32 [documents], tokens that each lost."""
        lost = self.pairs.truncated_tokens
        return lost if self.whole is None else self.whole.truncated_tokens(lost)

    def scored(self, step: PlannedStep, seconds: float, now: float) -> None:
        """A step with pairs of it took ``seconds`` and has ended."""
        self.compute_s += seconds
        self.cost_tokens += step.cost_tokens * self._share(step)
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
        """What its caller gets."""
        return Answer(
            logits=logits if self.whole is None else self.whole.best(logits),
            truncated_tokens=self.truncated_tokens,
            tokens=int(self.pairs.lengths.sum()),
            cost_tokens=round(self.cost_tokens),
            timings=self.timings(now),
            batch_sizes=tuple(self.batch_sizes),
            ladder=tuple(self.ladder),
            fallback=self.fallback,
        )

    def ended(self, outcome: Outcome, now: float) -> RequestEnded:
        """What a listener hears."""
        times, truncated = self.timings(now), self.truncated_tokens
        return RequestEnded(
            outcome=outcome,
            documents=len(truncated),
            tokens=int(self.pairs.lengths.sum()),
            truncated_documents=int((truncated > 0).sum()),
            truncated_tokens=int(truncated.sum()),
            queue_s=times.queue_s,
            tokenise_s=times.tokenise_s,
            compute_s=times.compute_s,
            total_s=times.total_s,
            fallback=self.fallback,
        )

    def _share(self, step: PlannedStep) -> float:
        """Its share of a step, by tokens; a pair of several requests is the first one's."""
        pairs = zip(step.places, step.lengths, strict=True)
        return sum(length for (owner, _), length in pairs if owner == self.number) / step.tokens
