"""From probes to the cost model and the memory model, with what they are worth. Pure.

Non-negative least squares on the relative error of the medians, so that a step of a millisecond
counts as much as one of a second. A model is judged on shapes that it has not seen; one that no
shape confirms, or whose probes differ too much when repeated, is refused with the remedy.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from echelon.errors import ProfileError, TooNoisy
from echelon.messages import Message
from echelon.scheduling.cost_model import Coefficients, MemoryModel, Work, solve, work_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from echelon.scheduling.cost_model import Array
    from echelon.types import ModelInfo, Padding

MOST_SPREAD = 0.10
"""Median deviation of a probe's repeats from their median, relative to it, half of the probes
having less: on a quiet machine it is 1 to 3 %."""

MOST_MEDIAN, MOST_P90 = 0.15, 0.40
"""Errors on unseen shapes above which a model would mislead whoever plans with it."""

LEAST_PROBES = 6
"""Fewer shapes than twice the prices without a knee prove nothing."""

PRICES, PRICES_WITH_KNEE = 3, 7
"""What a model pays for: base, token and square; with a knee its price and place, and as much again
because it is the best of some thirty places."""

SAME = 1e-6
"""Mean squared relative error, (0.1 %)², below which two models are equally good."""

STORED_PADDING: dict[Padding, str] = {"none": "ragged", "rectangular": "padded"}
"""Names of the padding in profiles and other JSON, which older versions wrote and can read."""

REMEDY = (
    "Close other programs or give the process its own cores, then run `echelon tune --refresh`."
)


@dataclass(frozen=True, slots=True)
class Probe:
    """One shape of step, measured.

    Attributes:
        lengths: tokens of each pair.
        seconds: time of each repeat.
        peak_bytes: memory at its peak; None where it could not be read.
    """

    lengths: tuple[int, ...]
    seconds: tuple[float, ...]
    peak_bytes: int | None = None

    @property
    def median_s(self) -> float:
        """Median of the repeats."""
        return float(np.median(self.seconds))

    @property
    def spread(self) -> float:
        """Median deviation of the repeats, relative; 0 for a single one."""
        return float(np.median(np.abs(np.array(self.seconds) / self.median_s - 1)))


@dataclass(frozen=True, slots=True)
class FitError:
    """Absolute relative error on shapes that the fit has not seen.

    Attributes:
        median: half of them have less.
        p90: nine in ten have less.
        shapes: how many there were.
    """

    median: float
    p90: float
    shapes: int

    @classmethod
    def of(cls, predicted: Sequence[float], actual: Sequence[float]) -> FitError:
        """Compare predictions with what came; at least one."""
        relative = np.abs(np.array(predicted) / np.array(actual) - 1)
        median, p90 = np.percentile(relative, [50, 90])
        return cls(float(median), float(p90), len(relative))

    @property
    def too_large(self) -> bool:
        """Whether a fit with this error is refused."""
        return self.median > MOST_MEDIAN or self.p90 > MOST_P90

    @property
    def words(self) -> str:
        """For messages."""
        return Message(
            "fit.error",
            {"median": f"{self.median:.0%}", "p90": f"{self.p90:.0%}", "shapes": self.shapes},
        )


@dataclass(frozen=True, slots=True)
class CostFit:
    """A cost model and what it is worth.

    Attributes:
        coefficients: the prices.
        padding: how the scorer pads.
        error: on unseen shapes.
        spread: of repeats; see :data:`MOST_SPREAD`.
        shapes: each probe for the report: ``pairs``, ``tokens``, ``squares``, ``seconds``,
            ``samples``, ``predicted_s``, ``peak_bytes``, ``unseen``.
        measured: UTC time, ISO 8601; empty where nobody noted it.
    """

    coefficients: Coefficients
    padding: Padding
    error: FitError
    spread: float
    shapes: list[dict[str, Any]] = field(default_factory=list)
    measured: str = ""

    def as_dict(self) -> dict[str, Any]:
        """The profile's entry."""
        values = asdict(self)
        return values | {"paid": STORED_PADDING[values.pop("padding")]}

    @classmethod
    def from_dict(cls, known: Mapping[str, Any]) -> CostFit:
        """Restore it from the profile's entry.

        Raises:
            ProfileError: the entry is damaged.
        """
        try:
            values = dict(known)
            values["coefficients"] = Coefficients(**values["coefficients"])
            values["error"] = FitError(**values["error"])
            stored = values.pop("paid")
            values["padding"] = next(p for p, name in STORED_PADDING.items() if name == stored)
            found = cls(**values)
            sound = all(price >= 0 for price in found.coefficients.prices)
        except (KeyError, StopIteration, TypeError, ValueError) as error:
            raise ProfileError(f"damaged cost model ({error}). {REMEDY}") from error
        if not sound:
            raise ProfileError(f"damaged cost model ({values['coefficients']}). {REMEDY}")
        return found


@dataclass(frozen=True, slots=True)
class MemoryFit:
    """A memory model and what it is worth; see :class:`CostFit`."""

    model: MemoryModel
    error: FitError

    def as_dict(self) -> dict[str, Any]:
        """The profile's entry."""
        return asdict(self)

    @classmethod
    def from_dict(cls, known: Mapping[str, Any]) -> MemoryFit:
        """Restore it from the profile's entry.

        Raises:
            ProfileError: the entry is damaged.
        """
        try:
            return cls(MemoryModel(**known["model"]), FitError(**known["error"]))
        except (KeyError, TypeError) as error:
            raise ProfileError(f"damaged memory model ({error}). {REMEDY}") from error


@dataclass(frozen=True, slots=True)
class Prior:
    """Prices to begin serving with.

    Attributes:
        coefficients: the prices.
        padding: how the scorer padded that they were measured with.
        device: ``cpu`` or ``cuda:N``; prices of another kind are of no use.
        same: measured as it will be served: precision, threads, workers. Only then does a
            difference mean that the machine has changed.
    """

    coefficients: Coefficients
    padding: Padding
    device: str
    same: bool

    def serves(self, facts: ModelInfo) -> bool:
        """Whether it is of use for a scorer."""
        kinds = {name.partition(":")[0] for name in (self.device, facts.device)}
        return self.padding == facts.padding and len(kinds) == 1


def fit_cost(probes: Sequence[Probe], unseen: Sequence[Probe], padding: Padding) -> CostFit:
    """Fit step times to probes and judge them on unseen ones.

    Raises:
        TooNoisy: too few probes, repeats that differ too much, or shapes that are missed by far.
    """
    _require(probes, unseen)
    spread = float(np.median([probe.spread for probe in (*probes, *unseen)]))
    if spread > MOST_SPREAD:
        raise TooNoisy(Message("fit.repeats_differ", {"spread": f"{spread:.0%}"}))
    coefficients = _best_knee(probes, padding)

    def predict(probe: Probe) -> float:
        return coefficients.seconds(work_of(probe.lengths, padding))

    error = FitError.of([predict(probe) for probe in unseen], [probe.median_s for probe in unseen])
    if error.too_large:
        raise TooNoisy(Message("fit.step_times_off", {"error": error.words}))
    shapes = [
        _shape(probe, padding, predict(probe), unseen=is_unseen)
        for some, is_unseen in ((probes, False), (unseen, True))
        for probe in some
    ]
    return CostFit(coefficients, padding, error, spread, shapes)


def fit_memory(probes: Sequence[Probe], unseen: Sequence[Probe], padding: Padding) -> MemoryFit:
    """Fit peak memory to probes and judge it on unseen ones.

    Raises:
        TooNoisy: too few probes with a peak, or peaks that are missed by far.
    """
    probes = [probe for probe in probes if probe.peak_bytes]
    unseen = [probe for probe in unseen if probe.peak_bytes]
    _require(probes, unseen)
    peaks = np.array([probe.peak_bytes for probe in probes], dtype=np.float64)
    rows = [_amounts(work_of(probe.lengths, padding)) for probe in probes]
    fixed, token, square = _relative(np.array(rows, dtype=np.float64), peaks)
    model = MemoryModel(float(fixed), float(token), float(square))
    predicted = [model.peak_bytes(work_of(probe.lengths, padding)) for probe in unseen]
    error = FitError.of(predicted, [float(probe.peak_bytes or 0) for probe in unseen])
    if error.too_large:
        raise TooNoisy(Message("fit.memory_off", {"error": error.words}))
    return MemoryFit(model, error)


def _amounts(work: Work) -> tuple[int, int, int]:
    return work.steps, work.tokens, work.squares


def _require(probes: Sequence[Probe], unseen: Sequence[Probe]) -> None:
    if len(probes) < LEAST_PROBES or not unseen:
        raise TooNoisy(
            Message("fit.too_few_probes", {"probes": len(probes), "checks": len(unseen)})
        )


def _shape(probe: Probe, padding: Padding, predicted_s: float, *, unseen: bool) -> dict[str, Any]:
    work = work_of(probe.lengths, padding)
    return {
        "pairs": len(probe.lengths),
        "tokens": work.tokens,
        "squares": work.squares,
        "seconds": probe.median_s,
        "samples": len(probe.seconds),
        "predicted_s": predicted_s,
        "peak_bytes": probe.peak_bytes,
        "unseen": unseen,
    }


def _best_knee(probes: Sequence[Probe], padding: Padding) -> Coefficients:
    """Without a knee, unless one explains enough more (Schwarz, Annals of Statistics 6, 1978)."""
    works = [work_of(probe.lengths, padding) for probe in probes]
    took = np.array([probe.median_s for probe in probes])
    plain, best = _fit_knee(0, works, took), math.inf
    chosen = plain
    score = _schwarz(len(took))
    for candidate in [plain, *(_fit_knee(knee, works, took) for knee in _knees(works))]:
        prices = PRICES_WITH_KNEE if candidate.beyond_s > 0 else PRICES
        found = score(np.array([candidate.seconds(work) for work in works]), took, prices)
        if found < best:
            chosen, best = candidate, found
    return chosen


def _fit_knee(knee: int, works: Sequence[Work], took: Array) -> Coefficients:
    empty = Coefficients(0.0, 0.0, 0.0, knee)
    matrix = np.array([empty.amounts(work) for work in works], dtype=np.float64)
    return empty.priced(_relative(matrix, took))


def _knees(works: Sequence[Work]) -> list[int]:
    """Where a knee could be: at the sizes measured and between, two sizes from either end."""
    sizes = sorted({work.tokens for work in works})
    between = [math.isqrt(a * b) for a, b in pairwise(sizes)]
    return sorted({*sizes[2:-2], *between[2:-2]})


def _schwarz(count: int) -> Callable[[Array, Array, int], float]:
    def score(predicted: Array, took: Array, prices: int) -> float:
        squared = float(np.square(predicted / took - 1).mean())
        return count * math.log(squared + SAME) + prices * math.log(count)

    return score


def _relative(matrix: Array, target: Array) -> Array:
    """Non-negative least squares on the relative error."""
    return solve(matrix / target[:, None], np.ones(len(target)))
