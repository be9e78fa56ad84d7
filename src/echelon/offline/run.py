"""The spine of a job: check → open → read windows → score → write → finish.

A window counts when its records, its bad rows and its sums are on disk; see :mod:`.store`.
"""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np

from echelon.engine.launch import with_profile
from echelon.errors import InvalidInput
from echelon.offline.collection import RunFile
from echelon.offline.ir_metrics import Judge, means
from echelon.offline.resume import JobState, JobStore, RowCounts
from echelon.offline.rows import BadRow, BadValue, Row
from echelon.offline.scoring import ScoredWindow, WindowScorer, windows
from echelon.offline.streams import STANDARD
from echelon.offline.writers import ranked

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator

    from echelon.offline.job import OfflineJob
    from echelon.offline.readers import Entry, Reader
    from echelon.offline.rows import ResumePoint, RowWindow
    from echelon.offline.scoring import Steps
    from echelon.offline.writers import Writer
    from echelon.options import Options


class JobListener(Protocol):
    """Hears how a job goes; see :class:`echelon.offline.progress.ProgressDisplay`."""

    def indexing(self, doing: str, share: float | None) -> None:
        """A collection is being indexed."""
        ...

    def resumed(self, counts: RowCounts, share: float | None) -> None:
        """An earlier run had come so far."""
        ...

    def loaded(self) -> None:
        """The model is there."""
        ...

    def step(self, pairs: int) -> None:
        """A step was scored, of so many pairs; called from another thread."""
        ...

    def window(self, scored: ScoredWindow) -> None:
        """A window is on disk."""
        ...


@dataclass(frozen=True, slots=True)
class JobSummary:
    """What came of a job.

    Attributes:
        counts: over all its runs.
        resumed: pairs that earlier runs had done.
        max_length: tokens a pair could have.
        queries: judged queries in the input; 0 without judgements.
        quality: metrics ``before`` and ``after``.
        errors: where the bad rows are; None is standard error.
        already: whether the output was finished before.
    """

    counts: RowCounts
    resumed: int
    max_length: int
    queries: int = 0
    quality: dict[str, dict[str, float]] = field(default_factory=dict)
    errors: str | None = None
    already: bool = False


class Scores(Protocol):
    """Scores windows in their order; see :class:`echelon.offline.scoring.WindowScorer`."""

    @property
    def steps(self) -> Steps:
        """What decides the steps."""
        ...

    def score(
        self, windows: Iterable[RowWindow], told: Callable[[int], None] | None = None
    ) -> Generator[ScoredWindow, None, None]:
        """Score windows."""
        ...

    def __enter__(self) -> Self:
        """Begin."""
        ...

    def __exit__(self, *exc: object) -> None:
        """End."""
        ...


def run(
    job: OfflineJob,
    watcher: JobListener,
    scoring: Callable[[str, Options, Steps | None], Scores] = WindowScorer,
) -> JobSummary:
    """Rerank a file.

    Args:
        job: what to do; it goes on where an earlier run of the same job stopped.
        watcher: hears how it goes.
        scoring: what scores, of a model, its options and the steps of an earlier run.

    Raises:
        InvalidInput: an option is wrong, a file cannot be read or is not that of the earlier run,
            or, in a strict job, a row is bad.
        ModelError: as :class:`echelon.Reranker`.
        OutOfMemory: a pair does not fit alone.
        StorageError: the output cannot be written; what was finished is kept.
        MissingDependency: an optional package is missing.
    """
    job.check()
    writer = job.writer()
    judge = None if job.qrels is None else Judge(job.qrels)
    with JobStore(job.output, job.errors, resumable=job.input != STANDARD) as store:
        if job.restart:
            store.restart()
        facts = job.facts(store.index_path)
        _, profile = with_profile(job.options)
        identity = job.identity(facts, profile)
        state = store.found()
        if state is not None:
            state.check(identity)
            if state.complete:
                return _finished(job, state, store)
        state = state or JobState(identity)
        store.cut_to(state)
        done = state.counts.pairs
        with closing(job.reader(store.index_path, facts, watcher.indexing)) as reader:
            _go_on(job, state, store, reader, watcher)
            with scoring(job.model, job.options, state.steps) as scores:
                state.steps = scores.steps
                watcher.loaded()
                _score(job, state, store, _Tools(reader, scores, writer, judge, watcher))
                store.finish(state, writer)
    return _summary(state, store, done)


@dataclass(frozen=True, slots=True)
class _Tools:
    """What a run works with."""

    reader: Reader
    scoring: Scores
    writer: Writer
    judge: Judge | None
    watcher: JobListener


def _go_on(
    job: OfflineJob, state: JobState, store: JobStore, reader: Reader, watcher: JobListener
) -> None:
    """Take the reader to where the earlier run stopped, or note what a collection lacks."""
    if state.mark is not None:
        reader.skip_to(state.mark)
        watcher.resumed(state.counts, reader.share)
        if job.strict and state.counts.bad:
            raise InvalidInput(
                "--strict", f"{state.counts.bad} bad rows were passed over before", "Leave it out."
            )
    elif isinstance(reader, RunFile):
        bad = list(reader.problems())
        _refuse(job, bad)
        state.mark = reader.mark()
        state.counts.bad += len(bad)
        store.append(state, b"", _problems(bad))


def _score(job: OfflineJob, state: JobState, store: JobStore, tools: _Tools) -> None:
    """Score the rest of the input, a window at a time."""
    steps = tools.scoring.steps
    checked = _Checked(tools.reader, tools.writer)
    ahead = windows(checked, steps.window, steps.max_length)
    with closing(tools.scoring.score(ahead, tools.watcher.step)) as results:
        for scored in results:
            _refuse(job, scored.bad)
            _count(state, scored)
            state.mark = scored.window.end
            state.steps = tools.scoring.steps
            if tools.judge is not None:
                tools.judge.add(state.quality, ranked(scored, None))
            store.append(state, tools.writer.block(scored), _problems(scored.bad))
            tools.watcher.window(scored)


class _Checked:
    """A reader without the rows that cannot be written.

    Args:
        reader: the rows.
        writer: knows which it can write.
    """

    def __init__(self, reader: Reader, writer: Writer) -> None:
        self._reader, self._writer = reader, writer

    def __iter__(self) -> Iterator[Entry]:
        for entry in self._reader:
            yield tuple(self._checked(item) for item in entry)

    def _checked(self, item: Row | BadRow) -> Row | BadRow:
        if isinstance(item, Row):
            try:
                self._writer.check(item)
            except BadValue as error:
                return BadRow(item.line, str(error))
        return item

    def mark(self) -> ResumePoint:
        return self._reader.mark()

    def skip_to(self, mark: ResumePoint) -> None:
        self._reader.skip_to(mark)

    @property
    def share(self) -> float | None:
        return self._reader.share

    def close(self) -> None:
        self._reader.close()


def _count(state: JobState, scored: ScoredWindow) -> None:
    counts = state.counts
    counts.rows += len(scored.rows)
    counts.pairs += len(scored.logits)
    counts.bad += len(scored.bad)
    counts.cut += int(np.count_nonzero(scored.truncated_tokens))
    counts.tokens += scored.report.tokens
    counts.memory += len(scored.report.ladder)


def _refuse(job: OfflineJob, bad: tuple[BadRow, ...] | list[BadRow]) -> None:
    """In a strict job, stop at a bad row."""
    if job.strict and bad:
        first = min(bad, key=lambda row: row.line)
        raise InvalidInput(
            f"{first.file or job.input}:{first.line}",
            first.reason,
            "Mend the row, or leave out --strict to score the others.",
        )


def _problems(bad: tuple[BadRow, ...] | list[BadRow]) -> bytes:
    records: list[dict[str, Any]] = []
    for row in bad:
        file = {"file": row.file} if row.file else {}
        records.append({**file, "line": row.line, "reason": row.reason})
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    return "".join(lines).encode("utf-8", "backslashreplace")


def _finished(job: OfflineJob, state: JobState, store: JobStore) -> JobSummary:
    """The output is there; see that it is still that of the input."""
    if state.mark is not None:
        with closing(job.plain_reader()) as reader:
            reader.skip_to(state.mark)
    return _summary(state, store, state.counts.pairs, already=True)


def _summary(
    state: JobState, store: JobStore, resumed: int, *, already: bool = False
) -> JobSummary:
    queries = state.quality.get("queries", 0)
    return JobSummary(
        counts=state.counts,
        resumed=resumed,
        max_length=0 if state.steps is None else state.steps.max_length,
        queries=queries,
        quality={order: means(state.quality, order) for order in ("before", "after")}
        if queries
        else {},
        errors=None if store.errors_path is None else str(store.errors_path),
        already=already,
    )
