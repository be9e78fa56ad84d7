"""The sweep, driven by a pretend machine and a pretend clock."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from echelon.models.base import DeviceOutOfMemory
from echelon.tuning.sweep import (
    FIRST_LOOK,
    SLOW_S,
    MeasuredPoint,
    SweepPoint,
    SweepRun,
    grid,
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


def test_steady_points_end_when_their_interval_is_tight():
    machine = Machine()
    results = sweep(grid([10, 50], [1, 8], [512]), machine, clock=machine.clock, limit_s=1e9)
    assert [m.status for m in results] == ["ok"] * 5
    # Six equal samples are the fewest that bound a median with 95 %, plus the warm-up.
    assert all(len(m.seconds) == 6 for m in results)
    assert len(machine.runs) == 5 * 7


def test_points_are_measured_in_turn():
    machine = Machine()
    points = grid([10], [1, 2, 4], [])
    sweep(points, machine, clock=machine.clock, limit_s=1e9)
    counted = machine.runs[6:]  # after the first round, in which each point runs twice
    assert counted == points * 5


def test_a_noisy_point_is_measured_on_while_tight_ones_rest():
    noise = random.Random(7)
    machine = Machine(lambda p: 0.01 if p.size == 1 else 0.01 * noise.choice([1, 2]))
    tight, noisy = sweep(grid([10], [1, 2], []), machine, clock=machine.clock, limit_s=1e9)
    assert len(noisy.seconds) > len(tight.seconds) == 6


def test_the_time_limit_ends_the_sweep_after_a_run_of_every_point():
    machine = Machine(lambda point: 1.0)
    results = sweep(grid([10], [1, 2, 4], []), machine, clock=machine.clock, limit_s=5.0)
    assert all(m.seconds for m in results)
    assert machine.now <= 5.0 + 2.0


def test_a_very_slow_machine_leaves_points_not_reached():
    machine = Machine(lambda point: SLOW_S * 5)
    results = sweep(grid([10], [1, 2, 4, 8], []), machine, clock=machine.clock, limit_s=5.0)
    assert [m.status for m in results] == ["ok", "ok", "not_reached", "not_reached"]
    assert machine.now <= 5.0 * FIRST_LOOK + SLOW_S * 5
    assert "--time-limit" in results[-1].reason


def test_slow_first_runs_count_and_fast_ones_are_warm_up():
    slow = Machine(lambda point: SLOW_S)
    sweep([SweepPoint(10, 1)], slow, clock=slow.clock, limit_s=0.1)
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
    before = len(machine.runs)
    known = [MeasuredPoint.from_dict(entry) for entry in kept]
    sweep(points, machine, clock=machine.clock, limit_s=1e9, known=known)
    assert len(machine.runs) - before == 3 * 7 - 9


def test_entries_survive_the_round_trip():
    machine = Machine()
    for measured in sweep(grid([10], [1, 2], [64]), machine, clock=machine.clock, limit_s=1.0):
        assert MeasuredPoint.from_dict(measured.as_dict()) == measured


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
