"""``echelon stress``. Imports click only; what it needs is loaded when it runs."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from echelon.errors import GoalMissed, InvalidInput
from echelon.flags import Flag, with_flags
from echelon.options import require_packages

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from echelon.loadtest.result import LoadTestResult
    from echelon.loadtest.run import FoundRate, LoadTestPlan, LoadTestRun, RateBisection, Told
    from echelon.simulation.workload import KnownArrivals

KEY = "ECHELON_API_KEY"

PACKAGES = ("aiohttp", "hdrh")

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells give it."""

LEAST_REQUESTS = 10
"""A probe of fewer requests says nothing of a rate."""

_LOAD_FLAGS: tuple[Flag, ...] = (
    (("--rate",), {"type": float, "help": "Requests a second [1]; where --find-max begins."}),
    (
        ("--arrivals",),
        {
            "type": click.Choice(["poisson", "constant"]),
            "default": "poisson",
            "show_default": True,
            "help": "By chance, as callers come, or at even distances.",
        },
    ),
    (("--trace",), {"help": "Replay a CSV file: timestamp,documents[,tokens]."}),
    (("--clients",), {"type": int, "help": "Closed loop instead: so many ask in turn."}),
    (("--find-max",), {"is_flag": True, "help": "Search the highest rate that holds the goal."}),
    (("--max-rate",), {"type": float, "help": "Where --find-max stops [nowhere]."}),
    (("--slo-p99-ms",), {"type": float, "help": "The goal: P99 of the latency."}),
    (("--duration-s",), {"type": float, "help": "Seconds that count [30; a trace: to its end]."}),
    (
        ("--warmup-s",),
        {
            "type": float,
            "default": 5.0,
            "show_default": True,
            "help": "Seconds before that do not.",
        },
    ),
)

_REQUEST_FLAGS: tuple[Flag, ...] = (
    (("--dialect",), {"default": "cohere", "show_default": True, "help": "API that it speaks."}),
    (("--path",), {"help": "Path of the route [the dialect's]."}),
    (("--model",), {"help": "What requests call the model [usual for the dialect]."}),
    (
        ("--documents",),
        {"default": "10", "show_default": True, "help": "Documents a request: 10 or 5-50."},
    ),
    (("--tokens",), {"help": "Tokens a pair, about: 128 or 50-400 [texts as they are]."}),
    (("--data",), {"help": "Your own queries and documents, JSONL [built-in texts]."}),
    (("--same-texts",), {"is_flag": True, "help": "Do not make each request's texts its own."}),
    (("--seed",), {"type": int, "default": 0, "help": "Another one gives other requests."}),
    (("--header",), {"multiple": True, "help": f"'Name: value' to send; see also {KEY}."}),
    (
        ("--timeout-ms",),
        {"type": float, "default": 10_000.0, "show_default": True, "help": "Longest wait."},
    ),
    (("--max-connections",), {"type": int, "help": "Connections at once [as many as needed]."}),
)

_OUTPUT_FLAGS: tuple[Flag, ...] = (
    (("--json", "as_json"), {"is_flag": True, "help": "Print JSON."}),
    (("--html",), {"help": "Write a page with charts to this file."}),
    (("--quiet",), {"is_flag": True, "help": "No progress and no table."}),
)


@click.command()
@click.argument("url", metavar="URL")
@with_flags(_LOAD_FLAGS, _REQUEST_FLAGS, _OUTPUT_FLAGS)
def stress(*, url: str, as_json: bool, html: str | None, quiet: bool, **values: Any) -> None:
    """Test the reranking server at URL under load, Echelon or any other.

    Requests are sent when they are due, whatever the server does, and latency counts from then.
    Exit code 8 says that the goal of --slo-p99-ms was missed. An API key is taken from the
    environment variable ECHELON_API_KEY.
    """
    require_packages("echelon stress", "stress", PACKAGES)
    _check(values)
    plan, data = _plan(url, values)
    shown = not quiet and not as_json
    result = _tested(plan, data, values, shown=shown)
    _show(result, as_json=as_json, shown=shown)
    if html is not None:
        from echelon.loadtest.page import write_page

        write_page(result, html)
        if shown:
            click.echo(f"\nPage: {html}", err=True)
    if result.interrupted:
        click.echo("echelon: Interrupted; above is what was measured until then.", err=True)
        sys.exit(INTERRUPTED)
    if plan.goal is not None and not result.held:
        from echelon.loadtest.result import verdict

        raise GoalMissed(verdict(result))


_ALONE = (
    ("trace", ("rate", "clients", "find_max")),
    ("clients", ("rate", "find_max")),
)
"""Options that cannot be given together."""


def _check(values: dict[str, Any]) -> None:
    for name, others in _ALONE:
        for other in others:
            if values[name] is not None and values[other] not in {None, False}:
                raise InvalidInput(_option(name), f"is given with {_option(other)}", "Give one.")
    if values["find_max"] and values["slo_p99_ms"] is None:
        raise InvalidInput("--find-max", "has no goal", "Give --slo-p99-ms, such as 300.")
    if values["max_rate"] is not None and not values["find_max"]:
        raise InvalidInput("--max-rate", "is for --find-max", "Give --rate instead.")
    for name in ("slo_p99_ms", "timeout_ms", "max_connections", "rate", "max_rate"):
        if values[name] is not None and not 0 < values[name] < float("inf"):
            raise InvalidInput(_option(name), f"{values[name]} is not above 0", "Give a number.")
    goal_ms = values["slo_p99_ms"]
    if goal_ms is not None and goal_ms > values["timeout_ms"]:
        problem = f"{goal_ms:g} is longer than --timeout-ms {values['timeout_ms']:g}"
        raise InvalidInput("--slo-p99-ms", problem, "Raise --timeout-ms.")


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _plan(url: str, values: dict[str, Any]) -> tuple[LoadTestPlan, str]:
    from echelon.data import load_texts
    from echelon.loadtest.client import Target, route_of, shape_of
    from echelon.loadtest.run import LoadTestPlan
    from echelon.loadtest.summary import LatencyGoal
    from echelon.simulation.workload import sizes_of

    shape = shape_of(values["dialect"])
    texts = load_texts(values["data"], None if values["data"] else "en")
    target = Target(
        route_of(url, shape, values["path"]),
        shape,
        values["model"],
        _headers(values["header"]),
        values["timeout_ms"] / 1000,
        values["max_connections"] or 0,
    )
    trace = None if values["trace"] is None else TraceFile(values["trace"])
    default_s = 30.0 if trace is None else None
    goal_ms, tokens = values["slo_p99_ms"], values["tokens"]
    plan = LoadTestPlan(
        target=target,
        topics=texts.topics,
        documents=sizes_of(values["documents"], "--documents"),
        tokens=None if tokens is None else sizes_of(tokens, "--tokens"),
        rate=values["rate"] or 1.0,
        even=values["arrivals"] == "constant",
        trace=trace,
        clients=values["clients"],
        warmup_s=values["warmup_s"],
        duration_s=default_s if values["duration_s"] is None else values["duration_s"],
        goal=None if goal_ms is None else LatencyGoal(goal_ms / 1000),
        marked=not values["same_texts"],
        seed=values["seed"],
    )
    return plan, texts.name


class TraceFile:
    """The requests of a trace on disk, read anew each time; checked once at the start."""

    def __init__(self, path: str) -> None:
        self._path = path
        for _ in self:
            pass

    def __iter__(self) -> Iterator[KnownArrivals]:
        from echelon.simulation.workload import parse_trace

        try:
            with Path(self._path).open(encoding="utf-8", newline="") as lines:
                yield from parse_trace(lines)
        except (OSError, UnicodeDecodeError) as error:
            problem = f"{self._path} cannot be read ({error})"
            raise InvalidInput("--trace", problem, "Give a CSV file in UTF-8.") from error


def _headers(given: Iterable[str]) -> dict[str, str]:
    """What is sent with each request; messages never repeat a value, which may be a secret."""
    headers = {}
    key = os.environ.get(KEY)
    if key:
        headers["Authorization"] = f"Bearer {key}"
    for text in given:
        name, colon, value = text.partition(":")
        if not colon or not name.strip() or not text.isprintable() or " " in name.strip():
            raise InvalidInput("--header", "one is not 'Name: value'", "Such as 'X-Team: search'.")
        headers[name.strip()] = value.strip()
    return headers


def _tested(
    plan: LoadTestPlan, data: str, values: dict[str, Any], *, shown: bool
) -> LoadTestResult:
    import asyncio
    from datetime import UTC, datetime

    from echelon.loadtest.result import LoadTestResult
    from echelon.loadtest.run import RateBisection

    search = None
    if values["find_max"]:
        least = LEAST_REQUESTS / (plan.duration_s or 1.0)
        begin = max(1.0, least) if values["rate"] is None else plan.rate
        search = RateBisection(begin, values["max_rate"] or float("inf"), least)
    with _bar(shown=shown) as (told, say):
        try:
            run, found = asyncio.run(_run(plan, search, told, say))
        except asyncio.CancelledError:
            raise KeyboardInterrupt from None
    created = datetime.now(UTC).isoformat(timespec="seconds")
    if found is not None:
        return LoadTestResult.of_search(plan, data, created, found)
    return LoadTestResult(plan, data, created, run)


async def _run(
    plan: LoadTestPlan, search: RateBisection | None, told: Told, say: Callable[[str], object]
) -> tuple[LoadTestRun | None, FoundRate | None]:
    import asyncio
    import signal

    from echelon.loadtest.result import probe_line
    from echelon.loadtest.run import opened

    stop, task, loop = asyncio.Event(), asyncio.current_task(), asyncio.get_running_loop()

    def interrupt() -> None:
        """The first Ctrl-C ends the run and keeps what was measured; the second ends all."""
        if stop.is_set() and task is not None:
            task.cancel()
        stop.set()

    with contextlib.suppress(NotImplementedError):  # on Windows the first ends all
        loop.add_signal_handler(signal.SIGINT, interrupt)
    async with opened(plan, stop=stop, told=told) as tester:
        if search is None:
            return await tester.measure(), None
        return None, await tester.find_max(search, lambda probe: say(probe_line(probe)))


@contextlib.contextmanager
def _bar(*, shown: bool) -> Iterator[tuple[Told, Callable[[str], object]]]:
    """A bar on a terminal and a line for each probe; elsewhere lines only, or nothing."""
    if not (shown and sys.stderr.isatty()):
        yield (lambda *_: None), (lambda line: click.echo(line, err=True) if shown else None)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("Testing"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=1.0)

        def told(doing: str, share: float | None) -> None:
            progress.update(task, description=doing, completed=share or 0.0)

        yield told, progress.console.print


def _show(result: LoadTestResult, *, as_json: bool, shown: bool) -> None:
    if as_json:
        click.echo(json.dumps(result.as_dict(), ensure_ascii=False, indent=2, allow_nan=False))
    elif shown:
        from echelon.loadtest.result import print_result

        print_result(result)
