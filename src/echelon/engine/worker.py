"""Messages between a process and its scoring child: pickles over a socket, with time limits.

``multiprocessing.Connection`` cannot give up on a write, and a stopped child does not read; a
large step would then block its sender for ever.

A scorer in a supervised child process: a crash, a hang or a leak ends the child, not us.

Nothing here imports torch; the child does. Restarting is the caller's business
(:mod:`echelon.engine.supervisor`): a worker that died can be started again.
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
from typing import TYPE_CHECKING, Any, Protocol

from echelon.errors import EchelonError, ScoringFailed
from echelon.models.base import DeviceOutOfMemory, WorkerDied, WorkerWedged

if TYPE_CHECKING:
    from collections.abc import Callable

    from echelon.models.base import Scorer
    from echelon.types import FloatArray, ModelInfo, TokenBatch

HEADER = struct.Struct("!Q")


class Channel:
    """One end. Only one thread sends and only one receives at a time.

    Args:
        end: a connected stream socket; the channel closes it.
    """

    def __init__(self, end: socket.socket) -> None:
        self._end = end

    def send(self, message: object, timeout_s: float | None = None) -> None:
        """Send a message.

        Raises:
            TimeoutError: the other side did not read in time; the channel is of no more use.
            OSError: the other side has gone.
        """
        data = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
        self._end.settimeout(timeout_s)
        self._end.sendall(HEADER.pack(len(data)) + data)

    def wait(self, timeout_s: float) -> bool:
        """Whether there is something to read, or the end of it all, within a time."""
        poll = select.poll()
        poll.register(self._end, select.POLLIN)
        return bool(poll.poll(max(0.0, timeout_s) * 1000))

    def receive_bytes(self, timeout_s: float | None = None) -> bytes:
        """The next message, still pickled; safe beside a thread that sends without a limit.

        Raises:
            EOFError: the other side has gone.
            TimeoutError: the rest of it did not come in time.
        """
        self._end.settimeout(timeout_s)
        (size,) = HEADER.unpack(self._read(HEADER.size))
        return bytes(self._read(size))

    def receive(self, timeout_s: float | None = None) -> Any:
        """The next message; see :meth:`receive_bytes`."""
        return pickle.loads(self.receive_bytes(timeout_s))  # noqa: S301 - from our own child

    def close(self) -> None:
        """Hang up; closing twice does nothing."""
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


logger = logging.getLogger(__name__)

START_TIMEOUT_S = 600.0
"""A large model from a slow disk takes minutes; longer than this is a hang."""

STOP_TIMEOUT_S = 5.0
"""A child that does not end by itself in this time is killed; nothing it holds can be lost."""

RESTART_DELAYS_S = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0)
"""Pause before the first, second, … restart in a row without a step that went well: a single crash
costs no wait, and a model that cannot live does not burn the machine."""


Reply = tuple[str, Any, float, int]
"""What a scoring process answers: a kind, what goes with it, seconds, and the bytes it holds."""


class ScorerFactory(Protocol):
    """Opens the scorer in the child; it is pickled, so it must be importable there."""

    def __call__(self, *, precision: str) -> Scorer:
        """Open the model in a precision."""
        ...


@dataclass(frozen=True, slots=True)
class StepResult:
    """A step's result.

    Attributes:
        logits: float32 [pairs].
        seconds: time that the scorer took.
        resident_bytes: memory that the worker holds now.
    """

    logits: FloatArray
    seconds: float
    resident_bytes: int


class Worker(Protocol):
    """Where steps are scored: results come in the order of the steps sent.

    Attributes:
        renewable: whether :meth:`start` begins a fresh process.
    """

    renewable: bool

    def start(self, precision: str, *, sparing: bool = False) -> ModelInfo:
        """Open the scorer, closing one that is still open.

        Args:
            precision: what it computes in.
            sparing: where a fresh process begins, it keeps little beside the model.
        """
        ...

    def send(self, batch: TokenBatch, timeout_s: float) -> None:
        """Hand a step over; a second may be handed over while the first runs."""
        ...

    def wait(self, timeout_s: float) -> bool:
        """Whether a result, or the end, comes within a time."""
        ...

    def receive(self, timeout_s: float) -> StepResult:
        """The next result."""
        ...

    def release(self) -> None:
        """Give cached memory back after the steps that were sent."""
        ...

    def kill(self) -> None:
        """End it now; may be called from any thread."""
        ...

    def stop(self) -> None:
        """End it after the steps that were sent, and soon."""
        ...


class ChildWorker:
    """A scorer in a child process.

    Args:
        opener: opens the scorer, in the child.
        name: what the log calls it.
        start_timeout_s: longest time that opening may take.
        on_end: called from a thread of its own whenever a child has ended.
    """

    renewable = True

    def __init__(
        self,
        opener: ScorerFactory,
        name: str = "worker",
        start_timeout_s: float = START_TIMEOUT_S,
        on_end: Callable[[], None] | None = None,
    ) -> None:
        self.name = name
        self._opener = opener
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
        """Start a child and open the scorer in it; a child that still lives is killed first.

        Raises:
            EchelonError: what opening raised.
            WorkerDied: it ended meanwhile.
            WorkerWedged: it took too long.
        """
        self._discard()
        self._killed = False
        ours, theirs = socket.socketpair()
        with theirs:
            self._channel = Channel(ours)
            self._process = _spawn(theirs.fileno())
        threading.Thread(target=self._relay, args=(self._process,), daemon=True).start()
        try:
            return self._hello(precision, sparing=sparing)
        except BaseException:
            self._discard()
            raise

    def _hello(self, precision: str, *, sparing: bool) -> ModelInfo:
        self.send((self._opener, precision, sparing), self._start_timeout_s)
        if not self.wait(self._start_timeout_s):
            raise self._wedged(f"did not open its model in {self._start_timeout_s:g} s")
        facts: ModelInfo = self._reply(self._start_timeout_s)[0]
        return facts

    def score(self, batch: TokenBatch, timeout_s: float) -> StepResult:
        """Send a step and wait for its result; see :meth:`receive`."""
        self.send(batch, timeout_s)
        return self.receive(timeout_s)

    def send(self, batch: TokenBatch | tuple[ScorerFactory, str, bool], timeout_s: float) -> None:
        """Hand a step over; a second may be handed over while the first runs.

        Raises:
            WorkerDied: the child has ended.
            WorkerWedged: it does not read; it was killed.
        """
        message = batch if isinstance(batch, tuple) else ("score", batch)
        try:
            self._open_channel().send(message, timeout_s)
        except TimeoutError:
            raise self._wedged(f"read nothing for {timeout_s:g} s") from None
        except OSError:
            raise self._died() from None

    def wait(self, timeout_s: float) -> bool:
        """Whether a result, or the child's end, comes within a time."""
        return self._open_channel().wait(timeout_s)

    def receive(self, timeout_s: float) -> StepResult:
        """The result of the earliest step that was sent.

        Raises:
            DeviceOutOfMemory: it did not fit; the worker lives on.
            EchelonError: what the scorer raised; the worker lives on.
            WorkerDied: the child has ended.
            WorkerWedged: no answer in time; the child was killed.
        """
        if not self.wait(timeout_s):
            raise self._wedged(f"gave no answer for {timeout_s:.1f} s")
        logits, seconds, resident = self._reply(timeout_s)
        return StepResult(logits, seconds, resident)

    def release(self) -> None:
        """Give cached memory back after the steps that were sent."""
        try:
            self._open_channel().send(("release",), STOP_TIMEOUT_S)
        except OSError:
            logger.debug("%s: gone before it could release memory", self.name)

    def kill(self) -> None:
        """End the child now (SIGKILL, which ends a stopped one too); from any thread."""
        self._killed = True
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def stop(self) -> None:
        """Let the child end after the steps that were sent; kill it where that takes long."""
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
        """Leave nothing behind of the child there was."""
        self.kill()
        if self._channel is not None:
            self._channel.close()

    def _relay(self, process: subprocess.Popen[bytes]) -> None:
        """Everything the child prints goes to our log; then its end is told."""
        if process.stdout is None:
            raise AssertionError("the child's output is not piped. This is a bug.")
        with process.stdout as output:
            for line in output:
                logger.warning("%s: %s", self.name, line.decode(errors="replace").rstrip())
        process.wait()  # only now its socket is surely closed, and whoever is told sees the end
        if self._on_end is not None:
            self._on_end()

    def _reply(self, timeout_s: float) -> tuple[Any, float, int]:
        try:
            reply: Reply = self._open_channel().receive(timeout_s)
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
        """What is known of the end of the child."""
        if self._process is None or self._killed:
            return WorkerDied(f"{self.name} was stopped")
        try:
            code = self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.kill()
            code = 0
        how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
        return WorkerDied(f"{self.name} (process {self.pid}) ended {how}")


def unpack(reply: Reply) -> tuple[Any, float, int]:
    """What a reply holds, the seconds it took, and the bytes that its process holds.

    Raises:
        DeviceOutOfMemory: the step did not fit.
        EchelonError: what the scorer raised.
    """
    kind, what, seconds, resident = reply
    return FAULTS[kind](what) if kind in FAULTS else (what, seconds, resident)


def _spawn(descriptor: int) -> subprocess.Popen[bytes]:
    """A fresh interpreter: a fork would copy the locks of our threads."""
    path = os.pathsep.join(entry for entry in sys.path if entry)
    return subprocess.Popen(  # noqa: S603 - our own interpreter and module
        [sys.executable, "-m", "echelon.engine.child", str(descriptor)],
        pass_fds=(descriptor,),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONPATH": path},
    )


def _raise_memory(words: str) -> Any:
    raise DeviceOutOfMemory(words)


def _raise_fault(fault: EchelonError | str) -> Any:
    if isinstance(fault, EchelonError):
        raise fault
    raise ScoringFailed(
        f"The model raised an error ({fault}). Its traceback is in the log; please report it."
    )


FAULTS: dict[str, Callable[[Any], Any]] = {"memory": _raise_memory, "fault": _raise_fault}
