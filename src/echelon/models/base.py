"""What a scorer is. No torch here: the engine and the tests see only this.

A step as rectangles, for scorers that cannot do without padding. No torch.
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
    """The process that scores has ended; its steps have no result."""


class WorkerGone(WorkerDied):
    """The machine of the process that scores has gone, or is out of reach; no step is to blame."""


class WorkerWedged(WorkerDied):
    """The process that scores gave no answer in time and was killed."""


class Scorer(Protocol):
    """A model on a device."""

    @property
    def info(self) -> ModelInfo:
        """What it is; constant while it is open."""
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
        """Give cached memory back to the device."""
        ...

    def close(self) -> None:
        """Free the weights; the scorer cannot be used again."""
        ...


UNBOUNDED_MAX_TOKENS = 8192
"""Limit taken for models whose configuration states no number of positions."""


def pad(batch: TokenBatch, padding_id: int) -> dict[str, npt.NDArray[np.int64]]:
    """Pad on the right to the step's longest pair, as the reference tokenizers do.

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
