"""State that the routes share: the running service, limits, metrics, and the model's name."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echelon.engine.events import ListenerGroup
from echelon.engine.launch import launch
from echelon.errors import ShuttingDown
from echelon.messages import asked_language
from echelon.profile import Profile
from echelon.scheduling.admission import MAX_WAIT_S, AdmissionLimits
from echelon.server.auth import Access, read_keys
from echelon.server.body import BodyMemory, ParserThread, return_freed_memory
from echelon.server.dashboard import RollingStats
from echelon.server.http_checks import Hosts
from echelon.server.limits import ServerLimits
from echelon.server.metrics import Metrics
from echelon.server.observability import Traces, open_traces
from echelon.server.refusals import EXCEEDED

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from echelon.engine.service import Service
    from echelon.options import Options
    from echelon.server.refusals import Reason

logger = logging.getLogger(__name__)


class ServerContext:
    """One server: ``launch`` starts its service, to which ``metrics`` and ``stats`` must listen.

    ``language`` is that of its pages; None leaves it to the browser.
    """

    def __init__(  # noqa: PLR0913 - all that the routes share
        self,
        launch: Callable[[], Awaitable[Service]],
        model: str,
        metrics: Metrics,
        limits: ServerLimits | None = None,
        revision: str | None = None,
        *,
        access: Access | None = None,
        stats: RollingStats | None = None,
        traces: Traces | None = None,
        language: str | None = None,
    ) -> None:
        self.model = model
        self.revision = revision
        self.metrics = metrics
        self.limits = limits or ServerLimits()
        self.memory = BodyMemory(self.limits)
        self.parser = ParserThread()
        self.access = access or Access()
        self.stats = stats or RollingStats()
        self.traces = traces
        self.language = language
        self.created = int(time.time())
        self.failure: Exception | None = None
        self.late = 0  # requests without a response when the time to drain was over
        self._launch = launch
        self.running: Service | None = None
        self._sampling: asyncio.Task[None] | None = None

    @property
    def service(self) -> Service:
        """The running service; raises ShuttingDown before its start."""
        if self.running is None:
            raise ShuttingDown("The service has not started. Try again soon.")
        return self.running

    def connection_refused(self, reason: Reason) -> None:
        """Count a connection that the server ends, and the limit that it exceeded."""
        self.metrics.count("connections_refused_total", reason)
        self.stats.count("connection", reason)
        if reason in EXCEEDED:
            self.metrics.count("limit_refusals_total", EXCEEDED[reason])

    def limit_exceeded(self, limit: str, by: int = 1) -> None:
        """Count requests that a limit of the server refused, a name of ServerLimits."""
        self.metrics.count("limit_refusals_total", limit, by=by)
        if by:
            self.stats.count("limit", limit)

    def rate_limited(self, key: str) -> None:
        """Count a request over the limit of a key."""
        self.metrics.count("rate_limited_total", key)
        self.stats.count("limited", "requests")

    async def open(self) -> None:
        """Start the service; an error is kept in ``failure`` for the caller of the server."""
        return_freed_memory()
        try:
            self.running = await self._launch()
        except Exception as error:
            self.failure = error
            raise
        self.metrics.watch(self.running)
        self._sampling = asyncio.create_task(self._sample(self.running))

    async def end_now(self) -> None:
        """Stop the service: requests that are still in it get an error."""
        if self.running is not None:
            self.late = self.running.snapshot().requests
            self.limit_exceeded("drain_s", self.late)
            await self.running.stop()

    async def close(self) -> None:
        """Answer admitted requests, then stop the service."""
        if self._sampling is not None:
            self._sampling.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._sampling
        if self.running is not None:
            if not await self.running.drain(self.limits.drain_s):
                self.limit_exceeded("drain_s", self.running.snapshot().requests)
            await self.running.stop()
        self.parser.close()

    async def _sample(self, service: Service) -> None:
        """Take a snapshot twice a slice, so that no slice is without one."""
        while True:
            try:
                self.stats.sampled(service.snapshot())
            except Exception:
                logger.exception("A snapshot of the service failed. This is a bug.")
            await asyncio.sleep(self.stats.slice_s / 2)


def server_of(model: str, options: Options, settings: dict[str, Any], **more: Any) -> ServerContext:
    """The server that settings describe; ``more`` goes to :func:`echelon.engine.launch.launch`."""
    keys = read_keys(settings["api_keys"], settings["rate_limit"])
    hosts = Hosts.of(settings["host"], settings["allowed_hosts"])
    access, limits = Access(keys, settings["cors"], hosts), ServerLimits.of(settings)
    metrics, stats = Metrics(), RollingStats()
    memory_mb, goal_ms = settings["memory_limit_mb"], settings["slo_p99_ms"]
    start = partial(
        launch,
        model,
        workers=settings["workers"],
        bounds=AdmissionLimits(
            max_requests=settings["max_requests"],
            max_documents=limits.max_documents,
            max_wait_s=max_wait_s(settings, options),
        ),
        memory_limit_bytes=None if memory_mb is None else memory_mb * 2**20,
        wedge_after_s=settings["wedge_after_s"],
        goal_s=None if goal_ms is None else goal_ms / 1000,
        fallback_max_length=settings["fallback_max_length"],
        listener=ListenerGroup(metrics, stats),
        **more,
        **asdict(options),
    )
    name = settings["served_name"] or name_of(model)
    traces = open_traces(settings["otel"])
    return ServerContext(
        start,
        name,
        metrics,
        limits,
        options.revision,
        access=access,
        stats=stats,
        traces=traces,
        language=asked_language(),
    )


def max_wait_s(settings: dict[str, Any], options: Options) -> float:
    """How long a request may wait by prediction: as given, the latency goal, or a default; logged.

    Raises:
        ProfileError: the profile cannot be read.
    """
    goal_ms = settings["slo_p99_ms"]
    goal_s = None if options.profile is None else Profile.load(options.profile).goal_s
    known = (
        (settings["max_wait_s"], "as --max-wait-s says"),
        (None if goal_ms is None else goal_ms / 1000, "the latency goal of --slo-p99-ms"),
        (goal_s, f"the latency goal of {options.profile}"),
    )
    default = (MAX_WAIT_S, "no latency goal is known; --max-wait-s changes it")
    found = ((seconds, reason) for seconds, reason in known if seconds is not None)
    seconds, reason = next(found, default)
    logger.info("A request that would wait longer than %g s is refused: %s.", seconds, reason)
    return seconds


def name_of(model: str) -> str:
    """The model's name in responses: a folder's own name, or the name that was given."""
    folder = Path(model).expanduser()
    return folder.resolve().name if folder.is_dir() else model
