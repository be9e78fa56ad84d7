"""The machine as torch sees it: devices, precisions, threads, memory and its errors.

On CPU freed memory stays in the process for the next step until it is needed elsewhere. Without
that, glibc returns the end of its heap after every layer and takes it again page by page: up to
13,000 page faults a step, a tenth of its time (docs/LOG.md).
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import re
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echelon.errors import InvalidInput, MissingDependency
from echelon.models.base import DeviceOutOfMemory
from echelon.profile import FEATURES

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from echelon.types import FloatArray


DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "int8": "bfloat16"}
"""dtype of the activations; under int8 they are bf16."""

MEMORY_ERRORS = re.compile(
    r"DefaultCPUAllocator: (can't allocate|not enough) memory"
    r"|std::bad_alloc"
    r"|CUDA out of memory"
    r"|CUDA error: out of memory"
    r"|CUBLAS_STATUS_ALLOC_FAILED"
    r"|CUDNN_STATUS_ALLOC_FAILED"
    r"|could not create a memory object"
    r"|unable to mmap \d+ bytes from file .*: Cannot allocate memory"
)
"""Messages of torch, its allocators and oneDNN for memory that could not be allocated. Any other
RuntimeError is a real fault and must not be taken for one."""

UNCLEAR_ERRORS = re.compile(r"could not create a primitive$")
"""oneDNN's message for every failure, also when the code that it compiles for a new shape finds no
memory; it counts only while memory is short."""

SHORT_BYTES = 64 * 2**20
"""Memory is short when this much cannot be allocated; at most 20 MB were left when compiling
failed."""


SPINS = "3000"
"""How often a waiting OpenMP thread polls before it sleeps, some tens of microseconds. By default
it spins for many milliseconds and stops other processes on the same cores: a step of 28 ms took 124
ms (median) and 780 ms (90th percentile) beside a second process, with 3000 spins 53 and 55 ms;
alone it costs a tenth at most (docs/LOG.md)."""


CPU_SWITCH = "ECHELON_CPU"
"""Environment variable: ``avx2`` makes Echelon treat the processor as one with AVX2 and nothing
newer: no fast bf16, no int8, no matrix units, no newer level of kernels, to test old machines on a
new one (``make test-portable``). Torch and oneDNN have their own (``ATEN_CPU_CAPABILITY``,
``ONEDNN_MAX_CPU_ISA``)."""

NEWER = ("amx", "avx10", "avx512", "avx_")
"""How the names of instruction sets begin that came after AVX2."""


def held_to_avx2() -> bool:
    """Whether :data:`CPU_SWITCH` limits Echelon to AVX2; read at every call."""
    value = os.environ.get(CPU_SWITCH, "")
    if value not in {"", "avx2"}:
        raise InvalidInput(
            CPU_SWITCH, f"{value!r} is unknown", "Set it to avx2, or unset it for this processor."
        )
    return value == "avx2"


def has_torch() -> bool:
    """Whether torch is installed; does not import it."""
    try:
        return find_spec("torch") is not None
    except ValueError:  # someone blocked it: sys.modules["torch"] is None
        return False


def require_torch() -> None:
    """Import torch with its thread and memory settings, or name the extra that installs it."""
    # Read once, when torch loads its OpenMP library; a user's own choice stands.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
    # Weights in pages of 2 MiB, where the system gives them to those who ask: a large model's
    # products read all of them in every step (docs/LOG.md). Read at torch's first allocation.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        import torch  # noqa: F401 - the import is the check
    except ImportError as error:
        problem = "Scoring needs PyTorch, which is not installed."
        raise MissingDependency(problem, "torch") from error


def choose_device(name: str) -> torch.device:
    """The device for the ``device`` option; :class:`InvalidInput` if it does not exist."""
    require_torch()
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = name.partition(":")
    if kind == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = int(number or 0)  # torch itself wraps large numbers round
    if index >= count:
        raise InvalidInput(
            "device",
            f"{name!r} is not there ({count} CUDA device(s) found)",
            "Use device='cpu' or 'auto', or install a CUDA build of torch and its driver.",
        )
    return torch.device("cuda", index)


def choose_precision(precision: str, device: torch.device, usual: str | None = None) -> str:
    """The precision for the ``precision`` option without a profile.

    ``auto`` is the family's ``usual`` one where the device is fast in it, else fp32 on CPU, and
    fp16 on CUDA (the most accurate of the fast ones, measured).
    int8 is refused where it would be slow or inexact.
    """
    if precision == "int8" and not (device.type == "cpu" and multiplies_int8()):
        raise InvalidInput(
            "precision",
            f"{device_name(device)} has no int8 instructions that Echelon uses",
            "It needs a CPU with VNNI or AMX. Use auto, fp32, bf16 or fp16.",
        )
    if precision != "auto":
        return precision
    if usual is not None and (device.type == "cuda" or multiplies_half(usual)):
        return usual
    return "fp16" if device.type == "cuda" else "fp32"


def multiplies_int8() -> bool:
    """Whether this processor and torch build multiply int8 exactly and fast.

    Without VNNI or AMX oneDNN adds pairs of products in 16 bits, which overflow.
    """
    import torch

    if held_to_avx2() or not has_onednn() or not hasattr(torch.ops.onednn, "qlinear_pointwise"):
        return False
    return has_amx() or bool(getattr(torch.cpu, "_is_vnni_supported", bool)())


def has_amx() -> bool:
    """Whether the processor has AMX matrix units that torch may use."""
    import torch

    amx = getattr(torch.cpu, "_is_amx_tile_supported", bool)  # no public name
    return not held_to_avx2() and bool(amx())


def multiplies_half(kind: str) -> bool:
    """Whether this processor and torch build have oneDNN's ``bf16`` or ``fp16`` products."""
    import torch

    if held_to_avx2() or not has_onednn():
        return False
    return bool(getattr(torch.ops.mkldnn, f"_is_mkldnn_{kind}_supported")())


def usable_cpus() -> int:
    """CPUs that this process may use: affinity, container quota, and physical cores if known."""
    import psutil

    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    logical = affinity or os.cpu_count() or 1
    physical = psutil.cpu_count(logical=False)
    limits = [logical, _cgroup_cpus()]
    if physical and affinity in (None, os.cpu_count()):
        limits.append(physical)
    return max(1, min(limit for limit in limits if limit))


def _cgroup_cpus(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """CPUs of a container's quota (cgroup v2, then v1), rounded down but at least one."""
    try:
        quota, period = (root / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota = (root / "cpu/cpu.cfs_quota_us").read_text().strip()
            period = (root / "cpu/cpu.cfs_period_us").read_text().strip()
        except OSError:
            return None
    if quota in {"max", "-1"}:
        return None
    return max(1, int(quota) // int(period))


def set_threads(threads: int | None, device: torch.device) -> int:
    """Set the forward pass's CPU threads (process-wide in torch); returns 0 on other devices."""
    import torch

    if device.type != "cpu":
        return 0
    wanted = threads or usable_cpus()
    if torch.get_num_threads() != wanted:
        torch.set_num_threads(wanted)
    return wanted


def device_name(device: torch.device) -> str:
    """Model name of the processor or card."""
    import torch

    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return cpu_name()


def cpu_name() -> str:
    """The processor's model name, or the architecture if the system does not name it."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def cpu_flags() -> frozenset[str]:
    """The instruction sets that Linux lists, without those that ``ECHELON_CPU`` hides.

    Empty where the system does not say it. Those of ARM have other names than those of x86.
    """
    flags = frozenset((_cpuinfo("flags") or _cpuinfo("Features")).split())
    return frozenset(f for f in flags if not f.startswith(NEWER)) if held_to_avx2() else flags


def matrix_features() -> list[str]:
    """The processor's FEATURES, without those that ``ECHELON_CPU`` hides; empty if unknown."""
    flags = cpu_flags()
    return [name for name in FEATURES if name in flags]


def processor_of(device: str) -> dict[str, Any]:
    """What a profile's key holds of the processor; nothing for a GPU, whose name says it all."""
    import psutil

    if device != "cpu":
        return {}
    return {
        "features": matrix_features() or None,
        "cores": psutil.cpu_count(logical=False),
        "usable_cpus": usable_cpus(),
    }


def _cpuinfo(field: str) -> str:
    """A field of the first CPU in ``/proc/cpuinfo``; empty where the system does not say it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), "")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory could not be allocated."""
    import torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    if MEMORY_ERRORS.search(str(error)):
        return True
    return UNCLEAR_ERRORS.search(str(error)) is not None and _memory_is_short()


def _memory_is_short() -> bool:
    """Whether the system refuses a block of :data:`SHORT_BYTES` now."""
    try:
        mmap.mmap(-1, SHORT_BYTES).close()
    except OSError:
        return True
    return False


def release_memory(device: torch.device) -> None:
    """Return freed blocks to the device: from CUDA's allocator or the C library's."""
    import torch

    if device.type == "cuda":
        torch.cuda.empty_cache()
    else:
        give_back()


def run_step(forward: Callable[[], torch.Tensor]) -> FloatArray:
    """Run a forward pass and return its logits as float32 on the host."""
    import torch

    try:
        with torch.inference_mode():
            logits: FloatArray = forward().float().cpu().numpy()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        failed = str(error)
    else:
        return logits
    # Raised out here so that no traceback keeps the failed step's tensors alive.
    raise DeviceOutOfMemory(failed)


def list_gpus() -> list[dict[str, Any]]:
    """CUDA devices: name, memory in bytes, compute capability."""
    import torch

    if not torch.cuda.is_available():
        return []
    return [
        {
            "name": properties.name,
            "memory_bytes": properties.total_memory,
            "capability": f"{properties.major}.{properties.minor}",
        }
        for properties in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    ]


class CudaMemoryMeter:
    """Peak memory of a CUDA device, with the methods of ``echelon.tuning.machine.MemoryMeter``."""

    def __init__(self, device: str) -> None:
        self._device = device

    def reset(self) -> None:
        """Start a new measurement."""
        import torch

        torch.cuda.reset_peak_memory_stats(self._device)

    def peak_bytes(self) -> int:
        """Peak since the last reset."""
        import torch

        return int(torch.cuda.max_memory_allocated(self._device))


def candidate_precisions(device: str) -> list[str]:
    """Precisions worth comparing on a device, the exact one first."""
    if choose_device(device).type == "cuda":
        return ["fp32", "fp16", "bf16"]
    return ["fp32", *["bf16"] * multiplies_half("bf16"), *["int8"] * multiplies_int8()]


def is_cuda_build() -> bool:
    """Whether torch was built with CUDA, GPU or not."""
    import torch

    return torch.version.cuda is not None


def has_onednn() -> bool:
    """Whether torch was built with oneDNN, which computes matrix products on CPU."""
    import torch

    return bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]  # torch's own gap


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
