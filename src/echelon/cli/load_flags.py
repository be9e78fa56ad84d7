"""Flags of a load and its service level, shared by plan, stress and tune --scenario."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from echelon.errors import InvalidInput
from echelon.server.settings import flag

if TYPE_CHECKING:
    from collections.abc import Iterator

    from echelon.server.settings import Flag
    from echelon.simulation.service_level import ServiceLevel
    from echelon.simulation.workload import ArrivalRecord, SizeDistribution, Workload

_FLAGS: dict[str, dict[str, Any]] = {
    "--slo-p99-ms": {"type": float, "help": "P99 latency goal"},
    "--rate": {"type": float, "help": "Requests a second"},
    "--arrivals": {
        "type": click.Choice(["poisson", "constant"]),
        "default": "poisson",
        "show_default": True,
        "help": "Random arrivals, as callers come, or equal intervals",
    },
    "--trace": {"help": "CSV of requests: timestamp,documents[,tokens]"},
    "--documents": {"help": "Documents of a request: N or LOW-HIGH"},
    "--tokens": {"help": "Tokens of a pair: N or LOW-HIGH"},
    "--seed": {"type": int, "default": 0, "help": "Seed of the requests"},
}


def load_flag(name: str, more: str = "", *, prefix: str = "", **changes: Any) -> Flag:
    """A flag of the load.

    Args:
        name: as in the table of flags.
        more: words after its help, such as a default.
        prefix: words before its help.
        **changes: other settings of the flag, such as its default.
    """
    settings = _FLAGS[name] | changes
    return flag(name, **settings | {"help": f"{prefix}{settings['help']}{more}."})


def level_of(values: dict[str, Any]) -> ServiceLevel | None:
    """The service level that the flags ask for; None where they give no latency."""
    from echelon.simulation.service_level import ServiceLevel

    goal_ms = values["slo_p99_ms"]
    if goal_ms is None:
        return None
    _above_zero("--slo-p99-ms", goal_ms, "Give milliseconds, such as 200.")
    return ServiceLevel(goal_ms / 1000)


def workload_of(values: dict[str, Any], *, streamed: bool = False) -> Workload:
    """The workload that the flags ask for.

    Args:
        values: rate, trace, arrivals, documents, tokens and seed; a command may lack some.
        streamed: read a trace anew each time instead of keeping it in memory.

    Raises:
        InvalidInput: a value is wrong, or there is neither a rate nor a trace.
    """
    from echelon.simulation.workload import ReplayedArrivals, Workload, arrivals_of

    rate, path = values["rate"], values["trace"]
    if rate is not None:
        _above_zero("--rate", rate, "Give requests a second, such as 5.")
    if rate is None and path is None:
        raise InvalidInput("--rate", "is not given", "Give requests a second, or --trace FILE.")
    if streamed and path is not None:
        arrivals: Any = ReplayedArrivals(TraceFile(path))
    else:
        arrivals = arrivals_of(rate, trace_of(values), even=values.get("arrivals") == "constant")
    documents, tokens = sizes_of_requests(values)
    if documents is None:
        raise InvalidInput("--documents", "is not given", "Give one such as 10 or 5-50.")
    return Workload(arrivals, documents, tokens, values["seed"])


def trace_of(values: dict[str, Any]) -> tuple[ArrivalRecord, ...]:
    """The recorded requests of ``--trace``; none without it."""
    return () if values["trace"] is None else tuple(read_trace(values["trace"]))


def sizes_of_requests(
    values: dict[str, Any],
) -> tuple[SizeDistribution | None, SizeDistribution | None]:
    """Documents of a request and tokens of a pair; None where the flag is not given."""
    from echelon.simulation.workload import sizes_of

    documents, tokens = values["documents"], values["tokens"]
    return (
        None if documents is None else sizes_of(documents, "--documents"),
        None if tokens is None else sizes_of(tokens, "--tokens"),
    )


def read_trace(path: str) -> Iterator[ArrivalRecord]:
    """Read the requests of a trace in CSV.

    Raises:
        InvalidInput: the file cannot be read, or a value in it is wrong.
    """
    from echelon.simulation.trace import parse_trace

    try:
        with Path(path).open(encoding="utf-8", newline="") as lines:
            yield from parse_trace(lines)
    except (OSError, UnicodeDecodeError) as error:
        problem = f"{path} cannot be read ({error})"
        raise InvalidInput("--trace", problem, "Give a CSV file in UTF-8.") from error


class TraceFile:
    """The requests of a trace file, read anew each time; checked once at the start."""

    def __init__(self, path: str) -> None:
        self._path = path
        for _ in self:
            pass

    def __iter__(self) -> Iterator[ArrivalRecord]:
        return read_trace(self._path)


def _above_zero(name: str, value: float, remedy: str) -> None:
    if not 0 < value < math.inf:
        raise InvalidInput(name, f"{value:g} is not above 0", remedy)
