"""Recorded traffic as CSV: a line a request. Pure."""

from __future__ import annotations

import csv
import math
from typing import TYPE_CHECKING

from echelon.errors import InvalidInput
from echelon.simulation.workload import ArrivalRecord

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

MAX_DIGITS = 10
"""A longer number in a trace is not a count."""

TRACE_FORM = (
    "A trace is CSV with a header: timestamp,documents or timestamp,documents,tokens; seconds that "
    "never go down, documents of the request, tokens of each of its pairs."
)


def parse_trace(lines: Iterable[str]) -> Iterator[ArrivalRecord]:
    """Read a trace line by line, as :data:`TRACE_FORM` says; unknown columns are ignored.

    Raises:
        InvalidInput: a value is wrong, with its line and column; or there is no request.
    """
    reader = csv.reader(lines, strict=True)
    try:
        columns = _columns(next(reader, []))
        last = -math.inf
        for row in reader:
            if row:
                record = _record(row, columns, reader.line_num)
                if record.at_s < last:
                    raise _wrong(reader.line_num, "timestamp", f"{record.at_s} is before {last}")
                last = record.at_s
                yield record
    except csv.Error as error:
        raise InvalidInput("trace", f"line {reader.line_num}: {error}", TRACE_FORM) from error
    if last == -math.inf:
        raise InvalidInput("trace", "there is no request in it", TRACE_FORM)


def _columns(header: list[str]) -> dict[str, int]:
    names = [name.strip().removeprefix("\ufeff").lower() for name in header]
    for name in ("timestamp", "documents"):
        if name not in names:
            raise InvalidInput("trace", f"line 1 names no column {name!r}", TRACE_FORM)
    for name in ("timestamp", "documents", "tokens"):
        if names.count(name) > 1:
            raise InvalidInput("trace", f"line 1 names {name!r} twice", TRACE_FORM)
    return {name: index for index, name in enumerate(names)}


def _record(row: list[str], columns: dict[str, int], line: int) -> ArrivalRecord:
    cells = {name: row[index].strip() for name, index in columns.items() if index < len(row)}
    try:
        at_s = float(cells.get("timestamp", ""))
    except ValueError:
        at_s = math.nan
    if not math.isfinite(at_s):
        raise _wrong(line, "timestamp", f"{cells.get('timestamp', '')!r} is no number of seconds")
    documents = _count(cells, "documents", line)
    return ArrivalRecord(
        at_s, documents, _count(cells, "tokens", line) if "tokens" in columns else None
    )


def _count(cells: dict[str, str], name: str, line: int) -> int:
    text = cells.get(name, "")
    if not (text.isascii() and text.isdigit() and len(text) < MAX_DIGITS and int(text) > 0):
        raise _wrong(line, name, f"{text!r} is no whole number from 1 on")
    return int(text)


def _wrong(line: int, column: str, problem: str) -> InvalidInput:
    return InvalidInput("trace", f"line {line}, column {column}: {problem}", TRACE_FORM)
