"""CUDA graphs of whole forward passes: a small step costs one launch instead of hundreds.

A step goes to the device as one block of int32, in one copy: token ids, positions, segment ids if
the model reads them, the pairs' offsets, their first rows, and 0, 1, 2, … as offsets of one query a
pair. :class:`CaptureShape` says how many of each. Graphs need few shapes: :func:`bucket_of` rounds
up. Surplus rows belong to no pair, so attention never reads them; surplus pairs are empty.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from echelon.models.faults import is_out_of_memory

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    Record = Callable[[Callable[[], Tensor]], "Recording"]
    """Runs work once as it is, then captures it."""

    from torch import Tensor

    from echelon.types import IntArray, TokenBatch


logger = logging.getLogger(__name__)

MAX_TOKENS = 2048
"""Largest bucket. To launch the kernels of 24 layers takes a host some 3 ms, in which a large card
computes some 2,000 tokens of that model: above that, filler would cost more than a graph saves."""

MAX_PAIRS = 256
MIN_PAIRS = 16
MIN_LONGEST = 128  # a block of queries of the attention kernels: a shorter bound is not faster

FINE_TOKENS = 64
COARSE_TOKENS = 128
"""Steps between buckets, below and above 1,024 tokens: matrix units compute rows in blocks of 64 or
128, so most of the filler would be computed anyway."""

FINE_UP_TO = 1024
GROWTH = 4

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
class CaptureShape:
    """Capacity of a block."""

    tokens: int
    pairs: int
    longest: int  # tokens of the longest pair

    @classmethod
    def of(cls, batch: TokenBatch) -> CaptureShape:
        """The exact shape of a batch."""
        return cls(len(batch.ids), len(batch), int(batch.lengths.max()))

    def sections(self, *, segments: bool) -> dict[str, slice]:
        """Position of each part in the block."""
        sizes = {
            "ids": self.tokens,
            "positions": self.tokens,
            "segments": self.tokens if segments else 0,
            "offsets": self.pairs + 1,
            "firsts": self.pairs,
            "singles": self.pairs + 1,
        }
        ends = np.cumsum(list(sizes.values())).tolist()
        return {
            name: slice(end - size, end)
            for (name, size), end in zip(sizes.items(), ends, strict=True)
        }

    def size(self, *, segments: bool) -> int:
        """Integers in the block."""
        return int(self.sections(segments=segments)["singles"].stop)


LARGEST = CaptureShape(MAX_TOKENS, MAX_PAIRS, MAX_TOKENS)


@dataclass(frozen=True, slots=True)
class StepInputs:
    """A step on the device."""

    ids: Tensor  # int32 [tokens]
    positions: Tensor  # int32 [tokens]
    segments: Tensor | None  # int32 [tokens], or None if the model does not read them
    offsets: Tensor  # int32 [pairs + 1], first row of each pair
    firsts: Tensor  # int32 [pairs], first row of each pair, for the last layer
    singles: Tensor  # int32 [pairs + 1], offsets of one row a pair
    longest: int  # upper bound of the longest pair's tokens


def bucket_of(shape: CaptureShape) -> CaptureShape | None:
    """The bucket for a step, or None if the step is too large."""
    if shape.tokens > MAX_TOKENS or shape.pairs > MAX_PAIRS:
        return None
    step = FINE_TOKENS if shape.tokens <= FINE_UP_TO else COARSE_TOKENS
    return CaptureShape(
        -(-shape.tokens // step) * step,
        _grown(MIN_PAIRS, shape.pairs),
        _grown(MIN_LONGEST, shape.longest),
    )


def _grown(size: int, needed: int) -> int:
    """The first of ``size``, 4 · ``size``, 16 · ``size``, … that is enough."""
    while size < needed:
        size *= GROWTH
    return size


def fill(
    block: IntArray, shape: CaptureShape, batch: TokenBatch, positions: IntArray, *, segments: bool
) -> None:
    """Write a batch into a block of int32, whose shape is at least the batch's.

    Surplus rows get id and position 0, which every model has. A surplus pair begins where the last
    pair ends; its first row is row 0, because a row behind the last one may not exist. ``segments``
    is whether the model reads segment ids; a batch without any means zeros.
    """
    tokens, pairs = len(batch.ids), len(batch)
    parts = {name: block[where] for name, where in shape.sections(segments=segments).items()}
    block.fill(0)
    parts["ids"][:tokens] = batch.ids
    parts["positions"][:tokens] = positions
    if segments and batch.type_ids is not None:
        parts["segments"][:tokens] = batch.type_ids
    parts["offsets"][: pairs + 1] = batch.offsets
    parts["offsets"][pairs + 1 :] = tokens
    parts["firsts"][:pairs] = batch.offsets[:-1]
    parts["singles"][:] = np.arange(shape.pairs + 1)


def read(block: Tensor, shape: CaptureShape, *, segments: bool) -> StepInputs:
    """A block's parts as views."""
    parts = {
        name: block.narrow(0, where.start, where.stop - where.start)
        for name, where in shape.sections(segments=segments).items()
    }
    return StepInputs(
        parts["ids"],
        parts["positions"],
        parts["segments"] if segments else None,
        parts["offsets"],
        parts["firsts"],
        parts["singles"],
        shape.longest,
    )


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
