"""The native encoder on CUDA: the packed rows of :mod:`echelon.models.encoder`, few waits.

A step is one copy to the device, the forward pass, and one copy of the logits back; the host waits
for the last alone. Small steps, which launching kernels would dominate, are rounded up to few sizes
and replayed as CUDA graphs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from echelon.models.attention_cuda import Spans, choose_attention
from echelon.models.cuda_graphs import CudaGraphs, CudaRecorder
from echelon.models.device import DTYPES, release_memory, run_step
from echelon.models.encoder import finish, heads, native_facts
from echelon.models.fused import Rows, values_of
from echelon.models.staging import LARGEST, CaptureShape, StepInputs, bucket_of, fill, read

if TYPE_CHECKING:
    from torch import Tensor

    from echelon.models.architecture import Architecture
    from echelon.models.attention_cuda import Attention
    from echelon.models.cuda_graphs import Record
    from echelon.models.encoder import Embeddings, Layer, Weights
    from echelon.types import FloatArray, TokenBatch


class CudaScorer:
    """A :class:`~echelon.models.base.Scorer` over packed rows on a CUDA device.

    Args:
        architecture: the model's shape.
        weights: loaded tensors.
        device: where they are.
        precision: what the layers compute in.
        attention: instead of the card's fastest, for tests.
        record: instead of the card's capture, for tests.

    Attributes:
        use_graphs: whether small steps run as CUDA graphs; may be changed between steps.
    """

    def __init__(
        self,
        architecture: Architecture,
        weights: Weights,
        device: torch.device,
        precision: str,
        *,
        attention: Attention | None = None,
        record: Record | None = None,
    ) -> None:
        self._shape = architecture
        self._weights: Weights | None = weights
        self._device = device
        self._dtype = getattr(torch, DTYPES[precision])
        width = architecture.head_shape[1]
        self._attend = attention or choose_attention(device, self._dtype, width)
        self._segments = architecture.reads_segments
        size = LARGEST.size(segments=self._segments)
        self._fixed = torch.zeros(size, dtype=torch.int32, device=device)
        self._graphs = CudaGraphs(self._forward_fixed, record or CudaRecorder(device))
        self.use_graphs = True
        self.info = native_facts(architecture, weights, device, precision, threads=0)

    def score(self, batch: TokenBatch) -> FloatArray:
        """Score one step; see :class:`~echelon.models.base.Scorer`.

        Raises:
            BadCheckpoint: a token id that the model has no embedding for.
        """
        self._shape.check_ids(batch.ids)
        return run_step(lambda: self._step(batch).narrow(0, 0, len(batch)))

    def release(self) -> None:
        """Give graphs and cached memory back to the device; called when memory ran out."""
        self._graphs.memory_ran_out()
        release_memory(self._device)

    def close(self) -> None:
        """Free the weights."""
        self._weights = None
        self.release()

    def _step(self, batch: TokenBatch) -> Tensor:
        """Logits on the device, those of filler pairs behind those of the batch."""
        exact = CaptureShape.of(batch)
        bucket = bucket_of(exact) if self.use_graphs else None
        if bucket is None:
            block = self._staged(batch, exact).to(self._device, non_blocking=True)
            return self._forward(read(block, exact, segments=self._segments))
        block = self._staged(batch, bucket)
        self._fixed.narrow(0, 0, len(block)).copy_(block, non_blocking=True)
        return self._graphs.run(bucket)

    def _staged(self, batch: TokenBatch, room: CaptureShape) -> Tensor:
        """The step as int32 on the host, in memory that the device copies from by itself.

        Torch keeps such memory for reuse, and reuses none before the copy out of it has ended.
        """
        size = room.size(segments=self._segments)
        pinned = self._device.type == "cuda"
        block = torch.empty(size, dtype=torch.int32, pin_memory=pinned)
        positions = self._shape.positions(batch)
        fill(block.numpy(), room, batch, positions, segments=self._segments)
        return block

    def _forward_fixed(self, room: CaptureShape) -> Tensor:
        """Logits of the step in the inputs that graphs read, [room.pairs]."""
        return self._forward(read(self._fixed, room, segments=self._segments))

    def _forward(self, inputs: StepInputs) -> Tensor:
        """Logits, [pairs]. Nothing in here may wait for the device, or capture would fail."""
        if self._weights is None:
            raise RuntimeError("This is a bug: a closed scorer was asked to score.")
        rows = Rows(self._embed(self._weights.embeddings, inputs))
        *layers, last = self._weights.layers
        for layer in layers:
            rows = self._layer(layer, rows, inputs)
        return self._weights.head(values_of(self._last_layer(last, rows, inputs)))

    def _embed(self, embeddings: Embeddings, inputs: StepInputs) -> Tensor:
        """[tokens, hidden]; summed in fp32 whatever the layers compute in."""
        rows = functional.embedding(inputs.ids, embeddings.words).float()
        rows += functional.embedding(inputs.positions, embeddings.positions)
        if inputs.segments is None:
            rows += embeddings.segments.select(0, 0)
        else:
            rows += functional.embedding(inputs.segments, embeddings.segments)
        return embeddings.norm(rows).to(self._dtype)

    def _layer(self, layer: Layer, rows: Rows, inputs: StepInputs) -> Rows:
        query, key, value = heads(layer.qkv(rows), 3, self._shape)
        spans = Spans(inputs.offsets, inputs.offsets, inputs.longest, inputs.longest)
        return finish(layer, self._attend(query, key, value, spans), rows)

    def _last_layer(self, layer: Layer, rows: Rows, inputs: StepInputs) -> Rows:
        """Keys and values for all rows, everything else for each pair's first row."""
        if layer.queries is None:
            raise RuntimeError("This is a bug: the last layer was loaded like the others.")
        firsts = Rows(values_of(rows).index_select(0, inputs.firsts))
        (query,) = heads(layer.queries(firsts), 1, self._shape)
        key, value = heads(layer.qkv(rows), 2, self._shape)
        spans = Spans(inputs.singles, inputs.offsets, 1, inputs.longest)
        return finish(layer, self._attend(query, key, value, spans), firsts)
