"""Bytes in and lines out: standard input, gzip, zstd, and how far one has come."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import sys
import zlib
from importlib.util import find_spec
from pathlib import Path
from typing import IO, TYPE_CHECKING, BinaryIO, Self, cast

from echelon.errors import InvalidInput, MissingDependency
from echelon.offline.rows import ROW_BYTES, ResumePoint

if TYPE_CHECKING:
    from types import TracebackType

STANDARD = "-"
"""The name of standard input and output."""

CHUNK = 2**20
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd"}
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def compression_of(path: str) -> str | None:
    """How a file is compressed, by its suffix."""
    return COMPRESSIONS.get(Path(path).suffix.lower())


def suffix_of(path: str) -> str:
    """The suffix that tells the format: the last one that is no compression's."""
    name = Path(path)
    return (name.with_suffix("") if compression_of(path) else name).suffix.lower()


def need(package: str, what: str) -> None:
    """Ask for an optional package.

    Raises:
        MissingDependency: it is not installed.
    """
    if find_spec(package) is None:
        raise MissingDependency(
            f"{what} needs {package}. Install it with: pip install 'echelon-rerank[files]'"
        )


def _opened(path: str) -> BinaryIO:
    if path == STANDARD:  # through a descriptor of its own, so that closing it is harmless
        return os.fdopen(os.dup(sys.stdin.fileno()), "rb")
    return Path(path).open("rb")


class Source:
    """A file that is read from its start, decompressed.

    Args:
        path: its name; ``-`` is standard input.
        option: what the user calls it, for messages.

    Raises:
        InvalidInput: it cannot be opened.
        MissingDependency: it is zstd, and pyarrow is not installed.
    """

    def __init__(self, path: str, option: str) -> None:
        self.path, self.option = path, option
        try:
            self._raw = _opened(path)
        except OSError as error:
            raise unreadable(option, path, error) from error
        self.size = None if path == STANDARD else Path(path).stat().st_size
        self._stream = self._decompressed(compression_of(path))

    def _decompressed(self, compression: str | None) -> BinaryIO:
        if compression is None:
            return self._raw
        if compression == "gzip":
            return cast("BinaryIO", io.BufferedReader(gzip.GzipFile(fileobj=self._raw), CHUNK))
        need("pyarrow", "zstd")
        import pyarrow as pa

        inner = pa.CompressedInputStream(pa.PythonFile(self._raw, mode="r"), "zstd")
        return cast("BinaryIO", io.BufferedReader(inner, CHUNK))

    def readline(self, limit: int) -> bytes:
        """The next line, or its first ``limit`` bytes.

        Raises:
            InvalidInput: the file is damaged or cut off.
        """
        try:
            return self._stream.readline(limit)
        except (OSError, EOFError, zlib.error) as error:
            raise unreadable(self.option, self.path, error) from error

    def read(self, count: int) -> bytes:
        """As many bytes as there are, up to ``count``; see :meth:`readline`."""
        try:
            return self._stream.read(count)
        except (OSError, EOFError, zlib.error) as error:
            raise unreadable(self.option, self.path, error) from error

    @property
    def share(self) -> float | None:
        """How much of the file has been read, 0 to 1; None for standard input."""
        if not self.size:
            return None
        return min(1.0, self._raw.tell() / self.size)

    def close(self) -> None:
        """Close the file."""
        self._stream.close()
        self._raw.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()


class Lines:
    """The lines of a source as bytes, counted and summed up as they are taken.

    A line may be put back once: then it counts as not yet read.

    Args:
        source: where they come from.
        limit: longest line in bytes; a longer one comes out as None.
    """

    def __init__(self, source: Source, limit: int = ROW_BYTES) -> None:
        self.source = source
        self.number = 0
        self._limit = limit
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
            return self._shown()
        self._settle()
        line = self.source.readline(self._limit + 1)
        if not line:
            raise StopIteration
        self.number += 1
        if len(line) > self._limit:
            self._swallow(line)
            return None
        self._taken = line
        return self._shown()

    def put_back(self) -> None:
        """Return the line that was taken last."""
        if self._taken is None or self._returned:
            raise RuntimeError("This is a bug: there is no line to put back.")
        self._returned = True
        self.number -= 1

    def mark(self) -> ResumePoint:
        """Where reading stands."""
        if not self._returned:
            self._settle()
        return ResumePoint(self._position, self.number, self._hash.hexdigest())

    def skip_to(self, mark: ResumePoint) -> None:
        """Read on to a mark that was made in an earlier run.

        Raises:
            InvalidInput: what stands before it is not what stood there then.
        """
        while self._position < mark.position:
            chunk = self.source.read(min(CHUNK, mark.position - self._position))
            if not chunk:
                break
            self._count(chunk)
        self.number = mark.line
        if self.mark() != mark:
            raise changed(self.source.option, self.source.path)

    def _shown(self) -> bytes | None:
        """The line without a byte order mark, which is no text, but counts as read."""
        if self._taken is None or self.number > 1:
            return self._taken
        return self._taken.removeprefix(BYTE_ORDER_MARK)

    def _settle(self) -> None:
        if self._taken is not None:
            self._count(self._taken)
            self._taken = None

    def _swallow(self, start: bytes) -> None:
        """Read the rest of a line that is too long."""
        part = start
        while part:
            self._count(part)
            if part.endswith(b"\n"):
                return
            part = self.source.readline(CHUNK)

    def _count(self, part: bytes) -> None:
        self._hash.update(part)
        self._position += len(part)


def changed(option: str, path: str) -> InvalidInput:
    """The error for a file that is no longer what an earlier run read."""
    return InvalidInput(
        option,
        f"{path} is not the file that was read before",
        "Put it back, or begin anew with --restart.",
    )


def unreadable(option: str, path: str, error: Exception) -> InvalidInput:
    """The error for a file that cannot be read, or not to its end."""
    reason = getattr(error, "strerror", None) or error
    return InvalidInput(option, f"{path} cannot be read ({reason})", "Give a file that is whole.")


def digest_of(file: IO[bytes]) -> str:
    """SHA-256 of a whole file."""
    return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]  # IO is wider
