"""The results of ``gpu.py`` as a Markdown page. Pure: a dictionary in, text out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

MEBI = 2**20


def page(content: dict[str, Any]) -> str:
    """All parts that are there, in the order of reading."""
    parts = [_head(content)]
    parts += [text(content) for name, text in SECTIONS.items() if content.get(name)]
    return "\n\n".join(parts) + "\n"


def _head(content: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    gpus = ", ".join(
        f"{gpu['name']} ({gpu['memory_bytes'] / 2**30:.0f} GiB, sm {gpu['capability']})"
        for gpu in content["machine"]["gpus"]
    )
    lines = [
        "# CUDA results",
        "",
        f"- Command: `{content['command']}`",
        f"- Card: {gpus or 'none; these are not results'}",
        f"- Host: {content['machine']['cpu']}, {content['machine']['usable_cpus']} CPUs",
        f"- Versions: {versions}",
        "- Model: the shape of XLM-RoBERTa-large unless the command says otherwise, random weights",
    ]
    if content["not_compared"]:
        lines.append(f"- Not compared: {content['not_compared']}")
    return "\n".join(lines)


def _table(titles: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def _goals(content: dict[str, Any]) -> str:
    found = content["goals"]
    rows = [
        ("mixed lengths, share of the measured fp16 peak, encoded", "≥ 0.50", "{:.2f}"),
        ("the same from texts", "–", "{:.2f}"),
        (
            "mixed lengths, times sentence-transformers fp16 at its best, from texts",
            "≥ 3",
            "{:.2f}",
        ),
        ("the same, encoded", "–", "{:.2f}"),
        ("ten short documents ranked, median ms", "≤ 3", "{:.2f}"),
    ]
    lines = [
        (what, goal, form.format(value))
        for (what, goal, form), value in zip(rows, found.values(), strict=True)
    ]
    return "## Goals\n\n" + _table(("what", "goal", "measured"), lines)


def _peak(content: dict[str, Any]) -> str:
    after = content.get("peak_after", {})
    rows = [(name, f"{x:.1f}", f"{after.get(name, x):.1f}") for name, x in content["peak"].items()]
    title = "## Peak of one large product\n\n"
    return title + _table(("type", "TFLOP/s before", "TFLOP/s after"), rows)


def _correctness(content: dict[str, Any]) -> str:
    exact, *rows = content["correctness"]
    spread = exact["logits"]
    lines = [(r["engine"], f"{r['max_delta']:.2e}", f"{r['tau']:.4f}") for r in rows]
    intro = (
        f"Beside transformers in fp32, whose logits span {spread['lowest']:.2f} to "
        f"{spread['highest']:.2f}; small steps are 1,024 tokens and run as graphs.\n\n"
    )
    titles = ("engine", "largest difference of a logit", "mean τ within queries")
    return "## Correctness\n\n" + intro + _table(titles, lines)


def _latency(content: dict[str, Any]) -> str:
    rows = [
        (r["engine"], f"{r['median_ms']:.2f}", f"{r['p5_ms']:.2f} to {r['p95_ms']:.2f}")
        for r in content["latency"]
    ]
    titles = ("engine", "median ms", "5th to 95th percentile")
    return "## Ten short documents\n\n" + _table(titles, rows)


def _throughput(title: str, found: dict[str, Any], top: float) -> str:
    best: dict[str, dict[str, Any]] = {}
    for cell in found["cells"]:
        rival = best.get(cell["engine"])
        if rival is None or cell["median_s"] < rival["median_s"]:
            best[cell["engine"]] = cell
    rows = [
        (
            name,
            f"{c['size']} {'tokens' if c['unit'] == 'budget' else 'pairs'}",
            f"{c['pairs_per_s']:.0f}",
            f"{c['tokens_per_s']:.0f}",
            f"{c['tflops']:.1f}",
            f"{c['tflops'] / top:.0%}",
        )
        for name, c in best.items()
    ]
    intro = f"{found['pairs']} pairs, {found['tokens']} tokens; each engine at its best size.\n\n"
    titles = ("engine", "best size", "pairs/s", "tokens/s", "useful TFLOP/s", "of the fp16 peak")
    return f"## {title}\n\n" + intro + _table(titles, rows)


def _top(content: dict[str, Any]) -> float:
    after = content.get("peak_after", content["peak"])
    return max(float(content["peak"]["fp16"]), float(after["fp16"]))


def _mixed(content: dict[str, Any]) -> str:
    return _throughput("Mixed lengths", content["mixed"], _top(content))


def _long(content: dict[str, Any]) -> str:
    return _throughput("512 tokens a pair", content["long"], _top(content))


def _tutorial(content: dict[str, Any]) -> str:
    cells = content["tutorial"]
    counts = sorted({cell["pairs"] for cell in cells})
    rows = []
    for engine, unit in dict.fromkeys((cell["engine"], cell["unit"]) for cell in cells):
        row = [engine if unit == "batch" else f"{engine}, token budget"]
        for count in counts:
            mine = [
                c for c in cells if (c["engine"], c["unit"], c["pairs"]) == (engine, unit, count)
            ]
            top = max(mine, key=lambda c: c["pairs_per_s"])
            row.append(f"{top['pairs_per_s']:.0f} ({top['size']})")
        rows.append(row)
    intro = "Pairs/s at the best step size (in brackets), pairs of about 26 tokens.\n\n"
    titles = ("engine", *(f"{count} pairs" for count in counts))
    return "## The tutorial's grid\n\n" + intro + _table(titles, rows)


def _knee(content: dict[str, Any]) -> str:
    top = _top(content)
    rows = [
        (r["size"], f"{r['tokens_per_s']:.0f}", f"{r['tflops']:.1f}", f"{r['tflops'] / top:.0%}")
        for r in content["knee"]
    ]
    titles = ("tokens a step", "tokens/s", "useful TFLOP/s", "of the peak")
    return "## Knee, fp16, encoded\n\n" + _table(titles, rows)


def _memory(content: dict[str, Any]) -> str:
    rows = [(r["run"], f"{r['peak_bytes'] / MEBI:.0f}") for r in content["memory"]]
    return "## Peak memory beyond the weights, without graphs\n\n" + _table(("run", "MiB"), rows)


SECTIONS = {
    "goals": _goals,
    "correctness": _correctness,
    "mixed": _mixed,
    "long": _long,
    "latency": _latency,
    "tutorial": _tutorial,
    "knee": _knee,
    "memory": _memory,
    "peak": _peak,
}
