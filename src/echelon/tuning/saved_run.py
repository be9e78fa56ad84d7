"""Results of a tuning run that has not ended, stored on disk so that the run can be resumed."""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from echelon.errors import EchelonWarning, ProfileError, StorageError
from echelon.profile import read_json, write_json
from echelon.scheduling.fit import Probe
from echelon.tuning.sweep import MeasuredPoint

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(slots=True)
class SavedRun:
    """What a run has found so far; ``question`` says of which model, options and sizes."""

    path: Path | None
    question: dict[str, Any]
    precisions: list[dict[str, Any]] = field(default_factory=list)
    threads: list[dict[str, Any]] = field(default_factory=list)
    points: list[MeasuredPoint] = field(default_factory=list)
    probes: list[Probe] = field(default_factory=list)
    checks: list[Probe] = field(default_factory=list)
    probed: bool = False  # whether probes and checks are complete
    notes: list[str] = field(default_factory=list)  # stages that the time limit left out
    unwritable: bool = False

    @classmethod
    def of(cls, path: Path | None, question: dict[str, Any]) -> SavedRun:
        """Read what an interrupted run of the same question stored; nothing where there is none."""
        run = cls(path, question)
        if path is not None and path.is_file():
            run._read(path)
        return run

    def _read(self, path: Path) -> None:
        try:
            content = read_json(path)
            if content["question"] != self.question:
                return
            points = [MeasuredPoint.from_dict(point) for point in content["points"]]
            probes, checks = (list(map(_probe, content[name])) for name in ("probes", "checks"))
            self.precisions, self.threads = content["precisions"], content["threads"]
            self.points, self.probes, self.checks = points, probes, checks
            self.probed = bool(content["probed"])
        except (ProfileError, KeyError, TypeError):
            return  # half-written, or not a file of ours: measure again

    def keep_points(self, points: list[MeasuredPoint]) -> None:
        """Store the points of the sweep as they are now."""
        self.points = points
        self.save()

    def keep_probes(self, probes: list[Probe], checks: list[Probe]) -> None:
        """Store the probes as they are now."""
        self.probes, self.checks = probes, checks
        self.save()

    def save(self) -> None:
        """Store what is known; where that fails, the run goes on and cannot be resumed."""
        if self.path is None or self.unwritable:
            return
        content = {
            "question": self.question,
            "precisions": self.precisions,
            "threads": self.threads,
            "points": [measured.as_dict() for measured in self.points],
            "probes": [asdict(probe) for probe in self.probes],
            "checks": [asdict(probe) for probe in self.checks],
            "probed": self.probed,
        }
        try:
            write_json(self.path, content)
        except StorageError as error:
            self.unwritable = True
            warnings.warn(
                f"Results cannot be stored while measuring: {error}", EchelonWarning, stacklevel=2
            )


def _probe(stored: dict[str, Any]) -> Probe:
    return Probe(tuple(stored["lengths"]), tuple(stored["seconds"]), stored["peak_bytes"])
