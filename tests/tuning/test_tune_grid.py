"""The sweep, driven by a pretend machine and a pretend clock."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from echelon.models.base import DeviceOutOfMemory
from echelon.reports.statistics import MIN_RUNS
from echelon.tuning.load import Disturbance
from echelon.tuning.sweep import (
    MAX_REPEATS,
    SLOW_S,
    MeasuredPoint,
    SweepPoint,
    SweepRun,
    grid,
    surely_slower,
    sweep,
)

SIZES = st.lists(st.integers(1, 64), min_size=1, max_size=5)


class Machine:
    """Runs points in a known time, and advances its own clock."""

    def __init__(self, seconds=lambda point: 0.01, memory=None):
        self.now = 0.0
        self.runs: list[SweepPoint] = []
        self._seconds = seconds
        self._memory = memory

    def clock(self):
        return self.now

    def __call__(self, point):
        self.runs.append(point)
        if self._memory is not None and point.size > self._memory:
            raise DeviceOutOfMemory(f"{point.size} over {self._memory}")
        self.now += self._seconds(point)
        return SweepRun(self._seconds(point), 100, 120, 2, 1 << 20)


@given(SIZES, SIZES, st.lists(st.integers(1, 9999), max_size=4))
def test_the_grid_holds_each_size_once_and_none_above_the_pairs(pairs, batches, budgets):
    points = grid(pairs, batches, budgets)
    assert len(points) == len(set(points))
    by_pairs = {(p.pairs, p.batch_size) for p in points if p.batch_size}
    assert by_pairs == {(n, b) for n in pairs for b in batches if b <= n}
    assert {(p.pairs, p.token_budget) for p in points if p.token_budget} == {
        (max(pairs), t) for t in budgets
    }


def test_steady_points_end_after_three_runs():
    machine = Machine()
    results = sweep(grid([10, 50], [1, 8], [512]), machine, clock=machine.clock, limit_s=1e9)
    assert [m.status for m in results] == ["ok"] * 5
    assert all(len(m.seconds) == MIN_RUNS for m in results)
    assert len(machine.runs) == 5 * (MIN_RUNS + 1)  # and the warm-up


def test_points_are_measured_in_turn():
    machine = Machine()
    points = grid([10], [1, 2, 4], [])
    sweep(points, machine, clock=machine.clock, limit_s=1e9)
    counted = machine.runs[6:]  # after the first round, in which each point runs twice
    assert counted == points * 2


def noisy_machine(seed, spread=0.08, slow=3.0):
    """Steps of 1 and 2 pairs take about as long; those of 4 pairs take ``slow`` times as long."""
    noise = random.Random(seed)
    return Machine(lambda p: 0.01 * (slow if p.size == 4 else 1) * noise.uniform(1, 1 + spread))


def test_contenders_get_the_time_and_what_is_surely_slower_rests():
    machine = noisy_machine(7)
    one, two, four = sweep(grid([10], [1, 2, 4], []), machine, clock=machine.clock, limit_s=1e9)
    assert len(four.seconds) < 7
    assert min(len(one.seconds), len(two.seconds)) > len(four.seconds)


TRUTHS = st.lists(st.floats(0.5, 2.0), min_size=2, max_size=5)


@settings(max_examples=15)
@given(TRUTHS, st.integers(0, 2**32), st.floats(0.005, 0.3))
def test_racing_keeps_the_true_best_while_intervals_hold(truths, seed, spread):
    noise = random.Random(seed)
    machine = Machine(lambda p: truths[p.size - 1] * noise.lognormvariate(0, spread))
    points = [SweepPoint(9, batch_size=size + 1) for size in range(len(truths))]
    best = min(range(len(truths)), key=truths.__getitem__)
    held = True

    def check(results):
        nonlocal held
        known = [m for m in results if m.measured]
        held = held and all(m.summary.low <= truths[m.point.size - 1] for m in known)
        held = held and all(m.summary.high >= truths[m.point.size - 1] for m in known)
        if held and results[best].measured:
            others = [m.summary for m in known if m is not results[best]]
            assert not surely_slower(results[best].summary, others)

    sweep(points, machine, clock=machine.clock, limit_s=30.0, save=check)


def test_no_run_starts_that_would_end_after_the_limit():
    machine = Machine(lambda point: float(point.size))
    results = sweep(
        grid([10], [1, 2, 4], []),
        machine,
        clock=machine.clock,
        limit_s=12.0,
        expected_s=lambda point: float(point.size),
    )
    assert machine.now <= 12.0
    assert [len(m.seconds) for m in results] == [3, 3, 0]  # the quick ones well, not all once
    assert results[-1].status == "not_reached"
    assert "--time-limit" in results[-1].reason


@given(st.floats(0.1, 30), st.lists(st.floats(0.01, 5), min_size=1, max_size=5))
def test_the_limit_holds_where_times_are_as_expected(limit, times):
    machine = Machine(lambda point: times[point.size - 1])
    points = [SweepPoint(9, batch_size=size + 1) for size in range(len(times))]
    sweep(points, machine, clock=machine.clock, limit_s=limit, expected_s=machine._seconds)
    assert machine.now <= limit * (1 + 1e-9)


def test_a_stall_in_the_first_run_does_not_make_a_point_too_long():
    times = iter([30.0])
    machine = Machine(lambda point: next(times, 1.0) if point.size == 2 else 1.0)
    points = [SweepPoint(10, 1), SweepPoint(10, 2)]
    results = sweep(points, machine, clock=machine.clock, limit_s=40.0, expected_s=lambda _: 1.0)
    assert all(m.measured for m in results)
    assert results[1].summary.median == 1.0


class Stalls:
    """A machine of one speed on which some runs, by number, take far longer; and its watch."""

    def __init__(self, stalled, kind=None):
        self.machine, self.stalled, self.kind = Machine(), set(stalled), kind
        self.hit = False

    def __call__(self, point):
        seen = self.machine(point)
        self.hit = len(self.machine.runs) in self.stalled
        return replace(seen, seconds=seen.seconds * (30 if self.hit else 1))

    def watch(self, seconds):
        return Disturbance(others=1.0, cpus=2) if self.hit and self.kind else None

    def sweep(self):
        points = grid([10], [1, 2, 4], [])
        clock = self.machine.clock
        return sweep(points, self, clock=clock, limit_s=1e9, watch=self.watch)


@pytest.mark.parametrize("kind", [None, "others"])
def test_a_stalled_run_is_marked_repeated_and_left_out(kind):
    results = Stalls([8], kind).sweep()
    hit = results[1]
    assert max(hit.seconds) > 0.2
    assert len(hit.seconds) == MIN_RUNS + 1
    assert bool(hit.outliers) or bool(hit.disturbed)
    assert (set(hit.disturbed) == {1}) == (kind is not None)
    for measured in results:
        assert measured.summary.median == 0.01
        assert measured.summary.high < 0.02
        assert MeasuredPoint.from_dict(measured.as_dict()) == measured


def test_a_slow_run_counts_where_the_load_that_explains_it_is_always_there():
    load = Disturbance(others=1.0, cpus=2)
    point = MeasuredPoint(SweepPoint(10, 1), "ok", "", [1.0, 1.1, 3.0, 1.2])
    point.disturbed, point.outliers = dict.fromkeys(range(4), load), {2}
    assert point.used == [0, 1, 2, 3]
    point.disturbed = {}
    assert point.used == [0, 1, 3]
    assert point.summary.p99 == pytest.approx(3.0, rel=0.05)


def test_what_always_disturbs_is_the_machine_as_it_is():
    results = Stalls(range(99), "others").sweep()
    for measured in results:
        assert len(measured.seconds) == MAX_REPEATS
        assert measured.measured
        assert measured.summary.median == pytest.approx(0.3)


def test_slow_first_runs_count_and_fast_ones_are_warm_up():
    slow = Machine(lambda point: SLOW_S)
    sweep([SweepPoint(10, 1)], slow, clock=slow.clock, limit_s=SLOW_S)
    assert len(slow.runs) == 1
    fast = Machine()
    (measured,) = sweep([SweepPoint(10, 1)], fast, clock=fast.clock, limit_s=0.001)
    assert len(fast.runs) == 2
    assert len(measured.seconds) == 1


@given(st.integers(0, 40), SIZES)
def test_memory_ends_a_row_and_larger_sizes_are_never_tried(memory, sizes):
    machine = Machine(memory=memory)
    points = [SweepPoint(64, batch_size=b) for b in sorted(set(sizes))]
    results = sweep(points, machine, clock=machine.clock, limit_s=1e9)
    too_large = [m for m in results if m.point.size > memory]
    assert all(m.status == "ok" for m in results if m.point.size <= memory)
    assert [m.status for m in too_large] == (["out_of_memory"] + ["skipped"] * 99)[: len(too_large)]
    assert sum(point.size > memory for point in machine.runs) == bool(too_large)
    assert all(not m.seconds for m in too_large)


def test_out_of_memory_in_one_row_does_not_change_other_rows():
    def run(point):
        if point.pairs == 50 and point.batch_size:
            raise DeviceOutOfMemory("full")
        return machine(point)

    machine = Machine()
    results = sweep(grid([10, 50], [1, 2], [512]), run, clock=machine.clock, limit_s=1e9)
    found = {(m.point.pairs, m.point.size): m.status for m in results}
    assert found == {
        (10, 1): "ok",
        (10, 2): "ok",
        (50, 1): "out_of_memory",
        (50, 2): "skipped",
        (50, 512): "ok",
    }


def test_an_interrupted_sweep_is_resumed():
    class Stopped(Exception):
        pass

    points = grid([10], [1, 2, 4], [])
    machine = Machine()
    kept: list[dict] = []

    def keep(results):
        kept[:] = [m.as_dict() for m in results]
        if len(machine.runs) == 9:
            raise Stopped

    with pytest.raises(Stopped):
        sweep(points, machine, clock=machine.clock, limit_s=1e9, save=keep)
    known = [MeasuredPoint.from_dict(entry) for entry in kept]
    sweep(points, machine, clock=machine.clock, limit_s=1e9, known=known)
    assert len(machine.runs) == 3 * (MIN_RUNS + 1)


def test_entries_survive_the_round_trip():
    machine = Machine()
    for measured in sweep(grid([10], [1, 2], [64]), machine, clock=machine.clock, limit_s=1.0):
        assert MeasuredPoint.from_dict(measured.as_dict()) == measured
    predicted = MeasuredPoint(SweepPoint(10, 1), "predicted", seconds=[1.0], step_s=[0.9])
    predicted.predicted_s = (1.0, 0.9, 1.1)
    assert MeasuredPoint.from_dict(predicted.as_dict()) == predicted
    assert "latency_s" not in predicted.as_dict()


def test_rates_padding_and_memory_come_from_the_runs():
    machine = Machine(lambda point: 0.5)
    (measured,) = sweep([SweepPoint(10, 2)], machine, clock=machine.clock, limit_s=1e9)
    entry = measured.as_dict()
    assert entry["pairs_per_s"] == 20.0
    assert entry["tokens_per_s"] == 200.0
    assert entry["padding_share"] == pytest.approx(1 / 6)
    assert entry["peak_bytes"] == 1 << 20
    assert entry["latency_s"]["median"] == 0.5


@given(st.lists(st.sampled_from([0.01, 0.02, 0.5, 3.0]), min_size=1, max_size=6), st.floats(0, 30))
def test_the_same_times_give_the_same_runs(speeds, limit):
    def once():
        machine = Machine(lambda point: speeds[point.size % len(speeds)])
        sweep(grid([10, 20], [1, 2, 4], [64]), machine, clock=machine.clock, limit_s=limit)
        return machine.runs

    assert once() == once()
