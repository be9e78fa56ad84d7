"""Read from ``config.json`` a model's shape, limits, labels and tensor names. No torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from echelon.errors import BadCheckpoint, InvalidInput, ModelNotFound, UnsupportedModel

if TYPE_CHECKING:
    from pathlib import Path

    from echelon.types import IntArray, TokenBatch

NATIVE_ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu")


@dataclass(frozen=True, slots=True)
class Family:
    """Differences between the model families with a packed encoder."""

    prefix: str  # beginning of the encoder's tensor names
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

    def __post_init__(self) -> None:
        if self.layers < 1 or self.heads < 1 or self.hidden % self.heads:
            raise ValueError(
                f"num_hidden_layers={self.layers}, num_attention_heads={self.heads} and "
                f"hidden_size={self.hidden} do not go together"
            )

    @property
    def family(self) -> Family:
        """The family's tensor names and rules."""
        return NATIVE_FAMILIES[self.model_type]

    @property
    def head_shape(self) -> tuple[int, int]:
        """Number of attention heads and width of one."""
        return self.heads, self.hidden // self.heads

    @property
    def reads_segments(self) -> bool:
        """Whether token types change the scores."""
        return self.family.reads_segments and self.segments > 1

    @property
    def max_tokens(self) -> int:
        """Longest input with special tokens: 8192 for bge-reranker-v2-m3, not 8194."""
        first = self.padding_id + 1 if self.family.positions_after_padding else 0
        return self.table_positions - first

    def check_ids(self, ids: IntArray) -> None:
        """Raise :class:`BadCheckpoint` for a token id without an embedding."""
        largest = int(ids.max(initial=0))
        if largest >= self.vocabulary:
            raise BadCheckpoint(
                f"The tokenizer gave id {largest}, the model has embeddings for "
                f"{self.vocabulary} tokens: they do not belong together. "
                "Download the model again, with its tokenizer."
            )

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
    """Read a model folder's ``config.json``."""
    path = folder / "config.json"
    if not path.is_file():
        raise ModelNotFound(
            f"{folder}: no config.json there, so it is not a model folder. "
            "Give a folder written by save_pretrained, or a hub id such as "
            "BAAI/bge-reranker-v2-m3."
        )
    config = read_object(path)
    if not isinstance(config.get("model_type"), str):
        raise BadCheckpoint(f"{path}: no model_type in it. Use the model's own config.json.")
    return config


def has_weights(folder: Path) -> bool:
    """Whether the folder holds weights that torch reads."""
    names = ("model.safetensors", "pytorch_model.bin")
    return any((folder / f"{name}{end}").is_file() for name in names for end in ("", ".index.json"))


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file; raise :class:`BadCheckpoint` if that fails."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise BadCheckpoint(f"{path}: not JSON ({error}). Download the model again.") from error
    if not isinstance(content, dict):
        raise BadCheckpoint(f"{path}: not a JSON object. Download the model again.")
    return content


def labels_of(config: dict[str, Any]) -> tuple[str, ...]:
    """Names of the head's outputs; without names there are two, as in transformers."""
    named = config.get("id2label")
    try:
        if isinstance(named, dict) and named:
            return tuple(str(named[key]) for key in sorted(named, key=int))
        return tuple(f"LABEL_{i}" for i in range(int(config.get("num_labels", 2))))
    except (TypeError, ValueError) as error:
        raise BadCheckpoint(
            f"config.json: id2label or num_labels is wrong ({error}). "
            "Use the model's own config.json."
        ) from error


def choose_label(labels: tuple[str, ...], label: str | int | None) -> int:
    """Index of the head's output that is the score; it must be named if there are several."""
    listed = ", ".join(f"{i}={name}" for i, name in enumerate(labels))
    if label is None:
        if len(labels) == 1:
            return 0
        raise InvalidInput(
            "label",
            f"the model's head has {len(labels)} labels ({listed}) and none was chosen",
            f"Pick the one that means relevant, such as label={labels[-1]!r}.",
        )
    if isinstance(label, str) and label in labels:
        return labels.index(label)
    index = int(label) if str(label).isdecimal() else -1
    if 0 <= index < len(labels):
        return index
    raise InvalidInput("label", f"{label!r} is not one of the head's", f"Labels: {listed}.")


def require_head(folder: Path, config: dict[str, Any]) -> None:
    """Raise :class:`UnsupportedModel` for a model without a classification head."""
    named = config.get("architectures") or []
    if named and not any(name.endswith("ForSequenceClassification") for name in named):
        raise UnsupportedModel(
            f"{folder}: a {named[0]} has no classification head, so it cannot score pairs. "
            "Use a cross-encoder, such as BAAI/bge-reranker-v2-m3."
        )


def native_architecture(folder: Path, config: dict[str, Any]) -> Architecture | None:
    """The shape of a native model, or None for one that needs the generic scorer."""
    if not _is_native(config):
        return None
    try:
        return Architecture(
            model_type=config["model_type"],
            vocabulary=int(config["vocab_size"]),
            hidden=int(config["hidden_size"]),
            layers=int(config["num_hidden_layers"]),
            heads=int(config["num_attention_heads"]),
            intermediate=int(config["intermediate_size"]),
            table_positions=int(config["max_position_embeddings"]),
            segments=int(config.get("type_vocab_size", 2)),
            activation=str(config.get("hidden_act", "gelu")),
            epsilon=float(config.get("layer_norm_eps", 1e-12)),
            padding_id=padding_id(config),
            labels=labels_of(config),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise BadCheckpoint(
            f"{folder / 'config.json'}: value missing or wrong ({error!r}). "
            "Use the model's own config.json."
        ) from error


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
    return NATIVE_FAMILIES[config["model_type"]].padding_id if given is None else int(given)
