"""Scorers for child processes whose token ids trigger failures."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from echelon.errors import InvalidInput, ModelNotFound
from echelon.models.base import DeviceOutOfMemory, FakeScorer
from echelon.models.device import run_step
from echelon.types import TokenBatch

KILL, STOP, HANG, RAISE, REFUSE, GROW, SAY, MARK, NAN, NAP = range(9001, 9011)
"""Token ids that trigger an action of :class:`Obedient`."""

MEBIBYTE = 2**20


class Obedient(FakeScorer):
    """Runs the actions of a step's ids, then scores as the fake does.

    ``MARK`` kills the process once: a file in the folder ``marks`` records that it did.
    """

    def __init__(self, *args, marks: str | None = None, pace_s: float = 0.0, **settings) -> None:
        super().__init__(*args, **settings)
        self._marks = marks
        self._pace_s = pace_s
        self._hoard: list[np.ndarray] = []

    def score(self, batch: TokenBatch):
        ids = set(batch.ids.tolist())
        for number in sorted(ids & set(ACTIONS)):
            ACTIONS[number](self)
        if self._pace_s:
            time.sleep(self._pace_s * len(batch.ids))
        logits = super().score(batch)
        self.batches.clear()
        if NAN in ids:
            starts = zip(batch.offsets[:-1], batch.offsets[1:], strict=True)
            logits[[NAN in batch.ids[start:end] for start, end in starts]] = np.nan
        return logits

    def grow(self) -> None:
        self._hoard.append(np.ones(128 * MEBIBYTE // 8))

    def die_once(self) -> None:
        assert self._marks is not None
        try:
            Path(self._marks, "died").touch(exist_ok=False)
        except FileExistsError:
            return
        os.kill(os.getpid(), signal.SIGKILL)


class Worn(Obedient):
    """After the first step that does not fit it has memory for 40 tokens only."""

    def score(self, batch: TokenBatch):
        try:
            return super().score(batch)
        except DeviceOutOfMemory:
            self._memory_tokens = 40
            raise


def worn(folder: str, broken: tuple[int, ...] = (), *, precision: str):
    """A factory of :class:`Worn` with memory for 200 tokens; calls of the ``broken`` numbers fail.

    Each call writes a file, named by its number, with oneDNN's cache setting.
    """
    number = len(list(Path(folder).iterdir()))
    Path(folder, str(number)).write_text(os.environ.get("ONEDNN_PRIMITIVE_CACHE_CAPACITY", ""))
    if number in broken:
        raise ModelNotFound("it is away. Wait.")
    return Worn(200, precision=precision)


class Held(Obedient):
    """Waits while there is a file named ``hold``."""

    def __init__(self, folder: str, **settings) -> None:
        super().__init__(**settings)
        self._hold = Path(folder, "hold")

    def score(self, batch: TokenBatch):
        while self._hold.exists():
            time.sleep(0.005)
        return super().score(batch)


class Paced(Obedient):
    """A scorer of a kind of device that takes some seconds for each token."""

    def __init__(self, device: str, token_s: float, **settings) -> None:
        super().__init__(pace_s=token_s, **settings)
        self.info = replace(self.info, device=device)


class Poisoned(Obedient):
    """Its context is lost with step number ``after`` of the process, and no later step works.

    The error is torch's own, and goes the way of one that a forward pass raises.
    """

    def __init__(self, words: str, after: int, **settings) -> None:
        super().__init__(**settings)
        self._words = words
        self._left = after

    def score(self, batch: TokenBatch):
        self._left -= 1
        if self._left <= 0:
            run_step(self._fail)
        return super().score(batch)

    def _fail(self):
        import torch

        raise torch.AcceleratorError(self._words)


def _raise(scorer: Obedient) -> None:
    raise RuntimeError("the device is on fire")


def _refuse(scorer: Obedient) -> None:
    raise InvalidInput("precision", "is wrong", "Use another.")


ACTIONS = {
    KILL: lambda scorer: os.kill(os.getpid(), signal.SIGKILL),
    STOP: lambda scorer: os.kill(os.getpid(), signal.SIGSTOP),
    HANG: lambda scorer: threading.Event().wait(),
    RAISE: _raise,
    REFUSE: _refuse,
    GROW: Obedient.grow,
    SAY: lambda scorer: sys.stderr.write("something to say\n"),
    MARK: Obedient.die_once,
    NAP: lambda scorer: time.sleep(0.05),
}


def missing(*, precision: str):
    """An opener of a model that is not there."""
    raise ModelNotFound("no such folder. Name another.")


def anywhere(folder: Path, *, precision: str, **settings):
    """An opener that has every precision, whatever the processor has."""
    precision = "fp32" if precision == "auto" else precision
    return Obedient(max_tokens=130, precision=precision)


def placed(*, precision: str, device: str = "?", **settings):
    """An opener whose scorer's name says which card its process may use."""
    found = Obedient(precision="fp32" if precision == "auto" else precision)
    cards = os.environ.get("CUDA_VISIBLE_DEVICES", "all")
    found.info = replace(found.info, device_name=f"{device} of {cards}")
    return found


def opens_once(folder: str, *, precision: str):
    """An opener that finds its model the first time only."""
    try:
        Path(folder, "opened").touch(exist_ok=False)
    except FileExistsError:
        raise ModelNotFound("it was deleted. Put it back.") from None
    return Obedient(precision=precision)


def gated(folder: str, *, precision: str, **settings):
    """An opener that, but for the first time, waits until there is a file named ``go``."""
    try:
        Path(folder, "opened").touch(exist_ok=False)
    except FileExistsError:
        while not Path(folder, "go").exists():
            time.sleep(0.01)
    return Obedient(precision=precision, **settings)


def dying(*, precision: str):
    """A factory that ends the process."""
    os._exit(3)


def hanging(*, precision: str):
    """A factory that never returns."""
    threading.Event().wait()


def batch_of(*pairs: list[int]) -> TokenBatch:
    """A step of pairs with the given token ids."""
    ids = np.array([number for pair in pairs for number in pair], dtype=np.int32)
    offsets = np.cumsum([0, *map(len, pairs)]).astype(np.int32)
    return TokenBatch(ids, None, offsets)


class Weighty(Obedient):
    """Holds `TOKEN_BYTES` a token while it scores; dies beyond a number of tokens."""

    TOKEN_BYTES = 64 * 1024

    def __init__(self, dies_beyond: int | None = None, **settings) -> None:
        super().__init__(**settings)
        self._dies_beyond = dies_beyond

    def score(self, batch: TokenBatch):
        if self._dies_beyond is not None and len(batch.ids) > self._dies_beyond:
            os.kill(os.getpid(), signal.SIGKILL)
        held = np.ones(len(batch.ids) * self.TOKEN_BYTES, dtype=np.uint8)
        return super().score(batch) + 0 * held[:1]
