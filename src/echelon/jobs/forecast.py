"""How long a job has left, from the cost model and what windows really took. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from echelon.scheduling.cost_model import DEFAULT_COEFFICIENTS, CostModel, Work, work_of

if TYPE_CHECKING:
    from collections.abc import Sequence


class Forecast:
    """Foresees the end of a job.

    The rest of a file is taken to be like what was read: so much of it, so much work. The cost
    model says what work takes; its correction follows the last windows, so that a machine that
    became slower, or a run that was resumed, does not spoil the estimate.

    Args:
        share: how much of the input was done when this run began, 0 to 1.
    """

    def __init__(self, share: float = 0.0) -> None:
        self._began = self._share = share
        self._model = CostModel(DEFAULT_COEFFICIENTS["cpu"])
        self._done = Work(0, 0, 0)

    def done(self, tokens: Sequence[int], seconds: float, share: float | None) -> None:
        """A window was scored.

        Args:
            tokens: estimated tokens of each of its pairs.
            seconds: what it took.
            share: how much of the input is done now; None where nobody knows.
        """
        self._model.observe(tokens, seconds)
        work = work_of(tokens, "ragged")
        self._done = Work(
            self._done.steps + work.steps,
            self._done.tokens + work.tokens,
            self._done.squares + work.squares,
        )
        self._share = share or self._share

    def left_s(self) -> float | None:
        """Seconds until the end; None while nothing is known."""
        read = self._share - self._began
        if read <= 0:
            return None
        return self._model.seconds(self._done) * (1.0 - self._share) / read
