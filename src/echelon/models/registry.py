"""Model folder to scorer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from echelon.errors import InvalidInput, OutOfMemory
from echelon.models.architecture import (
    LayerPlan,
    choose_label,
    has_weights,
    labels_of,
    native_architecture,
    read_config,
    require_head,
)
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

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    import torch

    from echelon.models.base import Scorer
    from echelon.types import TokenBatch


def open_scorer(
    folder: Path,
    *,
    device: str = "auto",
    precision: str = "auto",
    threads: int | None = None,
    label: str | int | None = None,
    keep_bf16: Iterable[str] = (),
) -> Scorer:
    """Load the model in ``folder``.

    Args:
        folder: ``config.json`` and weights.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        precision: ``auto``, ``fp32``, ``bf16``, ``fp16`` or ``int8``.
        threads: CPU threads; None is what the process may use.
        label: which output of a head with several to score.
        keep_bf16: linear layers that int8 leaves in bf16, as :func:`layer_errors` names them.

    Raises:
        ModelError: it is not there, damaged, or of an unsupported kind.
        InvalidInput: the device is not there, or a label must be chosen.
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
        failed = str(error)
    raise weights_do_not_fit(folder, str(chosen), precision, failed)


def require_model(folder: Path) -> None:
    """Refuse a folder that holds no model at all.

    Raises:
        ModelNotFound: no ``config.json`` and no ONNX graph.
        BadCheckpoint: a ``config.json`` that cannot be read.
    """
    if find_graph(folder) is None:
        read_config(folder)


def graph_to_use(folder: Path) -> Path | None:
    """The folder's ONNX graph, where it has no other weights or torch is not installed."""
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


def may_choose_int8(folder: Path, device: str) -> bool:
    """Whether a model can run in int8 or in fp32: a graph has one precision, its own."""
    return "int8" in precisions_to_compare(folder, device)[1:]


def layer_errors(folder: Path, batches: Iterable[TokenBatch]) -> dict[str, float]:
    """Relative error that int8 makes in each linear layer's output, worst first.

    Args:
        folder: a native model.
        batches: steps to run; what they put through the layers is what errors are measured on.
    """
    architecture = native_architecture(folder, read_config(folder))
    if architecture is None:
        raise RuntimeError("This is a bug: only native models have int8 layers.")
    from echelon.models.checkpoint import Checkpoint
    from echelon.models.encoder_weights import open_native

    errors: dict[str, float] = {}
    plan = LayerPlan("bf16", errors=errors)
    device = choose_device("cpu")
    scorer = open_native(
        Checkpoint(folder), architecture, device, plan, set_threads(None, device), 0
    )
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
    from echelon.models.checkpoint import Checkpoint
    from echelon.models.encoder_weights import open_native

    return open_native(Checkpoint(folder), architecture, device, plan, threads, label)


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
    config = graph_config(folder)
    chosen_label = choose_label(labels_of(config), label)
    keep_freed()
    return OnnxScorer(graph, config, threads or usable_cpus(), chosen_label)


def weights_do_not_fit(folder: Path, device: str, precision: str, reason: str) -> OutOfMemory:
    """The error for a model that is larger than the memory."""
    return OutOfMemory(
        f"{folder}: the weights do not fit on {device} in {precision} "
        f"({reason.splitlines()[0] if reason else 'out of memory'}). "
        "Free memory, choose a lower precision, another device or a smaller model."
    )
