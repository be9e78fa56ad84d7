"""Model folder to scorer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from echelon.errors import InvalidInput, OutOfMemory
from echelon.score.architecture import (
    choose_label,
    has_weights,
    labels_of,
    native_architecture,
    read_config,
    require_head,
)
from echelon.score.device import (
    candidate_precisions,
    choose_device,
    choose_precision,
    has_torch,
    is_out_of_memory,
    require_torch,
    set_threads,
    usable_cpus,
)
from echelon.score.onnx import OnnxScorer, find_graph, graph_config, graph_precision

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from echelon.score.base import Scorer


def open_scorer(
    folder: Path,
    *,
    device: str = "auto",
    precision: str = "auto",
    threads: int | None = None,
    label: str | int | None = None,
) -> Scorer:
    """Load the model in ``folder``.

    Args:
        folder: ``config.json`` and weights.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        precision: ``auto``, ``fp32``, ``bf16`` or ``fp16``.
        threads: CPU threads; None is what the process may use.
        label: which output of a head with several to score.

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
    try:
        return _open_weights(folder, config, chosen, precision, used, chosen_label)
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
    return candidate_precisions(device) if graph is None else [graph_precision(graph)]


def _open_weights(
    folder: Path,
    config: dict[str, Any],
    device: torch.device,
    precision: str,
    threads: int,
    label: int,
) -> Scorer:
    architecture = native_architecture(folder, config)
    if architecture is None:
        from echelon.score.generic import GenericScorer

        return GenericScorer(folder, config, device, precision, threads, label)
    from echelon.score.checkpoint import Checkpoint
    from echelon.score.native import open_native

    return open_native(Checkpoint(folder), architecture, device, precision, threads, label)


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
    return OnnxScorer(graph, config, threads or usable_cpus(), chosen_label)


def weights_do_not_fit(folder: Path, device: str, precision: str, reason: str) -> OutOfMemory:
    """The error for a model that is larger than the memory."""
    return OutOfMemory(
        f"{folder}: the weights do not fit on {device} in {precision} "
        f"({reason.splitlines()[0] if reason else 'out of memory'}). "
        "Free memory, choose a lower precision, another device or a smaller model."
    )
