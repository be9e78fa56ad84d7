"""The scoring child: opens a scorer and scores what its parent sends, until the parent goes.

Run as ``python -m echelon.engine.child DESCRIPTOR`` by :mod:`echelon.engine.worker`, never by hand.
A thread of its own reads ahead, so that the next step is here when the running one ends; where it
reads the end, the parent has gone, and the process ends at once, whatever it computes.
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
from functools import cache
from queue import SimpleQueue
from typing import TYPE_CHECKING

from echelon.engine.worker import Channel
from echelon.errors import EchelonError
from echelon.models.base import DeviceOutOfMemory

if TYPE_CHECKING:
    import psutil

    from echelon.engine.worker import Reply
    from echelon.models.base import Scorer
    from echelon.types import TokenBatch

PRIMITIVES = 64
"""Products that oneDNN keeps ready in a process that begins after memory ran out, instead of 1024.
It compiles code for every number of rows and cannot be made to give it back: that is what filled
processes until a usual pair found no room. So few cost no time that could be told (docs/LOG.md)."""


def main(descriptor: int) -> None:
    """Live until told to stop."""
    faulthandler.enable()  # a crash of native code leaves its stack in the parent's log
    for number in (signal.SIGINT, signal.SIGTERM):
        # They reach every process of a terminal or unit; the parent decides when this one ends.
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
    except Exception as error:  # noqa: BLE001 - whatever it is, the parent is told
        channel.send(fault_of(error))
        return None
    channel.send(("info", scorer.info, 0.0, resident_bytes()))
    return scorer


def spare_memory() -> None:
    """Let this process, which has computed nothing yet, keep little beside the model."""
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(PRIMITIVES))


def _serve(channel: Channel, inbox: SimpleQueue[bytes], scorer: Scorer) -> None:
    while True:
        match pickle.loads(inbox.get()):  # noqa: S301 - from our own parent
            case ("score", batch):
                channel.send(score_step(scorer, batch))
            case ("release",):
                scorer.release()
            case ("stop",):
                scorer.close()
                return


def score_step(scorer: Scorer, batch: TokenBatch) -> Reply:
    """Score a step; whatever happens is told in words for :func:`echelon.engine.worker.unpack`."""
    began = time.perf_counter()
    try:
        logits = scorer.score(batch)
    except DeviceOutOfMemory as error:
        scorer.release()  # now: a step that was sent ahead begins before the parent can ask for it
        return "memory", str(error), time.perf_counter() - began, resident_bytes()
    except Exception as error:  # noqa: BLE001 - whatever it is, the parent is told
        return fault_of(error)
    return "scores", logits, time.perf_counter() - began, resident_bytes()


def fault_of(error: Exception) -> Reply:
    """An error as it can travel: ours whole, others as words, their traceback in the log."""
    traceback.print_exception(error)
    words = f"{type(error).__name__}: {error}"
    return "fault", error if isinstance(error, EchelonError) else words, 0.0, resident_bytes()


def resident_bytes() -> int:
    """Memory that this process holds, mapped weights included."""
    return int(_this_process().memory_info().rss)


@cache
def _this_process() -> psutil.Process:
    import psutil

    return psutil.Process()


if __name__ == "__main__":
    main(int(sys.argv[1]))
