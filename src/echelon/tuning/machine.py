"""What the machine is: facts for the profile, the report and ``echelon doctor``. No torch."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any, Protocol

MATRIX_FLAGS = ("amx_int8", "amx_bf16", "amx_fp16", "avx512_bf16", "avx512_vnni", "avx2")
"""Processor features that matrix products profit from, best first."""


def describe_machine() -> dict[str, Any]:
    """The machine as plain data; memory in bytes."""
    import psutil

    from echelon.models.device import cpu_name, usable_cpus

    return {
        "cpu": cpu_name(),
        "cpus": psutil.cpu_count() or 1,
        "usable_cpus": usable_cpus(),
        "matrix_features": matrix_features(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
        "python": platform.python_version(),
        "gpus": describe_gpus(),
    }


def matrix_features() -> list[str]:
    """Which of :data:`MATRIX_FLAGS` the processor has; empty where the system does not tell.

    ``ECHELON_CPU`` may hide the newer ones.
    """
    from echelon.models.device import held_to_avx2

    shown = {"avx2"} if held_to_avx2() else set(MATRIX_FLAGS)
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return []
    line = next((line for line in text.splitlines() if line.startswith("flags")), "")
    flags = set(line.partition(":")[2].split())
    return [flag for flag in MATRIX_FLAGS if flag in flags & shown]


def describe_gpus() -> list[dict[str, Any]]:
    """CUDA devices as torch sees them; none where torch is not installed."""
    try:
        from echelon.models.device import list_gpus

        return list_gpus()
    except ImportError:
        return []


class Meter(Protocol):
    """Reads peak memory."""

    def reset(self) -> None:
        """Begin a new measurement."""
        ...

    def peak_bytes(self) -> int:
        """Peak since the last reset."""
        ...


class MemoryMeter:
    """Peak memory of a process between :meth:`reset` and :meth:`peak_bytes`.

    Linux lets a process reset its own high-water mark and its children's; where that is refused
    the resident size at the time of asking is the best that can be had.

    Args:
        pid: of a child; None is this process.
    """

    def __init__(self, pid: int | None = None) -> None:
        self._pid = pid
        self._folder = Path(f"/proc/{'self' if pid is None else pid}")
        self._resets = self._try_reset()

    def reset(self) -> None:
        """Begin a new measurement."""
        if self._resets:
            self._try_reset()

    def peak_bytes(self) -> int:
        """Peak since the last reset."""
        import psutil

        if self._resets:
            for line in (self._folder / "status").read_text(encoding="utf-8").splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        return int(psutil.Process(self._pid).memory_info().rss)

    def _try_reset(self) -> bool:
        try:
            (self._folder / "clear_refs").write_text("5", encoding="ascii")
        except OSError:
            return False
        return True


def meter_of(device: str) -> Meter:
    """What reads the peak memory of a device: ``cpu`` or ``cuda:N``."""
    from echelon.models.device import CudaMemoryMeter

    return MemoryMeter() if device == "cpu" else CudaMemoryMeter(device)
