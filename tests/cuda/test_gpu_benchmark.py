"""``benchmarks/gpu.py`` whole on a card made of shims, in tiny sizes: no lease for a typo."""

from __future__ import annotations

import importlib
import json
import sys
import time

import pytest
import shim_card
from helpers import ROOT

from echelon.models.architecture import read_config
from echelon.models.families import native_model

SIZES = {
    "gpu_parts": {
        "TUTORIAL_PAIRS": (4,),
        "TUTORIAL_BATCHES": (2,),
        "TUTORIAL_BUDGETS": (256,),
        "BATCHES": (4,),
        "BUDGETS": (512,),
        "KNEE": (256, 512),
    },
    "gpu_memory": {"BUDGETS": (4096,), "SHARES": (0.6,)},
    "gpu_serving": {"ROUNDS": 1, "CLIENTS": 2, "DOCUMENTS": 2, "TOKENS": 20},
    "gpu_families": {"LENGTHS": (3, 40, 17), "PRECISIONS": ("fp16",)},
}


FAMILIES = ("XLM-RoBERTa", "ModernBERT", "Qwen3", "bidirectional Llama")
"""Others are built alike, and each captures its graphs."""


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    for module, sizes in SIZES.items():
        for name, value in sizes.items():
            monkeypatch.setattr(importlib.import_module(module), name, value)
    monkeypatch.setattr(
        importlib.import_module("gpu_bench"), "open_peers", lambda *_: ([], "not compared here")
    )
    for name, value in shim_card.environment().items():  # of the servers
        monkeypatch.setenv(name, value)
    find, peer = importlib.util.find_spec, "sentence_transformers"
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == peer else find(n))
    families = importlib.import_module("gpu_families")
    few = {name: families.MODELS[name] for name in FAMILIES}
    monkeypatch.setattr(families, "MODELS", few)
    return importlib.import_module("gpu")


@pytest.fixture
def bench(gpu, tmp_path):
    scale = {"pairs": 8, "long_pairs": 1, "checked": 8, "rounds": 1, "calls": 2, "matrix": 64}
    folder = gpu.build(tmp_path / "model", None, tiny=True)
    return gpu.Bench(folder, "cuda:0", gpu.Scale(**scale, serving_s=0.5))


def test_every_part_runs_on_a_card_and_is_written(gpu, machine, bench, tmp_path, capsys):
    code = gpu.run(bench, tmp_path, time.monotonic() + 60, list(gpu.PARTS))
    content = json.loads((tmp_path / "gpu.json").read_text("utf-8"))
    assert set(gpu.PARTS) <= set(content)
    assert code == 0, capsys.readouterr().err
    exact, *rows = content["correctness"]
    assert exact["engine"] == "transformers fp32"
    furthest = {row["engine"]: row["max_delta"] for row in rows}
    for engine, tolerance in (("fp32", 1e-4), ("fp16", 0.03), ("bf16", 0.3)):
        assert furthest[f"echelon {engine}"] <= tolerance
        assert furthest[f"echelon {engine}, small steps"] <= tolerance
    assert machine.counts("replay").total() > 0
    assert all(row["peak_bytes"] > 0 for row in content["memory"])
    check_families(content["families"])
    (capped,) = content["ladder"]["runs"]
    assert "halve_budget" in capped["rungs"]
    assert capped["max_delta"] <= 0.03
    one, two, peer = content["serving"]["servers"].values()
    assert one["answered"] == one["sent"] > 0
    assert two["pairs_per_s"] > 0
    assert peer["failed"] == "sentence-transformers is not installed"
    page = (tmp_path / "gpu.md").read_text("utf-8")
    for words in ("not compared here", "## Goals", "## As a server", "## When memory is short"):
        assert words in page


def check_families(rows):
    """Beside fp32 on the CPU."""
    assert [row["family"] for row in rows] == list(FAMILIES)
    for row in rows:
        assert row["max_delta"] <= 0.05, row


def test_a_part_that_fails_is_said_and_the_others_run(gpu, machine, bench, tmp_path, monkeypatch):
    def broken(_):
        raise RuntimeError("no such kernel\nmore words")

    del machine
    part = gpu.Part(broken, 1)
    monkeypatch.setitem(gpu.PARTS, "mixed", part)
    names = ["peak", "mixed", "knee"]
    assert gpu.run(bench, tmp_path, time.monotonic(), names) == 1
    content = json.loads((tmp_path / "gpu.json").read_text("utf-8"))
    assert content["mixed"] == {"failed": "RuntimeError: no such kernel"}
    assert len(content["knee"]) == 2
    page = (tmp_path / "gpu.md").read_text("utf-8")
    assert "## mixed\n\nFailed: RuntimeError: no such kernel" in page


def test_a_part_gets_its_share_of_the_time_that_is_left(gpu, monkeypatch):
    seen = {}

    class Clock:
        device, ends = "cpu", 0.0

    def noted(bench):
        seen["ends"] = bench.ends

    for name, share in (("peak", 1), ("mixed", 3)):
        monkeypatch.setitem(gpu.PARTS, name, gpu.Part(noted, share))
    monkeypatch.setattr(gpu.time, "monotonic", lambda: 100.0)
    gpu._measured(Clock(), "peak", ["peak", "mixed"], 500.0)
    assert seen["ends"] == 200.0
    gpu._measured(Clock(), "mixed", ["mixed"], 500.0)
    assert seen["ends"] == 500.0
    gpu._measured(Clock(), "mixed", ["mixed"], 50.0)
    assert seen["ends"] == 100.0


def test_rounds_end_with_the_time_but_never_before_three(gpu, monkeypatch):
    bench_module = importlib.import_module("gpu_bench")
    bench = object.__new__(bench_module.Bench)
    bench.device, bench.scale, bench.ends = "cpu", bench_module.Scale(rounds=9), 0.0
    (row,) = bench.in_turn([{"call": lambda: None}], 4)
    assert len(row["seconds"]) == 3
    bench.ends = float("inf")
    (row,) = bench.in_turn([{"call": lambda: None}], 4)
    assert len(row["seconds"]) == 9
    del gpu, monkeypatch


def test_every_family_of_the_benchmark_can_be_made_and_runs_natively(gpu, tmp_path):
    families = importlib.import_module("gpu_families")
    importlib.reload(families)
    for name in families.MODELS:
        folder = families.checkpoint(name, tmp_path)
        assert native_model(folder, read_config(folder)) is not None, name
    del gpu
