"""A step as rectangles, for scorers that cannot do without padding. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    from echelon.types import TokenBatch

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
