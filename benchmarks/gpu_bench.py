"""What all parts of ``gpu.py`` share: the model, the engines, the clock and the time left."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gpu_engines import Ours, Peer, open_peers
from gpu_workloads import Writer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

HALVES = ("fp16", "bf16")
MIN_ROUNDS = 3
"""Turns of each engine, however little time is left: fewer prove nothing."""


@dataclass(frozen=True, slots=True)
class Scale:
    """How much to measure."""

    pairs: int = 1024  # of mixed lengths
    long_pairs: int = 256  # of 512 tokens
    checked: int = 256  # pairs whose scores are compared
    rounds: int = 5  # turns of each engine, where there is time
    calls: int = 200  # single calls whose latency is measured
    matrix: int = 8192  # rows and columns of the product that gives the peak
    serving_s: float = 6.0  # of each of a server's runs


DRY = Scale(pairs=24, long_pairs=2, checked=32, rounds=1, calls=3, matrix=256, serving_s=1.0)


class Bench:
    """The model, engines and clock that all parts share."""

    def __init__(self, folder: Path, device: str, scale: Scale) -> None:
        self.folder, self.device, self.scale = folder, device, scale
        self.config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.ours = {precision: Ours(folder, precision, device) for precision in HALVES}
        self.peers, self.missing = open_peers(folder, device)
        self.writer = Writer.of(folder)
        self.ends = float("inf")  # when the part that runs should be over, on the monotonic clock

    @property
    def engines(self) -> list[Ours | Peer]:
        """All of them, ours first."""
        return [*self.ours.values(), *self.peers]

    @property
    def hurries(self) -> bool:
        """Whether the time of the part that runs is over."""
        return time.monotonic() >= self.ends

    def wait(self) -> None:
        """Wait until the card is idle."""
        if self.device != "cpu":
            import torch

            torch.cuda.synchronize()

    def time(self, call: Callable[[], Any]) -> float:
        """Seconds of one call."""
        self.wait()
        started = time.perf_counter()
        call()
        self.wait()
        return time.perf_counter() - started

    def in_turn(self, cells: list[dict[str, Any]], pairs: int) -> list[dict[str, Any]]:
        """Time each cell's ``call`` once a round; return the cells with their medians.

        A call before is not counted. Rounds end early where the part's time does.
        """
        for cell in cells:
            cell["call"]()
            cell["seconds"] = []
        for number in range(self.scale.rounds):
            if number >= MIN_ROUNDS and self.hurries:
                break
            for cell in cells:
                cell["seconds"].append(self.time(cell["call"]))
        return [_summary(cell, pairs) for cell in cells]


def _summary(cell: dict[str, Any], pairs: int) -> dict[str, Any]:
    low, median, high = np.percentile(cell["seconds"], [25, 50, 75]).tolist()
    kept = {key: value for key, value in cell.items() if key != "call"}
    return kept | {"median_s": median, "quartiles_s": [low, high], "pairs_per_s": pairs / median}


def cells_of(engines: Iterable[Ours | Peer], unit: str, sizes: Iterable[int], *args: Any) -> Any:
    """A cell for each engine and step size, which scores ``args``."""
    return [
        {
            "engine": engine.name,
            "unit": unit,
            "size": size,
            "call": lambda e=engine, s=size: e.score(*args, **{unit: s}),
        }
        for engine in engines
        for size in sizes
    ]
