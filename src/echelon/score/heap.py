"""The C library's memory: what a step frees is kept for the next one, until someone wants it back.

glibc returns the end of its heap to the system as soon as some of it is free, and the next layer
takes it again, page by page: up to 13,000 page faults a step, a tenth of its time (docs/LOG.md).
"""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache

KEPT_BYTES = (128 * 2**20, 32 * 2**20)
"""Freed memory that stays with the process at most, where the C library takes it, or the next. A
step of 2,048 tokens of a large model has buffers of 17 MB; older versions take 32 MiB at most."""

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""As ``mallopt`` counts its parameters: see mallopt(3)."""

SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_")
"""Environment variables by which users set the same; theirs stand."""


@cache
def keep_freed() -> None:
    """Keep freed memory within the process, for all of it; once."""
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
    """Let the system have what is free."""
    libc = _libc("malloc_trim")
    if libc is not None:
        libc.malloc_trim(0)


def _libc(function: str) -> ctypes.CDLL | None:
    """The C library, where it is glibc's kind: others have no such function."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, function) else None
