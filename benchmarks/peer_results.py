"""What the measurements say: merging of parts, medians, paired ratios, targets. Pure.

A *part* is one interleaved run of some engines over one workload of one model:

    model, workload, fingerprint, pairs, flop, command, date, machine, versions, peaks,
    engines: {name: {precision, ours, size, unit, options, max_delta, tau, memory, failure, …}}
    turns: [{group, round, seconds: {name: s}}]

Ratios come from turns in which both engines ran, so a machine that drifts affects both alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from echelon.profile import FEATURES

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

Part = dict[str, Any]

UNITS = ("amx_int8", "amx_bf16", "avx512_bf16", "avx512_vnni", "avx2")
"""Features that tell processors apart here: a longer list of features must not make two of one."""


@dataclass(frozen=True, slots=True)
class Spread:
    """A median with its quartiles, and of how many samples."""

    median: float
    low: float
    high: float
    samples: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """None where there is nothing."""
        if not len(values):
            return None
        low, median, high = (float(q) for q in np.percentile(values, [25, 50, 75]))
        return cls(median, low, high, len(values))


@dataclass(frozen=True, slots=True)
class Target:
    """What Echelon is to reach.

    Attributes:
        model: of :data:`peer_models.MODELS`.
        workload: which one.
        ours: Echelon in which precision.
        measure: a function of this module: part and names to a number, or None.
        against: what it is compared with: an engine, or a precision of peers.
        goal: at least, or at most when ``at_most``.
        unit: ``×``, ``%`` or ``GB``.
    """

    model: str
    workload: str
    ours: str
    measure: str
    against: str
    goal: float
    unit: str = "×"
    at_most: bool = False

    @property
    def words(self) -> str:
        """What is asked, for a table."""
        sign = "≤" if self.at_most else "≥"
        what = {
            "ratio": f"times {self.against}",
            "ratio_to_best": f"times the best {self.against} peer",
            "share_of_peak": f"useful operations over the {self.against} peak",
            "resident_gb": "resident memory",
        }[self.measure]
        return f"{self.ours}: {what} {sign} {self.goal:g} {self.unit}"


SPEED = ("tutorial", "mixed", "long")


def _each(ours: str, measure: str, against: str, goals: Sequence[float], unit: str = "×") -> Any:
    return (
        Target("large", workload, ours, measure, against, goal, unit)
        for workload, goal in zip(SPEED, goals, strict=True)
    )


TARGETS: tuple[Target, ...] = (
    *_each("echelon bf16", "ratio", "sentence-transformers bf16", (1.3, 2.0, 1.6)),
    *_each("echelon bf16", "ratio_to_best", "bf16", (1.25, 1.4, 1.2)),
    *_each("echelon int8", "ratio_to_best", "int8", (1.3, 1.5, 1.2)),
    *_each("echelon int8", "ratio", "sentence-transformers fp32", (8.0, 12.0, 6.0)),
    *_each("echelon bf16", "share_of_peak", "bf16", (75, 72, 65), "%"),
    *_each("echelon int8", "share_of_peak", "int8", (55, 52, 45), "%"),
    *(
        Target("demo", workload, f"echelon {precision}", "ratio_to_best", precision, goal)
        for workload in ("tutorial", "mixed")
        for precision, goal in (("bf16", 1.5), ("int8", 1.3))
    ),
    Target("modernbert", "mixed", "echelon bf16", "ratio", "sentence-transformers bf16", 1.5),
    Target("modernbert", "mixed", "echelon fp32", "ratio", "onnxruntime fp32", 1.5),
    Target("modernbert", "mixed", "echelon bf16", "share_of_peak", "bf16", 72, "%"),
    Target("qwen3", "query", "echelon bf16", "ratio", "sentence-transformers bf16", 2.0),
    Target("qwen3", "query", "echelon bf16", "share_of_peak", "bf16", 72, "%"),
    Target("large", "realtime", "echelon bf16", "ratio", "sentence-transformers bf16", 2.0),
    Target("large", "mixed", "echelon bf16", "resident_gb", "", 1.3, "GB", at_most=True),
    Target("large", "start", "echelon bf16", "ratio", "sentence-transformers fp32", 1.0),
    Target("large", "start", "echelon bf16", "ratio", "sentence-transformers bf16", 1.0),
)
"""A ratio is the other's time over Echelon's: of throughput, of latency and of start-up alike."""


def processor(part: Part) -> str:
    """What a part was measured on: results of other processors are other results."""
    machine = part["machine"]
    units = ", ".join(FEATURES[name] for name in UNITS if name in machine["matrix_features"])
    return f"{machine['cpu']}, {machine['usable_cpus']} CPUs ({units})"


def by_processor(parts: Iterable[Part]) -> dict[str, list[Part]]:
    """The parts of each processor, in order of their first."""
    found: dict[str, list[Part]] = {}
    for part in parts:
        found.setdefault(processor(part), []).append(part)
    return found


def _subject(part: Part) -> tuple[str, str, str]:
    return processor(part), part["model"], part["workload"]


def merge(parts: Iterable[Part], new: Part) -> list[Part]:
    """Add a part; of older ones of its processor, model and workload keep only peers it lacks.

    An older part keeps Echelon's own runs as long as it keeps a peer, for their ratios; it goes
    when its pairs are others, or nothing is left in it that the new part does not have.
    """
    kept = []
    for part in parts:
        if _subject(part) != _subject(new):
            kept.append(part)
        elif part["fingerprint"] == new["fingerprint"] and part["date"] != new["date"]:
            lasting = {
                name: engine
                for name, engine in part["engines"].items()
                if engine["ours"] or name not in new["engines"]
            }
            if any(name not in new["engines"] for name in lasting):
                kept.append({**part, "engines": lasting})
    return [*kept, new]


def finished(part: Part) -> Part:
    """The part without engines that have neither run nor failed yet."""
    run = {name for turn in part["turns"] for name in turn["seconds"]}
    done = {n: e for n, e in part["engines"].items() if n in run or "failure" in e}
    return {**part, "engines": done}


def latest(parts: Iterable[Part], model: str, workload: str) -> dict[str, tuple[Part, Any]]:
    """Per engine, the newest part of one processor's that has it, and what it says."""
    found = {}
    for part in parts:
        if (part["model"], part["workload"]) == (model, workload):
            found.update({name: (part, engine) for name, engine in part["engines"].items()})
    return found


def seconds(part: Part, name: str) -> list[float]:
    """All samples of an engine."""
    return [turn["seconds"][name] for turn in part["turns"] if name in turn["seconds"]]


def rate(part: Part, name: str) -> Spread | None:
    """Pairs a second."""
    return Spread.of([part["pairs"] / s for s in seconds(part, name)])


def paired(part: Part, ours: str, theirs: str) -> Spread | None:
    """Their time over ours, turn by turn."""
    turns = [turn["seconds"] for turn in part["turns"]]
    return Spread.of([t[theirs] / t[ours] for t in turns if ours in t and theirs in t])


def against(parts: Sequence[Part], model: str, workload: str, ours: str) -> dict[str, Spread]:
    """Each peer's paired ratio to Echelon in a precision, peers never paired left out."""
    ratios = {
        name: paired(part, ours, name)
        for name, (part, engine) in latest(parts, model, workload).items()
        if not engine["ours"]
    }
    return {name: spread for name, spread in ratios.items() if spread is not None}


def ratio(parts: Sequence[Part], target: Target) -> Spread | None:
    """Against one engine."""
    return against(parts, target.model, target.workload, target.ours).get(target.against)


def ratio_to_best(parts: Sequence[Part], target: Target) -> Spread | None:
    """Against the peer of a precision that comes closest."""
    found = latest(parts, target.model, target.workload)
    ratios = against(parts, target.model, target.workload, target.ours)
    same = [s for name, s in ratios.items() if found[name][1]["precision"] == target.against]
    return min(same, key=lambda spread: spread.median, default=None)


def share_of_peak(parts: Sequence[Part], target: Target) -> Spread | None:
    """Useful operations a second over the machine's peak of that run, in percent."""
    part, _ = latest(parts, target.model, target.workload).get(target.ours, (None, None))
    if part is None or not part["peaks"].get(target.against):
        return None
    peak = max(part["peaks"][target.against].values()) * 1e9
    return Spread.of([100 * part["flop"] / s / peak for s in seconds(part, target.ours)])


def resident_gb(parts: Sequence[Part], target: Target) -> Spread | None:
    """Resident memory after the workload."""
    _, engine = latest(parts, target.model, target.workload).get(target.ours, (None, {}))
    memory = engine.get("memory")
    return Spread.of([memory["rss"] / 1e9]) if memory else None


MEASURES = {f.__name__: f for f in (ratio, ratio_to_best, share_of_peak, resident_gb)}


def verdict(parts: Sequence[Part], target: Target) -> tuple[Spread | None, str]:
    """What was measured for a target, and ``met``, ``missed`` or ``not measured``."""
    spread = MEASURES[target.measure](parts, target)
    if spread is None:
        return None, "not measured"
    met = spread.median <= target.goal if target.at_most else spread.median >= target.goal
    return spread, "met" if met else "missed"
