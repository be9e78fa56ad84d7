"""``echelon stress``: test a reranking server under load."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TYPE_CHECKING, Any

import click

from echelon.cli.flags import (
    INTERRUPTED,
    JSON_FLAG,
    LANG_FLAG,
    Command,
    check_above_zero,
    example,
    level_of,
    load_flag,
    print_json,
    quiet_flag,
    with_flags,
    workload_of,
)
from echelon.errors import GoalMissed, InvalidInput
from echelon.messages import tr
from echelon.options import require_packages
from echelon.progress import print_line, progress_bar
from echelon.server.limits import flag_of
from echelon.server.settings import Flag, flag

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from echelon.loadtest.result import LoadTestResult
    from echelon.loadtest.run import FoundRate, LoadTestPlan, LoadTestRun
    from echelon.progress import Progress
    from echelon.simulation.rate_search import RateSearch

KEY = "ECHELON_API_KEY"

PACKAGES = ("aiohttp", "hdrh")

MIN_REQUESTS = 10
"""Requests of the shortest probe: the latencies of fewer say nothing about a rate."""

LOAD_FLAGS: tuple[Flag, ...] = (
    load_flag("--rate", " [1]; where --find-max begins"),
    load_flag("--arrivals"),
    load_flag("--trace"),
    flag("--clients", type=int, help="Closed loop: this number of clients, one request each."),
    flag("--find-max", is_flag=True, help="Search the highest rate that meets the goal."),
    flag("--max-rate", type=float, help="Highest rate that --find-max tries [no limit]."),
    load_flag("--slo-p99-ms"),
    flag("--duration-s", type=float, help="Seconds to measure [30; a trace: to its end]."),
    flag("--warmup-s", type=float, default=5.0, help="Seconds of load before the measurement."),
)

REQUEST_FLAGS: tuple[Flag, ...] = (
    flag("--dialect", default="cohere", help="API that the server speaks."),
    flag("--path", help="Path of the route [the dialect's]."),
    flag("--model", help="Model name in requests [usual for the dialect]."),
    load_flag("--documents", default="10"),
    load_flag("--tokens", ", approximately [texts as they are]"),
    flag("--data", help="Your own queries and documents, JSONL [built-in texts]."),
    flag("--same-texts", is_flag=True, help="Do not make the texts of each request unique."),
    load_flag("--seed", show_default=False),
    flag("--header", multiple=True, help=f"'Name: value' to send; see also {KEY}."),
    flag("--timeout-ms", type=float, default=10_000.0, help="Longest wait."),
    flag("--max-connections", type=int, help="Maximum open connections [as many as needed]."),
)

OUTPUT_FLAGS: tuple[Flag, ...] = (
    JSON_FLAG,
    flag("--html", help="Write a page with charts to this file."),
    quiet_flag("No progress and no table."),
    LANG_FLAG,
)


@click.command(
    cls=Command,
    epilog=example("echelon stress http://localhost:8080 --find-max --slo-p99-ms 300"),
)
@click.argument("url", metavar="URL")
@with_flags(*LOAD_FLAGS, group="Load")
@with_flags(*REQUEST_FLAGS, group="Requests")
@with_flags(*OUTPUT_FLAGS, group="Output")
def stress(*, url: str, as_json: bool, html: str | None, quiet: bool, **values: Any) -> None:
    """Test the reranking server at URL under load, Echelon or any other.

    Requests are sent on schedule, even if the server is slow, and latency counts from the
    scheduled time. Exit code 8 says that the goal of --slo-p99-ms was missed. An API key is taken
    from the environment variable ECHELON_API_KEY.
    """
    require_packages("echelon stress", "stress", PACKAGES)
    _check(values)
    plan, data = _plan(url, values)
    shown = not quiet and not as_json
    result = _tested(plan, data, values, shown=shown)
    if as_json:
        print_json(result.as_dict())
    elif shown:
        from echelon.loadtest.result import print_result

        print_result(result)
    if html is not None:
        from echelon.loadtest.page import write_page

        write_page(result, html)
        if shown:
            print_line("\n" + tr("Page: {file}", file=html))
    if result.interrupted:
        print_line(tr("Interrupted; above is what was measured until then."))
        sys.exit(INTERRUPTED)
    if plan.goal is not None and not result.held:
        from echelon.loadtest.result import headline

        raise GoalMissed(headline(result))


_ALONE = (("trace", ("rate", "clients", "find_max")), ("clients", ("rate", "find_max")))
"""Options that cannot be given together."""


def _check(values: dict[str, Any]) -> None:
    for name, others in _ALONE:
        for other in others:
            if values[name] is not None and values[other] not in {None, False}:
                problem = tr("is given with {other}", other=flag_of(other))
                raise InvalidInput(flag_of(name), problem, tr("Give one of the two."))
    if values["find_max"] and values["slo_p99_ms"] is None:
        remedy = tr("Give --slo-p99-ms, such as 300.")
        raise InvalidInput("--find-max", tr("has no goal"), remedy)
    if values["max_rate"] is not None and not values["find_max"]:
        raise InvalidInput("--max-rate", tr("is for --find-max"), tr("Give --rate instead."))
    for name in ("slo_p99_ms", "timeout_ms", "max_connections", "rate", "max_rate"):
        if values[name] is not None:
            check_above_zero(flag_of(name), values[name], tr("Give a number."))
    goal_ms = values["slo_p99_ms"]
    if goal_ms is not None and goal_ms > values["timeout_ms"]:
        goal, timeout = f"{goal_ms:g}", f"{values['timeout_ms']:g}"
        problem = tr("{goal} is longer than --timeout-ms {timeout}", goal=goal, timeout=timeout)
        raise InvalidInput("--slo-p99-ms", problem, tr("Raise --timeout-ms."))


def _plan(url: str, values: dict[str, Any]) -> tuple[LoadTestPlan, str]:
    from echelon.data import load_texts
    from echelon.loadtest.client import Target, protocol_of, route_of
    from echelon.loadtest.run import LoadTestPlan

    protocol = protocol_of(values["dialect"])
    texts = load_texts(values["data"], None if values["data"] else "en")
    target = Target(
        route_of(url, protocol, values["path"]),
        protocol,
        values["model"],
        _headers(values["header"]),
        values["timeout_ms"] / 1000,
        values["max_connections"] or 0,
    )
    if values["rate"] is None and values["trace"] is None:
        values = values | {"rate": 1.0}
    default_s = 30.0 if values["trace"] is None else None
    plan = LoadTestPlan(
        target=target,
        topics=texts.topics,
        workload=workload_of(values, streamed=True),
        clients=values["clients"],
        warmup_s=values["warmup_s"],
        duration_s=default_s if values["duration_s"] is None else values["duration_s"],
        goal=level_of(values),
        marked=not values["same_texts"],
    )
    return plan, texts.name


def _headers(given: Iterable[str]) -> dict[str, str]:
    """Headers of each request; errors never repeat a value, which may be a secret."""
    headers = {}
    key = os.environ.get(KEY)
    if key:
        headers["Authorization"] = f"Bearer {key}"
    for text in given:
        name, colon, value = text.partition(":")
        if not colon or not name.strip() or not text.isprintable() or " " in name.strip():
            problem, remedy = tr("one is not 'Name: value'"), tr("Such as 'X-Team: search'.")
            raise InvalidInput("--header", problem, remedy)
        headers[name.strip()] = value.strip()
    return headers


def _tested(
    plan: LoadTestPlan, data: str, values: dict[str, Any], *, shown: bool
) -> LoadTestResult:
    import asyncio
    from datetime import UTC, datetime

    from echelon.loadtest.result import LoadTestResult
    from echelon.simulation.rate_search import RateSearch

    search = None
    if values["find_max"]:
        lowest = MIN_REQUESTS / (plan.duration_s or 1.0)
        first = max(1.0, lowest) if values["rate"] is None else values["rate"]
        search = RateSearch(first, values["max_rate"] or float("inf"), lowest)
    with progress_bar(tr("Testing"), shown=shown) as (on_progress, print_above):
        try:
            run, found = asyncio.run(_run(plan, search, on_progress, print_above))
        except asyncio.CancelledError:
            raise KeyboardInterrupt from None
    created = datetime.now(UTC).isoformat(timespec="seconds")
    if found is not None:
        return LoadTestResult.of_search(plan, data, created, found)
    return LoadTestResult(plan, data, created, run)


async def _run(
    plan: LoadTestPlan,
    search: RateSearch | None,
    on_progress: Progress,
    print_above: Callable[[str], object],
) -> tuple[LoadTestRun | None, FoundRate | None]:
    import asyncio
    import signal

    from echelon.loadtest.result import probe_line
    from echelon.loadtest.run import opened

    stop, task, loop = asyncio.Event(), asyncio.current_task(), asyncio.get_running_loop()

    def interrupt() -> None:
        """The first Ctrl-C ends the run and keeps its results; the second ends the process."""
        if stop.is_set() and task is not None:
            task.cancel()
        stop.set()

    with contextlib.suppress(NotImplementedError):  # on Windows the first Ctrl-C ends the process
        loop.add_signal_handler(signal.SIGINT, interrupt)
    async with opened(plan, stop=stop, on_progress=on_progress) as test:
        if search is None:
            return await test.measure(), None
        return None, await test.find_max(search, lambda probe: print_above(probe_line(probe)))
