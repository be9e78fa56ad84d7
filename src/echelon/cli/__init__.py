"""The command line: its commands, how errors are shown, and exit codes.

A command module imports click only; heavy imports stand inside the command.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any, NoReturn

import click

from echelon import __version__
from echelon.cli.batch import batch
from echelon.cli.click_texts import translate_click
from echelon.cli.doctor import doctor, pull
from echelon.cli.flags import INTERRUPTED, LANG_FLAG, Group, with_flags
from echelon.cli.models import models
from echelon.cli.plan import plan
from echelon.cli.rank import rank
from echelon.cli.report import report
from echelon.cli.serve import config, serve
from echelon.cli.stress import stress
from echelon.cli.tune import tune
from echelon.errors import EchelonError, InvalidInput
from echelon.messages import in_language, tr, translated

EXIT_CODES = """\b
Exit codes:
  0    done
  1    unexpected failure
  2    wrong usage or input
  3    the model is missing, damaged or unsupported
  4    the profile cannot be read
  5    out of memory, even for a single pair
  6    a result could not be written
  7    an optional package is missing
  8    a load test or a validation missed its goal
  9    some rows of a file could not be scored; the others were
  130  interrupted (Ctrl-C); finished measurements and scores are kept"""


NO_ARGUMENTS: Any = getattr(click.exceptions, "NoArgsIsHelpError", ())
"""The error of a group without a command; before click 8.2 there is none."""


@click.group(
    cls=Group,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=EXIT_CODES,
)
@with_flags(LANG_FLAG)
@click.version_option(__version__, "-V", "--version", prog_name="echelon")
def cli() -> None:
    """Rerank documents with a cross-encoder, at the batch size that is best for this machine."""


translate_click()
for _command in (batch, serve, config, stress, plan, report, rank, tune, models, pull, doctor):
    cli.add_command(_command)


def main() -> NoReturn:
    """Run the command line; an error becomes one line on standard error and an exit code."""
    warnings.showwarning = _show_warning
    with in_language(None):  # --lang holds until the end, also for errors
        _run()


def _run() -> NoReturn:
    try:
        # The code of a `context.exit(code)`, else None.
        code = cli(prog_name="echelon", standalone_mode=False)
    except (click.exceptions.Abort, KeyboardInterrupt):
        _end(tr("Interrupted."), INTERRUPTED)
    except NO_ARGUMENTS as error:  # its message is the help
        _end(error.format_message(), error.exit_code)
    except click.UsageError as error:
        _fail(_usage(error), error.exit_code)
    except click.ClickException as error:
        _fail(error.format_message(), error.exit_code)
    except EchelonError as error:
        _fail(_told(error), error.exit_code)
    sys.exit(code or 0)


def _usage(error: click.UsageError) -> str:
    """Click's error in the form of our own: flag, problem, remedy."""
    path = "echelon" if error.ctx is None else error.ctx.command_path
    remedy = tr("See: {path} --help", path=path)
    if not isinstance(error, click.BadParameter) or error.param is None:
        problem = error.format_message().rstrip(".。")
        if problem.endswith(("?", "？", "?)", "？）")):  # noqa: RUF001 - Chinese marks
            return f"{problem} {remedy}"
        return tr("{problem}. {remedy}", problem=problem, remedy=remedy)
    argument = isinstance(error.param, click.Argument)
    name = error.param.human_readable_name if argument else error.param.opts[0]
    missing = isinstance(error, click.MissingParameter)
    problem = tr("is not given") if missing else error.message.rstrip(".。")
    return tr("{field}: {problem}. {remedy}", field=name, problem=problem, remedy=remedy)


def _told(error: EchelonError) -> str:
    """An error in the command's language, as far as the catalogue has its parts."""
    if isinstance(error, InvalidInput):
        problem, remedy = translated(error.problem), tr(error.remedy)
        return tr("{field}: {problem}. {remedy}", field=error.field, problem=problem, remedy=remedy)
    return str(error)


def _fail(message: str, code: int) -> NoReturn:
    _end(tr("Error: {message}", message=message), code)


def _end(line: str, code: int) -> NoReturn:
    click.echo(line, err=True)
    sys.exit(code)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    click.echo(tr("Warning: {message}", message=message), err=True)
