"""Run a job: check, open, read windows, score, write, finish.

A window counts when its records, its bad rows and its sums are on disk, see
:mod:`echelon.offline.resume`.
"""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np

from echelon.engine.launch import with_profile
from echelon.errors import InvalidInput
from echelon.offline.collection import RunFile
from echelon.offline.ir_metrics import Judge, means
from echelon.offline.readers import BadRow, BadValue, Row
from echelon.offline.resume import JobState, JobStore, RowCounts
from echelon.offline.scoring import ScoredWindow, WindowScorer, windows
from echelon.offline.streams import STANDARD
from echelon.offline.writers import ranked

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator, Sequence

    from echelon.offline.job import OfflineJob
    from echelon.offline.readers import Entry, Reader
    from echelon.offline.scoring import RowWindow, Steps
    from echelon.offline.writers import Writer
    from echelon.options import Options


class JobListener(Protocol):
    """Receives the progress of a job; see :class:`echelon.offline.progress.ProgressDisplay`."""

    def indexing(self, stage: str, done: float = 0.0, total: float = 0.0) -> None:
        """A collection is being indexed; an :class:`echelon.progress.Progress`."""

    def resumed(self, counts: RowCounts, share: float | None) -> None:
        """An earlier run had done ``counts``, which is this share of the input."""

    def loaded(self) -> None:
        """The model is loaded."""

    def step(self, pairs: int) -> None:
        """A step of this many pairs was scored; called from another thread."""

    def window(self, scored: ScoredWindow) -> None:
        """A window is on disk."""


@dataclass(frozen=True, slots=True)
class JobSummary:
    """The result of a job."""

    counts: RowCounts  # counts over all its runs
    resumed: int  # pairs that earlier runs had done
    max_length: int
    queries: int = 0  # judged queries in the input; 0 without judgements
    # metrics ``before`` and ``after`` reranking
    quality: dict[str, dict[str, float]] = field(default_factory=dict)
    errors: str | None = None  # file with the bad rows; None is standard error
    already: bool = False  # whether an earlier run had finished the output


class _Scorer(Protocol):
    """Scores windows in their order; see :class:`echelon.offline.scoring.WindowScorer`."""

    @property
    def steps(self) -> Steps: ...

    def score(
        self, windows: Iterable[RowWindow], on_step: Callable[[int], None] | None = None
    ) -> Generator[ScoredWindow, None, None]: ...

    def close(self) -> None: ...


def run(
    job: OfflineJob,
    listener: JobListener,
    open_scorer: Callable[[str, Options, Steps | None], _Scorer] = WindowScorer,
) -> JobSummary:
    """Rerank a file; if an earlier run of the same job stopped, resume it.

    Raises:
        InvalidInput: an option is wrong, a file cannot be read or is not that of the earlier run,
            or, in a strict job, a row is bad.
        OutOfMemory: a pair does not fit alone.
        StorageError: the output cannot be written; the finished windows are kept.
    """
    job.check()
    writer = job.writer()
    judge = None if job.qrels is None else Judge(job.qrels)
    with closing(JobStore(job.output, job.errors, resumable=job.input != STANDARD)) as store:
        if job.restart:
            store.restart()
        _, profile = with_profile(job.options)
        identity = job.identity(profile)
        state = store.load()
        if state is not None:
            state.check(identity)
            if state.complete:
                return _finished(job, state, store)
        state = state or JobState(identity)
        store.cut_to(state)
        done = state.counts.pairs
        with closing(job.reader(store.index_path, state.index, listener.indexing)) as reader:
            current = _Run(job, state, store, reader, writer, judge, listener)
            current.resume()
            with closing(open_scorer(job.model, job.options, state.steps)) as scorer:
                if isinstance(scorer, WindowScorer):  # workers of a cluster cache no scores
                    scorer.restore(store.scores_path)
                state.steps = scorer.steps
                listener.loaded()
                current.score(scorer)
                store.finish(state, writer)
    return _summary(state, store, done)


@dataclass(frozen=True, slots=True)
class _Run:
    job: OfflineJob
    state: JobState
    store: JobStore
    reader: Reader
    writer: Writer
    judge: Judge | None
    listener: JobListener

    def resume(self) -> None:
        """Take the reader to where the earlier run stopped; the first run lists bad texts."""
        if self.state.resume_point is not None:
            self.reader.skip_to(self.state.resume_point)
            self.listener.resumed(self.state.counts, self.reader.share)
            if self.job.strict and self.state.counts.bad:
                problem = f"{self.state.counts.bad} bad rows were passed over before"
                raise InvalidInput("--strict", problem, "Leave it out.")
        elif isinstance(self.reader, RunFile):
            self.state.index = self.reader.collection.digest
            self.store.save(self.state)
            for bad in self.reader.collection.problems():
                self._refuse(bad)
                self.state.counts.bad += len(bad)
                self.store.append_problems(self.state, _problems(bad))
            self.state.resume_point = self.reader.resume_point()
            self.store.save(self.state)

    def score(self, scorer: _Scorer) -> None:
        """Score the rest of the input, a window at a time."""
        state, steps = self.state, scorer.steps
        rows = _writable(self.reader, self.writer)
        ahead = windows(rows, self.reader, steps.window, steps.max_length)
        with closing(scorer.score(ahead, self.listener.step)) as results:
            for scored in results:
                self._refuse(scored.bad)
                _count(state.counts, scored)
                state.resume_point = scored.window.end
                state.steps = scorer.steps
                if self.judge is not None:
                    self.judge.add(state.quality, ranked(scored, None))
                block, problems = self.writer.block(scored), _problems(scored.bad)
                self.store.append(state, block, problems, scored.notes)
                self.listener.window(scored)

    def _refuse(self, bad: Sequence[BadRow]) -> None:
        """In a strict job, stop at a bad row."""
        if self.job.strict and bad:
            first = min(bad, key=lambda row: row.line)
            raise InvalidInput(
                f"{first.file or self.job.input}:{first.line}",
                first.reason,
                "Mend the row, or leave out --strict to score the others.",
            )


def _writable(reader: Reader, writer: Writer) -> Iterator[Entry]:
    """The reader's rows; those that the writer refuses become bad rows."""

    def checked(item: Row | BadRow) -> Row | BadRow:
        if isinstance(item, Row):
            try:
                writer.check(item)
            except BadValue as error:
                return BadRow(item.line, str(error))
        return item

    for entry in reader.rows():
        yield tuple(checked(item) for item in entry)


def _count(counts: RowCounts, scored: ScoredWindow) -> None:
    counts.rows += len(scored.rows)
    counts.pairs += len(scored.logits)
    counts.bad += len(scored.bad)
    counts.cut += int(np.count_nonzero(scored.truncated_tokens))
    counts.tokens += scored.report.tokens
    counts.memory += len(scored.report.ladder)


def _problems(bad: Sequence[BadRow]) -> bytes:
    text = ""
    for row in bad:
        file = {"file": row.file} if row.file else {}
        record = {**file, "line": row.line, "reason": row.reason}
        text += json.dumps(record, ensure_ascii=False) + "\n"
    return text.encode("utf-8", "backslashreplace")


def _finished(job: OfflineJob, state: JobState, store: JobStore) -> JobSummary:
    """Check that a finished output still belongs to the input."""
    if state.resume_point is not None:
        with closing(job.plain_reader()) as reader:
            reader.skip_to(state.resume_point)
    return _summary(state, store, state.counts.pairs, already=True)


def _summary(
    state: JobState, store: JobStore, resumed: int, *, already: bool = False
) -> JobSummary:
    queries = state.quality.get("queries", 0)
    orders = ("before", "after") if queries else ()
    return JobSummary(
        counts=state.counts,
        resumed=resumed,
        max_length=0 if state.steps is None else state.steps.max_length,
        queries=queries,
        quality={order: means(state.quality, order) for order in orders},
        errors=None if store.errors_path is None else str(store.errors_path),
        already=already,
    )
