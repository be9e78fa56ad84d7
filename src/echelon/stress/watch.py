"""Whether the load generator itself was the bottleneck, and when its numbers cannot be trusted.

A generator that is too slow sends late and reads late, and the server is blamed for it. So it
watches itself: how late each request was sent, how late its event loop woke, how much of its CPU
it used.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from echelon.reports.html import kept

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

BEAT_S = 0.02
"""Between two looks at the event loop."""

LATE_S, LATE_SHARE = 0.01, 0.1
"""Lateness at P99 that spoils a measurement: more than 10 ms, and more than a tenth of the P99
latency or of the goal. Timers of event loops are a millisecond coarse; the first is well above."""

BUSY_SHARE = 0.9
"""Share of one CPU above which a generator of one thread cannot be told from a saturated one."""


@dataclass(frozen=True, slots=True)
class Health:
    """What the generator noticed of itself in the measured part.

    Attributes:
        loop_lag_s: P99 of how late the event loop woke.
        cpu_share: CPU seconds a second; 1 is one CPU in full use.
        own_faults: requests that this machine could not send.
    """

    loop_lag_s: float = 0.0
    cpu_share: float = 0.0
    own_faults: int = 0


class Watch:
    """Looks on while requests are sent. Times are those of the event loop's clock."""

    def __init__(self) -> None:
        self.own_faults = 0
        self._lags = array("d")
        self._began = (0.0, 0.0)

    def begin(self) -> None:
        """The measured part begins; what was before does not count."""
        del self._lags[:]
        self.own_faults = 0
        self._began = (time.perf_counter(), time.process_time())

    def health(self) -> Health:
        """What was noticed since then."""
        wall_s = time.perf_counter() - self._began[0]
        cpu_s = time.process_time() - self._began[1]
        lag_s = float(np.percentile(self._lags, 99)) if self._lags else 0.0
        return Health(lag_s, cpu_s / wall_s if wall_s > 0 else 0.0, self.own_faults)

    @contextlib.asynccontextmanager
    async def looking(self) -> AsyncIterator[None]:
        """Look at the event loop for as long as the context is open."""
        task = asyncio.create_task(self._look())
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def _look(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + BEAT_S
            await asyncio.sleep(BEAT_S)
            self._lags.append(max(0.0, loop.time() - due))


def doubts(health: Health, send_lag_s: float, latency_s: float) -> list[str]:
    """Why numbers cannot be trusted, each with its remedy; nothing where they can.

    Args:
        health: what the generator noticed of itself.
        send_lag_s: P99 of how late requests were sent.
        latency_s: P99 of the latency, or the goal where that is longer. Lateness is a part of the
            latency, so it never makes a goal hold that would not.
    """
    found = []
    bearable_s = max(LATE_S, LATE_SHARE * latency_s)
    if send_lag_s > bearable_s:
        found.append(
            kept(
                "Requests were sent up to {ms} ms late (P99): the generator could not keep up. "
                "Test from a machine of its own, or with a lower rate or smaller requests.",
                ms=f"{1000 * send_lag_s:.0f}",
            )
        )
    if health.loop_lag_s > bearable_s:
        found.append(
            kept(
                "The generator's event loop woke up to {ms} ms late (P99), so answers were read "
                "late. Test from a machine that does nothing else.",
                ms=f"{1000 * health.loop_lag_s:.0f}",
            )
        )
    if health.cpu_share > BUSY_SHARE:
        found.append(
            kept(
                "The generator used {share} % of a CPU: it, and not the server, may be the limit. "
                "Split the rate among several generators.",
                share=f"{100 * health.cpu_share:.0f}",
            )
        )
    if health.own_faults:
        found.append(
            kept(
                "{faults} requests could not be sent: this machine had no connections left. Raise "
                "`ulimit -n`, or set --max-connections.",
                faults=health.own_faults,
            )
        )
    return found
