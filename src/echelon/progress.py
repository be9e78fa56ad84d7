"""Progress of long work: the callback that it reports to, and bars on a terminal."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Progress(Protocol):
    """Receives how far long work is."""

    def __call__(self, stage: str, done: float = 0.0, total: float = 0.0) -> object:
        """Take a report: units done of a total, which is 0 if that is not known."""


def no_progress(stage: str, done: float = 0.0, total: float = 0.0) -> None:
    """Ignore a report: the default of every ``on_progress``."""
    del stage, done, total


@contextmanager
def bar(title: str, total: int, *, shown: bool) -> Iterator[Callable[[int], None]]:
    """Yield a function that moves a bar on standard error, if ``shown`` on a terminal, by units."""
    if not (shown and sys.stderr.isatty()):
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=total)
        yield lambda done: progress.advance(task, done)


@contextmanager
def status(title: str, *, shown: bool) -> Iterator[Progress]:
    """Yield a callback that shows the stage on standard error, if ``shown`` on a terminal."""
    if not (shown and sys.stderr.isatty()):
        yield no_progress
        return
    from rich.console import Console

    with Console(stderr=True).status(title) as line:

        def show(stage: str, done: float = 0.0, total: float = 0.0) -> None:
            del done, total
            line.update(f"{title}: {stage}")

        yield show
