"""What else used the processors while something was measured: other processes, steal, throttling.

Linux counts it in ``/proc/stat`` and in the control group's ``cpu.stat``. Where a file is missing,
nothing is known of it and nothing is called disturbed.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echelon.messages import Message
from echelon.types import Clock, monotonic

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

OTHERS_CPUS, OTHERS_SHARE = 0.15, 0.05
"""CPUs, and share of ours, that others may use unnoticed: the usual services of a machine."""

STOLEN_SHARE = 0.03  # of our CPUs' time, which the hypervisor gave to other machines
THROTTLED_SHARE = 0.05  # of the time, in which the quota stopped the process

OWN_SHARE = 0.7
"""Share of the quota from which throttling is due to the process itself, not to its neighbours."""

WINDOW_S = 0.25
"""Shortest time that is judged: the kernel counts in hundredths of a second. A shorter run is
judged with what came before it."""


@dataclass(frozen=True, slots=True)
class Disturbance:
    """What else happened during a run."""

    others: float = 0.0  # CPUs that other processes used
    stolen: float = 0.0  # share of our CPUs' time
    throttled: float = 0.0  # share of the run's time
    cpus: int = 1  # that this process may use

    @property
    def kinds(self) -> tuple[str, ...]:
        """The parts that are large enough to change a time."""
        others = self.others > max(OTHERS_CPUS, OTHERS_SHARE * self.cpus)
        found = (others, self.stolen > STOLEN_SHARE, self.throttled > THROTTLED_SHARE)
        return tuple(k for k, large in zip(KINDS, found, strict=True) if large)

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


Watch = Callable[[float], Disturbance | None]
"""Says what disturbed a run that has just ended, from its seconds."""

KINDS = ("others", "stolen", "throttled")


@dataclass(frozen=True, slots=True)
class LoadReading:
    """Seconds since the machine started, summed over the CPUs that this process may use."""

    at_s: float
    busy_s: float
    stolen_s: float
    own_s: float
    throttled_s: float


class MachineLoad:
    """Watches the machine while runs are timed: call it after each run.

    Args:
        root: folder in which ``proc`` and ``sys`` lie.
        own: CPU seconds of this process and of its children that have ended.
        clock: seconds.
        cpus: the CPUs that this process may use; None asks the system.
    """

    def __init__(
        self,
        root: Path = Path("/"),
        own: Callable[[], float] = lambda: sum(os.times()[:4]),
        clock: Clock = monotonic,
        cpus: Collection[int] | None = None,
    ) -> None:
        self._stat, self._own, self._clock = root / "proc/stat", own, clock
        self._cpus = frozenset(_usable() if cpus is None else cpus)
        self._groups = list(_groups(root))
        self._ticks = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100
        self.quota_cpus = min(map(_quota, self._groups), default=None, key=lambda q: q or 1e9)
        self._seen: deque[LoadReading] = deque(filter(None, [self._read()]))

    def __call__(self, seconds: float) -> Disturbance | None:
        """What disturbed the run that has just ended and took this long; None: nothing known."""
        now = self._read()
        if now is None or not self._seen:
            return None
        began = now.at_s - max(seconds, WINDOW_S)
        while len(self._seen) > 1 and self._seen[1].at_s <= began:
            self._seen.popleft()
        first = self._seen[0]
        self._seen.append(now)
        found = self._between(first, now)
        return found if found.kinds else None

    def _between(self, first: LoadReading, last: LoadReading) -> Disturbance:
        span = max(last.at_s - first.at_s, WINDOW_S)  # a tick in a short span is no load
        own, cpus = (last.own_s - first.own_s) / span, max(1, len(self._cpus))
        others = (last.busy_s - first.busy_s) / span - own
        throttled = min(1.0, (last.throttled_s - first.throttled_s) / span)
        if self.quota_cpus is not None and own > OWN_SHARE * self.quota_cpus:
            throttled = 0.0  # the process uses up its own quota: that is the machine as it is
        stolen = (last.stolen_s - first.stolen_s) / span / cpus
        return Disturbance(max(0.0, others), stolen, throttled, cpus)

    def _read(self) -> LoadReading | None:
        """The counters now; None on systems without them."""
        try:
            lines = self._stat.read_text(encoding="ascii").splitlines()
            rows = dict(_counters(lines))
            mine = [rows[cpu] for cpu in self._cpus if cpu in rows]
        except (OSError, ValueError):
            return None
        busy = sum(user + nice + system + irq + soft for user, nice, system, irq, soft, _ in mine)
        stolen = sum(row[-1] for row in mine)
        throttled = max(map(_throttled, self._groups), default=0.0)
        ticks = self._ticks
        return LoadReading(self._clock(), busy / ticks, stolen / ticks, self._own(), throttled)


def _usable() -> Collection[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return range(os.cpu_count() or 1)


def _counters(lines: list[str]) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Each CPU's ticks: user, nice, system, irq, softirq, steal (man 5 proc)."""
    for line in lines:
        name, *values = line.split()
        if name.startswith("cpu") and name != "cpu":
            numbers = [*map(int, values), *[0] * 8]
            yield int(name[3:]), (*numbers[:3], *numbers[5:8])


def _groups(root: Path) -> Iterator[Path]:
    """Folders of this process' control group and of its parents that may hold a CPU quota."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
        folder = base / path.strip("/")
        for place in (folder, *folder.parents):
            if (place / "cpu.stat").is_file():
                yield place
            if place == base:
                break


def _quota(folder: Path) -> float | None:
    """CPUs of a control group's quota, version 2 or 1; None where there is none."""
    with suppress(OSError, ValueError):
        quota, period = (folder / "cpu.max").read_text(encoding="ascii").split()
        return None if quota == "max" else int(quota) / int(period)
    with suppress(OSError, ValueError):
        quota = (folder / "cpu.cfs_quota_us").read_text(encoding="ascii")
        period = (folder / "cpu.cfs_period_us").read_text(encoding="ascii")
        return None if int(quota) <= 0 else int(quota) / int(period)
    return None


def _throttled(folder: Path) -> float:
    """Seconds for which a control group was stopped by its quota."""
    with suppress(OSError, ValueError):
        for line in (folder / "cpu.stat").read_text(encoding="ascii").splitlines():
            name, value = line.split()
            if name in UNITS:
                return int(value) * UNITS[name]
    return 0.0


UNITS = {"throttled_usec": 1e-6, "throttled_time": 1e-9}
"""Seconds of a unit of each counter: version 2 and version 1."""


def quota_notes(watch: Watch) -> list[str]:
    """Say once that a quota limits this process: its times are those of the machine as it is."""
    quota = watch.quota_cpus if isinstance(watch, MachineLoad) else None
    return [] if quota is None else [Message("load.quota", {"quota": f"{quota:.3g}"})]


def nothing_known(seconds: float) -> Disturbance | None:
    """Watch nothing: for tests, and for machines without these counters."""
    del seconds
    return None
