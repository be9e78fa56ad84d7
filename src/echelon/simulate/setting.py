"""How a simulated service runs. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from echelon.errors import InvalidInput
from echelon.scheduling.admission import AdmissionLimits

if TYPE_CHECKING:
    from collections.abc import Iterator

BLOCK = 1024
"""Random numbers drawn at a time."""


@dataclass(frozen=True, slots=True)
class Setting:
    """A service.

    Attributes:
        token_budget: most tokens a step may cost.
        max_pairs: most pairs a step may hold.
        workers: scorers that share the queue.
        bounds: what is taken in at most.
        deadline_s: seconds after which nobody wants an answer; None means never.
        goal_s: latency goal that steps are kept small for, as ``echelon serve --slo-p99-ms`` does.
        request_s: seconds of a request beside tokenising and steps: reading, answering.
        document_s: seconds that tokenising a document takes.
        noise: standard deviation of the logarithm of actual over predicted step time.
        learns: the batcher learns from each step how long steps take, as a server's does.
        seed: of the noise, and of routing.
    """

    token_budget: int
    max_pairs: int | None = None
    workers: int = 1
    bounds: AdmissionLimits = field(default_factory=AdmissionLimits)
    deadline_s: float | None = None
    goal_s: float | None = None
    request_s: float = 0.0
    document_s: float = 0.0
    noise: float = 0.0
    learns: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("token_budget", "max_pairs", "workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidInput(name, f"{value} is not positive", "Give 1 or more.")
        for name in ("deadline_s", "goal_s"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InvalidInput(name, f"{value} is not positive", "Give seconds.")
        for name in ("request_s", "document_s", "noise"):
            if not 0 <= getattr(self, name) < np.inf:
                raise InvalidInput(name, f"{getattr(self, name)} is below 0", "Give 0 or more.")

    def factors(self) -> Iterator[float]:
        """Actual over predicted time of one step after another, for ever."""
        random = np.random.default_rng(self.seed)
        while True:
            if self.noise:
                # A mean of one: noise makes steps vary, not longer.
                drawn = random.lognormal(-(self.noise**2) / 2, self.noise, BLOCK)
                yield from drawn.tolist()
            else:
                yield 1.0
