"""Writers: the scores of a window to a block of JSONL, of a TREC run or of Parquet.

A block is complete by itself (a gzip member, a zstd frame, an Arrow stream), so the file of blocks
can be cut between any two of them. Parquet has its index at its end, so it is assembled from Arrow
blocks when all are there.
"""

from __future__ import annotations

import gzip
import io
import json
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from echelon.offline.readers import BadValue, Id, Row
from echelon.offline.streams import replacement
from echelon.options import require_packages
from echelon.reranker import sigmoid

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from echelon.offline.scoring import ScoredWindow
    from echelon.types import FloatArray, IntArray


class Writer(Protocol):
    """Turns scores into bytes."""

    def check(self, row: Row) -> None:
        """Raise :class:`BadValue` for a row that this format cannot hold; here it holds all."""
        del row

    def block(self, scored: ScoredWindow) -> bytes:
        """Write a window's records."""

    def assemble(self, part: Path, output: Path) -> None:
        """Turn the file of blocks into the output; it may be left, and is removed later."""


class RankedRow:
    """A row with ``order``: positions of its documents, best first; equal logits keep theirs."""

    def __init__(self, row: Row, logits: FloatArray, cut: IntArray, top_n: int | None) -> None:
        self.row, self.logits, self.cut = row, logits, cut
        self.order: list[int] = np.argsort(-logits, kind="stable")[:top_n].tolist()

    def results(self) -> Iterator[dict[str, Any]]:
        """The result of each document, best first."""
        chances = sigmoid(self.logits)
        for index in self.order:
            result: dict[str, Any] = {"index": index}
            if self.row.document_ids[index] is not None:
                result["id"] = self.row.document_ids[index]
            result["score"] = float(chances[index])
            result["logit"] = shortest(self.logits[index])
            if self.cut[index]:
                result["truncated_tokens"] = int(self.cut[index])
            yield result


def ranked(scored: ScoredWindow, top_n: int | None) -> Iterator[RankedRow]:
    """The rows of a window, each ranked."""
    start = 0
    for row in scored.rows:
        end = start + len(row.documents)
        logits, cut = scored.logits[start:end], scored.truncated_tokens[start:end]
        yield RankedRow(row, logits, cut, top_n)
        start = end


def shortest(logit: np.float32) -> float:
    """The float with the fewest digits that is read back as the same float32."""
    return float(str(logit))


class _BlockWriter(Writer):
    """A writer whose file of blocks is the output already; ``top_n`` results are kept of a row."""

    def __init__(self, compression: str | None, top_n: int | None) -> None:
        if compression == "zstd":
            require_packages("zstd", "files", ["pyarrow"])
        self._compression, self._top_n = compression, top_n

    def block(self, scored: ScoredWindow) -> bytes:
        lines = self._lines(ranked(scored, self._top_n))
        data = "".join(f"{line}\n" for line in lines).encode()
        return _compressed(data, self._compression) if data else b""

    def assemble(self, part: Path, output: Path) -> None:
        if part.stat().st_size == 0:
            part.write_bytes(_compressed(b"", self._compression))
        part.replace(output)

    def _lines(self, rows: Iterator[RankedRow]) -> Iterator[str]:
        raise NotImplementedError


class JsonWriter(_BlockWriter):
    """JSONL; with ``pairs`` a line is a pair, in the file's order."""

    def __init__(self, compression: str | None, top_n: int | None, *, pairs: bool) -> None:
        super().__init__(compression, top_n)
        self._record = _pair_record if pairs else _query_record

    def _lines(self, rows: Iterator[RankedRow]) -> Iterator[str]:
        return (json.dumps(self._record(row), ensure_ascii=False) for row in rows)


def _query_record(ranking: RankedRow) -> dict[str, Any]:
    row = ranking.row
    head = {"line": row.line} if row.id is None else {"id": row.id}
    return {**head, "results": list(ranking.results())}


def _pair_record(ranking: RankedRow) -> dict[str, Any]:
    (result,) = ranking.results()
    names = {"query_id": ranking.row.id, "document_id": result.pop("id", None)}
    del result["index"]
    given = {name: value for name, value in names.items() if value is not None}
    return {"line": ranking.row.line, **given, **result}


class TrecWriter(_BlockWriter):
    """A TREC run; its score is the logit, and ``tag`` its last column."""

    def __init__(self, compression: str | None, top_n: int | None, tag: str) -> None:
        super().__init__(compression, top_n)
        self._tag = tag

    def check(self, row: Row) -> None:
        """See :class:`Writer`: ids must be there, without spaces, and different."""
        _check_name("id", row.id)
        for index, name in enumerate(row.document_ids):
            _check_name(f"documents[{index}].id", name)
        if len(set(map(str, row.document_ids))) < len(row.document_ids):
            raise BadValue("two documents have the same id, which a TREC run cannot tell apart")

    def _lines(self, rows: Iterator[RankedRow]) -> Iterator[str]:
        for ranking in rows:
            for rank, result in enumerate(ranking.results(), 1):
                yield f"{ranking.row.id} Q0 {result['id']} {rank} {result['logit']} {self._tag}"


def _check_name(field: str, name: Id) -> None:
    if name is None:
        raise BadValue(f"{field} is missing, and a TREC run needs it")
    if not str(name) or len(str(name).split()) != 1 or str(name).strip() != str(name):
        raise BadValue(f"{field} {name!r} has a space in it, or nothing, which a TREC run forbids")


class ParquetWriter(Writer):
    """Parquet: one row for each result, in rank order; with ``pairs`` one for each pair."""

    def __init__(self, top_n: int | None, *, pairs: bool) -> None:
        require_packages("Parquet", "files", ["pyarrow"])
        import pyarrow as pa

        self._top_n = top_n
        ranks = [] if pairs else [("rank", pa.int32()), ("index", pa.int32())]
        self._schema = pa.schema(
            [
                ("line", pa.int64()),
                ("query_id", pa.string()),
                *ranks,
                ("document_id", pa.string()),
                ("score", pa.float64()),
                ("logit", pa.float32()),
                ("truncated_tokens", pa.int32()),
            ]
        )

    def block(self, scored: ScoredWindow) -> bytes:
        """See :class:`Writer`."""
        import pyarrow as pa

        columns: dict[str, list[Any]] = {name: [] for name in self._schema.names}
        for ranking in ranked(scored, self._top_n):
            cells = _cells(ranking)
            for name in columns:
                columns[name] += cells[name]
        batch = pa.record_batch(list(columns.values()), schema=self._schema)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, self._schema) as stream:
            stream.write_batch(batch)
        return bytes(sink.getvalue().to_pybytes())

    def assemble(self, part: Path, output: Path) -> None:
        """See :class:`Writer`: a row group a window, written beside its place and moved there."""
        import pyarrow as pa
        from pyarrow import parquet

        with (
            replacement(output, "building") as building,
            pa.OSFile(str(part)) as blocks,
            parquet.ParquetWriter(building, self._schema) as file,
        ):
            while blocks.tell() < blocks.size():
                file.write_table(pa.ipc.open_stream(blocks).read_all())


def _cells(ranking: RankedRow) -> dict[str, list[Any]]:
    row, order = ranking.row, ranking.order
    chances = sigmoid(ranking.logits)
    return {
        "line": [row.line] * len(order),
        "query_id": [_name(row.id)] * len(order),
        "rank": list(range(1, len(order) + 1)),
        "index": order,
        "document_id": [_name(row.document_ids[i]) for i in order],
        "score": chances[order].tolist(),
        "logit": ranking.logits[order].tolist(),
        "truncated_tokens": ranking.cut[order].tolist(),
    }


def _name(given: Id) -> str | None:
    return None if given is None else str(given)


def _compressed(data: bytes, compression: str | None) -> bytes:
    """One gzip member or zstd frame; the same bytes for the same data."""
    if compression is None:
        return data
    if compression == "gzip":
        target = io.BytesIO()
        with gzip.GzipFile("", "wb", fileobj=target, mtime=0) as file:
            file.write(data)
        return target.getvalue()
    import pyarrow as pa

    return bytes(pa.Codec("zstd").compress(data, asbytes=True))
