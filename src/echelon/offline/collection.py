"""TREC runs to rows: run files, and the texts of topics and collection by id.

The texts are in an SQLite index beside the output, so memory stays constant. The index is never
changed; a later run uses it if it is, by its digest, the one that the job made.
"""

from __future__ import annotations

import math
import sqlite3
from contextlib import closing, contextmanager, suppress
from typing import TYPE_CHECKING

from echelon.errors import StorageError
from echelon.offline.readers import (
    ID_CHARACTERS,
    ROW_DOCUMENTS,
    BadRow,
    BadValue,
    Row,
    check_unicode,
    id_of,
    parse_json,
    text_of,
)
from echelon.offline.streams import (
    Lines,
    digest_of,
    replacement,
    suffix_of,
    too_long,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from echelon.offline.readers import Entry
    from echelon.offline.streams import ResumePoint
    from echelon.progress import Progress

TABLES = """
create table topics (id text primary key, text text) without rowid;
create table documents (id text primary key, text text);
create table problems (file text, line integer, reason text);
"""

FIRST_LINES = """
pragma journal_mode = off;
create table first_lines (query text primary key, line integer) without rowid;
"""

TEXT_KEYS = {"topics": ("query", "text"), "collection": ("text", "contents")}
"""Names under which JSONL holds the text; the first that is there counts."""

LINES_PER_REPORT = 1000

PROBLEMS_READ = 10_000
"""Bad lines of topics and collection that are in memory at a time."""


class Collection:
    """Texts of topics and documents by id.

    Args:
        files: paths of ``topics`` and ``collection``.
        index: where the index is, or will be made.
        known: ``digest`` of an index of the same files; another index is replaced. None makes one.
        on_progress: the callback while the index is made.
        limit: bytes of a line.
    """

    def __init__(
        self,
        files: dict[str, str],
        index: Path,
        known: str | None,
        on_progress: Progress,
        limit: int,
    ) -> None:
        if known is None or not index.is_file() or digest_of("-o", index) != known:
            with _storage_errors(f"{index}, the index of the collection,"):
                _build(files, index, on_progress, limit)
            known = digest_of("-o", index)
        self.digest, self.limit = known, limit
        self._base = sqlite3.connect(f"{index.absolute().as_uri()}?mode=ro&immutable=1", uri=True)

    def topic(self, name: str) -> str | None:
        """A query's text, or None."""
        return self._text("select text from topics where id = ?", name)

    def document(self, name: str) -> str | None:
        """A document's text, or None."""
        return self._text("select text from documents where id = ?", name)

    def problems(self) -> Iterator[list[BadRow]]:
        """Lines of the two files that cannot be used, some at a time."""
        found = self._base.execute("select line, reason, file from problems order by rowid")
        while some := found.fetchmany(PROBLEMS_READ):
            yield [BadRow(*row) for row in some]

    def close(self) -> None:
        """Close the index."""
        self._base.close()

    def _text(self, find: str, name: str) -> str | None:
        row = self._base.execute(find, (name,)).fetchone()
        return None if row is None else str(row[0])


@contextmanager
def _storage_errors(what: str) -> Iterator[None]:
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        raise StorageError(
            f"{what} cannot be written ({error}). "
            "Free disk space and run the same command again: it resumes."
        ) from error


def _build(files: dict[str, str], index: Path, on_progress: Progress, limit: int) -> None:
    with replacement(index, "building") as building, closing(sqlite3.connect(building)) as base:
        base.execute("pragma journal_mode = off")
        base.execute("pragma synchronous = off")
        base.executescript(TABLES)
        base.execute("begin")
        for name, path in files.items():
            with closing(Lines(path, f"--{name}", limit)) as lines:
                _fill(base, name, lines, on_progress)
        base.commit()


def _fill(base: sqlite3.Connection, name: str, lines: Lines, on_progress: Progress) -> None:
    table = "topics" if name == "topics" else "documents"
    insert = f"insert or ignore into {table} (id, text) values (?, ?)"  # noqa: S608 - our own names
    for line in lines.filled():
        try:
            entry = _entry(line, name, lines)
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


def _entry(line: bytes | None, name: str, lines: Lines) -> tuple[str, str]:
    """(id, text) of a line of TSV or JSONL; a title stands before its text."""
    if suffix_of(lines.path) in {".jsonl", ".ndjson", ".json"}:
        record = parse_json(line, lines.limit)
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
        raise BadValue(too_long("the line", lines.limit))
    plain = line.rstrip(b"\r\n").decode("utf-8", "surrogateescape")
    check_unicode("the line", plain)
    key, tab, text = plain.partition("\t")
    if not tab or not key:
        raise BadValue("the line is not an id, a tab and a text")
    id_of("id", key)
    return key, text


FIELDS = 6


class RunFile(Lines):
    """The queries of a run file, whose documents keep the order of their lines.

    The lines of a query must stand together: a query that occurs a second time is refused, because
    its documents cannot be ranked together with the first ones.
    """

    def __init__(self, path: str, collection: Collection) -> None:
        super().__init__(path, limit=collection.limit)
        self.collection = collection
        # Without a name it is a private file, which SQLite removes itself.
        self._first_lines = sqlite3.connect("", isolation_level=None)
        self._first_lines.executescript(FIRST_LINES)

    def rows(self) -> Iterator[Entry]:
        """See :class:`~echelon.offline.readers.Reader`."""
        for line in self.filled():
            try:
                query, document = _parse(line, self.limit)
            except BadValue as error:
                yield (BadRow(self.number, str(error)),)
            else:
                yield self._query(query, document)

    def skip_to(self, point: ResumePoint) -> None:
        """See :class:`~echelon.offline.readers.Reader`."""
        before = None
        while self.number < point.line and (line := next(self, b"")) != b"":
            with suppress(BadValue):
                query, _ = _parse(line, self.limit)
                if query != before:
                    self._first_line(query, self.number)
                before = query
        self._count_taken()
        super().skip_to(point)

    def close(self) -> None:
        """See :class:`~echelon.offline.readers.Reader`."""
        super().close()
        self._first_lines.close()
        self.collection.close()

    def _first_line(self, query: str, line: int) -> int:
        """The first line of the run that names a query, of which this is one."""
        with _storage_errors("A temporary file"):
            base = self._first_lines
            base.execute("insert or ignore into first_lines values (?, ?)", (query, line))
            found = base.execute("select line from first_lines where query = ?", (query,))
        return int(found.fetchone()[0])

    def _query(self, query: str, document: str) -> Entry:
        """Read the other lines of a query whose first line was read."""
        first = self.number
        group = _QueryLines(self.collection)
        group.add(first, document)
        for line in self.filled():
            try:
                other, document = _parse(line, self.limit)
            except BadValue as error:
                group.refuse(self.number, str(error))
            else:
                if other != query:
                    self.put_back()
                    break
                group.add(self.number, document)
            if group.lines >= ROW_DOCUMENTS:
                break
        text, before = self.collection.topic(query), self._first_line(query, first)
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
        elif self._characters + len(text) > self._collection.limit:
            self.refuse(line, too_long("the query with this document", self._collection.limit))
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


def _parse(line: bytes | None, limit: int) -> tuple[str, str]:
    """Query and document of a run's line; BadValue if it is not one."""
    if line is None:
        raise BadValue(too_long("the line", limit))
    fields = line.split()
    if len(fields) != FIELDS:
        raise BadValue(f"the line has {len(fields)} fields, not 'query Q0 document rank score tag'")
    if max(map(len, fields)) > ID_CHARACTERS:
        raise BadValue(f"a field has more than {ID_CHARACTERS:,} bytes")
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
