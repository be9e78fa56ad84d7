"""Precision and device the way torch modules change them, in place and chainable."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, NoReturn, Self

from echelon.errors import InvalidInput
from echelon.integrations.keywords import PRECISIONS, device_option, precision_of
from echelon.models.device import DTYPES

if TYPE_CHECKING:
    import torch

    from echelon.integrations.sentence_transformers import CrossEncoder
    from echelon.types import ModelInfo

TRAINING = "Echelon scores, it does not train or save. Use sentence_transformers for that."
POOLS = "One process uses one device. Start a process for each device and share the pairs out."
COMPILING = "Echelon's engine is not compiled. Leave the call out."
REMEDIES = {
    "fit": TRAINING,
    "old_fit": TRAINING,
    "train": TRAINING,
    "evaluate": TRAINING,
    "save": TRAINING,
    "save_pretrained": TRAINING,
    "save_to_hub": TRAINING,
    "push_to_hub": TRAINING,
    "start_multi_process_pool": POOLS,
    "stop_multi_process_pool": POOLS,
    "compile": COMPILING,
}
"""Methods of the originals that Echelon has none of → what to do instead."""


class Movable(ABC):
    """A model that can be moved to another device or precision.

    A change opens the model again from its files; asking for what is in force does nothing.
    """

    @property
    @abstractmethod
    def _facts(self) -> ModelInfo: ...

    @abstractmethod
    def _reopen(self, **changes: Any) -> None:
        """Open the model again with other options."""

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        import torch

        return torch.device(self._facts.device)

    @property
    def dtype(self) -> torch.dtype:
        """What its layers compute in."""
        import torch

        dtype: torch.dtype = getattr(torch, DTYPES[self._facts.precision])
        return dtype

    def half(self) -> Self:
        """Compute in fp16."""
        return self._in("fp16")

    def bfloat16(self) -> Self:
        """Compute in bf16."""
        return self._in("bf16")

    def float(self) -> Self:
        """Compute in fp32."""
        return self._in("fp32")

    def cpu(self) -> Self:
        """Move to the CPU."""
        return self._on("cpu")

    def cuda(self, device: int | str | torch.device | None = None) -> Self:
        """Move to a CUDA device."""
        return self._on("cuda" if device is None else device_option(device))

    def to(self, device: object = None, dtype: object = None) -> Self:
        """Move to a device, a dtype, or both; a dtype may come first, as in torch.

        Raises:
            InvalidInput: the device is not there, or neither is named.
        """
        if str(device).removeprefix("torch.") in PRECISIONS:
            device, dtype = None, device
        if device is None and dtype is None:
            raise InvalidInput("to", "names neither a device nor a dtype", "Name one.")
        if device is not None:
            self._on(device_option(device))
        precision = precision_of("dtype", dtype)
        return self if precision is None else self._in(precision)

    def eval(self) -> Self:
        """Nothing: a model in Echelon only ever scores."""
        return self

    def _in(self, precision: str) -> Self:
        if precision != self._facts.precision:
            self._reopen(precision=precision)
        return self

    def _on(self, device: str) -> Self:
        now = self._facts.device
        if device != now and not (device == "cuda" and now.startswith("cuda")):
            self._reopen(device=device)
        return self

    def __getattr__(self, name: str) -> NoReturn:
        remedy = REMEDIES.get(name, "Echelon has no such attribute. Use predict or rank.")
        raise AttributeError(f"{type(self).__name__}.{name}: {remedy}")


class InnerModel(Movable):
    """What ``model.model`` is: the same model, by the name that scripts reach into.

    Args:
        owner: the model that is moved when this is.
    """

    def __init__(self, owner: CrossEncoder) -> None:
        self._owner = owner

    @property
    def config(self) -> Any:
        """As :attr:`CrossEncoder.config`."""
        return self._owner.config

    @property
    def _facts(self) -> ModelInfo:
        return self._owner._facts  # noqa: SLF001 - two faces of one model

    def _reopen(self, **changes: Any) -> None:
        self._owner._reopen(**changes)  # noqa: SLF001 - two faces of one model
