"""A worker on a Ray cluster: an actor that opens the model on its machine and scores steps.

To a service it is what a child process is. If the actor or its machine is lost, the service gives
the steps to another worker; Ray restarts nothing here, :mod:`echelon.engine.supervisor` does.

A Ray call can fail in two ways (Ray's page "Actor fault tolerance"): the actor died, or it is
unavailable, which may pass, and the call may have run or not. Every call here can be repeated
without harm, so Ray repeats it (``max_task_retries``) when the connection breaks; an actor that
stays unavailable is replaced.
"""

from __future__ import annotations

import logging
import os
import threading
import warnings
from collections import deque
from concurrent.futures import CancelledError
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import ActorUnavailableError, RayError

from echelon.engine.child import (
    fault_of,
    resident_bytes,
    score_step,
    spare_memory,
    variables_to_renew,
)
from echelon.engine.launch import with_precision_there
from echelon.engine.worker import (
    START_TIMEOUT_S,
    STOP_TIMEOUT_S,
    StepResult,
    WorkerReply,
    step_result,
    take_variables,
    unpack,
)
from echelon.errors import EchelonWarning, InvalidInput, check_positive
from echelon.models.base import WorkerDied, WorkerGone, WorkerWedged
from echelon.models.hub import DEMO, resolve
from echelon.models.modelscope import PREFIX as MODELSCOPE
from echelon.models.registry import open_scorer
from echelon.options import Options
from echelon.server.settings import ANY_CLUSTER
from echelon.types import TokenBatch, monotonic

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from concurrent.futures import Future

    import numpy as np

    from echelon.engine.launch import PreparedModel
    from echelon.engine.worker import ScorerFactory
    from echelon.models.base import Scorer
    from echelon.models.hub import ModelFolder
    from echelon.profile import Profile
    from echelon.types import ModelInfo

logger = logging.getLogger(__name__)

CALL_RETRIES = 1
"""Times that Ray repeats a call whose actor cannot be reached; a call of a dead actor fails."""

STOP_CHECK_S = 0.2
"""Seconds between two checks of a starting worker for a request to stop."""


@dataclass(frozen=True, slots=True)
class RemoteScorerFactory:
    """Opens a model on the machine of the actor, and fetches it if it is not there yet."""

    model: str  # hub id, a folder that every machine has, or ``"demo"``
    revision: str | None  # the hub's commit, so that all workers have the same; else None
    device: str
    threads: int
    label: str | int | None
    keep_bf16: tuple[str, ...]  # layers that int8 leaves in bf16, as the precision check found
    profile: Profile | None = None  # where it chose the precision: another may be taken there
    profile_name: str | None = None  # for the warning

    def __call__(self, *, precision: str) -> Scorer:
        """Open the model in a precision, or raise :class:`ModelError`.

        Warns where it takes another one (:func:`echelon.engine.launch.with_precision_there`).
        """
        folder = resolve(self.model, revision=self.revision)
        if self.profile is not None:
            wanted = Options.of(precision=precision, device=self.device, profile=self.profile_name)
            precision = with_precision_there(wanted, self.profile, folder).precision
        return open_scorer(
            folder.path,
            device=self.device,
            precision=precision,
            threads=self.threads,
            label=self.label,
            keep_bf16=list(self.keep_bf16),
        )


def place_of(folder: ModelFolder, model: str | os.PathLike[str]) -> tuple[str, str | None]:
    """Name and revision with which other machines resolve the same model."""
    if model == DEMO:
        return DEMO, None
    if folder.name.startswith(MODELSCOPE):  # with its revision in the name
        return folder.name, None
    if folder.path.name == folder.revision:  # a snapshot of the hub's is named by its commit
        return str(model), folder.revision
    return str(folder.path), None


def factory_of(
    prepared: PreparedModel, model: str | os.PathLike[str], resources: WorkerResources
) -> RemoteScorerFactory:
    """The factory that opens a prepared model on a worker with these resources."""
    options = prepared.options
    name, revision = place_of(prepared.folder, model)
    return RemoteScorerFactory(
        model=name,
        revision=revision,
        device=device_there(options.device, resources.gpus),
        threads=options.threads or max(1, int(resources.cpus)),
        label=options.label,
        keep_bf16=tuple(prepared.keep_bf16),
        profile=prepared.profile if prepared.by_profile else None,
        profile_name=None if options.profile is None else str(options.profile),
    )


@dataclass(frozen=True, slots=True)
class WorkerResources:
    """CPUs, as Ray counts them, and GPUs of one worker; a fraction lets workers share a GPU."""

    cpus: float = 1.0
    gpus: float | None = None  # None is one, where the cluster has any

    def __post_init__(self) -> None:
        check_positive(worker_cpus=self.cpus)
        gpus = self.gpus or 0.0
        if gpus < 0 or (gpus > 1 and gpus != int(gpus)):
            remedy = "Give 0, a fraction of 1, or a number."
            raise InvalidInput("worker_gpus", f"{self.gpus} is not possible", remedy)

    def on_cluster(self, device: str) -> WorkerResources:
        """The same with a number of GPUs.

        Without a GPU of its own Ray would show a worker all GPUs of its machine, and all workers
        would take the first.
        """
        if self.gpus is not None:
            return self
        nodes = ray.nodes() if device != "cpu" else []
        some = any(node["Alive"] and node["Resources"].get("GPU") for node in nodes)
        return replace(self, gpus=float(some))

    @property
    def needs(self) -> dict[str, float]:
        """What Ray reserves for a worker, by its own names."""
        return {"num_cpus": self.cpus, "num_gpus": self.gpus or 0.0}

    def __str__(self) -> str:
        return f"{self.cpus:g} CPUs and {self.gpus or 0.0:g} GPUs"


def device_there(device: str, gpus: float | None) -> str:
    """The ``device`` option of a worker, to which Ray shows its own GPUs only, from number 0."""
    if gpus:
        return "cuda" if device.startswith("cuda:") else device
    return "cpu" if device == "auto" else device


@contextmanager
def warnings_of() -> Iterator[list[str]]:
    """Collect Echelon's warnings: an actor sends them to those who read its caller's log."""
    found: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", EchelonWarning)
        yield found
    found += [str(one.message) for one in caught if issubclass(one.category, EchelonWarning)]


class RemoteScorer:
    """The actor: the counterpart of :mod:`echelon.engine.child` in a local worker process."""

    def __init__(self) -> None:
        self._scorer: Scorer | None = None

    def open(self, factory: ScorerFactory, precision: str, *, sparing: bool) -> WorkerReply:
        """Open the scorer, once; reply with its info, machine's id, process id and warnings."""
        if sparing:
            spare_memory()
        try:
            with warnings_of() as told:
                self._scorer = self._scorer or factory(precision=precision)
        except Exception as error:  # noqa: BLE001 - the caller raises it
            return fault_of(error)
        found = self._scorer.info, ray.get_runtime_context().get_node_id(), os.getpid(), told
        return WorkerReply("info", found, 0.0, resident_bytes(), variables_to_renew(self._scorer))

    def score(self, *parts: np.ndarray[Any, Any] | None) -> WorkerReply:
        """Score a step. Its arrays are copied: Ray's memory is read-only, torch needs its own."""
        if self._scorer is None:
            raise AssertionError("a step before the scorer was open. This is a bug.")
        ids, type_ids, offsets = (None if part is None else part.copy() for part in parts)
        if ids is None or offsets is None:
            raise AssertionError("a step without ids. This is a bug.")
        return score_step(self._scorer, TokenBatch(ids, type_ids, offsets))

    def release(self) -> None:
        """Free cached memory."""
        if self._scorer is not None:
            self._scorer.release()

    @ray.method(concurrency_group="life", max_task_retries=-1)  # type: ignore[untyped-decorator]  # Ray's has no types
    def live(self) -> None:
        """Never return: the future of this call ends when the actor does."""
        threading.Event().wait()


@dataclass(eq=False)
class RayWorker:
    """A scorer in an actor; see :class:`echelon.engine.worker.Worker`."""

    factory: ScorerFactory
    resources: WorkerResources
    name: str = "worker"
    start_timeout_s: float = START_TIMEOUT_S  # until a machine is free and the model is open
    on_end: Callable[[], None] | None = None  # called, from any thread, when an actor has ended
    pid: int | None = field(default=None, init=False)  # on its machine; None before it was up
    renewable = True

    def __post_init__(self) -> None:
        self._actor: Any = None
        self._machine: str | None = None
        self._life: Future[Any] | None = None
        self._sent: deque[Future[WorkerReply]] = deque()
        self._environment: dict[str, str] = {}
        self._killed = False

    def start(self, precision: str = "auto", *, sparing: bool = False) -> ModelInfo:
        """Start an actor and open the scorer in it; a running one is killed first."""
        self.kill()
        self._killed = False
        self._sent.clear()
        self._machine = None
        variables = {"env_vars": self._environment} if self._environment else None
        self._actor = _ACTOR.options(**self.resources.needs, runtime_env=variables).remote()
        self._life = self._actor.live.remote().future()
        self._life.add_done_callback(self._ended)
        opening = self._actor.open.remote(self.factory, precision, sparing=sparing)
        self._sent.append(opening.future())
        try:
            opened = self._await_open()
        except BaseException:
            self.kill()
            raise
        if take_variables(opened.renew, self._environment):
            return self.start(precision, sparing=sparing)
        info: ModelInfo
        info, self._machine, self.pid, told = opened.content
        for warning in told:
            logger.warning("%s, on machine %s: %s", self.name, self._machine, warning)
        return info

    def _await_open(self) -> WorkerReply:
        end = monotonic() + self.start_timeout_s
        while not self.wait(STOP_CHECK_S):
            if self._killed:  # Ray does not report an actor killed before it was placed
                raise WorkerDied(f"{self.name} was stopped")
            if monotonic() >= end:
                late = f"is not up after {self.start_timeout_s:g} s"
                raise self._wedged(f"{late}; it needs a machine with {self.resources}")
        return unpack(self._reply())

    def send(self, batch: TokenBatch, timeout_s: float) -> None:
        """Send a step; a second may be sent while the first runs."""
        del timeout_s  # Ray does not block here
        parts = batch.ids, batch.type_ids, batch.offsets
        try:
            self._sent.append(self._actor.score.remote(*parts).future())
        except RayError as error:
            raise self._died(error) from None

    def wait(self, timeout_s: float) -> bool:
        """Wait for a result or the actor's end; False after the timeout."""
        try:
            self._first().exception(max(0.0, timeout_s))
        except TimeoutError:
            return False
        except CancelledError:
            return True
        return True

    def receive(self, timeout_s: float) -> StepResult:
        """The result of the earliest step that was sent.

        Raises :class:`WorkerGone` if the machine is lost or cannot be reached, the errors of the
        scorer, and those of :meth:`echelon.engine.worker.Worker.receive`.
        """
        if not self.wait(timeout_s):
            raise self._wedged(f"gave no answer for {timeout_s:.1f} s")
        reply = unpack(self._reply())
        take_variables(reply.renew, self._environment)
        return step_result(reply)

    def release(self) -> None:
        """Free cached memory after the steps that were sent."""
        self._actor.release.remote()

    def kill(self) -> None:
        """End the actor now; from any thread."""
        self._killed = True
        if self._actor is not None:
            ray.kill(self._actor)

    def stop(self) -> None:
        """End after the steps that were sent, within a few seconds."""
        if self._sent and not self._killed:
            self.wait(STOP_TIMEOUT_S)
        self.kill()

    def _first(self) -> Future[Any]:
        """The future of the earliest step that was sent, else that of the actor's life."""
        future = self._sent[0] if self._sent else self._life
        if future is None:
            raise WorkerDied(f"{self.name} was never started. This is a bug.")
        return future

    def _reply(self) -> WorkerReply:
        """The result of the first future.

        Without one the actor is killed: the cause, such as a lost object, would fail later steps.
        """
        future = self._first()
        if self._sent:
            self._sent.popleft()
        try:
            reply: WorkerReply = future.result()
        except (RayError, CancelledError) as error:
            raise self._died(error) from None
        return reply

    def _ended(self, _: Future[Any]) -> None:
        if self.on_end is not None:
            self.on_end()

    def _wedged(self, what: str) -> WorkerWedged:
        self.kill()
        return WorkerWedged(f"{self.name} {what} and was killed")

    def _died(self, error: BaseException) -> WorkerDied:
        stopped = self._killed
        self.kill()
        if stopped:
            return WorkerDied(f"{self.name} was stopped")
        why, blamed = loss_of(self._machine, error)
        if not blamed:
            return WorkerGone(f"{self.name}: {why}")
        return WorkerDied(f"{self.name} (process {self.pid}) ended ({why})")


_ACTOR = ray.remote(
    concurrency_groups={"life": 1},  # besides the one thread that scores steps
    max_restarts=0,
    max_task_retries=CALL_RETRIES,
    scheduling_strategy="SPREAD",
)(RemoteScorer)


def loss_of(machine: str | None, error: BaseException) -> tuple[str, bool]:
    """Why an actor is lost, and whether its work may be the cause.

    Of a machine that has just been lost, Ray first says only that its actors cannot be reached.
    """
    if isinstance(error, ActorUnavailableError):
        return "it could not be reached, nor on a second try", False
    if machine is not None and not any(
        node["NodeID"] == machine and node["Alive"] for node in ray.nodes()
    ):
        return "its machine is lost", False
    return (str(error).strip().splitlines() or ["?"])[-1].strip(), True


def connect(address: str) -> None:
    """Connect to a cluster; raise :class:`InvalidInput` if none can be reached."""
    try:
        ray.init(None if address == ANY_CLUSTER else address, log_to_driver=True)
    except (ConnectionError, ValueError, RuntimeError) as error:
        words = str(error).splitlines()[0].rstrip(".")
        problem = f"{address} cannot be reached ({words})"
        raise InvalidInput("--ray", problem, "Start a cluster with `ray start --head`.") from None
