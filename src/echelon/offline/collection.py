"""Topics and collection of an IR run, on disk: texts by their ids in constant memory.

SQLite, out of the standard library. The index is made once, beside the output, and is made again
when one of its files is no longer the same.

TREC run files: ``query Q0 document rank score tag``, with texts out of a library.
"""

from __future__ import annotations

import json
import math
import os
import sqlite3
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from echelon.errors import StorageError
from echelon.offline.readers import TOO_LONG, LineReader, parse_json
from echelon.offline.rows import (
    ROW_BYTES,
    ROW_DOCUMENTS,
    BadRow,
    BadValue,
    ResumePoint,
    Row,
    check_unicode,
    id_of,
    text_of,
)
from echelon.offline.streams import Lines, Source, digest_of, suffix_of, unreadable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from echelon.offline.readers import Entry

TABLES = """
create table facts (content text);
create table topics (id text primary key, text text, first_line integer) without rowid;
create table documents (id text primary key, text text);
create table problems (file text, line integer, reason text);
"""

TEXT_KEYS = {"topics": ("query", "text"), "collection": ("text", "contents")}
"""Names under which JSONL holds the text; the first that is there counts."""

TEXTS_AT_ONCE = 1000


@dataclass(frozen=True, slots=True)
class TextStore:
    """The files a library is made from."""

    topics: str
    collection: str

    def files(self) -> dict[str, str]:
        """What each is called → its path."""
        return {"topics": self.topics, "collection": self.collection}


def facts_of(shelf: TextStore, index: Path) -> dict[str, Any]:
    """Size, time and SHA-256 of each file.

    A file whose size and time the index knows is taken to be what it was; others are read.

    Raises:
        InvalidInput: one cannot be read.
    """
    known = _known_facts(index)
    return {name: _facts(name, path, known.get(name)) for name, path in shelf.files().items()}


def _facts(name: str, path: str, known: Any) -> dict[str, Any]:
    try:
        with Path(path).open("rb") as file:
            status = os.fstat(file.fileno())
            facts = {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns}
            if isinstance(known, dict) and facts.items() <= known.items():
                return known
            return {**facts, "sha256": digest_of(file)}
    except OSError as error:
        raise unreadable(f"--{name}", path, error) from error


def _known_facts(index: Path) -> dict[str, Any]:
    if not index.is_file():
        return {}
    try:
        with closing(sqlite3.connect(index)) as base:
            found: dict[str, Any] = json.loads(
                base.execute("select content from facts").fetchone()[0]
            )
            return found
    except (sqlite3.Error, TypeError, ValueError):
        return {}


class Collection:
    """Texts by id.

    Args:
        shelf: the files.
        facts: what :func:`facts_of` said of them.
        index: where the index is, or goes.
        told: called with what is being done and how much of it, 0 to 1.

    Raises:
        InvalidInput: a file cannot be read.
        StorageError: the index cannot be written.
    """

    def __init__(
        self,
        shelf: TextStore,
        facts: dict[str, Any],
        index: Path,
        told: Callable[[str, float | None], None] = lambda *_: None,
    ) -> None:
        self._index = index
        digests = [entry["sha256"] for entry in facts.values()]
        known = _known_facts(index)
        if [entry.get("sha256") for entry in known.values()] != digests:
            with stored(index):
                _build(shelf, facts, index, told)
        self._base = sqlite3.connect(index)

    def topic(self, name: str, line: int) -> tuple[str | None, int]:
        """A query's text, and the line at which it stood first; that is ``line`` if it is new.

        The text is None where there is no such topic.
        """
        row = self._base.execute(
            "select text, first_line from topics where id = ?", (name,)
        ).fetchone()
        if row is None:
            return None, line
        text, first = row
        if first is None or first > line:
            with stored(self._index):
                self._base.execute("update topics set first_line = ? where id = ?", (line, name))
            first = line
        return text, first

    def document(self, name: str) -> str | None:
        """A document's text; None where there is no such document."""
        row = self._base.execute("select text from documents where id = ?", (name,)).fetchone()
        return None if row is None else str(row[0])

    def problems(self) -> Iterator[BadRow]:
        """Lines of the files that could not be used."""
        for file, line, reason in self._base.execute("select file, line, reason from problems"):
            yield BadRow(line, reason, file)

    def commit(self) -> None:
        """Keep where queries stood."""
        with stored(self._index):
            self._base.commit()

    def close(self) -> None:
        """Close the index."""
        self._base.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


@contextmanager
def stored(path: Path) -> Iterator[None]:
    """Turn SQLite's errors into ours.

    Raises:
        StorageError: the index cannot be written.
    """
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        raise StorageError(
            f"{path}: the index of the collection cannot be written ({error}). "
            "Free disk space; the same command goes on."
        ) from error


def _build(
    shelf: TextStore, facts: dict[str, Any], index: Path, told: Callable[[str, float | None], None]
) -> None:
    """Write the index beside its place, then put it there."""
    building = index.with_name(f"{index.name}.building")
    building.unlink(missing_ok=True)
    with closing(sqlite3.connect(building)) as base:
        base.execute("pragma journal_mode = off")
        base.execute("pragma synchronous = off")
        base.executescript(TABLES)
        base.execute("begin")
        for name, path in shelf.files().items():
            with Source(path, f"--{name}") as source:
                _fill(base, name, source, told)
        base.execute("insert into facts values (?)", (json.dumps(facts),))
        base.commit()
    with building.open("rb") as file:
        os.fsync(file.fileno())
    building.replace(index)


def _fill(
    base: sqlite3.Connection, name: str, source: Source, told: Callable[[str, float | None], None]
) -> None:
    table = "topics" if name == "topics" else "documents"
    insert = f"insert or ignore into {table} (id, text) values (?, ?)"  # noqa: S608 - our own names
    lines = Lines(source)
    for line in lines:
        if line is not None and not line.strip():
            continue
        try:
            entry = _entry(line, name, suffix_of(source.path))
            taken = base.execute(insert, entry).rowcount
            problem = "" if taken else f"the id {entry[0]!r} is there a second time"
        except BadValue as error:
            problem = str(error)
        if problem:
            bad = (source.path, lines.number, problem)
            base.execute("insert into problems values (?, ?, ?)", bad)
        if lines.number % TEXTS_AT_ONCE == 0:
            told(f"Indexing {name}", source.share)


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


class RunFile(LineReader):
    """The queries of a run; the lines of one stand together.

    Documents keep the order of their lines. A query that comes up a second time is refused, since
    its documents could not be ranked with the first ones.

    Args:
        path: the run file.
        library: where the texts are.
    """

    def __init__(self, path: str, library: Collection) -> None:
        super().__init__(path)
        self._library = library

    def __iter__(self) -> Iterator[Entry]:
        for line in self._lines:
            if line is None or line.strip():
                try:
                    query, document = _parse(line)
                except BadValue as error:
                    yield (BadRow(self._lines.number, str(error)),)
                else:
                    yield self._query(query, document)

    def problems(self) -> Iterator[BadRow]:
        """Lines of the run's other files that could not be used."""
        return self._library.problems()

    def mark(self) -> ResumePoint:
        """See :class:`~echelon.offline.readers.Reader`."""
        self._library.commit()
        return super().mark()

    def close(self) -> None:
        """See :class:`~echelon.offline.readers.Reader`."""
        super().close()
        self._library.close()

    def _query(self, query: str, document: str) -> Entry:
        """All lines of one query, of which the first was read."""
        first = self._lines.number
        group = _Group(self._library)
        group.add(first, document)
        while group.lines < ROW_DOCUMENTS and (line := next(self._lines, b"")) != b"":
            if line is not None and not line.strip():
                continue
            try:
                other, document = _parse(line)
            except BadValue as error:
                group.refuse(self._lines.number, str(error))
                continue
            if other != query:
                self._lines.put_back()
                break
            group.add(self._lines.number, document)
        text, before = self._library.topic(query, first)
        if text is None:
            return group.refused(first, f"the query {query!r} is not among the topics")
        if before != first:
            return group.refused(
                first,
                f"the query {query!r} began at line {before} and has ended; "
                f"put its lines together, {ROW_DOCUMENTS:,} at most",
            )
        return group.row(first, query, text)


class _Group:
    """The documents of one query."""

    def __init__(self, library: Collection) -> None:
        self._library = library
        self._texts: dict[str, str] = {}
        self._characters = 0
        self._bad: list[BadRow] = []
        self.lines = 0

    def add(self, line: int, document: str) -> None:
        text = self._library.document(document)
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
    """(query, document) of a line.

    Raises:
        BadValue: it is no line of a run.
    """
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
