"""NVIDIA cards made of shims: the real code path of ``device="cuda"``, with numbers on CPU.

Torch sees cards of a chosen compute capability: ``torch.cuda`` answers for them, tensors say
``cuda:0``, operators refuse what they refuse on such a card, graphs are tapes of operators, memory
is accounted for, and faults happen on demand. See :class:`Machine` for what can be chosen.

    with shim_card.cards(capability=(8, 0), count=2) as machine:
        torch.ones(3, device="cuda:1")

Child processes get cards through the environment: see :func:`environment`. They see those that
``CUDA_VISIBLE_DEVICES`` names.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

    from shim_card.machine import Machine

VARIABLE = "ECHELON_TEST_CARDS"
"""Environment variable: the settings of a :class:`Machine` as JSON, for every child process."""

HERE = Path(__file__).parent


def cards(here: Machine | None = None, **settings: Any) -> AbstractContextManager[Machine]:
    """Let torch see the cards of a machine; ``settings`` make a :class:`Machine`."""
    from shim_card.api import cards

    return cards(here, **settings)


@contextlib.contextmanager
def real_or_shim(**settings: Any) -> Iterator[Machine | None]:
    """The card that is really here (None), or else cards made of shims."""
    import torch

    if torch.cuda.is_available():
        yield None
        return
    with cards(**settings) as here:
        yield here


def environment(**settings: Any) -> dict[str, str]:
    """Variables that give child processes the cards of a :class:`Machine`.

    Its faults are dictionaries of the fields of ``shim_card.faults.Fault``. As every child counts
    on its own, one that is to happen once among several processes has a ``flag``.
    """
    before = os.environ.get("PYTHONPATH")
    paths = [str(HERE / "site"), str(HERE.parent), *([before] if before else [])]
    return {VARIABLE: json.dumps(settings), "PYTHONPATH": os.pathsep.join(paths)}


def _settings() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(os.environ[VARIABLE])
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    return found if listed is None else _seen(found, listed)


def _seen(settings: dict[str, Any], listed: str) -> dict[str, Any]:
    """The settings of the cards in a list, which are numbered anew, with their faults."""
    numbers = [int(name) for name in listed.split(",")]
    settings["count"] = len(numbers)
    faults = [f for f in settings.get("faults", ()) if f.get("card") in {None, *numbers}]
    for fault in faults:
        if fault.get("card") is not None:
            fault["card"] = numbers.index(fault["card"])
    return settings | {"faults": faults}


_entered: list[Iterator[Any]] = []


def stay() -> None:
    """Give this process the cards of its environment until it ends."""
    context: Any = cards(**_settings())
    context.__enter__()
    _entered.append(context)
