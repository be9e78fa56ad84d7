"""What is remembered of memory trouble, so that the ladder is climbed once. Pure.

A process that has run for a while may have no room left for a pair that a fresh one has room for:
libraries keep what they compiled for each size of step (docs/LOG.md). So a lone pair is tried in a
fresh process before it is refused, but each request has only one such try, and none for a pair as
long as one that had no room there: a client that goes on sending what cannot fit restarts nothing.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from echelon.plan.degrade import Failure, next_action

if TYPE_CHECKING:
    from collections.abc import Collection

    from echelon.options import Allowance
    from echelon.plan.degrade import Action
    from echelon.plan.queue import Step
    from echelon.score.base import Facts


class Room:
    """Decides what to do about steps that did not fit.

    Args:
        allow: what may be given up when a pair alone does not fit.
    """

    def __init__(self, allow: tuple[Allowance, ...]) -> None:
        self._allow = allow
        self._unfit = math.inf  # tokens of the shortest pair that a fresh process had no room for

    def fitted(self, step: Step) -> None:
        """A step went well; if it held so long a pair, memory has become free."""
        if max(step.lengths) >= self._unfit:
            self._unfit = math.inf

    def lacked(
        self, step: Step, taken: Collection[str], facts: Facts, *, fresh: bool, renewable: bool
    ) -> Action:
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
        failure = Failure(
            pairs=len(step.places),
            cost=step.cost_tokens,
            longest=longest,
            caches_dropped="drop_caches" in taken,
            precision=facts.precision,
            allow=self._allow,
            fresh_may_do=renewable and longest < self._unfit and "fresh_worker" not in taken,
        )
        return next_action(failure)
