"""Round labels of a logarithmic axis, as data for plotly. Pure."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

FAR = 1000
"""Times apart beyond which only powers of ten have labels."""


def log_ticks(least: float, most: float, say: Callable[[float], str]) -> dict[str, Any]:
    """The axis from below ``least`` to above ``most``, both above 0."""
    digits = (1, 2, 5) if most < FAR * least else (1,)
    decades = range(math.floor(math.log10(least)), math.ceil(math.log10(most)) + 1)
    ticks = [digit * 10.0**decade for decade in decades for digit in digits]
    return {"type": "log", "tickvals": ticks, "ticktext": [say(tick) for tick in ticks]}
