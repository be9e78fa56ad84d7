"""What a model folder says about its own use: activation, prompts, length, precision. No torch.

What scripts pass to ``CrossEncoder``, checked and put into plain form. No torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from echelon.errors import BadCheckpoint, InvalidInput, UnsupportedModel
from echelon.integrations.keywords import PRECISIONS, only, precision_of
from echelon.models.architecture import labels_of, read_config

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from echelon.options import Precision


@dataclass(frozen=True, slots=True)
class Saved:
    """Settings saved with a model.

    Attributes:
        labels: names of the head's outputs.
        precision: what the weights are stored in; both originals compute in that by default.
        max_length: the tokenizer's limit; None if it states none.
        activations: dotted paths of activation functions, the one to prefer first.
        prompts: name → text put before queries.
        default_prompt_name: the prompt to use when none is named.
    """

    labels: tuple[str, ...]
    precision: Precision
    max_length: int | None
    activations: tuple[str, ...] = ()
    prompts: dict[str, str] = field(default_factory=dict)
    default_prompt_name: str | None = None


def read_saved(folder: Path) -> Saved:
    """Read a model folder's settings.

    Raises:
        ModelNotFound: no model there.
        BadCheckpoint: a file that cannot be read.
        UnsupportedModel: parts beside the transformer, which would not be run.
    """
    config = read_config(folder)
    usage = _usage(folder)
    dtype = str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch.")
    limit = _read_json(folder / "tokenizer_config.json").get("model_max_length")
    candidates = (usage.get("activation_fn"), _activation_in(config))
    return Saved(
        labels=labels_of(config),
        precision=PRECISIONS.get(dtype, "fp32"),
        max_length=int(limit) if isinstance(limit, int | float) else None,
        activations=tuple(path for path in candidates if isinstance(path, str)),
        prompts={name: text or "" for name, text in (usage.get("prompts") or {}).items()},
        default_prompt_name=usage.get("default_prompt_name"),
    )


def _usage(folder: Path) -> dict[str, Any]:
    """Settings of a folder that sentence-transformers saved as a chain of modules."""
    modules = _read_json(folder / "modules.json", list)
    if not modules:
        return {}
    if len(modules) > 1 or modules[0].get("path"):
        raise UnsupportedModel(
            f"{folder / 'modules.json'}: lists more than one transformer in this folder, and "
            "Echelon would not run the rest. Stay with sentence_transformers for this model."
        )
    usage: dict[str, Any] = _read_json(folder / "config_sentence_transformers.json")
    return usage


def _activation_in(config: dict[str, Any]) -> Any:
    """Where versions 4 and 5 saved it, else where earlier ones did."""
    newer = config.get("sentence_transformers")
    if isinstance(newer, dict) and "activation_fn" in newer:
        return newer["activation_fn"]
    return config.get("sbert_ce_default_activation_function")


def _read_json(path: Path, kind: type = dict) -> Any:
    if not path.is_file():
        return kind()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadCheckpoint(f"{path}: not JSON ({error}). Download the model again.") from error
    if not isinstance(content, kind):
        raise BadCheckpoint(f"{path}: not a JSON {kind.__name__}. Download the model again.")
    return content


PAIR_DIMENSIONS = 2
"""Dimensions of an array of pairs; an array of one is a pair by itself."""


def asked_precision(model_kwargs: Mapping[str, Any] | None, options: Mapping[str, Any]) -> Any:
    """Precision that the caller names, in the original's words or in Echelon's.

    Returns:
        The ``precision`` option; None if the caller names none.

    Raises:
        InvalidInput: it is named twice or unknown, or another entry of ``model_kwargs``.
    """
    given = only(
        "model_kwargs",
        model_kwargs,
        "dtype",
        "torch_dtype",
        remedy="Echelon loads weights and computes attention its own way, with the same "
        "results. Leave the entry out; the device is set by device=.",
    )
    named = {name for name, dtype in given.items() if dtype is not None}
    if len(named) + ("precision" in options) > 1:
        raise InvalidInput("precision", "is named more than once", "Name one of dtype, precision.")
    for name in named:
        return precision_of(f"model_kwargs[{name!r}]", given[name])
    return options.get("precision")


def asked_length(max_length: int | None, processor_kwargs: Mapping[str, Any] | None) -> Any:
    """Length limit that the caller names, by either name; None if by neither.

    Raises:
        InvalidInput: ``processor_kwargs`` has another entry.
    """
    given = only(
        "processor_kwargs",
        processor_kwargs,
        "model_max_length",
        remedy="Echelon uses the tokenizer as it was saved. Leave the entry out.",
    )
    return given.get("model_max_length") if max_length is None else max_length


def check_num_labels(
    num_labels: int | None, config_kwargs: Mapping[str, Any] | None, saved: Saved
) -> None:
    """Refuse to change the number of a model's labels.

    Raises:
        InvalidInput: another number than the model has, or another entry of ``config_kwargs``.
    """
    given = only(
        "config_kwargs",
        config_kwargs,
        "num_labels",
        remedy="Echelon scores a model as it was saved. Leave the entry out.",
    )
    asked = given.get("num_labels") if num_labels is None else num_labels
    if asked is not None and asked != len(saved.labels):
        raise InvalidInput(
            "num_labels",
            f"{asked!r} asked for, and the model was trained with {len(saved.labels)}",
            "Leave it out; a new head must be trained with sentence_transformers first.",
        )


def is_single(inputs: object) -> bool:
    """Whether the inputs are one pair rather than many; then the result is a scalar."""
    if isinstance(inputs, np.ndarray):
        return inputs.ndim < PAIR_DIMENSIONS and inputs.size > 0
    return isinstance(inputs, list | tuple) and len(inputs) > 0 and isinstance(inputs[0], str)


def as_list(inputs: Any, *, single: bool) -> list[Any]:
    """Inputs as a list of pairs.

    Raises:
        InvalidInput: neither a pair nor a series of pairs.
    """
    if isinstance(inputs, str | bytes | dict) or not isinstance(inputs, Iterable):
        raise InvalidInput("inputs", f"is {type(inputs).__name__}", "Pass pairs of two texts.")
    listed = inputs.tolist() if isinstance(inputs, np.ndarray) else inputs
    return [listed] if single else list(listed)


def as_documents(documents: Any) -> list[Any]:
    """Documents as a list.

    Raises:
        InvalidInput: one text, or something that is no series.
    """
    if isinstance(documents, str | bytes | dict) or not isinstance(documents, Iterable):
        raise InvalidInput(
            "documents", f"is {type(documents).__name__}, not a list", "Pass a list of texts."
        )
    return list(documents)
