"""The results of ``gpu.py`` as a Markdown page. Pure: a dictionary in, text out."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

MEBI = 2**20


def page(content: dict[str, Any]) -> str:
    """All parts that are there, in the order of reading."""
    parts = [_head(content)]
    for name, text in SECTIONS.items():
        found = content.get(name)
        if isinstance(found, dict) and "failed" in found:
            parts.append(f"## {name}\n\nFailed: {found['failed']}")
        elif found:
            parts.append(text(content))
    return "\n\n".join(part for part in parts if part) + "\n"


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


GOALS = {
    "share_of_peak_mixed_fp16_encoded": (
        "mixed lengths, share of the measured fp16 peak, encoded",
        "≥ 0.50",
    ),
    "share_of_peak_mixed_fp16_texts": ("the same from texts", "–"),
    "times_sentence_transformers_fp16_texts": (
        "mixed lengths, times sentence-transformers fp16 at its best, from texts",
        "≥ 3",
    ),
    "times_sentence_transformers_fp16_encoded": ("the same, encoded", "–"),
    "rank_ten_short_documents_median_ms": ("ten short documents ranked, median ms", "≤ 3"),
}
"""Figure → what it says, and what was aimed at."""


def _goals(content: dict[str, Any]) -> str:
    found = content["goals"]
    lines = [(*GOALS[name], f"{value:.2f}") for name, value in found.items()]
    return "## Goals\n\n" + _table(("what", "goal", "measured"), lines)


def _peak(content: dict[str, Any]) -> str:
    after = _peaks(content, "peak_after")
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
        (
            r["engine"],
            f"{r['median_ms']:.2f}",
            f"{r['p5_ms']:.2f} to {r['p95_ms']:.2f}",
            f"{r['p99_ms']:.2f}",
            r["calls"],
        )
        for r in content["latency"]
    ]
    titles = ("engine", "median ms", "5th to 95th percentile", "99th", "calls")
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
            f"{c['pairs_per_s']:.0f} ({len(c['seconds'])} runs)",
            f"{c['tokens_per_s']:.0f}",
            f"{c['tflops']:.1f}",
            f"{c['tflops'] / top:.0%}",
        )
        for name, c in best.items()
    ]
    intro = f"{found['pairs']} pairs, {found['tokens']} tokens; each engine at its best size.\n\n"
    titles = ("engine", "best size", "pairs/s", "tokens/s", "useful TFLOP/s", "of the fp16 peak")
    return f"## {title}\n\n" + intro + _table(titles, rows)


def _reason(row: dict[str, Any]) -> str:
    """Why a row has no results, or none that may be used; empty where it has."""
    return "; ".join(f"{kind}: {row[kind]}" for kind in ("failed", "skipped") if kind in row)


def _spread(values: Sequence[float]) -> str:
    """The median, and the extremes."""
    return f"{median(values):.0f} ({min(values):.0f}–{max(values):.0f})"


def _peaks(content: dict[str, Any], name: str) -> dict[str, float]:
    """The rates of a part, none where it failed or has not run."""
    return {k: v for k, v in content.get(name, {}).items() if isinstance(v, float)}


def _top(content: dict[str, Any]) -> float:
    """The better peak in fp16; not a number where there is none."""
    found = [_peaks(content, name).get("fp16") for name in ("peak", "peak_after")]
    return max((peak for peak in found if peak is not None), default=float("nan"))


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


def _families(content: dict[str, Any]) -> str:
    rows = [
        (r["family"], r["precision"], _reason(r), "")
        if _reason(r)
        else (
            r["family"],
            r["precision"],
            f"{r['max_delta']:.1e} of {r['deviation']:.2f}",
            f"{r['tau']:.3f}",
        )
        for r in content["families"]
    ]
    intro = "Small models with random weights beside the CPU in fp32.\n\n"
    titles = ("family", "precision", "largest difference, of the scores' deviation", "τ")
    return "## Every family\n\n" + intro + _table(titles, rows)


def _ladder(content: dict[str, Any]) -> str:
    found = content["ladder"]
    rows = [
        (
            f"{r['share']:.0%}",
            ", ".join(r["rungs"]) or "none",
            f"{r['max_delta']:.1e}",
            _reason(r) or "alike",
        )
        for r in found["runs"]
    ]
    intro = (
        "Mixed lengths in fp16, in steps of 65,536 tokens at first, with less memory than that "
        "takes.\n\n"
    )
    titles = ("memory beside the weights", "what was done", "largest difference", "scores")
    return "## When memory is short\n\n" + intro + _table(titles, rows)


def _serving(content: dict[str, Any]) -> str:
    found = content["serving"]
    rows = []
    for name, r in found["servers"].items():
        if _reason(r):
            rows.append((name, _reason(r), *[""] * 4))
            continue
        times = [_spread([1e3 * run[key] for run in r["runs"]]) for key in ("p50_s", "p99_s")]
        rows.append(
            (
                name,
                _spread(r["rates"]),
                f"{r['offered_pairs_per_s']:.0f}",
                _spread([run["goodput_pairs_per_s"] for run in r["runs"]]),
                *times,
            )
        )
    intro = (
        f"Requests of {found['documents']} documents of about 120 tokens: pairs a second with "
        "callers enough, then Poisson arrivals at half of what one worker answered; goodput counts "
        f"answers within {1e3 * found['goal_s']:.0f} ms. Medians of three runs of each, with their "
        "extremes.\n\n"
    )
    titles = ("server", "pairs/s", "offered pairs/s", "goodput", "P50 ms", "P99 ms")
    return "## As a server\n\n" + intro + _table(titles, rows)


SECTIONS = {
    "goals": _goals,
    "correctness": _correctness,
    "families": _families,
    "mixed": _mixed,
    "long": _long,
    "latency": _latency,
    "tutorial": _tutorial,
    "serving": _serving,
    "ladder": _ladder,
    "knee": _knee,
    "memory": _memory,
    "peak": _peak,
    "peak_after": lambda _: "",
}
