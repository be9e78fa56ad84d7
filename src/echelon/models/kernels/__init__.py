"""C++ kernels for CPU and the library that they are compiled into.

The compiled kernels, where they were built and the processor can run them.

Plain C functions behind ctypes: nothing in them depends on a version of torch or Python. What they
compute is in ``attention.cpp`` and ``rows.cpp``; :mod:`echelon.models.fused` says the same in
torch,
for machines without them.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path

from echelon.models.device import CPU_SWITCH, held_to_avx2

LIBRARY = Path(__file__).parent / "libechelon.so.1"

SWITCH = "ECHELON_KERNELS"
"""Environment variable; ``off`` leaves the kernels out. So does ``ECHELON_CPU=avx2``, see
:data:`echelon.models.device.CPU_SWITCH`. Both are read when the kernels are first asked for; the
answer holds as long as the process."""

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
"""Attention heads that ``echelon_attention`` is built for."""


@cache
def kernels() -> ctypes.CDLL | None:
    """The library, or None; loaded once, after torch (whose OpenMP threads it shares)."""
    return None if missing() else _load()


@cache
def missing() -> str | None:
    """Why there are no kernels, in words; None where there are."""
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
