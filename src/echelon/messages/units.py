"""Numbers with their units, as reports, tables and errors write them. Pure."""

from __future__ import annotations

import math

from echelon.messages import tr

GIB = 2**30

SPACE = "\u00a0"
"""Between a number and its unit: no line may break there."""

UNKNOWN = "–"


def number(value: float) -> str:
    """Three significant digits with thousands separators, never an exponent."""
    if not math.isfinite(value):
        return tr("not a number")
    if value == 0:
        return "0"
    rounded = float(f"{value:.2e}")
    places = max(0, 2 - math.floor(math.log10(abs(rounded))))
    return f"{rounded:,.{places}f}".replace("-", "−")


def percent(share: float, places: int = 0) -> str:
    """A share of one in percent."""
    return f"{100 * share:.{places}f}{SPACE}%"


def duration(seconds: float) -> str:
    """Milliseconds below a second, else seconds."""
    if float(f"{seconds:.2e}") < 1:
        return f"{number(seconds * 1000)}{SPACE}ms"
    return f"{number(seconds)}{SPACE}s"


def size(count: float | None) -> str:
    """Bytes as GiB; a dash where they are not known."""
    return UNKNOWN if count is None else f"{number(round(count) / GIB)}{SPACE}GiB"
