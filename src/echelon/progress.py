"""Progress of long work: the callback that it reports to; bars on a terminal, lines elsewhere."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from time import monotonic
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LINE_S = 10.0
"""Seconds between two lines about the same work."""


class Progress(Protocol):
    """Receives how far long work is."""

    def __call__(self, stage: str, done: float = 0.0, total: float = 0.0) -> object:
        """Take a report: units done of a total, which is 0 if that is not known."""


def no_progress(stage: str, done: float = 0.0, total: float = 0.0) -> None:
    """Ignore a report: the default of every ``on_progress``."""
    del stage, done, total


def print_line(line: object) -> None:
    """Print a line on standard error."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


class StageLines:
    """Progress as lines on standard error, for pipes and logs.

    A stage is printed when it begins; later reports of stages with the same first word ("measuring
    batch 4", "measuring batch 8") each ``LINE_S`` seconds at most.

    Args:
        title: begins each line.
        begun: a first word that needs no line at the start; then short work prints none.
    """

    def __init__(self, title: str = "", *, begun: str | None = None) -> None:
        self._title = title
        self._start = monotonic()
        self._word = begun
        self._printed = self._start

    def __call__(self, stage: str, done: float = 0.0, total: float = 0.0) -> None:
        """Print a line, unless there was one like it just now."""
        now, word = monotonic(), stage.partition(" ")[0]
        if word == self._word and now < self._printed + LINE_S:
            return
        self._word, self._printed = word, now
        share = f", {100 * done / total:.0f} %" if total and done else ""
        parts = [part for part in (self._title, stage) if part]
        print_line(f"{': '.join(parts)} … ({now - self._start:.0f} s{share})")


@contextmanager
def bar(title: str, total: int, *, shown: bool) -> Iterator[Callable[[int], None]]:
    """Yield a function that moves a bar on standard error, if ``shown``, by units."""
    if not shown:
        yield lambda _: None
        return
    if not sys.stderr.isatty():
        yield _counter(title, total)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=total)
        yield lambda done: progress.advance(task, done)


def _counter(title: str, total: int) -> Callable[[int], None]:
    """A function that counts units, and prints a line each ``LINE_S`` seconds."""
    lines, finished = StageLines(title, begun=""), 0

    def advance(done: int) -> None:
        nonlocal finished
        finished += done
        lines("", finished, total)

    return advance


@contextmanager
def status(title: str, *, shown: bool) -> Iterator[Progress]:
    """Yield a callback that shows the stage on standard error, if ``shown``."""
    if not shown:
        yield no_progress
        return
    if not sys.stderr.isatty():
        yield StageLines(title)
        return
    from rich.console import Console

    line = Console(stderr=True).status(title)

    def show(stage: str, done: float = 0.0, total: float = 0.0) -> None:
        del done, total
        line.update(f"{title}: {stage}")
        line.start()  # only now: perhaps there is nothing to do

    try:
        yield show
    finally:
        line.stop()


@contextmanager
def progress_bar(title: str, *, shown: bool) -> Iterator[tuple[Progress, Callable[[str], object]]]:
    """Show stages and their share: yield a callback for them, and one that prints above a bar."""
    if not shown:
        yield no_progress, lambda _: None
        return
    if not sys.stderr.isatty():
        yield StageLines(title), print_line
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar
    from rich.table import Column

    columns = (
        TextColumn(title),
        BarColumn(bar_width=20),
        TextColumn("{task.percentage:3.0f} %"),
        TimeElapsedColumn(),
        # It alone gets shorter where there is little room.
        TextColumn("{task.description}", table_column=Column(ratio=1, no_wrap=True)),
    )
    with Bar(*columns, console=Console(stderr=True), transient=True, expand=True) as bar:
        task = bar.add_task("", total=1.0)

        def on_progress(stage: str, done: float = 0.0, total: float = 0.0) -> None:
            bar.update(task, description=stage, completed=done / total if total else None)

        yield on_progress, bar.console.print
