"""Which errors of torch and its libraries mean lack of memory, and which a device that failed.

CUDA reports most faults of a kernel to every later call of the process: its context is lost, and
only a new process can use the card again. The words differ from one torch to the next (since 2.8
the type is often ``torch.AcceleratorError``), and ROCm builds write HIP for CUDA.
"""

from __future__ import annotations

import mmap
import re
from pathlib import Path
from typing import Literal

from echelon.models.memory_meters import MAX_CONTEXT_BYTES

FaultKind = Literal["memory", "lost", "other"]
"""``memory``: a smaller step may fit. ``lost``: this process cannot use its device any more.
``other``: an error of this step alone."""

MEMORY_ERRORS = re.compile(
    r"DefaultCPUAllocator: (can't allocate|not enough) memory"
    r"|std::bad_alloc"
    r"|(CUDA|HIP) out of memory"
    r"|(CUDA|HIP)( driver)? error: out of memory"
    r"|Triton Error \[(CUDA|HIP)\]: out of memory"
    # How the allocator fails to describe that memory ran out: on MIG, Jetson, or without NVML.
    r"|NVML_SUCCESS == r INTERNAL ASSERT FAILED at .*CUDACachingAllocator"
    r"|(CU|HIP)BLAS_STATUS_ALLOC_FAILED"
    r"|CUDNN_STATUS_ALLOC_FAILED"
    r"|MPS backend out of memory"
    r"|kIOGPUCommandBufferCallbackErrorOutOfMemory"
    r"|Invalid buffer size: [\d.]+ [KMGT]i?B"  # Metal: one tensor larger than it allows
    r"|could not create a memory object"
    r"|unable to mmap \d+ bytes from file .*: Cannot allocate memory"
)
"""Messages for memory that could not be allocated. Any other RuntimeError is a real fault and must
not be taken for one."""

UNCLEAR_ON_HOST = re.compile(r"could not create a primitive$")
"""oneDNN's message for every failure, also when the code that it compiles for a new shape finds no
memory; it counts only while memory is short."""

UNCLEAR_ON_CARD = re.compile(r"(CU|HIP)BLAS_STATUS_NOT_INITIALIZED")
"""cuBLAS finds no memory for its workspace, or a context that is lost; the first only while the
card has little memory left."""

SHORT_BYTES = 64 * 2**20
"""A host's memory is short when this much cannot be allocated, or could not at the process' peak;
at most 20 MB were left when compiling failed."""

SHORT_CARD_BYTES = 256 * 2**20
"""A card's memory is short when less is free: cuBLAS takes some tens of MiB for a handle."""

DEVICE_ERRORS = re.compile(
    r"(CUDA|HIP)( driver)? error: |cuDNN error: |Triton Error \[(CUDA|HIP)\]: "
)
"""How messages of a device begin."""

SOUND = re.compile(
    r"no kernel image is available|invalid device function|unsupported toolchain"
    r"|invalid device ordinal|no (CUDA|ROCm)-capable device|driver version is insufficient"
    r"|invalid configuration argument"
    r"|(CUBLAS|HIPBLAS|CUDNN)_STATUS_(NOT_SUPPORTED|INVALID_VALUE|ARCH_MISMATCH|BAD_PARAM)"
)
"""Errors of a device that leave the context intact: a call was refused before anything ran."""


def kind_of(error: BaseException) -> FaultKind:
    """What an error of torch or one of its libraries means."""
    import torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return "memory"
    if not isinstance(error, RuntimeError):
        return "other"
    words = str(error)
    if MEMORY_ERRORS.search(words):
        return "memory"
    if UNCLEAR_ON_HOST.search(words):
        return "memory" if _host_is_short() else "other"
    if UNCLEAR_ON_CARD.search(words):
        return "memory" if _card_is_short() else "lost"
    of_device = isinstance(error, torch.AcceleratorError) or DEVICE_ERRORS.search(words)
    return "lost" if of_device and not SOUND.search(words) else "other"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory could not be allocated."""
    return kind_of(error) == "memory"


def _host_is_short() -> bool:
    """Whether the system refuses a block of :data:`SHORT_BYTES` now, or did at the peak.

    An operator frees its output before its error arrives here, so the peak counts too.
    """
    try:
        mmap.mmap(-1, SHORT_BYTES).close()
    except OSError:
        return True
    return _was_near_its_limit(Path("/proc/self"))


def _was_near_its_limit(process: Path) -> bool:
    """Whether a process' address space, at its peak, came close to its limit (``ulimit -v``).

    Args:
        process: its folder in Linux's ``/proc``. Without one the answer is no.
    """
    try:
        limit = re.search(r"Max address space +(\d+)", (process / "limits").read_text())
        peak = re.search(r"VmPeak:\s+(\d+) kB", (process / "status").read_text())
    except OSError:
        return False
    if limit is None or peak is None:
        return False
    return int(peak[1]) * 1024 + SHORT_BYTES > int(limit[1])


def _card_is_short() -> bool:
    """Whether a card that this process uses has less than :data:`SHORT_CARD_BYTES` free."""
    return any(free < SHORT_CARD_BYTES for free, _ in _used_cards())


def is_crowded() -> bool:
    """Whether other processes hold memory of a card that this process uses.

    Echelon's own second worker on a card is one of them.
    """
    return any(outside > MAX_CONTEXT_BYTES for _, outside in _used_cards())


def _used_cards() -> list[tuple[int, int]]:
    """Free bytes, and those outside this process' allocator, of each card that it uses."""
    import torch

    found = []
    try:
        for number in range(torch.cuda.device_count()):
            if reserved := torch.cuda.memory_reserved(number):
                free, total = torch.cuda.mem_get_info(number)
                found.append((free, total - free - reserved))
    except RuntimeError:  # a lost context answers nothing
        return []
    return found
