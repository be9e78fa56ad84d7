"""Fits the cost model and the memory model to measured steps, and judges them. Pure.

The fit minimizes the relative error of the medians, so that a step of 1 ms counts as much as one of
1 s; a shape far off counts by its direction only (Huber, Robust Statistics, 1981). Noise makes the
error larger, never the model vanish: those who predict with it say what its error allows.
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

MAX_MEDIAN, MAX_P90 = 0.15, 0.40
"""Errors on unseen shapes above which a prediction must be shown with its error."""

MIN_SHAPES = 3
"""Coefficients without a knee; from fewer shapes nothing can be fitted."""

MIN_CHECKS = 5  # unseen shapes that say enough of the error

PARAMETERS, PARAMETERS_WITH_KNEE = 3, 7
"""Base, token and square; a knee adds its coefficient and its place, counted twice since it is the
best of some thirty places."""

SAME = 1e-6
"""Mean squared relative error, (0.1 %)², below which models are equally good."""

TRUST = 2.0
"""Multiple of the median error beyond which a shape counts by its direction only."""

ROUNDS = 4  # of weighting; further ones change coefficients by less than a percent

LEAST = 1e-3  # a prediction of nothing is off by this factor

STORED_PADDING: dict[Padding, str] = {"none": "ragged", "rectangular": "padded"}
"""Names of the padding in profiles and other JSON, which older versions wrote and can read."""

REMEDY = (
    "Close other programs or give the process its own cores, then run `echelon tune --refresh`."
)


@dataclass(frozen=True, slots=True)
class Probe:
    """A measured step."""

    lengths: tuple[int, ...]  # tokens of each pair
    seconds: tuple[float, ...]  # time of each repeat
    peak_bytes: int | None = None  # None if it could not be read

    @property
    def median_s(self) -> float:
        """Median of the repeats."""
        return float(np.median(self.seconds))

    @property
    def spread(self) -> float:
        """Median relative deviation of the repeats from their median; 0 for one repeat."""
        return float(np.median(np.abs(np.array(self.seconds) / self.median_s - 1)))


@dataclass(frozen=True, slots=True)
class CallTimes:
    """All steps of a measured call."""

    work: Work
    seconds: tuple[float, ...]  # time of the steps in each repeat


@dataclass(frozen=True, slots=True)
class FitError:
    """Absolute relative error over a number of unseen shapes."""

    median: float
    p90: float
    shapes: int
    spread: float | None = None  # root mean square of the logarithms; None in older profiles

    @classmethod
    def of(cls, predicted: Sequence[float], actual: Sequence[float]) -> FitError:
        """Compare at least one prediction with its measurement."""
        ratio = np.array(predicted) / np.array(actual)
        median, p90 = np.percentile(np.abs(ratio - 1), [50, 90])
        spread = float(np.sqrt(np.mean(np.square(np.log(np.maximum(ratio, LEAST))))))
        return cls(float(median), float(p90), len(ratio), spread)

    @property
    def large(self) -> bool:
        """Whether predictions must be shown with this error."""
        return self.median > MAX_MEDIAN or self.p90 > MAX_P90

    @property
    def share(self) -> str:
        """How far nine of ten predictions are off at most, in whole per cent."""
        return f"{math.ceil(100 * self.p90)} %"

    @property
    def words(self) -> str:
        """For messages."""
        return Message(
            "fit.error",
            {"median": f"{self.median:.0%}", "p90": f"{self.p90:.0%}", "shapes": self.shapes},
        )


@dataclass(frozen=True, slots=True)
class CostFit:
    """A cost model and its errors; ``shapes`` are the rows of :func:`_shape` for reports."""

    coefficients: Coefficients
    padding: Padding
    error: FitError
    spread: float  # median of :attr:`Probe.spread`: 1 to 3 % on a quiet machine
    shapes: list[dict[str, Any]] = field(default_factory=list)
    measured: str = ""  # UTC time, ISO 8601; empty if unknown

    @property
    def note(self) -> Message | None:
        """What the error allows; None where it is small enough to say nothing."""
        if not self.error.large:
            return None
        return Message("fit.imprecise", {"share": self.error.share, "error": self.error.words})

    def as_dict(self) -> dict[str, Any]:
        """The profile's entry."""
        values = asdict(self)
        return values | {"paid": STORED_PADDING[values.pop("padding")]}

    @classmethod
    def from_dict(cls, known: Mapping[str, Any]) -> CostFit:
        """Restore it from the profile's entry; a damaged one raises ProfileError."""
        try:
            values = dict(known)
            values["coefficients"] = Coefficients(**values["coefficients"])
            values["error"] = FitError(**values["error"])
            stored = values.pop("paid")
            values["padding"] = next(p for p, name in STORED_PADDING.items() if name == stored)
            found = cls(**values)
            sound = min(found.coefficients.values) >= 0
        except (KeyError, StopIteration, TypeError, ValueError) as error:
            raise ProfileError(f"damaged cost model ({error}). {REMEDY}") from error
        if not sound:
            raise ProfileError(f"damaged cost model ({values['coefficients']}). {REMEDY}")
        return found


@dataclass(frozen=True, slots=True)
class MemoryFit:
    """A memory model and its error on unseen shapes."""

    model: MemoryModel
    error: FitError

    @property
    def note(self) -> Message | None:
        """What the error allows; None where it is small enough to say nothing."""
        if not self.error.large:
            return None
        values = {"share": self.error.share, "error": self.error.words}
        return Message("fit.memory_imprecise", values)

    def as_dict(self) -> dict[str, Any]:
        """The profile's entry."""
        return asdict(self)

    @classmethod
    def from_dict(cls, known: Mapping[str, Any]) -> MemoryFit:
        """Restore it from the profile's entry; a damaged one raises ProfileError."""
        try:
            return cls(MemoryModel(**known["model"]), FitError(**known["error"]))
        except (KeyError, TypeError) as error:
            raise ProfileError(f"damaged memory model ({error}). {REMEDY}") from error


@dataclass(frozen=True, slots=True)
class Prior:
    """Cost coefficients to start a service with, from a scorer of a padding and a device.

    ``same``: measured with the precision, threads and workers of the service. Only then does a
    difference mean that the machine has changed.
    """

    coefficients: Coefficients
    padding: Padding
    device: str  # ``cpu`` or ``cuda:N``
    same: bool

    def serves(self, info: ModelInfo) -> bool:
        """Whether it holds for a scorer: the same padding and kind of device."""
        kinds = {name.partition(":")[0] for name in (self.device, info.device)}
        return self.padding == info.padding and len(kinds) == 1


def fit_cost(
    probes: Sequence[Probe],
    unseen: Sequence[Probe],
    padding: Padding,
    calls: Sequence[CallTimes] = (),
) -> CostFit:
    """Fit step times to probes and calls, and judge them on unseen probes.

    With few unseen ones each probe and call is predicted from the others too.

    Raises:
        TooNoisy: fewer different amounts of work than coefficients.
    """
    works = [work_of(probe.lengths, padding) for probe in probes] + [call.work for call in calls]
    times = [probe.seconds for probe in probes] + [call.seconds for call in calls]
    took = np.array([float(np.median(seconds)) for seconds in times])
    _require(works)

    def fitted(rows: Sequence[int]) -> Callable[[Work], float]:
        return _best_knee([works[row] for row in rows], took[list(rows)]).seconds

    coefficients = _best_knee(works, took)
    checks = [(work_of(probe.lengths, padding), probe.median_s) for probe in unseen]
    error = _error(fitted, works, took, checks, coefficients.seconds)
    repeated = [probe.spread for probe in (*probes, *unseen) if len(probe.seconds) > 1]
    shapes = [
        _shape(p, padding, coefficients.seconds(work_of(p.lengths, padding)), unseen=is_unseen)
        for some, is_unseen in ((probes, False), (unseen, True))
        for p in some
    ]
    spread = float(np.median(repeated)) if repeated else 0.0
    return CostFit(coefficients, padding, error, spread, shapes)


def fit_memory(probes: Sequence[Probe], unseen: Sequence[Probe], padding: Padding) -> MemoryFit:
    """Fit peak memory to probes and judge it on unseen ones, as :func:`fit_cost`.

    Raises:
        TooNoisy: fewer different shapes with a peak than coefficients.
    """
    known = [(work_of(p.lengths, padding), float(p.peak_bytes)) for p in probes if p.peak_bytes]
    checks = [(work_of(p.lengths, padding), float(p.peak_bytes)) for p in unseen if p.peak_bytes]
    works, peaks = [work for work, _ in known], np.array([peak for _, peak in known])
    _require(works)

    def fitted(rows: Sequence[int]) -> MemoryModel:
        chosen = [works[row] for row in rows]
        matrix = np.array([(w.steps, w.tokens, w.squares) for w in chosen], dtype=np.float64)
        return MemoryModel(*map(float, _relative(matrix, peaks[list(rows)])))

    def predictor(rows: Sequence[int]) -> Callable[[Work], float]:
        return fitted(rows).peak_bytes

    model = fitted(range(len(works)))
    return MemoryFit(model, _error(predictor, works, peaks, checks, model.peak_bytes))


def _require(works: Sequence[Work]) -> None:
    different = len(set(works))
    if different < MIN_SHAPES:
        raise TooNoisy(Message("fit.too_few_shapes", {"shapes": different}))


def _error(
    fitted: Callable[[Sequence[int]], Callable[[Work], float]],
    works: Sequence[Work],
    seen: Array,
    checks: Sequence[tuple[Work, float]],
    predict: Callable[[Work], float],
) -> FitError:
    """The error on checks; with few of them also that of each row predicted from the others."""
    predicted, actual = [predict(work) for work, _ in checks], [value for _, value in checks]
    if len(checks) < MIN_CHECKS:
        rows = range(len(works))
        predicted += [fitted([row for row in rows if row != out])(works[out]) for out in rows]
        actual += seen.tolist()
    return FitError.of(predicted, actual)


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


def _best_knee(works: Sequence[Work], took: Array) -> Coefficients:
    """Coefficients by the Schwarz criterion: a knee must explain enough (Ann. Stat. 6, 1978)."""

    def score(candidate: Coefficients) -> float:
        predicted = np.array([candidate.seconds(work) for work in works])
        squared = float(np.square(predicted / took - 1).mean())
        parameters = PARAMETERS_WITH_KNEE if candidate.beyond_s > 0 else PARAMETERS
        return len(took) * math.log(squared + SAME) + parameters * math.log(len(took))

    knees = _knees(works) if len(took) > PARAMETERS_WITH_KNEE else []
    # One round each finds the place; its coefficients then get the weights of outliers.
    best = min((_fit_knee(knee, works, took, 1) for knee in [0, *knees]), key=score)
    return _fit_knee(best.knee_tokens if best.beyond_s else 0, works, took, ROUNDS)


def _fit_knee(knee: int, works: Sequence[Work], took: Array, rounds: int) -> Coefficients:
    empty = Coefficients(0.0, 0.0, 0.0, knee)
    matrix = np.array([empty.amounts(work) for work in works], dtype=np.float64)
    return empty.with_values(_relative(matrix, took, rounds))


def _knees(works: Sequence[Work]) -> list[int]:
    """Possible knees: at and between measured sizes, two sizes from either end."""
    sizes = sorted({work.tokens // work.steps for work in works})
    between = [math.isqrt(a * b) for a, b in pairwise(sizes)]
    return sorted({*sizes[2:-2], *between[2:-2]})


def _relative(matrix: Array, target: Array, rounds: int = ROUNDS) -> Array:
    """Non-negative least squares on the relative error, with outliers by their direction."""
    rows, weight = matrix / target[:, None], np.ones(len(target))
    for _ in range(rounds):
        values = solve(rows * weight[:, None], weight)
        off = np.abs(rows @ values - 1)
        trusted = max(TRUST * float(np.median(off)), SAME)
        weight = np.sqrt(np.minimum(1.0, trusted / np.maximum(off, trusted)))
    return values
