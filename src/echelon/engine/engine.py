"""Scores encoded pairs step by step in this process and recovers from lack of memory.

The engine owns the device: steps run one after another, and while a card computes one the call's
next one is begun; calls from several threads take turns step by step.
:mod:`echelon.scheduling.oom_policy` decides what to do when a step does not fit.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from echelon.engine.dispatcher import Dispatcher
from echelon.engine.events import Listener
from echelon.engine.inflight import InflightRequest, resolve
from echelon.engine.supervisor import WorkerConfig, WorkerSupervisor
from echelon.engine.worker import StepResult
from echelon.errors import EchelonError, InvalidInput, NonFiniteScore, OutOfMemory, ScoringFailed
from echelon.models.base import DeviceOutOfMemory, Scorer, start, step_did_not_fit
from echelon.scheduling.batcher import Batcher
from echelon.scheduling.cost_model import CostModel
from echelon.scheduling.oom_policy import OomPolicy, StepFailure
from echelon.scheduling.packing import NO_BUDGET, Step, pack, step_cost
from echelon.scheduling.token_budget import TokenBudget
from echelon.tokenization.pairs import EncodedPairs, TruncationImpossible
from echelon.types import Answer, LadderStep, ModelInfo, RunReport, TokenBatch, monotonic

if TYPE_CHECKING:
    from collections.abc import Callable

    from echelon.models.base import StartedStep
    from echelon.options import Allowance
    from echelon.types import FloatArray, IntArray

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StepLimits:
    """Limits of a step."""

    budget: int  # maximum tokens, padding included
    max_pairs: int | None = None  # None means no limit
    allow: tuple[Allowance, ...] = ()  # what may be given up when a pair alone does not fit


@dataclass(frozen=True, slots=True)
class EngineResult:
    """Result of one run, in the order of its pairs."""

    logits: FloatArray  # float32 [pairs]
    truncated_tokens: IntArray  # int32 [pairs], including what was cut for lack of memory
    report: RunReport


class Engine:
    """Runs encoded pairs through a scorer, which it owns.

    ``reopen`` opens the same model in another precision, if memory runs out; ``learned`` is that of
    :class:`echelon.scheduling.oom_policy.OomPolicy`. Calls that share steps use ``policy`` too.
    """

    def __init__(
        self,
        scorer: Scorer,
        limits: StepLimits,
        *,
        reopen: Callable[[str], Scorer] | None = None,
        learned: Callable[[int | None], None] | None = None,
    ) -> None:
        self.policy = OomPolicy(TokenBudget(NO_BUDGET), limits.budget, learned)
        self.reopened = 0  # times that the model was opened in another precision
        self._scorer = scorer
        self._limits = limits
        self._reopen = reopen
        self._open = True
        self._device = threading.Lock()

    @property
    def info(self) -> ModelInfo:
        """The model and the device of the scorer now in use."""
        return self._scorer.info

    @property
    def budget(self) -> int:
        """The token budget now in force: the limit, or less if memory was short."""
        return min(self.policy.budget.tokens, self._limits.budget)

    def run(
        self,
        pairs: EncodedPairs,
        *,
        limits: StepLimits | None = None,
        scored: Callable[[int], None] | None = None,
    ) -> EngineResult:
        """Score all pairs.

        Args:
            pairs: encoded pairs.
            limits: other limits for this call; the learned budget still holds.
            scored: called after each step with the number of pairs it finished.

        Raises:
            InvalidInput: the engine is closed.
            OutOfMemory: a pair does not fit alone, and nothing more may be given up.
            NonFiniteScore: the model gave NaN or infinity for a pair.
        """
        run = _CallState(pairs, limits or self._limits)
        self._plan(run)
        try:
            while run.steps:
                with self._device:
                    finished = self._step(run)
                if scored is not None and finished:
                    scored(finished)
        finally:
            self.policy.forget(run)
        return run.result()

    def step(self, batch: TokenBatch) -> FloatArray:
        """Score one step that the caller planned: float32 [pairs], raw logits.

        Raises:
            InvalidInput: the engine is closed.
            DeviceOutOfMemory: it did not fit; the caller must act.
        """
        with self._device:
            self._require_open()
            return self._scorer.score(batch)

    def release(self) -> None:
        """Give cached memory back to the device after :meth:`step` did not fit."""
        with self._device:
            if self._open:
                step_did_not_fit(self._scorer)

    def use_precision(self, precision: str) -> None:
        """Reopen the model in another precision, if the engine can reopen it."""
        with self._device:
            if self._open:
                self._switch(precision)

    def allowed(self, allow: tuple[Allowance, ...]) -> tuple[Allowance, ...]:
        """What of ``allow`` the engine can give up: precision only if it can reopen the model."""
        return tuple(name for name in allow if self._reopen or name != "precision")

    def close(self) -> None:
        """Close the scorer after the running step; closing twice does nothing."""
        with self._device:
            if self._open:
                self._open = False
                self._scorer.close()

    def _require_open(self) -> None:
        if not self._open:
            raise closed()

    def _plan(self, run: _CallState) -> None:
        run.plan(min(self.policy.budget.tokens, run.limits.budget), self.info)

    def _step(self, run: _CallState) -> int:
        """Run the next step; returns its number of pairs, or 0 if it did not fit."""
        self._require_open()
        step = run.steps[0]
        cost_tokens = step_cost(run.pairs.costs[step], self.info.padding)
        longest = int(run.pairs.lengths[step].max())
        try:
            logits = run.begun(self._scorer).result()
        except DeviceOutOfMemory as error:
            reason, crowded = str(error), error.crowded
        else:
            run.finish(step, logits, cost_tokens, self.info)
            if self.policy.fitted((run,), cost_tokens, longest) == "recovered":
                self._plan(run)
            return len(step)
        kinds = self.info.precision, self.allowed(run.limits.allow), self.info.lower_precision
        failure = StepFailure(len(step), cost_tokens, longest, *kinds, crowded=crowded)
        self._recover(run, step, failure, reason)  # not in the handler: the error holds tensors
        return 0

    def _recover(self, run: _CallState, step: Step, failure: StepFailure, reason: str) -> None:
        action = self.policy.failed(failure, (run,))
        step_did_not_fit(self._scorer)
        if action.rung == "give_up":
            raise OutOfMemory(
                f"{run.name(step[0])} of {failure.longest} tokens does not fit in the memory of "
                f"{self.info.device} even alone ({reason.splitlines()[0]}). {action.remedy}"
            )
        logger.warning("Out of memory: %s. %s", action.detail, action.remedy)
        run.ladder.append(LadderStep(action.rung, action.detail, action.remedy))
        if action.precision is not None:
            self._switch(action.precision)
        if action.max_length is not None:
            run.shorten(action.max_length)
        self._plan(run)

    def _switch(self, precision: str) -> None:
        if self._reopen is not None:
            self._open = False
            self.reopened += 1
            self._scorer.close()
            self._scorer = self._reopen(precision)
            self._open = True


def closed() -> InvalidInput:
    """The error for a call after closing."""
    return InvalidInput("reranker", "it is closed", "Make a new one.")


class _CallState:
    """One call's pairs: which are done, and which steps are left."""

    def __init__(self, pairs: EncodedPairs, limits: StepLimits) -> None:
        self.pairs = pairs
        self.limits = limits
        self.steps: deque[Step] = deque()
        self.ladder: list[LadderStep] = []
        self._done = np.zeros(len(pairs), dtype=np.bool_)
        self._logits = np.full(len(pairs), np.nan, dtype=np.float32)
        self._truncated = pairs.truncated_tokens
        self._tokens = self._cost_tokens = self._steps_done = 0
        self._ahead: tuple[Scorer, StartedStep] | None = None

    def plan(self, budget: int, info: ModelInfo) -> None:
        """Plan the steps of the pairs that are not finished."""
        left, most = np.flatnonzero(~self._done), self.limits.max_pairs
        steps = pack(self.pairs.costs[left], budget, padding=info.padding, max_pairs=most)
        self.steps = deque(left[step].tolist() for step in steps)
        self._ahead = None  # a step of the old plan; its scores are not asked for

    def begun(self, scorer: Scorer) -> StartedStep:
        """The next step, begun, and where the scorer can do that the one after it too."""
        # Another call may have opened the model in another precision meanwhile.
        ahead = self._ahead if self._ahead is not None and self._ahead[0] is scorer else None
        self._ahead = None
        now = start(scorer, self.pairs.batch(self.steps[0])) if ahead is None else ahead[1]
        if len(self.steps) > 1:
            # What is wrong with that step is said in its turn.
            with suppress(DeviceOutOfMemory, EchelonError):
                self._ahead = scorer, start(scorer, self.pairs.batch(self.steps[1]))
        return now

    def finish(self, step: Step, logits: FloatArray, cost_tokens: int, info: ModelInfo) -> None:
        """Keep a step's scores."""
        bad = np.flatnonzero(~np.isfinite(logits))
        if len(bad):
            raise NonFiniteScore(
                f"{self.name(step[bad[0]])}: the model gave {logits[bad[0]]} in "
                f"{info.precision}. Use precision='bf16' or 'fp32', whose range is wider; if it "
                "persists, the weights are damaged."
            )
        self.steps.popleft()
        self._done[step] = True
        self._logits[step] = logits
        self._tokens += int(self.pairs.lengths[step].sum())
        self._cost_tokens += cost_tokens
        self._steps_done += 1

    def shorten(self, max_length: int) -> None:
        """Cut the pairs that are not finished."""
        left = np.flatnonzero(~self._done)
        try:
            self.pairs = self.pairs.shortened(max_length, left.tolist())
        except TruncationImpossible as error:
            raise InvalidInput(
                f"pairs[{error.index}].query",
                f"its {error.query_tokens} tokens leave no room in max_length={max_length}, to "
                "which memory pressure had to cut",
                "Free memory, shorten the query, or use truncation='longest_first'.",
            ) from None
        self._truncated[left] = self.pairs.truncated_tokens[left]

    def name(self, index: int) -> str:
        """Name of a pair in the caller's numbering."""
        return f"pairs[{self.pairs.places[index]}]"

    def result(self) -> EngineResult:
        """The finished run."""
        report = RunReport(
            pairs=len(self._logits),
            scored=len(self._logits),
            tokens=self._tokens,
            cost_tokens=self._cost_tokens,
            steps=self._steps_done,
            ladder=tuple(self.ladder),
        )
        return EngineResult(self._logits, self._truncated, report)


class LocalWorker:
    """An engine of this process as a :class:`echelon.engine.worker.Worker`."""

    renewable = False

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._steps: deque[TokenBatch] = deque()

    def start(self, precision: str, *, sparing: bool = False) -> ModelInfo:
        """Open the model in a precision, unless it is open in it."""
        del sparing
        if precision not in {"auto", self._engine.info.precision}:
            self._engine.use_precision(precision)
        return self._engine.info

    def send(self, batch: TokenBatch, timeout_s: float) -> None:
        """Keep a step until :meth:`receive` scores it."""
        del timeout_s
        self._steps.append(batch)

    def wait(self, timeout_s: float) -> bool:
        """Whether there is a step to score."""
        del timeout_s
        return bool(self._steps)

    def receive(self, timeout_s: float) -> StepResult:
        """Score the next step in this thread; an unknown error is the cause of ScoringFailed."""
        del timeout_s
        batch, began = self._steps.popleft(), monotonic()
        try:
            logits = self._engine.step(batch)
        except (DeviceOutOfMemory, EchelonError):
            raise
        except Exception as error:
            raise ScoringFailed(f"{type(error).__name__}: {error}") from error
        return StepResult(logits, monotonic() - began, 0)

    def release(self) -> None:
        """Give cached memory back."""
        self._engine.release()

    def kill(self) -> None:
        """Do nothing: there is no process."""

    def stop(self) -> None:
        """Do nothing: the engine belongs to its reranker."""


class SharedEngine:
    """Scores the pairs of many calls at once; ``engine`` scores the steps and stays open.

    One thread scores for all calls in the order and by the rules of a service, but in this process
    and without admission control: a library call is never refused.
    """

    def __init__(self, engine: Engine, limits: StepLimits) -> None:
        info = engine.info
        batcher = Batcher(CostModel(padding=info.padding), limits.budget, limits.max_pairs)
        self._dispatcher = Dispatcher(
            batcher, Listener(), monotonic, engine.allowed(limits.allow), policy=engine.policy
        )
        self._numbers = itertools.count(1)
        self._supervisor = WorkerSupervisor(
            0,
            LocalWorker(engine),
            self._dispatcher,
            WorkerConfig(info.precision),
            opened=lambda _: (),
            started=lambda _: None,
        )
        self._supervisor.start()

    async def score(self, pairs: EncodedPairs) -> Answer:
        """Score pairs; cancelling the awaiting task takes them out of the queue.

        Raises:
            EchelonError: a pair cannot be scored.
            Exception: what the scorer raised, other than lack of memory.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Answer | EchelonError] = loop.create_future()
        request = InflightRequest(
            next(self._numbers), pairs, partial(resolve, loop, future), monotonic()
        )
        self._dispatcher.submit(request)
        try:
            answer = await future
        except asyncio.CancelledError:
            self._dispatcher.cancel(request.number)
            raise
        if isinstance(answer, ScoringFailed) and answer.__cause__ is not None:
            raise answer.__cause__
        if isinstance(answer, EchelonError):
            raise answer
        return answer

    def close(self) -> None:
        """End the thread after the running step and fail the calls that still wait."""
        self._dispatcher.close()
        self._supervisor.join()
