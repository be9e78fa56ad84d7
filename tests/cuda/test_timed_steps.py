"""What tuning times on a card: no run in which a graph is captured counts."""

from __future__ import annotations

from dataclasses import replace
from itertools import count

import pytest

from echelon.engine import precision_check
from echelon.models.cuda_graphs import CudaRecorder
from echelon.options import Options
from echelon.tuning import calibration, tuner
from echelon.tuning.calls import TimedCalls
from echelon.tuning.load import nothing_known
from echelon.tuning.sweep import MeasuredPoint
from echelon.tuning.tuner import TuningPlan

PLAN = TuningPlan(pairs=(2, 4), batch_sizes=(2,), token_budgets=(256,))


@pytest.fixture
def captures(monkeypatch):
    """The captures so far, one entry each."""
    made, record = [], CudaRecorder.__call__

    def noted(self, work):
        made.append(1)
        return record(self, work)

    monkeypatch.setattr(CudaRecorder, "__call__", noted)
    return made


@pytest.fixture
def timed(captures, monkeypatch):
    """Captures within each region that was timed, by who timed it."""
    seen = {"sweep": [], "probes": [], "comparison": []}
    last, call, add, time = [0], TimedCalls.__call__, MeasuredPoint.add, calibration._timed

    def called(self, point):
        before = len(captures)
        run = call(self, point)
        last[0] = len(captures) - before
        return run

    def added(self, *arguments):
        seen["sweep"].append(last[0])
        return add(self, *arguments)

    shapes = set()

    def probed(run, shape, clock):
        before = len(captures)
        seconds = time(run, shape, clock)
        if shape in shapes:  # the first time of a shape is its warm-up
            seen["probes"].append(len(captures) - before)
        shapes.add(shape)
        return seconds

    reads = []

    def read():
        reads.append(len(captures))
        return float(len(reads))

    monkeypatch.setattr(TimedCalls, "__call__", called)
    monkeypatch.setattr(MeasuredPoint, "add", added)
    monkeypatch.setattr(calibration, "_timed", probed)
    seen["comparison"] = reads
    monkeypatch.setattr(precision_check, "monotonic", read)
    return seen


def test_no_timed_region_of_a_tuning_run_holds_a_capture(native, machine, captures, timed):
    del machine
    clock = count(step=0.001).__next__
    options = Options(device="cuda", precision="fp16", max_length=60)
    profile = tuner.tune(
        native("xlm-roberta").folder, options, PLAN, clock=clock, watch=nothing_known
    )
    assert profile.key.device == "cuda:0"
    assert captures
    assert timed["sweep"]
    assert timed["probes"]
    assert not any(timed["sweep"])
    assert not any(timed["probes"])


def test_no_precision_is_compared_while_graphs_are_captured(
    native, machine, captures, timed, monkeypatch
):
    del machine
    monkeypatch.setattr(precision_check, "step_budget", lambda *_: 500)  # steps as small as graphs
    folder = native("bert").folder
    resolved = tuner.resolve(folder)
    check = precision_check.PrecisionCheck.of(
        resolved, Options(device="cuda", max_length=60), tuner.open_encoder(resolved)
    )
    replace(check, topics=check.topics[:2]).score("fp16")
    assert captures
    began, ended = timed["comparison"]
    assert began == ended == len(captures)
