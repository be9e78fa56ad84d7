"""Topics and collection of an IR run, on disk: texts by their ids in constant memory.

SQLite, out of the standard library. The index is made once, beside the output, and is made again
when one of its files is no longer the same.
"""

from __future__ import annotations

import json
import os
import sqlite3
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from echelon.errors import StorageError
from echelon.jobs.readers import parse_json
from echelon.jobs.rows import BadRow, BadValue, check_unicode, id_of, text_of
from echelon.jobs.streams import Lines, Source, digest_of, suffix_of, unreadable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

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
class Shelf:
    """The files a library is made from."""

    topics: str
    collection: str

    def files(self) -> dict[str, str]:
        """What each is called → its path."""
        return {"topics": self.topics, "collection": self.collection}


def facts_of(shelf: Shelf, index: Path) -> dict[str, Any]:
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


class Library:
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
        shelf: Shelf,
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
    shelf: Shelf, facts: dict[str, Any], index: Path, told: Callable[[str, float | None], None]
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
