"""Fits the cost model and the memory model to measured steps, and judges them. Pure.

The fit minimizes the relative error of the medians, so that a step of 1 ms counts as much as one of
1 s. A model is refused, with the remedy, if shapes that the fit has not seen do not confirm it, or
if repeats differ too much.
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
    from collections.abc import Mapping, Sequence

    from echelon.scheduling.cost_model import Array
    from echelon.types import ModelInfo, Padding

MAX_SPREAD = 0.10
"""Median over the probes of :attr:`Probe.spread`: 1 to 3 % on a quiet machine."""

MAX_MEDIAN, MAX_P90 = 0.15, 0.40
"""Errors on unseen shapes above which plans made with the model would be wrong."""

MIN_PROBES = 6
"""Twice the number of coefficients without a knee; fewer shapes confirm nothing."""

PARAMETERS, PARAMETERS_WITH_KNEE = 3, 7
"""Base, token and square; a knee adds its coefficient and its place, counted twice since it is the
best of some thirty places."""

SAME = 1e-6
"""Mean squared relative error, (0.1 %)², below which models are equally good."""

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
class FitError:
    """Absolute relative error over a number of unseen shapes."""

    median: float
    p90: float
    shapes: int

    @classmethod
    def of(cls, predicted: Sequence[float], actual: Sequence[float]) -> FitError:
        """Compare at least one prediction with its measurement."""
        relative = np.abs(np.array(predicted) / np.array(actual) - 1)
        median, p90 = np.percentile(relative, [50, 90])
        return cls(float(median), float(p90), len(relative))

    @property
    def too_large(self) -> bool:
        """Whether a fit with this error is refused."""
        return self.median > MAX_MEDIAN or self.p90 > MAX_P90

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
    spread: float  # see :data:`MAX_SPREAD`
    shapes: list[dict[str, Any]] = field(default_factory=list)
    measured: str = ""  # UTC time, ISO 8601; empty if unknown

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


def fit_cost(probes: Sequence[Probe], unseen: Sequence[Probe], padding: Padding) -> CostFit:
    """Fit step times to probes and judge them on unseen ones.

    Raises:
        TooNoisy: too few probes, repeats that differ too much, or large errors.
    """
    _require(probes, unseen)
    spread = float(np.median([probe.spread for probe in (*probes, *unseen)]))
    if spread > MAX_SPREAD:
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
        TooNoisy: too few probes with a peak, or large errors.
    """
    probes = [probe for probe in probes if probe.peak_bytes]
    unseen = [probe for probe in unseen if probe.peak_bytes]
    _require(probes, unseen)
    peaks = np.array([probe.peak_bytes for probe in probes], dtype=np.float64)
    works = [work_of(probe.lengths, padding) for probe in probes]
    rows = np.array([(w.steps, w.tokens, w.squares) for w in works], dtype=np.float64)
    model = MemoryModel(*map(float, _relative(rows, peaks)))
    predicted = [model.peak_bytes(work_of(probe.lengths, padding)) for probe in unseen]
    error = FitError.of(predicted, [float(probe.peak_bytes or 0) for probe in unseen])
    if error.too_large:
        raise TooNoisy(Message("fit.memory_off", {"error": error.words}))
    return MemoryFit(model, error)


def _require(probes: Sequence[Probe], unseen: Sequence[Probe]) -> None:
    if len(probes) < MIN_PROBES or not unseen:
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
    """Coefficients by the Schwarz criterion: a knee must explain enough (Ann. Stat. 6, 1978)."""
    works = [work_of(probe.lengths, padding) for probe in probes]
    took = np.array([probe.median_s for probe in probes])

    def score(candidate: Coefficients) -> float:
        predicted = np.array([candidate.seconds(work) for work in works])
        squared = float(np.square(predicted / took - 1).mean())
        parameters = PARAMETERS_WITH_KNEE if candidate.beyond_s > 0 else PARAMETERS
        return len(took) * math.log(squared + SAME) + parameters * math.log(len(took))

    return min((_fit_knee(knee, works, took) for knee in [0, *_knees(works)]), key=score)


def _fit_knee(knee: int, works: Sequence[Work], took: Array) -> Coefficients:
    empty = Coefficients(0.0, 0.0, 0.0, knee)
    matrix = np.array([empty.amounts(work) for work in works], dtype=np.float64)
    return empty.with_values(_relative(matrix, took))


def _knees(works: Sequence[Work]) -> list[int]:
    """Possible knees: at and between measured sizes, two sizes from either end."""
    sizes = sorted({work.tokens for work in works})
    between = [math.isqrt(a * b) for a, b in pairwise(sizes)]
    return sorted({*sizes[2:-2], *between[2:-2]})


def _relative(matrix: Array, target: Array) -> Array:
    """Non-negative least squares on the relative error."""
    return solve(matrix / target[:, None], np.ones(len(target)))
