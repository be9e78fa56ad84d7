"""Reads JSON files that others wrote: bounded in size and depth, and checked by each field's type.

Every problem is a ``ValueError`` whose text is short and names the field. The caller adds the
file's name, what to do, and the kind of error.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

MIB = 2**20

MAX_BYTES = MIB
"""Files of settings, such as ``config.json``, have some kilobytes."""

MAX_LIST_BYTES = 16 * MIB
"""Files with an entry for each tensor or each added token."""

MAX_DEPTH = 64
"""Objects and lists inside one another; the files of models nest about six."""

MAX_SHOWN = 60
"""Characters of a wrong value that a message repeats."""

MAX_ID = 2**31 - 1
"""Token ids and sizes are held in 32 bits."""


@dataclass(frozen=True, slots=True)
class Field:
    """What a field of a JSON object may hold; one that is absent or null passes."""

    words: str  # completes "is not …"
    holds: Callable[[Any], bool]


def whole(low: int, high: int) -> Field:
    """A whole number between two bounds, both included."""
    words = f"a whole number from {low} to {high}"
    return Field(words, lambda value: type(value) is int and low <= value <= high)


def number(low: float, high: float = math.inf) -> Field:
    """A number between two bounds, both included, and not NaN."""
    words = f"a number from {low:g} to {high:g}" if math.isfinite(high) else f"at least {low:g}"
    return Field(words, lambda value: type(value) in {int, float} and low <= value <= high)


def list_of(kind: type, words: str) -> Field:
    """A list of values of one type, which ``words`` names in the plural."""
    return Field(
        f"a list of {words}",
        lambda value: isinstance(value, list) and all(isinstance(item, kind) for item in value),
    )


TEXT = Field("text", lambda value: isinstance(value, str))
SWITCH = Field("true or false", lambda value: isinstance(value, bool))
OBJECT = Field("an object", lambda value: isinstance(value, dict))


def shown(value: object) -> str:
    """A value for a message, cut where it is long."""
    # A long text is cut before it is quoted, and a collection is named by its size alone.
    if isinstance(value, list | dict) and len(value) > 1:
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)}"
    text = repr(value[: MAX_SHOWN + 1] if isinstance(value, str) else value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}…"


def check_fields(
    content: Mapping[str, Any], fields: Mapping[str, Field], required: Iterable[str] = ()
) -> None:
    """Raise ``ValueError`` with name and value of the first field that holds something else."""
    for name, field in fields.items():
        value = content.get(name)
        if value is not None and not field.holds(value):
            raise ValueError(f"{name}: {shown(value)} is not {field.words}")
    for name in required:
        if content.get(name) is None:
            raise ValueError(f"{name}: it is missing")


def read_object(
    path: Path, fields: Mapping[str, Field] | None = None, max_bytes: int = MAX_BYTES
) -> dict[str, Any]:
    """Read a JSON object whose listed fields hold what they should.

    Raises:
        ValueError: it is larger, deeper or of another kind.
        OSError: it cannot be read.
    """
    content = read_json(path, max_bytes)
    if not isinstance(content, dict):
        raise ValueError("not a JSON object")  # noqa: TRY004  # the file's fault
    check_fields(content, fields or {})
    return content


def read_json(path: Path, max_bytes: int = MAX_BYTES) -> Any:
    """Read a JSON file; errors as in :func:`read_object`."""
    with path.open("rb") as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise ValueError(f"more than {max_bytes} bytes, which no such file needs")
    return parse_json(data)


def parse_json(data: bytes | str) -> Any:
    """Parse JSON in UTF-8 that is not nested deeper than :data:`MAX_DEPTH`, or ``ValueError``."""
    try:
        content = json.loads(data if isinstance(data, str) else data.decode("utf-8"))
    except RecursionError:
        raise ValueError(f"nested deeper than {MAX_DEPTH}") from None
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from error
    _check_depth(content)
    return content


def _check_depth(content: Any) -> None:
    level: list[Any] = [[content]]
    for _ in range(MAX_DEPTH + 1):
        items = [part.values() if isinstance(part, dict) else part for part in level]
        level = [item for part in items for item in part if isinstance(item, dict | list)]
        if not level:
            return
    raise ValueError(f"nested deeper than {MAX_DEPTH}")
