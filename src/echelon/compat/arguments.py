"""What scripts pass to ``CrossEncoder``, checked and put into plain form. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from echelon.compat.keywords import only, precision_of
from echelon.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Mapping

    from echelon.compat.saved import Saved

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
