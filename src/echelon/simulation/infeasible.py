"""Errors for goals that cannot be reached: the flag, the limit, and what is possible. Pure.

`echelon plan` and `echelon tune --scenario` raise them alike.
"""

from __future__ import annotations

from echelon.errors import InvalidInput
from echelon.messages import Message
from echelon.messages.units import duration, number, size

LATENCY_MARGIN = 1.25
"""Factor on a simulated P99: it is named as possible, so it has to hold with other requests too."""


def latency_too_short(problem: str, p99_s: float, remedy: str | None = None) -> InvalidInput:
    """No setting answers within the latency of the service level.

    Args:
        problem: what was tried and how it missed.
        p99_s: the shortest P99 that was found.
        remedy: what is possible besides a longer latency; None names fewer and shorter documents.
    """
    least = duration(LATENCY_MARGIN * p99_s)
    if remedy is None:
        return InvalidInput(
            "--slo-p99-ms", problem, Message("scenario.goal_possible", {"least": least})
        )
    return InvalidInput("--slo-p99-ms", problem, f"Possible are {least} or more, {remedy}.")


def rate_too_high(rate: float, possible: float, latency_s: float | None) -> InvalidInput:
    """This machine answers fewer requests a second within the latency."""
    return InvalidInput(
        "--rate",
        Message("scenario.rate_too_high", {"rate": number(rate), "within": within(latency_s)}),
        Message("scenario.rate_possible", {"rate": number(possible)}),
    )


def within(latency_s: float | None) -> str:
    """The part of a sentence that names the latency; empty without one."""
    return Message("scenario.within", {"goal": duration(latency_s)}) if latency_s else ""


def memory_too_small(problem: str, needed_bytes: float) -> InvalidInput:
    """No setting fits into the memory.

    Args:
        problem: what does not fit.
        needed_bytes: the memory that the smallest setting needs.
    """
    least = size(needed_bytes)
    return InvalidInput(
        "--memory-limit", problem, Message("scenario.memory_possible", {"least": least})
    )


def pairs_too_long(asked: int, limit: int) -> InvalidInput:
    """Pairs are longer, in tokens, than the model takes."""
    return InvalidInput(
        "--tokens",
        f"{asked} are more than the {limit} that a pair may have here",
        f"Give at most {limit}: the rest would be cut, or is read in chunks that count as "
        "documents of their own (--documents).",
    )


def ranking_differs(best: float, asked: float) -> InvalidInput:
    """No setting's rank agreement with fp32 is high enough."""
    values = {"best": f"{best:.3f}", "asked": f"{asked:.3f}"}
    return InvalidInput(
        "--allow", Message("scenario.no_agreement", values), Message("scenario.allow_fp32")
    )
