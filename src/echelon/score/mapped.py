"""Pages of a mapped table, given back once texts have touched them.

A word table of half a gigabyte is read row by row, but the kernel maps sixteen pages around each
row that is in its cache, so that after some hundred texts most of the table counts as the process's
memory. Giving the pages back leaves them in the cache of files, where the next text finds them.
"""

from __future__ import annotations

import ctypes
import mmap
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

LEAST_BYTES = 128 * 2**20
"""Smaller tables stay: giving back would spare little."""

ROWS = 1024
"""Rows looked up before pages are given back: they then hold 64 MiB at most, and what giving back
and finding again costs, some two milliseconds, is little beside scoring so many tokens."""

DONT_NEED = getattr(mmap, "MADV_DONTNEED", None)

_SPAN = re.compile(r"(?P<low>[0-9a-f]+)-(?P<high>[0-9a-f]+) \S+ \S+ (?P<device>\S+) ")
"""The line with which /proc/self/smaps begins each mapping: see proc(5)."""


class MappedPages:
    """The pages of one table.

    Args:
        start: address of its first byte.
        length: bytes.
    """

    def __init__(self, start: int, length: int) -> None:
        self._start = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE  # whole pages of its own only
        self._length = (start + length - self._start) // mmap.PAGESIZE * mmap.PAGESIZE
        self._rows = 0

    @classmethod
    def of(cls, table: torch.Tensor, least_bytes: int = LEAST_BYTES) -> MappedPages | None:
        """The pages of a table; None where it is small or in memory of ours."""
        if table.device.type != "cpu" or table.nbytes < least_bytes or DONT_NEED is None:
            return None
        start = table.data_ptr()
        return cls(start, table.nbytes) if _is_of_a_file(start, table.nbytes) else None

    def touched(self, rows: int) -> None:
        """So many rows were looked up."""
        self._rows += rows
        if self._rows >= ROWS:
            self._rows = 0
            self.give_back()

    def give_back(self) -> None:
        """Let the kernel have the pages; what it refuses stays."""
        where, length = ctypes.c_void_p(self._start), ctypes.c_size_t(self._length)
        ctypes.CDLL(None).madvise(where, length, DONT_NEED)


def _is_of_a_file(start: int, length: int) -> bool:
    """Whether all these bytes are a file's and as they are on disk: only such may be given back.

    Of any other memory, giving back would leave zeros.
    """
    smaps = Path("/proc/self/smaps")
    if not smaps.exists():
        return False
    reached, inside, ours = start, False, 0
    for line in smaps.read_text(encoding="utf-8", errors="replace").splitlines():
        if (span := _SPAN.match(line)) is not None:
            low, high = int(span["low"], 16), int(span["high"], 16)
            inside = low <= reached < high and span["device"] != "00:00"
            reached = high if inside else reached
        elif inside and line.startswith("Anonymous:"):
            ours += int(line.split()[1])  # written to since
    return reached >= start + length and ours == 0
