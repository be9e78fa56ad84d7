"""The methods that ``CrossEncoder`` shares with torch modules, and its activation functions.

Torch is imported where it is used, so that this module imports quickly and without it.
"""

from __future__ import annotations

import importlib
import warnings
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, NoReturn, Self

import numpy as np

from echelon.errors import EchelonWarning, InvalidInput
from echelon.integrations.originals import PRECISIONS, device_option, precision_of
from echelon.models.device import DTYPES

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from echelon.integrations.originals import SavedSettings
    from echelon.types import FloatArray, ModelInfo

    Activation = Callable[[torch.Tensor], torch.Tensor]

TRAINING = "Echelon scores, it does not train or save. Use sentence_transformers for that."
POOLS = "One process uses one device. Start a process for each device and share the pairs out."
TRAINING_METHODS = ("fit", "old_fit", "train", "evaluate")
SAVING_METHODS = ("save", "save_pretrained", "save_to_hub", "push_to_hub")
REMEDIES = {
    **dict.fromkeys((*TRAINING_METHODS, *SAVING_METHODS), TRAINING),
    **dict.fromkeys(("start_multi_process_pool", "stop_multi_process_pool"), POOLS),
    "compile": "Echelon's engine is not compiled. Leave the call out.",
}
"""Methods of the originals that Echelon does not have → what to do instead."""


class TorchModule(ABC):
    """A model that moves to another device or precision, as a torch module does.

    A change opens the model again from its files; a request for the current setting does nothing.
    """

    @property
    @abstractmethod
    def _info(self) -> ModelInfo: ...

    @abstractmethod
    def _reopen(self, **changes: Any) -> None:
        """Open the model again with other options."""

    @property
    def device(self) -> torch.device:
        """The device that computes."""
        import torch

        return torch.device(self._info.device)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that its layers compute in."""
        import torch

        dtype: torch.dtype = getattr(torch, DTYPES[self._info.precision])
        return dtype

    def half(self) -> Self:
        """Compute in fp16."""
        return self._set_precision("fp16")

    def bfloat16(self) -> Self:
        """Compute in bf16."""
        return self._set_precision("bf16")

    def float(self) -> Self:
        """Compute in fp32."""
        return self._set_precision("fp32")

    def cpu(self) -> Self:
        """Move to the CPU."""
        return self._move("cpu")

    def cuda(self, device: int | str | torch.device | None = None) -> Self:
        """Move to a CUDA device."""
        return self._move("cuda" if device is None else device_option(device))

    def to(self, device: object = None, dtype: object = None) -> Self:
        """Move to a device, a dtype, or both; a dtype may come first, as in torch."""
        if str(device).removeprefix("torch.") in PRECISIONS:
            device, dtype = None, device
        if device is None and dtype is None:
            raise InvalidInput("to", "names neither a device nor a dtype", "Name one.")
        if device is not None:
            self._move(device_option(device))
        precision = precision_of("dtype", dtype)
        return self if precision is None else self._set_precision(precision)

    def eval(self) -> Self:
        """Do nothing: Echelon's models do not train."""
        return self

    def _set_precision(self, precision: str) -> Self:
        if precision != self._info.precision:
            self._reopen(precision=precision)
        return self

    def _move(self, device: str) -> Self:
        current = self._info.device
        if device != current and not (device == "cuda" and current.startswith("cuda")):
            self._reopen(device=device)
        return self

    def __getattr__(self, name: str) -> NoReturn:
        remedy = REMEDIES.get(name, "Echelon has no such attribute. Use predict or rank.")
        raise AttributeError(f"{type(self).__name__}.{name}: {remedy}")


def default_activation(saved: SavedSettings) -> Activation:
    """The function a model was saved with, else sigmoid for one label and none for several."""
    import torch

    for path in saved.activations:
        function = _torch_function(path)
        if function is not None:
            return function
        warnings.warn(
            f"The model asks for the activation {path}, which is not one of torch's modules and "
            "is not run. Pass activation_fn if the default is not what you want.",
            EchelonWarning,
            stacklevel=5,
        )
    return torch.nn.Sigmoid() if len(saved.labels) == 1 else torch.nn.Identity()


def _torch_function(path: str) -> Activation | None:
    """Instance of the torch module with this dotted name, if it needs no arguments."""
    import torch

    if not path.startswith("torch.nn."):
        return None
    module, _, name = path.rpartition(".")
    try:
        kind = getattr(importlib.import_module(module), name)
        return kind() if issubclass(kind, torch.nn.Module) else None
    except (ImportError, AttributeError, TypeError):
        return None


def check_activation(function: object) -> None:
    """Raise :class:`InvalidInput` for an activation that cannot be called."""
    if not callable(function):
        remedy = "Pass a function of a tensor, such as torch.nn.Sigmoid()."
        raise InvalidInput("activation_fn", f"{function!r} is not callable", remedy)


def activate(
    logits: FloatArray, function: Activation, device: torch.device, *, softmax: bool
) -> torch.Tensor:
    """Apply an activation function once to all logits, as a tensor [pairs, 1].

    ``softmax`` normalizes over the last axis if the function returns several values a pair. The
    result is a tensor [pairs], or [pairs, values].
    """
    import torch

    if not len(logits):  # as in the original, the function never gets an empty tensor
        return torch.tensor([], device=device)
    with torch.no_grad():
        scores = function(torch.from_numpy(logits).to(device).unsqueeze(-1))
        if not isinstance(scores, torch.Tensor) or scores.shape[:1] != (len(logits),):
            is_tensor = isinstance(scores, torch.Tensor)
            kind = f"tensor of shape {tuple(scores.shape)}" if is_tensor else type(scores).__name__
            problem = f"gave a {kind} for a tensor of {len(logits)} x 1"
            remedy = "Return a tensor with one row for each pair."
            raise InvalidInput("activation_fn", problem, remedy)
        if scores.ndim > 1:
            scores = scores.squeeze(-1)
        return torch.softmax(scores, dim=1) if softmax and scores.ndim > 1 else scores


def converted(scores: torch.Tensor, *, to_tensor: bool, to_numpy: bool) -> Any:
    """Scores as a tensor, a float32 array, or a list of tensors."""
    if to_tensor:
        return scores
    if to_numpy:
        # The original's empty result is a float64 array.
        return scores.float().cpu().numpy() if len(scores) else np.array([])
    return list(scores)
