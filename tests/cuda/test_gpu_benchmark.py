"""``benchmarks/gpu.py`` whole on a card made of shims, in tiny sizes: no lease for a typo."""

from __future__ import annotations

import contextlib
import importlib
import json
import signal
import sys
import time

import pytest
import shim_card
from helpers import ROOT, run_python

from echelon.models.architecture import read_config
from echelon.models.families import FAMILIES, native_model

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
    "gpu_families": {"LENGTHS": (3, 40, 17), "PRECISIONS": {"fp16": 0.02}},
}


FEW = ("XLM-RoBERTa", "Qwen3", "gte")
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
    monkeypatch.setattr(families, "FAMILIES", FEW)
    return importlib.import_module("gpu")


@pytest.fixture
def bench(gpu, tmp_path):
    scale = {"pairs": 8, "long_pairs": 1, "checked": 8, "rounds": 1, "calls": 2, "matrix": 64}
    folder = gpu.build(tmp_path / "model", None, tiny=True)
    return gpu.Bench(folder, "cuda:0", gpu.Scale(**scale, serving_s=0.5))


def test_every_part_runs_on_a_card_and_is_written(gpu, machine, bench, tmp_path, capsys):
    code = gpu.run(bench, tmp_path, time.monotonic() + 3600, list(gpu.PARTS))
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
    for served in (one, two):
        (run,) = served["runs"]
        assert run["answered"] == run["sent"] > 0
        assert served["pairs_per_s"] > 0
    assert peer == {"skipped": "sentence-transformers is not installed"}
    page = (tmp_path / "gpu.md").read_text("utf-8")
    for words in ("not compared here", "## Goals", "## As a server", "## When memory is short"):
        assert words in page


def check_families(rows):
    """Beside fp32 on the CPU."""
    assert [row["family"] for row in rows] == list(FEW)
    for row in rows:
        assert row["max_delta"] <= 0.05, row


def test_a_part_that_fails_is_said_and_the_others_run(gpu, machine, bench, tmp_path, monkeypatch):
    def broken(_):
        raise RuntimeError("no such kernel\nmore words")

    del machine
    part = gpu.Part(broken, 1)
    monkeypatch.setitem(gpu.PARTS, "mixed", part)
    names = ["peak", "mixed", "knee"]
    assert gpu.run(bench, tmp_path, time.monotonic() + 3600, names) == 1
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
    late = gpu._measured(Clock(), "mixed", ["mixed"], 50.0)
    assert late == {"failed": "no time was left for it"}
    assert seen["ends"] == 500.0


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
    covered = set()
    for name in families.FAMILIES:
        folder = families.checkpoint(name, tmp_path)
        native = native_model(folder, read_config(folder))
        assert native is not None, name
        covered.add(native.family)
    assert covered == set(FAMILIES)
    del gpu


class OnCpu:
    device, ends = "cpu", 0.0


def test_a_part_that_hangs_is_ended_and_no_handler_inside_keeps_it(gpu, monkeypatch):
    def hangs(_):
        with contextlib.suppress(Exception):
            time.sleep(60)
        raise AssertionError

    monkeypatch.setitem(gpu.PARTS, "mixed", gpu.Part(hangs, 1))
    found = gpu._measured(OnCpu(), "mixed", ["mixed"], time.monotonic() + 1.0)
    assert found["failed"].startswith("TimeIsOver: it was ended after")
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_a_package_that_only_one_part_needs_fails_that_part_alone():
    """The load generator's are no part of what measuring a card needs."""
    code = f"""
import json, sys
sys.modules.update(hdrh=None, aiohttp=None)
sys.path.insert(0, {str(ROOT / "benchmarks")!r})
import gpu
class OnCpu:
    device = "cpu"
print(json.dumps(gpu._measured(OnCpu(), "serving", ["serving"], gpu.time.monotonic() + 3600)))
"""
    ended = run_python(code)
    assert ended.returncode == 0, ended.stderr
    assert "aiohttp" in json.loads(ended.stdout)["failed"]


def test_a_failed_row_counts_and_one_that_was_skipped_does_not(gpu):
    rows = [{"family": "A", "failed": "why"}, {"family": "B", "skipped": "no fp8"}, {"tau": 1.0}]
    assert gpu.failures(rows) == ["why"]
    assert gpu.failures({"servers": {"x": {"skipped": "no"}, "y": {"failed": "it"}}}) == ["it"]
    assert gpu.failures([{"seconds": [1.0, 2.0]}]) == []


@pytest.mark.parametrize("delta", [0.2, float("nan")])
def test_scores_that_change_where_memory_is_short_are_a_failure(gpu, delta):
    verdict = importlib.import_module("gpu_memory")._verdict
    del gpu
    assert "differ" in verdict({"rungs": ["halve_budget"], "max_delta": delta}, 0.1)["failed"]
    assert verdict({"rungs": ["halve_budget"], "max_delta": 0.05}, 0.1) == {}
    assert "not short" in verdict({"rungs": [], "max_delta": 0.0}, 0.1)["failed"]


def test_a_family_whose_scores_differ_is_a_failure(gpu, machine, tmp_path, monkeypatch):
    families = importlib.import_module("gpu_families")
    monkeypatch.setattr(families, "PRECISIONS", {"fp16": 0.0, "int8": 1.0})
    monkeypatch.setenv("ECHELON_CUDA_GRAPHS", "off")

    class OnCard:
        device = "cuda:0"

    half, refused = families._rows(OnCard(), "XLM-RoBERTa", tmp_path)
    assert "differs" in half["failed"]
    assert half["max_delta"] > 0
    assert "skipped" in refused
    assert "failed" not in refused
    del gpu, machine


def test_a_server_that_does_not_start_in_time_is_ended(gpu):
    servers = importlib.import_module("serving_servers")
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    server = servers.Server("sleeper", command, start_s=0.3)
    with pytest.raises(RuntimeError, match="did not start"), server:
        pass
    assert server.process.poll() is not None
    del gpu
