"""Entries of a profile's sweep that reports show, and a profile checked for a comparison."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from echelon.errors import ProfileError
from echelon.profile import TUNE_AGAIN, Profile
from echelon.reports import wording
from echelon.reports.statistics import ENOUGH, MIN_RUNS, TIE, KnownValue, summarize, verdict
from echelon.reports.wording import measured
from echelon.scheduling.cost_model import work_of
from echelon.scheduling.fit import CostFit, MemoryFit
from echelon.scheduling.packing import NO_BUDGET

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Sequence

    from echelon.reports.statistics import Verdict
    from echelon.reports.wording import Entry


def find(
    profile: Profile, batch_size: int | None, token_budget: int | None, pairs: int | None = None
) -> Entry | None:
    """The measured entry of a step size; of several, the one with the most pairs."""
    size = (batch_size, token_budget)
    known = [e for e in profile.points if measured(e) and pairs in {None, e["pairs"]}]
    found = [e for e in known if (e["batch_size"], e["token_budget"]) == size]
    return max(found, key=lambda e: e["pairs"], default=None)


def chosen(profile: Profile) -> Entry | None:
    """The measured entry of the chosen setting with the most pairs."""
    settings = profile.settings
    budget = None if settings.token_budget == NO_BUDGET else settings.token_budget
    return find(profile, settings.batch_size, budget)


def slowest(profile: Profile, against: Entry) -> Entry | None:
    """The slowest size for the same number of pairs; None where none is surely slower."""
    same_pairs = [e for e in profile.points if measured(e) and e["pairs"] == against["pairs"]]
    slower_ones = [e for e in same_pairs if compared(e, against) == "worse"]
    return min(slower_ones, key=lambda e: e["pairs_per_s"], default=None)


def time_of(entry: Entry) -> KnownValue | None:
    """An entry's time with its interval, measured or predicted; None where it has neither."""
    if not measured(entry):
        predicted = entry.get("predicted_s")
        return predicted and KnownValue(predicted["median"], predicted["low"], predicted["high"])
    latency = entry["latency_s"]
    if latency["low"] is None and entry["samples"] >= MIN_RUNS and "seconds" in entry:
        return summarize(entry["seconds"]).known  # an older profile
    return KnownValue(latency["median"], latency["low"], latency["high"])


def compared(entry: Entry, other: Entry) -> Verdict:
    """How an entry's time compares with another's, see :func:`verdict`."""
    mine, its = time_of(entry), time_of(other)
    return "unknown" if mine is None or its is None else verdict(mine, its)


def rivals(profile: Profile, chosen_one: Entry, *, any_unit: bool = False) -> list[Entry]:
    """Sizes for the same pairs that may be as fast as a chosen one, or faster: it is not known.

    ``any_unit`` compares batch sizes with token budgets too.
    """
    by_batch = bool(chosen_one["batch_size"])
    same = [e for e in profile.points if e["pairs"] == chosen_one["pairs"] and time_of(e)]
    row = [e for e in same if any_unit or bool(e["batch_size"]) == by_batch]
    size = (chosen_one["batch_size"], chosen_one["token_budget"])
    others = [e for e in row if (e["batch_size"], e["token_budget"]) != size]
    mine = next((e for e in row if (e["batch_size"], e["token_budget"]) == size), None)
    return others if mine is None else [e for e in others if compared(e, mine) == "unknown"]


def certain(profile: Profile, entry: Entry) -> bool:
    """Whether an entry is surely the best of its row: enough runs, and no rivals."""
    known = measured(entry) and entry["samples"] >= MIN_RUNS
    return known and not rivals(profile, entry)


def fastest(entries: Iterable[Entry]) -> Entry | None:
    """The smallest size within TIE of the fastest."""
    return _smallest(entries, 1 + TIE)


def knee(entries: Iterable[Entry]) -> Entry | None:
    """The smallest size that reaches ENOUGH of the best throughput."""
    return _smallest(entries, 1 / ENOUGH)


def knees(entries: Sequence[Entry], unit: str) -> list[Entry]:
    """The knee for each number of pairs, where smaller sizes are surely slower or a tie.

    ``unit`` is the entry that holds the step size.
    """
    counts = sorted({e["pairs"] for e in entries})
    rows = [[e for e in entries if e["pairs"] == count and e[unit]] for count in counts]
    found = [(row, knee(row)) for row in rows]
    return [e for row, e in found if e is not None and _sure_knee(row, e, unit)]


def _sure_knee(row: Sequence[Entry], found: Entry, unit: str) -> bool:
    smaller = [e for e in row if measured(e) and e[unit] < found[unit]]
    enough = found["samples"] >= MIN_RUNS
    return enough and all(compared(e, found) != "unknown" for e in smaller)


def slower(entry: Entry, best: Entry) -> float:
    """By which share of the best time a call of the same pairs takes longer."""
    return float(entry["latency_s"]["median"] / best["latency_s"]["median"]) - 1


def _smallest(entries: Iterable[Entry], within: float) -> Entry | None:
    every = [e for e in entries if measured(e)]
    known = [e for e in every if e["samples"] >= MIN_RUNS] or every
    shortest = min((e["latency_s"]["median"] for e in known), default=0.0)
    found = [e for e in known if e["latency_s"]["median"] <= within * shortest]
    return min(found, key=lambda e: e["batch_size"] or e["token_budget"] or 0, default=None)


Row = dict[str, Any]

Place = tuple[int, int | None, int | None]
"""Pairs, batch size and token budget of a point."""

DAMAGED = (ArithmeticError, AttributeError, KeyError, IndexError, TypeError, ValueError)
"""Errors raised by reading a profile with sound JSON and damaged content."""


@dataclass(frozen=True, slots=True)
class ProfileView:
    """A profile and its file, checked so that comparing cannot fail.

    ``best`` holds the best batch size for each number of pairs.
    """

    file: str
    profile: Profile
    points: dict[Place, Row]
    best: dict[int, Row]
    precisions: dict[str, Row]
    cost: CostFit | None
    memory: MemoryFit | None

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ProfileView:
        """Read a file.

        Raises:
            ProfileError: it is not there, no profile, of another version, or damaged.
        """
        return cls.of(Profile.load(path), str(path))

    @classmethod
    def of(cls, profile: Profile, file: str) -> ProfileView:
        """Take a profile apart.

        Raises:
            ProfileError: it is damaged.
        """
        try:
            return cls._checked(profile, file)
        except (ProfileError, *DAMAGED) as error:
            raise damaged(file, error) from error

    @classmethod
    def _checked(cls, profile: Profile, file: str) -> ProfileView:
        points, best = (list(map(_number, rows)) for rows in (profile.points, profile.best))
        _check_plain(profile)
        cost = None if profile.cost is None else CostFit.from_dict(profile.cost)
        memory = None if profile.memory is None else MemoryFit.from_dict(profile.memory)
        _check_models(cost, memory)
        return cls(
            file=file,
            profile=profile,
            points={(n["pairs"], n["batch_size"], n["token_budget"]): n for n in points},
            best={n["pairs"]: n for n in best if n["latency_s"] is not None},
            precisions={row["precision"]: _precision(row) for row in profile.precisions},
            cost=cost,
            memory=memory,
        )

    @property
    def kind(self) -> str:
        """``cpu`` or ``cuda``: which memory was measured."""
        return self.profile.key.device.partition(":")[0]

    def tokens(self) -> dict[int, int]:
        """Tokens of a call without padding, by number of pairs."""
        found = self.points.values()
        return {n["pairs"]: n["tokens"] for n in found if n["tokens"] is not None}

    def chosen(self) -> dict[int, Row]:
        """The measured points of the chosen setting, by number of pairs."""
        settings = self.profile.settings
        # A profile limits steps by one of the two; the other is infinite or absent.
        size = (settings.batch_size, None if settings.batch_size else settings.token_budget)
        found = {n["pairs"]: n for place, n in self.points.items() if place[1:] == size}
        return {pairs: n for pairs, n in found.items() if n["latency_s"] is not None}


def damaged(file: str, error: Exception) -> ProfileError:
    """The error for a profile whose content cannot be used."""
    reason = str(error) if isinstance(error, ProfileError) else f"{type(error).__name__}: {error}"
    return ProfileError(f"{file}: damaged profile ({reason.rstrip('.')}). {TUNE_AGAIN}")


def _number(entry: Entry) -> Row:
    """A checked point of the sweep; the values of a point that was not measured are None.

    ``tokens`` are those of a call without padding: they are equal for the same texts.
    """
    known = wording.measured(entry)
    latency = entry["latency_s"] if known else {}
    ends = (latency.get("low"), latency.get("high"))
    low, high = (None, None) if None in ends else map(_positive, ends)
    return {
        "pairs": _count(entry["pairs"]),
        "batch_size": _size(entry["batch_size"]),
        "token_budget": _size(entry["token_budget"]),
        "status": str(entry["status"]),
        "latency_s": _positive(latency["median"]) if known else None,
        "low_s": low,
        "high_s": high,
        "samples": _count(entry["samples"]) if known else None,
        "tokens": _count(entry["tokens"]) if known else None,
        "pairs_per_s": _positive(entry["pairs_per_s"]) if known else None,
        "peak_bytes": _size(entry["peak_bytes"]) if known else None,
    }


def _check_plain(profile: Profile) -> None:
    """Check the types of the parts that are shown as they are."""
    for name, found, kind in (
        ("key.versions", profile.key.versions, dict),
        ("machine", profile.machine, dict),
        ("data", profile.data, dict),
        ("warnings", profile.warnings, list),
    ):
        if not isinstance(found, kind):
            raise TypeError(f"{name} is {type(found).__name__}, not {kind.__name__}")
    wording.machine(profile.machine)
    wording.data(profile.data)
    _size(profile.settings.token_budget)
    _size(profile.settings.batch_size)


def _check_models(cost: CostFit | None, memory: MemoryFit | None) -> None:
    work = work_of([1, 512], "none")
    if cost is not None:
        _positive(cost.coefficients.seconds(work))
    if memory is not None:
        _positive(memory.model.peak_bytes(work))
    for error in (fit.error for fit in (cost, memory) if fit is not None):
        if not all(math.isfinite(value) for value in (error.median, error.p90, error.shapes)):
            raise ValueError(f"{error} is not finite")


def _precision(row: Row) -> Row:
    loss = row["ndcg_loss"]
    return {
        "name": wording.precision(row),
        "tokens_per_s": _positive(row["tokens_per_s"]),
        "tau": float(row["tau"]),
        "overlap": float(row["overlap"]),
        "ndcg_loss": None if loss is None else float(loss),
        "passed": bool(row["passed"]),
    }


def _positive(value: Any) -> float:
    sound = isinstance(value, int | float) and not isinstance(value, bool)
    if not (sound and math.isfinite(value) and value > 0):
        raise ValueError(f"{value!r} is not a number above 0")
    return float(value)


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{value!r} is not a whole number above 0")
    return value


def _size(value: Any) -> int | None:
    return None if value is None else _count(value)
