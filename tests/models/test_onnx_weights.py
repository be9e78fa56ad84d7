"""The ONNX reader against models that the onnx package writes, whole, cut short and damaged."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from echelon.errors import BadCheckpoint
from echelon.models import onnx_file as onnx_weights
from echelon.models.onnx_file import float_weights, read_graph

KINDS = {np.float32: TensorProto.FLOAT, np.int8: TensorProto.INT8, np.uint8: TensorProto.UINT8}


def tensor(name: str, array: np.ndarray, *, raw: bool = True) -> TensorProto:
    if raw:
        return numpy_helper.from_array(array, name)
    kind = KINDS[array.dtype.type]
    return helper.make_tensor(name, kind, array.shape, array.ravel().tolist())


def model(tensors: list[TensorProto], nodes: list[onnx.NodeProto] | None = None) -> bytes:
    graph = helper.make_graph(nodes or [], "graph", [], [], tensors)
    return helper.make_model(graph).SerializeToString()


def quantised(
    name: str, q: np.ndarray, zero: np.ndarray, scale: np.ndarray, *, raw: bool = False
) -> list[TensorProto]:
    return [
        tensor(f"{name}_scale", scale.astype(np.float32), raw=raw),
        tensor(f"{name}_zero_point", zero.astype(q.dtype), raw=raw),
        tensor(f"{name}_quantized", q, raw=raw),
    ]


def multiply(layer: str, weight: str) -> onnx.NodeProto:
    inputs = ["x_quantized", weight, "x_zero_point"]
    return helper.make_node("MatMulInteger", inputs, ["y"], name=f"/{layer}/MatMul_quant")


SMALL = model(
    [
        tensor("bert.bias", np.array([1.5, -2.0], np.float32)),
        *quantised(
            "onnx::MatMul_7",
            np.array([[1, -128, 3], [4, 5, 127]], np.int8),
            np.array(-1),
            np.array(0.5),
        ),
        *quantised("bert.words.weight", np.array([[0, 255]], np.uint8), np.array(9), np.array(2.0)),
    ],
    [multiply("bert/layer.0/query", "onnx::MatMul_7_quantized")],
)


def test_names_layouts_and_values() -> None:
    weights = float_weights(SMALL)

    assert set(weights) == {"bert.bias", "bert.layer.0.query.weight", "bert.words.weight"}
    assert weights["bert.bias"].tolist() == [1.5, -2.0]
    assert weights["bert.layer.0.query.weight"].tolist() == [[1.0, 2.5], [-63.5, 3.0], [2.0, 64.0]]
    assert weights["bert.words.weight"].tolist() == [[-18.0, 492.0]]


def test_weights_are_contiguous_floats() -> None:
    """safetensors writes an array's memory without looking at its strides."""
    for weight in float_weights(SMALL).values():
        assert weight.dtype == np.float32
        assert weight.flags.c_contiguous


@given(
    data=st.data(),
    dtype=st.sampled_from([np.int8, np.uint8]),
    shape=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    raw=st.booleans(),
    per_column=st.booleans(),
    matmul=st.booleans(),
)
def test_dequantising_per_tensor_and_per_column(
    *,
    data: st.DataObject,
    dtype: type,
    shape: tuple[int, int],
    raw: bool,
    per_column: bool,
    matmul: bool,
) -> None:
    limits = np.iinfo(dtype)
    numbers = st.integers(int(limits.min), int(limits.max))
    columns = shape[1] if per_column else 1
    q = np.array(data.draw(st.lists(numbers, min_size=25, max_size=25)), dtype)
    q = q[: shape[0] * shape[1]].reshape(shape)
    zero = np.array(data.draw(st.lists(numbers, min_size=columns, max_size=columns)), dtype)
    steps = st.floats(2**-10, 10, width=32)
    scale = np.array(data.draw(st.lists(steps, min_size=columns, max_size=columns)), np.float32)
    nodes = [multiply("a/b", "w_quantized")] if matmul else []

    weights = float_weights(model(quantised("w", q, zero, scale, raw=raw), nodes))

    plain = (q.astype(np.float64) - zero.astype(np.float64)) * scale
    expected = ("a.b.weight", plain.T) if matmul else ("w", plain)
    np.testing.assert_allclose(weights[expected[0]], expected[1], rtol=1e-6)


def test_typed_values_are_read_like_raw_ones() -> None:
    arrays = [
        np.array([[-128, -1], [0, 127]], np.int8),
        np.array([0, 128, 255], np.uint8),
        np.array([-1.5, 3e38], np.float32),
        np.array(7.25, np.float32),
    ]
    for array in arrays:
        for raw in (False, True):
            read, _ = read_graph(model([tensor("t", array, raw=raw)]))
            assert read["t"].dtype == array.dtype
            np.testing.assert_array_equal(read["t"], array)


def test_integers_of_64_bits_are_read_with_their_sign() -> None:
    numbers = np.array([-1, 2**62, -(2**63)], np.int64)
    typed = helper.make_tensor("t", TensorProto.INT64, numbers.shape, numbers.tolist())
    for stored in (typed, numpy_helper.from_array(numbers, "t")):
        np.testing.assert_array_equal(read_graph(model([stored]))[0]["t"], numbers)


def test_every_cut_is_noticed() -> None:
    whole = float_weights(SMALL)
    graph_ends = SMALL.rindex(b"MatMul_quant") + len(b"MatMul_quant")
    for length in range(len(SMALL)):
        try:
            weights = float_weights(SMALL[:length])
        except BadCheckpoint:
            continue
        assert length > graph_ends, "a cut model passed for a whole one"
        assert weights.keys() == whole.keys()


@given(st.data())
def test_damage_is_a_bad_checkpoint_or_goes_unseen(data: st.DataObject) -> None:
    """Whatever the bytes, nothing but BadCheckpoint may come out of the reader."""
    damaged = bytearray(SMALL)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(SMALL) - 1))] = data.draw(st.integers(0, 255))
    try:
        read_graph(bytes(damaged))
    except BadCheckpoint as error:
        assert "damaged" in str(error)  # noqa: PT017  # success is allowed too


@given(st.binary(max_size=64))
def test_noise_is_a_bad_checkpoint_or_empty(noise: bytes) -> None:
    try:
        tensors, nodes = read_graph(noise)
    except BadCheckpoint:
        return
    assert len(tensors) + len(nodes) <= len(noise)


def _without(name: str) -> list[TensorProto]:
    one = np.array(1)
    return [t for t in quantised("w", np.ones((2, 2), np.int8), one, one) if t.name != name]


def _elsewhere() -> TensorProto:
    stored = tensor("w", np.ones(2, np.float32))
    stored.data_location = TensorProto.EXTERNAL
    return stored


def _short() -> TensorProto:
    stored = tensor("w", np.ones(4, np.float32))
    stored.dims[0] = 5
    return stored


def _negative() -> TensorProto:
    stored = tensor("w", np.ones(1, np.float32))
    stored.dims[:] = [-1, -1]
    return stored


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "field 7 is missing"),
        (b"PK\x03\x04 not ONNX", "damaged"),
        (model(_without("w_scale")), "no tensor w_scale"),
        (model(_without("w_zero_point")), "no tensor w_zero_point"),
        (
            model(quantised("w", np.ones((2, 3), np.int8), np.array(0), np.array([1.0, 2.0]))),
            "scale of w does not fit",
        ),
        (model([_elsewhere()]), "in a place"),
        (model([numpy_helper.from_array(np.array(["a"], object), "w")]), "of a type"),
        (model([_short()]), r"4 values for the shape \(5,\)"),
        (model([_negative()]), "1 values for the shape"),
        (model([], [helper.make_node("MatMulInteger", ["x"], ["y"], name="n")]), "by nothing"),
    ],
)
def test_what_is_wrong_is_named(data: bytes, problem: str) -> None:
    with pytest.raises(BadCheckpoint, match=problem):
        float_weights(data)


def test_a_multiplied_tensor_that_is_not_quantised() -> None:
    data = model([tensor("w", np.ones((2, 2), np.float32))], [multiply("a", "w")])

    with pytest.raises(BadCheckpoint, match="no tensor w_quantized"):
        float_weights(data)


@pytest.mark.parametrize(
    ("items", "numbers"),
    [
        ([5, 300], [5, 300]),
        ([memoryview(b"\x05\xac\x02")], [5, 300]),
        ([(1 << 64) - 2], [-2]),
        ([memoryview(b"\xfe" + b"\xff" * 8 + b"\x01"), 1], [-2, 1]),
    ],
)
def test_numbers_come_one_by_one_or_packed(
    items: list[onnx_weights.Field], numbers: list[int]
) -> None:
    assert list(onnx_weights.integers(items)) == numbers


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"\x08", "middle of a number"),
        (b"\x08" + b"\xff" * 11, "middle of a number"),
        (b"\x0a\x05abc", "middle of a field"),
        (b"\x0d\x00\x00", "middle of a field"),
        (b"\x0b", "unknown kind"),
    ],
)
def test_a_message_that_cannot_be_split(data: bytes, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        onnx_weights.fields(memoryview(data))


def test_a_message_is_split_by_number_and_kind() -> None:
    data = b"\x08\x96\x01\x12\x02hi\x08\x01\x1d\x00\x00\x80\x3f\x21" + bytes(8)

    assert onnx_weights.fields(memoryview(data)) == {
        1: [150, 1],
        2: [b"hi"],
        3: [b"\x00\x00\x80\x3f"],
        4: [bytes(8)],
    }
