"""CUDA graphs of whole forward passes: a small step costs one launch instead of hundreds.

A pass is captured when its room has come up often enough, and replayed from then on. Capturing is
an extra, never a duty: where it fails, the step runs as it would have without.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from echelon.models.device import is_out_of_memory

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from echelon.models.staging import CaptureShape

    Record = Callable[[Callable[[], Tensor]], "Recording"]
    """Runs work once as it is, then captures it."""

logger = logging.getLogger(__name__)

MOST_GRAPHS = 96
"""Captured passes kept at once; each holds some 300 launches of a 24-layer model. They share one
pool, so what they compute in is paid for once."""

FIRST_PATIENCE = 2
"""Uses of a room before it is captured: capturing costs about three passes, and the odd step at the
end of a long run should not pay for a graph that nobody replays."""

BACKOFF = 8
"""By how much patience grows each time memory runs out, so that graphs and large steps cannot take
the memory from each other for ever."""


@dataclass(frozen=True, slots=True)
class Recording:
    """A captured pass.

    Attributes:
        replay: runs it again on what its inputs now hold.
        output: where it leaves its result.
        drop: forgets it, and lets go of its memory.
    """

    replay: Callable[[], None]
    output: Tensor
    drop: Callable[[], None]


class CudaGraphs:
    """Runs a forward pass, from a graph where there is one.

    Not for several threads at once: the engine runs one step at a time.

    Args:
        forward: computes the logits of the step that stands in a room's inputs.
        record: captures work; :class:`CudaRecorder` unless a test says otherwise.
    """

    def __init__(self, forward: Callable[[CaptureShape], Tensor], record: Record) -> None:
        self._forward = forward
        self._record = record
        self._recordings: OrderedDict[CaptureShape, Recording] = OrderedDict()
        self._uses: Counter[CaptureShape] = Counter()
        self._patience = FIRST_PATIENCE
        self._broken = False

    def __len__(self) -> int:
        return len(self._recordings)

    def run(self, room: CaptureShape) -> Tensor:
        """Logits, [room.pairs]; good until the next call."""
        recording = self._recordings.get(room) or self._capture_if_due(room)
        if recording is None:
            return self._forward(room)
        self._recordings.move_to_end(room)
        recording.replay()
        return recording.output

    def memory_ran_out(self) -> None:
        """Let go of all graphs, and be slower to capture new ones."""
        self._patience *= BACKOFF
        self.clear()

    def clear(self) -> None:
        """Let go of all graphs."""
        for recording in self._recordings.values():
            recording.drop()
        self._recordings.clear()
        self._uses.clear()

    def _capture_if_due(self, room: CaptureShape) -> Recording | None:
        self._uses[room] += 1
        if self._broken or self._uses[room] < self._patience:
            return None
        recording = self._capture(room)
        if recording is not None:
            self._make_place()
            self._recordings[room] = recording
        return recording

    def _make_place(self) -> None:
        """Drop the graph that was not used for longest; its room must earn a new one."""
        while len(self._recordings) >= MOST_GRAPHS:
            room, recording = self._recordings.popitem(last=False)
            recording.drop()
            del self._uses[room]

    def _capture(self, room: CaptureShape) -> Recording | None:
        try:
            return self._record(lambda: self._forward(room))
        except RuntimeError as error:
            short = _is_memory_trouble(error)
            reason = str(error).partition("\n")[0]
        # Out here no traceback keeps the failed capture's tensors alive.
        self._give_up(reason, short=short)
        return None

    def _give_up(self, reason: str, *, short: bool) -> None:
        if short:
            self.memory_ran_out()
            logger.warning(
                "No memory for a CUDA graph (%s). Steps run without for now, and small ones take "
                "longer. Leave more of the card's memory free.",
                reason,
            )
            return
        self._broken = True
        self.clear()
        logger.warning(
            "CUDA graphs cannot be captured here (%s). Steps run without, and small ones take "
            "longer. Update torch and the driver if it matters.",
            reason,
        )


def _is_memory_trouble(error: BaseException) -> bool:
    """Whether memory ran out while capturing; ending the capture may fail over it in turn."""
    cause: BaseException | None = error
    while cause is not None:
        if is_out_of_memory(cause):
            return True
        cause = cause.__context__
    return False


class CudaRecorder:
    """Captures work on a CUDA device, all of it into one pool of memory.

    Graphs may share a pool because they are replayed one at a time, in one stream, and each result
    is read before the next replay.

    Args:
        device: the card.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None  # torch keeps the type to itself
        self._alive = 0

    def __call__(self, work: Callable[[], Tensor]) -> Recording:
        """Run the work once, so that kernels and workspaces are loaded, then capture it."""
        with torch.cuda.device(self._device):
            if self._stream is None:
                self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]  # torch's own gap
            if not self._alive:  # a pool ends with its last graph and cannot be taken up again
                self._pool = torch.cuda.graph_pool_handle()
            before = torch.cuda.current_stream()
            self._stream.wait_stream(before)
            # The outer context also puts the stream back where ending the capture raises.
            with torch.cuda.stream(self._stream):
                work()
                graph, output = self._captured(work)
            before.wait_stream(self._stream)
        self._alive += 1
        return Recording(graph.replay, output, lambda: self._drop(graph))

    def _captured(self, work: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        graph = torch.cuda.CUDAGraph()
        # thread_local: what other threads do with the device meanwhile is no fault of theirs.
        with torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        ):
            output = work()
        return graph, output

    def _drop(self, graph: torch.cuda.CUDAGraph) -> None:
        graph.reset()
        self._alive -= 1
