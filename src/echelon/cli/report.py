"""``echelon report``: show a profile again, or compare two."""

from __future__ import annotations

from pathlib import Path

import click

from echelon.cli.flags import LANG_FLAG, Command, Group, example, print_json, quiet_flag, with_flags
from echelon.errors import InvalidInput, ProfileError
from echelon.messages import tr
from echelon.progress import print_line
from echelon.server.settings import flag


@click.group(cls=Group)
def report() -> None:
    """Show a profile of `echelon tune` again, or compare two."""


@report.command(
    cls=Command, epilog=example("echelon report show echelon-profile.json -o report.html")
)
@click.argument("profile")
@with_flags(
    flag("--output", "-o", default="echelon-report.html", help="Page to write."),
    quiet_flag("Print nothing."),
    LANG_FLAG,
    group="Output",
)
def show(*, profile: str, output: str, quiet: bool) -> None:
    """Write the report of PROFILE again, as one HTML page."""
    _check_output(output, profile)
    from echelon.profile import Profile
    from echelon.reports.profile_view import DAMAGED, damaged
    from echelon.reports.tuning_report import write_report

    found = Profile.load(profile)
    try:
        write_report(found, output, profile_path=profile)
    except (ProfileError, *DAMAGED) as error:
        raise damaged(profile, error) from error
    _print_output(output, quiet=quiet)


@report.command(
    cls=Command, epilog=example("echelon report compare before.json after.json -o compare.html")
)
@click.argument("a")
@click.argument("b")
@with_flags(
    flag("--output", "-o", help="HTML page to write [none]."),
    flag("--json", "as_json", is_flag=True, help="Print JSON (docs/REPORT.md)."),
    quiet_flag("No tables."),
    LANG_FLAG,
    group="Output",
)
def compare(*, a: str, b: str, output: str | None, as_json: bool, quiet: bool) -> None:
    """Compare the profiles A and B.

    Prints which is faster, by how much, and whether that is more than the spread of the runs. The
    profiles may be of two machines, or of one before and after a change. A ratio is B over A.
    """
    if output is not None:
        _check_output(output, a, b)
    from echelon.reports.compare import compare as compare_sides
    from echelon.reports.profile_view import ProfileView

    sides = ProfileView.load(a), ProfileView.load(b)
    found = compare_sides(*sides)
    if output is not None:
        from echelon.reports.comparison_page import write_page

        write_page(*sides, found, output)
    if as_json:
        print_json(found)
    elif not quiet:
        from echelon.reports.tables import print_comparison

        print_comparison(found)
    if output is not None:
        _print_output(output, quiet=quiet or as_json)


def _check_output(output: str, *profiles: str) -> None:
    """Refuse to overwrite a profile with its page."""
    target = Path(output).resolve()
    if target in {Path(profile).resolve() for profile in profiles}:
        raise InvalidInput("--output", f"{output} is the profile itself", "Give another file.")


def _print_output(output: str, *, quiet: bool) -> None:
    if not quiet:
        print_line(tr("Page: {file}", file=output))
