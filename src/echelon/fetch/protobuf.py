"""Protobuf's wire format: bytes → fields by number. No schema, no knowledge of ONNX.

A message is a run of fields, each a key (number and kind) and a value. What cannot be read is a
:class:`ValueError`; the caller knows which file is to blame.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

Field = int | memoryview
"""A number, or the bytes of a text, a nested message, packed numbers or a fixed-width number."""

_VARINT, _EIGHT_BYTES, _SIZED, _FOUR_BYTES = 0, 1, 2, 5
_FIXED_SIZES = {_EIGHT_BYTES: 8, _FOUR_BYTES: 4}
_VARINT_MAX_BYTES = 10
_CONTINUES = 0x80


def fields(data: memoryview) -> dict[int, list[Field]]:
    """Split a message into its fields: number → values, in order.

    Raises:
        ValueError: the message is cut short or is not protobuf.
    """
    found: dict[int, list[Field]] = {}
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        value, at = _value(data, at, key & 7)
        found.setdefault(key >> 3, []).append(value)
    return found


def blob(field: Field) -> memoryview:
    """Take a field as bytes.

    Raises:
        ValueError: it is a number.
    """
    if isinstance(field, int):
        raise ValueError("a number stands where bytes belong")  # noqa: TRY004  # the data's fault
    return field


def text(field: Field) -> str:
    """Take a field as UTF-8 text.

    Raises:
        ValueError: it is not.
    """
    return str(blob(field), "utf-8")


def integers(items: Iterable[Field]) -> Iterator[int]:
    """Take fields as signed numbers, whether they come one by one or packed.

    Raises:
        ValueError: packed numbers are cut short.
    """
    for item in items:
        for number in [item] if isinstance(item, int) else _unpacked(item):
            yield number - (1 << 64) if number >> 63 else number


def _unpacked(data: memoryview) -> Iterator[int]:
    at = 0
    while at < len(data):
        number, at = _varint(data, at)
        yield number


def _value(data: memoryview, at: int, kind: int) -> tuple[Field, int]:
    if kind == _VARINT:
        return _varint(data, at)
    if kind == _SIZED:
        size, at = _varint(data, at)
    elif kind in _FIXED_SIZES:
        size = _FIXED_SIZES[kind]
    else:
        raise ValueError(f"unknown kind of field: {kind}")
    if at + size > len(data):
        raise ValueError("it ends in the middle of a field")
    return data[at : at + size], at + size


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    number = 0
    for i, byte in enumerate(data[at : at + _VARINT_MAX_BYTES]):
        number |= (byte & ~_CONTINUES) << 7 * i
        if byte < _CONTINUES:
            return number, at + i + 1
    raise ValueError("it ends in the middle of a number")
