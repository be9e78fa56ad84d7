"""The contract of a scorer: a model on a device that turns steps into logits. No torch.

The engine and its tests know nothing else of a model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    from echelon.types import FloatArray, ModelInfo, TokenBatch


class DeviceOutOfMemory(Exception):
    """A step did not fit in the device's memory; the scorer stays usable."""


class WorkerDied(Exception):
    """The worker process has ended; its steps have no result."""


class WorkerGone(WorkerDied):
    """The worker's machine has failed or cannot be reached; no step is the cause."""


class WorkerWedged(WorkerDied):
    """The worker process gave no answer in time and was killed."""


class Scorer(Protocol):
    """A model on a device."""

    @property
    def info(self) -> ModelInfo:
        """Device, precision and limits; constant while the scorer is open."""
        ...

    def score(self, batch: TokenBatch) -> FloatArray:
        """Score one step.

        Returns:
            float32 [pairs], raw logits in the batch's order.

        Raises:
            DeviceOutOfMemory: the step did not fit; a smaller one may.
        """
        ...

    def release(self) -> None:
        """Free cached memory of the device."""
        ...

    def close(self) -> None:
        """Free the weights; the scorer cannot be used again."""
        ...


UNBOUNDED_MAX_TOKENS = 8192
"""Length limit of models whose configuration names no number of positions."""


def pad(batch: TokenBatch, padding_id: int) -> dict[str, npt.NDArray[np.int64]]:
    """Pad on the right to the longest pair, as the reference tokenizers do.

    Returns:
        int64 [pairs, longest]: ``input_ids``, ``attention_mask`` and ``token_type_ids``.
    """
    real = np.arange(batch.lengths.max()) < batch.lengths[:, None]
    ids = np.full(real.shape, padding_id, dtype=np.int64)
    ids[real] = batch.ids
    types = np.zeros(real.shape, dtype=np.int64)
    if batch.type_ids is not None:
        types[real] = batch.type_ids
    return {"input_ids": ids, "attention_mask": real.astype(np.int64), "token_type_ids": types}
