"""``echelon serve``'s settings out of a TOML file, under the names of its flags.

A flag overrides the environment (``ECHELON_SERVE_PORT`` for ``--port``), which overrides the file,
which overrides the default.
"""

from __future__ import annotations

import difflib
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from click.core import ParameterSource

from echelon.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import click

PREFIX = "ECHELON_SERVE"
"""What environment variables begin with."""

TABLE = "serve"
"""The file's table; others are for other programs."""

ORIGINS = {
    ParameterSource.COMMANDLINE: "flag",
    ParameterSource.ENVIRONMENT: "environment",
    ParameterSource.DEFAULT_MAP: "file",
}
"""Where a value came from, in words; all else is the default."""


def take_file(context: click.Context, _: click.Parameter, path: str | None) -> str | None:
    """Let the file's values stand in for defaults; the callback of ``--config``.

    Raises:
        InvalidInput: the file cannot be read, or names what no flag has.
    """
    if path is not None:
        known = [p.name for p in context.command.params if p.name not in {None, "config", "model"}]
        context.default_map = load(path, [str(name) for name in known])
    return path


def load(path: str, known: Iterable[str]) -> dict[str, Any]:
    """The values of a file, by option.

    Raises:
        InvalidInput: the file cannot be read, or names what no flag has.
    """
    try:
        content = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InvalidInput("--config", f"{path} cannot be read ({error})", "Mend it.") from None
    table = content.get(TABLE, {})
    if not isinstance(table, dict):
        raise InvalidInput("--config", f"{path}: {TABLE} is no table", f"Begin with [{TABLE}].")
    values = {name.replace("-", "_"): value for name, value in table.items()}
    check_names(values, list(known), "--config", f"{path}: ")
    return values


def check_names(values: Iterable[str], known: list[str], field: str, where: str = "") -> None:
    """Refuse settings that no flag has.

    Raises:
        InvalidInput: names the nearest that there is.
    """
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else "See: echelon serve --help."
            raise InvalidInput(field, f"{where}unknown setting {name!r}", hint)


def origins(context: click.Context) -> Iterator[tuple[str, Any, str]]:
    """(name, value, where it came from) of every setting."""
    for name, value in context.params.items():
        source = context.get_parameter_source(name)
        word = "default" if source is None else ORIGINS.get(source, "default")
        yield name, list(value) if isinstance(value, tuple) else value, word
