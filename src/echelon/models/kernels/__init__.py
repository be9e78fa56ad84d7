"""Load the compiled CPU kernels, if they were built and the processor can run them.

They are plain C functions called through ctypes, independent of torch's and Python's version.
``attention.cpp`` and ``rows.cpp`` compute what :mod:`echelon.models.layers` does in torch.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path

from echelon.models.device import CPU_SWITCH, held_to_avx2

LIBRARY = Path(__file__).parent / "libechelon.so.1"

SWITCH = "ECHELON_KERNELS"
"""Environment variable: ``off`` disables the kernels, as ``ECHELON_CPU=avx2`` does
(:data:`echelon.models.device.CPU_SWITCH`). Read once a process."""

POINTER, INT, LONG, FLOAT = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float

SIGNATURES = {
    "echelon_attention": (
        *(POINTER, LONG, POINTER, POINTER, POINTER, LONG, POINTER),
        *(INT, INT, INT, POINTER, INT),
    ),
    "echelon_quantize": (POINTER, LONG, LONG, POINTER, POINTER, INT),
    "echelon_add_norm": (
        *(POINTER, POINTER, POINTER, POINTER, LONG, LONG, POINTER, POINTER, FLOAT),
        *(POINTER, POINTER, POINTER, INT),
    ),
    "echelon_activate": (
        *(POINTER, POINTER, POINTER, LONG, LONG, INT),
        *(POINTER, POINTER, POINTER, FLOAT, INT),
    ),
}

HEAD_SIZES = (32, 64)
"""Widths of attention heads that ``echelon_attention`` is compiled for."""


@cache
def kernels() -> ctypes.CDLL | None:
    """The library, or None; loaded once, after torch, whose OpenMP threads it shares."""
    return None if missing() else _load()


@cache
def missing() -> str | None:
    """The reason why there are no kernels, or None if there are."""
    if os.environ.get(SWITCH) == "off":
        return f"{SWITCH}=off leaves them out"
    if held_to_avx2():
        return f"{CPU_SWITCH}=avx2 leaves them out"
    if not LIBRARY.is_file():
        return "they were not built, for want of a C++ compiler or because of the platform"
    try:
        supported = _load().echelon_supported()
    except OSError as error:
        return f"they cannot be loaded ({error})"
    return None if supported else "this processor has no AVX-512 BF16"


@cache
def _load() -> ctypes.CDLL:
    library = ctypes.CDLL(str(LIBRARY))
    for name, arguments in SIGNATURES.items():
        getattr(library, name).argtypes = arguments
    return library
