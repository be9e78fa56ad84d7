"""Host memory from which a card copies by itself, and what happens to it when it is let go."""

from __future__ import annotations

import math
import weakref
from typing import Any

import numpy as np
import torch

_pinned: dict[int, int] = {}  # first byte's address → bytes


def pinned_empty(size: tuple[int, ...], dtype: torch.dtype | None) -> torch.Tensor:
    """A tensor in pinned memory, whose bytes become 0x7F when nothing refers to it any more.

    Copies that have not run yet refer to it, as torch's own allocator waits for them.
    """
    dtype = dtype or torch.get_default_dtype()
    count = math.prod(size) * dtype.itemsize
    memory = np.empty(max(count, 1), dtype=np.uint8)
    lease = memory[:]
    address = memory.ctypes.data
    _pinned[address] = count
    weakref.finalize(lease, _let_go, memory, address)
    flat = torch.from_numpy(lease)[:count]
    return flat.view(dtype).view(size)


def _let_go(memory: Any, address: int) -> None:
    memory.fill(0x7F)
    _pinned.pop(address, None)


def is_pinned(tensor: torch.Tensor) -> bool:
    """Whether a tensor on CPU lies in pinned memory."""
    return tensor.untyped_storage().data_ptr() in _pinned
