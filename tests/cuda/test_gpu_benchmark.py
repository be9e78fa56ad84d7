"""``benchmarks/gpu.py`` whole on a card made of shims, in tiny sizes: no lease for a typo."""

from __future__ import annotations

import json
import sys

import pytest
from helpers import ROOT

SIZES = {
    "TUTORIAL_PAIRS": (4,),
    "TUTORIAL_BATCHES": (2,),
    "TUTORIAL_BUDGETS": (256,),
    "BATCHES": (4,),
    "BUDGETS": (512,),
    "KNEE": (256, 512),
}


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    import gpu

    for name, sizes in SIZES.items():
        monkeypatch.setattr(gpu, name, sizes)
    monkeypatch.setattr(gpu, "open_peers", lambda *_: ([], "not compared here"))
    return gpu


def test_every_part_runs_on_a_card_and_is_written(gpu, machine, tmp_path, capsys):
    folder = gpu.build(tmp_path / "model", None, tiny=True)
    scale = gpu.Scale(pairs=8, long_pairs=1, checked=8, rounds=1, calls=2, matrix=64)
    gpu._run(gpu.Bench(folder, "cuda:0", scale, 60), tmp_path)
    content = json.loads((tmp_path / "gpu.json").read_text("utf-8"))
    assert set(gpu.PARTS) <= set(content)
    exact, *rows = content["correctness"]
    assert exact["engine"] == "transformers fp32"
    furthest = {row["engine"]: row["max_delta"] for row in rows}
    for engine, tolerance in (("fp32", 1e-4), ("fp16", 0.03), ("bf16", 0.3)):
        assert furthest[f"echelon {engine}"] <= tolerance
        assert furthest[f"echelon {engine}, small steps"] <= tolerance
    assert machine.counts("replay").total() > 0
    assert all(row["peak_bytes"] > 0 for row in content["memory"])
    page = (tmp_path / "gpu.md").read_text("utf-8")
    assert "not compared here" in page
    assert "goals" in content
    capsys.readouterr()
