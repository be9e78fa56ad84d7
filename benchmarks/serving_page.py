"""benchmarks/results/serving.json as a page of tables. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

Numbers = dict[str, Any]


def page(models: Sequence[Numbers]) -> str:
    """Markdown: for each model what was asked for, what was measured, and the peers."""
    parts = ["# Serving\n\nWritten by `benchmarks/serving.py`; the numbers are in serving.json."]
    return "\n\n".join([*parts, *map(_model, models)]) + "\n"


def _model(model: Numbers) -> str:
    parts = model["parts"]
    head = (
        f"## {model['model']}, {model['precision']}, pairs of {model['tokens']} tokens\n\n"
        f"`{model['command']}`, {model['date']}, {model['machine'].get('cpu', '')}"
    )
    rows = [
        row for letter, words in WORDS.items() if letter in parts for row in words(parts[letter])
    ]
    table = "| part | goal | measured |\n|---|---|---|\n"
    table += "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return "\n\n".join([head, table, *([_peers(parts["e"])] if "e" in parts else [])])


def _range(spread: Numbers, digits: int = 2) -> str:
    return f"{spread['median']:.{digits}f} ({spread['low']:.{digits}f}–{spread['high']:.{digits}f})"


def _a(found: Numbers) -> list[tuple[str, str, str]]:
    name = "a: saturated, served pairs/s over `Reranker.score` on the same pairs"
    return [(name, "≥ 0.90", _range(found["ratio"], 3))]


def _b(found: Numbers) -> list[tuple[str, str, str]]:
    return [
        (
            f"b: half of the capacity, {arrivals} arrivals: P99 over one request alone",
            "≤ 3",
            f"{found[arrivals]['p99_over_alone']:.2f} ({found[arrivals]['answered']} requests)",
        )
        for arrivals in ("poisson", "constant")
    ]


def _c(found: Numbers) -> list[tuple[str, str, str]]:
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(found["kinds"].items()))
    refusal = found["refusal_ms"]
    heard = f"P99 {refusal['p99']:.0f} ms, longest {refusal['max']:.0f} ms" if refusal else "none"
    return [
        (
            "c: twice the capacity: goodput over capacity",
            "≥ 0.90",
            f"{found['goodput_over_capacity']:.3f}",
        ),
        ("c: requests sent, and what they heard", "all", f"{found['sent']}: {kinds}"),
        ("c: time until a refusal is heard", "≤ 50 ms", heard),
    ]


def _d(found: Numbers) -> list[tuple[str, str, str]]:
    name = "d: one document beside requests of 1,000: P99 in steps"
    return [(name, "≤ 3", f"{found['p99_in_steps']:.2f} (a step: {found['step_s'] * 1e3:.0f} ms)")]


def _f(found: Numbers) -> list[tuple[str, str, str]]:
    mean = f"{found['overhead_ms']['mean']:.2f} ms, median {_range(found['overhead_ms'])}"
    rows = [("f: a request over HTTP, less the engine's call: mean", "< 3 ms", mean)]
    if "around_steps" in found:  # older results do not have it
        around = found["around_steps"]
        each = f"{around['served_ms']:.2f} less {around['direct_ms']:.2f}"
        shown = f"{around['overhead_ms']:.2f} ms ({each})"
        rows.append(("f: the same without the forward passes of either: mean", "< 3 ms", shown))
    return rows


def _peers(found: Numbers) -> str:
    lines = [
        f"Part e: the same open loop (Poisson); answers within {found['goal_s']:g} s count.",
        "",
        "| share of our capacity | server | goodput, pairs/s | P50 s | P99 s | answers |",
        "|---|---|---|---|---|---|",
    ]
    for rate in found["rates"]:
        for name, numbers in rate["servers"].items():
            cells = [
                f"{rate['share_of_capacity']:.2f}",
                name,
                f"{numbers['goodput_pairs_per_s']:.1f}",
                *(f"{numbers[p]:.3f}" if p in numbers else "–" for p in ("p50_s", "p99_s")),
                ", ".join(f"{count} {kind}" for kind, count in sorted(numbers["kinds"].items())),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


WORDS = {"a": _a, "b": _b, "c": _c, "d": _d, "f": _f}
