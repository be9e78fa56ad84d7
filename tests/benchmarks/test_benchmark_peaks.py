"""The matrix peak is measured of what the processor has, within its time limit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import count

import pytest
import torch
from helpers import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import peaks
from echelon.models import device

OLD = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "ECHELON_CPU": "avx2"}

SMALL = ((8, 32, 16), (16, 32, 16))


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(peaks, "SHAPES", SMALL)
    monkeypatch.setattr(peaks, "SECONDS_EACH", 0.01)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.device
def test_what_the_processor_has_is_measured_and_nothing_else(capsys):
    found = peaks.peaks()
    has = {
        "fp32": True,
        "bf16": device.multiplies_half("bf16"),
        "int8": device.multiplies_int8(),
    }
    assert {name: bool(routes) for name, routes in found.items()} == has
    said = capsys.readouterr().err
    for name, is_ in has.items():
        assert (f"{name} is left out: this processor" in said) is not is_
    assert all(rate > 0 for routes in found.values() for rate in routes.values())


def test_an_old_processor_measures_fp32_alone():
    program = "import peaks; peaks.SHAPES = ((8, 32, 16),); peaks.main()"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT / "benchmarks", env=os.environ | OLD, capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = json.loads(done.stdout)
    assert found["fp32"]
    assert found["bf16"] == found["int8"] == {}
    assert "bf16 is left out" in done.stderr
    assert "int8 is left out" in done.stderr


@pytest.mark.parametrize("step_s", [0.1, 1.0, 7.0])
def test_the_time_limit_holds_but_for_the_product_that_runs(step_s, capsys, monkeypatch):
    """Each look at the clock passes time, as a slow product does."""
    monkeypatch.setattr(device, "multiplies_half", lambda kind: False)
    monkeypatch.setattr(device, "multiplies_int8", lambda: False)
    ticks = count()
    now: list[float] = []

    def clock():
        now.append(step_s * next(ticks))
        return now[-1]

    peaks.peaks(20.0, clock)
    looks = 6  # of one product: before it, for its end, around its call, and whether time is left
    assert now[-1] <= now[0] + 20.0 + looks * step_s
    assert ("no time is left" in capsys.readouterr().err) is (step_s > 1.0)


def test_a_limit_of_nothing_measures_nothing(capsys):
    assert not any(peaks.peaks(0.0).values())
    assert "no time is left" in capsys.readouterr().err
