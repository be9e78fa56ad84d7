"""Flags, output and exit codes that several commands share. Imports click and nothing heavier."""

from __future__ import annotations

import contextlib
import json
import sys
from typing import TYPE_CHECKING, Any

import click

from echelon.options import Options
from echelon.progress import no_progress
from echelon.server.settings import flag

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from echelon.progress import Progress
    from echelon.server.settings import Flag

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells give it."""

LANG_FLAG = flag(
    "--lang",
    type=click.Choice(["en", "zh"]),
    default="en",
    show_default=True,
    help="Language of the page.",
)

JSON_FLAG = flag("--json", "as_json", is_flag=True, help="Print JSON.")


def with_flags(*flags: Flag) -> Callable[[Any], Any]:
    """A decorator that gives a command flags, in their order."""

    def decorate(command: Any) -> Any:
        for names, settings in reversed(flags):
            command = click.option(*names, **settings)(command)
        return command

    return decorate


def options_of(values: dict[str, Any], *, quiet: bool) -> Options:
    """The options that flags give.

    Raises:
        InvalidInput: a value is wrong.
    """
    return Options.of(**values, progress=not quiet)


def print_json(content: Any) -> None:
    """Print plain data as indented JSON."""
    click.echo(json.dumps(content, ensure_ascii=False, indent=2))


def print_line(line: object) -> None:
    """Print a line on standard error."""
    click.echo(line, err=True)


@contextlib.contextmanager
def progress_bar(title: str, *, shown: bool) -> Iterator[tuple[Progress, Callable[[str], object]]]:
    """A bar of the work done, on a terminal.

    Yields:
        The function that takes progress, and one that prints a line above the bar.
    """
    if not (shown and sys.stderr.isatty()):
        yield no_progress, (print_line if shown else lambda _: None)
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn(title),
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=1.0)

        def on_progress(stage: str, done: float = 0.0, total: float = 0.0) -> None:
            bar.update(task, description=stage, completed=done / total if total else None)

        yield on_progress, bar.console.print
