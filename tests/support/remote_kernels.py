"""Kernels that were compiled for another machine, run under an emulator.

``KERNELS_MACHINE=aarch64`` makes the tests of the kernels run these in place of this machine's own
(``make test-arm``): same tests, same reference, same bounds.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import struct
import subprocess
import tempfile
from functools import cache, partial
from pathlib import Path

from helpers import ROOT

MACHINE = os.environ.get("KERNELS_MACHINE", "")

COMPILERS = {"aarch64": "aarch64-linux-gnu-g++"}
EMULATORS = {"aarch64": ["qemu-aarch64", "-cpu", "max", "-L", "/usr/aarch64-linux-gnu"]}

OUTPUTS = {
    "echelon_attention": {11},
    "echelon_causal_attention": {16},
    "echelon_quantize": {3, 4},
    "echelon_add_norm": {9, 10, 11},
    "echelon_accumulate_norm": {0, 8},
    "echelon_rotate": {2},
    "echelon_activate": {6, 7, 8},
}
"""Arguments that a kernel writes."""


def build_hook():
    """The module that compiles the kernels."""
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def remote(level):
    """The library of a level of :data:`MACHINE`, compiled once a process."""
    return RemoteLibrary(_built(), level)


@cache
def _built() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="echelon-kernels-"))
    compiler = COMPILERS[MACHINE]
    failures = build_hook().compile_kernels([compiler], MACHINE, folder)
    assert not failures, failures
    source = Path(__file__).with_name("kernel_driver.cpp")
    driver = folder / "driver"
    command = [compiler, "-std=c++17", "-O1", "-Wall", "-Wextra", source, "-o", driver, "-ldl"]
    subprocess.run(command, check=True)
    return folder


class RemoteLibrary:
    """Takes the place of the ``ctypes`` library: reads and writes this process's memory."""

    def __init__(self, folder, level):
        library = folder / f"libechelon_{level}.so.1"
        command = [*EMULATORS[MACHINE], folder / "driver", library]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def __getattr__(self, name):
        return partial(self._call, name)

    def _call(self, name, *arguments):
        sizes = SIZES[name](*arguments)
        parts = [struct.pack("<BB", len(name), len(arguments)), name.encode()]
        parts += [_packed(value, sizes.get(i)) for i, value in enumerate(arguments)]
        self._process.stdin.write(b"".join(parts))
        self._process.stdin.flush()
        (status,) = struct.unpack("<i", self._read(4))
        for i, size in sorted(sizes.items()):
            if arguments[i] is not None:
                content = self._read(size)
                if i in OUTPUTS[name]:
                    ctypes.memmove(arguments[i], content, size)
        return status

    def _read(self, size):
        content = self._process.stdout.read(size)
        assert len(content) == size, "the driver has ended"
        return content


def _packed(value, size):
    if value is None:
        return b"n"
    if size is not None:
        return struct.pack("<cq", b"b", size) + ctypes.string_at(value, size)
    if isinstance(value, float):
        return struct.pack("<cd", b"f", value)
    return struct.pack("<cq", b"i", value)


def _attention(*arguments):
    _, query_stride, query_offsets, _, _, stride, offsets, pairs, heads, size, *_ = arguments
    index = 4 * (pairs + 1)
    rows, tokens = (
        struct.unpack("<i", ctypes.string_at(at, index)[-4:])[0] for at in (query_offsets, offsets)
    )
    width = heads * size
    keys = 2 * ((tokens - 1) * stride + width)
    queries = 2 * ((rows - 1) * query_stride + width)
    return {0: queries, 2: index, 3: keys, 4: keys, 6: index, 11: 2 * rows * width}


def _causal_attention(*arguments):
    _, query_stride, query_offsets, _, key_stride, _, value_stride, offsets = arguments[:8]
    _, _, starts, before, texts, heads, group, size, *_ = arguments[8:]
    index, width = 4 * (texts + 1), heads * size
    queries, rows = (
        struct.unpack("<i", ctypes.string_at(at, index)[-4:])[0] for at in (query_offsets, offsets)
    )
    places, counts = (
        struct.unpack(f"<{texts}i", ctypes.string_at(at, 4 * texts)) for at in (starts, before)
    )
    first = max(place + count for place, count in zip(places, counts, strict=True))
    keys, values = (2 * ((rows - 1) * stride + width) for stride in (key_stride, value_stride))
    asked = 2 * ((queries - 1) * query_stride + width * group)
    sizes = {0: asked, 2: index, 3: keys, 5: values, 7: index, 8: 2 * first * width}
    sizes |= {9: 2 * first * width, 10: 4 * texts, 11: 4 * texts}
    return sizes | {16: 2 * queries * width * group}


def _quantize(rows, count, width, *_):
    del rows
    return {0: 2 * count * width, 3: count * width, 4: 4 * count}


def _add_norm(product, scales, bias, residual, count, width, *_):
    del product, scales, bias, residual
    cells, column, row = count * width, 4 * width, 4 * count
    sizes = {0: 2 * cells, 1: row, 2: column, 3: 2 * cells, 6: column, 7: column}
    return sizes | {9: 2 * cells, 10: cells, 11: row}


def _accumulate_norm(rows, product, count, width, *_):
    del rows, product
    cells, column = count * width, 4 * width
    return {0: 4 * cells, 1: 2 * cells, 4: column, 5: column, 8: 2 * cells}


def _rotate(*arguments):
    _, source_stride, _, out_stride, count, heads, size, *_ = arguments
    width = heads * size
    reads, writes = (2 * ((count - 1) * stride + width) for stride in (source_stride, out_stride))
    return {0: reads, 2: writes, 7: 4 * count * size, 8: 4 * count * size, 9: 4 * size}


def _activate(product, scales, bias, count, width, *_):
    del product, scales, bias
    cells = count * width
    return {0: 2 * cells, 1: 4 * count, 2: 4 * width, 6: 2 * cells, 7: cells, 8: 4 * count}


SIZES = {
    "echelon_attention": _attention,
    "echelon_causal_attention": _causal_attention,
    "echelon_quantize": _quantize,
    "echelon_add_norm": _add_norm,
    "echelon_accumulate_norm": _accumulate_norm,
    "echelon_rotate": _rotate,
    "echelon_activate": _activate,
}
"""Kernel → the bytes behind each of its pointers, from its arguments."""
