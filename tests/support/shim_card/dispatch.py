"""Every operator on a card's tensors: checked, run or queued, accounted for."""

from __future__ import annotations

import warnings
from functools import cache
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch._library.custom_ops import OPDEFS
from torch.utils._pytree import tree_leaves, tree_map_only

from shim_card.faults import IN_CAPTURE, WAITED, error_of
from shim_card.machine import Card, current_machine
from shim_card.operators import REFUSALS, by_name, kernel_of
from shim_card.pinned import is_pinned, pinned_empty
from shim_card.tensors import (
    CardTensor,
    blank,
    held,
    new_tensor,
    poison,
    tensors_of,
    wrapped,
)

if TYPE_CHECKING:
    from collections.abc import Callable

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default

WAITING = {
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.bincount.default,
    aten.repeat_interleave.Tensor,
    aten.equal.default,
    aten.is_nonzero.default,
}
"""The shape or the value of their result is known only when they have run."""

NO_LAUNCH = {aten.empty_like.default, aten.new_empty.default, aten.new_empty_strided.default}
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default}
"""Their indices may lie on CPU."""


def dispatch(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One operator with a tensor of a card among its arguments."""
    if func in COPIES:
        return COPIES[func](*args, **kwargs)
    if func is not SDPA and _is_composite(func):
        return func.decompose(*args, **kwargs)
    custom = OPDEFS.get(func.name().partition(".")[0])
    if custom is not None and _is_written_in_python(custom):
        return custom._init_fn(*args, **kwargs)
    if torch.Tag.inplace_view in func.tags:
        raise NotImplementedError(f"The shim card has no {func}, which changes a tensor's shape")
    card = _card_of(func, args, kwargs)
    card.check()
    if func in REFUSALS:
        REFUSALS[func](card, by_name(func, args, kwargs))
    if func.is_view:
        with torch.inference_mode():
            views = func(*held(args), **held(kwargs))
        given = tensors_of((args, kwargs))
        # A view of a tensor from outside of inference mode is one from outside.
        with torch.inference_mode(torch.is_inference_mode_enabled() and given[0].is_inference()):
            return wrapped(views, card, given)
    if func in WAITING or (func in INDEXING and _reads_indices(args)):
        card.wait(str(func))
        return _run_now(func, func, args, kwargs, card)
    return _launch(func, args, kwargs, card)


@cache
def _is_composite(func: Any) -> bool:
    """Whether an operator is nothing but other operators."""
    name = func.name()
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeImplicitAutograd"))


@cache
def _gives_back(func: Any) -> bool:
    """Whether an operator returns a tensor that it was given to change, or nothing."""
    returns = func._schema.returns
    return func._schema.is_mutable and all(one.alias_info is not None for one in returns)


def _is_written_in_python(custom: Any) -> bool:
    """Whether an operator is one of ``torch.library.custom_op`` for every device."""
    return not [key for key in custom._backend_fns if key is not None]


def _card_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Card:
    """The card of all tensors among the arguments."""
    skipped = {id(part) for part in args[1]} if func in INDEXING else set()
    devices = {
        leaf.device
        for leaf in chain(tree_leaves(args), kwargs.values())
        if isinstance(leaf, torch.Tensor)
        and id(leaf) not in skipped
        and (isinstance(leaf, CardTensor) or leaf.dim() > 0)
    }
    if len(devices) > 1:
        first, second, *_ = sorted(map(str, devices), reverse=True)
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, "
            f"{first} and {second}! ({func})"
        )
    (tensor, *_) = tensors_of((args, kwargs))
    return tensor.block.card


def _reads_indices(args: tuple[Any, ...]) -> bool:
    """Whether indices come from the host, or are masks, whose number of rows the host reads."""
    return any(
        part is not None and (not isinstance(part, CardTensor) or part.dtype == torch.bool)
        for part in args[1]
    )


def _launch(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], card: Card) -> Any:
    stream = current_machine().stream(card)
    if func not in NO_LAUNCH:
        sizes = [tensor.held.nbytes for tensor in tensors_of((args, kwargs))]
        card.event("launch", max(sizes))
    kernel = kernel_of(func, card)
    if not current_machine().deferred and stream.tape is None:
        return _run_now(func, kernel, args, kwargs, card)
    made = None if _gives_back(func) else blank(_shapes(func, args, kwargs), card)
    targets = tree_leaves(made)
    if func in NO_LAUNCH:
        return made

    def work() -> None:
        with torch.inference_mode():
            found = kernel(*held(args), **held(_on_cpu(kwargs)))
            if made is None:
                return
            for target, value in zip(targets, tree_leaves(found), strict=True):
                if isinstance(target, CardTensor):
                    target.held.copy_(value)

    stream.submit(work)
    _note(func, targets, card)
    return _changed(args, kwargs) if made is None else made


def _run_now(
    func: Any, kernel: Callable[..., Any], args: Any, kwargs: dict[str, Any], card: Card
) -> Any:
    with torch.inference_mode():
        found = kernel(*held(args), **held(_on_cpu(kwargs)))
    if _gives_back(func):
        made = _changed(args, kwargs)
    elif _leaves_the_card(kwargs):
        return found
    else:
        made = wrapped(found, card, tensors_of((args, kwargs)))
    if func not in NO_LAUNCH:
        _note(func, tree_leaves(made), card)
    return made


def _note(func: Any, made: list[Any], card: Card) -> None:
    size = sum(part.held.nbytes for part in made if isinstance(part, CardTensor))
    card.machine.note("launch", str(func), size, card)


def _changed(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What an operator returns that writes into its arguments."""
    return kwargs["out"] if "out" in kwargs else args[0]


def _on_cpu(kwargs: dict[str, Any]) -> dict[str, Any]:
    if "device" not in kwargs:
        return kwargs
    return {**kwargs, "device": torch.device("cpu"), "pin_memory": False}


def _leaves_the_card(kwargs: dict[str, Any]) -> bool:
    """Whether the result is asked for on CPU, as by ``empty_like(tensor, device="cpu")``."""
    device = kwargs.get("device")
    return device is not None and torch.device(device).type == "cpu"


def _shapes(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The results on the meta device."""
    if func is SDPA:
        query, _, value = args[:3]
        return torch.empty((*query.shape[:-1], value.shape[-1]), dtype=query.dtype, device="meta")

    def meta(tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty_strided(
            tensor.size(), tensor.stride(), dtype=tensor.dtype, device="meta"
        )

    args, kwargs = tree_map_only(torch.Tensor, meta, (args, kwargs))
    if "device" in kwargs:
        kwargs = {**kwargs, "device": torch.device("meta"), "pin_memory": False}
    with torch.inference_mode():
        return func(*args, **kwargs)


# Copies


def _copy(target: Any, source: Any, non_blocking: bool = False) -> Any:  # noqa: FBT001, FBT002 - torch's own signature
    """``copy_`` from or to a card, or on it."""
    if isinstance(target, CardTensor):
        if isinstance(source, CardTensor):
            _copy_on_cards(target, source)
        else:
            _copy_in(target, source, non_blocking=non_blocking)
    else:
        _copy_out(target, source, non_blocking=non_blocking)
    return target


def _copy_on_cards(target: CardTensor, source: CardTensor) -> None:
    card = target.block.card
    card.event("launch", target.held.nbytes)
    _submit(card, target.held, source.held)
    card.machine.note("launch", "aten.copy_.default", target.held.nbytes, card)


def _submit(card: Card, target: torch.Tensor, source: torch.Tensor) -> None:
    def work() -> None:
        with torch.inference_mode():
            target.copy_(source)

    current_machine().stream(card).submit(work)


def _copy_in(target: CardTensor, source: torch.Tensor, *, non_blocking: bool) -> None:
    """From the host. Only pinned memory is read later; of other memory the driver takes a copy."""
    card = target.block.card
    card.event("copy", target.held.nbytes)
    card.machine.note("copy in", "aten.copy_.default", target.held.nbytes, card)
    stream = current_machine().stream(card)
    pinned = is_pinned(source)
    if stream.tape is not None and not (pinned and non_blocking):
        stream.tape.invalid = True
        raise error_of(IN_CAPTURE)
    _refuse_waiting(card, waits=not non_blocking)
    _submit(card, target.held, source if pinned else source.clone())
    if not non_blocking:
        stream.run_until(stream.position)


def _copy_out(target: torch.Tensor, source: CardTensor, *, non_blocking: bool) -> None:
    """To the host, which waits unless the memory is pinned and it need not."""
    card = source.block.card
    card.event("copy", target.nbytes)
    card.machine.note("copy out", "aten.copy_.default", target.nbytes, card)
    stream = current_machine().stream(card)
    waits = not (non_blocking and is_pinned(target))
    if stream.tape is not None and waits:
        stream.tape.invalid = True
        raise error_of(IN_CAPTURE)
    _refuse_waiting(card, waits=waits)
    if current_machine().deferred and not waits:
        poison(target) if target.is_contiguous() else None
    _submit(card, target, source.held)
    if waits:
        stream.run_until(stream.position)


def _refuse_waiting(card: Card, *, waits: bool) -> None:
    if waits and card.machine.sync_debug == "error":
        raise error_of(WAITED)


def _to_copy(
    source: CardTensor,
    *,
    dtype: torch.dtype | None = None,
    layout: Any = None,
    device: Any = None,
    pin_memory: bool | None = None,
    non_blocking: bool = False,
    memory_format: Any = None,
) -> Any:
    """``to``, ``cpu``, ``float`` and their like."""
    del layout, pin_memory
    kept = torch.preserve_format if memory_format is None else memory_format
    like = torch.empty_like(source.held, dtype=dtype, device="meta", memory_format=kept)
    if device is not None and torch.device(device).type == "cpu":
        make = pinned_empty if non_blocking else torch.empty
        target = make(tuple(like.size()), dtype=like.dtype)
        _copy_out(target, source, non_blocking=non_blocking)
        return target
    target = new_tensor(
        lambda: torch.empty_strided(like.size(), like.stride(), dtype=like.dtype),
        source.device if device is None else device,
    )
    _copy_on_cards(target, source)
    return target


def _scalar(source: CardTensor) -> Any:
    card = source.block.card
    card.wait("aten._local_scalar_dense.default")
    return source.held.item()


COPIES: dict[Any, Callable[..., Any]] = {
    aten.copy_.default: _copy,
    aten._to_copy.default: _to_copy,
    aten._local_scalar_dense.default: _scalar,
}

CardTensor.dispatch = staticmethod(dispatch)


# Operators without a tensor among their arguments


def _empty(
    size: Any, *, dtype: Any = None, layout: Any = None, device: Any = None, pin_memory: Any = None,
    memory_format: Any = None,
) -> Any:  # fmt: skip
    del layout, pin_memory
    form = memory_format or torch.contiguous_format
    return new_tensor(
        lambda: poison(torch.empty(tuple(size), dtype=dtype, memory_format=form)), device
    )


def _empty_strided(
    size: Any, stride: Any, *, dtype: Any = None, layout: Any = None, device: Any = None,
    pin_memory: Any = None,
) -> Any:  # fmt: skip
    del layout, pin_memory
    return new_tensor(lambda: poison(torch.empty_strided(size, stride, dtype=dtype)), device)


def _made_on_cpu(func: Any) -> Callable[..., Any]:
    """A factory whose numbers the CPU makes."""

    def make(*args: Any, device: Any = None, pin_memory: Any = None, **kwargs: Any) -> Any:
        del pin_memory
        made = new_tensor(lambda: func(*args, device=torch.device("cpu"), **kwargs), device)
        card = made.block.card
        card.event("launch", made.held.nbytes)
        _note(func, [made], card)
        return made

    return make


@cache
def register() -> torch.library.Library:
    """Give torch kernels for CUDA; once a process, since they ask which machine there is."""
    with warnings.catch_warnings():  # torch before 2.13 warns of each kernel that is replaced
        warnings.filterwarnings("ignore", "Warning only once for all operators")
        return _registered()


def _registered() -> torch.library.Library:
    library = torch.library.Library("aten", "IMPL")
    library.impl("empty.memory_format", _empty, "CUDA", allow_override=True)
    library.impl("empty_strided", _empty_strided, "CUDA", allow_override=True)
    for name in ("arange.default", "arange.start", "arange.start_step", "linspace.default"):
        packet, _, overload = name.partition(".")
        func = getattr(getattr(aten, packet), overload)
        library.impl(
            packet if overload == "default" else name, _made_on_cpu(func), "CUDA",
            allow_override=True,
        )  # fmt: skip
    return library
