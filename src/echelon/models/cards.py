"""Which card a worker gets, chosen without touching one.

A worker process sees its card alone: a context on another would take some hundred MB of it, and of
a card in slices (MIG) CUDA shows a process one slice only.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from echelon.models.device import has_torch
from echelon.models.drivers import surely_no_card


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a worker process runs."""

    device: str  # its ``device`` option
    environment: dict[str, str] = field(default_factory=dict)  # variables to start it with


def place(device: str, number: int) -> Placement:
    """The place of worker ``number``, from 0: ``auto`` and ``cuda`` take the cards in turn.

    Without a card, or for one that is not there, the option stays as it is, and opening the model
    there says why it cannot.
    """
    kind, _, index = device.partition(":")
    if kind not in {"auto", "cuda"}:
        return Placement(device)
    cards = visible_cards()
    chosen = int(index) if index else number % max(1, len(cards))
    if chosen >= len(cards):
        return Placement(device)
    return Placement(kind, {_variable(): cards[chosen]})


def visible_cards() -> list[str]:
    """The cards that this process may use, as ``CUDA_VISIBLE_DEVICES`` names them.

    It honours the variable's own value: numbers, or ids of cards or of slices. No context is made.
    """
    if surely_no_card() or not has_torch():
        return []
    import torch

    if torch.version.cuda is None and torch.version.hip is None:
        return []
    listed = os.environ.get(_variable())
    if listed is None:
        return [str(number) for number in range(torch.cuda.device_count())]
    names = [name.strip() for name in listed.split(",")]
    if names[0].startswith("MIG-"):  # CUDA counts the first slice only
        return names
    return names[: torch.cuda.device_count()]


def _variable() -> str:
    """The environment variable that limits a process to some cards."""
    import torch

    amd = torch.version.hip is not None  # on AMD's cards both are read, HIP's first
    cuda_alone = "CUDA_VISIBLE_DEVICES" in os.environ and "HIP_VISIBLE_DEVICES" not in os.environ
    return "HIP_VISIBLE_DEVICES" if amd and not cuda_alone else "CUDA_VISIBLE_DEVICES"
