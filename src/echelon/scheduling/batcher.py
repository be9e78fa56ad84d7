"""The batcher: which waiting pairs of which requests go through the model next.

Pure and deterministic: time is an argument, and the same calls give the same steps. The rules, with
their reasons in docs/decisions/0007-batcher.md:

1. Work-conserving: while pairs wait, :meth:`Batcher.next_step` gives a step; there is no timer.
2. Requests take turns in the fair order of :mod:`echelon.scheduling.queue`. The first one is
   in every step, so a short request behind a long one is in the very next step.
3. Requests whose deadline is in danger may have half of a step, earliest deadline first.
4. A pair that several requests want is scored once.
5. Pairs that no request wants any more are not scored.
6. A step that failed goes first, and without pairs of other requests.

Its capacity is not bounded here: :mod:`echelon.scheduling.admission` decides who comes in.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from itertools import groupby
from typing import TYPE_CHECKING

from echelon.scheduling.cost_model import Work
from echelon.scheduling.packing import REACH, choose, share, step_cost
from echelon.scheduling.queue import (
    QUEUED,
    WEIGHTS,
    Completed,
    FailedRequest,
    FairOrder,
    PairState,
    PlannedStep,
    QueuedRequest,
    QueueLoad,
    RequestQueue,
    UniquePair,
    by_deadline,
    by_tag,
    next_completions,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from echelon.scheduling.cost_model import CostModel
    from echelon.scheduling.queue import CompletionEstimate, Ended, Fault, PairRequest, Place, Turn
    from echelon.types import FloatArray

URGENCY = 3.0
"""A request is urgent when the time to its deadline is less than this many times what it takes
alone. Urgent requests get half of each step, so 2 is needed; the rest covers what else comes and
wrong predictions."""

URGENT_SHARE = 0.5
"""Share of a step that urgent requests get before the fair order continues."""

ATTEMPTS = 2
"""Steps with a lost worker that a pair may be in: a pair that kills two workers kills all. The
second worker is another where there is one, for the first may be what is broken."""


class Batcher:
    """The waiting pairs of all requests, and the running steps.

    Args:
        cost: predicts step times; also says how the scorer pads.
        budget: maximum tokens of a step; a larger pair gets a step to itself.
        max_pairs: maximum pairs of a step; None means no limit.
    """

    def __init__(self, cost: CostModel, budget: int, max_pairs: int | None = None) -> None:
        self.cost = cost
        self.budget = budget
        self.max_pairs = max_pairs
        self._steps = 0
        self._step_s = 0.0
        self._queued: dict[int, QueuedRequest] = {}
        self._pairs: dict[object, UniquePair] = {}
        self._running: dict[int, tuple[PlannedStep, list[UniquePair]]] = {}
        self._again: deque[list[UniquePair]] = deque()
        self._order = FairOrder()
        self._fair, self._urgent = RequestQueue(by_tag), RequestQueue(by_deadline)
        self._start_by: list[Turn] = []
        self._deadlines: list[Turn] = []
        self._expired: list[int] = []
        self._waiting = [0, 0, 0]

    def submit(self, request: PairRequest, now: float) -> None:
        """Queue a request; it ends once: by cancel or as a value of finish, retry, fail, expire."""
        if not request.lengths or request.number in self._queued:
            raise ValueError(f"request {request.number} is empty or twice here. This is a bug.")
        queued = QueuedRequest(request, now)
        lengths = request.lengths
        wanted = sum(
            lengths[index]
            for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
            if self._add_pair(queued, index)
        )
        self._queued[request.number] = queued
        queued.tag = self._order.join(request.number, wanted, WEIGHTS[request.priority])
        self._fair.add(queued)
        if request.deadline is not None:
            heapq.heappush(self._deadlines, (request.deadline, request.number))
            self._watch_deadline(queued, request.deadline)

    def next_step(
        self, now: float, idle: int = 1, not_lost_by: int | None = None
    ) -> PlannedStep | None:
        """Form the next step for one of ``idle`` workers; None if no pair waits for it.

        Pairs that the worker ``not_lost_by`` was lost with are left for another.
        """
        self._drop_expired(now)
        pairs = self._repeated(not_lost_by) or self._by_turn(now, idle)
        return self._start(pairs) if pairs else None

    def finish(self, number: int, logits: FloatArray | Sequence[float]) -> list[Ended]:
        """Take the scores of a step; returns the requests that end: completed or failed."""
        _, pairs = self._running.pop(number)
        ended: list[Ended] = []
        for pair, logit in zip(pairs, map(float, logits), strict=True):
            if math.isfinite(logit):
                ended += self._score(pair, logit)
            else:
                ended += self._fail(pair, "not_finite", logit)
        return ended

    def retry(
        self, number: int, fault: Fault = "worker_lost", worker: int | None = None
    ) -> list[Ended]:
        """Queue the pairs of a failed step again, the pairs of each request in a step of their own.

        ``worker`` is the worker that was lost. Returns the requests whose pairs had their last
        attempt.
        """
        _, pairs = self._running.pop(number)
        ended: list[Ended] = []
        for pair in pairs:
            pair.attempts += 1
            pair.lost_by = worker
            if pair.attempts >= ATTEMPTS:
                ended += self._fail(pair, fault)
        left = [pair for pair in pairs if pair.attempts < ATTEMPTS]
        for _, group in groupby(left, lambda p: p.owners[0][0].number if p.owners else None):
            self._put_again(group)
        return ended

    def put_back(self, number: int) -> None:
        """Queue the pairs of a step that did not start or fit again, before all others."""
        _, pairs = self._running.pop(number)
        self._put_again(pairs)

    def fail(self, number: int, fault: Fault) -> list[Ended]:
        """Fail all requests that wait for a pair of a step."""
        _, pairs = self._running.pop(number)
        return [end for pair in pairs for end in self._fail(pair, fault)]

    def shorten(self, number: int, length: int) -> tuple[Place, ...]:
        """Queue the only pair of a step again, cut to ``length`` tokens.

        Returns the places that wait for it. Later requests get a pair of their own, not cut.
        """
        _, (pair,) = self._running.pop(number)
        self._forget(pair)
        pair.length = length
        self._put_again([pair])
        return tuple((queued.request.number, index) for queued, index in pair.owners)

    def cancel(self, number: int) -> bool:
        """Take out a request; returns whether it was still queued or running."""
        queued = self._queued.get(number)
        if queued is not None:
            self._end(queued)
        return queued is not None

    def expire(self, now: float) -> list[int]:
        """Take out the requests whose deadline has passed; returns each of them once."""
        self._drop_expired(now)
        expired, self._expired = self._expired, []
        return expired

    def load(self) -> QueueLoad:
        """The work that waits and runs."""
        pairs, tokens, squares = self._waiting
        oldest = next(iter(self._queued.values()), None)
        return QueueLoad(
            requests=len(self._queued),
            pairs=pairs,
            tokens=tokens,
            squares=squares,
            weight=self._order.weight,
            running_s=sum(step.predicted_s for step, _ in self._running.values()),
            budget=self.budget,
            oldest=None if oldest is None else oldest.arrived,
        )

    def next_completions(self, places: int, workers: int) -> list[CompletionEstimate]:
        """See :func:`echelon.scheduling.queue.next_completions`."""
        running = list(self._running.values())
        return next_completions(self._queued.values(), running, places, workers)

    # Taking requests in.

    def _add_pair(self, queued: QueuedRequest, index: int) -> bool:
        """Add a pair of a request; returns whether it is still to be counted in the fair order."""
        request = queued.request
        key = (request.number, index) if request.keys is None else request.keys[index]
        pair = self._pairs.get(key)
        if pair is None:
            pair = self._pairs[key] = UniquePair(key, request.lengths[index])
            self._count(pair, 1)
        known = bool(pair.owners) and pair.owners[-1][0] is queued
        pair.owners.append((queued, index))
        if not known:
            queued.pairs.append(pair)
            if pair.state is PairState.WAITING:
                queued.waiting.append(pair)
        return not pair.counted

    def _watch_deadline(self, queued: QueuedRequest, deadline: float) -> None:
        """Note from when on a request is urgent."""
        tokens = sum(pair.length for pair in queued.pairs)
        start_by = deadline - URGENCY * (self._step_s + self._seconds(tokens, len(queued.pairs)))
        heapq.heappush(self._start_by, (start_by, queued.request.number))

    def _seconds(self, tokens: int, pairs: int) -> float:
        return self.cost.seconds(
            Work(1 + tokens // self.budget, tokens, tokens * tokens // max(1, pairs))
        )

    # Forming a step.

    def _repeated(self, not_lost_by: int | None) -> list[UniquePair]:
        """Pairs of the next group that is scored again, as many as fit in one step."""
        groups = ([pair for pair in group if pair.owners] for group in self._again)
        self._again = deque(group for group in groups if group)
        for place, group in enumerate(self._again):
            if not_lost_by is not None and group[0].lost_by == not_lost_by:
                continue
            chosen = set(self._choose(group, self.budget))
            left = [pair for index, pair in enumerate(group) if index not in chosen]
            del self._again[place]
            if left:
                self._again.insert(place, left)
            return [pair for index, pair in enumerate(group) if index in chosen]
        return []

    def _by_turn(self, now: float, idle: int) -> list[UniquePair]:
        self._mark_urgent(now)
        count, tokens, _ = self._waiting
        budget = share(count, tokens, idle, self.budget, self._seconds)
        drawn = self._draw(budget)
        if not drawn:
            return []
        distinct = list(dict.fromkeys(pair for _, pair in drawn))
        taken = {distinct[index] for index in self._choose(distinct, budget)}
        for queued, pair in reversed(drawn):
            if pair not in taken:
                self._return(queued, pair)
        return [pair for pair in distinct if pair in taken]

    def _choose(self, pairs: list[UniquePair], budget: int) -> list[int]:
        lengths = [pair.length for pair in pairs]
        return choose(lengths, budget, self.max_pairs, self.cost.padding)

    def _mark_urgent(self, now: float) -> None:
        """Queue urgent requests by deadline too."""
        while self._start_by and self._start_by[0][0] <= now:
            _, number = heapq.heappop(self._start_by)
            queued = self._queued.get(int(number))
            if queued is not None and queued.waiting:
                queued.urgent = True
                self._urgent.add(queued)

    def _draw(self, budget: int) -> list[tuple[QueuedRequest, UniquePair]]:
        """Draw candidates in the order of their turn, more than fit in one step.

        The first candidate always goes. It is the first of the fair order, and in every other step
        the most urgent one, since a step may hold a single pair only.
        """
        drawn: list[tuple[QueuedRequest, UniquePair]] = []
        reach = REACH[self.cost.padding]
        max_pairs = math.inf if self.max_pairs is None else math.ceil(reach * self.max_pairs)
        half = URGENT_SHARE * budget
        tokens = 0
        if self._steps % 2 == 0:
            tokens += self._fair.draw(drawn, 1, 1)
        tokens += self._urgent.draw(drawn, half - tokens, max(1, max_pairs * URGENT_SHARE))
        tokens += self._fair.draw(drawn, reach * budget - tokens, max_pairs)
        return drawn

    def _return(self, queued: QueuedRequest, pair: UniquePair) -> None:
        """Give a candidate that was not chosen back to its request."""
        queued.waiting.appendleft(pair)
        self._fair.add(queued)
        if queued.urgent:
            self._urgent.add(queued)

    def _start(self, pairs: list[UniquePair]) -> PlannedStep:
        self._steps += 1
        lengths = tuple(pair.length for pair in pairs)
        owners = [pair.owners for pair in pairs]
        step = PlannedStep(
            number=self._steps,
            places=tuple((first[0][0].request.number, first[0][1]) for first in owners),
            lengths=lengths,
            requests=tuple(sorted({e.request.number for some in owners for e, _ in some})),
            tokens=sum(lengths),
            cost_tokens=step_cost(lengths, self.cost.padding),
            predicted_s=self.cost.predict(lengths),
            again=any(pair.counted for pair in pairs),
        )
        for pair in pairs:
            self._take(pair)
        self._running[step.number] = step, pairs
        self._step_s = step.predicted_s
        return step

    def _take(self, pair: UniquePair) -> None:
        pair.state = PairState.RUNNING
        self._count(pair, -1)
        if not pair.counted:
            pair.counted = True
            self._order.serve(pair.length * len(pair.owners))

    # Ending.

    def _score(self, pair: UniquePair, logit: float) -> list[Ended]:
        self._forget(pair)
        pair.state = PairState.GONE
        ended: list[Ended] = []
        for queued, index in pair.owners:
            queued.logits[index] = logit
            queued.left -= 1
            if queued.left == 0:
                ended.append(Completed(queued.request.number, queued.logits))
        for end in ended:
            self._end(self._queued[end.request])
        return ended

    def _fail(self, pair: UniquePair, fault: Fault, logit: float | None = None) -> list[Ended]:
        """End every request that waits for a pair, with its first place there."""
        self._forget(pair)
        pair.state = PairState.GONE
        places = {queued.request.number: index for queued, index in reversed(pair.owners)}
        for number in places:
            self._end(self._queued[number])
        return [
            FailedRequest(number, index, fault, logit) for number, index in sorted(places.items())
        ]

    def _put_again(self, pairs: Iterable[UniquePair]) -> None:
        group = []
        for pair in pairs:
            if pair.owners:
                pair.state = PairState.AGAIN
                self._count(pair, 1)
                group.append(pair)
            else:
                self._forget(pair)
        if group:
            self._again.append(group)

    def _end(self, queued: QueuedRequest) -> None:
        """Take a request out, with the pairs that no other request wants."""
        del self._queued[queued.request.number]
        queued.ended = True
        self._order.leave(queued.request.number)
        for pair in queued.pairs:
            pair.owners = [owner for owner in pair.owners if owner[0] is not queued]
            if not pair.owners and pair.state in QUEUED:
                pair.state = PairState.GONE
                self._count(pair, -1)
                self._forget(pair)
        if not self._queued:
            self._order = FairOrder()  # virtual time from zero stays exact
            for queue in (self._fair, self._urgent, self._again, self._start_by, self._deadlines):
                queue.clear()

    def _drop_expired(self, now: float) -> None:
        while self._deadlines and self._deadlines[0][0] <= now:
            _, number = heapq.heappop(self._deadlines)
            queued = self._queued.get(int(number))
            if queued is not None:
                self._end(queued)
                self._expired.append(int(number))

    def _forget(self, pair: UniquePair) -> None:
        """Do not share this pair with later requests."""
        if self._pairs.get(pair.key) is pair:
            del self._pairs[pair.key]

    def _count(self, pair: UniquePair, sign: int) -> None:
        for position, amount in enumerate((1, pair.length, pair.length**2)):
            self._waiting[position] += sign * amount
