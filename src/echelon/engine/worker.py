"""A scorer in a child process, so that a crash, a hang or a leak ends only the child.

Messages are pickles over a socket with time limits: ``multiprocessing.Connection`` cannot give up a
write, and a stopped child does not read. No torch is imported here, but in the child.
:mod:`echelon.engine.supervisor` restarts workers.
"""

from __future__ import annotations

import logging
import os
import pickle
import select
import socket
import struct
import subprocess
import sys
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from echelon.errors import EchelonError, ScoringFailed
from echelon.models.base import (
    DeviceOutOfMemory,
    Scorer,
    WorkerDied,
    WorkerLostDevice,
    WorkerWedged,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from echelon.types import FloatArray, ModelInfo, TokenBatch

logger = logging.getLogger(__name__)

HEADER = struct.Struct("!Q")

START_TIMEOUT_S = 600.0
"""Opening a large model from a slow disk takes minutes; a child that needs longer hangs."""

STOP_TIMEOUT_S = 5.0
"""A child that does not end in this time is killed; it holds nothing that could be lost."""

RESTART_DELAYS_S = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0)
"""Pause before the first, second, … restart in a row without a good step: a single crash costs no
wait, and a model that always crashes does not keep the machine busy."""


class Channel:
    """One end of a connected stream socket. One thread may send while another receives."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end

    def send(self, message: object, timeout_s: float | None = None) -> None:
        """Send a message; after a TimeoutError the channel cannot be used again."""
        data = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
        self._end.settimeout(timeout_s)
        self._end.sendall(HEADER.pack(len(data)) + data)

    def wait(self, timeout_s: float) -> bool:
        """Wait for a message or the end of the connection; returns whether one came in time."""
        poll = select.poll()
        poll.register(self._end, select.POLLIN)
        return bool(poll.poll(max(0.0, timeout_s) * 1000))

    def receive_bytes(self, timeout_s: float | None = None) -> bytes:
        """The next message, still pickled; raises EOFError when the other side has closed.

        It is safe beside a thread that sends, if neither has a time limit.
        """
        self._end.settimeout(timeout_s)
        (size,) = HEADER.unpack(self._read(HEADER.size))
        return bytes(self._read(size))

    def receive(self, timeout_s: float | None = None) -> Any:
        """The next message; see :meth:`receive_bytes`."""
        return pickle.loads(self.receive_bytes(timeout_s))  # noqa: S301 - from our own child

    def close(self) -> None:
        """Close the connection; closing twice does nothing."""
        self._end.close()

    def _read(self, size: int) -> bytearray:
        data = bytearray(size)
        view, got = memoryview(data), 0
        while got < size:
            count = self._end.recv_into(view[got:])
            if count == 0:
                raise EOFError
            got += count
        return data


class WorkerReply(NamedTuple):
    """Answer of a scoring process."""

    kind: str
    content: Any
    seconds: float  # time of the scorer
    resident_bytes: int  # memory that the process holds
    renew: dict[str, str] | None = None  # it should be replaced: variables to start the next with


class ScorerFactory(Protocol):
    """Opens the scorer in the child; it is pickled, so the child must be able to import it."""

    def __call__(self, *, precision: str) -> Scorer:
        """Open the model in a precision."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """A step's result."""

    logits: FloatArray  # float32 [pairs]
    seconds: float  # time of the scorer
    resident_bytes: int  # memory that the worker holds
    worn: bool = False  # the worker asks to be replaced before the next step


class Worker(Protocol):
    """Scores steps; results come in the order of the steps sent."""

    renewable: bool  # whether :meth:`start` starts a fresh process

    def start(self, precision: str, *, sparing: bool = False) -> ModelInfo:
        """Open the scorer; one that is still open is closed first.

        ``sparing`` lets a fresh process keep little memory beside the model.
        """

    def send(self, batch: TokenBatch, timeout_s: float) -> None:
        """Send a step; a second one may be sent while the first runs."""

    def wait(self, timeout_s: float) -> bool:
        """Wait for a result or the end; returns whether one came in time."""

    def receive(self, timeout_s: float) -> StepResult:
        """The next result."""

    def release(self) -> None:
        """Give cached memory back after the steps that were sent."""

    def kill(self) -> None:
        """End it now; from any thread."""

    def stop(self) -> None:
        """End it soon, after the steps that were sent."""


class ChildWorker:
    """A scorer that ``opener`` opens in a child process.

    ``on_end`` is called from another thread each time a child has ended; ``environment`` holds
    variables that it gets besides those of this process.
    """

    renewable = True

    def __init__(
        self,
        opener: ScorerFactory,
        name: str = "worker",
        start_timeout_s: float = START_TIMEOUT_S,
        on_end: Callable[[], None] | None = None,
        environment: dict[str, str] | None = None,
    ) -> None:
        self.name = name
        self._opener = opener
        self._environment = dict(environment or {})
        self._start_timeout_s = start_timeout_s
        self._on_end = on_end
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: Channel | None = None
        self._killed = False

    @property
    def pid(self) -> int | None:
        """The child's process id; None before it was started."""
        return None if self._process is None else self._process.pid

    def start(self, precision: str = "auto", *, sparing: bool = False) -> ModelInfo:
        """Start a child and open the scorer in it; a running child is killed first.

        Raises what opening raised, and WorkerDied or WorkerWedged as :meth:`receive`.
        """
        self._discard()
        self._killed = False
        ours, theirs = socket.socketpair()
        with theirs:
            self._channel = Channel(ours)
            self._process = _spawn(theirs.fileno(), self._environment)
        threading.Thread(target=self._relay, args=(self._process,), daemon=True).start()
        try:
            opened = self._hello(precision, sparing=sparing)
        except BaseException:
            self._discard()
            raise
        if take_variables(opened.renew, self._environment):
            return self.start(precision, sparing=sparing)
        info: ModelInfo = opened.content
        return info

    def _hello(self, precision: str, *, sparing: bool) -> WorkerReply:
        self.send((self._opener, precision, sparing), self._start_timeout_s)
        if not self.wait(self._start_timeout_s):
            raise self._wedged(f"did not open its model in {self._start_timeout_s:g} s")
        return self._reply(self._start_timeout_s)

    def score(self, batch: TokenBatch, timeout_s: float) -> StepResult:
        """Send a step and wait for its result; see :meth:`receive`."""
        self.send(batch, timeout_s)
        return self.receive(timeout_s)

    def send(self, batch: TokenBatch | tuple[ScorerFactory, str, bool], timeout_s: float) -> None:
        """Send a step; a child that does not read is killed, and WorkerWedged is raised."""
        message = batch if isinstance(batch, tuple) else ("score", batch)
        try:
            self._open_channel().send(message, timeout_s)
        except TimeoutError:
            raise self._wedged(f"read nothing for {timeout_s:g} s") from None
        except OSError:
            raise self._died() from None

    def wait(self, timeout_s: float) -> bool:
        """Wait for a result or the child's end; returns whether one came in time."""
        return self._open_channel().wait(timeout_s)

    def receive(self, timeout_s: float) -> StepResult:
        """The result of the earliest step without one.

        Raises:
            DeviceOutOfMemory: the step did not fit; the worker can be used again.
            EchelonError: what the scorer raised; the worker can be used again.
            WorkerDied: the child has ended.
            WorkerLostDevice: its device failed, and it has ended.
            WorkerWedged: no answer in time; the child was killed.
        """
        if not self.wait(timeout_s):
            raise self._wedged(f"gave no answer for {timeout_s:.1f} s")
        reply = self._reply(timeout_s)
        take_variables(reply.renew, self._environment)
        return step_result(reply)

    def release(self) -> None:
        """Give cached memory back after the steps that were sent."""
        try:
            self._open_channel().send(("release",), STOP_TIMEOUT_S)
        except OSError:
            logger.debug("%s ended before it could release memory", self.name)

    def kill(self) -> None:
        """End the child now by SIGKILL, which ends a stopped process too; from any thread."""
        self._killed = True
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def stop(self) -> None:
        """Let the child end after the steps that were sent; kill it if that takes too long."""
        if self._process is None or self._channel is None:
            return
        try:
            if not self._killed:
                self._channel.send(("stop",), STOP_TIMEOUT_S)
                self._process.wait(STOP_TIMEOUT_S)
        except (OSError, subprocess.TimeoutExpired):
            logger.warning("%s did not stop in %g s and was killed", self.name, STOP_TIMEOUT_S)
        self._discard()

    def _discard(self) -> None:
        """Kill the child and close its channel."""
        self.kill()
        if self._channel is not None:
            self._channel.close()

    def _relay(self, process: subprocess.Popen[bytes]) -> None:
        """Copy what the child prints to the log, then report its end."""
        if process.stdout is None:
            raise AssertionError("the child's output is not piped. This is a bug.")
        with process.stdout as output:
            for line in output:
                logger.warning("%s: %s", self.name, line.decode(errors="replace").rstrip())
        process.wait()  # now its socket is closed, so a reader sees the end
        if self._on_end is not None:
            self._on_end()

    def _reply(self, timeout_s: float) -> WorkerReply:
        try:
            reply: WorkerReply = self._open_channel().receive(timeout_s)
        except TimeoutError:
            raise self._wedged("stopped in the middle of an answer") from None
        except (EOFError, OSError):
            raise self._died() from None
        return unpack(reply)

    def _open_channel(self) -> Channel:
        if self._channel is None:
            raise WorkerDied(f"{self.name} was never started. This is a bug.")
        return self._channel

    def _wedged(self, what: str) -> WorkerWedged:
        self.kill()
        return WorkerWedged(f"{self.name} (process {self.pid}) {what} and was killed")

    def _died(self) -> WorkerDied:
        """The error for a child that has ended."""
        if self._process is None or self._killed:
            return WorkerDied(f"{self.name} was stopped")
        try:
            code = self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.kill()
            code = 0
        how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
        return WorkerDied(f"{self.name} (process {self.pid}) ended {how}")


def unpack(reply: WorkerReply) -> WorkerReply:
    """The reply of a scoring process that succeeded; raises the error of one that failed."""
    kind, what = reply.kind, reply.content
    if kind == "memory":
        reason, crowded = what
        raise DeviceOutOfMemory(reason, crowded=crowded)
    if kind == "lost":
        raise WorkerLostDevice(f"its device failed ({(what.splitlines() or ['?'])[0]})")
    if kind == "fault" and isinstance(what, EchelonError):
        raise what
    if kind == "fault":
        raise ScoringFailed(
            f"The model raised an error ({what}). Its traceback is in the log; please report it."
        )
    return reply


def take_variables(renew: dict[str, str] | None, environment: dict[str, str]) -> bool:
    """Add variables to a worker's environment, and say whether any is new there."""
    new = (renew or {}).items() - environment.items()
    environment.update(new)
    return bool(new)


def step_result(reply: WorkerReply) -> StepResult:
    """The result in the reply to a step."""
    worn = reply.renew is not None
    return StepResult(reply.content, reply.seconds, reply.resident_bytes, worn)


def _spawn(descriptor: int, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start a fresh interpreter: a fork would copy the locks of our threads."""
    path = os.pathsep.join(entry for entry in sys.path if entry)
    return subprocess.Popen(  # noqa: S603 - our own interpreter and module
        [sys.executable, "-m", "echelon.engine.child", str(descriptor)],
        pass_fds=(descriptor,),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, **environment, "PYTHONPATH": path},
    )
