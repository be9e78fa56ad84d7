"""The native encoder on CUDA: packed rows, attention without padding, and few waits.

A step is one copy to the device, the forward pass, and one copy of the logits back; the host waits
only for the last, and can begin the next step before it. Small steps, whose time would be spent on
launching kernels, are rounded up to a few sizes and replayed as CUDA graphs.

Two attention kernels take packed rows. FlashAttention computes in fp16 and bf16 and needs compute
capability 8.0; the memory-efficient kernel also computes in fp32 and runs on older cards. Both read
the offsets on the device, so the host does not wait, and both skip empty pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch.nn import functional

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
from echelon.models.device import DTYPES, release_memory, run_step
from echelon.models.encoder import Embeddings, Weights, load_weights, run_layers
from echelon.models.jina import encoder_checkpoint
from echelon.models.layers import Rows, values_of
from echelon.models.loading import native_info

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

    from echelon.models.architecture import Architecture, LayerPlan
    from echelon.models.base import Scorer
    from echelon.models.cuda_graphs import Record
    from echelon.types import FloatArray, TokenBatch

    Kernel = Callable[[Tensor, Tensor, Tensor, "Spans", float], Tensor]
    """(query [queries, heads, size], key and value [tokens, heads, size], spans, scale) →
    [queries, heads, size]."""

    Attention = Callable[[Tensor, Tensor, Tensor, "Spans"], Tensor]
    """The same without a scale → [queries, heads × size]."""


LAYER_LAUNCHES, OTHER_LAUNCHES = 8, 12
"""Kernels of a layer and of all the rest of a pass, at most."""


@dataclass(frozen=True, slots=True)
class CardParts:
    """What depends on the card."""

    attend: Attention
    record: Record
    card: Card

    @classmethod
    def of(cls, device: torch.device, dtype: torch.dtype, width: int) -> CardParts:
        """Those of a device, for a dtype and a width of heads."""
        return cls(choose_attention(device, dtype, width), CudaRecorder(device), card_of(device))


class CudaScorer:
    """A :class:`~echelon.models.base.Scorer` over packed rows on a CUDA device.

    Tests replace ``parts``; ``use_graphs``, whether small steps run as CUDA graphs, may change
    between steps.
    """

    def __init__(
        self,
        architecture: Architecture,
        weights: Weights,
        device: torch.device,
        precision: str,
        parts: CardParts | None = None,
    ) -> None:
        self._architecture = architecture
        self._weights: Weights | None = weights
        self._device = device
        self._dtype = getattr(torch, DTYPES[precision])
        parts = parts or CardParts.of(device, self._dtype, architecture.head_shape[1])
        self._attend = parts.attend
        self._segments = architecture.reads_segments
        ladder = ladder_for(architecture, parts.card, self._dtype)
        size = max(shape.size(segments=self._segments) for shape in ladder.shapes())
        self._fixed = torch.zeros(size, dtype=torch.int32, device=device)
        self._graphs = CudaGraphs(
            lambda shape: self._forward(read(self._fixed, shape, segments=self._segments)),
            parts.record,
            ladder,
        )
        self.use_graphs = graphs_allowed()
        if self.use_graphs:
            with torch.inference_mode():
                self._graphs.prepare()
        self.info = native_info(architecture, weights.loaded_bytes, device, precision, threads=0)

    @property
    def capture_failed(self) -> str | None:
        """Why a capture failed for another reason than memory; the process should be replaced."""
        return self._graphs.failed

    def score(self, batch: TokenBatch) -> FloatArray:
        """Score one step; see :class:`~echelon.models.base.Scorer`."""
        self._architecture.check_ids(batch.ids)
        return run_step(lambda: self._step(batch).narrow(0, 0, len(batch)))

    def release(self) -> None:
        """Free graphs and cached memory; called when memory ran out."""
        self._graphs.memory_ran_out()
        release_memory(self._device)

    def close(self) -> None:
        """Free the weights."""
        self._weights = None
        self.release()

    def _step(self, batch: TokenBatch) -> Tensor:
        """Logits on the device, those of filler pairs after those of the batch."""
        exact = CaptureShape.of(batch)
        captured = self._graphs.shape_for(exact) if self.use_graphs else None
        if captured is None:
            block = self._staged(batch, exact).to(self._device, non_blocking=True)
            return self._forward(read(block, exact, segments=self._segments))
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
        positions = self._architecture.positions(batch)
        fill(block.numpy(), shape, batch, positions, segments=self._segments)
        return block

    def _forward(self, inputs: StepInputs) -> Tensor:
        """Logits [pairs]. No operation here may wait for the device, or capture fails."""
        if self._weights is None:
            raise RuntimeError("This is a bug: a closed scorer was asked to score.")
        rows = Rows(self._embed(self._weights.embeddings, inputs))
        all_rows = Spans(inputs.offsets, inputs.offsets, inputs.longest, inputs.longest)
        firsts = Spans(inputs.singles, inputs.offsets, 1, inputs.longest)
        return run_layers(
            self._weights,
            rows,
            lambda query, key, value: self._attend(query, key, value, all_rows),
            lambda rows: Rows(values_of(rows).index_select(0, inputs.firsts)),
            lambda query, key, value: self._attend(query, key, value, firsts),
        )

    def _embed(self, embeddings: Embeddings, inputs: StepInputs) -> Tensor:
        """[tokens, hidden]; summed in fp32 in every precision."""
        rows = functional.embedding(inputs.ids, embeddings.words).float()
        rows += functional.embedding(inputs.positions, embeddings.positions)
        if inputs.segments is None:
            rows += embeddings.segments.select(0, 0)
        else:
            rows += functional.embedding(inputs.segments, embeddings.segments)
        return embeddings.norm(rows).to(self._dtype)


def open_native(
    folder: Path,
    architecture: Architecture,
    device: torch.device,
    plan: LayerPlan,
    threads: int,
    label: int,
) -> Scorer:
    """Open a model on a card, where no CPU ``threads`` are used; else as on CPU."""
    del threads
    weights = load_weights(encoder_checkpoint(folder), architecture, device, plan, label)
    return CudaScorer(architecture, weights, device, plan.precision)


def card_of(device: torch.device) -> Card:
    """The card's capability and size."""
    properties = torch.cuda.get_device_properties(device)
    return Card(properties.major, properties.multi_processor_count)


def ladder_for(architecture: Architecture, card: Card, dtype: torch.dtype) -> Ladder:
    """The sizes to capture: those for which the host is slower than the card."""
    launches = LAYER_LAUNCHES * architecture.layers + OTHER_LAUNCHES
    half = dtype != torch.float32
    most = host_bound_tokens(card, architecture.flops, launches, half=half)
    return Ladder(most, architecture.max_tokens)


FLASH_CAPABILITY = 8
"""Major compute capability of Ampere, the oldest with FlashAttention and with bf16 matrix units."""

MAX_FLASH_SIZE = 256  # widest head of FlashAttention

ALIGNED_SIZE = 8
"""Both kernels load this many half-width numbers at a time; FlashAttention needs a multiple of
it."""

NO_MASK = 0  # the memory-efficient kernel's mask type for attention in both directions


@dataclass(frozen=True, slots=True)
class Spans:
    """Which queries attend to which keys: both are cut into the same number of pairs."""

    query_offsets: Tensor  # int32 [pairs + 1] on the device, first query row of each pair
    key_offsets: Tensor  # int32 [pairs + 1] on the device, first row of its keys and values
    max_queries: int  # upper bound of a pair's queries; a higher one is slower, a lower one wrong
    max_keys: int  # upper bound of a pair's keys


def choose_attention(device: torch.device, dtype: torch.dtype, size: int) -> Attention:
    """The fastest attention of a card for a dtype and a width of heads."""
    major, _ = torch.cuda.get_device_capability(device)
    built = torch.backends.cuda.is_flash_attention_available()
    return attention_with(choose_kernel(major if built else 0, dtype, size))


def choose_kernel(major: int, dtype: torch.dtype, size: int) -> Kernel:
    """The kernel for a major compute capability (0 if FlashAttention was not built)."""
    if dtype != torch.float32 and major >= FLASH_CAPABILITY and size <= MAX_FLASH_SIZE:
        return flash
    if dtype == torch.bfloat16 and major < FLASH_CAPABILITY:
        return efficient_in_fp32  # there is none for bf16, and fp16 has not its range
    return efficient


def attention_with(kernel: Kernel) -> Attention:
    """Attention through a kernel, for any width of heads."""

    def attend(query: Tensor, key: Tensor, value: Tensor, spans: Spans) -> Tensor:
        size = query.shape[-1]
        scale = size**-0.5
        short = -size % ALIGNED_SIZE
        if short:  # zeros move neither a product nor what is kept of a sum
            query, key, value = (functional.pad(part, (0, short)) for part in (query, key, value))
        mixed = kernel(query, key, value, spans, scale)
        return mixed.narrow(-1, 0, size).reshape(len(mixed), -1)

    return attend


def flash(query: Tensor, key: Tensor, value: Tensor, spans: Spans, scale: float) -> Tensor:
    """FlashAttention, in fp16 or bf16."""
    from torch.nn.attention.varlen import varlen_attn

    limits = (spans.query_offsets, spans.key_offsets, spans.max_queries, spans.max_keys)
    return cast("Tensor", varlen_attn(query, key, value, *limits, scale=scale))


def efficient(query: Tensor, key: Tensor, value: Tensor, spans: Spans, scale: float) -> Tensor:
    """The memory-efficient kernel, which takes the packed rows as a batch of one."""
    mixed, *_ = torch.ops.aten._efficient_attention_forward(  # noqa: SLF001 - no public name exists
        *(query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0), None),
        *(spans.query_offsets, spans.key_offsets, spans.max_queries, spans.max_keys),
        *(0.0, NO_MASK),
        compute_log_sumexp=False,
        scale=scale,
    )
    return cast("Tensor", mixed).squeeze(0)


def efficient_in_fp32(
    query: Tensor, key: Tensor, value: Tensor, spans: Spans, scale: float
) -> Tensor:
    """The memory-efficient kernel in fp32, for any dtype of the layers."""
    mixed = efficient(query.float(), key.float(), value.float(), spans, scale)
    return mixed.to(query.dtype)
