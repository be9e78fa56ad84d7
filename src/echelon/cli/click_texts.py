"""Click's own texts in the language of the command line.

Click looks them up with gettext, which reads compiled catalogues of one domain only. Here its
modules get a look-up in Echelon's catalogue; a text that is not there stays English.
"""

from __future__ import annotations

import click

from echelon.messages import N_, tr

TEXTS = (
    N_("Aborted!"),
    N_("Commands"),
    N_("Got unexpected extra argument ({args})"),
    N_("Got unexpected extra arguments ({args})"),
    N_("Missing command."),
    N_("No such command {name!r}."),
    N_("No such option {name!r}."),
    N_("(Did you mean one of: {possibilities}?)"),
    N_("Did you mean {possibility}?"),
    N_("Option {name!r} does not take a value."),
    N_("Option {name!r} requires an argument."),
    N_("Options"),
    N_("Show the version and exit."),
    N_("Show this message and exit."),
    N_("Usage:"),
    N_("default: {default}"),
    N_("{name} {filename!r} does not exist."),
    N_("{name} {filename!r} is a directory."),
    N_("{value!r} is not a valid {number_type}."),
    N_("{value!r} is not one of {choices}."),
    N_("{value} is not in the range {range}."),
)
"""What a command's help and the errors of wrong flags say."""

HEADINGS = (
    *(N_("Access"), N_("Address"), N_("Documents"), N_("Files"), N_("Help"), N_("Limits")),
    *(N_("Load"), N_("Load and goal"), N_("Logs and traces"), N_("Machines"), N_("Measuring")),
    *(N_("Model"), N_("Output"), N_("Ray"), N_("Requests"), N_("Scenario"), N_("Scores")),
    *(N_("Settings"), N_("Steps"), N_("Workers")),
)
"""Headings of a command's help."""

_MODULES = (click.core, click.exceptions, click.formatting, click.parser, click.types)


def translate_click() -> None:
    """Make click say its texts in the language of the command line."""
    for module in _MODULES:
        vars(module).update({"_": tr, "ngettext": _counted})


def _counted(one: str, many: str, count: int) -> str:
    return tr(one if count == 1 else many)
