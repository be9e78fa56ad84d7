"""Where a file is cut into windows: a window is scored whole, and kept whole.

Pure. The cut depends on the rows and the token budget alone, so that a run that goes on where
another stopped forms the same steps of the same pairs, which gives the same scores to the bit.

Windows to scores: one is encoded while the one before is scored.
"""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self, cast

import numpy as np

from echelon.errors import EchelonError, InvalidInput
from echelon.flags import as_keywords
from echelon.offline.rows import BadRow, Row, RowWindow
from echelon.reranker import Reranker
from echelon.types import RunReport

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator
    from concurrent.futures import Future

    from echelon.call import Call
    from echelon.offline.readers import Reader
    from echelon.options import Options, Precision
    from echelon.tokenization.pairs import EncodedPairs
    from echelon.types import FloatArray, IntArray

STEPS = 64
"""Steps of a window. Its last step is half empty on average: less than 1 % of 64. Two windows are
all that is lost when a run is killed."""

MOST_PAIRS = 32_768
MOST_CHARACTERS = 16 * 2**20
"""Bounds of a window whatever its tokens, so that memory stays flat."""

CHARACTERS_A_TOKEN = 4
"""English text; elsewhere a window holds more steps, up to four times as many."""


def estimated_tokens(query: str, document: str, max_length: int) -> int:
    """About how many tokens a pair has, from its characters alone."""
    return min(3 + (len(query) + len(document)) // CHARACTERS_A_TOKEN, max_length)


def window_tokens(token_budget: int, batch_size: int | None, max_length: int) -> int:
    """Estimated tokens after which a window is full."""
    step = token_budget if batch_size is None else min(token_budget, batch_size * max_length)
    return STEPS * step


def windows(reader: Reader, full: int, max_length: int) -> Iterator[RowWindow]:
    """The reader's rows in windows.

    Args:
        reader: rows from where it stands.
        full: estimated tokens after which a window ends.
        max_length: tokens a pair may have.
    """
    room = _WindowSpace(full, max_length)
    for entry in reader:
        for item in entry:
            room.add(item)
        if room.full:
            yield room.window(reader)
            room = _WindowSpace(full, max_length)
    if room.entries:
        yield room.window(reader)


class _WindowSpace:
    """A window that is being filled."""

    def __init__(self, full: int, max_length: int) -> None:
        self._limit, self._max_length = full, max_length
        self._rows: list[Row] = []
        self._bad: list[BadRow] = []
        self._tokens: list[int] = []
        self._paid = self._characters = 0

    @property
    def entries(self) -> int:
        return len(self._rows) + len(self._bad)

    @property
    def full(self) -> bool:
        return (
            self._paid >= self._limit
            or self._characters >= MOST_CHARACTERS
            or max(self.entries, len(self._tokens)) >= MOST_PAIRS
        )

    def add(self, item: Row | BadRow) -> None:
        if isinstance(item, BadRow):
            self._bad.append(item)
            return
        self._rows.append(item)
        for document in item.documents:
            tokens = estimated_tokens(item.query, document, self._max_length)
            self._tokens.append(tokens)
            self._paid += tokens
            self._characters += len(document)
        self._characters += len(item.query)

    def window(self, reader: Reader) -> RowWindow:
        rows, bad = tuple(self._rows), tuple(self._bad)
        return RowWindow(rows, bad, reader.mark(), tuple(self._tokens), reader.share)


_PAIR = re.compile(r"pairs\[(\d+)\]")


@dataclass(frozen=True, slots=True)
class Steps:
    """All that decides the steps and so the last bits of a score; kept with a job's state.

    Attributes:
        token_budget: tokens a step may cost.
        batch_size: pairs a step may hold, or None.
        max_length: tokens a pair may have.
        window: estimated tokens of a window.
        device: the processor's or card's name.
        threads: of the forward pass.
        precision: of the forward pass when the job began.
        kernels: whether the compiled kernels are in use.
        lowered: the precision that memory pressure lowered it to; empty if it did not.
    """

    token_budget: int
    batch_size: int | None
    max_length: int
    window: int
    device: str
    threads: int
    precision: str
    kernels: bool
    lowered: str = ""


@dataclass(frozen=True, slots=True)
class ScoredWindow:
    """A window with its scores.

    Attributes:
        rows: the rows that were scored.
        bad: the window's bad rows, those that scoring found among them.
        logits: float32 [pairs], row after row.
        truncated_tokens: int32 [pairs].
        report: how it went.
        window: what it was.
    """

    rows: tuple[Row, ...]
    bad: tuple[BadRow, ...]
    logits: FloatArray
    truncated_tokens: IntArray
    report: RunReport
    window: RowWindow


@dataclass(slots=True)
class _Begun:
    """A window that is encoded, or being encoded."""

    rows: tuple[Row, ...]
    bad: list[BadRow]
    call: Call | None
    portions: list[tuple[list[int], EncodedPairs]]
    window: RowWindow


class WindowScorer:
    """The model, as jobs use it.

    Args:
        model: as in :class:`echelon.Reranker`.
        options: as there.
        steps: what an earlier run of the job fixed; None fixes it now.

    Raises:
        InvalidInput: the machine is not the one on which the job began.
    """

    def __init__(self, model: str, options: Options, steps: Steps | None = None) -> None:
        if steps is not None and steps.lowered:
            options = replace(options, precision=cast("Precision", steps.lowered))
        self.reranker = Reranker(model, **as_keywords(options))
        now = steps_of(self.reranker)
        if steps is not None:
            _check_same(steps, replace(now, precision=steps.precision) if steps.lowered else now)
        self._steps = steps or now
        self._encode = ThreadPoolExecutor(1, thread_name_prefix="echelon-file-encode")
        self._score = ThreadPoolExecutor(1, thread_name_prefix="echelon-file-score")

    def score(
        self, windows: Iterable[RowWindow], told: Callable[[int], None] | None = None
    ) -> Generator[ScoredWindow, None, None]:
        """Score windows, in their order.

        Args:
            windows: taken two ahead of what comes out.
            told: called after each step with the distinct pairs it finished.

        Raises:
            OutOfMemory: a pair does not fit in memory alone; the message names its line.
            NonFiniteScore: the model gave no number for a pair; likewise.
        """
        try:
            waiting = None
            for window in windows:
                scored = self.submit(window, told)
                if waiting is not None:
                    yield waiting.result()
                waiting = scored
            if waiting is not None:
                yield waiting.result()
        except BaseException:
            self.close()
            raise

    def submit(
        self, window: RowWindow, told: Callable[[int], None] | None = None
    ) -> Future[ScoredWindow]:
        """Score a window behind those that were submitted before; see :meth:`score`."""
        begun = self._encode.submit(self._begin, window)
        return self._score.submit(self._finish, begun, told)

    @property
    def steps(self) -> Steps:
        """What decides the steps now; memory pressure may have lowered budget and precision."""
        precision = self.reranker.facts.precision
        return replace(
            self._steps,
            token_budget=min(self.reranker.token_budget, self._steps.token_budget),
            lowered="" if precision == self._steps.precision else precision,
        )

    def close(self) -> None:
        """Free the model; the window under way ends with its next step."""
        self.reranker.close()
        self._encode.shutdown(cancel_futures=True)
        self._score.shutdown(cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _begin(self, window: RowWindow) -> _Begun:
        """Encode a window. Queries that leave no room for a document are bad rows."""
        rows, bad = window.rows, list(window.bad)
        options = replace(
            self.reranker.options,
            token_budget=self._steps.token_budget,
            batch_size=self._steps.batch_size,
            progress=False,
        )
        while rows:
            pairs = [(row.query, document) for row in rows for document in row.documents]
            if not pairs:
                break
            try:
                call = self.reranker.begin(pairs, options)
                portions = [(portion, call.encode(portion)) for portion in call.windows]
                return _Begun(rows, bad, call, portions, window)
            except InvalidInput as error:
                found = _PAIR.search(error.field)
                if found is None:
                    raise
                query = pairs[int(found[1])][0]
                bad += [
                    BadRow(row.line, f"query: {error.problem}")
                    for row in rows
                    if row.query == query
                ]
                rows = tuple(row for row in rows if row.query != query)
        return _Begun(rows, bad, None, [], window)

    def _finish(self, coming: Future[_Begun], told: Callable[[int], None] | None) -> ScoredWindow:
        begun = coming.result()
        nothing: Any = np.empty(0, np.float32), np.empty(0, np.int32), RunReport()
        logits, truncated, report = nothing
        if begun.call is not None:
            try:
                scored = self.reranker.finish(begun.call, begun.portions, told)
            except EchelonError as error:
                raise _in_file(error, begun.rows) from error
            logits, truncated, report = scored.logits, scored.truncated_tokens, scored.report
        return ScoredWindow(begun.rows, tuple(begun.bad), logits, truncated, report, begun.window)


def steps_of(reranker: Reranker) -> Steps:
    """What decides a model's steps on this machine."""
    from echelon.models.kernels import missing

    facts, options = reranker.facts, reranker.options
    length = reranker.max_length
    return Steps(
        token_budget=reranker.token_budget,
        batch_size=options.batch_size,
        max_length=length,
        window=window_tokens(reranker.token_budget, options.batch_size, length),
        device=facts.device_name,
        threads=facts.threads,
        precision=facts.precision,
        kernels=missing() is None,
    )


def _check_same(before: Steps, now: Steps) -> None:
    names = ("device", "threads", "precision", "kernels", "max_length", "batch_size")
    told = [
        f"{name} was {getattr(before, name)}, is {getattr(now, name)}"
        for name in names
        if getattr(before, name) != getattr(now, name)
    ]
    if told:
        raise InvalidInput(
            "-o",
            f"the job began under other conditions: {'; '.join(told)}",
            "Scores could differ in their last digits. Restore them, or begin anew with --restart.",
        )


def _in_file(error: EchelonError, rows: tuple[Row, ...]) -> EchelonError:
    """The error with lines of the file for places in a window."""
    places = [(row.line, index) for row in rows for index in range(len(row.documents))]

    def named(found: re.Match[str]) -> str:
        line, index = places[int(found[1])]
        return f"line {line}, document {index}"

    if isinstance(error, InvalidInput):
        return type(error)(_PAIR.sub(named, error.field), error.problem, error.remedy)
    return type(error)(_PAIR.sub(named, str(error)))
