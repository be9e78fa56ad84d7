"""Compares predictions with measurements for benchmarks/sustain.py, and writes the page. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

DOCUMENTS = 10
"""Documents per request."""

GOAL = 0.25
"""Largest relative error of a prediction."""

Row = dict[str, Any]


@dataclass(slots=True)
class Bisection:
    """Finds the highest rate that holds between two rates.

    Attributes:
        low: the highest rate that held; at first the lower end of the search.
        high: the lowest rate that did not hold; at first the upper end.
        held: whether any rate held.
        broke: whether any rate did not hold.
    """

    low: float
    high: float
    held: bool = False
    broke: bool = False

    @property
    def rate(self) -> float:
        """The rate to measure next."""
        return (self.low + self.high) / 2

    def update(self, *, held: bool) -> None:
        """Continue with whether :attr:`rate` held."""
        if held:
            self.low, self.held = self.rate, True
        else:
            self.high, self.broke = self.rate, True

    @property
    def found(self) -> float | None:
        """The middle of the interval; None where the highest rate is outside the first one."""
        return self.rate if self.held and self.broke else None


def off(predicted: float | None, measured: float | None) -> float | None:
    """Relative error of a prediction; None where one of the two is missing."""
    return predicted / measured - 1 if predicted is not None and measured else None


def verdict(name: str, points: Sequence[Row], highest: Row) -> Row:
    """The worst errors of a prediction, and whether both are within the goal."""
    errors = [point["off"][name] for point in points]
    p99 = None if None in errors else max(abs(error) for error in errors)
    rate = None if highest["off"][name] is None else abs(highest["off"][name])
    return {
        "p99": p99,
        "rate": rate,
        "goal": GOAL,
        "met": all(error is not None and error <= GOAL for error in (p99, rate)),
    }


def page(models: Sequence[Row]) -> str:
    """The results as Markdown."""
    words = (
        f"Requests of {DOCUMENTS} documents, open loop, Poisson. The goal of a prediction: within "
        f"{GOAL:.0%} of what was measured with the same requests. *probes*: step times as `echelon "
        "tune` fits them, and the overhead of a request as one caller found it; *after a look*: "
        "both, and how much step times vary, corrected by a run at half of the capacity, with "
        "other requests, as `echelon tune --scenario` does."
    )
    lines = [
        "# P99 and the highest sustainable rate: predicted against measured",
        "",
        words,
        "",
        "| model | prediction | worst P99 error | error of the highest rate | met |",
        "|---|---|---|---|---|",
    ]
    for model in models:
        lines += [
            f"| {model['model']} | {name} | {share_of(row['p99'])} | {share_of(row['rate'])} | "
            f"{'yes' if row['met'] else 'no'} |"
            for name, row in model["verdict"].items()
        ]
    for model in models:
        lines += ["", *_model(model)]
    return "\n".join(lines) + "\n"


def _model(model: Row) -> list[str]:
    names = list(model["forecasts"])
    machine, highest = model["machine"], model["most"]
    versions = ", ".join(f"{name} {version}" for name, version in model["versions"].items())
    known = [
        f"{name}: {1000 * one['overhead_s']:.1f} ms overhead, pace {one['pace']:.2f}, "
        f"noise {one['noise']:.2f}"
        for name, one in model["forecasts"].items()
    ]
    head = "".join(f" {name} | off |" for name in names)
    made = (
        f"`{model['command']}`, {model['date']}, {machine['cpu']}, "
        f"{machine['usable_cpus']} cores, {versions}."
    )
    reckoned = (
        f"A request alone takes {_ms(model['alone']['p50_s'])}, so the goal is P99 within "
        f"{_ms(model['goal_s'])}; predicted capacity {model['capacity_per_s']:.3g} requests a "
        f"second. {'; '.join(known)}."
    )
    lines = [
        f"## {model['model']}, {model['precision']}, pairs of {model['tokens']} tokens",
        "",
        made,
        "",
        reckoned,
        "",
        f"| load | requests | | measured |{head}",
        "|---" * (4 + 2 * len(names)) + "|",
    ]
    for point in model["points"]:
        load = f"{point['share']:.0%}, {point['rate_per_s']:.3g}/s"
        for label, key in (("P50", "p50_s"), ("P95", "p95_s"), ("P99", "p99_s")):
            came, cells = point["measured"][key], ""
            for name in names:
                said = point["predicted"][name][key]
                cells += f" {_ms(said)} | {_signed(off(said, came))} |"
            lines.append(
                f"| {load} | {point['measured']['requests']} | {label} | {_ms(came)} |{cells}"
            )
    low, high = highest["between"]
    measured = "not found" if highest["measured"] is None else f"{highest['measured']:.3g}/s"
    cells = "".join(
        f" {_per_s(highest['predicted'][name])} | {_signed(highest['off'][name])} |"
        for name in names
    )
    tried = f"{len(highest['probes'])} runs | {low:.3g}–{high:.3g}/s"
    lines.append(f"| highest rate | {tried} | {measured} |{cells}")
    cells = "".join(f" {_per_s(highest['in_the_long_run'][name])} | |" for name in names)
    lines.append(f"| highest rate, simulated for long | | | |{cells}")
    rows = [*(point["measured"] for point in model["points"]), *highest["probes"]]
    doubts = dict.fromkeys(doubt for row in rows for doubt in row["doubts"])
    return lines + [line for doubt in doubts for line in ("", f"Note: {doubt}")]


def share_of(error: float | None) -> str:
    """An error in words."""
    return "unknown" if error is None else f"{error:.0%}"


def _signed(error: float | None) -> str:
    return "–" if error is None else f"{error:+.0%}"


def _ms(seconds: float | None) -> str:
    return "–" if seconds is None else f"{1000 * seconds:.0f} ms"


def _per_s(rate: float | None) -> str:
    return "not found" if rate is None else f"{rate:.3g}/s"


def merged(kept: Sequence[Row], found: Row) -> list[Row]:
    """A model's results in place of its old ones, beside other models'."""
    others = [one for one in kept if one["model"] != found["model"]]
    return sorted([*others, found], key=lambda one: str(one["model"]))
