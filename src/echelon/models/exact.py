"""Products of fp32 in IEEE arithmetic, whatever a caller allows torch elsewhere."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

BACKENDS = (
    torch.backends.cuda.matmul,
    torch.backends.mkldnn.matmul,  # type: ignore[attr-defined]  # torch's own gap
)
ROUNDED = ("tf32", "bf16")
"""What torch may multiply in place of fp32: 10 and 7 bits are left of 23."""

_lock = threading.Lock()
_found: list[str] = []  # the caller's settings, while a pass runs
_running = 0


@contextmanager
def ieee_products() -> Iterator[None]:
    """Multiply fp32 in IEEE arithmetic within the block, in the whole process.

    A caller's ``torch.set_float32_matmul_precision("high")`` would make fp32 scores as inexact as
    TF32. Its setting returns when the last of several blocks at the same time ends.
    """
    _enter()
    try:
        yield
    finally:
        _leave()


def _enter() -> None:
    global _running  # noqa: PLW0603 - torch's settings are the process's, too
    with _lock:
        if not _running:
            _found[:] = [backend.fp32_precision for backend in BACKENDS]
            _set(["ieee"] * len(BACKENDS))
        _running += 1


def _leave() -> None:
    global _running  # noqa: PLW0603
    with _lock:
        _running -= 1
        if not _running:
            _set(_found)


def _set(values: list[str]) -> None:
    """Set the backends whose caller lets them round; the others need no change."""
    for backend, found, value in zip(BACKENDS, _found, values, strict=True):
        if found in ROUNDED:
            backend.fp32_precision = value
