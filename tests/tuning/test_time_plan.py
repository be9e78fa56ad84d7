"""What fits in the time limit, by the price of a step; and what else used the processors."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from echelon.scheduling.cost_model import Work
from echelon.tuning.load import Disturbance, MachineLoad, quota_notes
from echelon.tuning.sweep import SweepPoint
from echelon.tuning.time_plan import FIRST_PAIRS, RUNS, Price, TimeBudget, affordable, price

SIZES = st.lists(st.integers(1, 64), min_size=1, max_size=6)


class Clock:
    """A machine of a price, and its clock."""

    def __init__(self, step_s=0.0, token_s=0.0):
        self.now, self.step_s, self.token_s = 0.0, step_s, token_s

    def __call__(self):
        return self.now

    def run(self, shape):
        self.now += self.step_s + self.token_s * sum(shape)


@given(st.floats(0, 0.05), st.floats(1e-7, 1e-3))
def test_a_step_is_priced_from_a_few_steps(step_s, token_s):
    machine = Clock(step_s, token_s)
    found = price(machine.run, 100, machine, 1e6)
    for work in (Work(1, 100, 0), Work(4, 5000, 0)):
        assert found.seconds(work) == pytest.approx(
            step_s * work.steps + token_s * work.tokens, rel=1e-6
        )
    assert found.pair_s == pytest.approx(step_s / FIRST_PAIRS + 100 * token_s)


def test_on_a_slow_machine_one_pair_is_enough_for_the_price():
    machine = Clock(0.0, 0.05)
    found = price(machine.run, 100, machine, 75.0)
    assert machine.now == pytest.approx(15.0)
    assert found.pair_s == pytest.approx(5.0)


@given(SIZES, SIZES, SIZES, st.floats(0, 0.1), st.floats(0, 0.1), st.floats(0.001, 100))
def test_the_planned_points_never_exceed_the_limit(pairs, batches, budgets, step_s, pair_s, limit):
    def seconds(point):
        return step_s * -(-point.pairs // point.size) + pair_s * point.pairs

    points = affordable(pairs, batches, budgets, seconds, limit)
    assert RUNS * sum(map(seconds, points)) <= limit
    assert len(set(points)) == len(points)
    least = SweepPoint(min(pairs), batch_size=min(batches))
    assert points or RUNS * seconds(least) > limit or min(batches) > min(pairs)


def test_a_slower_machine_measures_smaller_calls_and_fewer_sizes():
    def planned(pair_s):
        given_ = ((5, 10, 50, 100), (1, 2, 4, 8, 16, 32), (256, 1024, 4096))
        return affordable(*given_, lambda point: pair_s * point.pairs, 40.0)

    assert max(p.pairs for p in planned(0.005)) == 100
    assert {p.pairs for p in planned(0.06)} == {5, 10}
    assert len(planned(0.2)) < len(planned(0.06))
    assert planned(100.0) == []


def test_stages_get_their_shares_and_the_worker_only_where_it_fits():
    clock = Clock()
    time = TimeBudget(75.0, 1.0, clock)
    assert time.affords(26.0, 0.35)
    assert not time.affords(27.0, 0.35)
    assert time.memory_s(in_worker=False) == 0.0
    assert time.memory_s(in_worker=True) == pytest.approx(11.25)
    assert time.sweep_s(11.25) == pytest.approx(75.0 - 11.25 - 15.0)
    assert TimeBudget(75.0, 30.0, clock).memory_s(in_worker=True) == 0.0
    clock.now = 74.0
    assert time.memory_s(in_worker=True) == time.sweep_s(0.0) == 0.0
    assert Price(1.0, 0.0, 9).seconds(Work(3, 1, 1)) == 3.0


# Load.


class Machine:
    """Files as Linux shows them, of two CPUs, and a clock."""

    def __init__(self, root, quota=None, version=2):
        self.root, self.now, self.own, self.version = root, 0.0, 0.0, version
        (root / "proc/self").mkdir(parents=True)
        group = "0::/job" if version == 2 else "3:cpu,cpuacct:/job"
        (root / "proc/self/cgroup").write_text(f"7:pids:/other\n{group}\n")
        self.folder = root / ("sys/fs/cgroup/job" if version == 2 else "sys/fs/cgroup/cpu/job")
        self.folder.mkdir(parents=True)
        if version == 2:
            (self.folder / "cpu.max").write_text(f"{quota or 'max'} 100000\n")
        else:
            (self.folder / "cpu.cfs_quota_us").write_text(f"{quota or -1}\n")
            (self.folder / "cpu.cfs_period_us").write_text("100000\n")
        self.pass_(0.0)

    def pass_(self, seconds, own=0.0, others=0.0, stolen=0.0, throttled=0.0):
        """Let time pass; amounts are CPUs, throttled is a share."""
        self.now += seconds
        self.own += own * seconds
        for name, amount in (("busy", own + others), ("stolen", stolen), ("stop", throttled)):
            setattr(self, name, getattr(self, name, 0.0) + amount * seconds)
        half, stolen = round(100 * self.busy / 2), round(100 * self.stolen / 2)
        rows = [f"cpu{n} {half} 0 0 9 0 0 0 {stolen} 0 0" for n in range(2)]
        rows += ["cpu7 9999 0 0 9 0 0 0 0 0 0", "intr 5"]
        (self.root / "proc/stat").write_text("\n".join(["cpu 1 2 3 4", *rows]))
        name, unit = ("throttled_usec", 1e6) if self.version == 2 else ("throttled_time", 1e9)
        (self.folder / "cpu.stat").write_text(f"nr_periods 3\n{name} {round(unit * self.stop)}\n")

    def load(self):
        return MachineLoad(self.root, lambda: self.own, lambda: self.now, {0, 1})


@pytest.mark.parametrize(
    ("passed", "kinds"),
    [
        ({"own": 2.0}, None),
        ({"own": 1.2, "others": 0.1}, None),
        ({"own": 1.2, "others": 0.8}, ("others",)),
        ({"own": 1.2, "stolen": 0.2}, ("stolen",)),
        ({"own": 0.3, "throttled": 0.5}, ("throttled",)),
    ],
)
@pytest.mark.parametrize("version", [1, 2])
def test_what_else_used_the_processors_is_recognised(tmp_path, passed, kinds, version):
    machine = Machine(tmp_path, 200_000, version)
    load = machine.load()
    machine.pass_(1.0, own=2.0)
    assert load(1.0) is None
    machine.pass_(1.0, **passed)
    found = load(1.0)
    assert (found and found.kinds) == kinds
    if kinds == ("others",):
        assert found.others == pytest.approx(0.8, abs=0.03)
        assert found.cpus == 2
    machine.pass_(1.0, own=2.0)
    assert load(1.0) is None


def test_a_run_of_milliseconds_is_judged_with_what_came_before(tmp_path):
    machine = Machine(tmp_path)
    load = machine.load()
    for _ in range(60):  # a tick of another process in every tenth run of 10 ms is 0.1 CPUs
        machine.pass_(0.01, own=2.0)
        assert load(0.01) is None
    found = []
    for _ in range(30):
        machine.pass_(0.01, own=1.0, others=1.0)
        found.append(load(0.01) is not None)
    assert not found[0]
    assert all(found[15:])


def test_a_quota_that_the_process_uses_up_is_the_machine_as_it_is(tmp_path):
    machine = Machine(tmp_path, 50_000)
    load = machine.load()
    machine.pass_(2.0, own=0.5, throttled=0.7)
    assert load(2.0) is None
    (note,) = quota_notes(load)
    assert "A quota of 0.5 CPUs" in note


def test_where_nothing_can_be_read_nothing_is_said(tmp_path):
    load = MachineLoad(tmp_path, lambda: 0.0, lambda: 0.0, {0})
    assert load(1.0) is None
    assert quota_notes(load) == quota_notes(lambda _: None) == []
    assert Disturbance().kinds == ()


def test_this_machine_can_be_read():
    """Whatever it is: the real files, if there are any, are understood."""
    load = MachineLoad()
    assert load(0.01) is None or load(0.01).kinds
