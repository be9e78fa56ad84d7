"""The scoring child process: opens a scorer and scores the steps that its parent sends.

:mod:`echelon.engine.worker` runs it as ``python -m echelon.engine.child DESCRIPTOR``. A thread
reads ahead, so that the next step is here when the running one ends. When it reads the end, the
parent has ended, and the process exits at once. So it does when its device has failed, because
CUDA would refuse every later step: the parent starts another.
"""

from __future__ import annotations

import faulthandler
import os
import pickle
import signal
import socket
import sys
import threading
import time
import traceback
from contextlib import suppress
from functools import cache
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

from echelon.engine.worker import Channel, WorkerReply
from echelon.errors import DeviceLost, EchelonError
from echelon.models.base import DeviceOutOfMemory, Scorer, start, step_did_not_fit

if TYPE_CHECKING:
    import psutil

    from echelon.models.base import StartedStep
    from echelon.types import FloatArray, TokenBatch

POLL_S = 0.0002
"""How often a step on a device is asked whether it has ended, while no message comes."""

PRIMITIVES = 64
"""Primitives that oneDNN caches in a process started after memory ran out, instead of 1024. It
compiles code for each number of rows and never frees it, which filled processes until a usual pair
did not fit. No loss of speed was measured (docs/LOG.md)."""


LOST = 75
"""Exit code of a process whose device failed: EX_TEMPFAIL of sysexits.h, a new one may work."""


def main(descriptor: int) -> None:
    """Serve the parent until it ends this process."""
    faulthandler.enable()  # a native crash leaves its stack in the parent's log
    for number in (signal.SIGINT, signal.SIGTERM):
        # Sent to all processes of a terminal or unit; the parent ends this one.
        signal.signal(number, signal.SIG_IGN)
    channel = Channel(socket.socket(fileno=descriptor))
    inbox: SimpleQueue[bytes] = SimpleQueue()
    threading.Thread(target=_read, args=(channel, inbox), daemon=True).start()
    scorer = _open(channel, inbox.get())
    if scorer is not None:
        _serve(channel, inbox, scorer)


def _read(channel: Channel, inbox: SimpleQueue[bytes]) -> None:
    try:
        while True:
            inbox.put(channel.receive_bytes())
    except (EOFError, OSError):
        os._exit(0)


def _open(channel: Channel, message: bytes) -> Scorer | None:
    try:
        opener, precision, sparing = pickle.loads(message)  # noqa: S301 - from our own parent
        if sparing:
            spare_memory()
        scorer: Scorer = opener(precision=precision)
    except Exception as error:  # noqa: BLE001 - any error goes to the parent
        channel.send(fault_of(error))
        return None
    renew = variables_to_renew(scorer)
    channel.send(WorkerReply("info", scorer.info, 0.0, resident_bytes(), renew))
    return scorer


def spare_memory() -> None:
    """Let this process keep little memory beside the model; call it before any computation."""
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(PRIMITIVES))


def _serve(channel: Channel, inbox: SimpleQueue[bytes], scorer: Scorer) -> None:
    """Answer messages in order; while a device computes a step, the next one is begun."""
    running: BegunStep | None = None
    free_since = 0.0
    while True:
        message = _next(inbox, running)
        content = None if message is None else pickle.loads(message)  # noqa: S301 - from our own parent
        begun = BegunStep(scorer, content[1]) if content and content[0] == "score" else None
        if running is not None:
            reply = running.reply(free_since)
            free_since = time.perf_counter()
            channel.send(reply)
            if reply.kind == "lost":
                os._exit(LOST)  # a usual exit would wait for the device
        running = begun
        match content:
            case ("release",):
                scorer.release()
            case ("stop",):
                scorer.close()
                return


def _next(inbox: SimpleQueue[bytes], running: BegunStep | None) -> bytes | None:
    """The next message, or None if the running step ends before one comes."""
    while running is not None and not running.ready():
        with suppress(Empty):
            return inbox.get(timeout=POLL_S)
    return inbox.get() if running is None else None


class BegunStep:
    """A step that a scorer has begun, or could not begin."""

    def __init__(self, scorer: Scorer, batch: TokenBatch) -> None:
        self._scorer = scorer
        self._began = time.perf_counter()
        self._error: Exception | None = None
        self._started: StartedStep | None = None
        try:
            self._started = start(scorer, batch)
        except Exception as error:  # noqa: BLE001 - it is answered in its turn
            self._error = error

    def ready(self) -> bool:
        """Whether :meth:`reply` need not wait for a device."""
        return self._started is None or self._started.ready()

    def reply(self, free_since: float = 0.0) -> WorkerReply:
        """The reply, for :func:`echelon.engine.worker.unpack`.

        Its seconds are those that the step had the device, which was free since ``free_since`` on
        the clock ``time.perf_counter``.
        """
        try:
            logits = self._result()
        except DeviceOutOfMemory as error:
            # Now: a step sent ahead begins before the parent can ask.
            step_did_not_fit(self._scorer)
            seconds = self._seconds(free_since)
            return WorkerReply("memory", (str(error), error.crowded), seconds, resident_bytes())
        except Exception as error:  # noqa: BLE001 - any error goes to the parent
            return fault_of(error)
        seconds, renew = self._seconds(free_since), variables_to_renew(self._scorer)
        return WorkerReply("scores", logits, seconds, resident_bytes(), renew)

    def _result(self) -> FloatArray:
        if self._started is None:
            raise self._error or AssertionError("a step neither began nor failed. This is a bug.")
        return self._started.result()

    def _seconds(self, free_since: float) -> float:
        return time.perf_counter() - max(self._began, free_since)


def score_step(scorer: Scorer, batch: TokenBatch) -> WorkerReply:
    """Score a step; the reply is for :func:`echelon.engine.worker.unpack`."""
    return BegunStep(scorer, batch).reply()


def variables_to_renew(scorer: Scorer) -> dict[str, str] | None:
    """Variables to start the next process with, if this one should be replaced; else None.

    After a capture that failed, torch's allocator may never free the memory of its graphs again.
    """
    if getattr(scorer, "capture_failed", None) is None:
        return None
    from echelon.models.cuda_graphs import GRAPHS_SWITCH

    return {GRAPHS_SWITCH: "off"}


def fault_of(error: Exception) -> WorkerReply:
    """An error that can be pickled: ours as it is, others as text; the log has the traceback."""
    traceback.print_exception(error)
    if isinstance(error, DeviceLost):
        return WorkerReply("lost", error.problem, 0.0, resident_bytes())
    words = f"{type(error).__name__}: {error}"
    what = error if isinstance(error, EchelonError) else words
    return WorkerReply("fault", what, 0.0, resident_bytes())


def resident_bytes() -> int:
    """Resident memory of this process, mapped weights included."""
    return int(_this_process().memory_info().rss)


@cache
def _this_process() -> psutil.Process:
    import psutil

    return psutil.Process()


if __name__ == "__main__":
    main(int(sys.argv[1]))
