"""More workers while the predicted delay is too long, fewer when they have nothing to do."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from echelon.scheduling.autoscaling import Autoscaler

if TYPE_CHECKING:
    from echelon.engine.service import Service
    from echelon.scheduling.autoscaling import AutoscalingLimits

logger = logging.getLogger(__name__)

LOOK_S = 0.5
"""Seconds between looks: many within the shortest delay that is worth a new worker."""


async def keep_scaled(
    service: Service, scaling: AutoscalingLimits, every_s: float = LOOK_S
) -> None:
    """Resize a service as :mod:`echelon.scheduling.autoscaling` says, until cancelled."""
    scaler = Autoscaler(scaling)
    while True:
        await asyncio.sleep(every_s)
        now = service.snapshot()
        work_s = now.backlog_s * max(1, now.workers)
        wanted = scaler.wanted(service.clock(), now.staff, work_s, now.busy_s)
        if wanted != now.staff:
            logger.info("Workers: %d instead of %d; %.1f s of work", wanted, now.staff, work_s)
            service.resize(wanted)
