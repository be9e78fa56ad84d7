"""``echelon plan``. Imports click only."""

from __future__ import annotations

import contextlib
import json
import sys
from typing import TYPE_CHECKING, Any

import click

from echelon.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from echelon.simulation.capacity_plan import CapacityGoal
    from echelon.simulation.workload import KnownArrivals


@click.command()
@click.option("--slo-p99-ms", type=float, required=True, help="Latency that 99 % may have.")
@click.option("--rate", type=float, help="Requests a second [the trace's own].")
@click.option("--profile", required=True, help="Profile written by `echelon tune`.")
@click.option("--documents", default="10", show_default=True, help="Of a request: N or LOW-HIGH.")
@click.option("--tokens", help="Tokens of a pair: N or LOW-HIGH [as in the profile's texts].")
@click.option("--trace", help="CSV of requests: timestamp,documents[,tokens].")
@click.option(
    "--routing",
    type=click.Choice(["tokens", "requests", "random", "two"]),
    default="tokens",
    show_default=True,
    help="Which machine gets a request.",
)
@click.option("--workers", default=1, show_default=True, help="Scorers of a machine, e.g. cards.")
@click.option("--max-length", type=int, help="Tokens a pair may have [the profile's].")
@click.option("--memory-limit", type=float, metavar="MIB", help="Memory of a worker, in MiB.")
@click.option("--overhead-ms", default=2.0, show_default=True, help="HTTP and network a request.")
@click.option(
    "--headroom-percent", default=20.0, show_default=True, help="By which the rate may rise."
)
@click.option("--price-per-hour", type=float, help="Of a machine.")
@click.option(
    "--day", metavar="F,F,…", help="A day too: relative rates, --rate the largest; or 'typical'."
)
@click.option("--seed", default=0, show_default=True, help="Another seed, other traffic.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON (docs/PLAN.md).")
@click.option("--quiet", is_flag=True, help="No progress.")
def plan(*, profile: str, as_json: bool, quiet: bool, **values: Any) -> None:
    """Say how many machines a rate takes under a latency goal, by simulation.

    The profile says how fast a machine is; the simulation runs Echelon's own discipline.
    """
    from echelon.profile import Profile
    from echelon.simulation.capacity_plan import make_plan

    goal = _goal(**values)
    with _spinner(shown=not (quiet or as_json)) as told:
        found = make_plan(Profile.load(profile), goal, told)
    if as_json:
        click.echo(json.dumps(found, ensure_ascii=False, indent=2))
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
        slo_s=values.pop("slo_p99_ms") / 1000,
        documents=sizes_of(documents, "--documents"),
        tokens=None if tokens is None else sizes_of(tokens, "--tokens"),
        trace=() if trace is None else _read(trace),
        memory_limit_bytes=None if limit is None else limit * 2**20,
        overhead_s=values.pop("overhead_ms") / 1000,
        headroom=values.pop("headroom_percent") / 100,
        day=() if day is None else _shape(day),
        **values,
    )


def _read(trace: str) -> tuple[KnownArrivals, ...]:
    from echelon.simulation.workload import parse_trace

    try:
        with open(trace, encoding="utf-8", newline="") as lines:  # noqa: PTH123 - as csv wants it
            return tuple(parse_trace(lines))
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput("--trace", f"cannot be read ({error})", "Give a CSV file.") from error


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


@contextlib.contextmanager
def _spinner(*, shown: bool) -> Iterator[Callable[[str], None]]:
    """What is being done, on a terminal; elsewhere nothing."""
    if not (shown and sys.stderr.isatty()):
        yield lambda _: None
        return
    from rich.console import Console

    with Console(stderr=True).status("Simulating") as status:
        yield lambda doing: status.update(f"Simulating: {doing}")
