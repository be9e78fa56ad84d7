"""Cross-encoders as ONNX graphs, for machines without torch. Steps are padded. No torch."""

from __future__ import annotations

import mmap
import re
from typing import TYPE_CHECKING, Any

import numpy as np

from echelon.errors import BadCheckpoint, MissingDependency, UnsupportedModel
from echelon.files import MAX_LIST_BYTES
from echelon.models.architecture import (
    NATIVE_FAMILIES,
    TOKENIZER_CONFIG,
    choose_label,
    labels_of,
    names_labels,
    padding_id,
    read_config,
    read_settings,
)
from echelon.models.base import (
    INPUTS,
    UNBOUNDED_MAX_TOKENS,
    DeviceOutOfMemory,
    first_line,
    listed,
    outputs_a_pair,
    pad,
    probe_step,
)
from echelon.models.device import cpu_name
from echelon.models.heap import give_back
from echelon.models.onnx_file import table_rows
from echelon.types import ModelInfo

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from echelon.types import FloatArray, TokenBatch


FILES = (
    "model.onnx",
    "onnx/model.onnx",
    "model_quantized.onnx",
    "onnx/model_quantized.onnx",
    "model_int8.onnx",
    "onnx/model_int8.onnx",
)
"""Paths that exporters use, in the order in which they are tried."""

MEMORY_ERRORS = re.compile(r"bad allocation|std::bad_alloc|Failed to allocate memory")

INT8_OPERATORS = (b"MatMulInteger", b"QLinearMatMul", b"DynamicQuantizeLinear", b"QuantizeLinear")


def find_graph(folder: Path) -> Path | None:
    """The folder's ONNX file, or None."""
    return next((folder / name for name in FILES if (folder / name).is_file()), None)


class OnnxScorer:
    """A :class:`~echelon.models.base.Scorer` that runs an ONNX graph on CPU.

    Args:
        graph: the file.
        config: the folder's configuration, see :func:`graph_config`.
        threads: of a forward pass.
        label: the output that is the score, by name or number; None if there is one only.

    Raises:
        InvalidInput: the graph has several outputs a pair, and ``label`` names none of them.
        ModelError: the graph is damaged, has other inputs or outputs than a classifier of pairs, or
            is not the one that its configuration describes.
    """

    def __init__(
        self, graph: Path, config: dict[str, Any], threads: int, label: str | int | None
    ) -> None:
        self._session: Any = _open(graph, threads)
        self._kinds = _input_kinds(graph, self._session.get_inputs())
        self._output = _output_name(graph, [node.name for node in self._session.get_outputs()])
        self._padding_id = config.get("pad_token_id") or 0
        self._label = choose_label(_labels(graph, config, self._probe(graph)), label)
        self.info = ModelInfo(
            family=config["model_type"],
            device="cpu",
            device_name=cpu_name(),
            precision=graph_precision(graph),
            max_tokens=_max_tokens(graph, config),
            padding="rectangular",
            weights_bytes=graph.stat().st_size,
            threads=threads,
        )

    def score(self, batch: TokenBatch) -> FloatArray:
        """Score one step; see :class:`~echelon.models.base.Scorer`."""
        try:
            (logits,) = self._session.run([self._output], self._feed(batch))
        except Exception as error:  # the runtime's own errors share no class but this
            if not MEMORY_ERRORS.search(str(error)):
                raise
            raise DeviceOutOfMemory(str(error)) from None
        scores = np.asarray(logits, dtype=np.float32).reshape(len(batch), -1)
        return scores[:, self._label]

    def release(self) -> None:
        """Return freed memory to the system; the session has no cache, its arena is off."""
        give_back()

    def close(self) -> None:
        """Free the session."""
        self._session = None
        give_back()

    def _feed(self, batch: TokenBatch) -> dict[str, Any]:
        padded = pad(batch, self._padding_id)
        return {name: padded[name].astype(kind) for name, kind in self._kinds.items()}

    def _probe(self, graph: Path) -> int:
        """Outputs a pair, from a step of two pairs that are as short as they can be."""
        step = probe_step()
        try:
            (logits,) = self._session.run([self._output], self._feed(step))
        except Exception as error:  # the runtime's own errors share no class but this
            raise BadCheckpoint(
                f"{graph}: it cannot score a pair ({first_line(error)}). {EXPORT}"
            ) from error
        return outputs_a_pair(graph, step, logits)


EXPORT = "Export the cross-encoder as a sequence classifier, with axes of any length."


def _input_kinds(graph: Path, nodes: Iterable[Any]) -> dict[str, str]:
    """Inputs by name, each with its integer type."""
    kinds = {"tensor(int64)": "int64", "tensor(int32)": "int32"}
    found = {node.name: f"{node.name} {node.type}" for node in nodes}
    unknown = found.keys() - INPUTS
    if unknown or not {"input_ids", "attention_mask"} <= found.keys():
        raise UnsupportedModel(
            f"{graph}: its inputs are {listed(found)}; those of a cross-encoder are "
            f"{', '.join(INPUTS)}, of which the last may be missing. {EXPORT}"
        )
    if wrong := [words for name, words in found.items() if words[len(name) + 1 :] not in kinds]:
        raise UnsupportedModel(f"{graph}: {listed(wrong)} is not of whole numbers. {EXPORT}")
    return {node.name: kinds[node.type] for node in nodes}


def _output_name(graph: Path, names: list[str]) -> str:
    if "logits" in names:
        return "logits"
    if len(names) != 1:
        raise UnsupportedModel(
            f"{graph}: its outputs are {listed(names)}, and none is called logits. {EXPORT}"
        )
    return names[0]


def _labels(graph: Path, config: dict[str, Any], outputs: int) -> tuple[str, ...]:
    """Names of the outputs; numbers where the configuration does not say how many there are."""
    if not names_labels(config):
        return tuple(map(str, range(outputs)))
    labels = labels_of(config)
    if len(labels) != outputs:
        raise BadCheckpoint(
            f"{graph}: it gives {outputs} outputs a pair, and config.json names {len(labels)} "
            "labels. Use the config.json that came with this graph."
        )
    return labels


def graph_precision(graph: Path) -> str:
    """``int8`` if the graph multiplies integers, else ``fp32``."""
    with graph.open("rb") as file:
        if not file.read(1):
            raise BadCheckpoint(f"{graph}: the file is empty. Export or download it again.")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return "int8" if any(content.find(name) >= 0 for name in INT8_OPERATORS) else "fp32"


def graph_config(folder: Path) -> dict[str, Any]:
    """The folder's configuration, or one for a graph that was exported without it."""
    if (folder / "config.json").is_file():
        return read_config(folder)
    limit = UNBOUNDED_MAX_TOKENS
    settings = folder / "tokenizer_config.json"
    if settings.is_file():
        named = read_settings(settings, TOKENIZER_CONFIG, MAX_LIST_BYTES).get("model_max_length")
        limit = int(min(limit, named or limit))
    return {"model_type": "onnx", "model_max_length": limit}


def _max_tokens(graph: Path, config: dict[str, Any]) -> int:
    """Longest pair: what the configuration says, which the table of positions must hold."""
    said, rows = config.get("max_position_embeddings"), table_rows(graph)[1]
    if said is not None and rows is not None and said > rows:
        raise BadCheckpoint(
            f"{graph}: its table of positions has {rows} rows, and config.json says "
            f"max_position_embeddings: {said}. Use the config.json that came with this graph."
        )
    limit = config.get("model_max_length") or UNBOUNDED_MAX_TOKENS
    positions: int = said or min(limit, rows or limit)
    family = NATIVE_FAMILIES.get(config["model_type"])
    if family is None or not family.positions_after_padding:
        return positions
    return positions - padding_id(config) - 1


def _open(graph: Path, threads: int) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependency(
            "This model is an ONNX graph and onnxruntime is not installed.", "onnx"
        ) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # The arena only ever grows, to the largest step that was ever run.
    options.enable_cpu_mem_arena = False
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime's own errors share no class but this
        raise BadCheckpoint(
            f"{graph}: ONNX Runtime cannot load it ({first_line(error)}). "
            "Export or download it again."
        ) from error
