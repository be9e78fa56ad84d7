"""Progress bars: on a terminal when asked for, silent everywhere else."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


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
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
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
