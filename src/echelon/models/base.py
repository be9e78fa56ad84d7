"""The contract of a scorer, a model that turns steps into logits, and a fake one. No torch.

The engine and its tests know nothing else of a model.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from echelon.errors import UnsupportedModel
from echelon.scheduling.packing import step_cost
from echelon.types import ModelInfo, TokenBatch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import numpy.typing as npt

    from echelon.types import FloatArray, Padding


class DeviceOutOfMemory(Exception):
    """A step did not fit in the device's memory; the scorer stays usable.

    Attributes:
        crowded: whether other processes hold memory of the card, and may give it back.
    """

    def __init__(self, reason: str = "", *, crowded: bool = False) -> None:
        super().__init__(reason)
        self.crowded = crowded


class WorkerDied(Exception):
    """The worker process has ended; its steps have no result."""


class WorkerGone(WorkerDied):
    """The worker's machine has failed or cannot be reached; no step is the cause."""


class WorkerLostDevice(WorkerDied):
    """The worker's device failed, and its process ended; a step or the device is the cause."""


class WorkerWedged(WorkerDied):
    """The worker process gave no answer in time and was killed."""


class Scorer(Protocol):
    """A model on a device."""

    @property
    def info(self) -> ModelInfo:
        """Device, precision and limits; constant while the scorer is open."""

    def score(self, batch: TokenBatch) -> FloatArray:
        """Score one step.

        Returns:
            float32 [pairs], raw logits in the batch's order.

        Raises:
            DeviceOutOfMemory: the step did not fit; a smaller one may.
        """

    def release(self) -> None:
        """Free cached memory of the device."""

    def close(self) -> None:
        """Free the weights; the scorer cannot be used again."""


class StartedStep(Protocol):
    """A step that a device computes while its caller does other things."""

    def ready(self) -> bool:
        """Whether :meth:`result` returns at once, or computes now."""

    def result(self) -> FloatArray:
        """What :meth:`Scorer.score` returns or raises."""


@dataclass(frozen=True, slots=True)
class LaterStep:
    """A step of a scorer that computes in its caller's thread: it begins when it is asked for."""

    scorer: Scorer
    batch: TokenBatch

    def ready(self) -> bool:
        """Nothing is to be waited for."""
        return True

    def result(self) -> FloatArray:
        """Score it now."""
        return self.scorer.score(self.batch)


def start(scorer: Scorer, batch: TokenBatch) -> StartedStep:
    """Begin a step where the scorer has a ``start`` of its own, as those on a card have.

    Steps end in the order in which they were begun. What :meth:`Scorer.score` raises comes here or
    with the result.
    """
    begin: Callable[[TokenBatch], StartedStep] | None = getattr(scorer, "start", None)
    return LaterStep(scorer, batch) if begin is None else begin(batch)


def step_did_not_fit(scorer: Scorer) -> None:
    """Free a scorer's caches after its step did not fit, once for each such step.

    One with a ``memory_ran_out`` of its own also keeps less from then on; :meth:`Scorer.release`
    alone changes nothing.
    """
    getattr(scorer, "memory_ran_out", scorer.release)()


WARM_RUNS = {"cpu": 1, "cuda": 2}
"""Runs of a step by kind of device before its time counts: on a card the first of a kind may load
kernels, or capture a graph again after memory ran out (:mod:`echelon.models.cuda_graphs`)."""


def warm_runs(device: str) -> int:
    """The runs of :data:`WARM_RUNS` for a device, ``cpu`` or ``cuda:N``."""
    return WARM_RUNS[device.partition(":")[0]]


UNBOUNDED_MAX_TOKENS = 8192
"""Length limit of models whose configuration names no number of positions."""


INPUTS = ("input_ids", "attention_mask", "token_type_ids")
"""Names of a model's inputs, as exporters and transformers call them."""


def probe_step() -> TokenBatch:
    """A step of two short pairs, which shows how many outputs a model gives for a pair."""
    return TokenBatch(np.zeros(3, np.int32), None, np.array([0, 2, 3], np.int32))


def outputs_a_pair(model: object, step: TokenBatch, logits: object) -> int:
    """How many outputs a model gives for each pair of a step.

    Raises:
        UnsupportedModel: the outputs are not numbers for each pair, such as those of a model
            without classification head.
    """
    shape, dtype = getattr(logits, "shape", None), getattr(logits, "dtype", "")
    if not shape or len(shape) > 2 or shape[0] != len(step) or "float" not in str(dtype):  # noqa: PLR2004 - a matrix
        raise UnsupportedModel(
            f"{model}: for {len(step)} pairs it gives {dtype or type(logits).__name__} of shape "
            f"{list(shape or ())}, not outputs for each pair. Use a cross-encoder with a "
            "classification head."
        )
    return int(shape[1]) if len(shape) > 1 else 1


def first_line(error: BaseException, most: int = 300) -> str:
    """The first line of an error of a library, without end; the type's name where it has none."""
    lines = str(error).splitlines()
    return lines[0][:most] if lines else type(error).__name__


def listed(names: Iterable[str], most: int = 8) -> str:
    """Names for a message: the first ones in order."""
    ordered = sorted(names)
    shown = ", ".join(name[:80] for name in ordered[:most])
    return f"{shown} and {len(ordered) - most} more" if len(ordered) > most else shown or "none"


def pad(
    batch: TokenBatch, padding_id: int, shape: tuple[int, int] | None = None
) -> dict[str, npt.NDArray[np.int64]]:
    """Pad on the right to the longest pair, as the reference tokenizers do, or to a larger shape.

    Surplus pairs consist of one padding token that counts, so that no row of a softmax is empty.

    Returns:
        int64 [pairs, longest]: ``input_ids``, ``attention_mask`` and ``token_type_ids``.
    """
    pairs, longest = shape or (len(batch), int(batch.lengths.max()))
    real = np.zeros((pairs, longest), dtype=np.bool_)
    real[: len(batch)] = np.arange(longest) < batch.lengths[:, None]
    ids = np.full(real.shape, padding_id, dtype=np.int64)
    ids[real] = batch.ids
    types = np.zeros(real.shape, dtype=np.int64)
    if batch.type_ids is not None:
        types[real] = batch.type_ids
    real[len(batch) :, 0] = True
    return dict(zip(INPUTS, (ids, real.astype(np.int64), types), strict=True))


def rounded_shape(batch: TokenBatch) -> tuple[int, int]:
    """Pairs and longest pair of a step, each rounded up to a power of two or half as much again.

    A length is at least 16. Two sizes to each doubling: at most a third of either is filler.
    """

    def up(size: int) -> int:
        power = 1 << max(0, (size - 1).bit_length())
        return 3 * power // 4 if size <= 3 * power // 4 and power > 2 else power  # noqa: PLR2004 - half of it

    return up(len(batch)), up(max(MIN_ROWS, int(batch.lengths.max())))


MIN_ROWS = 16  # rows that a matrix unit computes at a time


def with_filler(batch: TokenBatch) -> TokenBatch:
    """Append one-token pairs to bring the step to a round number of rows.

    oneDNN compiles and keeps code for every number of rows, 2 MB for a small model: a process that
    met all lengths grew by 770 MB in 600 steps (docs/LOG.md). Multiples of 16, and above 1,024 rows
    of 1/32 of the next lower power of two, keep that bounded. Matrix units compute 16 rows at a
    time, so small steps take no longer.
    """
    rows = len(batch.ids)
    filler = -rows % max(MIN_ROWS, 1 << max(0, rows.bit_length() - 6))
    if filler == 0:
        return batch
    types = None if batch.type_ids is None else np.pad(batch.type_ids, (0, filler))
    ends = np.arange(rows + 1, rows + filler + 1, dtype=np.int32)
    offsets = np.concatenate((batch.offsets, ends))
    return TokenBatch(np.pad(batch.ids, (0, filler)), types, offsets)


class FakeScorer:
    """A scorer without weights, for tests, dry runs and simulations.

    Its logits, in [-10, 10], are a hash of the pair's tokens alone. Steps of more than
    ``memory_tokens`` run out of memory; bf16 and fp16 need half the memory of fp32. Caches hold
    ``stale_tokens`` until :meth:`release`.
    """

    def __init__(
        self,
        memory_tokens: int | None = None,
        *,
        stale_tokens: int = 0,
        max_tokens: int = 512,
        padding: Padding = "none",
        precision: str = "fp32",
    ) -> None:
        self.info = ModelInfo("fake", "cpu", "fake", precision, max_tokens, padding, 0, 1)
        self.batches: list[TokenBatch] = []
        self.closed = False
        self._memory_tokens = memory_tokens
        self._stale_tokens = stale_tokens

    def score(self, batch: TokenBatch) -> FloatArray:
        """Hash each pair's tokens; see :class:`~echelon.models.base.Scorer`."""
        tokens = step_cost(batch.lengths, self.info.padding) + self._stale_tokens
        if self.info.precision != "fp32":
            tokens //= 2
        if self._memory_tokens is not None and tokens > self._memory_tokens:
            raise DeviceOutOfMemory(f"{tokens} tokens over {self._memory_tokens}")
        self.batches.append(batch)
        bounds = zip(batch.offsets[:-1], batch.offsets[1:], strict=True)
        hashes = [zlib.crc32(batch.ids[start:end].tobytes()) for start, end in bounds]
        return np.array([h / 2**32 * 20 - 10 for h in hashes], dtype=np.float32)

    def release(self) -> None:
        """Free the stale memory."""
        self._stale_tokens = 0

    def close(self) -> None:
        """Record that it was closed."""
        self.closed = True
