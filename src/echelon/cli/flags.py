"""Commands, their flags and output, as several share them. Imports click and nothing heavier.

Plan, stress and tune --scenario share the flags of a load; a trace is read a line at a time.
"""

from __future__ import annotations

import csv
import json
import math
import os
from copy import copy
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from echelon.cli.help_texts import help_record, summary, translated_help, write_list
from echelon.errors import InvalidInput
from echelon.messages import LANGUAGES, tr, use_language
from echelon.server.settings import Flag, flag

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from echelon.simulation.service_level import ServiceLevel
    from echelon.simulation.workload import ArrivalRecord, SizeDistribution, Workload

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells give it."""


def _speak(_: click.Context, __: click.Parameter, language: str | None) -> None:
    if language is not None:
        use_language(language)


def lang_flag(words: str) -> Flag:
    """``--lang``, with what is in its language."""
    return flag(
        "--lang",
        type=click.Choice(list(LANGUAGES)),
        envvar="ECHELON_LANG",
        is_eager=True,  # errors of the other flags are in this language
        expose_value=False,
        callback=_speak,
        help=words,
    )


LANG_FLAG = lang_flag("Language of help, tables, errors and pages [ECHELON_LANG, else en].")

JSON_FLAG = flag("--json", "as_json", is_flag=True, help="Print JSON.")


def quiet_flag(words: str) -> Flag:
    """``--quiet``, with what it leaves out."""
    return flag("--quiet", is_flag=True, help=words)


class GroupedOption(click.Option):
    """An option below a heading of its command's help."""

    def __init__(self, *names: Any, group: str, **settings: Any) -> None:
        super().__init__(*names, **settings)
        self.group = group


def _listen(args: list[str]) -> None:
    """Take the language before the other arguments: help and errors of parsing are in it too."""
    for word, after in pairwise([*args, ""]):
        language = after if word == "--lang" else word.removeprefix("--lang=")
        if language in LANGUAGES and word.startswith("--lang"):
            use_language(language)


class _Grouped(click.Command):
    """Help has its options in groups, and is in the asked language, as errors of parsing are."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse after the language is known."""
        _listen(args)
        return super().parse_args(ctx, args)

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the help with its sentences translated."""
        shown, width = copy(self), formatter.width - formatter.indent_increment
        shown.help = translated_help(self.help or "", width)
        shown.epilog = translated_help(self.epilog or "", width)
        super(_Grouped, shown).format_help(ctx, formatter)

    def get_short_help_str(self, limit: int = 0) -> str:
        """The whole summary, whatever the limit: lists wrap it."""
        del limit
        return summary(self.help)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write each group under its heading; ``--help`` stands last."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for option in self.get_params(ctx):
            record = help_record(option, ctx) if isinstance(option, click.Option) else None
            if record is not None:
                groups.setdefault(getattr(option, "group", "Help"), []).append(record)
        for title, records in groups.items():
            with formatter.section(tr(title)):
                write_list(formatter, records)


class Group(_Grouped, click.Group):
    """A command of commands."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse after the language is known, also that of the environment."""
        _listen([f"--lang={os.environ.get('ECHELON_LANG')}"])
        return super().parse_args(ctx, args)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, then the commands."""
        super().format_options(ctx, formatter)
        rows = [(name, command.get_short_help_str()) for name, command in self.commands.items()]
        with formatter.section(tr("Commands")):
            write_list(formatter, sorted(rows))


class Command(_Grouped):
    """A command whose errors name its flags."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; the error of an option has the name of its flag."""
        try:
            return super().invoke(ctx)
        except InvalidInput as error:
            flags = {p.name: p.opts[0] for p in self.params if isinstance(p, click.Option)}
            error.field = flags.get(error.field, error.field)
            raise


def example(*lines: str) -> str:
    """The end of a command's help: lines that can be copied."""
    return "\b\n" + "\n".join(["Example:", *(f"  {line}" for line in lines)])


def with_flags(*flags: Flag, group: str = "Options") -> Callable[[Any], Any]:
    """A decorator that gives a command flags, in their order, below a heading of its help."""

    def decorate(command: Any) -> Any:
        for names, settings in reversed(flags):
            command = click.option(*names, cls=GroupedOption, group=group, **settings)(command)
        return command

    return decorate


def print_json(content: Any) -> None:
    """Print plain data as indented JSON."""
    click.echo(json.dumps(content, ensure_ascii=False, indent=2))


_LOAD_FLAGS: dict[str, dict[str, Any]] = {
    "--slo-p99-ms": {"type": float, "help": "P99 latency goal"},
    "--rate": {"type": float, "help": "Requests a second"},
    "--arrivals": {
        "type": click.Choice(["poisson", "constant"]),
        "default": "poisson",
        "help": "Random arrivals, as callers come, or equal intervals",
    },
    "--trace": {"help": "CSV of requests: timestamp,documents[,tokens]"},
    "--documents": {"help": "Documents of a request: N or LOW-HIGH"},
    "--tokens": {"help": "Tokens of a pair: N or LOW-HIGH"},
    "--seed": {"type": int, "default": 0, "help": "Seed of the requests"},
}


def load_flag(name: str, more: str = "", **changes: Any) -> Flag:
    """A flag of the load, with more words after its help."""
    settings = _LOAD_FLAGS[name] | changes
    return flag(name, **settings | {"help": f"{settings['help']}{more}."})


def level_of(values: dict[str, Any]) -> ServiceLevel | None:
    """The service level that the flags ask for; None where they give no latency."""
    from echelon.simulation.service_level import ServiceLevel

    goal_ms = values["slo_p99_ms"]
    if goal_ms is None:
        return None
    check_above_zero("--slo-p99-ms", goal_ms, tr("Give milliseconds, such as 200."))
    return ServiceLevel(goal_ms / 1000)


def workload_of(values: dict[str, Any], *, streamed: bool = False) -> Workload:
    """The workload that the flags ask for; ``streamed`` reads a trace anew each time."""
    from echelon.simulation.workload import ReplayedArrivals, Workload, arrivals_of

    rate, path = values["rate"], values["trace"]
    if rate is not None:
        check_above_zero("--rate", rate, tr("Give requests a second, such as 5."))
    if rate is None and path is None:
        remedy = tr("Give requests a second, or --trace FILE.")
        raise InvalidInput("--rate", tr("is not given"), remedy)
    if streamed and path is not None:
        arrivals: Any = ReplayedArrivals(TraceFile(path))
    else:
        arrivals = arrivals_of(rate, trace_of(values), even=values.get("arrivals") == "constant")
    documents, tokens = sizes_of_requests(values)
    if documents is None:
        raise InvalidInput("--documents", tr("is not given"), tr("Give one such as 10 or 5-50."))
    return Workload(arrivals, documents, tokens, values["seed"])


def trace_of(values: dict[str, Any]) -> tuple[ArrivalRecord, ...]:
    """The recorded requests of ``--trace``; none without it."""
    return () if values["trace"] is None else tuple(read_trace(values["trace"]))


def sizes_of_requests(
    values: dict[str, Any],
) -> tuple[SizeDistribution | None, SizeDistribution | None]:
    """Documents of a request and tokens of a pair; None where the flag is not given."""
    from echelon.simulation.workload import sizes_of

    documents, tokens = values["documents"], values["tokens"]
    return (
        None if documents is None else sizes_of(documents, "--documents"),
        None if tokens is None else sizes_of(tokens, "--tokens"),
    )


def read_trace(path: str) -> Iterator[ArrivalRecord]:
    """Read the requests of a trace in CSV."""
    try:
        with Path(path).open(encoding="utf-8", newline="") as lines:
            yield from parse_trace(lines)
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable("--trace", path, error, tr("Give a CSV file in UTF-8.")) from error


def unreadable(name: str, file: str, error: Exception, remedy: str) -> InvalidInput:
    """The error for the file of a flag; one that is not there has a remedy of its own."""
    reason = getattr(error, "strerror", None) or error
    problem = tr("{file} cannot be read ({reason})", file=file, reason=reason)
    missing = isinstance(error, FileNotFoundError)
    return InvalidInput(name, problem, tr("Check its name.") if missing else remedy)


class TraceFile:
    """The requests of a trace file, read anew each time; checked once at the start."""

    def __init__(self, path: str) -> None:
        self._path = path
        for _ in self:
            pass

    def __iter__(self) -> Iterator[ArrivalRecord]:
        return read_trace(self._path)


MAX_DIGITS = 10
"""A longer number in a trace is not a count."""

TRACE_FORM = (
    "A trace is CSV with a header: timestamp,documents or timestamp,documents,tokens; seconds that "
    "never go down, documents of the request, tokens of each of its pairs."
)


def parse_trace(lines: Iterable[str]) -> Iterator[ArrivalRecord]:
    """Read a trace line by line, as :data:`TRACE_FORM` says; unknown columns are ignored."""
    from echelon.simulation.workload import ArrivalRecord

    reader = csv.reader(lines, strict=True)
    try:
        columns = _columns(next(reader, []))
        last = -math.inf
        for row in reader:
            if row:
                record = ArrivalRecord(*_cells(row, columns, reader.line_num))
                if record.at_s < last:
                    raise _wrong(reader.line_num, "timestamp", f"{record.at_s} is before {last}")
                last = record.at_s
                yield record
    except csv.Error as error:
        raise InvalidInput("trace", f"line {reader.line_num}: {error}", TRACE_FORM) from error
    if last == -math.inf:
        raise InvalidInput("trace", "there is no request in it", TRACE_FORM)


def _columns(header: list[str]) -> dict[str, int]:
    names = [name.strip().removeprefix("\ufeff").lower() for name in header]
    for name in ("timestamp", "documents"):
        if name not in names:
            raise InvalidInput("trace", f"line 1 names no column {name!r}", TRACE_FORM)
    for name in ("timestamp", "documents", "tokens"):
        if names.count(name) > 1:
            raise InvalidInput("trace", f"line 1 names {name!r} twice", TRACE_FORM)
    return {name: index for index, name in enumerate(names)}


def _cells(row: list[str], columns: dict[str, int], line: int) -> tuple[float, int, int | None]:
    cells = {name: row[index].strip() for name, index in columns.items() if index < len(row)}
    try:
        at_s = float(cells.get("timestamp", ""))
    except ValueError:
        at_s = math.nan
    if not math.isfinite(at_s):
        raise _wrong(line, "timestamp", f"{cells.get('timestamp', '')!r} is no number of seconds")
    documents = _count(cells, "documents", line)
    return at_s, documents, _count(cells, "tokens", line) if "tokens" in columns else None


def _count(cells: dict[str, str], name: str, line: int) -> int:
    text = cells.get(name, "")
    if not (text.isascii() and text.isdigit() and len(text) < MAX_DIGITS and int(text) > 0):
        raise _wrong(line, name, f"{text!r} is no whole number from 1 on")
    return int(text)


def _wrong(line: int, column: str, problem: str) -> InvalidInput:
    return InvalidInput("trace", f"line {line}, column {column}: {problem}", TRACE_FORM)


def check_above_zero(name: str, value: float, remedy: str) -> None:
    """Refuse the value of a flag that is not a finite number above zero."""
    if not 0 < value < math.inf:
        raise InvalidInput(
            name, tr("{value} is not a finite number above 0", value=f"{value:g}"), remedy
        )
