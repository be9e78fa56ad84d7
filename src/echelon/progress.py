"""Progress: the callback that long work reports to, and bars on a terminal."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Progress(Protocol):
    """What long work calls to say how far it has come."""

    def __call__(self, stage: str, done: float = 0.0, total: float = 0.0) -> object:
        """Take a report.

        Args:
            stage: what is being done now.
            done: units that are done, in the unit of ``total``.
            total: units in all; 0 where the total is not known.
        """
        ...


def no_progress(stage: str, done: float = 0.0, total: float = 0.0) -> None:
    """Ignore a report: the default of every ``on_progress``."""
    del stage, done, total


@contextmanager
def bar(title: str, total: int, *, shown: bool) -> Iterator[Callable[[int], None]]:
    """Show work being done on standard error.

    Args:
        title: what is done.
        total: units in all.
        shown: whether to show anything; never does where standard error is no terminal.

    Yields:
        A function to call with the units just finished.
    """
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
def status(title: str, *, shown: bool) -> Iterator[Callable[[str], None]]:
    """Say on standard error what is being done, where no total is known.

    Args:
        title: what it is about.
        shown: whether to show anything; never does where standard error is no terminal.

    Yields:
        A function to call with what is done now.
    """
    if not (shown and sys.stderr.isatty()):
        yield lambda _: None
        return
    from rich.console import Console

    with Console(stderr=True).status(title) as line:
        yield lambda doing: line.update(f"{title}: {doing}")
