"""Cost and memory models: planted coefficients are found, noise is refused, checks are honest."""

from __future__ import annotations

import json
from dataclasses import replace
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from echelon.errors import ProfileError, TooNoisy
from echelon.models.base import DeviceOutOfMemory
from echelon.scheduling.cost_model import (
    DEFAULT_COEFFICIENTS,
    Coefficients,
    MemoryModel,
    Work,
    work_of,
)
from echelon.scheduling.fit import (
    MIN_SHAPES,
    CallTimes,
    CostFit,
    MemoryFit,
    Probe,
    fit_cost,
    fit_memory,
)
from echelon.scheduling.packing import NO_BUDGET, step_cost
from echelon.tuning.calibration import MIN_ROUNDS, ROUNDS, ProbeResult, fitted, measure
from echelon.tuning.probe_shapes import CHECKS, PROBES, LengthRange, choose, most_informative

CPU = DEFAULT_COEFFICIENTS["cpu"]
LIMITS = LengthRange(512, 8192, "none")
MEMORY = MemoryModel(1e9, 1e4, 1)
KNEE = Coefficients(3e-3, 1e-7, 1e-9, knee_tokens=1000, beyond_s=6e-6)
"""A card that a thousand tokens fill."""

planted = st.builds(Coefficients, st.floats(1e-4, 1e-2), st.floats(1e-6, 1e-4), st.floats(0, 1e-7))
paddings = st.sampled_from(["none", "rectangular"])


def probed(shapes, coefficients, kind, random=None, noise=0.0, memory=None):
    """What a machine of these coefficients would show, each shape five times."""

    def probe(shape):
        work = work_of(shape, kind)
        times = [
            coefficients.seconds(work) * np.exp(random.gauss(0, noise) if noise else 0)
            for _ in "12345"
        ]
        return Probe(shape, tuple(times), memory and round(memory.peak_bytes(work)))

    return [probe(shape) for shape in shapes]


def fit(coefficients, kind="none", seed=0, noise=0.0, limits=LIMITS):
    limits = replace(limits, padding=kind)
    shapes, random = choose(limits, CPU, 100), Random(seed)
    made = [
        probed(some, coefficients, kind, random, noise) for some in (shapes.probes, shapes.checks)
    ]
    return fit_cost(*made, kind)


@settings(max_examples=20)
@given(planted, paddings)
def test_planted_coefficients_are_found(coefficients, kind):
    found = fit(coefficients, kind)
    assert found.coefficients.values == pytest.approx(coefficients.values, rel=1e-5, abs=1e-13)
    assert found.error.p90 < 1e-5
    assert found.spread == 0
    assert found.padding == kind


@settings(max_examples=20)
@given(planted, paddings, st.integers(0, 2**32), st.floats(0.005, 0.05))
def test_noise_moves_predictions_by_less_than_itself(coefficients, kind, seed, noise):
    found = fit(coefficients, kind, seed, noise)
    assert min(found.coefficients.values) >= 0
    unseen = LengthRange(512, 8192, kind).mixed(30, seed=99)
    works = [work_of(shape, kind) for shape in unseen]
    errors = [abs(found.coefficients.seconds(w) / coefficients.seconds(w) - 1) for w in works]
    assert np.median(errors) <= noise
    assert max(errors) <= 3 * noise


@pytest.mark.parametrize("noise", [0.0, 0.03])
def test_a_knee_is_found_and_none_is_invented(noise):
    found = fit(KNEE, noise=noise).coefficients
    assert found.knee_tokens == pytest.approx(1000, rel=0.35)
    for shape in LengthRange(512, 8192, "none").mixed(30, seed=5):
        work = work_of(shape, "none")
        assert found.seconds(work) == pytest.approx(KNEE.seconds(work), rel=0.12)
    assert [fit(CPU, seed=seed, noise=0.03).coefficients.beyond_s for seed in range(10)].count(
        0
    ) >= 9


@settings(max_examples=10)
@given(st.integers(0, 2**32), st.floats(0.4, 1.0))
def test_noise_widens_the_error_and_never_refuses(seed, noise):
    found = fit(CPU, seed=seed, noise=noise)
    assert found.spread > 0.1
    assert CostFit.from_dict(json.loads(json.dumps(found.as_dict()))) == found
    quiet = fit(CPU, seed=seed, noise=0.02)
    assert quiet.note is None
    assert found.error.spread > quiet.error.spread


@settings(max_examples=20)
@given(planted, st.integers(0, 2**32), st.floats(2, 30))
def test_outliers_do_not_move_the_coefficients(coefficients, seed, factor):
    shapes, random = choose(LIMITS, CPU, 100), Random(seed)
    probes, checks = (probed(some, coefficients, "none") for some in shapes)
    # Two of the few largest steps would be most of what is known of their size.
    by_size = sorted(range(len(probes)), key=lambda index: sum(probes[index].lengths))
    for index in [*random.sample(by_size[:-6], 2), random.choice(by_size[-6:])]:
        probes[index] = replace(probes[index], seconds=(probes[index].median_s * factor,))
    found = fit_cost(probes, checks, "none")
    assert found.error.median < 0.05
    assert found.error.p90 < 0.20


def test_times_that_no_formula_explains_are_kept_with_a_note():
    shapes = choose(LIMITS, CPU, 100)
    probes = probed(shapes.probes, CPU, "none")
    odd = [
        replace(probe, seconds=tuple(s * (3 if index % 2 else 1) for s in probe.seconds))
        for index, probe in enumerate(probed(shapes.checks, CPU, "none"))
    ]
    found = fit_cost(probes, odd, "none")
    assert "good to ±67 %" in found.note
    one_in_five = [replace(p, seconds=(p.median_s * 10,)) for p in odd[:2]]
    sound = probed(shapes.checks[2:], CPU, "none")
    found = fit_cost(probes, one_in_five + sound, "none")
    assert found.error.median < 0.01
    assert found.note is not None  # the median is right, but the P90 is not


def test_calls_of_a_sweep_alone_give_a_model():
    """Whole calls of 10 pairs in steps of several sizes: no probe was affordable."""
    works = [Work(10, 1200, 160_000), Work(5, 1200, 160_000), Work(1, 1200, 160_000)]
    works += [Work(5, 400, 40_000), Work(1, 400, 40_000)]
    calls = [CallTimes(work, (CPU.seconds(work),) * 3) for work in works]
    found = fit_cost([], [], "none", calls)
    for work in works:
        assert found.coefficients.seconds(work) == pytest.approx(CPU.seconds(work), rel=0.01)
    assert found.error.shapes == len(works)


def test_too_few_shapes_are_refused():
    probes = probed([(n,) for n in range(20, 20 + MIN_SHAPES)], CPU, "none", memory=MEMORY)
    assert fit_cost(probes, [], "none").error.shapes == MIN_SHAPES
    for refused in (fit_cost, fit_memory):
        refused(probes, [], "none")
        with pytest.raises(TooNoisy, match="Only 2 different shapes"):
            refused([*probes[1:], probes[1]], probes, "none")


@settings(max_examples=30)
@given(st.floats(1e7, 1e10), st.floats(0, 1e5), st.floats(0, 100), paddings)
def test_planted_memory_is_found(fixed, token, square, kind):
    model = MemoryModel(fixed, token, square)
    shapes = choose(replace(LIMITS, padding=kind), CPU, 100)
    probes, checks = (
        probed(some, CPU, kind, memory=model) for some in (shapes.probes, shapes.checks)
    )
    found = fit_memory(probes, checks, kind)
    assert found.error.p90 < 1e-6
    assert found.model.fixed_bytes == pytest.approx(fixed, rel=1e-3)
    assert MemoryFit.from_dict(json.loads(json.dumps(found.as_dict()))) == found


@given(
    st.floats(0, 1e6), st.floats(0, 1e3), st.floats(0, 10), st.floats(0, 1e7), st.integers(1, 99)
)
def test_a_step_within_the_limit_fits_and_a_larger_one_does_not(
    fixed, token, square, limit, length
):
    model = MemoryModel(fixed, token, square)
    most = model.tokens_within(limit, length)

    def needs(tokens):
        return model.peak_bytes(Work(1, tokens, tokens * length))

    of_length = model.of_length(length)
    assert of_length.tokens_within(limit) == pytest.approx(most, rel=1e-9)
    assert of_length.bytes_of(1000) == pytest.approx(needs(1000))
    if most == NO_BUDGET:
        assert needs(10**9) <= limit
    elif most == 0:
        assert needs(1) > limit * (1 - 1e-9)
    else:
        assert needs(most) <= limit * (1 + 1e-9)
        assert needs(most + 1) > limit * (1 - 1e-9)


def result(shapes, *noise, memory=None):
    made = (probed(some, CPU, "none", *noise, memory=memory) for some in shapes)
    return ProbeResult(*made, LIMITS, None, None)


def test_an_imprecise_model_leaves_a_warning_and_the_other_model():
    shapes = choose(LIMITS, CPU, 100)
    made = fitted(result(shapes, Random(0), 1.5, memory=MEMORY))
    assert CostFit.from_dict(made.cost).error.large
    assert MemoryFit.from_dict(made.memory).model.fixed_bytes == pytest.approx(1e9, rel=1e-3)
    (warning,) = made.warnings
    assert "step times are good to ±" in warning
    made = fitted(result(shapes))
    assert CostFit.from_dict(made.cost).measured.startswith("20")
    assert made.memory is None
    assert len(made.warnings) == 1


def test_a_fit_survives_the_round_trip_and_damage_is_reported():
    found = fit(KNEE)
    known = json.loads(json.dumps(found.as_dict()))
    assert CostFit.from_dict(known) == found
    assert sum(shape["unseen"] for shape in found.shapes) == CHECKS
    for damage in ({"paid": "in kind"}, {"coefficients": {}}, {"error": 3}, {"more": 1}):
        with pytest.raises(ProfileError, match="damaged cost model"):
            CostFit.from_dict(known | damage)
    known["coefficients"]["token_s"] = -1.0
    with pytest.raises(ProfileError, match="damaged"):
        CostFit.from_dict(known)
    with pytest.raises(ProfileError, match="damaged memory model"):
        MemoryFit.from_dict({"model": {}})


@settings(max_examples=15)
@given(st.integers(1, 600), st.integers(16, 9000), paddings, st.floats(1e-3, 50))
def test_shapes_keep_the_limits(longest, budget, kind, most_s):
    limits = LengthRange(longest, budget, kind)
    shapes = choose(limits, CPU, most_s)
    every = shapes.probes + shapes.checks
    assert len(set(every)) == len(every)
    assert len(shapes.probes) <= PROBES
    assert len(shapes.checks) <= CHECKS
    assert all(1 <= length <= longest for shape in every for length in shape)
    assert all(len(shape) == 1 or step_cost(shape, kind) <= budget for shape in every)
    least_s = sum(CPU.seconds(work_of(shape, kind)) for shape in limits.least())
    assert sum(CPU.seconds(work_of(shape, kind)) for shape in every) <= max(most_s, 2 * least_s)


def test_with_enough_time_probes_reach_from_the_smallest_to_the_largest_step():
    shapes = choose(LIMITS, CPU, 100)
    sizes = [sum(shape) for shape in shapes.probes]
    assert len(shapes.probes) == PROBES
    assert len(shapes.checks) == CHECKS
    assert min(sizes) == 16
    assert max(sizes) == 8192
    assert {1, 2, 4, 8, 16} <= {sum(shape) // 512 for shape in shapes.probes if sum(shape) >= 512}


def test_chosen_shapes_tell_more_than_others():
    def information(shapes):
        works = [work_of(shape, "none") for shape in shapes]
        rows = np.array([CPU.amounts(work)[:3] / np.array(CPU.seconds(work)) for work in works])
        return np.linalg.slogdet(rows.T @ rows)[1]

    uniform = LIMITS.uniform()
    chosen = most_informative(uniform, CPU, "none", 100, 12)
    random = Random(0)
    others = [information(random.sample(uniform, len(chosen))) for _ in range(200)]
    assert information(chosen) > np.percentile(others, 90)


class Bench:
    """A machine with a clock, a meter and memory for so many tokens."""

    def __init__(self, memory=10**9, jitter=0.0):
        self.now, self.ran, self.memory, self.jitter = 0.0, [], memory, jitter

    def run(self, shape):
        if sum(shape) > self.memory:
            raise DeviceOutOfMemory
        self.ran.append(shape)
        self.now += sum(shape) * (1 + self.jitter * (len(self.ran) % 3))

    def clock(self):
        return self.now

    def reset(self):
        self.peak = None

    def peak_bytes(self):
        return 1000 + sum(self.ran[-1])

    def measure(self, shapes, limit_s):
        return measure(shapes, self.run, self, self.clock, limit_s)


def test_probes_take_turns_and_the_first_round_is_for_memory():
    bench = Bench()
    shapes = [(30,), (10,), (10, 10)]
    found = bench.measure(shapes, 10**9)
    assert bench.ran[:3] == [(10,), (10, 10), (30,)]
    assert bench.ran[3:6] == bench.ran[6:9] == bench.ran[:3]
    assert [probe.lengths for probe in found] == bench.ran[:3]
    assert [probe.peak_bytes for probe in found] == [1010, 1020, 1030]
    assert [len(probe.seconds) for probe in found] == [MIN_ROUNDS] * 3  # all repeats agree
    assert [probe.median_s for probe in found] == [10, 20, 30]


def test_repeats_go_on_while_they_differ_until_the_time_or_the_rounds_are_over():
    assert [len(p.seconds) for p in Bench(jitter=0.2).measure([(30,), (10,)], 10**9)] == [
        ROUNDS
    ] * 2
    assert [len(p.seconds) for p in Bench(jitter=0.2).measure([(30,), (10,)], 150)] == [2] * 2
    assert [p.seconds for p in Bench().measure([(30,), (10,)], 1)] == [(10,), (30,)]


def test_what_does_not_fit_is_left_out_with_all_that_is_larger():
    bench = Bench(memory=25)
    assert [probe.lengths for probe in bench.measure([(30,), (10,), (50,), (10, 10)], 500)] == [
        (10,),
        (10, 10),
    ]
    assert (50,) not in bench.ran
    assert Bench(memory=5).measure([(30,), (10,)], 500) == []


@given(st.sampled_from([24, 100, 512, 8192]), st.floats(-1.0, 1e-4), paddings)
def test_however_short_the_time_is_a_model_can_be_fitted(longest, max_s, padding):
    shapes, _ = choose(LengthRange(longest, 8192, padding), CPU, max_s)
    assert len({work_of(shape, padding) for shape in shapes}) >= MIN_SHAPES
    assert sum(map(sum, shapes)) <= 144
    fit_cost(probed(shapes, CPU, padding), [], padding)
