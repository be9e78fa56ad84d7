"""``torch.cuda`` and the few other functions of torch that ask a driver, answered by shims."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
import torch.__future__
import torch.utils._device

from echelon.models import cuda_steps
from shim_card import graphs, machine
from shim_card.dispatch import register
from shim_card.machine import Event, Machine, Stream, current_machine
from shim_card.pinned import is_pinned, pinned_empty
from shim_card.tensors import CardTensor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MOST_TOKENS = 256
"""Largest step that is captured: more would take longer to capture here than all else."""

CUDA_VERSION = "13.0"  # what torch says that it was built with


def _properties(device: Any = None) -> Any:
    card = current_machine().card_of(device)
    major, minor = card.machine.capability
    return SimpleNamespace(
        name=card.machine.name,
        total_memory=card.total,
        major=major,
        minor=minor,
        multi_processor_count=8,
        L2_cache_size=4 << 20,
        uuid=f"GPU-00000000-0000-0000-0000-{card.index:012d}",
    )


@contextlib.contextmanager
def _device(device: Any) -> Iterator[None]:
    before = current_machine().current
    if device is not None and not (isinstance(device, int) and device < 0):
        current_machine().current = current_machine().card_of(device).index
    try:
        yield
    finally:
        current_machine().current = before


class _ChosenStream:
    """A stream and its card, for a block."""

    def __init__(self, stream: Stream | None) -> None:
        self.stream = stream
        self._before: tuple[int, Stream] | None = None

    def __enter__(self) -> None:
        if self.stream is not None:
            here = current_machine()
            self._before = (here.current, here.stream(self.stream.card))
            here.set_stream(self.stream)

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            current, stream = self._before
            current_machine().set_stream(stream)
            current_machine().current = current


def _free_and_total(device: Any = None) -> tuple[int, int]:
    card = current_machine().card_of(device)
    card.check()
    return card.total - card.reserved, card.total


def _snapshot(*_: Any, **__: Any) -> list[dict[str, Any]]:
    return [
        {
            "segment_pool_id": pool,
            "device": card.index,
            "total_size": 0 if pool in card.pools else card.reserved,
            "allocated_size": 0 if pool in card.pools else card.allocated,
        }
        for card in current_machine().cards
        for pool in [(0, 0), *card.pools]
    ]


def _limit(fraction: float, device: Any = None) -> None:
    current_machine().card_of(device).fraction = fraction


def _forget_peak(device: Any = None) -> None:
    card = current_machine().card_of(device)
    card.peak, card.reserved = card.allocated, max(card.allocated, card.reserved)


def _set_current(device: Any) -> None:
    current_machine().current = current_machine().card_of(device).index


def _set_debugging(mode: Any) -> None:
    current_machine().sync_debug = {0: "default", 1: "warn", 2: "error"}.get(mode, mode)


def _set_stream(stream: Stream) -> None:
    current_machine().set_stream(stream)


def _card(answer: Callable[[machine.Card], Any]) -> Callable[..., Any]:
    return lambda device=None: answer(current_machine().card_of(device))


FUNCTIONS: dict[str, Any] = {
    "is_available": lambda: True,
    "is_initialized": lambda: True,
    "init": lambda: None,
    "_lazy_init": lambda: None,
    "is_bf16_supported": lambda including_emulation=True: (
        including_emulation or current_machine().capability >= (8, 0)
    ),
    "device_count": lambda: current_machine().count,
    "current_device": lambda: current_machine().current,
    "set_device": _set_current,
    "device": _device,
    "get_device_capability": _card(lambda card: card.machine.capability),
    "get_device_name": _card(lambda card: card.machine.name),
    "get_device_properties": _properties,
    "mem_get_info": _free_and_total,
    "memory_allocated": _card(lambda card: card.allocated),
    "max_memory_allocated": _card(lambda card: card.peak),
    "memory_reserved": _card(lambda card: card.reserved),
    "max_memory_reserved": _card(lambda card: card.reserved),
    "reset_peak_memory_stats": _forget_peak,
    "memory_snapshot": _snapshot,
    "set_per_process_memory_fraction": _limit,
    "empty_cache": lambda: [card.empty_cache() for card in current_machine().cards] and None,
    "synchronize": _card(lambda card: card.wait_for_all()),
    "Stream": Stream,
    "Event": Event,
    "stream": _ChosenStream,
    "set_stream": _set_stream,
    "current_stream": _card(lambda card: card.machine.stream(card)),
    "default_stream": _card(lambda card: card.default),
    "is_current_stream_capturing": lambda: current_machine().stream().tape is not None,
    "set_sync_debug_mode": _set_debugging,
    "get_sync_debug_mode": lambda: {"default": 0, "warn": 1, "error": 2}[
        current_machine().sync_debug
    ],
    "CUDAGraph": graphs.CUDAGraph,
    "graph": graphs.graph,
    "graph_pool_handle": graphs.new_pool,
}


def _numbered(device: Any) -> Any:
    """``cuda`` with this thread's card; anything else as it is."""
    if isinstance(device, str) and device.startswith("cuda"):
        device = torch.device(device)
    if isinstance(device, torch.device) and device.type == "cuda" and device.index is None:
        return torch.device("cuda", current_machine().current)
    return device


def _to(original: Any) -> Any:
    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs:
            kwargs["device"] = _numbered(kwargs["device"])
        return original(self, *map(_numbered, args), **kwargs)

    return to


def _cuda(self: torch.Tensor, device: Any = None, non_blocking: bool = False, **_: Any) -> Any:  # noqa: FBT001, FBT002 - torch's own
    return self.to(_numbered("cuda" if device is None else device), non_blocking=non_blocking)


def _pin(self: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return pinned_empty(tuple(self.shape), self.dtype).copy_(self)


def _factory(original: Any) -> Any:
    """A factory of tensors on CPU, in pinned memory where that is asked for."""

    def make(*args: Any, pin_memory: bool = False, **kwargs: Any) -> Any:
        made = original(*args, **kwargs)
        return _pin(made) if pin_memory else made

    return make


def _like(original: Any, fill: float | None = None) -> Any:
    """``empty_like`` and its like, whose own way to another device asks a driver."""

    def make(
        given: torch.Tensor, *, device: Any = None, pin_memory: bool = False, **kwargs: Any
    ) -> Any:
        device = _numbered(device)
        if device is None or torch.device(device).type != "cuda" or device == given.device:
            made = original(given, device=device, **kwargs)
            return _pin(made) if pin_memory else made
        form = original(given, device="meta", **kwargs)
        made = torch.empty_strided(form.size(), form.stride(), dtype=form.dtype, device=device)
        return made if fill is None else made.fill_(fill)

    return make


def _tensor(original: Any) -> Any:
    def make(data: Any, *, device: Any = None, pin_memory: bool = False, **kwargs: Any) -> Any:
        device = _numbered(device)
        if not isinstance(device, torch.device) or device.type != "cuda":
            made = original(data, device=device, **kwargs)
            return _pin(made) if pin_memory else made
        return original(data, **kwargs).to(device)

    return make


def _patches(stack: contextlib.ExitStack) -> None:
    def put(owner: Any, name: str, value: Any) -> None:
        stack.enter_context(mock.patch.object(owner, name, value))

    for name, function in FUNCTIONS.items():
        put(torch.cuda, name, function)
    put(cuda_steps, "MOST_TOKENS", MOST_TOKENS)
    put(torch.version, "cuda", CUDA_VERSION)
    put(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    for name in ("empty", "zeros", "ones", "full"):
        put(torch, name, _factory(getattr(torch, name)))
    for name, fill in (("empty_like", None), ("zeros_like", 0.0), ("ones_like", 1.0)):
        put(torch, name, _like(getattr(torch, name), fill))
    put(torch, "tensor", _tensor(torch.tensor))
    put(torch.Tensor, "to", _to(torch.Tensor.to))
    put(torch.Tensor, "cuda", _cuda)
    put(torch.Tensor, "pin_memory", _pin)
    put(torch.Tensor, "is_pinned", lambda self, *_: is_pinned(self))


@contextlib.contextmanager
def cards(here: Machine | None = None, **settings: Any) -> Iterator[Machine]:
    """Let torch see the cards of a machine; ``settings`` make a :class:`Machine`."""
    here = here or Machine(**settings)
    register()
    # Torch keeps the first answer, which must hold its own functions, not those put in their place.
    torch.utils._device._device_constructors()
    with contextlib.ExitStack() as stack:
        machine.install(here)
        stack.callback(machine.remove, here)
        _patches(stack)
        # Modules take new parameters: torch cannot put a card's tensor into one of the host.
        future = torch.__future__
        stack.callback(
            future.set_overwrite_module_params_on_conversion,
            future.get_overwrite_module_params_on_conversion(),
        )
        future.set_overwrite_module_params_on_conversion(True)
        yield here


__all__ = ["CardTensor", "cards"]
