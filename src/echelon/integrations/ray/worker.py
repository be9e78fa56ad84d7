"""How a worker on another machine opens the model that the server was given.

A worker on any machine of a Ray cluster: an actor that holds the scorer.

It is to a service what a child process is: steps go there, scores come back, and when the actor or
its machine has gone, the service gives the steps to another. Ray restarts nothing here;
:mod:`echelon.engine.supervisor` does.

Ray knows two ends of a call (its page "Actor fault tolerance"): the actor died, or it is
unavailable, which may pass, and the call may have run or not. No call here does harm twice, so that
Ray makes one again (``max_task_retries``) when the connection breaks; an actor that stays
unavailable is replaced.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from concurrent.futures import CancelledError
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import ActorUnavailableError, RayError

from echelon.engine.child import fault_of, resident_bytes, score_step, spare_memory
from echelon.engine.worker import START_TIMEOUT_S, STOP_TIMEOUT_S, StepResult, unpack
from echelon.errors import InvalidInput
from echelon.integrations.ray.command import HERE
from echelon.models.base import WorkerDied, WorkerGone, WorkerWedged
from echelon.models.hub import DEMO, resolve
from echelon.models.registry import open_scorer
from echelon.types import TokenBatch, monotonic

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    import numpy as np

    from echelon.engine.launch import PreparedModel
    from echelon.engine.worker import Reply, ScorerFactory
    from echelon.models.base import Scorer
    from echelon.models.hub import ModelFolder
    from echelon.types import ModelInfo


@dataclass(frozen=True, slots=True)
class RemoteScorerFactory:
    """Opens a model where it runs, fetching it where it is not there yet.

    Attributes:
        model: hub id, a folder that every machine has, or ``"demo"``.
        revision: the hub's commit, so that all workers have the same; else None.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        threads: CPU threads of the forward pass.
        label: which output of a head with several labels to score.
        keep_bf16: layers that int8 leaves in bf16, as the gate found.
    """

    model: str
    revision: str | None
    device: str
    threads: int
    label: str | int | None
    keep_bf16: tuple[str, ...]

    def __call__(self, *, precision: str) -> Scorer:
        """Open the model in a precision.

        Raises:
            ModelError: it is not there, damaged, or of an unsupported kind.
        """
        return open_scorer(
            resolve(self.model, revision=self.revision).path,
            device=self.device,
            precision=precision,
            threads=self.threads,
            label=self.label,
            keep_bf16=list(self.keep_bf16),
        )


def place_of(folder: ModelFolder, model: str | os.PathLike[str]) -> tuple[str, str | None]:
    """What other machines have to resolve to have the same model: its name and revision."""
    if model == DEMO:
        return DEMO, None
    if folder.path.name == folder.revision:  # a snapshot of the hub's is named by its commit
        return str(model), folder.revision
    return str(folder.path), None


def abroad(
    prepared: PreparedModel, model: str | os.PathLike[str], cpus: float
) -> RemoteScorerFactory:
    """What opens a prepared model on a worker that has so many CPUs."""
    options = prepared.options
    name, revision = place_of(prepared.folder, model)
    return RemoteScorerFactory(
        model=name,
        revision=revision,
        device=options.device,
        threads=options.threads or max(1, int(cpus)),
        label=options.label,
        keep_bf16=tuple(prepared.keep_bf16),
    )


logger = logging.getLogger(__name__)

TRIES_AGAIN = 1
"""How often Ray makes a call again whose actor cannot be reached; one that died is not asked."""

LOOK_S = 0.2
"""While it starts, a worker looks so often whether it was told to stop."""


@dataclass(frozen=True, slots=True)
class WorkerResources:
    """What of a machine one worker has.

    Attributes:
        cpus: CPUs, as Ray counts them.
        gpus: GPUs; a fraction lets workers share one.
    """

    cpus: float = 1.0
    gpus: float = 0.0

    def __post_init__(self) -> None:
        if not self.cpus > 0:
            raise InvalidInput("worker_cpus", f"{self.cpus} is not positive", "Give 1 or more.")
        if self.gpus < 0 or (self.gpus > 1 and self.gpus != int(self.gpus)):
            raise InvalidInput(
                "worker_gpus", f"{self.gpus} cannot be had", "Give 0, a fraction of 1, or a number."
            )


class RemoteScorer:
    """The actor's side: what :mod:`echelon.engine.child` is in a process of our own."""

    def __init__(self) -> None:
        self._scorer: Scorer | None = None

    def open(self, opener: ScorerFactory, precision: str, *, sparing: bool) -> Reply:
        """Open the scorer, once; where it is, machine and process, goes with its facts."""
        if sparing:
            spare_memory()
        try:
            self._scorer = self._scorer or opener(precision=precision)
        except Exception as error:  # noqa: BLE001 - whatever it is, the other side is told
            return fault_of(error)
        found = self._scorer.info, ray.get_runtime_context().get_node_id(), os.getpid()
        return "info", found, 0.0, resident_bytes()

    def score(self, *parts: np.ndarray[Any, Any] | None) -> Reply:
        """Score the step of a batch's arrays, which are Ray's own memory: torch wants its own."""
        if self._scorer is None:
            raise AssertionError("a step before the scorer was open. This is a bug.")
        ids, type_ids, offsets = (None if part is None else part.copy() for part in parts)
        if ids is None or offsets is None:
            raise AssertionError("a step without ids. This is a bug.")
        return score_step(self._scorer, TokenBatch(ids, type_ids, offsets))

    def release(self) -> None:
        """Give cached memory back."""
        if self._scorer is not None:
            self._scorer.release()

    # Ray's decorator carries no types.
    @ray.method(concurrency_group="life", max_task_retries=-1)  # type: ignore[untyped-decorator]  # as said
    def live(self) -> None:
        """Never return: whoever waits for it hears of the actor's end, and of nothing else."""
        threading.Event().wait()


class RayWorker:
    """A scorer in an actor; see :class:`echelon.engine.worker.Worker`.

    Args:
        opener: opens the scorer, there.
        share: what of a machine it needs.
        name: what the log calls it.
        start_timeout_s: longest time until there is room and the model is open.
        on_end: called from some thread whenever an actor has ended.

    Attributes:
        pid: the actor's process, on its machine; None before it was up.
    """

    renewable = True

    def __init__(
        self,
        opener: ScorerFactory,
        share: WorkerResources | None = None,
        name: str = "worker",
        start_timeout_s: float = START_TIMEOUT_S,
        on_end: Callable[[], None] | None = None,
    ) -> None:
        self.name = name
        self.pid: int | None = None
        self._opener = opener
        self._share = share or WorkerResources()
        self._start_timeout_s = start_timeout_s
        self._on_end = on_end
        self._actor: Any = None
        self._machine: str | None = None
        self._life: Future[Any] | None = None
        self._sent: deque[Future[Reply]] = deque()
        self._killed = False

    def start(self, precision: str = "auto", *, sparing: bool = False) -> ModelInfo:
        """Start an actor and open the scorer in it; one that still lives is killed first.

        Raises:
            EchelonError: what opening raised.
            WorkerDied: it ended meanwhile.
            WorkerWedged: there was no room for it, or it took too long.
        """
        self.kill()
        self._killed = False
        self._sent.clear()
        self._machine = None
        self._actor = _ENGINE.options(
            num_cpus=self._share.cpus, num_gpus=self._share.gpus
        ).remote()  # fmt: skip
        self._life = self._actor.live.remote().future()
        self._life.add_done_callback(self._ended)
        opening = self._actor.open.remote(self._opener, precision, sparing=sparing)
        self._sent.append(opening.future())
        try:
            return self._hello()
        except BaseException:
            self.kill()
            raise

    def _hello(self) -> ModelInfo:
        end = monotonic() + self._start_timeout_s
        while not self.wait(LOOK_S):
            if self._killed:  # Ray says nothing of an actor that was killed before there was room
                raise WorkerDied(f"{self.name} was stopped")
            if monotonic() >= end:
                raise self._wedged(f"is not up after {self._start_timeout_s:g} s; {self._asked}")
        (facts, self._machine, self.pid), _, _ = unpack(self._reply())
        found: ModelInfo = facts
        return found

    def send(self, batch: TokenBatch, timeout_s: float) -> None:
        """Hand a step over; a second may be handed over while the first runs.

        Raises:
            WorkerDied: Ray cannot take it, for want of memory.
        """
        del timeout_s  # Ray takes it at once
        parts = batch.ids, batch.type_ids, batch.offsets
        try:
            self._sent.append(self._actor.score.remote(*parts).future())
        except RayError as error:
            raise self._died(error) from None

    def wait(self, timeout_s: float) -> bool:
        """Whether a result, or the actor's end, comes within a time."""
        future = self._sent[0] if self._sent else self._life
        if future is None:
            raise WorkerDied(f"{self.name} was never started. This is a bug.")
        try:
            future.exception(max(0.0, timeout_s))
        except TimeoutError:
            return False
        except CancelledError:
            return True
        return True

    def receive(self, timeout_s: float) -> StepResult:
        """The result of the earliest step that was sent.

        Raises:
            DeviceOutOfMemory: it did not fit; the worker lives on.
            EchelonError: what the scorer raised; the worker lives on.
            WorkerGone: the machine has gone, or cannot be reached.
            WorkerDied: the actor has ended.
            WorkerWedged: no answer in time; the actor was killed.
        """
        if not self.wait(timeout_s):
            raise self._wedged(f"gave no answer for {timeout_s:.1f} s")
        return StepResult(*unpack(self._reply()))

    def release(self) -> None:
        """Give cached memory back after the steps that were sent."""
        self._actor.release.remote()

    def kill(self) -> None:
        """End the actor now; from any thread."""
        self._killed = True
        if self._actor is not None:
            ray.kill(self._actor)

    def stop(self) -> None:
        """End after the steps that were sent, and soon."""
        if self._sent and not self._killed:
            self.wait(STOP_TIMEOUT_S)
        self.kill()

    @property
    def _asked(self) -> str:
        return f"it needs a machine with {self._share.cpus:g} CPUs and {self._share.gpus:g} GPUs"

    def _reply(self) -> Reply:
        """The first future's result.

        Its actor is killed where it has none: what is wrong with one step, such as a lost object,
        would be wrong with those behind it.
        """
        future = self._sent.popleft() if self._sent else self._life
        if future is None:
            raise WorkerDied(f"{self.name} was never started. This is a bug.")
        try:
            return future.result()
        except (RayError, CancelledError) as error:
            raise self._died(error) from None

    def _ended(self, _: Future[Any]) -> None:
        if self._on_end is not None:
            self._on_end()

    def _wedged(self, what: str) -> WorkerWedged:
        self.kill()
        return WorkerWedged(f"{self.name} {what} and was killed")

    def _died(self, error: BaseException) -> WorkerDied:
        told = self._killed
        self.kill()
        if told:
            return WorkerDied(f"{self.name} was stopped")
        why, blamed = loss_of(self._machine, error)
        if not blamed:
            return WorkerGone(f"{self.name}: {why}")
        return WorkerDied(f"{self.name} (process {self.pid}) ended ({why})")


_ENGINE = ray.remote(
    concurrency_groups={"life": 1},  # beside the one thread in which steps go one by one
    max_restarts=0,
    max_task_retries=TRIES_AGAIN,
    scheduling_strategy="SPREAD",
)(RemoteScorer)


def loss_of(machine: str | None, error: BaseException) -> tuple[str, bool]:
    """Why an actor is lost, and whether what it did may be to blame.

    Of a machine that has just gone, Ray first says only that its actors cannot be reached.

    Args:
        machine: where it was; None before that was known.
        error: what became of a call of it.
    """
    if isinstance(error, ActorUnavailableError):
        return "it could not be reached, nor when tried again", False
    if machine is not None and not any(
        node["NodeID"] == machine and node["Alive"] for node in ray.nodes()
    ):
        return "the machine it was on has gone", False
    return (str(error).strip().splitlines() or ["?"])[-1].strip(), True


def connect(address: str) -> None:
    """Connect to a cluster.

    Raises:
        InvalidInput: none is there.
    """
    try:
        ray.init(None if address == HERE else address, log_to_driver=True)
    except (ConnectionError, ValueError, RuntimeError) as error:
        words = str(error).splitlines()[0].rstrip(".")
        raise InvalidInput("--ray", f"{address} cannot be reached ({words})", "Mend it.") from None
