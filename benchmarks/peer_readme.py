"""The README's table of what was measured: a block of rows for each processor and model.

    python benchmarks/peer_readme.py    # writes the table into README.md and README.zh.md

``benchmarks/peers.py`` writes it too. Numbers come from :mod:`peer_results`, none are here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from peer_results import SPEED, by_processor, latest, paired, rate

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from peer_results import Part

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results/peers.json"
BEGIN, END = "<!-- peers: begin -->", "<!-- peers: end -->"

COLUMNS = {
    "README.md": ("engine", "100 short pairs", "200 web passages", "40 pairs of 512 tokens"),
    "README.zh.md": ("引擎", "100 个短文档对", "200 个网页段落", "40 个 512 token 的文档对"),
}
SHAPES = {
    "README.md": {"large": "bge-reranker-v2-m3's shape", "demo": "the demo model"},
    "README.zh.md": {"large": "bge-reranker-v2-m3 的形状", "demo": "演示模型"},
}
NAMES = {
    "openvino": "OpenVINO",
    "onnxruntime": "ONNX Runtime",
    "echelon": "Echelon",
    "onnx": "ONNX",
}

ENOUGH = 2
"""Workloads that an engine must have been measured on."""

MIN_RUNS = 3
"""Fewer prove nothing."""


def table(parts: Sequence[Part], file: str) -> str:
    """The table for a README, between its marks."""
    columns = COLUMNS[file]
    lines = [BEGIN, f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for processor, own in by_processor(parts).items():
        for model, shape in SHAPES[file].items():
            rows = list(_rows(own, model))
            if rows:
                lines += [f"| **{processor}: {shape}** | | | |", *rows]
    return "\n".join([*lines, END])


def _rows(parts: Sequence[Part], model: str) -> Iterator[str]:
    """int8 first, in each precision Echelon, then the others by their rate."""
    found = {workload: latest(parts, model, workload) for workload in SPEED}
    ran = {
        workload: {name for name, (part, _) in engines.items() if _runs(part, name) >= MIN_RUNS}
        for workload, engines in found.items()
    }
    names = {name for some in ran.values() for name in some}
    names = {name for name in names if sum(name in some for some in ran.values()) >= ENOUGH}

    def order(name: str) -> tuple[int, bool, float]:
        part, engine = next(found[w][name] for w in SPEED if name in ran[w])
        place = ("int8", "bf16", "fp32").index(engine["precision"])
        return place, not engine["ours"], -_median(part, name)

    for name in sorted(names, key=order):
        cells = [_cell(*found[w][name], name) if name in ran[w] else "" for w in SPEED]
        yield f"| {_shown(name)} | {' | '.join(cells)} |"


def _runs(part: Part, name: str) -> int:
    spread = rate(part, name)
    return 0 if spread is None else spread.samples


def _median(part: Part, name: str) -> float:
    spread = rate(part, name)
    return 0.0 if spread is None else spread.median


def _cell(part: Part, engine: dict[str, object], name: str) -> str:
    """Pairs a second, and the engine's time over Echelon's in the same precision."""
    ratio = None if engine["ours"] else paired(part, f"echelon {engine['precision']}", name)
    cell = f"{_median(part, name):#.3g}".rstrip(".")
    return cell if ratio is None else f"{cell} ({ratio.median:.2f} ×)"


def _shown(name: str) -> str:
    return " ".join(NAMES.get(word, word) for word in name.split())


def write(parts: Sequence[Part]) -> None:
    """Put the table into both READMEs."""
    for file in COLUMNS:
        path = ROOT / file
        before, _, rest = path.read_text(encoding="utf-8").partition(BEGIN)
        after = rest.partition(END)[2]
        path.write_text(f"{before}{table(parts, file)}{after}", encoding="utf-8")


if __name__ == "__main__":
    write(json.loads(RESULTS.read_text(encoding="utf-8"))["parts"])
