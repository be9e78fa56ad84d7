"""Drift: whether a machine is still as fast as when it was measured. Pure.

Single slow steps or a busy minute are no drift: it takes many steps in a row, and as many end it.
Two limits keep the state from flapping.
"""

from __future__ import annotations

import math
from typing import Literal

FAR, NEAR = 1.25, 1.10
"""Factors, faster or slower, beyond which a machine has drifted and within which it has recovered.
Below the first, predictions of a fit are as wrong without drift."""

HOLD = 100
"""Steps in a row that change the state: seconds to a minute of work."""

SMOOTHING = 0.05
"""Weight of the newest step in the shown ratio, which follows the last twenty steps."""

Change = Literal["drifted", "recovered"]


class Drift:
    """Watches the level of step times.

    Args:
        level: the normal level; None takes the level after the first HOLD steps.

    Attributes:
        ratio: smoothed step times over normal ones; 1 until the normal level is known.
        drifted: whether the machine has drifted.
    """

    def __init__(self, level: float | None = None) -> None:
        self.ratio = 1.0
        self.drifted = False
        self._normal = level
        self._seen = self._streak = 0

    def see(self, level: float) -> Change | None:
        """Take the cost model's level after a step; returns the change of state, if any."""
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
