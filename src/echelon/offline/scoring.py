"""Rows to windows, and windows to scores: a window is encoded while the previous one is scored.

The windows depend on the rows and the token budget alone, and the score cache at each window on the
windows before. A resumed run therefore forms the same steps of the same pairs, and its scores are
the same to the bit.
"""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, cast

import numpy as np

from echelon.engine.score_cache import ScoreCache
from echelon.errors import EchelonError, InvalidInput
from echelon.offline.readers import BadRow, Row
from echelon.reranker import Reranker
from echelon.types import RunReport

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator
    from concurrent.futures import Future
    from pathlib import Path

    from echelon.engine.call import Call
    from echelon.offline.readers import Entry, Reader
    from echelon.offline.streams import ResumePoint
    from echelon.options import Options, Precision
    from echelon.tokenization.pairs import EncodedPairs
    from echelon.types import FloatArray, IntArray

STEPS = 64
"""Steps of a window. The last step is half empty on average, which is less than 1 % of 64. A killed
run loses two windows at most."""

MAX_PAIRS = 32_768
MAX_CHARACTERS = 16 * 2**20
"""Bounds of a window in any case, so that memory stays constant."""

CHARACTERS_PER_TOKEN = 4
"""True of English; in other languages a window holds up to four times as many steps."""

_PAIR = re.compile(r"pairs\[(\d+)\]")


@dataclass(frozen=True, slots=True)
class RowWindow:
    """Rows that are scored together."""

    rows: tuple[Row, ...]
    bad: tuple[BadRow, ...]
    end: ResumePoint  # the place behind its last row
    tokens: tuple[int, ...]  # estimated tokens of each pair, row after row
    share: float | None = None  # share of the input read so far, 0 to 1; None where it is not known


def estimated_tokens(query: str, document: str, max_length: int) -> int:
    """Estimate a pair's tokens from its characters."""
    return min(3 + (len(query) + len(document)) // CHARACTERS_PER_TOKEN, max_length)


def windows(
    entries: Iterable[Entry], reader: Reader, full: int, max_length: int
) -> Iterator[RowWindow]:
    """Cut a reader's rows into windows that end after ``full`` estimated tokens."""
    rows: list[Row] = []
    bad: list[BadRow] = []
    tokens: list[int] = []
    total = characters = 0

    def closed() -> RowWindow:
        point = reader.resume_point()
        return RowWindow(tuple(rows), tuple(bad), point, tuple(tokens), reader.share)

    for entry in entries:
        bad += [item for item in entry if isinstance(item, BadRow)]
        for row in entry:
            if isinstance(row, Row):
                rows.append(row)
                found = [estimated_tokens(row.query, text, max_length) for text in row.documents]
                tokens += found
                total += sum(found)
                characters += len(row.query) + sum(map(len, row.documents))
        many = max(len(rows) + len(bad), len(tokens)) >= MAX_PAIRS
        if many or total >= full or characters >= MAX_CHARACTERS:
            yield closed()
            rows, bad, tokens, total, characters = [], [], [], 0, 0
    if rows or bad:
        yield closed()


@dataclass(frozen=True, slots=True)
class Steps:
    """Everything that decides the steps, and so the last bits of a score; saved with the job."""

    token_budget: int
    batch_size: int | None
    max_length: int
    window: int  # estimated tokens of a window
    device: str
    threads: int
    precision: str
    kernels: str  # their level, or ``off``
    lowered: str = ""  # the lower precision that the OOM ladder chose since; empty if it did not


@dataclass(frozen=True, slots=True)
class ScoredWindow:
    """A window with its scores."""

    rows: tuple[Row, ...]
    bad: tuple[BadRow, ...]  # the window's bad rows, including those found while scoring
    logits: FloatArray  # float32 [pairs], row after row
    truncated_tokens: IntArray  # int32 [pairs]
    report: RunReport
    window: RowWindow
    notes: bytes = b""  # what it changed in the score cache


@dataclass(slots=True)
class _EncodedWindow:
    """A window that is ready to be scored; ``call`` is None if it has no pairs."""

    rows: tuple[Row, ...]
    bad: list[BadRow]
    call: Call | None
    portions: list[tuple[list[int], EncodedPairs]]
    window: RowWindow


class WindowScorer:
    """Opens a model and scores windows with it.

    The ``steps`` of an earlier run of the job are kept, and refused if this machine would not give
    the same scores; None decides them now.
    """

    def __init__(self, model: str, options: Options, steps: Steps | None = None) -> None:
        if steps is not None and steps.lowered:
            options = replace(options, precision=cast("Precision", steps.lowered))
        self.reranker = Reranker(model, **asdict(replace(options, score_cache=None)))
        size = options.score_cache_bytes
        self._cache = self.reranker.cache = ScoreCache(size, noted=True) if size else None
        now = steps_of(self.reranker)
        if steps is not None:
            _check_same(steps, replace(now, precision=steps.precision) if steps.lowered else now)
        self._steps = steps or now
        self._encode = ThreadPoolExecutor(1, thread_name_prefix="echelon-file-encode")
        self._score = ThreadPoolExecutor(1, thread_name_prefix="echelon-file-score")

    def restore(self, notes: Path) -> None:
        """Bring the score cache to where earlier windows left it; ``notes`` are theirs."""
        if self._cache is not None and notes.is_file():
            with notes.open("rb") as file:
                self._cache.restore(file)

    def score(
        self, windows: Iterable[RowWindow], on_step: Callable[[int], None] | None = None
    ) -> Generator[ScoredWindow, None, None]:
        """Score windows in their order; two are taken before the first comes out.

        ``on_step`` is called after each step with the number of distinct pairs it scored. An error
        names the line of its pair.
        """
        try:
            waiting = None
            for window in windows:
                scored = self.submit(window, on_step)
                if waiting is not None:
                    yield waiting.result()
                waiting = scored
            if waiting is not None:
                yield waiting.result()
        except BaseException:
            self.close()
            raise

    def submit(
        self, window: RowWindow, on_step: Callable[[int], None] | None = None
    ) -> Future[ScoredWindow]:
        """Score a window after those that were submitted before; see :meth:`score`."""
        encoded = self._encode.submit(self._encoded, window)
        return self._score.submit(self._scored, encoded, on_step)

    @property
    def steps(self) -> Steps:
        """The steps as they are now; the OOM ladder may have lowered budget and precision."""
        precision = self.reranker.facts.precision
        return replace(
            self._steps,
            token_budget=min(self.reranker.token_budget, self._steps.token_budget),
            lowered="" if precision == self._steps.precision else precision,
        )

    def close(self) -> None:
        """Free the model; a window that is being scored ends after its current step."""
        self.reranker.close()
        self._encode.shutdown(cancel_futures=True)
        self._score.shutdown(cancel_futures=True)

    def _encoded(self, window: RowWindow) -> _EncodedWindow:
        """Encode a window; rows whose texts cannot be encoded become bad rows."""
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
                return _EncodedWindow(rows, bad, call, portions, window)
            except InvalidInput as error:
                found = _PAIR.search(error.field)
                if found is None:
                    raise
                text = error.field.rpartition(".")[2]
                wrong = _has_text(text, [row for row in rows for _ in row.documents][int(found[1])])
                bad += [BadRow(row.line, f"{text}: {error.problem}") for row in rows if wrong(row)]
                rows = tuple(row for row in rows if not wrong(row))
        return _EncodedWindow(rows, bad, None, [], window)

    def _scored(
        self, encoded: Future[_EncodedWindow], on_step: Callable[[int], None] | None
    ) -> ScoredWindow:
        ready = encoded.result()
        rows, bad = ready.rows, tuple(ready.bad)
        if ready.call is None:
            logits, cut = np.empty(0, np.float32), np.empty(0, np.int32)
            return ScoredWindow(rows, bad, logits, cut, RunReport(), ready.window)
        try:
            # Now, not when it was encoded: then the window before would not always be there.
            self.reranker.look_up(ready.call)
            missing = ready.call.missing(ready.portions)
            found = self.reranker.finish(ready.call, missing, on_step)
        except EchelonError as error:
            raise _with_lines(error, rows) from error
        notes = b"" if self._cache is None else self._cache.take_notes()
        logits, cut = found.logits, found.truncated_tokens
        return ScoredWindow(rows, bad, logits, cut, found.report, ready.window, notes)


def _has_text(text: str, owner: Row) -> Callable[[Row], bool]:
    """Whether a row has the wrong text of another: its documents are its own, a query is shared."""
    return lambda row: row is owner or (text == "query" and row.query == owner.query)


def steps_of(reranker: Reranker) -> Steps:
    """The steps that a model forms on this machine."""
    info, options = reranker.facts, reranker.options
    step = reranker.token_budget
    if options.batch_size is not None:
        step = min(step, options.batch_size * reranker.max_length)
    return Steps(
        token_budget=reranker.token_budget,
        batch_size=options.batch_size,
        max_length=reranker.max_length,
        window=STEPS * step,
        device=info.device_name,
        threads=info.threads,
        precision=info.precision,
        kernels=info.kernels or "off",
    )


def _check_same(before: Steps, now: Steps) -> None:
    names = ("device", "threads", "precision", "kernels", "max_length", "batch_size")
    differences = [
        f"{name} was {getattr(before, name)}, is {getattr(now, name)}"
        for name in names
        if getattr(before, name) != getattr(now, name)
    ]
    if differences:
        problem = f"the job began under other conditions: {'; '.join(differences)}"
        remedy = "Restore them, or begin anew with --restart."
        raise InvalidInput("-o", problem, f"Scores could differ in their last digits. {remedy}")


def _with_lines(error: EchelonError, rows: tuple[Row, ...]) -> EchelonError:
    """The error with a line of the file in place of a pair of the window."""
    places = [(row.line, index) for row in rows for index in range(len(row.documents))]

    def named(found: re.Match[str]) -> str:
        line, index = places[int(found[1])]
        return f"line {line}, document {index}"

    return type(error)(
        *(_PAIR.sub(named, one) if isinstance(one, str) else one for one in error.args)
    )
