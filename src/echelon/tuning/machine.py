"""Describes the machine and reads peak memory. Imports no torch of its own."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any, Protocol


def describe_machine() -> dict[str, Any]:
    """The machine as plain data; memory in bytes."""
    import psutil

    from echelon.models.device import cpu_name, matrix_features, usable_cpus

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


def describe_gpus() -> list[dict[str, Any]]:
    """The CUDA devices that torch reports; none where torch is not installed."""
    try:
        from echelon.models.device import list_gpus

        return list_gpus()
    except ImportError:
        return []


class Meter(Protocol):
    """Reads peak memory."""

    def reset(self) -> None:
        """Start a new measurement."""

    def peak_bytes(self) -> int:
        """Peak memory since the last reset, in bytes."""


class MemoryMeter:
    """Peak memory of this process, or of the child with process id ``pid``.

    On Linux a process may reset its own high-water mark and those of its children. Where this is
    refused, the current resident size is used instead.
    """

    def __init__(self, pid: int | None = None) -> None:
        self._pid = pid
        self._folder = Path(f"/proc/{'self' if pid is None else pid}")
        self._resets = self._try_reset()

    def reset(self) -> None:
        """Start a new measurement."""
        if self._resets:
            self._try_reset()

    def peak_bytes(self) -> int:
        """Peak memory since the last reset, in bytes."""
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
    """A meter for the peak memory of a device: ``cpu``, ``cuda:N`` or ``mps``."""
    from echelon.models.memory_meters import CudaMemoryMeter, MpsMemoryMeter

    if device == "cpu":
        return MemoryMeter()
    return MpsMemoryMeter() if device.startswith("mps") else CudaMemoryMeter(device)
