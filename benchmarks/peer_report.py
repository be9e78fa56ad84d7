"""The results as Markdown and as a chart. Numbers come from :mod:`peer_results`, none are here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peer_models import MODELS
from peer_results import (
    TARGETS,
    Spread,
    against,
    by_processor,
    latest,
    paired,
    rate,
    seconds,
    verdict,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from peer_results import Part

TITLES = {
    "tutorial": "100 short pairs, one question and four sentences in turn",
    "mixed": "200 pairs as long as web passages (log-normal, mean 120 tokens, at most 512)",
    "long": "40 pairs of 512 tokens",
    "query": "one question and 100 documents as long as web passages, at most 300 tokens",
    "realtime": "latency: one question, ten documents, 26 tokens a pair",
    "start": "cold start: from the start of the process to the first score",
}
LATENCY = ("realtime", "start")
COLORS = {"fp32": "#9db7d5", "bf16": "#4f7cac", "int8": "#1f3b57"}
OURS = "#d1495b"


def markdown(parts: Sequence[Part]) -> str:
    """The whole report, a block for each processor."""
    lines = ["# Echelon beside its peers", "", *_preface()]
    for processor, own in by_processor(parts).items():
        lines += ["", f"## {processor}", ""]
        for model, workload in _tables(own):
            lines += [
                f"### {model}: {workload}",
                "",
                f"{MODELS[model].title}; {TITLES[workload]}.",
                "",
            ]
            lines += [*_table(own, model, workload), ""]
        lines += ["### How each engine was run", "", *_settings(own), ""]
        lines += ["### Parts", "", *_parts(own), ""]
        lines += ["### Targets", "", *_targets(own)]
    return "\n".join([*lines, ""])


def _preface() -> list[str]:
    return [
        "Written by `benchmarks/peers.py`; every number is in `peers.json`. Same texts in, raw",
        "logits out, truncation at 512 tokens, all processors. Engines take turns; a figure is the",
        "median with its quartiles and, in brackets, the number of samples. *Echelon ×* is the",
        "engine's time over Echelon's in the same precision, from turns in which both ran.",
        "Differences of logits and Kendall's tau (mean within queries) are from transformers fp32.",
        "Memory is resident after the runs (anonymous part in brackets), in GB. A run replaces the",
        "results of its own processor only.",
    ]


def _tables(parts: Sequence[Part]) -> list[tuple[str, str]]:
    there = {(part["model"], part["workload"]) for part in parts}
    return [(m, w) for m in MODELS for w in TITLES if (m, w) in there]


def _table(parts: Sequence[Part], model: str, workload: str) -> Iterator[str]:
    latency = workload in LATENCY
    yield (
        f"| engine | {'latency, ms' if latency else 'pairs/s'} | step | Echelon × "
        "| max abs Δ logit | tau | GB |"
    )
    yield "|---|---|---|---|---|---|---|"
    found = latest(parts, model, workload)
    for name in sorted(found, key=lambda name: _order(name, found[name][1])):
        part, engine = found[name]
        spread = rate(part, name)
        if spread is None:
            reason = engine.get("failure", "not run").replace("|", "¦")
            yield f"| {name} | failed: {reason} | | | | | |"
            continue
        speed = Spread.of([1e3 * s for s in seconds(part, name)]) if latency else spread
        ours = None if engine["ours"] else paired(part, f"echelon {engine['precision']}", name)
        shown = f"**{name}**" if engine["ours"] else name
        yield (
            f"| {shown} | {_spread(speed)} | {_step(engine)} | {_spread(ours, counted=False)} "
            f"| {_number(engine.get('max_delta'), 'delta')} | {_number(engine.get('tau'), 'tau')} "
            f"| {_memory(engine)} |"
        )


def _order(name: str, engine: dict[str, Any]) -> tuple[Any, ...]:
    return ("fp32", "bf16", "int8").index(engine["precision"]), not engine["ours"], name


def _spread(spread: Spread | None, *, counted: bool = True) -> str:
    if spread is None:
        return ""
    digits = max(0, 2 - len(str(int(abs(spread.median))))) + (abs(spread.median) < 100)  # noqa: PLR2004
    low, middle, high = (f"{v:.{digits}f}" for v in (spread.low, spread.median, spread.high))
    count = f" ({spread.samples})" if counted else ""
    return f"{middle} [{low}–{high}]{count}"


def _number(value: float | None, kind: str) -> str:
    if value is None:
        return ""
    return f"{value:.1e}" if kind == "delta" else f"{value:.4f}"


def _step(engine: dict[str, Any]) -> str:
    return f"{engine['size']} {engine['unit']}" if engine.get("size") else ""


def _memory(engine: dict[str, Any]) -> str:
    memory = engine.get("memory")
    return f"{memory['rss'] / 1e9:.2f} ({memory['anonymous'] / 1e9:.2f})" if memory else ""


def _settings(parts: Sequence[Part]) -> Iterator[str]:
    """Flags once an engine, chosen options by workload."""
    notes: dict[str, str] = {}
    chosen: dict[str, dict[str, str]] = {}
    for model, workload in _tables(parts):
        for name, (_, engine) in latest(parts, model, workload).items():
            notes[name] = f"{engine['note']} (environment: {engine['environment']})"
            if engine.get("options") and not engine["ours"]:
                options = ", ".join(f"{k}={v}" for k, v in engine["options"].items())
                chosen.setdefault(name, {}).setdefault(options, "")
                chosen[name][options] += f" {model}/{workload}"
    for name, note in sorted(notes.items()):
        yield f"- **{name}**: {note}"
        for options, where in chosen.get(name, {}).items():
            yield f"  - `{options}`:{where}"


def _parts(parts: Sequence[Part]) -> Iterator[str]:
    for part in parts:
        peaks = ", ".join(
            f"{precision} {max(routes.values()):.0f}"
            for precision, routes in part["peaks"].items()
            if routes
        )
        machine = part["machine"]
        yield (
            f"- {part['model']}/{part['workload']}, {part['date']}, {machine['cpu']}, "
            f"{machine['usable_cpus']} CPUs, Echelon {part['commit']}; "
            f"matrix peak in GFLOP/s: {peaks or 'not measured'}; `{part['command']}`"
        )
    for name, packages in {k: v for part in parts for k, v in part["versions"].items()}.items():
        yield f"- {name}: " + ", ".join(f"{p} {v}" for p, v in packages.items())


def _targets(parts: Sequence[Part]) -> Iterator[str]:
    yield "| model | workload | target | measured | |"
    yield "|---|---|---|---|---|"
    for target in TARGETS:
        spread, word = verdict(parts, target)
        yield (
            f"| {target.model} | {target.workload} | {target.words} | {_spread(spread)} "
            f"| {word if word != 'met' else '**met**'} |"
        )


def chart(parts: Sequence[Part], path: Path) -> None:
    """Bars of pairs a second, one panel a workload, one row of panels a processor and model."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "peers"  # the same numbers give the same file
    import matplotlib.pyplot as plt

    rows = {
        (name, model): (own, [table for table in _bar_tables(own) if table[0] == model])
        for name, own in by_processor(parts).items()
        for model in MODELS
    }
    rows = {name: row for name, row in rows.items() if row[1]}
    if not rows:
        return
    width = max(len(tables) for _, tables in rows.values())
    heights = [
        1.2 + 0.3 * max(len(latest(own, *table)) for table in tables)
        for own, tables in rows.values()
    ]
    size = (5.5 * width, sum(heights))
    figure, panels = plt.subplots(
        len(rows), width, figsize=size, squeeze=False, height_ratios=heights
    )
    for line, ((processor, _), (own, tables)) in zip(panels, rows.items(), strict=True):
        for axes in line[len(tables) :]:
            axes.axis("off")
        for axes, table in zip(line, tables, strict=False):
            _draw(axes, own, table)
            axes.set_title(f"{processor}\n{table[0]}: {table[1]}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _bar_tables(parts: Sequence[Part]) -> list[tuple[str, str]]:
    return [table for table in _tables(parts) if table[1] not in LATENCY]


def _draw(axes: Any, parts: Sequence[Part], table: tuple[str, str]) -> None:
    """One panel: the engines by their rate, the fastest on top."""
    found = latest(parts, *table)
    bars = [(name, *found[name], rate(found[name][0], name)) for name in found]
    bars = sorted((bar for bar in bars if bar[3] is not None), key=lambda bar: bar[3].median)
    for place, (_, _, engine, spread) in enumerate(bars):
        color = OURS if engine["ours"] else COLORS[engine["precision"]]
        error = [[spread.median - spread.low], [spread.high - spread.median]]
        axes.barh(place, spread.median, xerr=error, color=color, capsize=2)
        axes.text(spread.high, place, f" {spread.median:.3g}", va="center", fontsize=7)
    axes.set_yticks(range(len(bars)), [bar[0] for bar in bars], fontsize=7)
    axes.set_xlabel("pairs a second (quartiles)")
    axes.margins(x=0.12)


def summary(parts: Sequence[Part], model: str, workload: str) -> str:
    """One line a workload, for the terminal."""
    words = []
    for precision in ("fp32", "bf16", "int8"):
        ratios = against(parts, model, workload, f"echelon {precision}")
        found = latest(parts, model, workload)
        same = {n: s for n, s in ratios.items() if found[n][1]["precision"] == precision}
        if same:
            best = min(same, key=lambda name: same[name].median)
            words.append(f"{precision} {same[best].median:.2f} × {best}")
    return f"{model}/{workload}: Echelon " + (", ".join(words) or "not compared")
