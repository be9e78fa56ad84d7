"""The engine: takes encoded pairs through a scorer, step by step, and stays up.

It owns the device: one step runs at a time, calls from several threads take turns step by step.
It acts on the memory ladder; :mod:`echelon.scheduling.oom_policy` decides.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from echelon.errors import InvalidInput, NonFiniteScore, OutOfMemory
from echelon.models.base import DeviceOutOfMemory
from echelon.scheduling.oom_policy import StepFailure, next_action
from echelon.scheduling.packing import NO_BUDGET, Step, pack, step_cost
from echelon.types import LadderStep, RunReport

if TYPE_CHECKING:
    from collections.abc import Callable

    from echelon.models.base import Scorer
    from echelon.options import Allowance
    from echelon.scheduling.oom_policy import OomAction
    from echelon.tokenization.pairs import EncodedPairs
    from echelon.types import FloatArray, IntArray, ModelInfo, TokenBatch

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StepLimits:
    """What a step may be.

    Attributes:
        budget: most tokens a step may cost.
        max_pairs: most pairs a step may hold; None means no limit.
        allow: what may be given up when a pair alone does not fit.
    """

    budget: int
    max_pairs: int | None = None
    allow: tuple[Allowance, ...] = ()


@dataclass(frozen=True, slots=True)
class EngineResult:
    """Result of one run, in the order of its pairs.

    Attributes:
        logits: float32 [pairs].
        truncated_tokens: int32 [pairs], what the ladder cut included.
        report: how it went.
    """

    logits: FloatArray
    truncated_tokens: IntArray
    report: RunReport


class Engine:
    """Runs encoded pairs through a scorer.

    Args:
        scorer: the model; the engine closes it.
        limits: what a step may be.
        reopen: opens the same model in another precision, for the ladder.
        learned: called with the new token budget each time memory teaches a smaller one.
    """

    def __init__(
        self,
        scorer: Scorer,
        limits: StepLimits,
        *,
        reopen: Callable[[str], Scorer] | None = None,
        learned: Callable[[int], None] | None = None,
    ) -> None:
        self._scorer = scorer
        self._limits = limits
        self._reopen = reopen
        self._learned = learned
        self._learned_budget = NO_BUDGET
        self._open = True
        self._device = threading.Lock()

    @property
    def info(self) -> ModelInfo:
        """Facts of the scorer now in use."""
        return self._scorer.info

    @property
    def budget(self) -> int:
        """The token budget now in force; memory pressure lowers it for good."""
        return min(self._learned_budget, self._limits.budget)

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
            scored: called after each step with the pairs it finished.

        Raises:
            InvalidInput: the engine is closed.
            OutOfMemory: a pair does not fit alone, and nothing more may be given up.
            NonFiniteScore: the model gave NaN or infinity for a pair.
        """
        run = _CallState(pairs, limits or self._limits)
        run.plan(self._ceiling(run), self.info)
        while run.steps:
            with self._device:
                self._step(run)
            if scored is not None and run.last_finished:
                scored(run.last_finished)
        return run.outcome()

    def step(self, batch: TokenBatch) -> FloatArray:
        """Score one step that somebody else planned, between the steps of :meth:`run`.

        Returns:
            float32 [pairs], raw logits.

        Raises:
            InvalidInput: the engine is closed.
            DeviceOutOfMemory: it did not fit; nothing was done about it.
        """
        with self._device:
            if not self._open:
                raise closed()
            return self._scorer.score(batch)

    def release(self) -> None:
        """Give cached memory back to the device."""
        with self._device:
            if self._open:
                self._scorer.release()

    def use_precision(self, precision: str) -> None:
        """Open the model in another precision, where it is known how."""
        with self._device:
            if self._open:
                self._switch(precision)

    def learn(self, budget: int) -> None:
        """Keep a smaller token budget that memory taught."""
        self._learned_budget = min(self._learned_budget, budget)
        if self._learned is not None:
            self._learned(self._learned_budget)

    def close(self) -> None:
        """Close the scorer once the step under way has ended; closing twice does nothing."""
        with self._device:
            if self._open:
                self._close_scorer()

    def _close_scorer(self) -> None:
        self._open = False
        self._scorer.close()

    def _ceiling(self, run: _CallState) -> int:
        return min(self._learned_budget, run.limits.budget)

    def _step(self, run: _CallState) -> None:
        """Run the next step; on memory trouble change the plan instead."""
        if not self._open:
            raise closed()
        step = run.steps[0]
        run.last_finished = 0
        try:
            logits = self._scorer.score(run.pairs.batch(step))
        except DeviceOutOfMemory as error:
            reason = str(error)
        else:
            run.finish(step, logits, self.info)
            return
        self._give_way(run, step, reason)

    def _give_way(self, run: _CallState, step: Step, reason: str) -> None:
        lengths = run.pairs.lengths[step]
        failure = StepFailure(
            pairs=len(step),
            cost=step_cost(lengths, self.info.padding),
            longest=int(lengths.max()),
            caches_dropped=run.caches_dropped,
            precision=self.info.precision,
            allow=run.limits.allow if self._reopen else _without_precision(run.limits.allow),
        )
        action = next_action(failure)
        if action.rung == "give_up":
            raise OutOfMemory(
                f"{run.name(step[0])} of {failure.longest} tokens does not fit in the memory of "
                f"{self.info.device} even alone ({reason.splitlines()[0]}). {action.remedy}"
            )
        logger.warning("Out of memory: %s. %s", action.detail, action.remedy)
        run.ladder.append(LadderStep(action.rung, action.detail, action.remedy))
        self._act(action, run)

    def _act(self, action: OomAction, run: _CallState) -> None:
        self._scorer.release()
        run.caches_dropped = True
        if action.budget is not None:
            self.learn(action.budget)
        if action.precision is not None:
            self._switch(action.precision)
        if action.max_length is not None:
            run.shorten(action.max_length)
        run.plan(self._ceiling(run), self.info)

    def _switch(self, precision: str) -> None:
        if self._reopen is not None:
            self._close_scorer()
            self._scorer = self._reopen(precision)
            self._open = True


def closed() -> InvalidInput:
    """The error for a call that comes after closing."""
    return InvalidInput("reranker", "it is closed", "Make a new one.")


def _without_precision(allow: tuple[Allowance, ...]) -> tuple[Allowance, ...]:
    return tuple(name for name in allow if name != "precision")


class _CallState:
    """One call's pairs: which are done, which steps are left."""

    def __init__(self, pairs: EncodedPairs, limits: StepLimits) -> None:
        self.pairs = pairs
        self.limits = limits
        self.steps: deque[Step] = deque()
        self.ladder: list[LadderStep] = []
        self.last_finished = 0
        self.caches_dropped = False
        self._done = np.zeros(len(pairs), dtype=np.bool_)
        self._logits = np.full(len(pairs), np.nan, dtype=np.float32)
        self._truncated = pairs.truncated_tokens
        self._tokens = self._cost = self._steps_done = 0

    def plan(self, budget: int, facts: ModelInfo) -> None:
        """(Re)plan the pairs that are not finished."""
        left = np.flatnonzero(~self._done)
        steps = pack(
            self.pairs.lengths[left],
            budget,
            padding=facts.padding,
            max_pairs=self.limits.max_pairs,
        )
        self.steps = deque(left[step].tolist() for step in steps)

    def finish(self, step: Step, logits: FloatArray, facts: ModelInfo) -> None:
        """Keep a step's scores."""
        bad = np.flatnonzero(~np.isfinite(logits))
        if len(bad):
            raise NonFiniteScore(
                f"{self.name(step[bad[0]])}: the model gave {logits[bad[0]]} in "
                f"{facts.precision}. Use precision='bf16' or 'fp32', whose range is wider; if it "
                "persists, the weights are damaged."
            )
        self.steps.popleft()
        self.caches_dropped = False
        self._done[step] = True
        self._logits[step] = logits
        lengths = self.pairs.lengths[step]
        self._tokens += int(lengths.sum())
        self._cost += step_cost(lengths, facts.padding)
        self._steps_done += 1
        self.last_finished = len(step)

    def shorten(self, max_length: int) -> None:
        """Cut the pairs that are not finished."""
        from echelon.tokenization.pairs import TruncationImpossible

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
        """What the caller knows a pair by."""
        return f"pairs[{self.pairs.places[index]}]"

    def outcome(self) -> EngineResult:
        """The finished run."""
        report = RunReport(
            pairs=len(self._logits),
            scored=len(self._logits),
            tokens=self._tokens,
            cost_tokens=self._cost,
            steps=self._steps_done,
            ladder=tuple(self.ladder),
        )
        return EngineResult(self._logits, self._truncated, report)
