"""What benchmarks/sustain.py compares and writes: predictions beside measurements. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

DOCUMENTS = 10
"""Of a request."""

GOAL = 0.25
"""Relative error that a prediction may have."""

Row = dict[str, Any]


@dataclass(slots=True)
class Bisection:
    """The highest rate that holds, between two rates that are taken for granted.

    Attributes:
        low: the highest that held; at first where to look from.
        high: the lowest that did not; at first where to look to.
        held: whether any did.
        broke: whether any did not.
    """

    low: float
    high: float
    held: bool = False
    broke: bool = False

    @property
    def rate(self) -> float:
        """To be tried next."""
        return (self.low + self.high) / 2

    def tell(self, *, held: bool) -> None:
        """Say whether :attr:`rate` held."""
        if held:
            self.low, self.held = self.rate, True
        else:
            self.high, self.broke = self.rate, True

    @property
    def found(self) -> float | None:
        """The middle of what is left; None where the highest rate is not between the two."""
        return self.rate if self.held and self.broke else None


def off(said: float | None, came: float | None) -> float | None:
    """By how much a prediction is off, relative to what was measured; None without one of them."""
    return said / came - 1 if said is not None and came else None


def verdict(name: str, points: Sequence[Row], most: Row) -> Row:
    """The worst errors of a prediction, and whether both are within the goal."""
    errors = [point["off"][name] for point in points]
    p99 = None if None in errors else max(abs(error) for error in errors)
    rate = None if most["off"][name] is None else abs(most["off"][name])
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
    machine, most = model["machine"], model["most"]
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
    low, high = most["between"]
    measured = "not found" if most["measured"] is None else f"{most['measured']:.3g}/s"
    cells = "".join(
        f" {_per_s(most['predicted'][name])} | {_signed(most['off'][name])} |" for name in names
    )
    tried = f"{len(most['probes'])} runs | {low:.3g}–{high:.3g}/s"
    lines.append(f"| highest rate | {tried} | {measured} |{cells}")
    cells = "".join(f" {_per_s(most['in_the_long_run'][name])} | |" for name in names)
    lines.append(f"| highest rate, simulated for long | | | |{cells}")
    rows = [*(point["measured"] for point in model["points"]), *most["probes"]]
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
