"""Calls of the compiled CPU kernels with tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from echelon.models.kernels import kernels

if TYPE_CHECKING:
    from torch import Tensor


def has_kernel(operation: str, rows: Tensor) -> bool:
    """Whether an operation on rows has a compiled kernel that is faster than torch here."""
    if rows.dtype != torch.bfloat16 or rows.device.type != "cpu":
        return False
    found = kernels()
    return found is not None and operation in found.operations


def call_kernel(operation: str, *arguments: Tensor | float | None) -> None:
    """Call a kernel with tensors as addresses and torch's number of threads.

    Raises:
        MemoryError: there is no memory for its scratch space.
    """
    found = kernels()
    if found is None:
        raise RuntimeError("This is a bug: a kernel was chosen and is not there.")
    addresses = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments]
    found.call(operation, *addresses, torch.get_num_threads())
