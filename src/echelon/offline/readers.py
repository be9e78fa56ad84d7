"""Readers: JSONL, CSV and TSV to rows, one at a time, and the checks of a row's fields."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

from echelon.errors import InvalidInput
from echelon.offline.streams import INPUT, RECORD_BYTES, Lines, ResumePoint, too_long

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ROW_DOCUMENTS = 100_000
"""Maximum documents of a row: all are in memory when it is ranked."""

ID_CHARACTERS = 1024
"""Longest id. The id of a query is written with each of its results."""

ID_BITS = 64
"""Largest whole number as an id."""

VALUES = 2**20
"""Maximum values of a record, used or not. An empty one takes two bytes in the file and up to 200
in memory; a row of the most documents, each with id and text, has 300,000."""

TOO_MANY = f"the record has more than {VALUES:,} values"

FEW_VALUES_BYTES = 2**20
"""A line of fewer bytes is not worth counting its values."""

_JSON_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)

SHOWN_COLUMNS, SHOWN_CHARACTERS = 20, 500
"""Most names of columns, and characters of them, in a message."""

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
    if value is None:
        return None
    if isinstance(value, int) and not isinstance(value, bool):
        if value.bit_length() > ID_BITS:
            raise BadValue(f"{field} is a number of more than {ID_BITS} bits")
        return value
    if not isinstance(value, str):
        raise BadValue(f"{field} is {_kind(value)}, not a string or a whole number")
    if len(value) > ID_CHARACTERS:
        raise BadValue(f"{field} has {len(value):,} characters; {ID_CHARACTERS:,} are the most")
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
                shown = ", ".join(found[:SHOWN_COLUMNS])[:SHOWN_CHARACTERS] or "none"
                shown = shown.encode(errors="backslashreplace").decode()
                remedy = f"The file's columns are: {shown}."
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
            None if name is None else id_of(name, value[name])
            for name in (self.query_id, self.document_id)
        ]
        return Row(line, ids[0], query, (document,), (ids[1],))


class JsonLinesReader(Lines):
    """JSONL: a query with its documents on each line; empty lines are skipped."""

    def rows(self) -> Iterator[Entry]:
        """See :class:`Reader`."""
        for line in self.filled():
            try:
                yield (row_of(self.number, parse_json(line, self.limit)),)
            except BadValue as error:
                yield (BadRow(self.number, str(error)),)


def parse_json(line: bytes | None, limit: int) -> Any:
    """Parse a line of JSON; None is a line of more than ``limit`` bytes."""
    if line is None:
        raise BadValue(too_long("the line", limit))
    if len(line) > FEW_VALUES_BYTES:
        _check_values(line)
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError as error:
        at = error.start
        raise BadValue(f"the line is not UTF-8 (byte 0x{line[at]:02x} at {at})") from None
    except (ValueError, RecursionError) as error:
        reason = "too deep" if isinstance(error, RecursionError) else error
        raise BadValue(f"the line is not JSON ({reason})") from None


def _check_values(line: bytes) -> None:
    """Refuse JSON of too many values, each of which follows a comma or an opening bracket."""
    outside = _JSON_STRING.sub(b"", line)
    if sum(map(outside.count, (b",", b"[", b"{"))) > VALUES:
        raise BadValue(TOO_MANY)


class TableReader(Lines):
    """Pairs in CSV or TSV, whose first line names the columns.

    CSV may quote fields, also over several lines. In TSV a quote is a character like any other,
    as in the collections of the field. A row of TSV that is too long is passed over; a record of
    CSV ends the job, since its end is not known: a quote may never be closed.
    """

    def __init__(
        self, path: str, columns: Columns, *, tabs: bool, limit: int = RECORD_BYTES
    ) -> None:
        super().__init__(path, limit=limit)
        self._columns, self._tabs = columns, tabs
        self._began = self._bytes = self._values = 0
        csv.field_size_limit(limit)
        how: dict[str, Any] = {"delimiter": ",", "strict": True}
        if tabs:
            how = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
        self._rows = csv.reader(map(self._taken_line, self), **how)
        try:
            self._names = self._record()
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
            try:
                fields = self._record()
                if fields:
                    yield (self._row(self._began, fields),)
            except StopIteration:
                return
            except (csv.Error, BadValue) as error:
                yield (BadRow(self._began, str(error)),)

    def _record(self) -> list[str]:
        """The fields of the next record."""
        self._began = self.number + 1
        self._bytes = self._values = 0
        return next(self._rows)

    def _row(self, line: int, fields: list[str]) -> Row:
        if len(fields) != len(self._names):
            raise BadValue(f"the row has {len(fields)} fields, the header {len(self._names)}")
        return self._columns.row(line, dict(zip(self._names, fields, strict=True)))

    def _taken_line(self, line: bytes | None) -> str:
        """The next line of a record for the csv module, within the record's limits.

        Bytes that are not UTF-8 become lone surrogates.
        """
        if line is not None:
            self._bytes += len(line)
            self._values += line.count(b"\t" if self._tabs else b",")
            if self._bytes <= self.limit and self._values <= VALUES:
                return line.decode("utf-8", "surrogateescape")
        problem = too_long("the record", self.limit)
        if self._values > VALUES:
            problem = TOO_MANY
        if self._tabs:
            raise BadValue(problem)
        raise InvalidInput(f"{self.path}:{self._began}", problem, "See whether its quotes close.")
