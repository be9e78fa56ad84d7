"""Files to rows: JSONL, CSV, TSV and Parquet, one row at a time."""

from __future__ import annotations

import csv
import hashlib
import json
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from echelon.errors import InvalidInput
from echelon.offline.rows import ROW_BYTES, BadRow, BadValue, ResumePoint, Row, row_of, text_of
from echelon.offline.streams import STANDARD, Lines, Source, changed, need, unreadable

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

PARQUET_ROWS = 1024
"""Rows of a Parquet file decoded at a time."""

INPUT = "INPUT"
"""What messages call the file that is reranked."""


Entry = tuple[Row | BadRow, ...]
"""Rows that have one place: where one of them was read, all of them were."""


class Reader(Protocol):
    """Rows of a file, good and bad, in its order."""

    def __iter__(self) -> Iterator[Entry]:
        """The rows from where reading stands."""
        ...

    def mark(self) -> ResumePoint:
        """Where reading stands: behind the row that came out last."""
        ...

    def skip_to(self, mark: ResumePoint) -> None:
        """Go to a mark of an earlier run.

        Raises:
            InvalidInput: what was read then is not what stands there now.
        """
        ...

    @property
    def share(self) -> float | None:
        """How much has been read, 0 to 1; None where nobody knows."""
        ...

    def close(self) -> None:
        """Close the file."""
        ...


@dataclass(frozen=True, slots=True)
class Columns:
    """Names of the columns of a file of pairs.

    Attributes:
        query: the query's text.
        document: the document's text.
        query_id: the query's id, or None.
        document_id: the document's id, or None.
    """

    query: str = "query"
    document: str = "document"
    query_id: str | None = None
    document_id: str | None = None

    def check(self, found: Sequence[str]) -> None:
        """Refuse a file that lacks one of them, or has it twice.

        Raises:
            InvalidInput: with the names that are there.
        """
        for option, name in self.named():
            if name not in found:
                have = ", ".join(found) or "none"
                raise InvalidInput(
                    option, f"there is no column {name!r}", f"The file's columns are: {have}."
                )
            if list(found).count(name) > 1:
                raise InvalidInput(option, f"the column {name!r} is there twice", "Rename one.")

    def named(self) -> list[tuple[str, str]]:
        """(option, column) of those that are wanted."""
        options = ("query", "document", "query_id", "document_id")
        pairs = [(f"--{name.replace('_', '-')}-column", getattr(self, name)) for name in options]
        return [(option, name) for option, name in pairs if name is not None]

    def row(self, line: int, value: dict[str, Any]) -> Row:
        """A row out of its columns' values.

        Raises:
            BadValue: one of them is no text.
        """
        query, document = (text_of(name, value[name]) for name in (self.query, self.document))
        ids = [
            None if name is None or value[name] is None else text_of(name, value[name])
            for name in (self.query_id, self.document_id)
        ]
        return Row(line, ids[0], query, (document,), (ids[1],))


class LineReader:
    """What readers of lines share: the place where they stand."""

    def __init__(self, path: str) -> None:
        self._lines = Lines(Source(path, INPUT))

    def mark(self) -> ResumePoint:
        """See :class:`Reader`."""
        return self._lines.mark()

    def skip_to(self, mark: ResumePoint) -> None:
        """See :class:`Reader`."""
        self._lines.skip_to(mark)

    @property
    def share(self) -> float | None:
        """See :class:`Reader`."""
        return self._lines.source.share

    def close(self) -> None:
        """See :class:`Reader`."""
        self._lines.source.close()


class JsonLinesReader(LineReader):
    """A query with its documents on each line; empty lines count for nothing."""

    def __iter__(self) -> Iterator[Entry]:
        for line in self._lines:
            if line is None or line.strip():
                yield (_json_row(self._lines.number, line),)


def _json_row(number: int, line: bytes | None) -> Row | BadRow:
    try:
        return row_of(number, parse_json(line))
    except BadValue as error:
        return BadRow(number, str(error))


def parse_json(line: bytes | None) -> Any:
    """A line of JSON.

    Raises:
        BadValue: it is none, with the reason.
    """
    if line is None:
        raise BadValue(TOO_LONG)
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise BadValue(
            f"the line is not UTF-8 (byte 0x{line[error.start]:02x} at {error.start})"
        ) from None
    except (ValueError, RecursionError) as error:
        reason = "too deep" if isinstance(error, RecursionError) else error
        raise BadValue(f"the line is not JSON ({reason})") from None


TOO_LONG = f"the line is longer than {ROW_BYTES // 2**20} MiB"


class TableReader(LineReader):
    """Pairs in CSV or TSV, with a line of names first.

    CSV may quote fields, also over several lines. In TSV a quote is a character like any other,
    as the collections of the field have it.

    Args:
        path: the file.
        columns: which columns are wanted.
        tabs: whether it is TSV.

    Raises:
        InvalidInput: a column is not there, or the file is empty.
    """

    def __init__(self, path: str, columns: Columns, *, tabs: bool) -> None:
        super().__init__(path)
        self._columns = columns
        csv.field_size_limit(ROW_BYTES)
        how: dict[str, Any] = {"delimiter": ",", "strict": True}
        if tabs:
            how = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
        self._rows = csv.reader(_Texts(self._lines), **how)
        try:
            self._names = self._header()
            columns.check(self._names)
        except InvalidInput:
            self.close()
            raise

    def __iter__(self) -> Iterator[Entry]:
        while True:
            line = self._lines.number + 1
            try:
                fields = next(self._rows)
                if fields:
                    yield (self._row(line, fields),)
            except StopIteration:
                return
            except (csv.Error, BadValue, _LongLine) as error:
                yield (BadRow(line, str(error)),)

    def _header(self) -> list[str]:
        try:
            return next(self._rows)
        except (StopIteration, csv.Error, _LongLine):
            raise InvalidInput(
                INPUT, "its first line holds no names of columns", "Add a line of names."
            ) from None

    def _row(self, line: int, fields: list[str]) -> Row:
        if len(fields) != len(self._names):
            raise BadValue(f"the row has {len(fields)} fields, the header {len(self._names)}")
        return self._columns.row(line, dict(zip(self._names, fields, strict=True)))


class _LongLine(Exception):
    """A line longer than a row may be."""


class _Texts:
    """Lines as text for the csv module; bytes that are no UTF-8 stay recognisable."""

    def __init__(self, lines: Lines) -> None:
        self._lines = lines

    def __iter__(self) -> _Texts:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        if line is None:
            raise _LongLine(TOO_LONG)
        return line.decode("utf-8", "surrogateescape")


class ParquetReader:
    """Pairs in Parquet; memory is that of the file's largest row group.

    Args:
        path: the file.
        columns: which columns are wanted.

    Raises:
        InvalidInput: it is no Parquet file, or a column is missing or no text.
        MissingDependency: pyarrow is not installed.
    """

    def __init__(self, path: str, columns: Columns) -> None:
        if path == STANDARD:
            raise InvalidInput(
                INPUT, "Parquet cannot be read from standard input", "Name a file, or pipe JSONL."
            )
        need("pyarrow", "Parquet")
        import pyarrow as pa
        from pyarrow import parquet

        self._path, self._columns = path, columns
        try:
            self._file = parquet.ParquetFile(path)
        except (OSError, pa.ArrowException) as error:
            raise unreadable(INPUT, path, error) from error
        try:
            _check_schema(self._file.schema_arrow, columns)
        except InvalidInput:
            self.close()
            raise
        self._position = 0
        self._hash = hashlib.sha256()

    def __iter__(self) -> Iterator[Entry]:
        for number, values in enumerate(self._values(), 1):
            if number > self._position:
                self._count(values)
                yield (self._row(values),)

    def _row(self, values: dict[str, bytes | None]) -> Row | BadRow:
        texts = {
            name: None if value is None else value.decode("utf-8", "surrogateescape")
            for name, value in values.items()
        }
        try:
            return self._columns.row(self._position, texts)
        except BadValue as error:
            return BadRow(self._position, str(error))

    def mark(self) -> ResumePoint:
        """See :class:`Reader`."""
        return ResumePoint(self._position, self._position, self._hash.hexdigest())

    def skip_to(self, mark: ResumePoint) -> None:
        """See :class:`Reader`."""
        for values in self._values():
            if self._position == mark.position:
                break
            self._count(values)
        if self.mark() != mark:
            raise changed(INPUT, self._path)

    @property
    def share(self) -> float | None:
        """See :class:`Reader`."""
        total = int(self._file.metadata.num_rows)
        return self._position / total if total else None

    def close(self) -> None:
        """See :class:`Reader`."""
        self._file.close()

    def _values(self) -> Iterator[dict[str, bytes | None]]:
        """Each row's wanted columns, as bytes: whether they are UTF-8 is asked row by row."""
        import pyarrow as pa

        names = [name for _, name in self._columns.named()]
        try:
            for batch in self._file.iter_batches(PARQUET_ROWS, columns=names):
                arrays = [_as_bytes(batch.column(name)) for name in names]
                for values in zip(*arrays, strict=True):
                    yield dict(zip(names, values, strict=True))
        except (OSError, pa.ArrowException) as error:
            raise unreadable(INPUT, self._path, error) from error

    def _count(self, values: dict[str, bytes | None]) -> None:
        self._position += 1
        for value in values.values():
            length = -1 if value is None else len(value)
            self._hash.update(length.to_bytes(8, "little", signed=True) + (value or b""))


def _check_schema(schema: Any, columns: Columns) -> None:
    columns.check(schema.names)
    for option, name in columns.named():
        kind = schema.field(name).type
        if not _is_text(kind):
            raise InvalidInput(option, f"the column {name!r} is {kind}", "Name one of text.")


def _is_text(kind: Any) -> bool:
    from pyarrow import types

    inner = kind.value_type if types.is_dictionary(kind) else kind
    return bool(types.is_string(inner) or types.is_large_string(inner))


def _as_bytes(array: Any) -> list[bytes | None]:
    import pyarrow as pa

    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    values: list[bytes | None] = array.cast(pa.large_binary()).to_pylist()
    return values


def complain_if_terminal(path: str) -> None:
    """Refuse to wait for someone to type a file.

    Raises:
        InvalidInput: the input is standard input, and that is a terminal.
    """
    if path == STANDARD and sys.stdin.isatty():
        raise InvalidInput(INPUT, "standard input is a terminal", "Pipe a file in, or name one.")
