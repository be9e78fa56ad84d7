"""Small ONNX classifiers."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

VOCABULARY = 3000


def write_graph(
    path,
    *,
    labels=1,
    inputs=("input_ids", "attention_mask"),
    kinds=None,
    axes=("n", "tokens"),
    outputs=("logits",),
    positions=None,
):
    """A classifier that averages the embeddings of the tokens that its second input marks.

    Inputs after the second are not read, ``outputs`` may also name an inner value, and
    ``positions`` adds a table of positions that is not read either. Inputs are int64 unless
    ``kinds`` says something else.
    """
    kinds = dict.fromkeys(inputs, TensorProto.INT64) | (kinds or {})
    first, second, *_ = inputs
    random = np.random.default_rng(5)
    constants = {
        "table": random.normal(size=(VOCABULARY, 8)).astype(np.float32),
        "head": random.normal(size=(8, labels)).astype(np.float32),
        "axis": np.array([2], dtype=np.int64),
        "tokens": np.array([1], dtype=np.int64),
    }
    if positions is not None:
        constants["position_embeddings.weight"] = np.zeros((positions, 8), dtype=np.float32)
    nodes = [
        helper.make_node("Gather", ["table", first], ["rows"]),
        helper.make_node("Cast", [second], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["mask", "axis"], ["column"]),
        helper.make_node("Mul", ["rows", "column"], ["kept"]),
        helper.make_node("ReduceSum", ["kept", "tokens"], ["sums"], keepdims=0),
        helper.make_node("ReduceSum", ["mask", "tokens"], ["counts"], keepdims=1),
        helper.make_node("Div", ["sums", "counts"], ["means"]),
        helper.make_node("MatMul", ["means", "head"], ["logits"]),
    ]
    shapes = {"logits": ["n", labels], "means": ["n", 8], "rows": ["n", "tokens", 8]}
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "toy",
        [value(name, kinds[name], axes) for name in inputs],
        [value(name, TensorProto.FLOAT, shapes[name]) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)
    return constants
