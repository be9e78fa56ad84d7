"""Options of the command line that several commands share. Imports click and nothing heavier."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Callable

    from echelon.options import Options

Flag = tuple[tuple[str, ...], dict[str, Any]]

MODEL_FLAGS: tuple[Flag, ...] = (
    (("--device",), {"default": "auto", "help": "auto, cpu, cuda or cuda:N."}),
    (("--precision",), {"default": "auto", "help": "auto, fp32, bf16 or fp16."}),
    (("--max-length",), {"type": int, "help": "Tokens a pair may have [model's limit]."}),
    (
        ("--truncation",),
        {"default": "longest_first", "help": "longest_first or only_second (the document)."},
    ),
    (("--threads",), {"type": int, "help": "CPU threads [all the process may use]."}),
    (("--revision",), {"help": "Hub branch, tag or commit."}),
    (("--label",), {"help": "Which output of a head with several labels to score."}),
)
"""How a model is loaded."""

LANG_FLAG: tuple[Flag, ...] = (
    (
        ("--lang",),
        {
            "type": click.Choice(["en", "zh"]),
            "default": "en",
            "show_default": True,
            "help": "Language of the page.",
        },
    ),
)
"""What a page is written in."""

STEP_FLAGS: tuple[Flag, ...] = (
    (("--token-budget",), {"type": int, "help": "Tokens a step may cost."}),
    (("--batch-size",), {"type": int, "help": "Pairs a step may hold."}),
    (("--profile",), {"help": "Profile written by `echelon tune`."}),
    (
        ("--allow",),
        {
            "multiple": True,
            "help": "What may give way when a pair alone does not fit: precision, max_length.",
        },
    ),
)
"""How it scores."""


def with_flags(*tables: tuple[Flag, ...]) -> Callable[[Any], Any]:
    """A decorator that gives a command the flags of tables, in their order."""

    def decorate(command: Any) -> Any:
        for names, settings in reversed([entry for table in tables for entry in table]):
            command = click.option(*names, **settings)(command)
        return command

    return decorate


def options_of(values: dict[str, Any], *, quiet: bool) -> Options:
    """What the flags say, as options.

    Raises:
        InvalidInput: a value is wrong.
    """
    from echelon.options import Options

    if "allow" in values:
        values["allow"] = tuple(values["allow"])
    return Options.of(**values, progress=not quiet)


def as_keywords(options: Options) -> dict[str, Any]:
    """Options as the keywords of those who take them."""
    from dataclasses import fields

    return {field.name: getattr(options, field.name) for field in fields(options)}
