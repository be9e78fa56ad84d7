"""The shape of a Llama whose tokens see each other both ways, as NVIDIA's rerankers are. No torch.

Their own code calls it ``llama_bidirec``: Llama's layers without the causal mask, a pooling over
all tokens, and one product. None of that code runs here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from echelon.errors import BadCheckpoint, UnsupportedModel
from echelon.files import TEXT, check_fields, number, whole
from echelon.models.architecture import OWN_CONFIG, SHAPE
from echelon.models.prompts import prompt_of
from echelon.models.qwen import FIELDS, ROTARY_FIELDS, DecoderArchitecture, build

if TYPE_CHECKING:
    from pathlib import Path

POOLING = {"avg": "mean", "cls": "cls"}
"""``pooling`` of ``config.json`` → the head's name for it."""

OWN_FIELDS = {"pooling": TEXT, "temperature": number(1e-6)}
STRETCH_FIELDS = {
    "factor": number(1),
    "low_freq_factor": number(1e-6),
    "high_freq_factor": number(1e-6),
    "original_max_position_embeddings": whole(1, 2**31),
}


@dataclass(frozen=True, slots=True)
class LlamaStretch:
    """How rotary positions reach further than a model was trained at first (``llama3``)."""

    factor: float  # by which the longest waves grow
    low: float  # waves longer than the trained tokens over this grow whole
    high: float  # waves shorter than the trained tokens over this stay
    trained_tokens: int  # the longest text at first

    def __post_init__(self) -> None:
        if self.high <= self.low:
            raise ValueError(
                f"high_freq_factor: {self.high:g} is not above low_freq_factor={self.low:g}"
            )


@dataclass(frozen=True, slots=True)
class LlamaArchitecture(DecoderArchitecture):
    """The shape of the layers, as a decoder's, and what is read of their rows."""

    pooling: str  # ``mean`` of all rows, or ``cls``, the first
    temperature: float  # divides the logit
    stretch: LlamaStretch | None  # of the rotary positions

    reads_last: ClassVar[bool] = False


def read(folder: Path, config: dict[str, Any]) -> LlamaArchitecture:
    """The shape of a model.

    Args:
        folder: the model's, for messages.
        config: its configuration, as :func:`echelon.models.architecture.read_config` gives it.

    Raises:
        BadCheckpoint: a field is missing or wrong.
        UnsupportedModel: it has a part that does not run here; transformers has no such model.
    """
    given = {name: value for name, value in config.items() if value is not None}
    try:
        check_fields(given, FIELDS | OWN_FIELDS, SHAPE)
        check_fields(given.get("rope_parameters", {}), ROTARY_FIELDS)
        _require_native(folder, given)
        return build(
            LlamaArchitecture,
            given,
            pooling=POOLING[given.get("pooling", "avg")],
            temperature=float(given.get("temperature", 1.0)),
            stretch=_stretch(given),
        )
    except ValueError as error:
        raise BadCheckpoint(f"{folder / 'config.json'}: {error}. {OWN_CONFIG}") from error


def _require_native(folder: Path, given: dict[str, Any]) -> None:
    kind = _rotary(given).get("rope_type", "default")
    native = {
        "pooling": given.get("pooling", "avg") in POOLING,
        "hidden_act": given.get("hidden_act", "silu") == "silu",
        "rope_scaling": kind in {"default", "llama3"},
        "mlp_bias": not given.get("mlp_bias"),
        "quantization_config": "quantization_config" not in given,
    }
    foreign = [name for name, is_native in native.items() if not is_native]
    if prompt_of(folder, given) is None:
        raise UnsupportedModel(
            f"{folder}: the name of this {given['model_type']} does not say that it reranks, nor "
            "with which prompt. Use a model such as nvidia/llama-nemotron-rerank-1b-v2, in a "
            "folder that keeps its name."
        )
    if foreign:
        raise UnsupportedModel(
            f"{folder}: {given['model_type']} with this {foreign[0]} does not run here: "
            f"{given[foreign[0]]!r}. Use a model such as nvidia/llama-nemotron-rerank-1b-v2."
        )


def _rotary(given: dict[str, Any]) -> dict[str, Any]:
    """``rope_parameters``, or ``rope_scaling`` of older files."""
    rotary: dict[str, Any] = given.get("rope_scaling") or given.get("rope_parameters", {})
    return rotary


def _stretch(given: dict[str, Any]) -> LlamaStretch | None:
    rotary = _rotary(given)
    if rotary.get("rope_type", "default") == "default":
        return None
    check_fields(rotary, STRETCH_FIELDS, tuple(STRETCH_FIELDS))
    factor, low, high, trained = (rotary[name] for name in STRETCH_FIELDS)
    return LlamaStretch(float(factor), float(low), float(high), trained)
