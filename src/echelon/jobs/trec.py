"""TREC run files: ``query Q0 document rank score tag``, with texts out of a library."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from echelon.jobs.readers import TOO_LONG, LineReader
from echelon.jobs.rows import ROW_BYTES, ROW_DOCUMENTS, BadRow, BadValue, Mark, Row

if TYPE_CHECKING:
    from collections.abc import Iterator

    from echelon.jobs.library import Library
    from echelon.jobs.readers import Entry

FIELDS = 6


class RunFile(LineReader):
    """The queries of a run; the lines of one stand together.

    Documents keep the order of their lines. A query that comes up a second time is refused, since
    its documents could not be ranked with the first ones.

    Args:
        path: the run file.
        library: where the texts are.
    """

    def __init__(self, path: str, library: Library) -> None:
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

    def mark(self) -> Mark:
        """See :class:`~echelon.jobs.readers.Reader`."""
        self._library.commit()
        return super().mark()

    def close(self) -> None:
        """See :class:`~echelon.jobs.readers.Reader`."""
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

    def __init__(self, library: Library) -> None:
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
