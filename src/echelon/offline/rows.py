"""Rows, bad rows and windows as plain data, and the checks of a row's fields.

A row is one query with its documents; a pair is a row with one document. No file is opened here.
The checks raise :class:`BadValue`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

ROW_BYTES = 64 * 2**20
"""Longest row. A row must be in memory to be ranked, so this bounds the memory."""

ROW_DOCUMENTS = 100_000
"""Maximum documents of a row, for the same reason."""

Id = str | int | None


@dataclass(frozen=True, slots=True)
class Row:
    """One query with its documents.

    Attributes:
        line: line at which it begins in its file, from 1; in Parquet the number of the row.
        id: the query's id.
        document_ids: one for each document; None if a document has none.
    """

    line: int
    id: Id
    query: str
    documents: tuple[str, ...]
    document_ids: tuple[Id, ...]


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row, or a part of one, that cannot be scored, with the reason.

    Attributes:
        file: the file that holds it, if that is not the input but a run's topics or collection.
    """

    line: int
    reason: str
    file: str = ""


@dataclass(frozen=True, slots=True)
class ResumePoint:
    """A place between two rows, and the digest of what comes before it.

    Attributes:
        position: decompressed bytes read; in Parquet rows.
        line: lines read.
        digest: SHA-256 over what was read.
    """

    position: int
    line: int
    digest: str


@dataclass(frozen=True, slots=True)
class RowWindow:
    """Rows that are scored together.

    Attributes:
        end: the place behind its last row.
        tokens: estimated tokens of each pair, row after row.
        share: share of the input read so far, 0 to 1; None where it is not known.
    """

    rows: tuple[Row, ...]
    bad: tuple[BadRow, ...]
    end: ResumePoint
    tokens: tuple[int, ...]
    share: float | None = None


class BadValue(Exception):
    """A value makes its row unusable; the text says why."""


def text_of(field: str, value: Any) -> str:
    """Return a field that must be encodable text."""
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
