"""Files as bytes and lines: standard input, gzip, zstd, positions, digests, writes that last."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import sys
import zlib
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Self, cast

from echelon.errors import InvalidInput
from echelon.messages import tr
from echelon.options import require_packages

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

STANDARD = "-"
"""The name of standard input and output."""

INPUT = "INPUT"
"""The name of the input file in messages."""

RECORD_MB = 32.0
"""Longest record of an input in MiB. A record is in memory when it is ranked, so this bounds the
memory; the server's bodies have the same limit."""

RECORD_BYTES = int(RECORD_MB * 2**20)
CHUNK = 2**20
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd"}
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class ResumePoint:
    """A place between two rows, and the digest of the part before it."""

    position: int  # decompressed bytes read; in Parquet rows
    line: int  # lines read
    digest: str  # SHA-256 over the part that was read


def compression_of(path: str) -> str | None:
    """How a file is compressed, by its suffix."""
    return COMPRESSIONS.get(Path(path).suffix.lower())


def suffix_of(path: str) -> str:
    """The suffix that names the format: the last one that is not a compression's."""
    name = Path(path)
    return (name.with_suffix("") if compression_of(path) else name).suffix.lower()


class Lines:
    """The lines of a file as bytes, decompressed; position and digest are kept as lines are taken.

    A line may be put back once: then it counts as not yet read. None comes out in place of a line
    longer than ``limit`` bytes. A file that is damaged or cut off raises :class:`InvalidInput`.
    """

    def __init__(self, path: str, option: str = INPUT, limit: int = RECORD_BYTES) -> None:
        self.path, self.number, self.limit = path, 0, limit
        self._option = option
        try:
            self._raw = _opened(path)
        except OSError as error:
            raise unreadable(option, path, error) from error
        self._size = 0 if path == STANDARD else Path(path).stat().st_size
        self._stream = _decompressed(self._raw, compression_of(path))
        self._position = 0
        self._hash = hashlib.sha256()
        self._taken: bytes | None = None
        self._returned = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> bytes | None:
        if self._returned:
            self._returned = False
            self.number += 1
            return self._text()
        self._count_taken()
        line = self._read(self._stream.readline, self.limit + 1)
        if not line:
            raise StopIteration
        self.number += 1
        if len(line) > self.limit:
            self._skip_rest_of_line(line)
            return None
        self._taken = line
        return self._text()

    def filled(self) -> Iterator[bytes | None]:
        """The lines that are not empty."""
        return (line for line in self if line is None or line.strip())

    @property
    def share(self) -> float | None:
        """Share of the file read so far, 0 to 1; None for standard input."""
        return min(1.0, self._raw.tell() / self._size) if self._size else None

    def close(self) -> None:
        """Close the file."""
        self._stream.close()
        self._raw.close()

    def put_back(self) -> None:
        """Return the line that was taken last."""
        if self._taken is None or self._returned:
            raise RuntimeError("This is a bug: there is no line to put back.")
        self._returned = True
        self.number -= 1

    def resume_point(self) -> ResumePoint:
        """The place behind the line that was taken last."""
        if not self._returned:
            self._count_taken()
        return ResumePoint(self._position, self.number, self._hash.hexdigest())

    def skip_to(self, point: ResumePoint) -> None:
        """Read on to a place that an earlier run reached; refuse a file that differs before it."""
        while self._position < point.position:
            chunk = self._read(self._stream.read, min(CHUNK, point.position - self._position))
            if not chunk:
                break
            self._count(chunk)
        self.number = point.line
        if self.resume_point() != point:
            raise changed(self._option, self.path)

    def _text(self) -> bytes | None:
        """The line without a byte order mark, which is no text but counts as read."""
        if self._taken is None or self.number > 1:
            return self._taken
        return self._taken.removeprefix(BYTE_ORDER_MARK)

    def _count_taken(self) -> None:
        if self._taken is not None:
            self._count(self._taken)
            self._taken = None

    def _skip_rest_of_line(self, start: bytes) -> None:
        part = start
        while part:
            self._count(part)
            if part.endswith(b"\n"):
                return
            part = self._read(self._stream.readline, CHUNK)

    def _read(self, method: Callable[[int], bytes], count: int) -> bytes:
        try:
            return method(count)
        except (OSError, EOFError, zlib.error) as error:
            raise unreadable(self._option, self.path, error) from error

    def _count(self, part: bytes) -> None:
        self._hash.update(part)
        self._position += len(part)


def _opened(path: str) -> BinaryIO:
    if path == STANDARD:  # a copy of the descriptor, so that closing it is harmless
        return os.fdopen(os.dup(sys.stdin.fileno()), "rb")
    return Path(path).open("rb")


def _decompressed(raw: BinaryIO, compression: str | None) -> BinaryIO:
    if compression is None:
        return raw
    if compression == "gzip":
        return cast("BinaryIO", io.BufferedReader(gzip.GzipFile(fileobj=raw), CHUNK))
    require_packages("zstd", "files", ["pyarrow"])
    import pyarrow as pa

    inner = pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd")
    return cast("BinaryIO", io.BufferedReader(inner, CHUNK))


def too_long(record: str, limit: int) -> str:
    """Why a record of more than ``limit`` bytes is not read."""
    return f"{record} has more than {limit / 2**20:g} MiB; a larger --max-record-mb allows it"


def changed(option: str, path: str) -> InvalidInput:
    """The error for a file that is no longer the one an earlier run read."""
    problem = f"{path} is not the file that was read before"
    return InvalidInput(option, problem, "Put it back, or begin anew with --restart.")


def unreadable(option: str, path: str | Path, error: Exception) -> InvalidInput:
    """The error for a file that cannot be read, or not to its end."""
    reason = getattr(error, "strerror", None) or error
    missing = isinstance(error, FileNotFoundError)
    remedy = tr("Check its name.") if missing else tr("Give a file that is whole.")
    problem = tr("{file} cannot be read ({reason})", file=path, reason=reason)
    return InvalidInput(option, problem, remedy)


def digest_of(option: str, path: str | Path) -> str:
    """SHA-256 of a whole file."""
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise unreadable(option, path, error) from error


@contextmanager
def replacement(path: Path, ending: str) -> Iterator[Path]:
    """Make a new file beside ``path`` that takes its place once it is complete and on disk.

    No file or link that another program put there is written to.
    """
    building = path.with_name(f"{path.name}.{ending}")
    building.unlink(missing_ok=True)
    os.close(os.open(building, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    try:
        yield building
        sync_to_disk(building)
        building.replace(path)
    except BaseException:
        building.unlink(missing_ok=True)
        raise


def sync_to_disk(path: Path) -> None:
    """Wait until a file, or a folder's names, are on disk; Windows cannot wait for a folder."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
