"""What scorers over packed rows have in common: weights that can be freed, and a mapped word table.

All tokens of a step are rows of one matrix, so there is no padding.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Generic, TypeVar

import torch
from torch.nn import functional

from echelon.models.base import with_filler
from echelon.models.checkpoint import MappedPages
from echelon.models.device import DTYPES, release_memory, run_step
from echelon.models.loading import native_info

if TYPE_CHECKING:
    from torch import Tensor

    from echelon.models.families import NativeShape
    from echelon.types import FloatArray, IntArray, TokenBatch

Shape = TypeVar("Shape", bound="NativeShape")
Weights = TypeVar("Weights")


class PackedEncoder(ABC, Generic[Shape, Weights]):
    """A :class:`~echelon.models.base.Scorer` over packed rows.

    Args:
        architecture: the model's shape.
        weights: its loaded parts.
        words: the word table among them, as on disk.
        loaded_bytes: memory of the weights; a mapped table is not counted.
        device: where it runs.
        precision: of its linear layers.
        threads: CPU threads of a step, for its :class:`ModelInfo`.
    """

    def __init__(  # noqa: PLR0913 - what is known of a model
        self,
        architecture: Shape,
        weights: Weights,
        *,
        words: Tensor,
        loaded_bytes: int,
        device: torch.device,
        precision: str,
        threads: int,
    ) -> None:
        self._architecture = architecture
        self._weights: Weights | None = weights
        self._device = device
        self._dtype = getattr(torch, DTYPES[precision])
        self._mapped = MappedPages.of(words)
        self.info = native_info(architecture, loaded_bytes, device, precision, threads)

    def score(self, batch: TokenBatch) -> FloatArray:
        """Score one step; see :class:`~echelon.models.base.Scorer`."""
        self._architecture.check_ids(batch.ids)
        weights, step = self._weights, with_filler(batch)
        if weights is None:
            raise RuntimeError("This is a bug: a closed scorer was asked to score.")
        return run_step(lambda: self._logits(weights, step)[: len(batch)])

    def release(self) -> None:
        """Free cached memory."""
        release_memory(self._device)

    def close(self) -> None:
        """Free the weights."""
        self._weights = self._mapped = None
        self.release()

    @abstractmethod
    def _logits(self, weights: Weights, batch: TokenBatch) -> Tensor:
        """Logits [pairs] of a step with its filler."""

    def _look_up(self, words: Tensor, ids: IntArray) -> Tensor:
        """Rows of the word table, float32 [tokens, hidden]."""
        rows = functional.embedding(torch.from_numpy(ids).to(self._device), words).float()
        if self._mapped is not None:
            self._mapped.count_rows(len(ids))
        return rows
