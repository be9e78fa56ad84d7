"""The batcher: which waiting pairs of which requests go through the model next.

Pure and deterministic: time is an argument, the same calls give the same steps. It must not know
texts, devices or threads; whoever drives it (server, async API, simulator) executes what it says.
The discipline and its reasons are in docs/decisions/0007-batcher.md:

1. Work-conserving: where anything waits, :meth:`Batcher.next_step` gives a step; there is no timer.
2. Requests take turns in the fair order of :mod:`echelon.scheduling.fair_queue`; the first in it
is in every
   step, so a short request behind a long one is in the very next.
3. Requests whose deadline is in danger may have half of a step, earliest deadline first.
4. A pair that several requests wait for is scored once.
5. What nobody wants any more, cancelled or past its deadline, is not scored.
6. A step that did not end well goes first, and not together with anybody else's pairs.

Its capacity is not bounded here: :mod:`echelon.scheduling.admission` decides who comes in.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from itertools import groupby
from typing import TYPE_CHECKING

from echelon.scheduling.cost_model import Work
from echelon.scheduling.fair_queue import WEIGHTS, FairOrder
from echelon.scheduling.packing import REACH, choose, share, step_cost
from echelon.scheduling.queue import (
    Completed,
    FailedRequest,
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

HASTE = 3.0
"""A deadline is in danger when the time left is less than this many times what the request takes
alone. Half of each step is certain to those in danger, so twice is needed; the rest is
room for what else comes and for a wrong prediction."""

HASTE_SHARE = 0.5
"""Share of a step that goes by deadline before the fair order has its turn again."""

ATTEMPTS = 2
"""How often a pair may be in a step that loses its worker: a pair that kills two would kill all."""


class Batcher:
    """The waiting pairs of all requests, and the steps under way.

    Args:
        cost: predicts step times; it also says how the scorer pays.
        budget: most tokens a step may cost; a pair that alone costs more gets a step to itself.
        max_pairs: most pairs a step may hold; None means no limit.
    """

    def __init__(self, cost: CostModel, budget: int, max_pairs: int | None = None) -> None:
        self.cost = cost
        self.budget = budget
        self.max_pairs = max_pairs
        self._steps = 0
        self._step_s = 0.0
        self._entries: dict[int, QueuedRequest] = {}
        self._units: dict[object, UniquePair] = {}
        self._running: dict[int, tuple[PlannedStep, list[UniquePair]]] = {}
        self._again: deque[list[UniquePair]] = deque()
        self._order = FairOrder()
        self._fair, self._haste = RequestQueue(by_tag), RequestQueue(by_deadline)
        self._start_by: list[Turn] = []
        self._deadlines: list[Turn] = []
        self._expired: list[int] = []
        self._waiting = [0, 0, 0]

    def submit(self, request: PairRequest, now: float) -> None:
        """Take a request in; from now on it ends exactly once.

        It ends as a value of :meth:`finish`, :meth:`retry` or :meth:`fail`, of :meth:`expire`, or
        by :meth:`cancel`.
        """
        if not request.lengths or request.number in self._entries:
            raise ValueError(f"request {request.number} is empty or twice here. This is a bug.")
        entry = QueuedRequest(request, now)
        lengths = request.lengths
        wanted = sum(
            lengths[index]
            for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
            if self._want(entry, index)
        )
        self._entries[request.number] = entry
        entry.tag = self._order.join(request.number, wanted, WEIGHTS[request.priority])
        self._fair.add(entry)
        if request.deadline is not None:
            heapq.heappush(self._deadlines, (request.deadline, request.number))
            self._watch(entry, request.deadline)

    def next_step(self, now: float, idle: int = 1) -> PlannedStep | None:
        """Form the next step, for one of ``idle`` workers; None where nothing waits."""
        self._drop_expired(now)
        units = self._repeated() or self._by_turn(now, idle)
        return self._start(units) if units else None

    def finish(self, number: int, logits: FloatArray | Sequence[float]) -> list[Ended]:
        """A step's scores.

        Returns:
            The requests that have all their scores now, and those whose own pair got none.
        """
        _, units = self._running.pop(number)
        ended: list[Ended] = []
        for unit, logit in zip(units, map(float, logits), strict=True):
            if math.isfinite(logit):
                ended += self._score(unit, logit)
            else:
                ended += self._break(unit, "not_finite", logit)
        return ended

    def retry(self, number: int, fault: Fault = "worker_lost") -> list[Ended]:
        """A step did not end well: its pairs go again, each request's on their own.

        Returns:
            The requests whose pairs had their last attempt.
        """
        _, units = self._running.pop(number)
        ended: list[Ended] = []
        for unit in units:
            unit.attempts += 1
            if unit.attempts >= ATTEMPTS:
                ended += self._break(unit, fault)
        left = [unit for unit in units if unit.attempts < ATTEMPTS]
        for _, group in groupby(left, key=lambda unit: unit.first_owner):
            self._put_again(group)
        return ended

    def put_back(self, number: int) -> None:
        """A step is taken back through no fault of its pairs: it is formed anew, and first.

        It never started, or memory asked for smaller steps.
        """
        _, units = self._running.pop(number)
        self._put_again(units)

    def fail(self, number: int, fault: Fault) -> list[Ended]:
        """A step can never be scored: everyone who waits for a pair of it is told."""
        _, units = self._running.pop(number)
        return [end for unit in units for end in self._break(unit, fault)]

    def shorten(self, number: int, length: int) -> tuple[Place, ...]:
        """The only pair of a step was cut to ``length`` tokens, and goes again.

        Returns:
            All who wait for it. Nobody else joins them: their pair would not be this one.
        """
        _, (unit,) = self._running.pop(number)
        self._forget(unit)
        unit.length = length
        self._put_again([unit])
        return tuple((entry.request.number, index) for entry, index in unit.owners)

    def cancel(self, number: int) -> bool:
        """The caller has gone; whether the request was still here."""
        entry = self._entries.get(number)
        if entry is not None:
            self._end(entry)
        return entry is not None

    def expire(self, now: float) -> list[int]:
        """The requests whose deadline has passed since the last call, each of them once."""
        self._drop_expired(now)
        expired, self._expired = self._expired, []
        return expired

    def load(self) -> QueueLoad:
        """What lies ahead."""
        pairs, tokens, squares = self._waiting
        oldest = next(iter(self._entries.values()), None)
        return QueueLoad(
            requests=len(self._entries),
            pairs=pairs,
            tokens=tokens,
            squares=squares,
            weight=self._order.weight,
            running_s=sum(step.predicted_s for step, _ in self._running.values()),
            budget=self.budget,
            oldest=None if oldest is None else oldest.came,
        )

    def next_completions(self, places: int, workers: int) -> list[CompletionEstimate]:
        """The next requests to end; see :func:`echelon.scheduling.queue.next_completions`."""
        return next_completions(
            self._entries.values(), list(self._running.values()), places, workers
        )

    # Taking requests in.

    def _want(self, entry: QueuedRequest, index: int) -> bool:
        """Note who wants a pair; whether its turn is still to come."""
        request = entry.request
        key = (request.number, index) if request.keys is None else request.keys[index]
        unit = self._units.get(key)
        if unit is None:
            unit = self._units[key] = UniquePair(key, request.lengths[index])
            self._count(unit, 1)
        known = bool(unit.owners) and unit.owners[-1][0] is entry
        unit.owners.append((entry, index))
        if not known:
            entry.units.append(unit)
            if unit.state is PairState.WAITING:
                entry.waiting.append(unit)
        return not unit.counted

    def _watch(self, entry: QueuedRequest, deadline: float) -> None:
        """Note when a request's deadline will be in danger."""
        tokens = sum(unit.length for unit in entry.units)
        start_by = deadline - HASTE * (self._step_s + self._seconds(tokens, len(entry.units)))
        heapq.heappush(self._start_by, (start_by, entry.request.number))

    def _seconds(self, tokens: int, pairs: int) -> float:
        return self.cost.seconds(
            Work(1 + tokens // self.budget, tokens, tokens * tokens // max(1, pairs))
        )

    # Forming a step.

    def _repeated(self) -> list[UniquePair]:
        """What the next group that goes again makes of one step."""
        while self._again:
            group = [unit for unit in self._again.popleft() if unit.owners]
            if not group:
                continue
            chosen = set(self._choose(group, self.budget))
            left = [unit for index, unit in enumerate(group) if index not in chosen]
            if left:
                self._again.appendleft(left)
            return [unit for index, unit in enumerate(group) if index in chosen]
        return []

    def _by_turn(self, now: float, idle: int) -> list[UniquePair]:
        self._hurry(now)
        pairs, tokens, _ = self._waiting
        budget = share(pairs, tokens, idle, self.budget, self._seconds)
        drawn = self._draw(budget)
        if not drawn:
            return []
        distinct = list(dict.fromkeys(unit for _, unit in drawn))
        taken = {distinct[index] for index in self._choose(distinct, budget)}
        for entry, unit in reversed(drawn):
            if unit not in taken:
                self._return(entry, unit)
        return [unit for unit in distinct if unit in taken]

    def _choose(self, units: list[UniquePair], budget: int) -> list[int]:
        lengths = [unit.length for unit in units]
        return choose(lengths, budget, self.max_pairs, self.cost.padding)

    def _hurry(self, now: float) -> None:
        """Let the requests whose deadline is in danger queue by deadline too."""
        while self._start_by and self._start_by[0][0] <= now:
            _, number = heapq.heappop(self._start_by)
            entry = self._entries.get(int(number))
            if entry is not None and entry.waiting:
                entry.hasty = True
                self._haste.add(entry)

    def _draw(self, budget: int) -> list[tuple[QueuedRequest, UniquePair]]:
        """Candidates in the order of their turn, more than one step's worth.

        Who is first is sure to go. It is the first in the fair order, and in every other step the
        one in most haste: a step may have room for a single pair.
        """
        drawn: list[tuple[QueuedRequest, UniquePair]] = []
        reach = REACH[self.cost.padding]
        most = math.inf if self.max_pairs is None else math.ceil(reach * self.max_pairs)
        half = HASTE_SHARE * budget
        tokens = 0
        if self._steps % 2 == 0:
            tokens += self._fair.draw(drawn, 1, 1)
        tokens += self._haste.draw(drawn, half - tokens, max(1, most * HASTE_SHARE))
        tokens += self._fair.draw(drawn, reach * budget - tokens, most)
        return drawn

    def _return(self, entry: QueuedRequest, unit: UniquePair) -> None:
        """Give a candidate that was not taken back to the request it was drawn from."""
        entry.waiting.appendleft(unit)
        self._fair.add(entry)
        if entry.hasty:
            self._haste.add(entry)

    def _start(self, units: list[UniquePair]) -> PlannedStep:
        self._steps += 1
        lengths = tuple(unit.length for unit in units)
        owners = [unit.owners for unit in units]
        step = PlannedStep(
            number=self._steps,
            places=tuple((first[0][0].request.number, first[0][1]) for first in owners),
            lengths=lengths,
            requests=tuple(sorted({e.request.number for some in owners for e, _ in some})),
            tokens=sum(lengths),
            cost_tokens=step_cost(lengths, self.cost.padding),
            predicted_s=self.cost.predict(lengths),
            again=any(unit.counted for unit in units),
        )
        for unit in units:
            self._take(unit)
        self._running[step.number] = step, units
        self._step_s = step.predicted_s
        return step

    def _take(self, unit: UniquePair) -> None:
        unit.state = PairState.RUNNING
        self._count(unit, -1)
        if not unit.counted:
            unit.counted = True
            self._order.serve(unit.length * len(unit.owners))

    # Ending.

    def _score(self, unit: UniquePair, logit: float) -> list[Ended]:
        self._forget(unit)
        unit.state = PairState.GONE
        ended: list[Ended] = []
        for entry, index in unit.owners:
            entry.logits[index] = logit
            entry.left -= 1
            if entry.left == 0:
                ended.append(Completed(entry.request.number, entry.logits))
        for end in ended:
            self._end(self._entries[end.request])
        return ended

    def _break(self, unit: UniquePair, fault: Fault, logit: float | None = None) -> list[Ended]:
        """End every request that waits for a pair, naming its first place there."""
        self._forget(unit)
        unit.state = PairState.GONE
        places = {entry.request.number: index for entry, index in reversed(unit.owners)}
        for number in places:
            self._end(self._entries[number])
        return [
            FailedRequest(number, index, fault, logit) for number, index in sorted(places.items())
        ]

    def _put_again(self, units: Iterable[UniquePair]) -> None:
        group = []
        for unit in units:
            if unit.owners:
                unit.state = PairState.AGAIN
                self._count(unit, 1)
                group.append(unit)
            else:
                self._forget(unit)
        if group:
            self._again.append(group)

    def _end(self, entry: QueuedRequest) -> None:
        """Take a request out; pairs that nobody else wants go with it."""
        del self._entries[entry.request.number]
        entry.ended = True
        self._order.leave(entry.request.number)
        for unit in entry.units:
            unit.owners = [owner for owner in unit.owners if owner[0] is not entry]
            if not unit.owners and unit.state in {PairState.WAITING, PairState.AGAIN}:
                unit.state = PairState.GONE
                self._count(unit, -1)
                self._forget(unit)
        if not self._entries:
            self._rest()

    def _rest(self) -> None:
        """Nobody waits: begin anew, with nothing left over."""
        self._order = FairOrder()  # from zero: virtual time stays small enough to be exact
        for queue in (self._fair, self._haste, self._again, self._start_by, self._deadlines):
            queue.clear()

    def _drop_expired(self, now: float) -> None:
        while self._deadlines and self._deadlines[0][0] <= now:
            _, number = heapq.heappop(self._deadlines)
            entry = self._entries.get(int(number))
            if entry is not None:
                self._end(entry)
                self._expired.append(int(number))

    def _forget(self, unit: UniquePair) -> None:
        """Let the next who wants this pair have one of its own."""
        if self._units.get(unit.key) is unit:
            del self._units[unit.key]

    def _count(self, unit: UniquePair, sign: int) -> None:
        for position, amount in enumerate((1, unit.length, unit.length**2)):
            self._waiting[position] += sign * amount
