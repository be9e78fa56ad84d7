"""What ``config.json`` says about a model: its shape, limits, labels and tensor names. No torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from echelon.errors import BadCheckpoint, InvalidInput, ModelNotFound, UnsupportedModel

if TYPE_CHECKING:
    from pathlib import Path

    from echelon.types import IntArray, TokenBatch

NATIVE_FAMILIES = {
    "bert": "bert",
    "roberta": "roberta",
    "xlm-roberta": "roberta",
    "camembert": "roberta",
}
"""``model_type`` → prefix of its tensor names, for the families with a packed encoder."""

NATIVE_ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu")

HEAD_TENSORS = {
    "bert": ("bert.pooler.dense", "classifier"),
    "roberta": ("classifier.dense", "classifier.out_proj"),
}


@dataclass(frozen=True, slots=True)
class Architecture:
    """The shape of a native model.

    Attributes:
        family: ``model_type`` of the configuration.
        prefix: what its tensor names begin with.
        vocabulary: rows of the word table.
        hidden: width of a row.
        layers: transformer layers.
        heads: attention heads.
        intermediate: width inside the feed-forward.
        table_positions: rows of the position table.
        segments: rows of the segment table.
        activation: name of the feed-forward's activation.
        epsilon: of every LayerNorm.
        padding_id: the padding token's id.
        labels: names of the head's outputs.
    """

    family: str
    prefix: str
    vocabulary: int
    hidden: int
    layers: int
    heads: int
    intermediate: int
    table_positions: int
    segments: int
    activation: str
    epsilon: float
    padding_id: int
    labels: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.layers < 1 or self.heads < 1 or self.hidden % self.heads:
            raise ValueError(
                f"num_hidden_layers={self.layers}, num_attention_heads={self.heads} and "
                f"hidden_size={self.hidden} do not go together"
            )

    @property
    def head_shape(self) -> tuple[int, int]:
        """(heads, width of one)."""
        return self.heads, self.hidden // self.heads

    @property
    def counts_from_padding(self) -> bool:
        """RoBERTa's positions start behind the padding id; BERT's start at 0."""
        return self.prefix == "roberta"

    @property
    def reads_segments(self) -> bool:
        """Whether token types mean anything; RoBERTa's reference never passes them."""
        return self.prefix == "bert" and self.segments > 1

    @property
    def max_tokens(self) -> int:
        """Longest input, special tokens included: 8192 for bge-reranker-v2-m3, not 8194."""
        return self.table_positions - (self.padding_id + 1 if self.counts_from_padding else 0)

    def check_ids(self, ids: IntArray) -> None:
        """Refuse token ids that the model has no embedding for.

        Raises:
            BadCheckpoint: there is one.
        """
        largest = int(ids.max(initial=0))
        if largest >= self.vocabulary:
            raise BadCheckpoint(
                f"The tokenizer gave id {largest}, the model has embeddings for "
                f"{self.vocabulary} tokens: they do not belong together. "
                "Download the model again, with its tokenizer."
            )

    def positions(self, batch: TokenBatch) -> IntArray:
        """Position ids of a batch, int32 [tokens]."""
        if self.counts_from_padding:
            return positions_after_padding(batch, self.padding_id)
        return positions_from_zero(batch)


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """What the linear layers compute in.

    Attributes:
        precision: ``fp32``, ``bf16``, ``fp16`` or ``int8``.
        keep_bf16: layers that int8 leaves in bf16, because it would harm the ranking there.
        errors: where given, int8's relative error in each layer is measured beside bf16.
    """

    precision: str
    keep_bf16: frozenset[str] = frozenset()
    errors: dict[str, float] | None = None


def positions_after_padding(batch: TokenBatch, padding_id: int) -> IntArray:
    """RoBERTa's positions: ``padding_id + 1`` onwards, a padding token in the text not counted.

    Such a token (someone wrote ``<pad>``) gets position ``padding_id`` itself, as in the
    reference; see ``create_position_ids_from_input_ids`` in transformers.
    """
    counts = (batch.ids != padding_id).astype(np.int32)
    running = np.cumsum(counts, dtype=np.int32)
    before = np.concatenate(([0], running))[batch.offsets[:-1]]
    within = running - np.repeat(before, batch.lengths)
    positions: IntArray = (within * counts + padding_id).astype(np.int32)
    return positions


def positions_from_zero(batch: TokenBatch) -> IntArray:
    """BERT's positions: 0 onwards in each pair."""
    starts = np.repeat(batch.offsets[:-1], batch.lengths)
    return (np.arange(len(batch.ids)) - starts).astype(np.int32)


def read_config(folder: Path) -> dict[str, Any]:
    """Read a model folder's ``config.json``.

    Raises:
        ModelNotFound: there is none.
        BadCheckpoint: it is not a JSON object with a ``model_type``.
    """
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
    """Read a JSON file that holds an object.

    Raises:
        BadCheckpoint: it does not, or cannot be read.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise BadCheckpoint(f"{path}: not JSON ({error}). Download the model again.") from error
    if not isinstance(content, dict):
        raise BadCheckpoint(f"{path}: not a JSON object. Download the model again.")
    return content


def labels_of(config: dict[str, Any]) -> tuple[str, ...]:
    """Names of the head's outputs; without names transformers assumes two.

    Raises:
        BadCheckpoint: they are not numbered.
    """
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
    """Which output of the head is the score.

    Raises:
        InvalidInput: several labels and none chosen, or one that is not there.
    """
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
    """Refuse models without a classification head.

    Raises:
        UnsupportedModel: the configuration names another kind of model.
    """
    named = config.get("architectures") or []
    if named and not any(name.endswith("ForSequenceClassification") for name in named):
        raise UnsupportedModel(
            f"{folder}: a {named[0]} has no classification head, so it cannot score pairs. "
            "Use a cross-encoder, such as BAAI/bge-reranker-v2-m3."
        )


def native_architecture(folder: Path, config: dict[str, Any]) -> Architecture | None:
    """The shape of a native model, or None for one that needs the generic scorer.

    Raises:
        BadCheckpoint: a value is missing or of the wrong type.
    """
    if not _is_native(config):
        return None
    try:
        return Architecture(
            family=config["model_type"],
            prefix=NATIVE_FAMILIES[config["model_type"]],
            vocabulary=int(config["vocab_size"]),
            hidden=int(config["hidden_size"]),
            layers=int(config["num_hidden_layers"]),
            heads=int(config["num_attention_heads"]),
            intermediate=int(config["intermediate_size"]),
            table_positions=int(config["max_position_embeddings"]),
            segments=int(config.get("type_vocab_size", 2)),
            activation=str(config.get("hidden_act", "gelu")),
            epsilon=float(config.get("layer_norm_eps", 1e-12)),
            padding_id=_padding_id(config),
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


def _padding_id(config: dict[str, Any]) -> int:
    default = 1 if NATIVE_FAMILIES[config["model_type"]] == "roberta" else 0
    given = config.get("pad_token_id")
    return default if given is None else int(given)
