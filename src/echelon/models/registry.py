"""Open the model in a folder: choose the scorer for its files and architecture, and load it.

A new model family touches at most three files: :mod:`echelon.models.architecture`, whose
``NATIVE_FAMILIES`` lists it with its tensor names and rules; a module with its forward pass, unless
:mod:`echelon.models.encoder` runs it; and this one, where :func:`_open_weights` opens it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from echelon.errors import InvalidInput, OutOfMemory
from echelon.models.architecture import (
    LayerPlan,
    check_tokens,
    choose_label,
    has_weights,
    labels_of,
    native_architecture,
    read_config,
    require_head,
)
from echelon.models.checkpoint import Checkpoint
from echelon.models.device import (
    candidate_precisions,
    choose_device,
    choose_precision,
    has_torch,
    is_out_of_memory,
    keep_freed,
    require_torch,
    set_threads,
    usable_cpus,
)
from echelon.models.onnx import OnnxScorer, find_graph, graph_config, graph_precision
from echelon.models.onnx_file import table_rows

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    import torch

    from echelon.models.base import Scorer
    from echelon.types import TokenBatch, TokenIds


def open_scorer(
    folder: Path,
    *,
    device: str = "auto",
    precision: str = "auto",
    threads: int | None = None,
    label: str | int | None = None,
    keep_bf16: Iterable[str] = (),
) -> Scorer:
    """Load the model in ``folder``; the options are those of :class:`echelon.Reranker`.

    ``keep_bf16`` are linear layers that stay in bf16 under int8, as :func:`layer_errors` names
    them.

    Raises:
        ModelError: the model does not exist, is damaged, or of an unsupported kind.
        InvalidInput: the device does not exist, or a label must be chosen.
        OutOfMemory: the weights do not fit.
    """
    graph = graph_to_use(folder)
    if graph is not None:
        return _open_graph(folder, graph, device, precision, threads, label)
    require_torch()
    config = read_config(folder)
    require_head(folder, config)
    chosen_label = choose_label(labels_of(config), label)
    chosen = choose_device(device)
    precision = choose_precision(precision, chosen)
    used = set_threads(threads, chosen)
    if chosen.type == "cpu":
        keep_freed()
    try:
        plan = LayerPlan(precision, frozenset(keep_bf16))
        return _open_weights(folder, config, chosen, plan, used, chosen_label)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = (str(error) or "out of memory").splitlines()[0]
    raise OutOfMemory(
        f"{folder}: the weights do not fit on {chosen} in {precision} ({reason}). "
        "Free memory, choose a lower precision, another device or a smaller model."
    )


def require_model(folder: Path) -> None:
    """Raise :class:`ModelNotFound` for a folder without ``config.json`` and ONNX graph."""
    if find_graph(folder) is None:
        read_config(folder)


def check_tokenizer(folder: Path, tokens: TokenIds) -> None:
    """Raise :class:`BadCheckpoint` for a tokenizer that does not belong to the folder's model."""
    graph = graph_to_use(folder)
    config = read_config(folder) if graph is None else graph_config(folder)
    rows = None if graph is None else table_rows(graph)[0]
    check_tokens(config, tokens, rows or config.get("vocab_size"))


def graph_to_use(folder: Path) -> Path | None:
    """The folder's ONNX graph, if it has no other weights or torch is not installed."""
    graph = find_graph(folder)
    if graph is None or (has_weights(folder) and has_torch()):
        return None
    return graph


def runs_on_cpu(folder: Path, device: str) -> bool:
    """Whether a model would run on the CPU, where the number of threads matters."""
    return graph_to_use(folder) is not None or choose_device(device).type == "cpu"


def precisions_to_compare(folder: Path, device: str) -> list[str]:
    """Precisions that a model can run in on a device, the exact one first."""
    graph = graph_to_use(folder)
    if graph is not None:
        return [graph_precision(graph)]
    candidates = candidate_precisions(device)
    if native_architecture(folder, read_config(folder)) is None:
        return [precision for precision in candidates if precision != "int8"]
    return candidates


def layer_errors(folder: Path, batches: Iterable[TokenBatch]) -> dict[str, float]:
    """Relative error of each linear layer in int8 on ``batches``, largest first."""
    config = read_config(folder)
    if native_architecture(folder, config) is None:
        raise RuntimeError("This is a bug: only native models have int8 layers.")
    errors: dict[str, float] = {}
    device = choose_device("cpu")
    plan = LayerPlan("bf16", errors=errors)
    scorer = _open_weights(folder, config, device, plan, set_threads(None, device), 0)
    for batch in batches:
        scorer.score(batch)
    scorer.close()
    return dict(sorted(errors.items(), key=lambda item: -item[1]))


def _open_weights(
    folder: Path,
    config: dict[str, Any],
    device: torch.device,
    plan: LayerPlan,
    threads: int,
    label: int,
) -> Scorer:
    architecture = native_architecture(folder, config)
    if architecture is None:
        if plan.precision == "int8":
            raise InvalidInput(
                "precision",
                f"int8 is not built for {config['model_type']} models",
                "Use auto, fp32 or bf16; int8 is there for BERT, RoBERTa and XLM-RoBERTa.",
            )
        from echelon.models.transformers import GenericScorer

        return GenericScorer(folder, config, device, plan.precision, threads, label)
    from echelon.models.encoder import PackedScorer, load_weights
    from echelon.models.encoder_cuda import CudaScorer

    weights = load_weights(Checkpoint(folder), architecture, device, plan, label)
    if device.type == "cuda":
        return CudaScorer(architecture, weights, device, plan.precision)
    return PackedScorer(architecture, weights, device, plan.precision, threads)


def _open_graph(
    folder: Path,
    graph: Path,
    device: str,
    precision: str,
    threads: int | None,
    label: str | int | None,
) -> Scorer:
    if device not in {"auto", "cpu"}:
        raise InvalidInput("device", f"{device!r} cannot run an ONNX graph", "Use device='cpu'.")
    own = graph_precision(graph)
    if precision not in {"auto", own}:
        raise InvalidInput(
            "precision", f"{graph.name} computes in {own}, not {precision}", f"Use {own} or auto."
        )
    keep_freed()
    return OnnxScorer(graph, graph_config(folder), threads or usable_cpus(), label)
