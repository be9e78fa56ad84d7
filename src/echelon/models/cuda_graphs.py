"""CUDA graphs of whole forward passes: a small step costs one launch instead of hundreds.

A pass is captured when its shape has occurred often enough, and replayed from then on. If capturing
fails, the step runs without a graph.
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

MAX_GRAPHS = 96
"""Graphs kept at once; each holds some 300 launches of a 24-layer model. They share one memory
pool."""

FIRST_PATIENCE = 2
"""Uses of a shape before it is captured: capturing costs about three passes, and a shape that
occurs once, such as the end of a long run, is not worth it."""

BACKOFF = 8
"""Factor by which patience grows each time memory runs out, so that graphs and large steps do not
take memory from each other for ever."""


@dataclass(frozen=True, slots=True)
class Recording:
    """A captured pass."""

    replay: Callable[[], None]  # runs it again on the current inputs
    output: Tensor  # where it leaves its result
    drop: Callable[[], None]  # frees its memory


class CudaGraphs:
    """Runs a forward pass, from a graph if there is one; for one thread at a time.

    ``forward`` computes the logits of the step in a shape's inputs; ``record`` captures work.
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

    def run(self, shape: CaptureShape) -> Tensor:
        """Logits [shape.pairs]; valid until the next call."""
        recording = self._recordings.get(shape) or self._capture_if_due(shape)
        if recording is None:
            return self._forward(shape)
        self._recordings.move_to_end(shape)
        recording.replay()
        return recording.output

    def memory_ran_out(self) -> None:
        """Drop all graphs, and capture new ones later than before."""
        self._patience *= BACKOFF
        self.clear()

    def clear(self) -> None:
        """Drop all graphs."""
        for recording in self._recordings.values():
            recording.drop()
        self._recordings.clear()
        self._uses.clear()

    def _capture_if_due(self, shape: CaptureShape) -> Recording | None:
        self._uses[shape] += 1
        if self._broken or self._uses[shape] < self._patience:
            return None
        recording = self._capture(shape)
        if recording is not None:
            self._evict()
            self._recordings[shape] = recording
        return recording

    def _evict(self) -> None:
        """Drop the graph that was not used for longest, and its count of uses."""
        while len(self._recordings) >= MAX_GRAPHS:
            shape, recording = self._recordings.popitem(last=False)
            recording.drop()
            del self._uses[shape]

    def _capture(self, shape: CaptureShape) -> Recording | None:
        try:
            return self._record(lambda: self._forward(shape))
        except RuntimeError as error:
            short = _ran_out_of_memory(error)
            reason = str(error).partition("\n")[0]
        # Outside the except block no traceback keeps the failed capture's tensors alive.
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


def _ran_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out while capturing, also if ending the capture then failed."""
    cause: BaseException | None = error
    while cause is not None:
        if is_out_of_memory(cause):
            return True
        cause = cause.__context__
    return False


class CudaRecorder:
    """Captures work on a CUDA device into one memory pool.

    Graphs may share a pool because they are replayed one at a time in one stream, and each result
    is read before the next replay.
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
            if not self._alive:  # a pool ends with its last graph
                self._pool = torch.cuda.graph_pool_handle()
            before = torch.cuda.current_stream()
            self._stream.wait_stream(before)
            # The outer context restores the stream also if ending the capture raises.
            with torch.cuda.stream(self._stream):
                work()
                graph, output = self._captured(work)
            before.wait_stream(self._stream)
        self._alive += 1
        return Recording(graph.replay, output, lambda: self._drop(graph))

    def _captured(self, work: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        graph = torch.cuda.CUDAGraph()
        # thread_local: other threads may use the device during the capture.
        with torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        ):
            output = work()
        return graph, output

    def _drop(self, graph: torch.cuda.CUDAGraph) -> None:
        graph.reset()
        self._alive -= 1
