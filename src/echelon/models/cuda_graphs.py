"""CUDA graphs of whole forward passes: a small step costs one launch instead of hundreds.

All graphs are captured before the first step, the largest first, so that no step waits for a
capture. :mod:`echelon.models.cuda_steps` says which.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from echelon.errors import InvalidInput
from echelon.models.faults import is_out_of_memory

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from echelon.models.cuda_steps import CaptureShape, Ladder

    Record = Callable[[Callable[[], Tensor]], "Recording"]
    """Runs work once as it is, then captures it."""


logger = logging.getLogger(__name__)

GRAPHS_SWITCH = "ECHELON_CUDA_GRAPHS"
"""Environment variable: ``off`` runs every step without graphs, as a process does that is started
after a capture failed."""

FIRST_PAUSE = 64
"""Steps without graphs after memory ran out. Then they come back one by one, each when a step needs
it: a capture takes about three passes."""

BACKOFF = 8
LONGEST_PAUSE = 4096
"""Factor by which the pause grows each time memory runs out, and its end: graphs and large steps do
not take memory from each other for ever, and one bad hour does not slow all later ones."""


def graphs_allowed() -> bool:
    """What :data:`GRAPHS_SWITCH` says; :class:`InvalidInput` for a value that it does not know."""
    value = os.environ.get(GRAPHS_SWITCH, "")
    if value not in {"", "off"}:
        raise InvalidInput(
            GRAPHS_SWITCH, f"{value!r} is unknown", "Set it to off, or unset it for CUDA graphs."
        )
    return not value


@dataclass(frozen=True, slots=True)
class Recording:
    """A captured pass."""

    replay: Callable[[], None]  # runs it again on the current inputs
    output: Tensor  # where it leaves its result
    drop: Callable[[], None]  # frees its memory


class CudaGraphs:
    """Runs a forward pass from a graph where there is one; for one thread at a time.

    ``forward`` computes the logits of the step in a shape's inputs; ``record`` captures work.

    Attributes:
        failed: why a capture failed for another reason than memory, else None. There are no graphs
            from then on, and the process should be replaced: torch's allocator may keep the failed
            capture's memory for good.
    """

    def __init__(
        self, forward: Callable[[CaptureShape], Tensor], record: Record, ladder: Ladder
    ) -> None:
        self._forward = forward
        self._record = record
        self._ladder = ladder
        self._recordings: dict[CaptureShape, Recording] = {}
        self._pause = FIRST_PAUSE // BACKOFF
        self._steps_to_wait = 0
        self._worked = True  # since memory ran out last
        self.failed: str | None = None

    def __len__(self) -> int:
        return len(self._recordings)

    def prepare(self) -> None:
        """Capture the whole ladder, the largest shape first; stop where a capture fails."""
        for shape in self._ladder.shapes():
            if not self._capture(shape):
                return
        self._worked = True

    def shape_for(self, exact: CaptureShape) -> CaptureShape | None:
        """The captured shape to run a step in; None if it must run as it is."""
        self._worked = True
        if self._steps_to_wait:
            self._steps_to_wait -= 1
            return None
        shape = self._ladder.find(exact)
        if shape is None or self.failed is not None:
            return None
        return shape if shape in self._recordings or self._capture(shape) else None

    def run(self, shape: CaptureShape) -> Tensor:
        """Logits [shape.pairs] of a captured shape; valid until the next call."""
        recording = self._recordings[shape]
        recording.replay()
        return recording.output

    def memory_ran_out(self) -> None:
        """Drop all graphs, and wait with new ones for longer than the last time.

        Called twice without a step between, as a child and its parent may, it counts once.
        """
        self.clear()
        if self._worked:
            self._pause = min(LONGEST_PAUSE, self._pause * BACKOFF)
        self._steps_to_wait, self._worked = self._pause, False

    def clear(self) -> None:
        """Drop all graphs."""
        for recording in self._recordings.values():
            recording.drop()
        self._recordings.clear()

    def _capture(self, shape: CaptureShape) -> bool:
        """Capture a shape; whether that worked."""
        try:
            self._recordings[shape] = self._record(lambda: self._forward(shape))
        except RuntimeError as error:
            short = _ran_out_of_memory(error)
            reason = str(error).partition("\n")[0]
        else:
            return True
        # Outside the except block no traceback keeps the failed capture's tensors alive.
        self._give_up(reason, short=short)
        return False

    def _give_up(self, reason: str, *, short: bool) -> None:
        if short:
            self.memory_ran_out()
            logger.warning(
                "No memory for a CUDA graph (%s). Steps run without for now, and small ones take "
                "longer. Leave more of the card's memory free.",
                reason,
            )
            return
        self.failed = reason
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
