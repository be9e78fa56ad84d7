"""What the routes share: the running service, the rules of the door, metrics, the model's name."""

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
from echelon.server.rolling_stats import RollingStats

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from echelon.engine.service import Service
    from echelon.server.connection import Reason
    from echelon.server.metrics import Metrics
    from echelon.server.observability import Traces

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """What the server lets in, and how it ends.

    Attributes:
        keys: who may ask.
        max_body_bytes: longest body: 10,000 documents of some 500 tokens are 20 to 30 MB.
        body_timeout_s: a body must have come in this time, so that slow clients hold nothing.
        drain_s: at its end the server waits so long for the requests inside.
        origins: web pages that browsers let read answers (CORS); none by default.
        limits: what a connection may do.
    """

    keys: Keys = field(default_factory=Keys)
    max_body_bytes: int = 32 * 2**20
    body_timeout_s: float = 30.0
    drain_s: float = 30.0
    origins: tuple[str, ...] = ()
    limits: ConnectionLimits = field(default_factory=ConnectionLimits)

    def __post_init__(self) -> None:
        for name in ("max_body_bytes", "body_timeout_s", "drain_s"):
            if not getattr(self, name) > 0:
                raise InvalidInput(name, f"{getattr(self, name)} is not positive", "Give more.")


class ServerContext:
    """One server.

    Args:
        launch: starts the service.
        model: the served model's name.
        metrics: counts.
        rules: what it lets in.
        revision: the model's revision, for ``/info``.
        recent: the last ten minutes, for ``/dashboard``; it hears of a service what it is told.
        traces: where each request is told of; None tells nobody.
    """

    def __init__(  # noqa: PLR0913 - all that the routes share
        self,
        launch: Callable[[], Awaitable[Service]],
        model: str,
        metrics: Metrics,
        rules: ServerLimits | None = None,
        revision: str | None = None,
        *,
        recent: RollingStats | None = None,
        traces: Traces | None = None,
    ) -> None:
        self.model = model
        self.revision = revision
        self.metrics = metrics
        self.rules = rules or ServerLimits()
        self.recent = recent or RollingStats()
        self.traces = traces
        self.since = int(time.time())
        self.failure: Exception | None = None
        self.cut_short = False
        self._launch = launch
        self._service: Service | None = None
        self._looking: asyncio.Task[None] | None = None

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
        """The service, where it has started."""
        return self._service

    def connection_refused(self, reason: Reason) -> None:
        """A connection was closed before it had asked for anything."""
        self.metrics.connection_refused(reason)
        self.recent.connection_refused(reason)

    def rate_limited(self, key: str) -> None:
        """The holder of a key has used up what it may."""
        self.metrics.rate_limited(key)
        self.recent.rate_limited()

    async def open(self) -> None:
        """Start the service; what hinders it is kept for whoever started the server."""
        try:
            self._service = await self._launch()
        except Exception as error:
            self.failure = error
            raise
        self.metrics.watch(self._service)
        self._looking = asyncio.create_task(self._look(self._service))

    async def hurry(self) -> None:
        """The time to drain is over: whoever is still inside is told so now."""
        if self._service is not None:
            self.cut_short = self._service.snapshot().requests > 0
            await self._service.stop()

    async def close(self) -> None:
        """Answer what is inside, then end."""
        if self._looking is not None:
            self._looking.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._looking
        if self._service is not None:
            await self._service.drain(self.rules.drain_s)
            await self._service.stop()

    async def _look(self, service: Service) -> None:
        """Look at the service twice a slice, so that none goes without a look."""
        while True:
            try:
                self.recent.looked(service.snapshot())
            except Exception:
                logger.exception("The service could not be looked at. This is a bug.")
            await asyncio.sleep(self.recent.slice_s / 2)
