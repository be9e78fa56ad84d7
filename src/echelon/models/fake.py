"""A scorer without weights, for tests, dry runs and simulations.

Its logit is a hash of the pair's tokens alone; it can simulate a device that runs out of memory.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

import numpy as np

from echelon.models.base import DeviceOutOfMemory
from echelon.scheduling.packing import step_cost
from echelon.types import ModelInfo

if TYPE_CHECKING:
    from echelon.types import FloatArray, Padding, TokenBatch


class FakeScorer:
    """Deterministic logits in [-10, 10] from token ids.

    Args:
        memory_tokens: larger steps raise :class:`DeviceOutOfMemory`; None is no limit.
        stale_tokens: memory that caches hold until :meth:`release`.
        max_tokens: longest pair.
        padding: ``none`` or ``rectangular``.
        precision: reported precision; bf16 and fp16 need half the memory of fp32.
    """

    def __init__(
        self,
        memory_tokens: int | None = None,
        *,
        stale_tokens: int = 0,
        max_tokens: int = 512,
        padding: Padding = "none",
        precision: str = "fp32",
    ) -> None:
        self.info = ModelInfo("fake", "cpu", "fake", precision, max_tokens, padding, 0, 1)
        self.batches: list[TokenBatch] = []
        self.closed = False
        self._memory_tokens = memory_tokens
        self._stale_tokens = stale_tokens

    def score(self, batch: TokenBatch) -> FloatArray:
        """Hash each pair's tokens; see :class:`~echelon.models.base.Scorer`."""
        tokens = step_cost(batch.lengths, self.info.padding) + self._stale_tokens
        if self.info.precision != "fp32":
            tokens //= 2
        if self._memory_tokens is not None and tokens > self._memory_tokens:
            raise DeviceOutOfMemory(f"{tokens} tokens over {self._memory_tokens}")
        self.batches.append(batch)
        bounds = zip(batch.offsets[:-1], batch.offsets[1:], strict=True)
        hashes = [zlib.crc32(batch.ids[start:end].tobytes()) for start, end in bounds]
        return np.array([h / 2**32 * 20 - 10 for h in hashes], dtype=np.float32)

    def release(self) -> None:
        """Free the stale memory."""
        self._stale_tokens = 0

    def close(self) -> None:
        """Record that it was closed."""
        self.closed = True
