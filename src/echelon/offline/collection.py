"""TREC runs to rows: run files, and the texts of topics and collection by id.

The texts are in an SQLite index beside the output, so memory stays constant. The index is made
again when the topics or the collection change.
"""

from __future__ import annotations

import json
import math
import sqlite3
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echelon.errors import StorageError
from echelon.offline.readers import (
    ROW_DOCUMENTS,
    TOO_LONG,
    BadRow,
    BadValue,
    Row,
    check_unicode,
    id_of,
    parse_json,
    text_of,
)
from echelon.offline.streams import ROW_BYTES, Lines, digest_of, suffix_of, sync_to_disk, unreadable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from echelon.offline.readers import Entry
    from echelon.offline.streams import ResumePoint
    from echelon.progress import Progress

TABLES = """
create table fingerprints (content text);
create table topics (id text primary key, text text, first_line integer) without rowid;
create table documents (id text primary key, text text);
create table problems (file text, line integer, reason text);
"""

TEXT_KEYS = {"topics": ("query", "text"), "collection": ("text", "contents")}
"""Names under which JSONL holds the text; the first that is there counts."""

LINES_PER_REPORT = 1000


def fingerprints(files: dict[str, str], index: Path) -> dict[str, Any]:
    """Size, time and SHA-256 of files; one whose size and time are indexed is not read."""
    known = _indexed(index)
    found = {}
    for name, path in files.items():
        try:
            status = Path(path).stat()
        except OSError as error:
            raise unreadable(f"--{name}", path, error) from error
        seen = {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns}
        before = known.get(name)
        if isinstance(before, dict) and seen.items() <= before.items():
            found[name] = before
        else:
            found[name] = {**seen, "sha256": digest_of(f"--{name}", path)}
    return found


def _indexed(index: Path) -> dict[str, Any]:
    """The fingerprints of the indexed files; empty if there is no index."""
    if not index.is_file():
        return {}
    try:
        with closing(sqlite3.connect(index)) as base:
            (content,) = base.execute("select content from fingerprints").fetchone()
        found: dict[str, Any] = json.loads(content)
    except (sqlite3.Error, TypeError, ValueError):
        return {}
    return found


class Collection:
    """Texts of topics and documents by id; the index is made if it is not that of the files."""

    def __init__(
        self, files: dict[str, str], prints: dict[str, Any], index: Path, on_progress: Progress
    ) -> None:
        self._index = index
        digests = [entry["sha256"] for entry in prints.values()]
        if [entry.get("sha256") for entry in _indexed(index).values()] != digests:
            with _storage_errors(index):
                _build(files, prints, index, on_progress)
        self._base = sqlite3.connect(index)

    def topic(self, name: str, line: int) -> tuple[str | None, int]:
        """A query's text, or None, and the first line of the run that names the query."""
        find = "select text, first_line from topics where id = ?"
        text, first = self._base.execute(find, (name,)).fetchone() or (None, line)
        if first is None or first > line:
            with _storage_errors(self._index):
                self._base.execute("update topics set first_line = ? where id = ?", (line, name))
            first = line
        return text, first

    def document(self, name: str) -> str | None:
        """A document's text, or None."""
        row = self._base.execute("select text from documents where id = ?", (name,)).fetchone()
        return None if row is None else str(row[0])

    def problems(self) -> Iterator[BadRow]:
        """Lines of the two files that cannot be used."""
        found = self._base.execute("select line, reason, file from problems")
        return (BadRow(*row) for row in found)

    def commit(self) -> None:
        """Write the first lines of queries to disk."""
        with _storage_errors(self._index):
            self._base.commit()

    def close(self) -> None:
        """Close the index."""
        self._base.close()


@contextmanager
def _storage_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        raise StorageError(
            f"{path}: the index of the collection cannot be written ({error}). "
            "Free disk space and run the same command again: it resumes."
        ) from error


def _build(
    files: dict[str, str], prints: dict[str, Any], index: Path, on_progress: Progress
) -> None:
    """Write the index beside its place, then move it there."""
    building = index.with_name(f"{index.name}.building")
    building.unlink(missing_ok=True)
    with closing(sqlite3.connect(building)) as base:
        base.execute("pragma journal_mode = off")
        base.execute("pragma synchronous = off")
        base.executescript(TABLES)
        base.execute("begin")
        for name, path in files.items():
            with closing(Lines(path, f"--{name}")) as lines:
                _fill(base, name, lines, on_progress)
        base.execute("insert into fingerprints values (?)", (json.dumps(prints),))
        base.commit()
    sync_to_disk(building)
    building.replace(index)


def _fill(base: sqlite3.Connection, name: str, lines: Lines, on_progress: Progress) -> None:
    table = "topics" if name == "topics" else "documents"
    insert = f"insert or ignore into {table} (id, text) values (?, ?)"  # noqa: S608 - our own names
    for line in lines.filled():
        try:
            entry = _entry(line, name, suffix_of(lines.path))
            taken = base.execute(insert, entry).rowcount
            problem = "" if taken else f"the id {entry[0]!r} is there a second time"
        except BadValue as error:
            problem = str(error)
        if problem:
            bad = (lines.path, lines.number, problem)
            base.execute("insert into problems values (?, ?, ?)", bad)
        if lines.number % LINES_PER_REPORT == 0:
            share = lines.share
            on_progress(f"Indexing {name}", share or 0.0, 0.0 if share is None else 1.0)


def _entry(line: bytes | None, name: str, suffix: str) -> tuple[str, str]:
    """(id, text) of a line of TSV or JSONL; a title stands before its text."""
    if suffix in {".jsonl", ".ndjson", ".json"}:
        record = parse_json(line)
        if not isinstance(record, dict):
            raise BadValue("the line is not an object")
        key = id_of("id", record.get("id", record.get("_id")))
        if key is None:
            raise BadValue("id is missing")
        names = TEXT_KEYS[name]
        text = text_of(names[0], next((record[n] for n in names if n in record), None))
        title = record.get("title") if name == "collection" else None
        return str(key), f"{text_of('title', title)} {text}".strip() if title else text
    if line is None:
        raise BadValue("the line is too long")
    plain = line.rstrip(b"\r\n").decode("utf-8", "surrogateescape")
    check_unicode("the line", plain)
    key, tab, text = plain.partition("\t")
    if not tab or not key:
        raise BadValue("the line is not an id, a tab and a text")
    return key, text


FIELDS = 6


class RunFile(Lines):
    """The queries of a run file, whose documents keep the order of their lines.

    The lines of a query must stand together: a query that occurs a second time is refused, because
    its documents cannot be ranked together with the first ones.
    """

    def __init__(self, path: str, collection: Collection) -> None:
        super().__init__(path)
        self._collection = collection

    def rows(self) -> Iterator[Entry]:
        """See :class:`~echelon.offline.readers.Reader`."""
        for line in self.filled():
            try:
                query, document = _parse(line)
            except BadValue as error:
                yield (BadRow(self.number, str(error)),)
            else:
                yield self._query(query, document)

    def problems(self) -> Iterator[BadRow]:
        """Lines of topics and collection that cannot be used."""
        return self._collection.problems()

    def resume_point(self) -> ResumePoint:
        """See :class:`~echelon.offline.readers.Reader`."""
        self._collection.commit()
        return super().resume_point()

    def close(self) -> None:
        """See :class:`~echelon.offline.readers.Reader`."""
        super().close()
        self._collection.close()

    def _query(self, query: str, document: str) -> Entry:
        """Read the other lines of a query whose first line was read."""
        first = self.number
        group = _QueryLines(self._collection)
        group.add(first, document)
        for line in self.filled():
            try:
                other, document = _parse(line)
            except BadValue as error:
                group.refuse(self.number, str(error))
            else:
                if other != query:
                    self.put_back()
                    break
                group.add(self.number, document)
            if group.lines >= ROW_DOCUMENTS:
                break
        text, before = self._collection.topic(query, first)
        if text is None:
            return group.refused(first, f"the query {query!r} is not among the topics")
        if before != first:
            reason = f"the query {query!r} began at line {before} and has ended; put its lines"
            return group.refused(first, f"{reason} together, {ROW_DOCUMENTS:,} at most")
        return group.row(first, query, text)


class _QueryLines:
    """The lines of one query: their documents, and the bad ones."""

    def __init__(self, collection: Collection) -> None:
        self._collection = collection
        self._texts: dict[str, str] = {}
        self._characters = 0
        self._bad: list[BadRow] = []
        self.lines = 0

    def add(self, line: int, document: str) -> None:
        text = self._collection.document(document)
        if document in self._texts:
            self.refuse(line, f"the document {document!r} is there a second time")
        elif text is None:
            self.refuse(line, f"the document {document!r} is not in the collection")
        elif self._characters + len(text) > ROW_BYTES:
            self.refuse(line, "the query's documents are too long together")
        else:
            self._texts[document] = text
            self._characters += len(text)
            self.lines += 1

    def refuse(self, line: int, reason: str) -> None:
        self._bad.append(BadRow(line, reason))
        self.lines += 1

    def row(self, line: int, query: str, text: str) -> Entry:
        row = Row(line, query, text, tuple(self._texts.values()), tuple(self._texts))
        return (row, *self._bad) if self._texts else tuple(self._bad)

    def refused(self, line: int, reason: str) -> Entry:
        many = f" ({self.lines} lines)" if self.lines > 1 else ""
        return (BadRow(line, reason + many), *self._bad)


def _parse(line: bytes | None) -> tuple[str, str]:
    """Query and document of a run's line; BadValue if it is not one."""
    if line is None:
        raise BadValue(TOO_LONG)
    fields = line.split()
    if len(fields) != FIELDS:
        raise BadValue(f"the line has {len(fields)} fields, not 'query Q0 document rank score tag'")
    try:
        query, document, rank, score = (fields[i].decode() for i in (0, 2, 3, 4))
    except UnicodeDecodeError:
        raise BadValue("the line is not UTF-8") from None
    try:
        int(rank)
        usable = math.isfinite(float(score))
    except ValueError:
        usable = False
    if not usable:
        raise BadValue(f"rank {rank!r} and score {score!r} are not both numbers")
    return query, document
