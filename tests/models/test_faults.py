"""Which errors of torch say that memory is short, that the device is lost, or neither."""

from __future__ import annotations

import errno
import mmap
import sys
from itertools import product
from subprocess import run

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some

from echelon.errors import DeviceLost
from echelon.models import device, faults
from echelon.models.base import DeviceOutOfMemory

pytestmark = pytest.mark.device

MEMORY = [
    # torch 2.13 on Linux under an address-space limit
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory",
    "unable to mmap 268436941 bytes from file </models/model.bin>: Cannot allocate memory (12)",
    # torch on Windows
    "[enforce fail at alloc_cpu.cpp:114] data. DefaultCPUAllocator: not enough memory",
    # C++ and oneDNN
    "std::bad_alloc",
    "could not create a memory object",
    # CUDA and its libraries
    "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 14.58 GiB",
    "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
    "CUDA driver error: out of memory",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "Triton Error [CUDA]: out of memory",
    # a slice of a card (MIG), or no NVML: the allocator fails as it describes the failure
    (
        'NVML_SUCCESS == r INTERNAL ASSERT FAILED at "../c10/cuda/CUDACachingAllocator.cpp":830, '
        "please report a bug to PyTorch. "
    ),
    (
        "NVML_SUCCESS == r INTERNAL ASSERT FAILED at "
        '"/pytorch/c10/cuda/CUDACachingAllocator.cpp":1154, please report a bug to PyTorch.'
    ),
    # ROCm
    "HIP out of memory. Tried to allocate 2.00 MiB. GPU 7 has a total capacity of 287.98 GiB",
    "HIP error: out of memory\nHIP kernel errors might be asynchronously reported",
    "CUDA error: HIPBLAS_STATUS_ALLOC_FAILED when calling `hipblasCreate(handle)`",
    # Apple
    (
        "MPS backend out of memory (MPS allocated: 6.04 GB, other allocations: 1.04 GB, "
        "max allowed: 6.77 GB). Tried to allocate 459.07 MB on private pool."
    ),
    "Invalid buffer size: 44.50 GB",
    (
        "Error: command buffer exited with error status. Insufficient Memory "
        "(00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)"
    ),
]

REASONS = [
    "an illegal memory access was encountered",
    "device-side assert triggered",
    "uncorrectable ECC error encountered",
    "unspecified launch failure",
    "misaligned address",
    "an illegal instruction was encountered",
    "the launch timed out and was terminated",
    "uncorrectable NVLink error detected during the execution",
    "hardware stack error",
    "unknown error",
    "all CUDA-capable devices are busy or unavailable",
    "operation failed due to a previous error during capture",
    "CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx( handle, opa, opb, m, n, k)`",
    "CUBLAS_STATUS_INTERNAL_ERROR when calling `cublasLtMatmul( ltHandle, computeDesc)`",
    "HIPBLAS_STATUS_INTERNAL_ERROR when calling `hipblasGemmEx(...)`",
]
"""What a driver says of a context that is lost."""

BEGINNINGS = ["CUDA error: ", "HIP error: ", "CUDA driver error: ", "Triton Error [CUDA]: "]

LOST = [first + reason for first, reason in product(BEGINNINGS, REASONS)] + [
    "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED",
    (
        "CUDA error: an illegal memory access was encountered\n"
        "Search for `cudaErrorIllegalAddress' in the documentation for more information."
    ),
]

OTHER = [
    "shape '[2]' is invalid for input of size 3",
    "could not create a primitive",
    "could not create a primitive descriptor for the matmul primitive",
    "could not create a memory descriptor from blob",
    "could not execute a primitive",
    "mat1 and mat2 shapes cannot be multiplied (3x4 and 5x6)",
    "Expected all tensors to be on the same device",
    "DefaultCPUAllocator: a word about nothing",
    "out of memory of the past, said a colleague",
    "FlashAttention only supports Ampere GPUs or newer.",
    # a call was refused, and the context is intact
    "CUDA error: no kernel image is available for execution on the device",
    "HIP error: invalid device function",
    "CUDA error: the provided PTX was compiled with an unsupported toolchain.",
    "CUDA error: invalid device ordinal",
    "CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasLtMatmulAlgoGetHeuristic(...)`",
    "CUDA error: CUBLAS_STATUS_INVALID_VALUE when calling `cublasSgemm(...)`",
    "CUDA error: invalid configuration argument",
    "The NVIDIA driver on your system is too old (found version 12040).",
    "Found no NVIDIA driver on your system.",
    'x.is_cuda() INTERNAL ASSERT FAILED at "../aten/src/ATen/native/cuda/Loss.cu":12',
    "",
]

TABLE = [(words, kind) for kind, all_words in (("memory", MEMORY), ("lost", LOST), ("other", OTHER))
         for words in all_words]  # fmt: skip


@pytest.mark.parametrize(("words", "kind"), TABLE)
def test_the_words_of_runtime_errors(words, kind):
    assert faults.kind_of(RuntimeError(words)) == kind
    assert faults.is_out_of_memory(RuntimeError(words)) == (kind == "memory")


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        ("CUDA error: out of memory", "memory"),
        ("CUDA error: an illegal memory access was encountered", "lost"),
        ("CUDA error: words of a torch that is not out yet", "lost"),
        ("words of a torch that is not out yet", "lost"),
        ("CUDA error: no kernel image is available for execution on the device", "other"),
    ],
)
def test_what_torch_raises_for_accelerators_is_lost_unless_its_words_say_else(words, kind):
    assert faults.kind_of(torch.AcceleratorError(words)) == kind


ANY_CASE = some.sampled_from(TABLE)
PLAIN = some.text(some.characters(codec="utf-8", exclude_characters=":"), max_size=60)


@given(ANY_CASE, PLAIN, PLAIN)
def test_words_around_a_message_change_nothing(case, before, after):
    words, kind = case
    assert faults.kind_of(RuntimeError(f"{before}\n{words}\n{after}")) == kind


@given(PLAIN)
def test_a_message_without_a_devices_or_an_allocators_name_is_neither(words):
    assert faults.kind_of(RuntimeError(words)) == "other"


@pytest.mark.parametrize("kind", [ValueError, IndexError, OSError, KeyboardInterrupt])
def test_the_words_alone_are_not_enough(kind):
    assert faults.kind_of(kind("CUDA out of memory")) == "other"
    assert faults.kind_of(kind(LOST[0])) == "other"


def test_error_types_of_their_own_are_recognised():
    assert faults.is_out_of_memory(MemoryError())
    assert faults.is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))


def test_onednns_unclear_error_counts_while_memory_is_short(monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    unclear = RuntimeError("could not create a primitive")
    assert not faults.is_out_of_memory(unclear)
    monkeypatch.setattr(mmap, "mmap", refuse)
    assert faults.is_out_of_memory(unclear)
    assert not faults.is_out_of_memory(RuntimeError("could not execute a primitive"))


@pytest.mark.parametrize(
    ("limit", "peak_mib", "short"),
    [("unlimited", 999_999, False), (1000, 935, False), (1000, 937, True), (1000, 1200, True)],
)
def test_an_operator_that_freed_its_output_before_its_error_was_short_at_its_peak(
    limit, peak_mib, short, tmp_path, monkeypatch
):
    bytes_ = limit if isinstance(limit, str) else limit * 2**20
    (tmp_path / "limits").write_text(
        "Limit                     Soft Limit           Hard Limit           Units     \n"
        f"Max address space         {bytes_}           unlimited            bytes     \n"
    )
    (tmp_path / "status").write_text(f"Name:\tpython\nVmPeak:\t {peak_mib * 1024} kB\n")
    assert faults._was_near_its_limit(tmp_path) is short
    assert not faults._was_near_its_limit(tmp_path / "none")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_process_that_freed_what_it_took_was_short():
    program = """
import mmap, resource
from echelon.models import faults
held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + 300 * 2**20, resource.RLIM_INFINITY))
print(faults._host_is_short())
mmap.mmap(-1, 280 * 2**20).close()
print(faults._host_is_short())
"""
    done = run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]


def cards(monkeypatch, **free):
    """Cards with these bytes free; this process uses those whose names begin with ``own``."""
    names, numbers = list(free), range(len(free))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(numbers))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda n: int(names[n].startswith("own")))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda n: (free[names[n]], 16 * 2**30))


@pytest.mark.parametrize("library", ["CUBLAS", "HIPBLAS"])
def test_a_handle_that_cannot_be_made_counts_while_the_card_is_full(monkeypatch, library):
    unclear = RuntimeError(
        f"CUDA error: {library}_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"
    )
    assert faults.kind_of(unclear) == "lost"  # no card of ours is full
    cards(monkeypatch, own=20 * 2**20)
    assert faults.kind_of(unclear) == "memory"
    cards(monkeypatch, own=8 * 2**30)
    assert faults.kind_of(unclear) == "lost"
    cards(monkeypatch, neighbour=0, own=8 * 2**30)
    assert faults.kind_of(unclear) == "lost"
    cards(monkeypatch, neighbour=8 * 2**30, own=0)
    assert faults.kind_of(unclear) == "memory"

    def lost(_):
        raise torch.AcceleratorError(LOST[0])

    monkeypatch.setattr(torch.cuda, "mem_get_info", lost)
    assert faults.kind_of(unclear) == "lost"


def test_a_real_refusal_is_recognised():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert faults.is_out_of_memory(caught.value)


@pytest.mark.parametrize(
    ("words", "kind"),
    [(MEMORY[5], DeviceOutOfMemory), (LOST[0], DeviceLost), (OTHER[0], RuntimeError)],
)
def test_a_step_raises_what_its_error_means(words, kind):
    def fail():
        raise RuntimeError(words)

    with pytest.raises(kind) as caught:
        device.run_step(fail)
    assert type(caught.value) is kind
    assert caught.value.__context__ is None


def test_releasing_a_lost_device_is_quiet_and_another_error_is_not(monkeypatch):
    def lost():
        raise torch.AcceleratorError(LOST[0])

    def broken():
        raise RuntimeError("a bug")

    monkeypatch.setattr(torch.cuda, "empty_cache", lost)
    device.release_memory(torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "empty_cache", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        device.release_memory(torch.device("cuda", 0))
