"""Files on many machines: windows are scored wherever there is room, and come back in order.

A window's steps depend on the window alone, so a score does not depend on which worker scored it:
the output is that of one machine of the same kind, to the byte.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter, deque
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import ray
from ray.exceptions import RayError

from echelon.engine.child import fault_of, resident_bytes
from echelon.engine.launch import with_profile
from echelon.engine.worker import START_TIMEOUT_S, unpack
from echelon.errors import EchelonError, InvalidInput, WorkerLost
from echelon.integrations.ray.worker import TRIES_AGAIN, WorkerResources, loss_of, place_of
from echelon.models.device import usable_cpus
from echelon.models.hub import resolve
from echelon.offline.scoring import ScoredWindow, WindowScorer

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator

    from echelon.engine.worker import Reply
    from echelon.offline.rows import BadRow, RowWindow
    from echelon.offline.scoring import Steps
    from echelon.options import Options
    from echelon.types import FloatArray, IntArray, RunReport

logger = logging.getLogger(__name__)

AHEAD = 2
"""Windows that a worker has: one is encoded while the other is scored."""

ATTEMPTS = 3
"""How often a window, or the start of a worker, may end a worker before the job is given up."""


@dataclass(frozen=True, slots=True)
class PoolRequest:
    """What the workers of a job should be.

    Attributes:
        workers: how many; None is as many as the cluster has room for.
        cpus: CPUs of each; None is what the forward pass uses.
        gpus: GPUs of each.
    """

    workers: int | None = None
    cpus: float | None = None
    gpus: float = 0.0

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise InvalidInput("--workers", f"{self.workers} is not positive", "Give 1 or more.")


@dataclass(frozen=True, slots=True)
class PoolResult:
    """What a worker found for a window; the texts stay where they are.

    Attributes:
        rows: places of the rows that were scored.
        bad: the window's bad rows, those that scoring found among them.
        logits: float32 [pairs], row after row.
        truncated_tokens: int32 [pairs].
        report: how it went.
    """

    rows: tuple[int, ...]
    bad: tuple[BadRow, ...]
    logits: FloatArray
    truncated_tokens: IntArray
    report: RunReport

    @classmethod
    def of(cls, window: RowWindow, scored: ScoredWindow) -> PoolResult:
        """What is new in a scored window."""
        places = {id(row): place for place, row in enumerate(window.rows)}
        rows = tuple(places[id(row)] for row in scored.rows)
        return cls(rows, scored.bad, scored.logits, scored.truncated_tokens, scored.report)

    def in_window(self, window: RowWindow) -> ScoredWindow:
        """The window, scored."""
        rows = tuple(window.rows[place] for place in self.rows)
        return ScoredWindow(rows, self.bad, self.logits, self.truncated_tokens, self.report, window)


class ScorerActor:
    """The actor's side: a model that scores windows."""

    def __init__(self) -> None:
        self._scoring: WindowScorer | None = None
        self._opening = threading.Lock()

    def open(self, model: str, options: Options, steps: Steps | None) -> Reply:
        """Open the model, once; the machine's id goes with what decides the steps."""
        try:
            with self._opening:  # while it is, Ray may ask again
                self._scoring = self._scoring or WindowScorer(model, options, steps)
        except Exception as error:  # noqa: BLE001 - whatever it is, the other side is told
            return fault_of(error)
        found = self._scoring.steps, ray.get_runtime_context().get_node_id()
        return "steps", found, 0.0, resident_bytes()

    def score(self, window: RowWindow) -> Reply:
        """Score a window."""
        if self._scoring is None:
            raise AssertionError("a window before the model was open. This is a bug.")
        try:
            scored = self._scoring.submit(window).result()
        except Exception as error:  # noqa: BLE001 - as above
            return fault_of(error)
        return "scored", PoolResult.of(window, scored), 0.0, resident_bytes()


_BENCH = ray.remote(
    max_concurrency=AHEAD,
    max_restarts=0,
    max_task_retries=TRIES_AGAIN,
    scheduling_strategy="SPREAD",
)(ScorerActor)


class _Member:
    """A worker, and the windows it has, the one it began with first."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor
        self.machine: str | None = None
        self.windows: list[int] = []

    @property
    def free(self) -> bool:
        return self.machine is not None and len(self.windows) < AHEAD


class RayScorerPool:
    """A :class:`echelon.offline.scoring.WindowScorer` over the workers of a Ray cluster.

    Args:
        model: as there; a folder must be on every machine.
        options: as there.
        steps: what an earlier run of the job fixed; None lets the first worker fix it.
        wanted: what the workers should be.

    Raises:
        InvalidInput: the machines are not as the one on which the job began.
        ModelError: the model cannot be opened.
        WorkerLost: no worker came up.
    """

    def __init__(
        self, model: str, options: Options, steps: Steps | None, wanted: PoolRequest | None = None
    ) -> None:
        wanted = wanted or PoolRequest()
        chosen, _ = with_profile(options)
        threads = chosen.threads or usable_cpus()
        self._share = WorkerResources(wanted.cpus or (1.0 if wanted.gpus else threads), wanted.gpus)
        self._model, revision = place_of(resolve(model, revision=options.revision), model)
        self._options = replace(chosen, profile=None, threads=threads, revision=revision)
        self._steps = steps
        self._flying: dict[Any, tuple[_Member, int | None]] = {}
        self._members: list[_Member] = []
        self._kept: dict[int, RowWindow] = {}
        self._queue: deque[int] = deque()
        self._done: dict[int, PoolResult | EchelonError] = {}
        self._ended: Counter[int | None] = Counter()
        self._hire()
        while not any(member.machine for member in self._members):
            self._hear()
        for _ in range((wanted.workers or _room(self._share)) - 1):
            self._hire()

    @property
    def steps(self) -> Steps:
        """What decides the steps."""
        if self._steps is None:
            raise AssertionError("no worker is up. This is a bug.")
        return self._steps

    def score(
        self, windows: Iterable[RowWindow], told: Callable[[int], None] | None = None
    ) -> Generator[ScoredWindow, None, None]:
        """Score windows, in their order.

        Args:
            windows: taken so far ahead that every worker has two.
            told: not called; a window is told by its coming.

        Raises:
            WorkerLost: a window ended its worker again and again.
            EchelonError: as :meth:`echelon.offline.scoring.WindowScorer.score`.
        """
        del told
        source, turn = enumerate(windows), 0
        while self._fill(source):
            while turn not in self._done:
                self._send()
                self._hear()
            found = self._done.pop(turn)
            if isinstance(found, EchelonError):
                raise found
            yield found.in_window(self._kept.pop(turn))
            turn += 1

    def close(self) -> None:
        """End the workers."""
        for member in self._members:
            ray.kill(member.actor)
        self._members.clear()
        self._flying.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _fill(self, source: Iterator[tuple[int, RowWindow]]) -> bool:
        """Take windows until all workers have enough; whether any is left to give back."""
        while len(self._kept) < AHEAD * len(self._members) + 1:
            number, window = next(source, (-1, None))
            if window is None:
                break
            self._kept[number] = window
            self._queue.append(number)
        self._send()
        return bool(self._kept)

    def _send(self) -> None:
        """Give windows to the workers that have fewest."""
        while self._queue:
            free = [member for member in self._members if member.free]
            if not free:
                return
            member, number = min(free, key=lambda m: len(m.windows)), self._queue.popleft()
            member.windows.append(number)
            ref = member.actor.score.remote(self._kept[number])
            self._flying[ref] = member, number

    def _hear(self) -> None:
        """Wait for news, and take it in."""
        ready, _ = ray.wait(list(self._flying), num_returns=1, timeout=START_TIMEOUT_S)
        if not ready:
            raise WorkerLost(
                f"No worker answered for {START_TIMEOUT_S:g} s. Each needs a machine with "
                f"{self._share.cpus:g} CPUs and {self._share.gpus:g} GPUs: is there one?"
            )
        for ref in ready:
            member, number = self._flying.pop(ref)
            try:
                reply = ray.get(ref)
            except RayError as error:
                self._lost(member, number, error)
            else:
                self._landed(member, number, reply)

    def _landed(self, member: _Member, number: int | None, reply: Reply) -> None:
        if number is None:
            self._opened(member, reply)
            return
        member.windows.remove(number)
        try:
            self._done[number] = unpack(reply)[0]
        except EchelonError as error:
            self._done[number] = error

    def _opened(self, member: _Member, reply: Reply) -> None:
        """A worker is up, or cannot be: with others that can, it is done without."""
        try:
            (steps, machine), _, _ = unpack(reply)
        except EchelonError as error:
            self._members.remove(member)
            ray.kill(member.actor)
            if not self._members:
                raise
            logger.warning("A worker is done without: %s", error)
            return
        self._steps = self._steps or steps
        member.machine = machine

    def _lost(self, member: _Member, number: int | None, error: RayError) -> None:
        """A worker has gone: what it had goes to others, and another takes its place."""
        why, blame = loss_of(member.machine, error)
        logger.warning("A worker is lost: %s", why)
        self._flying = {ref: at for ref, at in self._flying.items() if at[0] is not member}
        self._queue.extendleft(reversed(member.windows))
        self._members.remove(member)
        ray.kill(member.actor)
        blamed = member.windows[0] if member.windows else number
        self._ended[blamed] += blame
        if self._ended[blamed] >= ATTEMPTS:
            at = "as they started" if blamed is None else f"from line {_line(self._kept[blamed])}"
            raise WorkerLost(f"{ATTEMPTS} workers ended in turn {at} ({why}). See Ray's logs.")
        self._hire()

    def _hire(self) -> None:
        member = _Member(
            _BENCH.options(num_cpus=self._share.cpus, num_gpus=self._share.gpus).remote()
        )
        self._members.append(member)
        ref = member.actor.open.remote(self._model, self._options, self._steps)
        self._flying[ref] = member, None


def _line(window: RowWindow) -> int:
    return window.rows[0].line if window.rows else 0


def _room(share: WorkerResources) -> int:
    """Workers for which the cluster has room now, one at least."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    fits = [
        min(
            int(node.get("CPU", 0) // share.cpus),
            int(node.get("GPU", 0) // share.gpus) if share.gpus else int(1e9),
        )
        for node in nodes
    ]
    return max(1, sum(fits))
