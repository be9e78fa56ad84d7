"""Readers: JSONL, CSV, TSV and Parquet to rows, one at a time, and the checks of a row's fields."""

from __future__ import annotations

import csv
import hashlib
import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

from echelon.errors import InvalidInput
from echelon.offline.streams import (
    INPUT,
    ROW_BYTES,
    STANDARD,
    Lines,
    ResumePoint,
    changed,
    unreadable,
)
from echelon.options import require_packages

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

PARQUET_ROWS = 1024
"""Rows of a Parquet file decoded at a time."""

TOO_LONG = f"the line is longer than {ROW_BYTES // 2**20} MiB"

ROW_DOCUMENTS = 100_000
"""Maximum documents of a row, for the same reason."""

Id = str | int | None


@dataclass(frozen=True, slots=True)
class Row:
    """One query with its documents."""

    line: int  # line at which it begins in its file, from 1; in Parquet the number of the row
    id: Id
    query: str
    documents: tuple[str, ...]
    document_ids: tuple[Id, ...]  # one for each document; None if a document has none


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row, or a part of one, that cannot be scored, with the reason."""

    line: int
    reason: str
    file: str = ""  # the file that holds it, if that is a run's topics or collection


Entry = tuple[Row | BadRow, ...]
"""Rows that are read together: a resume point never lies between them."""


class BadValue(Exception):
    """A value makes its row unusable; the text says why."""


def text_of(field: str, value: Any) -> str:
    """Return a field that must be encodable text, or raise :class:`BadValue`."""
    if value is None:
        raise BadValue(f"{field} is missing")
    if not isinstance(value, str):
        raise BadValue(f"{field} is {_kind(value)}, not a string")
    if not value.isascii():
        check_unicode(field, value)
    return value


def check_unicode(field: str, text: str) -> None:
    """Refuse text that came from bytes that are not UTF-8, or holds half a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        strange = ord(text[error.start])
        if 0xDC80 <= strange <= 0xDCFF:  # noqa: PLR2004 - where Python keeps undecodable bytes
            raise BadValue(f"{field} is not UTF-8 (byte 0x{strange - 0xDC00:02x})") from None
        raise BadValue(f"{field} holds half a surrogate pair, which is no text") from None


def id_of(field: str, value: Any) -> Id:
    """Return an id: text, a whole number, or None."""
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    if not isinstance(value, str):
        raise BadValue(f"{field} is {_kind(value)}, not a string or a whole number")
    return text_of(field, value)


def row_of(line: int, record: Any) -> Row:
    """Make a row of ``{"id": …, "query": …, "documents": [text or {"id": …, "text": …}]}``."""
    if not isinstance(record, dict):
        raise BadValue(f"the line is {_kind(record)}, not an object")
    query = text_of("query", record.get("query"))
    listed = record.get("documents")
    if listed is None:
        raise BadValue("documents is missing")
    if not isinstance(listed, list):
        raise BadValue(f"documents is {_kind(listed)}, not a list")
    if len(listed) > ROW_DOCUMENTS:
        raise BadValue(f"documents has {len(listed):,} entries; {ROW_DOCUMENTS:,} are the most")
    texts, ids = [], []
    for index, entry in enumerate(listed):
        field = f"documents[{index}]"
        if isinstance(entry, dict):
            texts.append(text_of(f"{field}.text", entry.get("text")))
            ids.append(id_of(f"{field}.id", entry.get("id")))
        else:
            texts.append(text_of(field, entry))
            ids.append(None)
    return Row(line, id_of("id", record.get("id")), query, tuple(texts), tuple(ids))


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", bool: "a truth value", str: "a string"}
    return names.get(type(value), "null" if value is None else "a number")


class Reader(Protocol):
    """Rows of a file, good and bad, in its order."""

    def rows(self) -> Iterator[Entry]:
        """The rows that were not read yet."""

    def resume_point(self) -> ResumePoint:
        """The place behind the row that was read last."""

    def skip_to(self, point: ResumePoint) -> None:
        """Go to a place that an earlier run reached; refuse a file that differs before it."""

    @property
    def share(self) -> float | None:
        """Share of the file read so far, 0 to 1; None where it is not known."""

    def close(self) -> None:
        """Close the file."""


@dataclass(frozen=True, slots=True)
class Columns:
    """Names of the columns of a file of pairs."""

    query: str = "query"
    document: str = "document"
    query_id: str | None = None
    document_id: str | None = None

    def check(self, found: Sequence[str]) -> None:
        """Refuse a file that lacks one of the columns, or has it twice."""
        for option, name in self.named():
            if name not in found:
                remedy = f"The file's columns are: {', '.join(found) or 'none'}."
                raise InvalidInput(option, f"there is no column {name!r}", remedy)
            if list(found).count(name) > 1:
                raise InvalidInput(option, f"the column {name!r} is there twice", "Rename one.")

    def named(self) -> list[tuple[str, str]]:
        """(option, column) of the columns that are read."""
        given = {name: column for name, column in asdict(self).items() if column is not None}
        return [(f"--{name.replace('_', '-')}-column", column) for name, column in given.items()]

    def row(self, line: int, value: dict[str, Any]) -> Row:
        """A row out of its columns' values."""
        query, document = (text_of(name, value[name]) for name in (self.query, self.document))
        ids = [
            None if name is None or value[name] is None else text_of(name, value[name])
            for name in (self.query_id, self.document_id)
        ]
        return Row(line, ids[0], query, (document,), (ids[1],))


class JsonLinesReader(Lines):
    """JSONL: a query with its documents on each line; empty lines are skipped."""

    def rows(self) -> Iterator[Entry]:
        """See :class:`Reader`."""
        for line in self.filled():
            try:
                yield (row_of(self.number, parse_json(line)),)
            except BadValue as error:
                yield (BadRow(self.number, str(error)),)


def parse_json(line: bytes | None) -> Any:
    """Parse a line of JSON; None is a line that was too long."""
    if line is None:
        raise BadValue(TOO_LONG)
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError as error:
        at = error.start
        raise BadValue(f"the line is not UTF-8 (byte 0x{line[at]:02x} at {at})") from None
    except (ValueError, RecursionError) as error:
        reason = "too deep" if isinstance(error, RecursionError) else error
        raise BadValue(f"the line is not JSON ({reason})") from None


class TableReader(Lines):
    """Pairs in CSV or TSV, whose first line names the columns.

    CSV may quote fields, also over several lines. In TSV a quote is a character like any other,
    as in the collections of the field.
    """

    def __init__(self, path: str, columns: Columns, *, tabs: bool) -> None:
        super().__init__(path)
        self._columns = columns
        csv.field_size_limit(ROW_BYTES)
        how: dict[str, Any] = {"delimiter": ",", "strict": True}
        if tabs:
            how = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
        self._rows = csv.reader(map(_as_text, self), **how)
        try:
            self._names = next(self._rows)
            columns.check(self._names)
        except (StopIteration, csv.Error, BadValue):
            self.close()
            problem = "its first line holds no names of columns"
            raise InvalidInput(INPUT, problem, "Add a line of names.") from None
        except InvalidInput:
            self.close()
            raise

    def rows(self) -> Iterator[Entry]:
        """See :class:`Reader`."""
        while True:
            line = self.number + 1
            try:
                fields = next(self._rows)
                if fields:
                    yield (self._row(line, fields),)
            except StopIteration:
                return
            except (csv.Error, BadValue) as error:
                yield (BadRow(line, str(error)),)

    def _row(self, line: int, fields: list[str]) -> Row:
        if len(fields) != len(self._names):
            raise BadValue(f"the row has {len(fields)} fields, the header {len(self._names)}")
        return self._columns.row(line, dict(zip(self._names, fields, strict=True)))


def _as_text(line: bytes | None) -> str:
    """A line for the csv module; bytes that are not UTF-8 become lone surrogates."""
    if line is None:
        raise BadValue(TOO_LONG)
    return line.decode("utf-8", "surrogateescape")


class ParquetReader:
    """Pairs in Parquet; the largest row group of the file must fit in memory."""

    def __init__(self, path: str, columns: Columns) -> None:
        if path == STANDARD:
            problem = "Parquet cannot be read from standard input"
            raise InvalidInput(INPUT, problem, "Name a file, or pipe JSONL.")
        require_packages("Parquet", "files", ["pyarrow"])
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

    def rows(self) -> Iterator[Entry]:
        """See :class:`Reader`."""
        for number, values in enumerate(self._values(), 1):
            if number > self._position:
                self._count(values)
                texts = {
                    name: None if value is None else value.decode("utf-8", "surrogateescape")
                    for name, value in values.items()
                }
                try:
                    yield (self._columns.row(number, texts),)
                except BadValue as error:
                    yield (BadRow(number, str(error)),)

    def resume_point(self) -> ResumePoint:
        """See :class:`Reader`."""
        return ResumePoint(self._position, self._position, self._hash.hexdigest())

    def skip_to(self, point: ResumePoint) -> None:
        """See :class:`Reader`."""
        for values in self._values():
            if self._position == point.position:
                break
            self._count(values)
        if self.resume_point() != point:
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
        """Columns of each row as bytes, so that each row is checked for UTF-8 by itself."""
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
