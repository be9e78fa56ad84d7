"""Cost model, memory model, noise and lengths of a profile, for simulations. Pure.

Cost coefficients are those that tuning fitted. A profile without them has measured points of one
kind of texts, where tokens and squared tokens cannot be separated: the share of the squares is then
that of :data:`echelon.scheduling.cost_model.DEFAULT_COEFFICIENTS`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from echelon.errors import ProfileError
from echelon.profile import TUNE_AGAIN, Profile
from echelon.scheduling.cost_model import DEFAULT_COEFFICIENTS, Coefficients, CostModel, MemoryModel
from echelon.scheduling.fit import CostFit, MemoryFit
from echelon.simulation.workload import LognormalSize

if TYPE_CHECKING:
    from echelon.types import Padding

Point = dict[str, Any]

MIN_POINTS = 2
"""Two coefficients cannot be fitted to fewer."""

MAX_NOISE = 0.5
"""A machine whose runs differ by more was disturbed while it was measured."""


def cost_of(profile: Profile) -> CostModel:
    """How long steps take on the profile's machine.

    Raises:
        ProfileError: its cost model is damaged; or without one, too few points were measured.
    """
    if profile.cost is not None:
        fit = CostFit.from_dict(profile.cost)
        return CostModel(fit.coefficients, fit.padding)
    points = _measured(profile)
    if len(points) < MIN_POINTS:
        raise ProfileError(f"{len(points)} measured points are too few to plan with. {TUNE_AGAIN}")
    default = DEFAULT_COEFFICIENTS[profile.key.device.partition(":")[0]]
    share = default.square_s / default.token_s
    per_token = 1 + share * _square_over_mean(profile.data.get("tokens", {}))
    rows = np.array([[p["steps"], p["cost_tokens"] * per_token] for p in points], dtype=float)
    seconds = np.array([p["latency_s"]["median"] for p in points])
    base, token = _nonnegative(rows / seconds[:, None])
    padded = any(p["cost_tokens"] > p["tokens"] for p in points)
    padding: Padding = "rectangular" if padded else "none"
    return CostModel(Coefficients(base, token, token * share), padding)


def memory_of(profile: Profile) -> MemoryModel | None:
    """Memory by the tokens of a step; None if unknown.

    The model that tuning fitted, squared tokens at the profile's mean length; without one, a line
    that no measured point lies above.
    """
    if profile.memory is not None:
        length = profile.data.get("tokens", {}).get("mean", 0.0)
        return MemoryFit.from_dict(profile.memory).model.of_length(length)
    points = [p for p in _measured(profile) if p.get("peak_bytes")]
    if not points:
        return None
    tokens = np.array([p["cost_tokens"] / p["steps"] for p in points])
    peaks = np.array([p["peak_bytes"] for p in points], dtype=float)
    slope = max(0.0, float(np.polyfit(tokens, peaks, 1)[0])) if np.ptp(tokens) > 0 else 0.0
    return MemoryModel(float((peaks - slope * tokens).max()), slope)


def noise_of(profile: Profile) -> float:
    """Standard deviation of the logarithm of a step's time, as runs of one point differ.

    A large error of the cost model counts as noise too, so that what is predicted with it is as
    uncertain; the profile's warnings name it.
    """
    runs = [_undisturbed(p) for p in _measured(profile)]
    spreads = [np.log(seconds).std(ddof=1) for seconds in runs if len(seconds) > 1]
    noise = float(np.median(spreads)) if spreads else 0.0
    fit = None if profile.cost is None else CostFit.from_dict(profile.cost)
    if fit is not None and fit.error.large:
        noise = math.hypot(noise, fit.error.median)
    return min(MAX_NOISE, noise)


def _undisturbed(point: Point) -> list[float]:
    """The runs of a point that nothing disturbed, or all where that leaves too few."""
    left = {*(d["run"] for d in point.get("disturbed", ())), *point.get("outliers", ())}
    usual = [seconds for run, seconds in enumerate(point["seconds"]) if run not in left]
    return usual if len(usual) > 1 else point["seconds"]


def accuracy_notes(profile: Profile, *, memory: bool) -> list[str]:
    """What the errors of the fitted models allow; empty where they are small."""
    found = [None if profile.cost is None else CostFit.from_dict(profile.cost).note]
    if memory and profile.memory is not None:
        found.append(MemoryFit.from_dict(profile.memory).note)
    return [note for note in found if note is not None]


def lengths_of(profile: Profile) -> LognormalSize | None:
    """Lengths like those of the texts that were measured; None where the profile has none."""
    tokens = profile.data.get("tokens")
    if not tokens:
        return None
    spread = math.sqrt(2 * math.log(max(1.0, tokens["mean"] / tokens["p50"])))
    return LognormalSize(tokens["mean"], spread, int(profile.settings.max_length or tokens["max"]))


def _measured(profile: Profile) -> list[Point]:
    return [p for p in profile.points if p.get("status") == "ok" and p.get("steps")]


def _square_over_mean(tokens: dict[str, Any]) -> float:
    """Mean squared tokens over mean tokens, of a lognormal with this mean and median."""
    if not tokens:
        return 0.0
    return float(tokens["mean"] * (tokens["mean"] / tokens["p50"]) ** 2)


def _nonnegative(rows: np.ndarray[Any, Any]) -> tuple[float, float]:
    """Two non-negative coefficients with which each row comes to 1, in least squares."""
    both, *_ = np.linalg.lstsq(rows, np.ones(len(rows)), rcond=None)
    if (both >= 0).all():
        return float(both[0]), float(both[1])
    alone = [float(column.sum() / (column @ column)) for column in rows.T]
    first, second = (((rows.T[i] * alone[i] - 1) ** 2).sum() for i in (0, 1))
    return (alone[0], 0.0) if first < second else (0.0, alone[1])
