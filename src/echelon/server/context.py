"""State that the routes share: the running service, limits, metrics and the model's name."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from echelon.errors import InvalidInput, ShuttingDown
from echelon.server.auth import Keys
from echelon.server.connection import ConnectionLimits
from echelon.server.dashboard import RollingStats

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from echelon.engine.service import Service
    from echelon.server.connection import Reason
    from echelon.server.metrics import Metrics
    from echelon.server.observability import Traces

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """What the server accepts, and how long its shutdown takes.

    Attributes:
        keys: API keys that are accepted.
        max_body_bytes: longest body; 10,000 documents of 500 tokens are 20 to 30 MB.
        body_timeout_s: seconds in which a body must arrive, so that slow clients hold no memory.
        drain_s: seconds that the shutdown waits for admitted requests.
        origins: web origins whose pages may read responses (CORS).
        connection: limits of a connection.
    """

    keys: Keys = field(default_factory=Keys)
    max_body_bytes: int = 32 * 2**20
    body_timeout_s: float = 30.0
    drain_s: float = 30.0
    origins: tuple[str, ...] = ()
    connection: ConnectionLimits = field(default_factory=ConnectionLimits)

    def __post_init__(self) -> None:
        for name in ("max_body_bytes", "body_timeout_s", "drain_s"):
            if not getattr(self, name) > 0:
                raise InvalidInput(name, f"{getattr(self, name)} is not positive", "Give more.")


class ServerContext:
    """One server: ``launch`` starts its service, to which ``metrics`` and ``stats`` must listen."""

    def __init__(  # noqa: PLR0913 - all that the routes share
        self,
        launch: Callable[[], Awaitable[Service]],
        model: str,
        metrics: Metrics,
        limits: ServerLimits | None = None,
        revision: str | None = None,
        *,
        stats: RollingStats | None = None,
        traces: Traces | None = None,
    ) -> None:
        self.model = model
        self.revision = revision
        self.metrics = metrics
        self.limits = limits or ServerLimits()
        self.stats = stats or RollingStats()
        self.traces = traces
        self.created = int(time.time())
        self.failure: Exception | None = None
        self.cut_short = False
        self._launch = launch
        self._service: Service | None = None
        self._sampling: asyncio.Task[None] | None = None

    @property
    def service(self) -> Service:
        """The running service.

        Raises:
            ShuttingDown: it has not started.
        """
        if self._service is None:
            raise ShuttingDown("The service has not started. Try again soon.")
        return self._service

    @property
    def running(self) -> Service | None:
        """The service; None before it has started."""
        return self._service

    def connection_refused(self, reason: Reason) -> None:
        """Count a connection that was closed before its first request."""
        self.metrics.connection_refused(reason)
        self.stats.connection_refused(reason)

    def rate_limited(self, key: str) -> None:
        """Count a request over the limit of a key."""
        self.metrics.rate_limited(key)
        self.stats.rate_limited()

    async def open(self) -> None:
        """Start the service; an error is kept in ``failure`` for the caller of the server."""
        try:
            self._service = await self._launch()
        except Exception as error:
            self.failure = error
            raise
        self.metrics.watch(self._service)
        self._sampling = asyncio.create_task(self._sample(self._service))

    async def end_now(self) -> None:
        """Stop the service: requests that are still in it get an error."""
        if self._service is not None:
            self.cut_short = self._service.snapshot().requests > 0
            await self._service.stop()

    async def close(self) -> None:
        """Answer admitted requests, then stop the service."""
        if self._sampling is not None:
            self._sampling.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._sampling
        if self._service is not None:
            await self._service.drain(self.limits.drain_s)
            await self._service.stop()

    async def _sample(self, service: Service) -> None:
        """Take a snapshot twice a slice, so that no slice is without one."""
        while True:
            try:
                self.stats.sampled(service.snapshot())
            except Exception:
                logger.exception("A snapshot of the service failed. This is a bug.")
            await asyncio.sleep(self.stats.slice_s / 2)
