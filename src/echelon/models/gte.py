"""The shape of gte's multilingual rerankers, whose own code calls them "new". No torch.

Zhang and others, mGTE: Generalized Long-Context Text Representation and Reranking Models for
Multilingual Text Retrieval, 2024: BERT with rotary positions and a gate, whose code is in a
repository of its own (Alibaba-NLP/new-impl). None of that code runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from echelon.errors import BadCheckpoint
from echelon.files import OBJECT, SWITCH, TEXT, check_fields, number
from echelon.models.architecture import (
    NATIVE_ACTIVATIONS,
    OWN_CONFIG,
    SHAPE,
    check_ids,
    labels_of,
)

if TYPE_CHECKING:
    from pathlib import Path

    from echelon.types import IntArray

FIELDS = {
    "rope_theta": number(1),
    "rope_scaling": OBJECT,
    "layer_norm_type": TEXT,
    "logn_attention_scale": SWITCH,
    "pack_qkv": SWITCH,
}
"""Fields of this family besides those of all."""

NTK = {"type": TEXT, "rope_type": TEXT, "factor": number(1)}
"""Fields of ``rope_scaling``."""


@dataclass(frozen=True, slots=True)
class GteArchitecture:
    """The shape of a gte that scores pairs."""

    model_type: str
    vocabulary: int  # rows of the word table
    hidden: int
    layers: int
    heads: int
    intermediate: int  # width inside the feed-forward
    segments: int  # rows of the segment table; 0 without one
    max_tokens: int
    labels: tuple[str, ...]
    activation: str
    epsilon: float
    theta: float  # base of the rotary positions
    factor: float  # by which they are stretched; see :func:`read`

    @property
    def head_shape(self) -> tuple[int, int]:
        """Number of attention heads and width of one."""
        return self.heads, self.hidden // self.heads

    @property
    def reads_segments(self) -> bool:
        """Whether token types change the scores."""
        return self.segments > 1

    @property
    def weights(self) -> int:
        """Number of weights: tables, layers and head."""
        layer = 4 * self.hidden + 3 * self.intermediate + 9
        head = self.hidden * (self.hidden + 1 + len(self.labels)) + len(self.labels)
        tables = self.vocabulary + self.segments + 2
        return self.hidden * (tables + self.layers * layer) + head

    def check_ids(self, ids: IntArray) -> None:
        """See :func:`echelon.models.architecture.check_ids`."""
        check_ids(ids, self.vocabulary)


def read(folder: Path, config: dict[str, Any]) -> GteArchitecture | None:
    """The shape of a model, or None for one with parts that are not built.

    Positions are stretched by the fixed NTK rule: with a factor f and heads of width d, the base is
    f times as large and every frequency is divided by f^(2/d) (Su, https://kexue.fm/archives/9706).

    Raises:
        BadCheckpoint: a field is missing or wrong.
    """
    given = {name: value for name, value in config.items() if value is not None}
    try:
        check_fields(given, FIELDS, SHAPE)
        scaling = given.get("rope_scaling", {})
        check_fields(scaling, NTK)
        if not _is_built(given, scaling):
            return None
        return _shape(given, float(scaling.get("factor", 1)))
    except ValueError as error:
        raise BadCheckpoint(f"{folder / 'config.json'}: {error}. {OWN_CONFIG}") from error


def _is_built(given: dict[str, Any], scaling: dict[str, Any]) -> bool:
    kind = scaling.get("type", scaling.get("rope_type", "ntk" if not scaling else ""))
    return (
        given.get("position_embedding_type", "rope") == "rope"
        and given.get("layer_norm_type", "layer_norm") == "layer_norm"
        and given.get("hidden_act", "gelu") in NATIVE_ACTIVATIONS
        and not given.get("logn_attention_scale")
        and given.get("pack_qkv", True)
        and kind == "ntk"
        and scaling.get("mixed_b") is None
    )


def _shape(given: dict[str, Any], factor: float) -> GteArchitecture:
    hidden, heads = given["hidden_size"], given["num_attention_heads"]
    if hidden % heads or hidden // heads % 2:
        raise ValueError(
            f"hidden_size: {hidden} does not give num_attention_heads={heads} heads of even width"
        )
    return GteArchitecture(
        model_type=given["model_type"],
        vocabulary=given["vocab_size"],
        hidden=hidden,
        layers=given["num_hidden_layers"],
        heads=heads,
        intermediate=given["intermediate_size"],
        segments=given.get("type_vocab_size", 1),
        max_tokens=given["max_position_embeddings"],
        labels=labels_of(given),
        activation=given.get("hidden_act", "gelu"),
        epsilon=float(given.get("layer_norm_eps", 1e-12)),
        theta=float(given.get("rope_theta", 10_000.0)),
        factor=factor,
    )
