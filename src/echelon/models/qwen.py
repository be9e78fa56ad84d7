"""The shape of a Qwen3 or Qwen2 decoder that scores pairs, read from ``config.json``. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from echelon.errors import BadCheckpoint
from echelon.files import MAX_ID, OBJECT, SWITCH, check_fields, list_of, number, whole
from echelon.models.architecture import OWN_CONFIG, SHAPE, check_ids, labels_of

if TYPE_CHECKING:
    from pathlib import Path

    from echelon.types import IntArray

FIELDS = {
    "num_key_value_heads": whole(1, 2**12),
    "head_dim": whole(1, 2**12),
    "rms_norm_eps": number(0, 1),
    "rope_theta": number(1),
    "rope_parameters": OBJECT,
    "rope_scaling": OBJECT,
    "tie_word_embeddings": SWITCH,
    "attention_bias": SWITCH,
    "use_sliding_window": SWITCH,
    "layer_types": list_of(str, "texts"),
    "pad_token_id": whole(0, MAX_ID),
}
"""Fields of a decoder beside those of :data:`echelon.models.architecture.CONFIG`."""

ROTARY_FIELDS = {"rope_theta": number(1)}
"""Fields of ``rope_parameters``."""

DEFAULT_HEAD_SIZE = {"qwen3": 128}
"""The size of a head where ``head_dim`` is absent; others divide the hidden width."""

DEFAULT_THETA = 10_000.0


@dataclass(frozen=True, slots=True)
class DecoderArchitecture:
    """The shape of a decoder; attention is causal and grouped, the feed-forward is SwiGLU."""

    model_type: str  # as in ``config.json``
    vocabulary: int  # rows of the word table
    hidden: int  # width of a row
    layers: int  # transformer layers
    query_heads: int  # attention heads
    key_heads: int  # heads of keys and values, each for a group of query heads
    head_size: int  # width of one head
    intermediate: int  # width inside the feed-forward
    max_tokens: int  # longest input
    theta: float  # base of the rotary positions
    epsilon: float  # of every RMSNorm
    norms_heads: bool  # queries and keys of each head pass an RMSNorm
    qkv_bias: bool  # queries, keys and values have biases
    out_bias: bool  # the output of attention has a bias
    tied: bool  # the vocabulary's head is the word table
    padding_id: int | None  # the padding token's id
    labels: tuple[str, ...]  # names of the head's outputs
    classifies: bool  # it has a head of its own for the labels

    reads_last: ClassVar[bool] = True
    """Whether the head reads each pair's last row only."""

    def __post_init__(self) -> None:
        if self.query_heads % self.key_heads:
            raise ValueError(
                f"num_key_value_heads: {self.key_heads} does not divide "
                f"num_attention_heads={self.query_heads}"
            )
        if self.head_size % 2:
            raise ValueError(f"head_dim: {self.head_size} is odd, and rotary positions need pairs")

    @property
    def weights(self) -> int:
        """Number of weights that scoring needs: word table, layers and one vector of the head."""
        queries, keys = self.query_heads * self.head_size, self.key_heads * self.head_size
        layer = 2 * self.hidden * (queries + keys) + 3 * self.hidden * self.intermediate
        layer += 2 * self.hidden + 2 * self.head_size * self.norms_heads
        layer += (queries + 2 * keys) * self.qkv_bias + self.hidden * self.out_bias
        return self.hidden * (self.vocabulary + 2) + self.layers * layer

    def check_ids(self, ids: IntArray) -> None:
        """See :func:`echelon.models.architecture.check_ids`."""
        check_ids(ids, self.vocabulary)


Shape = TypeVar("Shape", bound=DecoderArchitecture)


def read(folder: Path, config: dict[str, Any]) -> DecoderArchitecture | None:
    """The shape of a decoder that runs natively, or None for one that does not.

    Args:
        folder: the model's, for messages.
        config: its configuration, as :func:`echelon.models.architecture.read_config` gives it.

    Raises:
        BadCheckpoint: a field is missing or wrong.
    """
    given = {name: value for name, value in config.items() if value is not None}
    try:
        check_fields(given, FIELDS, SHAPE)
        check_fields(given.get("rope_parameters", {}), ROTARY_FIELDS)
        return build(DecoderArchitecture, given) if _is_native(given) else None
    except ValueError as error:
        raise BadCheckpoint(f"{folder / 'config.json'}: {error}. {OWN_CONFIG}") from error


def build(kind: type[Shape], given: dict[str, Any], **more: Any) -> Shape:
    """The shape from a checked configuration; ``more`` are fields of a ``kind`` of its own."""
    model_type, heads, hidden = (
        given[name] for name in ("model_type", "num_attention_heads", "hidden_size")
    )
    rotary = given.get("rope_parameters", {})
    theta = rotary.get("rope_theta") or given.get("rope_theta", DEFAULT_THETA)
    biases = None if model_type == "qwen2" else given.get("attention_bias", False)
    classifies = _named(given).endswith("ForSequenceClassification")
    return kind(
        model_type=model_type,
        vocabulary=given["vocab_size"],
        hidden=hidden,
        layers=given["num_hidden_layers"],
        query_heads=heads,
        key_heads=given.get("num_key_value_heads", heads),
        head_size=given.get("head_dim", DEFAULT_HEAD_SIZE.get(model_type, hidden // heads)),
        intermediate=given["intermediate_size"],
        max_tokens=given["max_position_embeddings"],
        theta=float(theta),
        epsilon=float(given.get("rms_norm_eps", 1e-6)),
        norms_heads=model_type == "qwen3",
        qkv_bias=True if biases is None else biases,
        out_bias=bool(biases),
        tied=given.get("tie_word_embeddings", False),
        padding_id=given.get("pad_token_id"),
        labels=labels_of(given) if classifies else ("score",),
        classifies=classifies,
        **more,
    )


def _is_native(given: dict[str, Any]) -> bool:
    """Whether attention is causal over all tokens, and everything else as Qwen's own models."""
    rotary = (given.get("rope_scaling", {}), given.get("rope_parameters", {}))
    kinds = {part.get("rope_type", part.get("type", "default")) for part in rotary}
    windowed = given.get("use_sliding_window") or {*given.get("layer_types", ())} - {
        "full_attention"
    }
    return (
        given["model_type"] in {"qwen2", "qwen3"}
        and _named(given).endswith(("ForCausalLM", "ForSequenceClassification"))
        and given.get("hidden_act", "silu") == "silu"
        and kinds == {"default"}
        and not windowed
        and given.get("is_causal", True) is True
        and "quantization_config" not in given
    )


def _named(given: dict[str, Any]) -> str:
    """The class of the model, as ``config.json`` names it."""
    return str(next(iter(given.get("architectures", ())), ""))
