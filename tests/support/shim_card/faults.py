"""Faults of a card, in torch's own words."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

EXPLAINED = (
    "\nSearch for `cudaError' in the CUDA Runtime API documentation for more information.\n"
    "CUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace "
    "below might be incorrect.\n"
)
"""What torch writes after the first line of a CUDA error."""

OUT_OF_MEMORY = {
    "allocator": "CUDA out of memory. Tried to allocate 2.00 MiB. GPU 0 has a total capacity of "
    "79.11 GiB of which 1.00 MiB is free. Process 1 has 79.10 GiB memory in use.",
    "runtime": "CUDA error: out of memory" + EXPLAINED,
    "driver": "CUDA driver error: out of memory",
    "cublas": "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "cublas handle": "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling "
    "`cublasCreate(handle)`",
    "cudnn": "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "nvml": "NVML_SUCCESS == r INTERNAL ASSERT FAILED at "
    '"/pytorch/c10/cuda/CUDACachingAllocator.cpp":1090, please report a bug to PyTorch. ',
}
"""Memory that cannot be had. ``cublas handle`` is also what a broken installation says, ``nvml``
what MIG slices and machines without NVML say instead of the first."""

LOST = {
    "illegal access": "CUDA error: an illegal memory access was encountered" + EXPLAINED,
    "assert": "CUDA error: device-side assert triggered" + EXPLAINED,
    "ecc": "CUDA error: uncorrectable ECC error encountered" + EXPLAINED,
    "launch": "CUDA error: unspecified launch failure" + EXPLAINED,
    "timeout": "CUDA error: the launch timed out and was terminated" + EXPLAINED,
    "misaligned": "CUDA error: misaligned address" + EXPLAINED,
}
"""After these every call of the process on that card fails."""

IN_CAPTURE = "CUDA error: operation not permitted when stream is capturing" + EXPLAINED
CAPTURE_ENDED = "CUDA error: operation failed due to a previous error during capture" + EXPLAINED
WAITED = "called a synchronizing CUDA operation"

WHERE = ("launch", "allocate", "copy", "wait", "capture", "capture end")


@dataclass
class Fault:
    """A fault that is going to happen on a card.

    ``words`` is a key of :data:`OUT_OF_MEMORY` or :data:`LOST`, or else the message itself.
    """

    words: str
    at: str = "launch"  # one of :data:`WHERE`
    after: int = 0  # so many events of that sort pass first
    times: int = 1
    card: int | None = None  # None is any
    least_bytes: int = 0  # smaller launches, allocations and copies neither count nor fail
    flag: str | None = None  # waits for this file, and removes it when it happens: for children

    def __post_init__(self) -> None:
        if self.at not in WHERE:
            raise ValueError(f"at={self.at!r} is none of {WHERE}")

    @property
    def loses_the_card(self) -> bool:
        """Whether nothing works afterwards."""
        return self.words in LOST

    def happens(self, at: str, card: int, size: int) -> bool:
        """Whether it happens now; counts the event."""
        if at != self.at or self.card not in (None, card) or not self.times:
            return False
        if size < self.least_bytes:
            return False
        if self.flag is not None and not Path(self.flag).exists():
            return False
        if self.after:
            self.after -= 1
            return False
        self.times -= 1
        if self.flag is not None:
            Path(self.flag).unlink(missing_ok=True)
        return True


def error_of(words: str) -> RuntimeError:
    """The error as torch raises it: its type follows from its words."""
    message = OUT_OF_MEMORY.get(words) or LOST.get(words) or words
    if message.startswith("CUDA out of memory"):
        return torch.OutOfMemoryError(message)
    kind = torch.AcceleratorError if "\nSearch for" in message else RuntimeError
    error = kind(message)
    if not isinstance(error, RuntimeError):
        raise TypeError(f"torch no longer derives {kind} from RuntimeError")
    return error
