"""Records of requests, kept as columns: a request takes 31 bytes, a million 31 MB. Pure."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt

    Column = npt.NDArray[np.float64]

Kind = Literal["answered", "refused", "timeout", "error", "wrong"]
"""``refused`` is 429 or 503; ``wrong`` is an answer without a score for every document."""

KINDS: tuple[Kind, ...] = get_args(Kind)
ANSWERED = KINDS.index("answered")


class RequestRecord(NamedTuple):
    """One request; times in seconds from the start of the run.

    Attributes:
        scheduled: when it should have been sent.
        sent: when it was.
        ended: when its answer, or its failure, was there.
        kind: its outcome.
        status: HTTP status; 0 where there was none.
        documents: documents that it asked for.
    """

    scheduled: float
    sent: float
    ended: float
    kind: Kind
    status: int
    documents: int

    @property
    def latency_s(self) -> float:
        """Seconds from when the request was due to its end."""
        return self.ended - self.scheduled


class RequestRecords:
    """Records in the order in which requests ended."""

    def __init__(self) -> None:
        self._times = tuple(array("d") for _ in range(3))
        self._kinds = array("b")
        self._status = array("h")
        self._documents = array("i")

    def add(self, record: RequestRecord) -> None:
        """Add a record."""
        for column, value in zip(self._times, record[:3], strict=True):
            column.append(value)
        self._kinds.append(KINDS.index(record.kind))
        self._status.append(record.status)
        self._documents.append(record.documents)

    def __len__(self) -> int:
        return len(self._kinds)

    def __iter__(self) -> Iterator[RequestRecord]:
        columns = (*self._times, self._kinds, self._status, self._documents)
        for scheduled, sent, ended, kind, status, documents in zip(*columns, strict=True):
            yield RequestRecord(scheduled, sent, ended, KINDS[kind], status, documents)

    @property
    def scheduled(self) -> Column:
        """float64 [requests], seconds."""
        return np.array(self._times[0])

    @property
    def sent(self) -> Column:
        """float64 [requests], seconds."""
        return np.array(self._times[1])

    @property
    def ended(self) -> Column:
        """float64 [requests], seconds."""
        return np.array(self._times[2])

    @property
    def kinds(self) -> npt.NDArray[np.int8]:
        """int8 [requests], places in :data:`KINDS`."""
        return np.array(self._kinds, dtype=np.int8)

    @property
    def documents(self) -> npt.NDArray[np.int32]:
        """int32 [requests]."""
        return np.array(self._documents, dtype=np.int32)
