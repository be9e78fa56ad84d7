"""``echelon plan``: how many machines a load needs, by simulation."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import click

from echelon.cli.flags import print_json, read_trace, with_flags
from echelon.errors import InvalidInput
from echelon.progress import status
from echelon.server.settings import flag

if TYPE_CHECKING:
    from echelon.simulation.capacity_plan import CapacityGoal
    from echelon.simulation.service_level import ServiceLevel


@click.command()
@with_flags(
    flag("--slo-p99-ms", type=float, required=True, help="P99 latency goal."),
    flag("--rate", type=float, help="Requests a second [the trace's own]."),
    flag("--profile", required=True, help="Profile written by `echelon tune`."),
    flag("--documents", default="10", show_default=True, help="Of a request: N or LOW-HIGH."),
    flag("--tokens", help="Tokens of a pair: N or LOW-HIGH [as in the profile's texts]."),
    flag("--trace", help="CSV of requests: timestamp,documents[,tokens]."),
    flag(
        "--routing",
        type=click.Choice(["tokens", "requests", "random", "two"]),
        default="tokens",
        show_default=True,
        help="Which machine gets a request.",
    ),
    flag("--workers", default=1, show_default=True, help="Workers of a machine, e.g. GPUs."),
    flag("--max-length", type=int, help="Maximum tokens of a pair [the profile's]."),
    flag("--memory-limit", type=float, metavar="MIB", help="Memory of a worker, in MiB."),
    flag("--overhead-ms", default=2.0, show_default=True, help="HTTP and network per request."),
    flag(
        "--headroom-percent",
        default=20.0,
        show_default=True,
        help="Reserve: how much the rate may rise.",
    ),
    flag("--price-per-hour", type=float, help="Price of a machine."),
    flag(
        "--day",
        metavar="F,F,…",
        help="Plan a day too: relative rates, of which --rate is the largest; or 'typical'.",
    ),
    flag("--seed", default=0, show_default=True, help="Seed of the simulated traffic."),
    flag("--json", "as_json", is_flag=True, help="Print JSON (docs/PLAN.md)."),
    flag("--quiet", is_flag=True, help="No progress."),
)
def plan(*, profile: str, as_json: bool, quiet: bool, **values: Any) -> None:
    """Compute how many machines a rate needs under a latency goal, by simulation.

    The profile gives the speed of a machine; the simulation runs Echelon's own batcher.
    """
    from echelon.profile import Profile
    from echelon.simulation.capacity_plan import make_plan

    goal = _goal(**values)
    with status("Simulating", shown=not (quiet or as_json)) as on_progress:
        found = make_plan(Profile.load(profile), goal, on_progress)
    if as_json:
        print_json(found)
        return
    from echelon.reports.tables import print_plan

    print_plan(found)


def _goal(
    *, documents: str, tokens: str | None, trace: str | None, day: str | None, **values: Any
) -> CapacityGoal:
    from echelon.simulation.capacity_plan import CapacityGoal
    from echelon.simulation.workload import sizes_of

    limit = values.pop("memory_limit")
    return CapacityGoal(
        level=_level(values.pop("slo_p99_ms")),
        documents=sizes_of(documents, "--documents"),
        tokens=None if tokens is None else sizes_of(tokens, "--tokens"),
        trace=() if trace is None else tuple(read_trace(trace)),
        memory_limit_bytes=None if limit is None else limit * 2**20,
        overhead_s=values.pop("overhead_ms") / 1000,
        headroom=values.pop("headroom_percent") / 100,
        day=() if day is None else _shape(day),
        **values,
    )


def _level(goal_ms: float) -> ServiceLevel:
    from echelon.simulation.service_level import ServiceLevel

    if not 0 < goal_ms < math.inf:
        problem = f"{goal_ms:g} is not above 0"
        raise InvalidInput("--slo-p99-ms", problem, "Give milliseconds, such as 200.")
    return ServiceLevel(goal_ms / 1000)


def _shape(day: str) -> tuple[float, ...]:
    from echelon.simulation.capacity import TYPICAL, rates_of

    if day == "typical":
        return TYPICAL
    try:
        shape = tuple(float(part) for part in day.split(","))
    except ValueError:
        raise InvalidInput(
            "--day", f"{day!r} is no list of numbers", "Give factors such as 0.2,0.5,1, or typical."
        ) from None
    rates_of(shape, 1.0)
    return shape
