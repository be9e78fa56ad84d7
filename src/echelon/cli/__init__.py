"""The command line: its commands, how errors are shown, and exit codes.

A command module imports click only; heavy imports stand inside the command.
"""

from __future__ import annotations

import os
import sys
import warnings
from typing import Any, NoReturn

import click

from echelon import __version__
from echelon.cli.batch import batch
from echelon.cli.doctor import doctor, pull
from echelon.cli.flags import INTERRUPTED
from echelon.cli.plan import plan
from echelon.cli.rank import rank
from echelon.cli.report import report
from echelon.cli.serve import config, serve
from echelon.cli.stress import stress
from echelon.cli.tune import tune
from echelon.errors import EchelonError

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


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=EXIT_CODES,
)
@click.version_option(__version__, prog_name="echelon")
def cli() -> None:
    """Rerank documents with a cross-encoder, at the batch size that is best for this machine."""


for _command in (batch, serve, config, stress, plan, report, rank, tune, pull, doctor):
    cli.add_command(_command)


def main() -> NoReturn:
    """Run the command line; an error becomes one line on standard error and an exit code."""
    warnings.showwarning = _show_warning
    try:
        code = cli(standalone_mode=False)  # the code of a `context.exit(code)`, else None
    except (click.exceptions.Abort, KeyboardInterrupt):
        _fail("Interrupted.", INTERRUPTED)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except EchelonError as error:
        _fail(str(error), error.exit_code)
    except BrokenPipeError:
        # The reader has closed the pipe (`echelon rank … | head`): there is nothing to print to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    sys.exit(code or 0)


def _fail(message: str, code: int) -> NoReturn:
    click.echo(f"echelon: {message}", err=True)
    sys.exit(code)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    click.echo(f"echelon: warning: {message}", err=True)
