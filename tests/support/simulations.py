"""What the tests of the simulators share: cost models, requests, and a service on a fake clock."""

from __future__ import annotations

import heapq
import itertools
from collections import deque

import numpy as np
from helpers import TEMPLATE
from hypothesis import strategies as st

from echelon.engine.admission_pipeline import AdmissionPipeline
from echelon.engine.dispatcher import Dispatcher
from echelon.engine.events import Listener, ServiceSettings
from echelon.engine.inflight import InflightRequest
from echelon.engine.supervisor import WorkerConfig, WorkerSupervisor
from echelon.engine.worker import StepResult
from echelon.errors import EchelonError
from echelon.models.base import FakeScorer
from echelon.scheduling.batcher import Batcher
from echelon.scheduling.cost_model import DEFAULT_COEFFICIENTS, Coefficients, CostModel
from echelon.simulation.workload import Arrival
from echelon.tokenization.pairs import encode_pairs
from echelon.types import RerankRequest

SPECIALS = TEMPLATE.specials
SIMPLE = CostModel(Coefficients(0.010, 0.001, 0.0))
"""Ten milliseconds a step and one a token: sums that can be done by heart."""

sizes = st.lists(st.integers(SPECIALS + 3, 60), min_size=1, max_size=6)


def cpu(cost="none") -> CostModel:
    return CostModel(DEFAULT_COEFFICIENTS["cpu"], cost)


def requests(*rows) -> list[Arrival]:
    """(time, tokens, tokens, …)."""
    return [Arrival(at_s, len(lengths), tuple(lengths)) for at_s, *lengths in rows]


@st.composite
def traces(draw):
    """Requests in bursts, no two things at one moment."""
    gaps = draw(st.lists(st.sampled_from([0.0001, 0.003, 0.02, 0.3]), max_size=12))
    times = np.cumsum([0.00013, *gaps]) + np.arange(len(gaps) + 1) * 1.7e-7
    return [Arrival(float(at), len(tokens := draw(sizes)), tuple(tokens)) for at in times]


class VirtualWorker:
    """A worker whose clock only runs while its supervisor waits for it; then requests come, too."""

    def __init__(self, truth, factors, scorer):
        self.now = 0.0
        self.scorer = scorer
        self.happenings: list = []
        self.leave = None
        self._truth = truth
        self._factors = factors
        self._sent: deque = deque()
        self._end = self._seconds = 0.0
        self._told = False

    def start(self, precision, *, sparing=False):
        return self.scorer.info

    def send(self, batch, patience_s):
        self._sent.append(batch)
        if len(self._sent) == 1:
            self._begin()

    def wait(self, timeout_s):
        if not self._sent:
            return self._idle()
        until = self.now + max(0.0, timeout_s)
        over = self._end <= until
        self._advance(self._end if over else until, inclusive=not over)
        return over

    def receive(self, timeout_s):
        self._advance(self._end, inclusive=False)
        batch, seconds = self._sent.popleft(), self._seconds
        if self._sent:
            self._begin()
        return StepResult(self.scorer.score(batch), seconds, 0)

    def kill(self):
        pass

    stop = release = kill

    def _begin(self):
        lengths = tuple(self._sent[0].lengths.tolist())
        self._seconds = self._truth.predict(lengths) * next(self._factors)
        self._end = self.now + self._seconds

    def _idle(self):
        """Let the next thing happen, and say so once."""
        self._told = not self._told
        if self._told:
            if self.happenings:
                self._advance(self.happenings[0][0], inclusive=True)
            else:
                self.end()
        return self._told

    def _advance(self, to, *, inclusive):
        while self.happenings and (
            self.happenings[0][0] < to or (inclusive and self.happenings[0][0] == to)
        ):
            self.now, _, _, happen = heapq.heappop(self.happenings)
            happen()
        self.now = to


def serve(trace, settings, cost="none"):
    """Serve a trace with the real admission, dispatcher and supervisor.

    Returns:
        The steps as (time, places, lengths), the outcome of each request, the answers' logits.
    """
    scorer = FakeScorer(padding=cost)
    worker = VirtualWorker(cpu(cost), settings.factors(), scorer)
    batcher = Batcher(CostModel(), 1, settings.max_pairs)
    steps = []
    form = batcher.next_step

    def next_step(now, *idle):
        step = form(now, *idle)
        if step is not None:
            steps.append((now, step.places, step.lengths))
        return step

    batcher.next_step = next_step
    dispatch = Dispatcher(batcher, Listener(), lambda: worker.now)
    dispatch.set_up(scorer.info, settings.token_budget, None, settings.goal_s)
    limits = ServiceSettings(bounds=settings.bounds)
    admission = AdmissionPipeline(None, limits, dispatch, lambda: 1)
    supervisor = WorkerSupervisor(
        0, worker, dispatch, WorkerConfig(), opened=lambda facts: [], started=lambda error: None
    )
    worker.end = supervisor.stop
    ends: dict = {}
    count = itertools.count()
    numbers = itertools.count(1)

    def arrive(arrival):
        deadline = None if settings.deadline_s is None else arrival.at_s + settings.deadline_s
        tokens, squares = sum(arrival.lengths), sum(length**2 for length in arrival.lengths)
        try:
            asked = RerankRequest([], deadline=deadline)
            admission._judge(asked, arrival.documents, tokens, squares)
        except EchelonError:
            ends[arrival.at_s] = "refused", None
            return
        inflight = InflightRequest(
            next(numbers), encoded(arrival), done(arrival.at_s), worker.now, deadline=deadline
        )
        dispatch.submit(inflight)
        if deadline is not None:
            happening(deadline, 0, lambda: dispatch.cancel(inflight.number) or expire(arrival.at_s))

    def done(at_s):
        def tell(answer):
            late = isinstance(answer, EchelonError)
            ends[at_s] = ("expired", None) if late else (worker.now, answer.logits)

        return tell

    def expire(at_s):
        ends.setdefault(at_s, ("expired", None))

    def happening(at_s, order, what):
        heapq.heappush(worker.happenings, (at_s, order, next(count), what))

    for arrival in trace:
        happening(arrival.at_s, 1, lambda arrival=arrival: arrive(arrival))
    supervisor.run()
    admission.close()
    return steps, ends


def encoded(arrival):
    """Pairs of the lengths asked for, no two of them the same."""
    query = np.array([7], dtype=np.int32)
    documents = [
        np.array([int(arrival.at_s * 1e7), index, *[9] * (length - SPECIALS - 3)], dtype=np.int32)
        for index, length in enumerate(arrival.lengths)
    ]
    pairs = encode_pairs(TEMPLATE, [query] * len(documents), documents, 512, "longest_first")
    assert tuple(pairs.lengths.tolist()) == arrival.lengths
    return pairs
