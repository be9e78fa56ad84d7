"""The machine as torch sees it: devices, precisions, threads and memory."""

from __future__ import annotations

import os
import platform
import threading
import warnings
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from echelon.errors import DeviceLost, EchelonWarning, InvalidInput, MissingDependency
from echelon.models.base import DeviceOutOfMemory
from echelon.models.drivers import REMEDY, unusable_card
from echelon.models.faults import is_crowded, kind_of
from echelon.models.heap import give_back
from echelon.profile import FEATURES

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    import torch

    from echelon.types import FloatArray


T = TypeVar("T")

DTYPES = {
    "fp32": "float32",
    "bf16": "bfloat16",
    "fp16": "float16",
    "int8": "bfloat16",
    "fp8": "bfloat16",
}
"""dtype of the activations; under int8 and fp8 they are bf16."""

FLOAT8_CAPABILITY = (8, 9)
"""Compute capability from which NVIDIA's cards multiply fp8."""

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
    """The device for the ``device`` option; :class:`InvalidInput` if it does not exist.

    ``auto`` warns where it takes the CPU although there is a card.
    """
    require_torch()
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        unusable = unusable_card()
        if unusable is not None:
            words = f"Scoring runs on the CPU: {unusable}. {REMEDY}"
            warnings.warn(words, EchelonWarning, stacklevel=2)
    kind, _, number = name.partition(":")
    if kind == "cpu":
        return torch.device("cpu")
    if kind == "mps":
        if torch.backends.mps.is_available():
            return torch.device("mps")
        raise InvalidInput(
            "device",
            "'mps' is not there: this machine or this build of torch has no Apple GPU",
            "Use device='cpu' or 'auto'.",
        )
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = int(number or 0)  # torch itself wraps large numbers round
    if index >= count:
        unusable = unusable_card()
        if unusable is not None:
            raise InvalidInput("device", f"{name!r} is not there: {unusable}", REMEDY)
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
    int8 is refused where it would be slow or inexact, fp8 where the device has none.
    """
    if precision == "fp8" and not multiplies_float8(device):
        raise InvalidInput(
            "precision",
            f"{device_name(device)} does not multiply fp8",
            "It needs an NVIDIA card of compute capability 8.9 or newer (RTX 40, L4, H100). Use "
            "auto, fp32, bf16 or fp16.",
        )
    if precision == "int8" and not (device.type == "cpu" and multiplies_int8()):
        raise InvalidInput(
            "precision",
            f"{device_name(device)} has no int8 instructions that Echelon uses",
            "It needs a CPU with VNNI or AMX. Use auto, fp32, bf16 or fp16.",
        )
    if device.type == "mps":
        if precision == "bf16":
            remedy = "Use fp32, which auto means there, or fp16."
            raise InvalidInput("precision", "bf16 is not built for Apple's GPUs", remedy)
        return "fp32" if precision == "auto" else precision
    if precision != "auto":
        return precision
    if usual is not None and (device.type == "cuda" or multiplies_half(usual)):
        return usual
    return "fp16" if device.type == "cuda" else "fp32"


def half_precision(device: torch.device) -> str:
    """The half-width precision that a device multiplies: cards before Ampere have no bf16 units."""
    import torch

    if device.type == "cpu":
        return "bf16"
    if device.type == "mps":
        return "fp16"
    from echelon.models.attention_cuda import FLASH_CAPABILITY

    return "bf16" if torch.cuda.get_device_capability(device)[0] >= FLASH_CAPABILITY else "fp16"


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


def multiplies_float8(device: torch.device) -> bool:
    """Whether a device multiplies eight-bit floating point; AMD's cards have another format."""
    import torch

    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= FLOAT8_CAPABILITY


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
    return f"GPU of {cpu_name()}" if device.type == "mps" else cpu_name()


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


def release_memory(device: torch.device) -> None:
    """Return freed blocks to the device: from CUDA's allocator or the C library's."""
    import torch

    if device.type == "cpu":
        give_back()
        return
    try:
        (torch.mps if device.type == "mps" else torch.cuda).empty_cache()
    except RuntimeError as error:
        if kind_of(error) != "lost":  # else the next step says it, and a closed scorer has none
            raise


_MPS_IN_USE = threading.Lock()


def one_at_a_time(device: torch.device) -> AbstractContextManager[object]:
    """Held while a device computes that aborts when two threads use it at once: Apple's GPU."""
    return _MPS_IN_USE if device.type == "mps" else nullcontext()


def run_step(forward: Callable[[], torch.Tensor]) -> FloatArray:
    """Run a forward pass and return its logits as float32 on the host; see :func:`guarded`."""

    def computed() -> FloatArray:
        logits: FloatArray = forward().float().cpu().numpy()
        return logits

    return guarded(computed)


def guarded(work: Callable[[], T]) -> T:
    """Work of a model, without gradients and its fp32 exact.

    Raises:
        DeviceOutOfMemory: it did not fit.
        DeviceLost: the device failed, and with it this process.
    """
    import torch

    from echelon.models.exact import ieee_products

    try:
        with torch.inference_mode(), ieee_products():
            done = work()
    except (RuntimeError, MemoryError) as error:
        kind, failed = kind_of(error), str(error)
        if kind == "other":
            raise
    else:
        return done
    # Raised out here so that no traceback keeps the failed step's tensors alive.
    if kind == "memory":
        raise DeviceOutOfMemory(failed, crowded=is_crowded())
    raise DeviceLost(failed)


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


def candidate_precisions(device: str) -> list[str]:
    """Precisions worth comparing on a device, the exact one first."""
    chosen = choose_device(device)
    if chosen.type != "cpu":
        return ["fp32", "fp16", *["bf16"] * (half_precision(chosen) == "bf16")]
    return ["fp32", *["bf16"] * multiplies_half("bf16"), *["int8"] * multiplies_int8()]


def is_cuda_build() -> bool:
    """Whether torch was built with CUDA, GPU or not."""
    import torch

    return torch.version.cuda is not None


def has_onednn() -> bool:
    """Whether torch was built with oneDNN, which computes matrix products on CPU."""
    import torch

    return bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]  # torch's own gap
