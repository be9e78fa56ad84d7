"""What a model is and what it needs, before its weights are read. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from echelon.errors import UnsupportedModel
from echelon.models.architecture import labels_of, read_config
from echelon.models.families import WEIGHT_BYTES, native_model
from echelon.models.onnx import find_graph
from echelon.models.text_settings import read_text_settings

if TYPE_CHECKING:
    from pathlib import Path

SHOWN = ("fp32", "bf16", "int8")  # fp16 is as bf16


@dataclass(frozen=True, slots=True)
class ModelDescription:
    """A model in a folder."""

    model_type: str  # as in ``config.json``
    family: str | None  # the native family's name; None where it runs otherwise, or not at all
    runs: str  # ``native``, ``transformers``, ``onnx`` or ``no``
    reason: str  # why it does not run natively, or at all; empty where it does
    labels: tuple[str, ...] = ()  # of the head
    max_tokens: int | None = None  # of a pair; None where only loading it tells
    instruction: str | None = None  # what it judges by itself, or reads before each query
    weights: int | None = None  # number of weights that are loaded; None where unknown
    # bytes of a step of one longest pair by precision, about; empty where it is unknown
    step_bytes: dict[str, int] = field(default_factory=dict)

    @property
    def weights_bytes(self) -> dict[str, int]:
        """Memory of the weights by precision, in bytes; empty where it is unknown."""
        if self.weights is None:
            return {}
        return {precision: self.weights * WEIGHT_BYTES[precision] for precision in SHOWN}


def describe(folder: Path) -> ModelDescription:
    """Say what the model in a folder is; only its small files are read.

    Raises:
        ModelError: there is no model, or its files are damaged.
    """
    config = read_config(folder)
    model_type = config["model_type"]
    try:
        native = native_model(folder, config)
    except UnsupportedModel as error:
        if find_graph(folder) is None:
            return ModelDescription(model_type, None, "no", str(error))
        native = None
    if native is None:
        if find_graph(folder) is not None:
            return ModelDescription(model_type, None, "onnx", "It is an ONNX graph.")
        reason = f"Echelon has no native {model_type}: transformers runs it, with padding."
        return ModelDescription(model_type, None, "transformers", reason, labels_of(config))
    shape, prompt = native.shape, native.prompt
    return ModelDescription(
        model_type,
        native.family.name,
        "native",
        "",
        shape.labels,
        shape.max_tokens,
        read_text_settings(folder).default_prompt or (prompt.instruction if prompt else None),
        shape.weights,
        {precision: native.step_bytes(precision) for precision in SHOWN},
    )
