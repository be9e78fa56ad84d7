"""Read from ``config.json`` a model's shape, limits, labels and tensor names. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from echelon.errors import BadCheckpoint, InvalidInput, ModelNotFound
from echelon.files import (
    MAX_BYTES,
    MAX_ID,
    MAX_SHOWN,
    OBJECT,
    SWITCH,
    TEXT,
    Field,
    check_fields,
    list_of,
    number,
    read_object,
    shown,
    whole,
)
from echelon.models import modules
from echelon.types import TokenIds

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from echelon.models.modules import Chain
    from echelon.types import IntArray, TokenBatch

OWN_CONFIG = "Use the model's own config.json."
WITH_TOKENIZER = "Download the model again, with its tokenizer."

MAX_LABELS = 10_000
MAX_LISTED = 20
"""Labels that a message names."""

_ID = whole(0, MAX_ID)
_NO_HUB_CODE = Field(
    "the name of a computation in transformers; code of a hub repository is never run",
    lambda value: isinstance(value, str) and "/" not in value,
)
CONFIG = {
    "model_type": TEXT,
    "architectures": list_of(str, "texts"),
    "num_labels": whole(1, MAX_LABELS),
    "id2label": OBJECT,
    "vocab_size": whole(1, MAX_ID),
    "hidden_size": whole(1, 2**16),
    "num_hidden_layers": whole(1, 2**10),
    "num_attention_heads": whole(1, 2**12),
    "intermediate_size": whole(1, 2**20),
    "max_position_embeddings": whole(1, MAX_ID),
    "type_vocab_size": whole(0, 2**16),
    "hidden_act": TEXT,
    "layer_norm_eps": number(0, 1),
    "position_embedding_type": TEXT,
    "is_decoder": SWITCH,
    "pad_token_id": _ID,
    "cls_token_id": _ID,
    "sep_token_id": _ID,
    "attn_implementation": _NO_HUB_CODE,
    "_attn_implementation": _NO_HUB_CODE,
}
"""What the fields of ``config.json`` that are used may hold. Sizes are far above any model's; what
they say is compared with the weights before anything of that size is made."""

SHAPE = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
)
"""Fields that a native model must have."""

TOKENIZER_CONFIG = {"model_max_length": number(1)}

NATIVE_ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu")


@dataclass(frozen=True, slots=True)
class Family:
    """Differences between the model families with a packed encoder."""

    prefix: str  # name of the encoder in a classifier, which begins its tensors' names
    head: tuple[str, str]  # names of the head's dense layer and of its projection to the labels
    padding_id: int  # the padding token, if ``config.json`` names none
    positions_after_padding: bool  # positions begin after the padding id, not at 0
    reads_segments: bool  # the reference model reads token types


BERT = Family(
    "bert",
    ("bert.pooler.dense", "classifier"),
    padding_id=0,
    positions_after_padding=False,
    reads_segments=True,
)
ROBERTA = Family(
    "roberta",
    ("classifier.dense", "classifier.out_proj"),
    padding_id=1,
    positions_after_padding=True,
    reads_segments=False,
)

TYPE_OF_CLASS = {"XLMRobertaForSequenceClassification": "xlm-roberta"}
"""``architectures`` → ``model_type``, where ``config.json`` names the first alone."""

NATIVE_FAMILIES = {"bert": BERT, "roberta": ROBERTA, "xlm-roberta": ROBERTA, "camembert": ROBERTA}
"""``model_type`` of ``config.json`` → family."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """The shape of a native model."""

    model_type: str  # as in ``config.json``
    vocabulary: int  # rows of the word table
    hidden: int  # width of a row
    layers: int  # transformer layers
    heads: int  # attention heads
    intermediate: int  # width inside the feed-forward
    table_positions: int  # rows of the position table
    segments: int  # rows of the segment table
    activation: str  # name of the feed-forward's activation
    epsilon: float  # of every LayerNorm
    padding_id: int  # the padding token's id
    labels: tuple[str, ...]  # names of the head's outputs
    chain: Chain | None = None  # a head in modules of its own, instead of the classifier

    def __post_init__(self) -> None:
        if self.hidden % self.heads:
            raise ValueError(
                f"hidden_size: {self.hidden} is not a multiple of num_attention_heads={self.heads}"
            )
        if self.segments < 1:
            raise ValueError("type_vocab_size: 0, and BERT models have at least one")
        if self.chain is not None:
            self.chain.require_width(self.hidden)
        if self.padding_id >= self.vocabulary or self.max_tokens < 1:
            raise ValueError(
                f"pad_token_id: {self.padding_id} is beyond vocab_size={self.vocabulary} or "
                f"max_position_embeddings={self.table_positions}"
            )

    @property
    def family(self) -> Family:
        """The family's tensor names and rules."""
        return NATIVE_FAMILIES[self.model_type]

    @property
    def root(self) -> str:
        """Beginning of the encoder's tensor names; a model saved without classifier has none."""
        return f"{self.family.prefix}." if self.chain is None else ""

    @property
    def reads_firsts(self) -> bool:
        """Whether the head reads each pair's first row only."""
        return self.chain is None or self.chain.pooling == "cls"

    @property
    def head_shape(self) -> tuple[int, int]:
        """Number of attention heads and width of one."""
        return self.heads, self.hidden // self.heads

    @property
    def weights(self) -> int:
        """Number of weights: tables, layers and head."""
        tables = self.vocabulary + self.table_positions + self.segments + 2
        layer = 4 * (self.hidden + 1) + 2 * self.intermediate + 1 + 4
        per_layer = layer * self.hidden + self.intermediate
        labels = len(self.labels)
        head = self.hidden * (self.hidden + 1 + labels) + labels
        head = head if self.chain is None else self.chain.weights
        return self.hidden * tables + self.layers * per_layer + head

    @property
    def flops(self) -> int:
        """Operations of all layers' products for one token."""
        return 4 * self.layers * self.hidden * (2 * self.hidden + self.intermediate)

    @property
    def reads_segments(self) -> bool:
        """Whether token types change the scores."""
        return self.family.reads_segments and self.segments > 1

    @property
    def max_tokens(self) -> int:
        """Longest input with special tokens: 8192 for bge-reranker-v2-m3, not 8194."""
        return self.table_positions - self.family.positions_after_padding * (self.padding_id + 1)

    def check_ids(self, ids: IntArray) -> None:
        """See :func:`check_ids`."""
        check_ids(ids, self.vocabulary)

    def positions(self, batch: TokenBatch) -> IntArray:
        """Position ids of a batch, int32 [tokens]."""
        if self.family.positions_after_padding:
            return positions_after_padding(batch, self.padding_id)
        return positions_from_zero(batch)


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """Precision of the linear layers; int8 leaves those in bf16 that would change the ranking."""

    precision: str  # ``fp32``, ``bf16``, ``fp16`` or ``int8``
    keep_bf16: frozenset[str] = frozenset()  # layers that int8 leaves in bf16
    errors: dict[str, float] | None = None  # if given, int8's error is measured


def positions_after_padding(batch: TokenBatch, padding_id: int) -> IntArray:
    """RoBERTa's positions: from ``padding_id + 1`` on, without counting padding tokens.

    A padding token in a text (``<pad>``) gets position ``padding_id``, as in the reference; see
    ``create_position_ids_from_input_ids`` in transformers.
    """
    counts = (batch.ids != padding_id).astype(np.int32)
    running = np.cumsum(counts, dtype=np.int32)
    before = np.concatenate(([0], running))[batch.offsets[:-1]]
    within = running - np.repeat(before, batch.lengths)
    positions: IntArray = (within * counts + padding_id).astype(np.int32)
    return positions


def positions_from_zero(batch: TokenBatch) -> IntArray:
    """BERT's positions: from 0 on in each pair."""
    starts = np.repeat(batch.offsets[:-1], batch.lengths)
    return (np.arange(len(batch.ids)) - starts).astype(np.int32)


def read_config(folder: Path) -> dict[str, Any]:
    """Read a model folder's ``config.json``; its fields hold what :data:`CONFIG` says."""
    path = folder / "config.json"
    if not path.is_file():
        raise ModelNotFound(
            f"{folder}: no config.json there, so it is not a model folder. "
            "Give a folder written by save_pretrained, or a hub id such as "
            "BAAI/bge-reranker-v2-m3."
        )
    config = read_settings(path, CONFIG)
    if config.get("model_type") is None:  # as in jina-reranker-v2, whose own code knows
        named = next(iter(config.get("architectures") or []), "")
        config["model_type"] = TYPE_OF_CLASS.get(named)
    if config["model_type"] is None:
        raise BadCheckpoint(f"{path}: no model_type in it. {OWN_CONFIG}")
    return config


def has_weights(folder: Path) -> bool:
    """Whether the folder holds weights that torch reads."""
    names = ("model.safetensors", "pytorch_model.bin")
    return any((folder / f"{name}{end}").is_file() for name in names for end in ("", ".index.json"))


def read_settings(
    path: Path, fields: Mapping[str, Field], max_bytes: int = MAX_BYTES
) -> dict[str, Any]:
    """Read a JSON object of a model folder; raise :class:`BadCheckpoint` if that fails."""
    try:
        return read_object(path, fields, max_bytes)
    except (ValueError, OSError) as error:
        raise BadCheckpoint(f"{path}: {error}. Download the model again.") from error


def labels_of(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the head's outputs; without names there are two, as in transformers."""
    count, named = config.get("num_labels"), config.get("id2label")
    if not named:
        return tuple(f"LABEL_{i}" for i in range(count or 2))
    labels = [named.get(str(i)) for i in range(min(len(named), MAX_LABELS))]
    if len(named) > MAX_LABELS or not all(isinstance(label, str | int) for label in labels):
        raise BadCheckpoint(
            f"config.json: id2label: {shown(named)} does not name the labels 0 to "
            f"{len(named) - 1}. {OWN_CONFIG}"
        )
    if count not in {None, len(labels)}:
        raise BadCheckpoint(
            f"config.json: num_labels: {count}, but id2label names {len(labels)}. {OWN_CONFIG}"
        )
    return tuple(map(str, labels))


def names_labels(config: Mapping[str, Any]) -> bool:
    """Whether the configuration says how many outputs the head has."""
    return bool(config.get("num_labels") or config.get("id2label"))


def choose_label(labels: tuple[str, ...], label: str | int | None) -> int:
    """Index of the head's output that is the score; it must be named if there are several."""
    listed = ", ".join(
        name if name == str(i) else f"{i}={_printable(name)}"
        for i, name in enumerate(labels[:MAX_LISTED])
    )
    listed += ", …" if len(labels) > MAX_LISTED else ""
    if label is None:
        if len(labels) == 1:
            return 0
        raise InvalidInput(
            "label",
            f"the model's head has {len(labels)} labels ({listed}) and none was chosen",
            f"Pick the one that means relevant, such as label={_printable(labels[-1])!r}; on the "
            "command line it is --label.",
        )
    if isinstance(label, str) and label in labels:
        return labels.index(label)
    index = int(label) if str(label).isdecimal() else -1
    if 0 <= index < len(labels):
        return index
    raise InvalidInput("label", f"{label!r} is not one of the head's", f"Labels: {listed}.")


def _printable(name: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in name[:MAX_SHOWN])


def check_ids(ids: IntArray, vocabulary: int | None) -> None:
    """Raise :class:`BadCheckpoint` for a token id without an embedding; None knows no number."""
    check_tokens({}, TokenIds(int(ids.max(initial=0)), {}), vocabulary)


def check_tokens(config: Mapping[str, Any], tokens: TokenIds, vocabulary: int | None) -> None:
    """Compare a tokenizer with its model.

    Args:
        config: the model's, as :func:`read_config` gives it.
        tokens: the ids that the tokenizer gives.
        vocabulary: rows of the model's embeddings; None where they are unknown.

    Raises:
        BadCheckpoint: a token has no embedding, or a special token is another one for the model.
    """
    if vocabulary is not None and tokens.largest >= vocabulary:
        raise BadCheckpoint(
            f"The tokenizer gave id {tokens.largest}, the model has embeddings for "
            f"{vocabulary} tokens: they do not belong together. {WITH_TOKENIZER}"
        )
    family = NATIVE_FAMILIES.get(config.get("model_type", ""))
    for name, id_ in tokens.special.items():
        # Batches are padded with the model's own id, so another one of the tokenizer is harmless
        # unless positions are counted from it.
        if name == "pad" and not (family and family.positions_after_padding):
            continue
        said = config.get(f"{name}_token_id")
        if said not in {None, id_}:
            raise BadCheckpoint(
                f"config.json: {name}_token_id: {said}, but the tokenizer's {name}_token has id "
                f"{id_}: they do not belong together. {WITH_TOKENIZER}"
            )


def native_architecture(folder: Path, config: dict[str, Any]) -> Architecture | None:
    """The shape of a native model, or None for one that needs the generic scorer.

    Raises:
        BadCheckpoint: a field is missing or wrong.
        UnsupportedModel: its modules do not end in a score.
    """
    if not _is_native(config):
        return None
    given = {name: value for name, value in config.items() if value is not None}
    chain = modules.read(folder)
    try:
        check_fields(given, {}, SHAPE)
        return Architecture(
            model_type=given["model_type"],
            vocabulary=given["vocab_size"],
            hidden=given["hidden_size"],
            layers=given["num_hidden_layers"],
            heads=given["num_attention_heads"],
            intermediate=given["intermediate_size"],
            table_positions=given["max_position_embeddings"],
            segments=given.get("type_vocab_size", 2),
            activation=given.get("hidden_act", "gelu"),
            epsilon=float(given.get("layer_norm_eps", 1e-12)),
            padding_id=padding_id(config),
            labels=labels_of(config) if chain is None else modules.LABELS,
            chain=chain,
        )
    except ValueError as error:
        raise BadCheckpoint(f"{folder / 'config.json'}: {error}. {OWN_CONFIG}") from error


def _is_native(config: dict[str, Any]) -> bool:
    return (
        config["model_type"] in NATIVE_FAMILIES
        and config.get("position_embedding_type", "absolute") == "absolute"
        and config.get("hidden_act", "gelu") in NATIVE_ACTIVATIONS
        and not config.get("is_decoder")
    )


def padding_id(config: dict[str, Any]) -> int:
    """The padding token of a native family's configuration."""
    given = config.get("pad_token_id")
    return NATIVE_FAMILIES[config["model_type"]].padding_id if given is None else given
