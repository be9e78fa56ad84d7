"""What a job shows on standard error: progress with the time left, and a summary at its end."""

from __future__ import annotations

import sys
import threading
from contextvars import copy_context
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import click

from echelon.messages import N_, listed, tr
from echelon.offline.ir_metrics import MEASURES
from echelon.progress import StageLines
from echelon.scheduling.cost_model import DEFAULT_COEFFICIENTS, CostModel, Work, work_of
from echelon.types import monotonic

if TYPE_CHECKING:
    from collections.abc import Sequence

    from echelon.offline.ir_metrics import PrecisionComparison
    from echelon.offline.resume import RowCounts
    from echelon.offline.run import JobSummary
    from echelon.offline.scoring import ScoredWindow


class EtaEstimate:
    """Estimates how long a job still takes. Pure.

    The rest of the file is assumed to be like the part that was read. The cost model predicts the
    time of that work, and is corrected by the last windows, so the estimate stays right after the
    machine becomes slower and after a resume. ``share`` of the input (0 to 1) was done before.
    """

    def __init__(self, share: float = 0.0) -> None:
        self._began = self._share = share
        self._model = CostModel(DEFAULT_COEFFICIENTS["cpu"])
        self._done = Work(0, 0, 0)

    def done(self, tokens: Sequence[int], seconds: float, share: float | None) -> None:
        """Take in a window: its pairs' estimated tokens, its time, the input's share done now."""
        self._model.observe(tokens, seconds)
        work = work_of(tokens, "none")
        self._done = Work(
            self._done.steps + work.steps,
            self._done.tokens + work.tokens,
            self._done.squares + work.squares,
        )
        self._share = share or self._share

    def left_s(self) -> float | None:
        """Seconds until the end; None if it is not known."""
        read = self._share - self._began
        if read <= 0:
            return None
        return self._model.seconds(self._done) * (1.0 - self._share) / read


MINUTE_S, HOUR_S = 60, 3600

_say = partial(click.echo, err=True)


class ProgressDisplay:
    """Shows a bar or lines, unless ``quiet``; a :class:`~echelon.offline.run.JobListener`."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._bar: Any = None
        self._task: Any = None
        self._lines = StageLines(begun=tr("Scoring"))
        self._lock = threading.Lock()
        self._speaking = copy_context()  # other threads have no language
        self._eta = EtaEstimate()
        self._share: float | None = None
        self._done = 0
        self._since_window = 0
        self._began = self._window_began = self._loaded = monotonic()
        self.pairs = 0

    def __enter__(self) -> Self:
        if not self._quiet and sys.stderr.isatty():
            self._bar = _bar()
            self._bar.start()
            self._task = self._bar.add_task(tr("Loading"), total=None, text="")
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    @property
    def seconds(self) -> float:
        """Seconds since the job began."""
        return monotonic() - self._began

    def indexing(self, stage: str, done: float = 0.0, total: float = 0.0) -> None:
        """See :class:`~echelon.offline.run.JobListener`."""
        self._show(stage, done / total if total else None, "")

    def resumed(self, counts: RowCounts, share: float | None) -> None:
        """See :class:`~echelon.offline.run.JobListener`."""
        self._done, self._share = counts.pairs, share
        self._eta = EtaEstimate(share or 0.0)
        if not self._quiet:
            pairs = number(counts.pairs, PAIRS)
            _say(tr("Resuming after {pairs} of an earlier run.", pairs=pairs))

    def loaded(self) -> None:
        """See :class:`~echelon.offline.run.JobListener`."""
        self._window_began = self._loaded = monotonic()

    def step(self, pairs: int) -> None:
        """See :class:`~echelon.offline.run.JobListener`."""
        with self._lock:
            self._since_window += pairs
            self._speaking.run(self._show_scoring)

    def window(self, scored: ScoredWindow) -> None:
        """See :class:`~echelon.offline.run.JobListener`."""
        now = monotonic()
        with self._lock:
            self.pairs += len(scored.logits)
            # Steps of the next window may have been counted, and will be counted again.
            self._since_window = 0
            self._share = scored.window.share
            if scored.window.tokens:
                self._eta.done(scored.window.tokens, now - self._window_began, self._share)
            self._window_began = now
            self._speaking.run(self._show_scoring)

    def _show_scoring(self) -> None:
        self._show(tr("Scoring"), self._share, self._text())

    def _text(self) -> str:
        done = self.pairs + self._since_window
        seconds = monotonic() - self._loaded
        left = self._eta.left_s()
        if left is not None:
            left = max(0.0, left - (monotonic() - self._window_began))
        pairs = number(self._done + done, PAIRS)
        parts = [pairs, tr("{rate} pairs/s", rate=f"{done / max(seconds, 1e-9):,.0f}")]
        if left is not None:
            parts.append(tr("{time} left", time=span(left)))
        return listed(parts)

    def _show(self, stage: str, share: float | None, text: str) -> None:
        if self._bar is not None:
            known = {"total": None if share is None else 1.0, "completed": share or 0.0}
            self._bar.update(self._task, description=stage, text=text, **known)
        elif not self._quiet:
            self._lines(f"{stage} {text}".rstrip(), share or 0.0, 1.0)


def _bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[text]}"),
    )
    return Progress(*columns, console=Console(stderr=True), transient=True)


def span(seconds: float) -> str:
    """A length of time in one or two units."""
    whole = round(seconds)
    if whole >= HOUR_S:
        return f"{whole // HOUR_S} h {whole % HOUR_S // MINUTE_S} min"
    if whole >= MINUTE_S:
        return f"{whole // MINUTE_S} min {whole % MINUTE_S} s"
    return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"  # noqa: PLR2004 - one digit


PAIRS = (N_("{count} pair"), N_("{count} pairs"))
ROWS = (N_("{count} row"), N_("{count} rows"))


def number(count: int, nouns: tuple[str, str]) -> str:
    """A count with its noun, of one or of several."""
    return tr(nouns[count != 1], count=f"{count:,}")


def print_summary(summary: JobSummary, output: str, display: ProgressDisplay) -> None:
    """Print the result of a job in a few lines."""
    counts = summary.counts
    if summary.already:
        _say(tr("{output} was finished before; --restart makes it again.", output=output))
    done = {"pairs": number(counts.pairs, PAIRS), "rows": number(counts.rows, ROWS)}
    if not display.pairs:
        _say(tr("{pairs} of {rows}.", **done))
    else:
        done["time"], before = span(display.seconds), f"{summary.resumed:,}"
        later = N_("{pairs} of {rows} in {time}, {before} of them by earlier runs.")
        text = later if summary.resumed else N_("{pairs} of {rows} in {time}.")
        _say(tr(text, **done, before=before))
    if counts.cut:
        cut = number(counts.cut, PAIRS)
        _say(tr("Cut to {tokens} tokens: {pairs}.", tokens=summary.max_length, pairs=cut))
    if counts.memory:
        _say(
            tr(
                "Memory ran short {count} times; a smaller --token-budget avoids that.",
                count=counts.memory,
            )
        )


def print_quality(summary: JobSummary) -> None:
    """Print metrics before and after reranking."""
    if not summary.queries:
        _say(tr("No query of the input has a relevant document in --qrels."))
        return
    before, after = summary.quality["before"], summary.quality["after"]
    rows = [[name, before[name], after[name], after[name] - before[name]] for name in MEASURES]
    title = tr("Quality on {queries} judged queries", queries=f"{summary.queries:,}")
    columns = [tr("Metric"), tr("Before"), tr("After"), tr("Change")]
    _print(title, columns, rows, signed=(3,))


def print_comparison(found: Sequence[PrecisionComparison]) -> None:
    """Print the metrics of each precision, and its difference from fp32."""
    base = found[0].quality
    if not any(one.quality for one in found):
        _say(tr("No query of the input has a relevant document in --qrels."))
        return
    rows: list[list[Any]] = []
    for one in found:
        if one.quality:
            cells = [one.quality[name] for name in MEASURES]
            change = one.quality["nDCG@10"] - base.get("nDCG@10", one.quality["nDCG@10"])
            rows.append([one.precision, *cells, change, f"{one.pairs_per_s:,.0f}"])
    columns = [tr("Precision"), *MEASURES, tr("nDCG@10 lost or won"), tr("Pairs/s")]
    _print(tr("Precisions on your judgements"), columns, rows, signed=(len(MEASURES) + 1,))
    for one in found:
        if one.refused:
            name, reason = one.precision, one.refused
            _say(tr("{precision} was refused: {reason}", precision=name, reason=reason))


def _print(title: str, columns: list[str], rows: list[list[Any]], signed: tuple[int, ...]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        cells = [
            cell if isinstance(cell, str) else f"{cell:+.4f}" if index in signed else f"{cell:.4f}"
            for index, cell in enumerate(row)
        ]
        table.add_row(*cells)
    Console(stderr=True).print(table)
