"""Cross-encoders as ONNX graphs, for machines without torch; steps are padded. No torch."""

from __future__ import annotations

import mmap
import re
from typing import TYPE_CHECKING, Any

import numpy as np

from echelon.errors import BadCheckpoint, MissingDependency, UnsupportedModel
from echelon.models.architecture import NATIVE_FAMILIES, padding_id, read_config, read_object
from echelon.models.base import UNBOUNDED_MAX_TOKENS, DeviceOutOfMemory, pad
from echelon.models.device import cpu_name, give_back
from echelon.types import ModelInfo

if TYPE_CHECKING:
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

    Raises:
        MissingDependency: onnxruntime is not installed.
        BadCheckpoint: the file cannot be read.
        UnsupportedModel: it is no sequence classifier.
    """

    def __init__(self, graph: Path, config: dict[str, Any], threads: int, label: int) -> None:
        self._session: Any = _open(graph, threads)
        self._inputs = {node.name for node in self._session.get_inputs()}
        if "input_ids" not in self._inputs:
            raise UnsupportedModel(
                f"{graph}: no input called input_ids (there are {', '.join(sorted(self._inputs))})."
                " Export the cross-encoder as a sequence classifier."
            )
        self._label = label
        self._padding_id = int(config.get("pad_token_id") or 0)
        self.info = ModelInfo(
            family=config["model_type"],
            device="cpu",
            device_name=cpu_name(),
            precision=graph_precision(graph),
            max_tokens=_max_tokens(config),
            padding="rectangular",
            weights_bytes=graph.stat().st_size,
            threads=threads,
        )

    def score(self, batch: TokenBatch) -> FloatArray:
        """Score one step; see :class:`~echelon.models.base.Scorer`."""
        try:
            (logits, *_) = self._session.run(None, self._feed(batch))
        except Exception as error:  # the runtime's own errors share no class but this
            if not MEMORY_ERRORS.search(str(error)):
                raise
            raise DeviceOutOfMemory(str(error)) from None
        scores: FloatArray = np.asarray(logits, dtype=np.float32)[:, self._label]
        return scores

    def release(self) -> None:
        """Return freed memory to the system; the session has no cache, its arena is off."""
        give_back()

    def close(self) -> None:
        """Free the session."""
        self._session = None
        give_back()

    def _feed(self, batch: TokenBatch) -> dict[str, Any]:
        padded = pad(batch, self._padding_id).items()
        return {name: array for name, array in padded if name in self._inputs}


def graph_precision(graph: Path) -> str:
    """``int8`` if the graph multiplies integers, else ``fp32``."""
    with graph.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return "int8" if any(content.find(name) >= 0 for name in INT8_OPERATORS) else "fp32"


def graph_config(folder: Path) -> dict[str, Any]:
    """The folder's configuration, or one for a graph that was exported without it."""
    if (folder / "config.json").is_file():
        return read_config(folder)
    limit = UNBOUNDED_MAX_TOKENS
    settings = folder / "tokenizer_config.json"
    if settings.is_file():
        limit = min(limit, int(read_object(settings).get("model_max_length") or limit))
    return {"model_type": "onnx", "num_labels": 1, "max_position_embeddings": limit}


def _max_tokens(config: dict[str, Any]) -> int:
    positions = int(config.get("max_position_embeddings") or UNBOUNDED_MAX_TOKENS)
    family = NATIVE_FAMILIES.get(config["model_type"])
    if family is None or not family.positions_after_padding:
        return positions
    return positions - padding_id(config) - 1


def _open(graph: Path, threads: int) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependency(
            "This model is an ONNX graph and onnxruntime is not installed. "
            "Install it with: pip install 'echelon-rerank[onnx]'"
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
            f"{graph}: ONNX Runtime cannot load it ({str(error).splitlines()[0]}). "
            "Export or download it again."
        ) from error
