"""The C library's heap: freed memory stays in the process for the next step until it is needed.

Without that, glibc returns the end of its heap after every layer and takes it again page by page:
up to 13,000 page faults a step, a tenth of its time (docs/LOG.md).
"""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache

KEPT_BYTES = (128 * 2**20, 32 * 2**20)
"""Freed memory that the process keeps: the first value that the C library accepts. A step of 2,048
tokens of a large model has buffers of 17 MB; older versions accept at most 32 MiB."""

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # as `mallopt` counts its parameters: see mallopt(3)

SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_")
"""Environment variables of glibc for the same settings; a user's values stay in force."""


@cache
def keep_freed() -> None:
    """Keep freed memory within the process; the first call sets it."""
    libc = _libc("mallopt")
    chosen = any(name in os.environ for name in SETTINGS)
    if libc is None or chosen or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return
    for size in KEPT_BYTES:
        # Larger blocks are mapped one by one, and given back one by one.
        if libc.mallopt(MMAP_THRESHOLD, size):
            libc.mallopt(TRIM_THRESHOLD, size)
            return


def give_back() -> None:
    """Return free memory to the system."""
    libc = _libc("malloc_trim")
    if libc is not None:
        libc.malloc_trim(0)


def _libc(function: str) -> ctypes.CDLL | None:
    """The C library if it has the function, as glibc does."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, function) else None
