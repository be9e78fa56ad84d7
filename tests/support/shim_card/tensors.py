"""Tensors of a card: torch sees ``device="cuda:0"``, and their numbers lie in a tensor on CPU.

They are wrapper subclasses, so every operator of every thread comes to :func:`launched` with the
device, dtype and strides that it would have on a card. Operators without a tensor among their
arguments, such as ``empty``, come through kernels that are registered for CUDA.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from shim_card.machine import Block, Card, current_machine

if TYPE_CHECKING:
    from collections.abc import Callable

POISON = 0x7F  # the byte that unwritten memory holds: a huge number, where it is no NaN


class CardTensor(torch.Tensor):
    """A tensor of a card."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    dispatch: ClassVar[Callable[..., Any]]
    held: torch.Tensor  # the numbers
    block: Block  # the memory of the card that they take

    @staticmethod
    def __new__(cls, held: torch.Tensor, block: Block) -> Self:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=block.card.device,
        )
        made.held, made.block = held, block
        return made

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Every operator."""
        return CardTensor.dispatch(func, args, kwargs or {})

    def __repr__(self, **_: Any) -> str:
        return f"CardTensor({self.held!r}, device={self.device})"

    # Torch's own versions of these ask a driver for the present card, which is not there.

    def __getitem__(self, index: Any) -> Any:
        found, indices = _select(self, index)
        if any(part is not None for part in indices):
            return torch.ops.aten.index.Tensor(found, indices)
        return found if found is not self else torch.ops.aten.alias.default(self)

    def __setitem__(self, index: Any, value: Any) -> None:
        found, indices = _select(self, index)
        if not isinstance(value, torch.Tensor):
            value = torch.tensor(value, dtype=self.dtype)
        if any(part is not None for part in indices):
            torch.ops.aten.index_put_.default(found, indices, value.to(self.device))
        else:
            torch.ops.aten.copy_.default(found, value)

    def contiguous(self, memory_format: Any = torch.contiguous_format) -> Any:
        if self.is_contiguous(memory_format=memory_format):
            return self
        return torch.ops.aten.clone.default(self, memory_format=memory_format)

    def copy_(self, source: Any, non_blocking: bool = False) -> Any:  # noqa: FBT001, FBT002 - torch's own signature
        return torch.ops.aten.copy_.default(self, source, non_blocking)

    def nonzero(self, *, as_tuple: bool = False) -> Any:
        found = torch.ops.aten.nonzero.default(self)
        return found.unbind(1) if as_tuple else found

    def __invert__(self) -> Any:
        return torch.ops.aten.bitwise_not.default(self)

    def item(self) -> Any:
        if self.numel() != 1:
            message = f"a Tensor with {self.numel()} elements cannot be converted to Scalar"
            raise RuntimeError(message)
        return torch.ops.aten._local_scalar_dense.default(self)

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError(
            f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() to copy "
            "the tensor to host memory first."
        )

    def __float__(self) -> float:
        return float(self.item())

    def __int__(self) -> int:
        return int(self.item())

    def __index__(self) -> int:
        return int(self.item())

    def __bool__(self) -> bool:
        return bool(self.item())

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def is_pinned(self, _: Any = None) -> bool:
        return False

    def record_stream(self, stream: Any) -> None:
        """Nothing: work keeps what it reads."""
        del stream


def _select(tensor: Any, index: Any) -> tuple[Any, list[Any]]:
    """The view that the numbers and slices of an index give, and its tensors by dimension."""
    parts = list(index) if isinstance(index, tuple) else [index]
    if Ellipsis not in [part for part in parts if not isinstance(part, torch.Tensor)]:
        parts.append(Ellipsis)
    ops, dimension = torch.ops.aten, 0
    indices: list[Any] = []
    for part in parts:
        if part is Ellipsis:
            wide = tensor.dim() - dimension - _left(parts, part)
            dimension += wide
            indices += [None] * wide
        elif part is None:
            tensor = ops.unsqueeze.default(tensor, dimension)
            dimension += 1
            indices.append(None)
        elif isinstance(part, slice):
            if part != slice(None):
                tensor = ops.slice.Tensor(tensor, dimension, part.start, part.stop, part.step or 1)
            dimension += 1
            indices.append(None)
        elif isinstance(part, int):
            tensor = ops.select.int(tensor, dimension, part)
        else:
            chosen = torch.as_tensor(part)
            dimension += chosen.dim() if chosen.dtype == torch.bool else 1
            indices.append(chosen)
    return tensor, indices


def _left(parts: list[Any], ellipsis: Any) -> int:
    """Dimensions that the parts after the ellipsis take."""
    after = parts[next(i for i, part in enumerate(parts) if part is ellipsis) + 1 :]
    return sum(
        part.dim() if isinstance(part, torch.Tensor) and part.dtype == torch.bool else 1
        for part in after
        if part is not None
    )


def held(value: Any) -> Any:
    """Arguments with the numbers of the card's tensors in their place."""
    return tree_map_only(CardTensor, lambda tensor: tensor.held, value)


def tensors_of(value: Any) -> list[CardTensor]:
    """The card's tensors among arguments."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, CardTensor)]


def wrapped(value: Any, card: Card, given: list[CardTensor]) -> Any:
    """Results as tensors of the card; views share the memory of what they are views of."""
    if isinstance(value, torch.Tensor) and not isinstance(value, CardTensor):
        return CardTensor(value, _block(value, card, given))
    if isinstance(value, (tuple, list)):
        return type(value)(wrapped(part, card, given) for part in value)
    return value


def _block(value: torch.Tensor, card: Card, given: list[CardTensor]) -> Block:
    storage = value.untyped_storage()
    for tensor in given:
        if tensor.held.untyped_storage()._cdata == storage._cdata:
            return tensor.block
    return card.block(storage.nbytes())


def poison(tensor: torch.Tensor) -> torch.Tensor:
    """Fill memory that nothing was written to."""
    with torch.inference_mode():
        flat = tensor.as_strided((tensor.untyped_storage().nbytes() // tensor.itemsize,), (1,), 0)
        flat.view(torch.uint8).fill_(POISON)
        if tensor.dtype.is_floating_point:
            flat.fill_(torch.nan)
    return tensor


def blank(like: Any, card: Card) -> Any:
    """Tensors of the card, unwritten, in the shapes of results on the meta device."""

    def made(shape: torch.Tensor) -> CardTensor:
        space = torch.empty_strided(shape.size(), shape.stride(), dtype=shape.dtype)
        return CardTensor(poison(space), card.block(space.untyped_storage().nbytes()))

    return tree_map_only(torch.Tensor, made, like)


def new_tensor(make: Callable[[], torch.Tensor], device: Any) -> CardTensor:
    """A new tensor of a card."""
    card = current_machine().card_of(device)
    card.check()
    with torch.inference_mode():
        numbers = make()
    return CardTensor(numbers, card.block(numbers.untyped_storage().nbytes()))
