"""One of the two profiles that are compared, checked so far that comparing cannot fail. Pure."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from echelon.errors import ProfileError
from echelon.profile import TUNE_AGAIN, Profile
from echelon.reports.ratio import Known
from echelon.scheduling.cost_model import work_of
from echelon.tune import words
from echelon.tuning.fit import CostFit, MemoryFit

if TYPE_CHECKING:
    import os

    from echelon.tune.words import Entry
    from echelon.tuning.fit import FitError

Place = tuple[int, int | None, int | None]
"""Pairs, batch size and token budget of a point."""

DAMAGED = (ArithmeticError, AttributeError, KeyError, IndexError, TypeError, ValueError)
"""What reading a profile raises whose JSON is sound and whose content is not."""


@dataclass(frozen=True, slots=True)
class Number:
    """A point, measured or not.

    Attributes:
        pairs: of a call.
        batch_size: pairs a step; None leaves it to the budget.
        token_budget: tokens a step; None leaves it to the batch size.
        status: ``ok``, or why there is no number.
        latency_s: median of a call; this and all below None where there is no number.
        low_s: lower end of its interval; None with too few runs.
        high_s: upper end.
        samples: how many runs.
        tokens: useful tokens of a call; the same for the same texts.
        pairs_per_s: throughput.
        peak_bytes: peak memory; None where it could not be read.
    """

    pairs: int
    batch_size: int | None
    token_budget: int | None
    status: str
    latency_s: float | None = None
    low_s: float | None = None
    high_s: float | None = None
    samples: int | None = None
    tokens: int | None = None
    pairs_per_s: float | None = None
    peak_bytes: int | None = None

    @classmethod
    def of(cls, entry: Entry) -> Number:
        """Read a profile's entry."""
        size = (_count(entry["pairs"]), _size(entry["batch_size"]), _size(entry["token_budget"]))
        if not words.measured(entry):
            return cls(*size, str(entry["status"]))
        latency, samples = entry["latency_s"], _count(entry["samples"])
        ends = (latency["low"], latency["high"])
        low, high = (None, None) if None in ends else map(_positive, ends)
        median, peak = _positive(latency["median"]), _size(entry["peak_bytes"])
        tokens, rate = _count(entry["tokens"]), _positive(entry["pairs_per_s"])
        return cls(*size, str(entry["status"]), median, low, high, samples, tokens, rate, peak)

    @property
    def place(self) -> Place:
        """Where it belongs in the sweep."""
        return self.pairs, self.batch_size, self.token_budget

    @property
    def latency(self) -> Known | None:
        """The median with its interval; None where there is no number."""
        return None if self.latency_s is None else Known(self.latency_s, self.low_s, self.high_s)

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Side:
    """A profile in the form that is compared.

    Attributes:
        file: its name, for people.
        profile: what it says.
        points: all of the sweep, by place.
        best: the best batch for each number of pairs.
        precisions: each compared precision by its name.
        cost: the cost model; None without one.
        memory: the memory model; None without one.
    """

    file: str
    profile: Profile
    points: dict[Place, Number]
    best: dict[int, Number]
    precisions: dict[str, dict[str, Any]]
    cost: CostFit | None
    memory: MemoryFit | None

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Side:
        """Read a file.

        Raises:
            ProfileError: it is not there, no profile, of another version, or damaged.
        """
        return cls.of(Profile.load(path), str(path))

    @classmethod
    def of(cls, profile: Profile, file: str) -> Side:
        """Take a profile apart.

        Raises:
            ProfileError: it is damaged.
        """
        try:
            return _side(profile, file)
        except (ProfileError, *DAMAGED) as error:
            raise damaged(file, error) from error

    @property
    def kind(self) -> str:
        """``cpu`` or ``cuda``: whose memory was measured."""
        return self.profile.key.device.partition(":")[0]

    def tokens(self) -> dict[int, int]:
        """Useful tokens of a call, by number of pairs."""
        return {n.pairs: n.tokens for n in self.points.values() if n.tokens is not None}

    def chosen(self) -> dict[int, Number]:
        """The measured points of the chosen setting, by number of pairs."""
        settings = self.profile.settings
        # A profile bounds steps by one of the two; the other is without end or absent.
        size = (settings.batch_size, None if settings.batch_size else settings.token_budget)
        found = (n for n in self.points.values() if n.latency_s is not None)
        return {n.pairs: n for n in found if (n.batch_size, n.token_budget) == size}


def damaged(file: str, error: Exception) -> ProfileError:
    """What to say of a profile whose content cannot be used."""
    reason = str(error) if isinstance(error, ProfileError) else f"{type(error).__name__}: {error}"
    return ProfileError(f"{file}: damaged profile ({reason.rstrip('.')}). {TUNE_AGAIN}")


def _side(profile: Profile, file: str) -> Side:
    points = [Number.of(entry) for entry in profile.points]
    best = [Number.of(entry) for entry in profile.best]
    _check_plain(profile)
    cost = None if profile.cost is None else CostFit.from_dict(profile.cost)
    memory = None if profile.memory is None else MemoryFit.from_dict(profile.memory)
    _check_models(cost, memory)
    return Side(
        file=file,
        profile=profile,
        points={number.place: number for number in points},
        best={number.pairs: number for number in best if number.latency_s is not None},
        precisions={row["precision"]: _precision(row) for row in profile.precisions},
        cost=cost,
        memory=memory,
    )


def _check_plain(profile: Profile) -> None:
    """The parts that are shown as they are must be of the kind that they should be."""
    kinds = {"key.versions": dict, "machine": dict, "data": dict, "warnings": list}
    for name, kind in kinds.items():
        found = profile.key.versions if name == "key.versions" else getattr(profile, name)
        if not isinstance(found, kind):
            raise TypeError(f"{name} is {type(found).__name__}, not {kind.__name__}")
    words.machine(profile.machine)
    words.data(profile.data)
    _size(profile.settings.token_budget)
    _size(profile.settings.batch_size)


def _check_models(cost: CostFit | None, memory: MemoryFit | None) -> None:
    work = work_of([1, 512], "ragged")
    if cost is not None:
        _positive(cost.coefficients.seconds(work))
        _errors(cost.error)
    if memory is not None:
        _positive(memory.model.peak_bytes(work))
        _errors(memory.error)


def _errors(error: FitError) -> None:
    if not all(math.isfinite(value) for value in (error.median, error.p90, error.shapes)):
        raise ValueError(f"{error} is not finite")


def _precision(row: dict[str, Any]) -> dict[str, Any]:
    loss = row["ndcg_loss"]
    return {
        "name": words.precision(row),
        "tokens_per_s": _positive(row["tokens_per_s"]),
        "tau": float(row["tau"]),
        "overlap": float(row["overlap"]),
        "ndcg_loss": None if loss is None else float(loss),
        "passed": bool(row["passed"]),
    }


def _positive(value: Any) -> float:
    sound = isinstance(value, int | float) and not isinstance(value, bool)
    if not (sound and math.isfinite(value) and value > 0):
        raise ValueError(f"{value!r} is no number above 0")
    return float(value)


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{value!r} is no whole number above 0")
    return value


def _size(value: Any) -> int | None:
    return None if value is None else _count(value)
