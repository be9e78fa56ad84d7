"""Whether a machine still is as fast as when it was measured. Pure.

Single slow steps, or a busy minute, are no drift: only steps in a row say so, and as many take it
back. Between the two limits nothing changes, so that nobody is told the same again and again.
"""

from __future__ import annotations

import math
from typing import Literal

FAR, NEAR = 1.25, 1.10
"""Factors, either way, beyond which a machine has drifted and within which it has recovered: below
the first, predictions of a fit are as wrong without any drift."""

HOLD = 100
"""Steps in a row that it takes: seconds to a minute of work."""

SMOOTHING = 0.05
"""Share of each newer step in the ratio that is shown: it is that of the last twenty steps."""

News = Literal["drifted", "recovered"]


class Drift:
    """Watches the level of step times.

    Args:
        level: what is normal; None is what the first HOLD steps come to.

    Attributes:
        ratio: step times over what is normal, smoothed; 1 until that is known.
        drifted: whether it is told so.
    """

    def __init__(self, level: float | None = None) -> None:
        self.ratio = 1.0
        self.drifted = False
        self._normal = level
        self._seen = self._streak = 0

    def see(self, level: float) -> News | None:
        """A step has ended with the model at this level; the news, if that is some."""
        self._seen += 1
        if self._normal is None:
            if self._seen >= HOLD:
                self._normal = level
            return None
        off = math.log(level / self._normal)
        self.ratio = math.exp((1 - SMOOTHING) * math.log(self.ratio) + SMOOTHING * off)
        turned = abs(off) <= math.log(NEAR) if self.drifted else abs(off) > math.log(FAR)
        self._streak = self._streak + 1 if turned else 0
        if self._streak < HOLD:
            return None
        self._streak, self.drifted = 0, not self.drifted
        return "drifted" if self.drifted else "recovered"
