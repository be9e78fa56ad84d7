"""The memory ladder: what to do when a step does not fit, least harm first.

Pure: it is told what failed and answers what to try; the engine acts. The rungs are the table
:data:`RUNGS`, in order; the first that applies is taken.

What is remembered of memory trouble, so that the ladder is climbed once. Pure.

A process that has run for a while may have no room left for a pair that a fresh one has room for:
libraries keep what they compiled for each size of step (docs/LOG.md). So a lone pair is tried in a
fresh process before it is refused, but each request has only one such try, and none for a pair as
long as one that had no room there: a client that goes on sending what cannot fit restarts nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from echelon.options import Allowance
    from echelon.scheduling.queue import PlannedStep
    from echelon.types import ModelInfo

SHORTEST_MAX_LENGTH = 64
"""Tokens below which cutting documents further would leave nothing worth scoring."""

LOWER_PRECISION = {"fp32": "bf16"}
"""The next precision down; half-width formats have none yet."""

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
    """A step that did not fit.

    Attributes:
        pairs: pairs in it.
        cost: tokens it was paid for.
        longest: tokens of its longest pair.
        caches_dropped: the caches have been dropped for this step, or one of its requests, already.
        precision: the scorer's precision.
        allow: what the user allowed to be given up.
        fresh_may_do: a fresh process can be had, and may have room that this one has not.
    """

    pairs: int
    cost: int
    longest: int
    caches_dropped: bool
    precision: str
    allow: tuple[Allowance, ...] = ()
    fresh_may_do: bool = False


@dataclass(frozen=True, slots=True)
class OomAction:
    """What to try next.

    Attributes:
        rung: its name.
        detail: what changes, in words.
        remedy: what the user can do so that it need not happen again.
        budget: the token budget from now on (``halve_budget``, ``one_pair``).
        precision: the precision to reopen in (``lower_precision``).
        max_length: the limit for the pairs still to score (``shorten``).
    """

    rung: Rung
    detail: str
    remedy: str
    budget: int | None = None
    precision: str | None = None
    max_length: int | None = None


def _drop_caches(failure: StepFailure) -> OomAction | None:
    if failure.caches_dropped:
        return None
    return OomAction(
        "drop_caches",
        f"dropped caches and retried a step of {failure.cost} tokens",
        "Leave the device more free memory, or set a smaller token_budget.",
    )


def _halve_budget(failure: StepFailure) -> OomAction | None:
    budget = failure.cost // 2
    if failure.pairs == 1 or budget <= failure.longest:
        return None
    return OomAction(
        "halve_budget",
        f"token budget {failure.cost} -> {budget}",
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
    if not failure.fresh_may_do:
        return None
    return OomAction(
        "fresh_worker",
        f"a fresh process for a pair of {failure.longest} tokens",
        "Leave the device more free memory, or set a smaller token_budget.",
    )


def _lower_precision(failure: StepFailure) -> OomAction | None:
    lower = LOWER_PRECISION.get(failure.precision)
    if "precision" not in failure.allow or lower is None:
        return None
    return OomAction(
        "lower_precision",
        f"precision {failure.precision} -> {lower}",
        f"Set precision={lower!r} from the start, or free memory.",
        precision=lower,
    )


def _shorten(failure: StepFailure) -> OomAction | None:
    shorter = failure.longest // 2
    if "max_length" not in failure.allow or shorter < SHORTEST_MAX_LENGTH:
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


class OomPolicy:
    """Decides what to do about steps that did not fit.

    Args:
        allow: what may be given up when a pair alone does not fit.
    """

    def __init__(self, allow: tuple[Allowance, ...]) -> None:
        self._allow = allow
        self._unfit = math.inf  # tokens of the shortest pair that a fresh process had no room for

    def fitted(self, step: PlannedStep) -> None:
        """A step went well; if it held so long a pair, memory has become free."""
        if max(step.lengths) >= self._unfit:
            self._unfit = math.inf

    def lacked(
        self,
        step: PlannedStep,
        taken: Collection[str],
        facts: ModelInfo,
        *,
        fresh: bool,
        renewable: bool,
    ) -> OomAction:
        """A step did not fit.

        Args:
            step: it.
            taken: rungs that its requests went through.
            facts: the scorer's.
            fresh: it was the first step of its process.
            renewable: its process can be replaced.

        Returns:
            What to try next.
        """
        longest = max(step.lengths)
        if fresh and len(step.places) == 1:
            self._unfit = min(self._unfit, longest)
        failure = StepFailure(
            pairs=len(step.places),
            cost=step.cost_tokens,
            longest=longest,
            caches_dropped="drop_caches" in taken,
            precision=facts.precision,
            allow=self._allow,
            fresh_may_do=renewable and longest < self._unfit and "fresh_worker" not in taken,
        )
        return next_action(failure)
