"""The shape of a ModernBERT, read from ``config.json`` in both spellings in use. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from echelon.errors import BadCheckpoint
from echelon.files import OBJECT, SWITCH, TEXT, Field, check_fields, list_of, number, whole
from echelon.models import modules
from echelon.models.architecture import (
    NATIVE_ACTIVATIONS,
    OWN_CONFIG,
    SHAPE,
    check_ids,
    labels_of,
    positions_from_zero,
)

if TYPE_CHECKING:
    from pathlib import Path

    from echelon.models.modules import Chain
    from echelon.types import IntArray, TokenBatch

GLOBAL, LOCAL = "full_attention", "sliding_attention"
THETAS = {GLOBAL: 160_000.0, LOCAL: 10_000.0}
POOLINGS = ("cls", "mean")

FIELDS = {
    "norm_eps": number(0, 1),
    "norm_bias": SWITCH,
    "attention_bias": SWITCH,
    "mlp_bias": SWITCH,
    "classifier_bias": SWITCH,
    "hidden_activation": TEXT,
    "classifier_activation": TEXT,
    "classifier_pooling": Field(" or ".join(POOLINGS), lambda value: value in POOLINGS),
    "local_attention": whole(2, 2**20),
    "global_attn_every_n_layers": whole(1, 2**10),
    "global_rope_theta": number(1),
    "local_rope_theta": number(1),
    "layer_types": list_of(str, "texts"),
    "rope_parameters": OBJECT,
}
"""Fields of this family besides those of all."""


@dataclass(frozen=True, slots=True)
class ModernBertArchitecture:
    """The shape of a ModernBERT that scores pairs."""

    model_type: str
    vocabulary: int  # rows of the word table
    hidden: int
    layers: int
    heads: int
    intermediate: int  # width inside the feed-forward
    max_tokens: int
    padding_id: int
    labels: tuple[str, ...]
    activation: str
    epsilon: float
    norm_bias: bool
    attention_bias: bool
    feed_forward_bias: bool
    local: tuple[bool, ...]  # of each layer: whether a token sees its neighbours only
    reach: int  # tokens to either side that it sees then
    thetas: tuple[float, float]  # bases of the rotary positions, of global and of local layers
    pooling: str
    classifier_activation: str
    classifier_bias: bool
    chain: Chain | None  # a head in modules of its own, instead of the classifier

    @property
    def head_shape(self) -> tuple[int, int]:
        """Number of attention heads and width of one."""
        return self.heads, self.hidden // self.heads

    @property
    def weights(self) -> int:
        """Number of weights: table, layers and head."""
        norm = 2 if self.norm_bias else 1
        dense = 4 * self.hidden + 3 * self.intermediate + 2 * norm
        biases = 4 * self.hidden * self.attention_bias
        biases += (2 * self.intermediate + self.hidden) * self.feed_forward_bias
        body = self.layers * (self.hidden * dense + biases) - norm * self.hidden
        if self.chain is not None:
            head = self.chain.weights
        else:
            head = self.hidden * (self.hidden + self.classifier_bias + norm)
            head += (self.hidden + 1) * len(self.labels)
        return self.hidden * (self.vocabulary + 2 * norm) + body + head

    @property
    def flops(self) -> int:
        """Operations of all layers' products for one token."""
        return self.layers * self.hidden * (8 * self.hidden + 6 * self.intermediate)

    @property
    def reads_segments(self) -> bool:
        """Whether token types change the scores."""
        return False

    def positions(self, batch: TokenBatch) -> IntArray:
        """Position ids of a batch, int32 [tokens]."""
        return positions_from_zero(batch)

    def check_ids(self, ids: IntArray) -> None:
        """Raise :class:`BadCheckpoint` for a token id without an embedding."""
        check_ids(ids, self.vocabulary)


def read(folder: Path, config: dict[str, Any]) -> ModernBertArchitecture | None:
    """The shape of a model, or None for one that needs the generic scorer.

    Raises:
        BadCheckpoint: a field is wrong, or two of them contradict one another.
        UnsupportedModel: its modules do not end in a score.
    """
    given = {name: value for name, value in config.items() if value is not None}
    try:
        check_fields(given, FIELDS, SHAPE)
        kinds = _layer_types(given)
        scaled = any(
            values.get("rope_type", "default") != "default"
            for values in given.get("rope_parameters", {}).values()
        )
        activations = [given.get(name, "gelu") for name in FIELDS if name.endswith("_activation")]
        if scaled or "rope_scaling" in given or not set(activations) <= set(NATIVE_ACTIVATIONS):
            return None
        return _shape(given, kinds, modules.read(folder))
    except (ValueError, AttributeError) as error:
        raise BadCheckpoint(f"{folder / 'config.json'}: {error}. {OWN_CONFIG}") from error


def _shape(given: dict[str, Any], kinds: list[str], chain: Chain | None) -> ModernBertArchitecture:
    hidden, heads = given["hidden_size"], given["num_attention_heads"]
    if hidden % heads or hidden // heads % 2:
        raise ValueError(
            f"hidden_size: {hidden} does not give num_attention_heads={heads} heads of even width"
        )
    if chain is not None:
        chain.require_width(hidden)
    return ModernBertArchitecture(
        model_type=given["model_type"],
        vocabulary=given["vocab_size"],
        hidden=hidden,
        layers=given["num_hidden_layers"],
        heads=heads,
        intermediate=given["intermediate_size"],
        max_tokens=given["max_position_embeddings"],
        padding_id=given.get("pad_token_id", 50283),
        labels=labels_of(given) if chain is None else modules.LABELS,
        activation=given.get("hidden_activation", "gelu"),
        epsilon=float(given.get("norm_eps", 1e-5)),
        norm_bias=given.get("norm_bias", False),
        attention_bias=given.get("attention_bias", False),
        feed_forward_bias=given.get("mlp_bias", False),
        local=tuple(kind == LOCAL for kind in kinds),
        reach=given.get("local_attention", 128) // 2,
        thetas=(_theta(given, GLOBAL, "global"), _theta(given, LOCAL, "local")),
        pooling=given.get("classifier_pooling", "cls"),
        classifier_activation=given.get("classifier_activation", "gelu"),
        classifier_bias=given.get("classifier_bias", False),
        chain=chain,
    )


def _layer_types(given: dict[str, Any]) -> list[str]:
    """The kind of each layer's attention."""
    layers = given["num_hidden_layers"]
    every = given.get("global_attn_every_n_layers", 3)
    usual = [LOCAL if layer % every else GLOBAL for layer in range(layers)]
    kinds: list[str] = given.get("layer_types", usual)
    if len(kinds) != layers or not set(kinds) <= {GLOBAL, LOCAL}:
        raise ValueError(
            f"layer_types: does not name {GLOBAL} or {LOCAL} for each of the {layers} layers"
        )
    return kinds


def _theta(given: dict[str, Any], kind: str, older: str) -> float:
    values = given.get("rope_parameters", {}).get(kind) or {}
    theta = values.get("rope_theta", given.get(f"{older}_rope_theta", THETAS[kind]))
    check_fields({"rope_theta": theta}, {"rope_theta": number(1)}, ("rope_theta",))
    return float(theta)
