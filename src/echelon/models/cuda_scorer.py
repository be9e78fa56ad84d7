"""A scorer on a card: one copy there, the pass, one copy back, and no wait between.

The host waits only for the logits, and can begin the next step before it. Small steps, whose time
would be spent on launching kernels, are rounded up to a few sizes and replayed as CUDA graphs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from echelon.models.attention_cuda import choose_attention
from echelon.models.cuda_graphs import CudaGraphs, CudaRecorder, graphs_allowed
from echelon.models.cuda_steps import (
    CaptureShape,
    Card,
    Ladder,
    StepInputs,
    fill,
    host_bound_tokens,
    read,
)
from echelon.models.device import DTYPES, guarded, release_memory
from echelon.models.families import NativeShape
from echelon.models.loading import native_info

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from echelon.models.attention_cuda import Attention
    from echelon.models.cuda_graphs import Record
    from echelon.types import FloatArray, IntArray, TokenBatch

    Forward = Callable[[StepInputs], Tensor]
    """A pass without a wait for the device: logits [pairs] of a step."""

LAYER_LAUNCHES, OTHER_LAUNCHES = 8, 12
"""Kernels of a layer and of all the rest of a pass, at most."""


class PackedShape(NativeShape, Protocol):
    """What the scorer must know of a model."""

    @property
    def layers(self) -> int:
        """Transformer layers."""

    @property
    def flops(self) -> int:
        """Operations of all layers' products for one token."""

    @property
    def head_shape(self) -> tuple[int, int]:
        """Number of attention heads and width of one."""

    @property
    def reads_segments(self) -> bool:
        """Whether token types change the scores."""

    def check_ids(self, ids: IntArray) -> None:
        """Raise :class:`~echelon.errors.BadCheckpoint` for an id without an embedding."""

    def positions(self, batch: TokenBatch) -> IntArray:
        """Position ids of a batch, int32 [tokens]."""


@dataclass(frozen=True, slots=True)
class CardParts:
    """What depends on the card; tests have their own."""

    attend: Attention
    record: Record
    card: Card

    @classmethod
    def of(cls, device: torch.device, precision: str, width: int) -> CardParts:
        """Those of a device, for a precision and a width of heads."""
        dtype = getattr(torch, DTYPES[precision])
        properties = torch.cuda.get_device_properties(device)
        card = Card(properties.major, properties.multi_processor_count)
        return cls(choose_attention(device, dtype, width), CudaRecorder(device), card)


class CardStep:
    """A :class:`~echelon.models.base.StartedStep` whose logits a card copies to the host."""

    def __init__(self, logits: Tensor) -> None:
        on_card = logits.device.type == "cuda"
        # A buffer of its own: the next step writes where this one left its logits.
        self._logits = torch.empty(len(logits), dtype=torch.float32, pin_memory=on_card)
        self._logits.copy_(logits, non_blocking=True)
        self._copied = None
        if on_card:
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch's own gap
            self._copied.record(torch.cuda.current_stream(logits.device))

    def ready(self) -> bool:
        """Whether the logits have arrived."""
        return self._copied is None or self._copied.query()  # type: ignore[no-untyped-call]  # torch's own gap

    def result(self) -> FloatArray:
        """Wait for the logits."""
        return guarded(self._wait)

    def _wait(self) -> FloatArray:
        if self._copied is not None:
            self._copied.synchronize()
        # Another step may get the pinned buffer.
        logits: FloatArray = self._logits.numpy().copy()
        return logits


class CudaScorer:
    """A :class:`~echelon.models.base.Scorer` over packed rows on a CUDA device.

    ``use_graphs``, whether small steps run as CUDA graphs, may change between steps.
    """

    def __init__(
        self,
        shape: PackedShape,
        forward: Forward,
        device: torch.device,
        precision: str,
        parts: CardParts,
        loaded_bytes: int,
    ) -> None:
        self._shape = shape
        self._forward: Forward | None = forward
        self._device = device
        self._segments = shape.reads_segments
        ladder = ladder_for(shape, parts.card, half=precision != "fp32")
        size = max(one.size(segments=self._segments) for one in ladder.shapes())
        self._fixed = torch.zeros(size, dtype=torch.int32, device=device)
        self._graphs = CudaGraphs(lambda one: self._run(self._fixed, one), parts.record, ladder)
        self.use_graphs = graphs_allowed()
        if self.use_graphs:
            guarded(self._graphs.prepare)
        self.info = native_info(shape, loaded_bytes, device, precision, threads=0)

    @property
    def capture_failed(self) -> str | None:
        """Why a capture failed for another reason than memory; the process should be replaced."""
        return self._graphs.failed

    def score(self, batch: TokenBatch) -> FloatArray:
        """Score one step; see :class:`~echelon.models.base.Scorer`."""
        return self.start(batch).result()

    def start(self, batch: TokenBatch) -> CardStep:
        """Begin a step; the next may begin before its result is asked for.

        All copies and passes are in one stream, so that a step's inputs are written after the last
        step has read its own, and its logits are copied before the next step writes its own.
        """
        self._shape.check_ids(batch.ids)
        return guarded(lambda: CardStep(self._step(batch).narrow(0, 0, len(batch))))

    def memory_ran_out(self) -> None:
        """Free graphs and cached memory, and capture new graphs later than before."""
        self._graphs.memory_ran_out()
        release_memory(self._device)

    def release(self) -> None:
        """Free graphs and cached memory."""
        self._graphs.clear()
        release_memory(self._device)

    def close(self) -> None:
        """Free the weights."""
        self._forward = None
        self.release()

    def _step(self, batch: TokenBatch) -> Tensor:
        """Logits on the device, those of filler pairs after those of the batch."""
        exact = CaptureShape.of(batch)
        captured = self._graphs.shape_for(exact) if self.use_graphs else None
        if captured is None:
            block = self._staged(batch, exact).to(self._device, non_blocking=True)
            return self._run(block, exact)
        block = self._staged(batch, captured)
        self._fixed.narrow(0, 0, len(block)).copy_(block, non_blocking=True)
        return self._graphs.run(captured)

    def _staged(self, batch: TokenBatch, shape: CaptureShape) -> Tensor:
        """The step as int32 in pinned host memory, from which the device copies by itself.

        Torch reuses such memory only after the copy has ended.
        """
        size = shape.size(segments=self._segments)
        pinned = self._device.type == "cuda"
        block = torch.empty(size, dtype=torch.int32, pin_memory=pinned)
        positions = self._shape.positions(batch)
        fill(block.numpy(), shape, batch, positions, segments=self._segments)
        return block

    def _run(self, block: Tensor, shape: CaptureShape) -> Tensor:
        if self._forward is None:
            raise RuntimeError("This is a bug: a closed scorer was asked to score.")
        return self._forward(read(block, shape, segments=self._segments))


def ladder_for(shape: PackedShape, card: Card, *, half: bool) -> Ladder:
    """The sizes to capture: those for which the host is slower than the card."""
    launches = LAYER_LAUNCHES * shape.layers + OTHER_LAUNCHES
    most = host_bound_tokens(card, shape.flops, launches, half=half)
    return Ladder(most, shape.max_tokens)
