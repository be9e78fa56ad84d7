"""Logits to what ``predict`` hands out: activation functions and kinds of results."""

from __future__ import annotations

import importlib
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from echelon.errors import EchelonWarning, InvalidInput

if TYPE_CHECKING:
    from collections.abc import Callable

    from echelon.integrations.arguments import Saved
    from echelon.types import FloatArray

    Activation = Callable[[torch.Tensor], torch.Tensor]


def default_activation(saved: Saved) -> Activation:
    """The function a model was saved with, else sigmoid for one label and none for several.

    Warns:
        EchelonWarning: it was saved with a function that is not torch's own.
    """
    for path in saved.activations:
        function = _torch_module(path)
        if function is not None:
            return function
        warnings.warn(
            f"The model asks for the activation {path}, which is not one of torch's modules and "
            "is not run. Pass activation_fn if the default is not what you want.",
            EchelonWarning,
            stacklevel=5,
        )
    return torch.nn.Sigmoid() if len(saved.labels) == 1 else torch.nn.Identity()


def _torch_module(path: str) -> Activation | None:
    """Instance of a torch module that needs no arguments, by its dotted name."""
    if not path.startswith("torch.nn."):
        return None
    home, _, name = path.rpartition(".")
    try:
        kind = getattr(importlib.import_module(home), name)
        module = kind() if issubclass(kind, torch.nn.Module) else None
    except (ImportError, AttributeError, TypeError):
        return None
    return module


def check_activation(function: object) -> None:
    """Refuse what cannot be called.

    Raises:
        InvalidInput: not callable.
    """
    if not callable(function):
        raise InvalidInput(
            "activation_fn",
            f"{function!r} is not callable",
            "Pass a function of a tensor, such as torch.nn.Sigmoid().",
        )


def activate(
    logits: FloatArray, function: Activation, device: torch.device, *, softmax: bool
) -> torch.Tensor:
    """Apply an activation function.

    Args:
        logits: float32 [pairs].
        function: called once with a tensor [pairs, 1], the shape that a model gives out.
        device: where the tensor lies.
        softmax: normalize over the last axis if the function leaves one.

    Returns:
        Tensor [pairs], or [pairs, values] from a function that gives several a pair.

    Raises:
        InvalidInput: the function gave something else than a value for each pair.
    """
    if not len(logits):  # as in the original, the function never sees an empty tensor
        return torch.tensor([], device=device)
    with torch.no_grad():
        scores = function(torch.from_numpy(logits).to(device).unsqueeze(-1))
        if not isinstance(scores, torch.Tensor) or scores.shape[:1] != (len(logits),):
            raise InvalidInput(
                "activation_fn",
                f"gave {_described(scores)} for a tensor of {len(logits)} x 1",
                "Return a tensor with one row for each pair.",
            )
        if scores.ndim > 1:
            scores = scores.squeeze(-1)
        return torch.softmax(scores, dim=1) if softmax and scores.ndim > 1 else scores


def _described(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}"


def deliver(scores: torch.Tensor, *, as_tensor: bool, as_numpy: bool) -> Any:
    """Scores as the caller wants them: a tensor, a float32 array, or a list of tensors."""
    if as_tensor:
        return scores
    if as_numpy:
        # The original's empty result is a float64 array.
        return scores.float().cpu().numpy() if len(scores) else np.array([])
    return list(scores)
