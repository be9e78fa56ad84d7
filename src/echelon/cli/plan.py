"""``echelon plan``: how many machines a load needs, by simulation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from echelon.cli.flags import (
    LANG_FLAG,
    Command,
    example,
    level_of,
    load_flag,
    print_json,
    quiet_flag,
    with_flags,
    workload_of,
)
from echelon.errors import InvalidInput
from echelon.messages import tr
from echelon.progress import status
from echelon.server.settings import flag

if TYPE_CHECKING:
    from echelon.simulation.capacity_plan import CapacityGoal


@click.command(
    cls=Command,
    epilog=example("echelon plan --rate 500 --slo-p99-ms 400 --profile echelon-profile.json"),
)
@with_flags(
    load_flag("--slo-p99-ms", required=True),
    load_flag("--rate", " [the trace's own]"),
    load_flag("--documents", default="10"),
    load_flag("--tokens", " [as in the profile's texts]"),
    load_flag("--trace"),
    flag(
        "--day",
        metavar="F,F,…",
        help="Plan a day too: relative rates, of which --rate is the largest; or 'typical'.",
    ),
    load_flag("--seed"),
    group="Load and goal",
)
@with_flags(
    flag("--profile", required=True, help="Profile written by `echelon tune`."),
    flag(
        "--routing",
        type=click.Choice(["tokens", "requests", "random", "two"]),
        default="tokens",
        help="Which machine gets a request.",
    ),
    flag("--workers", default=1, help="Workers of a machine, e.g. GPUs."),
    flag("--max-length", type=int, help="Maximum tokens of a pair [the profile's]."),
    flag("--memory-limit", type=float, metavar="MIB", help="Memory of a worker, in MiB."),
    flag("--overhead-ms", default=2.0, help="HTTP and network per request."),
    flag("--headroom-percent", default=20.0, help="Reserve: how much the rate may rise."),
    flag("--price-per-hour", type=float, help="Price of a machine."),
    group="Machines",
)
@with_flags(
    flag("--json", "as_json", is_flag=True, help="Print JSON (docs/PLAN.md)."),
    quiet_flag("No progress."),
    LANG_FLAG,
    group="Output",
)
def plan(*, profile: str, as_json: bool, quiet: bool, **values: Any) -> None:
    """Compute how many machines a rate needs under a latency goal, by simulation.

    The profile gives the speed of a machine; the simulation runs Echelon's own batcher.
    """
    from echelon.profile import Profile
    from echelon.simulation.capacity_plan import make_plan

    goal = _goal(values)
    with status(tr("Simulating"), shown=not (quiet or as_json)) as on_progress:
        found = make_plan(Profile.load(profile), goal, on_progress)
    if as_json:
        print_json(found)
        return
    from echelon.reports.tables import print_plan

    print_plan(found)


def _goal(values: dict[str, Any]) -> CapacityGoal:
    from echelon.simulation.capacity_plan import CapacityGoal
    from echelon.simulation.service_level import ServiceLevel

    limit, day = values["memory_limit"], values["day"]
    return CapacityGoal(
        level=level_of(values) or ServiceLevel(),
        workload=workload_of(values),
        routing=values["routing"],
        workers=values["workers"],
        max_length=values["max_length"],
        memory_limit_bytes=None if limit is None else limit * 2**20,
        overhead_s=values["overhead_ms"] / 1000,
        headroom=values["headroom_percent"] / 100,
        price_per_hour=values["price_per_hour"],
        day=() if day is None else _shape(day),
    )


def _shape(day: str) -> tuple[float, ...]:
    from echelon.simulation.capacity import TYPICAL, rates_of

    if day == "typical":
        return TYPICAL
    try:
        shape = tuple(float(part) for part in day.split(","))
    except ValueError:
        problem = tr("{value} is no list of numbers", value=repr(day))
        remedy = tr("Give factors such as 0.2,0.5,1, or typical.")
        raise InvalidInput("--day", problem, remedy) from None
    rates_of(shape, 1.0)
    return shape
