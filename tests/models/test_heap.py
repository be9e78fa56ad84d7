"""What is freed stays for the next step, until it is wanted back."""

from __future__ import annotations

import platform
import sys

import pytest
from helpers import run_python

from echelon.models import heap

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.libc_ver()[0] != "glibc",
    reason="only glibc has these settings",
)

FAULTS = """
import ctypes, resource, sys
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, (ctypes.c_size_t,)
libc.free.argtypes = (ctypes.c_void_p,)
SIZE = 17 * 2**20  # what a layer of a large model writes

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(SIZE)
    ctypes.memset(block, 1, SIZE)
    libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    pages = int(open("/proc/self/statm").read().split()[1])
    return pages * resource.getpagesize()
"""

OPENED = """
from pathlib import Path
from echelon.models.registry import open_scorer
scorer = open_scorer(Path(sys.argv[1]), device="cpu", precision="fp32", threads=1)
"""


def lines(code: str, *arguments: str, **environment: str) -> list[int]:
    """What a fresh process prints."""
    ran = run_python(FAULTS + code, *arguments, **environment)
    assert ran.returncode == 0, ran.stderr
    return [int(line) for line in ran.stdout.split()]


def test_an_open_scorer_keeps_what_is_freed_until_it_is_released(bert):
    code = OPENED + "faults(); print(faults(), resident()); scorer.release(); print(resident())"
    again, kept, released = lines(code, str(bert))
    assert again < 64  # 4,352 pages of 4 KiB, had they gone
    assert kept - released > 14 * 2**20


@pytest.mark.parametrize(
    "setting",
    [
        {"MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"},
        {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=0:glibc.malloc.mmap_threshold=65536"},
    ],
)
def test_a_users_own_choice_stands(bert, setting):
    (again,) = lines(OPENED + "faults(); print(faults())", str(bert), **setting)
    assert again > 4000


def test_an_older_c_library_takes_less(monkeypatch):
    asked = []

    class Older:
        def mallopt(self, parameter: int, value: int) -> int:
            asked.append((parameter, value))
            return int(parameter != heap.MMAP_THRESHOLD or value <= 32 * 2**20)

    monkeypatch.setattr(heap, "_libc", lambda _: Older())
    for name in (*heap.SETTINGS, "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    heap.keep_freed.__wrapped__()
    most, less = heap.KEPT_BYTES
    assert asked == [
        (heap.MMAP_THRESHOLD, most),
        (heap.MMAP_THRESHOLD, less),
        (heap.TRIM_THRESHOLD, less),
    ]


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(heap, "_libc", lambda _: None)
    heap.keep_freed.__wrapped__()
    heap.give_back()
