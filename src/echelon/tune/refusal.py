"""Where no setting holds the limits: why, and what is possible instead. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from echelon.errors import InvalidInput
from echelon.tune.lang import kept
from echelon.tune.words import duration, number, size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from echelon.tune.scenario import Limits, Tried


def impossible(tried: Sequence[Tried], limits: Limits, calm: float) -> InvalidInput:
    """Why none of the candidates can be chosen, and the remedy.

    Args:
        tried: all of them.
        limits: what they miss.
        calm: share of the load at which ``calm`` of each was simulated.
    """
    simulated = [one for one in tried if one.calm is not None]
    if simulated:
        return _too_much(simulated, limits, calm)
    agreeing = [one for one in tried if one.candidate.agreement >= limits.agreement]
    if not agreeing:
        best = max(one.candidate.agreement for one in tried)
        return InvalidInput(
            "--allow",
            kept(
                "no candidate ranks as fp32 does: the best agreement is {best}, {asked} is asked "
                "for",
                best=f"{best:.3f}",
                asked=f"{limits.agreement:.3f}",
            ),
            kept("Allow fp32 at full length."),
        )
    least = size(round(min(one.candidate.bytes for one in agreeing)))
    there = size(round(limits.memory_bytes or 0))
    return InvalidInput(
        "--memory-limit",
        kept("{there} hold none of the {count} settings", there=there, count=len(agreeing)),
        kept("Possible are {least} and more, a lower precision, or a smaller model.", least=least),
    )


def _too_much(simulated: Sequence[Tried], limits: Limits, calm: float) -> InvalidInput:
    bears = max(one.bears or 0.0 for one in simulated)
    calm_s = min(one.calm.p99_s for one in simulated if one.calm is not None)
    within = ""
    if limits.goal_s is not None:
        within = kept(" within {goal}", goal=duration(limits.goal_s))
    if bears:
        return InvalidInput(
            "--rate",
            kept(
                "{rate} requests/s cannot be answered{within} by this machine",
                rate=number(limits.rate or 0),
                within=within,
            ),
            kept(
                "Possible are {rate}; for more take more machines (`echelon plan`).",
                rate=number(bears),
            ),
        )
    return InvalidInput(
        "--slo-p99-ms",
        kept(
            "nothing is answered{within} by this machine: P99 is {p99} at {load} load",
            within=within,
            p99=duration(calm_s),
            load=f"{calm:.0%}",
        ),
        kept(
            "Possible are {least} and more, or fewer or shorter documents.",
            least=duration(1.25 * calm_s),
        ),
    )
