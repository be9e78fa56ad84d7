"""Batchers, and requests to fill them with."""

from __future__ import annotations

import zlib

import numpy as np
from hypothesis import strategies as st

from echelon.scheduling.batcher import Batcher
from echelon.scheduling.cost_model import CostModel

lengths = st.lists(st.integers(1, 60), min_size=1, max_size=12)
PRIORITIES = ("high", "normal", "low")


def logit(key) -> float:
    """The one score of a key."""
    return np.float32(zlib.crc32(repr(key).encode()) % 1000 / 10)


def batcher(budget=100, **settings) -> Batcher:
    return Batcher(CostModel(padding=settings.pop("padding", "none")), budget, **settings)


def finish(made: Batcher, step, value=1.0) -> list:
    return made.finish(step.number, [value] * len(step.places))
