"""Reader of Parquet: pairs, some rows at a time, whatever the file says of itself.

The headers of all pages are read first. They bound what rows take when they are decoded, and so
the rows decoded at a time: a few bytes of a file may stand for gigabytes of text.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from echelon.errors import InvalidInput
from echelon.offline.readers import BadRow, BadValue
from echelon.offline.streams import (
    CHUNK,
    INPUT,
    RECORD_BYTES,
    STANDARD,
    ResumePoint,
    changed,
    too_long,
    unreadable,
)
from echelon.options import require_packages

if TYPE_CHECKING:
    from collections.abc import Iterator

    from echelon.offline.readers import Columns, Entry, Row

ROWS = 1024
"""Most rows decoded at a time."""

PAGE_RECORDS = 4
"""A page may have as many bytes as this many of the longest records. Writers put up to 1,024 rows
into a page before they look at its size."""

DECODED_RECORDS = 2
"""The same of a column of the rows decoded at a time."""

MAGIC = b"PAR1"
"""The end of a file, after the length of its footer in four bytes."""


class ParquetReader:
    """Pairs in Parquet."""

    def __init__(self, path: str, columns: Columns, limit: int = RECORD_BYTES) -> None:
        if path == STANDARD:
            problem = "Parquet cannot be read from standard input"
            raise InvalidInput(INPUT, problem, "Name a file, or pipe JSONL.")
        require_packages("Parquet", "files", ["pyarrow"])
        import pyarrow as pa
        from pyarrow import parquet

        self._path, self._columns, self._limit = path, columns, limit
        self._names = [name for _, name in columns.named()]
        try:
            _check_footer(path, limit)
            # With a buffer, pages are read one by one instead of a whole row group.
            self._file = parquet.ParquetFile(path, buffer_size=CHUNK)
        except (OSError, pa.ArrowException) as error:
            raise unreadable(INPUT, path, error) from error
        try:
            _check_schema(self._file.schema_arrow, columns)
        except InvalidInput:
            self.close()
            raise
        self._position = 0
        self._hash = hashlib.sha256()

    def rows(self) -> Iterator[Entry]:
        """See :class:`~echelon.offline.readers.Reader`."""
        for number, values in enumerate(self._values(), 1):
            if number > self._position:
                size = self._count(values)
                yield (self._row(number, values, size),)

    def _row(self, number: int, values: dict[str, bytes | None], size: int) -> Row | BadRow:
        if size > self._limit:
            return BadRow(number, too_long("the row", self._limit))
        texts = {
            name: None if value is None else value.decode("utf-8", "surrogateescape")
            for name, value in values.items()
        }
        try:
            return self._columns.row(number, texts)
        except BadValue as error:
            return BadRow(number, str(error))

    def resume_point(self) -> ResumePoint:
        """See :class:`~echelon.offline.readers.Reader`."""
        return ResumePoint(self._position, self._position, self._hash.hexdigest())

    def skip_to(self, point: ResumePoint) -> None:
        """See :class:`~echelon.offline.readers.Reader`."""
        for values in self._values():
            if self._position == point.position:
                break
            self._count(values)
        if self.resume_point() != point:
            raise changed(INPUT, self._path)

    @property
    def share(self) -> float | None:
        """See :class:`~echelon.offline.readers.Reader`."""
        total = int(self._file.metadata.num_rows)
        return self._position / total if total else None

    def close(self) -> None:
        """See :class:`~echelon.offline.readers.Reader`."""
        self._file.close()

    def _values(self) -> Iterator[dict[str, bytes | None]]:
        """Columns of each row as bytes."""
        import pyarrow as pa

        try:
            for group in range(self._file.metadata.num_row_groups):
                batches = self._file.iter_batches(
                    self._rows_at_a_time(group), row_groups=[group], columns=self._names
                )
                for batch in batches:
                    yield from self._rows_of(batch)
                    del batch  # before the next one is decoded
        except (OSError, pa.ArrowException) as error:
            raise unreadable(INPUT, self._path, error) from error

    def _rows_of(self, batch: Any) -> Iterator[dict[str, bytes | None]]:
        """The rows of a batch as bytes, so that each row is checked for UTF-8 by itself."""
        columns = [_as_bytes(batch.column(name)) for name in self._names]
        for values in zip(*columns, strict=True):
            yield dict(zip(self._names, values, strict=True))

    def _rows_at_a_time(self, group: int) -> int:
        """The rows of a row group that may be decoded together."""
        about = self._file.metadata.row_group(group)
        columns = map(about.column, range(about.num_columns))
        try:
            with Path(self._path).open("rb") as file:
                sizes = [_sizes(file, one) for one in columns if one.path_in_schema in self._names]
        except (ArithmeticError, LookupError, RecursionError, TypeError, ValueError) as error:
            raise unreadable(INPUT, self._path, ValueError("a page's header is damaged")) from error
        largest = max((one.largest for one in sizes), default=0)
        if largest > PAGE_RECORDS * self._limit:
            problem = f"{self._path}: row group {group} has a page of {largest / 2**20:,.0f} MiB"
            remedy = f"Write smaller pages, or give a larger --max-record-mb: {PAGE_RECORDS} times "
            raise InvalidInput(INPUT, problem, f"{remedy}as much is the most for a page.")
        room = DECODED_RECORDS * self._limit
        return min([ROWS, *(one.rows_in(room) for one in sizes)])

    def _count(self, values: dict[str, bytes | None]) -> int:
        """Count a row as read; its bytes."""
        self._position += 1
        total = 0
        for value in values.values():
            length = -1 if value is None else len(value)
            total += length
            self._hash.update(length.to_bytes(8, "little", signed=True) + (value or b""))
        return total


def _check_footer(path: str, limit: int) -> None:
    """Refuse a file whose footer, which is decoded as a whole, is longer than a record may be."""
    with Path(path).open("rb") as file:
        file.seek(-min(8, file.seek(0, os.SEEK_END)), os.SEEK_END)
        length, magic = file.read(4), file.read(4)
    if magic == MAGIC and int.from_bytes(length, "little") > limit:
        raise InvalidInput(INPUT, too_long(f"the footer of {path}", limit), "Write fewer groups.")


def _check_schema(schema: Any, columns: Columns) -> None:
    from pyarrow import types

    columns.check(schema.names)
    for option, name in columns.named():
        kind = schema.field(name).type
        inner = kind.value_type if types.is_dictionary(kind) else kind
        if not (types.is_string(inner) or types.is_large_string(inner)):
            raise InvalidInput(option, f"the column {name!r} is {kind}", "Name one of text.")


def _as_bytes(array: Any) -> list[bytes | None]:
    import pyarrow as pa

    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    values: list[bytes | None] = array.cast(pa.large_binary()).to_pylist()
    return values


@dataclass(slots=True)
class _Sizes:
    """Bounds on the pages of a column in one row group, in bytes."""

    largest: int = 0  # the largest page, as it is or decompressed
    plain: int = 0  # the largest page that holds its values as they are
    value: float = 0  # the mean value of a page, at most; of all its values where they can repeat

    def rows_in(self, room: int) -> int:
        """The rows in a line that surely need no more bytes when they are decoded; 1 at least.

        Pages that lie between the rows as a whole need ``value`` for each row. The first and the
        last may be there in part, but with their largest values.
        """
        return max(1, int((room - 2 * self.plain) / max(1.0, self.value)))


def _sizes(file: BinaryIO, column: Any) -> _Sizes:
    """Read the page headers of a column, up to its number of rows."""
    start = column.data_page_offset
    if column.has_dictionary_page and 0 < column.dictionary_page_offset < start:
        start = column.dictionary_page_offset
    file.seek(start)
    found = _Sizes()
    longest = rows = 0  # longest value of the dictionary, and rows of the pages
    while rows < column.num_values and file.tell() < start + column.total_compressed_size:
        header = _struct(file)
        begin, packed, size = file.tell(), header[PACKED_BYTES], header[BYTES]
        if packed < 0:
            raise ValueError(packed)
        found.largest = max(found.largest, packed, size)
        if header[PAGE_TYPE] == DICTIONARY:
            longest = _longest(file, column.compression, packed, size)
        elif header[PAGE_TYPE] in DATA:
            own, at_encoding = DATA[header[PAGE_TYPE]]
            values, encoding = header[own][1], header[own][at_encoding]
            rows += values
            if encoding in INDICES:
                found.value = max(found.value, longest)
            elif encoding in PLAIN:
                found.plain = max(found.plain, size)
                found.value = max(found.value, size / max(1, values))
            else:  # each value may repeat the bytes of all before it
                found.value = max(found.value, size)
        file.seek(begin + packed)
    return found


def _longest(file: BinaryIO, compression: str, packed: int, size: int) -> int:
    """Bytes of the longest value of a dictionary's page; of the page where it is not known."""
    import pyarrow as pa

    if size > MOST_DICTIONARY_BYTES:
        return size
    page = file.read(packed)
    if compression != "UNCOMPRESSED":
        try:
            codec = "lz4_raw" if compression == "LZ4" else compression.lower()
            page = pa.decompress(page, size, codec, asbytes=True)
        except (pa.ArrowException, OSError, ValueError):
            return size
    longest = at = 0
    while at < len(page):
        length = int.from_bytes(page[at : at + 4], "little")
        longest = max(longest, length)
        at += 4 + length
    return min(longest, size)


# Page headers are structs in Thrift's compact form:
# https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift
PAGE_TYPE, BYTES, PACKED_BYTES = 1, 2, 3
"""Fields of a page's header."""
DICTIONARY = 2
DATA = {0: (5, 2), 3: (8, 4)}
"""Type of a page with rows → field of its own header, and the field of the encoding in that."""
PLAIN, INDICES = (0, 6), (2, 8)
"""Encodings that hold each value once, and those that name values of the dictionary."""
MOST_DICTIONARY_BYTES = 2**22
"""A larger dictionary is not searched for its longest value; writers stop at 1 MiB."""

TRUE, FALSE, TEXT, STRUCT = 1, 2, 8, 12
NUMBERS = (4, 5, 6)
"""Kinds of fields in Thrift."""


def _struct(file: BinaryIO) -> dict[int, Any]:
    """The numbers of a struct by their fields, and the structs in it."""
    found: dict[int, Any] = {}
    field = 0
    while head := file.read(1)[0]:
        step, kind = head >> 4, head & 15
        field = field + step if step else _number(file)
        if kind in NUMBERS:
            found[field] = _number(file)
        elif kind == TEXT:
            file.seek(_unsigned(file), os.SEEK_CUR)
        elif kind == STRUCT:
            found[field] = _struct(file)
        elif kind not in {TRUE, FALSE}:
            raise ValueError(kind)
    return found


def _number(file: BinaryIO) -> int:
    """A signed number, whose last bit is its sign."""
    value = _unsigned(file)
    return value >> 1 ^ -(value & 1)


def _unsigned(file: BinaryIO) -> int:
    """A number in groups of seven bits, the lowest first."""
    value = 0
    for shift in range(0, 64, 7):
        byte = file.read(1)[0]
        value |= (byte & 127) << shift
        if byte < 128:  # noqa: PLR2004 - the highest bit says that more follows
            return value
    raise ValueError(value)
