"""Open the model in a folder: choose the scorer for its files and family, and load it.

:mod:`echelon.models.families` lists the families that run natively.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from echelon.errors import DeviceLost, InvalidInput, OutOfMemory
from echelon.models.architecture import (
    LayerPlan,
    check_tokens,
    choose_label,
    has_weights,
    labels_of,
    read_config,
)
from echelon.models.device import (
    candidate_precisions,
    choose_device,
    choose_precision,
    device_name,
    has_torch,
    multiplies_float8,
    require_torch,
    set_threads,
    usable_cpus,
)
from echelon.models.drivers import surely_no_card
from echelon.models.families import FAMILIES, native_model
from echelon.models.faults import kind_of
from echelon.models.heap import keep_freed
from echelon.models.onnx import OnnxScorer, find_graph, graph_config, graph_precision
from echelon.models.onnx_file import table_rows
from echelon.models.prompts import prompt_of

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    import torch

    from echelon.models.base import Scorer
    from echelon.types import Prompt, TokenBatch, TokenIds


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
        DeviceLost: the device failed.
    """
    graph = graph_to_use(folder)
    if graph is not None:
        return _open_graph(folder, graph, device, precision, threads, label)
    require_torch()
    config = read_config(folder)
    native = native_model(folder, config)
    labels = labels_of(config) if native is None else native.shape.labels
    chosen_label = choose_label(labels, label)
    chosen = choose_device(device)
    usual = None if native is None else native.family.half
    precision = choose_precision(precision, chosen, usual)
    used = set_threads(threads, chosen)
    if chosen.type == "cpu":
        keep_freed()
    try:
        plan = LayerPlan(precision, frozenset(keep_bf16))
        if native is not None:
            return native.open(chosen, plan, used, chosen_label)
        return _open_generic(folder, config, chosen, plan, used, chosen_label)
    except (RuntimeError, MemoryError) as error:
        kind = kind_of(error)
        if kind == "other":
            raise
        if kind == "lost":
            raise DeviceLost(str(error)) from error
        reason = (str(error) or "out of memory").splitlines()[0]
    need = more = ""
    if native is not None:
        need = f", which take {native.weights_bytes(precision) / 2**30:.3g} GiB,"
        step = f"{native.step_bytes(precision) / 2**30:.3g} GiB"
        more = f"A step of one longest pair takes about {step} more. "
    raise OutOfMemory(
        f"{folder}: the weights{need} do not fit on {chosen} in {precision} ({reason}). {more}"
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
    if native_model(folder, read_config(folder)) is None:
        return [precision for precision in candidates if precision != "int8"]
    return candidates


def card_precisions(folder: Path, device: str) -> list[str]:
    """Half precisions that ``auto`` may mean on a card, the usual one first; none on CPU."""
    if device == "cpu" or surely_no_card() or runs_on_cpu(folder, device):
        return []
    native = native_model(folder, read_config(folder))
    usual = None if native is None else native.family.half
    return sorted(precisions_to_compare(folder, device)[1:], key=lambda half: half != usual)


def runs_in(folder: Path, device: str, precision: str) -> bool:
    """Whether a model can run in a precision on a device, without being slow or inexact."""
    if precision == "fp8":  # only where it is asked for: no card has been measured yet
        on_card = not (device == "cpu" or surely_no_card() or runs_on_cpu(folder, device))
        return on_card and multiplies_float8(choose_device(device))
    return precision in precisions_to_compare(folder, device)


def card_name(device: str) -> str:
    """What the driver calls the card of a device."""
    return device_name(choose_device(device))


def layer_errors(folder: Path, batches: Iterable[TokenBatch]) -> dict[str, float]:
    """Relative error of each linear layer in int8 on ``batches``, largest first."""
    native = native_model(folder, read_config(folder))
    if native is None:
        raise RuntimeError("This is a bug: only native models have int8 layers.")
    errors: dict[str, float] = {}
    device = choose_device("cpu")
    plan = LayerPlan("bf16", errors=errors)
    scorer = native.open(device, plan, set_threads(None, device), 0)
    for batch in batches:
        scorer.score(batch)
    scorer.close()
    return dict(sorted(errors.items(), key=lambda item: -item[1]))


def model_prompt(folder: Path) -> Prompt | None:
    """The prompt of a language model; None for a classifier, which reads plain pairs."""
    return None if graph_to_use(folder) is not None else prompt_of(folder, read_config(folder))


def _open_generic(
    folder: Path,
    config: dict[str, Any],
    device: torch.device,
    plan: LayerPlan,
    threads: int,
    label: int,
) -> Scorer:
    if plan.precision in {"int8", "fp8"}:
        families = "; ".join(family.name for family in FAMILIES)
        raise InvalidInput(
            "precision",
            f"{plan.precision} is not built for {config['model_type']} models",
            f"Use auto, fp32 or bf16; {plan.precision} is there for {families}.",
        )
    from echelon.models.transformers import GenericScorer

    return GenericScorer(folder, config, device, plan.precision, threads, label)


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
