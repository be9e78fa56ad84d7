"""Load the compiled CPU kernels of the best level that the processor can run.

A level is a set of instructions. Each has a library of its own, compiled from the same sources:
plain C functions called through ctypes, independent of torch's and Python's version.
``attention.cpp`` and ``rows.cpp`` compute what :mod:`echelon.models.layers` does in torch.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from echelon.errors import InvalidInput
from echelon.models.device import CPU_SWITCH, cpu_flags, held_to_avx2

LIBRARY = "libechelon_{level}.so.1"
"""File of a level's library, as ``hatch_build.py`` names it."""

SWITCH = "ECHELON_KERNELS"
"""Environment variable: ``off`` disables the kernels; the name of a level chooses it, for all
:data:`OPERATIONS`. Read once a process."""

OFF = "off"

LEVELS: dict[str, frozenset[str]] = {
    "avx512bf16": frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16"}),
    "avx512": frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq"}),
    "avx2": frozenset({"avx2", "fma"}),
    "neon": frozenset({"asimd"}),
    "portable": frozenset(),
}
"""Level → what a processor needs for it (:func:`echelon.models.device.cpu_flags`), best first.
The operating system counts: Linux names no instructions whose registers it does not save."""

OPERATIONS = (
    "attention",
    "causal_attention",
    "quantize",
    "activate",
    "add_norm",
    "accumulate_norm",
    "rotate",
)

FASTER: dict[str, tuple[str, ...]] = {
    "avx512bf16": OPERATIONS,
    "avx512": OPERATIONS,
    "avx2": tuple(name for name in OPERATIONS if name != "add_norm"),
    "neon": (),  # nobody could measure it yet
    # On x86-64; on ARM "neon" stands before it.
    "portable": tuple(name for name in OPERATIONS if name != "causal_attention"),
}
"""Level → operations that were measured faster than torch's own on a processor of that level; the
others are left to torch (docs/decisions/0019-kernel-levels.md)."""

POINTER, INT, LONG, FLOAT = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float

SIGNATURES = {
    "echelon_attention": (
        *(POINTER, LONG, POINTER, POINTER, POINTER, LONG, POINTER),
        *(INT, INT, INT, INT, POINTER, INT),
    ),
    "echelon_causal_attention": (
        *(POINTER, LONG, POINTER, POINTER, LONG, POINTER, LONG, POINTER),
        *(POINTER, POINTER, POINTER, POINTER, INT, INT, INT, INT, POINTER, INT),
    ),
    "echelon_quantize": (POINTER, LONG, LONG, POINTER, POINTER, INT),
    "echelon_add_norm": (
        *(POINTER, POINTER, POINTER, POINTER, LONG, LONG, POINTER, POINTER, FLOAT),
        *(POINTER, POINTER, POINTER, INT),
    ),
    "echelon_accumulate_norm": (
        *(POINTER, POINTER, LONG, LONG, POINTER, POINTER, FLOAT, INT, POINTER, INT),
    ),
    "echelon_rotate": (
        *(POINTER, LONG, POINTER, LONG, LONG, INT, INT, POINTER, POINTER, POINTER, FLOAT, INT),
    ),
    "echelon_activate": (
        *(POINTER, POINTER, POINTER, LONG, LONG, INT),
        *(POINTER, POINTER, POINTER, FLOAT, INT),
    ),
}

HEAD_SIZES = (32, 64)
"""Widths of attention heads that ``echelon_attention`` is compiled for."""

CAUSAL_HEAD_SIZES = (64, 128)
"""Those of ``echelon_causal_attention``."""


@dataclass(frozen=True, slots=True)
class Kernels:
    """A level's library and what it is used for."""

    level: str
    library: Any  # a ctypes.CDLL, or what a test puts in its place
    operations: tuple[str, ...]

    def call(self, operation: str, *arguments: float | None) -> None:
        """Run an operation, or raise MemoryError where there is no memory for its scratch space."""
        if getattr(self.library, f"echelon_{operation}")(*arguments):
            raise MemoryError(f"no memory for the scratch space of {operation}")


@cache
def kernels() -> Kernels | None:
    """The kernels that this process uses, or None; loaded once."""
    level = used_level()
    if level == OFF:
        return None
    return Kernels(level, load(level), OPERATIONS if _asked() else FASTER[level])


@cache
def used_level() -> str:
    """The level of the kernels that this process uses, or ``off``; does not load them.

    Raises:
        InvalidInput: :data:`SWITCH` names a level that does not exist or does not run here.
    """
    # Where the instructions are unknown torch may know better ones.
    best = next(iter(possible()), OFF) if cpu_flags() else OFF
    return _asked() or (best if FASTER.get(best) else OFF)


def missing() -> str | None:
    """The reason why there are no kernels, or None if there are."""
    if used_level() != OFF:
        return None
    if _asked() == OFF:
        return f"{SWITCH}={OFF} leaves them out"
    levels = possible()
    if not levels:
        return "they were not built, for want of a C++ compiler or because of the platform"
    if not cpu_flags():
        return "the system does not say which instructions the processor has"
    return f"of those at this processor's level, {levels[0]}, none was measured faster than torch"


def _asked() -> str | None:
    """The level that :data:`SWITCH` names, :data:`OFF`, or None."""
    asked = os.environ.get(SWITCH) or None
    if asked is None or asked == OFF or asked in possible():
        return asked
    limit = f" under {CPU_SWITCH}=avx2" if held_to_avx2() else ""
    problem = f"{asked} does not run here{limit}" if asked in LEVELS else f"{asked!r} is unknown"
    raise InvalidInput(SWITCH, problem, f"Set it to {', '.join(possible())} or {OFF}.")


def possible() -> list[str]:
    """The levels that were built and that this processor runs, best first."""
    flags = cpu_flags()
    return [level for level, needs in LEVELS.items() if needs <= flags and path_of(level).is_file()]


def path_of(level: str) -> Path:
    """Where a level's library is, if it was built."""
    return Path(__file__).parent / LIBRARY.format(level=level)


@cache
def load(level: str) -> ctypes.CDLL:
    """A level's library, with its functions' types, on the threads of torch's OpenMP library."""
    import torch

    library = ctypes.CDLL(str(path_of(level)))
    for name, arguments in SIGNATURES.items():
        getattr(library, name).argtypes = arguments
    # Found through what torch itself is linked to: a second OpenMP library in the process would
    # have a second pool of threads. Without any, the kernels run on the calling thread.
    parallel = getattr(ctypes.CDLL(torch._C.__file__), "GOMP_parallel", None)  # noqa: SLF001 - no public name
    library.echelon_threads.argtypes = (POINTER,)
    library.echelon_threads(ctypes.cast(parallel, POINTER) if parallel else None)
    return library
