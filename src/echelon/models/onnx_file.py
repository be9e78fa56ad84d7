"""Reads ONNX files without the ``onnx`` package: weights of int8 files, and sizes of tables.

An ONNX file is one protobuf message, whose fields have a number, a kind and a value. Field numbers
are those of ``onnx.proto``, which never change. No torch.
"""

from __future__ import annotations

import math
import mmap
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from echelon.errors import BadCheckpoint

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    import numpy.typing as npt

    from echelon.types import FloatArray

    Array = npt.NDArray[np.generic]
    Message = dict[int, list["Field"]]

Field = int | memoryview
"""A number, or the bytes of a text, a nested message, packed numbers or a fixed-width number."""

_VARINT, _EIGHT_BYTES, _SIZED, _FOUR_BYTES = 0, 1, 2, 5
_FIXED_SIZES = {_EIGHT_BYTES: 8, _FOUR_BYTES: 4}
_VARINT_MAX_BYTES = 10
_CONTINUES = 0x80


def fields(data: memoryview) -> dict[int, list[Field]]:
    """Split a message into fields: number → values; ``ValueError`` if it is not protobuf."""
    found: dict[int, list[Field]] = {}
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        value, at = _value(data, at, key & 7)
        found.setdefault(key >> 3, []).append(value)
    return found


def blob(field: Field) -> memoryview:
    """A field's bytes; ``ValueError`` for a number."""
    if isinstance(field, int):
        raise ValueError("a number stands where bytes belong")  # noqa: TRY004  # the data's fault
    return field


def text(field: Field) -> str:
    """A field as UTF-8 text; ``ValueError`` if it is not."""
    return str(blob(field), "utf-8")


def integers(items: Iterable[Field]) -> Iterator[int]:
    """Fields as signed numbers, single or packed; ``ValueError`` if packed ones are cut short."""
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


_GRAPH, _NODE, _INITIALIZER = 7, 1, 5
_NODE_INPUT, _NODE_NAME, _NODE_KIND = 1, 3, 4
_DIMS, _DATA_TYPE, _FLOATS, _INT32S, _INT64S, _NAME, _RAW, _LOCATION = 1, 2, 4, 5, 7, 8, 9, 14
_TYPES = {1: ("<f4", _FLOATS), 2: ("u1", _INT32S), 3: ("i1", _INT32S), 7: ("<i8", _INT64S)}
_EMPTY = memoryview(b"")
_DAMAGED = "The ONNX file is damaged: {}. Fetch it again."


class Node(NamedTuple):
    """One operation: its operator, name and input tensors."""

    kind: str
    name: str
    inputs: tuple[str, ...]


def read_graph(data: bytes) -> tuple[dict[str, Array], list[Node]]:
    """A model's stored tensors by name, and its operations in order."""
    try:
        graph = _message(_message(memoryview(data))[_GRAPH][-1])
        tensors = dict(_tensor(_message(item)) for item in graph.get(_INITIALIZER, ()))
        return tensors, [_node(_message(item)) for item in graph.get(_NODE, ())]
    except KeyError as error:
        raise BadCheckpoint(_DAMAGED.format(f"field {error} is missing")) from error
    except (ValueError, OverflowError) as error:
        raise BadCheckpoint(_DAMAGED.format(error)) from error


def table_rows(graph: Path) -> tuple[int | None, int | None]:
    """Rows of a graph's table of words and of its table of positions; None where not found.

    Words are what ``input_ids`` select rows of, positions are found by their usual name. Exporters
    may also fuse both into one operation.
    """
    try:
        with graph.open("rb") as file:
            content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        model = _message(_message(content)[_GRAPH][-1])
        tables = dict(_rows(_message(item)) for item in model.get(_INITIALIZER, ()))
        nodes = [_node(_message(item)) for item in model.get(_NODE, ())]
    except (KeyError, ValueError, OverflowError):
        return None, None  # written in another way than the usual one; the runtime reads it
    words = [n.inputs[0] for n in nodes if n.kind == "Gather" and n.inputs[1:2] == ("input_ids",)]
    positions = [name for name in tables if "position_embeddings.weight" in name]
    for node in nodes:
        if node.kind == "EmbedLayerNormalization":
            words, positions = list(node.inputs[2:3]), list(node.inputs[3:4])
    rows, places = (
        next((tables[name] for name in names if tables.get(name)), None)
        for names in (words, positions)
    )
    return rows, places


def _rows(message: Message) -> tuple[str, int | None]:
    """Name of a tensor, and its rows if it is a table."""
    name = text(message.get(_NAME, [_EMPTY])[-1])
    match tuple(integers(message.get(_DIMS, ()))):
        case rows, _:
            return name, rows
    return name, None


def float_weights(data: bytes) -> dict[str, FloatArray]:
    """A model's weights as float32, with the names and layout of torch.

    A quantised tensor means ``(q - zero_point) * scale``, per tensor or per last axis. ONNX
    multiplies by [in, out] where a torch Linear keeps [out, in], and exports rename such tensors:
    they are transposed and named after the layer that multiplies by them.
    """
    tensors, nodes = read_graph(data)
    layers = {node.inputs[1]: node for node in nodes if node.kind == "MatMulInteger"}
    weights: dict[str, FloatArray] = {}
    for name, tensor in tensors.items():
        base = name.removesuffix("_quantized")
        if name in layers:  # /bert/pooler/dense/Gemm_MatMul_quant → bert.pooler.dense.weight
            layer = layers[name].name.rpartition("/")[0].strip("/").replace("/", ".")
            weights[f"{layer}.weight"] = _contiguous(_dequantised(base, tensors).T)
        elif base != name:
            weights[base] = _contiguous(_dequantised(base, tensors))
        elif tensor.dtype == np.float32 and not name.endswith("_scale"):
            weights[name] = _contiguous(tensor)
    return weights


def _contiguous(array: Array) -> FloatArray:
    return np.ascontiguousarray(array, dtype=np.float32)  # safetensors ignores strides


def _dequantised(base: str, tensors: dict[str, Array]) -> FloatArray:
    needed = [f"{base}_{part}" for part in ("quantized", "zero_point", "scale")]
    if missing := [name for name in needed if name not in tensors]:
        raise BadCheckpoint(_DAMAGED.format(f"it has no tensor {missing[0]}"))
    q, zero, scale = (tensors[name].astype(np.float32) for name in needed)
    if not {zero.size, scale.size} <= {1, *q.shape[-1:]}:
        raise BadCheckpoint(_DAMAGED.format(f"the scale of {base} does not fit its shape"))
    plain: FloatArray = (q - zero.ravel()) * scale.ravel()
    return plain


def _message(field: Field) -> Message:
    return fields(blob(field))


def _node(message: Message) -> Node:
    kind, name = (text(message.get(key, [_EMPTY])[-1]) for key in (_NODE_KIND, _NODE_NAME))
    inputs = tuple(text(item) for item in message.get(_NODE_INPUT, ()))
    if kind == "MatMulInteger" and not inputs[1:]:
        raise ValueError(f"node {name} multiplies by nothing")
    return Node(kind, name, inputs)


def _tensor(message: Message) -> tuple[str, Array]:
    name, code = text(message[_NAME][-1]), message[_DATA_TYPE][-1]
    elsewhere = any(integers(message.get(_LOCATION, ())))
    if not isinstance(code, int) or code not in _TYPES or elsewhere:
        raise ValueError(f"tensor {name} is of a type, or in a place, that is not read here")
    shape = tuple(integers(message.get(_DIMS, ())))
    flat = _values(message, *_TYPES[code])
    if min(shape, default=0) < 0 or flat.size != math.prod(shape):
        raise ValueError(f"tensor {name} has {flat.size} values for the shape {shape}")
    return name, flat.reshape(shape)


def _values(message: Message, dtype: str, numbers: int) -> Array:
    if _RAW in message:
        return np.frombuffer(blob(message[_RAW][-1]), dtype)
    items = message.get(numbers, ())
    if numbers == _FLOATS:  # packed or one by one, they are bytes in the right order
        return np.frombuffer(b"".join(blob(item) for item in items), dtype)
    return np.array(list(integers(items)), dtype)
