"""Refitting the cost model while steps run: it follows changes, not outliers."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from random import Random

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from scipy.optimize import nnls

from echelon.scheduling.cost_model import (
    DEFAULT_COEFFICIENTS,
    MAX_COLUMNS,
    REMEMBERED_STEPS,
    WINDOW,
    Coefficients,
    CostModel,
    solve,
    work_of,
)

TRUE = DEFAULT_COEFFICIENTS["cpu"]
WITHIN = 50
"""Steps after which predictions must be right again."""

MINORITY = 0.4
"""Share of the newest steps' time that outliers may hold; a median breaks down at half of it."""

CHANGES = {
    "half the speed": Coefficients(2 * TRUE.base_s, 2 * TRUE.token_s, 2 * TRUE.square_s),
    "a tenth of the speed": Coefficients(10 * TRUE.base_s, 10 * TRUE.token_s, 10 * TRUE.square_s),
    "attention three times as slow": replace(TRUE, square_s=3 * TRUE.square_s),
    "attention for nothing": replace(TRUE, square_s=0.0),
    "attention for the first time": replace(TRUE, square_s=TRUE.square_s),
    "products twice as slow": replace(TRUE, token_s=2 * TRUE.token_s),
    "overhead four times as long": replace(TRUE, base_s=4 * TRUE.base_s),
}


def steps(random, count):
    """Steps as a service forms them: short and long texts, full and half empty."""
    for _ in range(count):
        length, budget = random.choice([20, 60, 120, 250, 480]), random.choice([200, 1000, 2048])
        pairs = max(1, budget // length)
        yield [max(5, int(length * random.uniform(0.7, 1.3))) for _ in range(pairs)]


class Machine:
    """Takes the time of its coefficients, with noise; one step in twenty takes ten times that."""

    def __init__(self, random, noise, outliers=0.05):
        self.random, self.noise, self.outliers = random, noise, outliers
        self.coefficients = TRUE
        self.newest = deque(maxlen=REMEMBERED_STEPS)

    def run(self, model, count):
        """Let a model observe steps; returns its errors before each.

        By chance outliers can hold most of the time of the newest steps; to the model's weighted
        median they are then the normal speed. The error of the next step is left out.
        """
        errors = []
        for lengths in steps(self.random, count):
            true = self.coefficients.seconds(work_of(lengths, "none"))
            outliers_s = sum(seconds for seconds, outlier in self.newest if outlier)
            if outliers_s <= MINORITY * sum(seconds for seconds, _ in self.newest):
                errors.append(abs(model.predict(lengths) / true - 1))
            outlier = self.random.random() < self.outliers
            self.newest.append((true, outlier))
            factor = 10 if outlier else 1
            model.observe(lengths, true * factor * self.random.lognormvariate(0, self.noise))
        return errors


@pytest.mark.parametrize("change", CHANGES)
@settings(max_examples=6)
@given(st.integers(0, 2**32).map(Random), st.sampled_from([0.0, 0.05]))
def test_a_change_is_followed_within_fifty_steps_and_back(change, random, noise):
    prior = replace(TRUE, square_s=0.0) if "first time" in change else TRUE
    machine, model = Machine(random, noise), CostModel(prior)
    for coefficients in (prior, CHANGES[change], prior):
        machine.coefficients = coefficients
        machine.run(model, WITHIN)
        errors = machine.run(model, 20)
        assume(errors)
        assert max(errors) <= 0.15
        assert np.median(errors) <= 0.07
        assert min(model.coefficients.values) >= 0


@settings(max_examples=15)
@given(st.integers(0, 2**32).map(Random), st.floats(0.25, 4))
def test_what_is_not_seen_follows_the_level_and_does_not_drift(random, factor):
    model = CostModel(TRUE)
    for _ in range(3 * WINDOW):
        lengths = [random.randint(10, 40) for _ in range(random.randint(1, 60))]
        took = factor * TRUE.seconds(work_of(lengths, "none"))
        model.observe(lengths, took * random.lognormvariate(0, 0.05))
    long = [512] * 4
    assert model.predict(long) == pytest.approx(factor * CostModel(TRUE).predict(long), rel=0.2)


def test_one_shape_alone_moves_every_coefficient_alike():
    model = CostModel(TRUE)
    for _ in range(2 * WINDOW):
        model.observe([100] * 20, 3 * CostModel(TRUE).predict([100] * 20))
    assert model.coefficients.values == pytest.approx([3 * value for value in TRUE.values])


@given(
    st.lists(
        st.tuples(st.lists(st.integers(1, 500), min_size=1, max_size=9), st.floats(1e-6, 1e3)),
        min_size=1,
        max_size=60,
    )
)
@example([([1, 1, 1, 1, 4, 188], 16.0), ([109], 0.5), ([1], 55.0)])
def test_coefficients_are_finite_and_not_negative_after_any_steps(seen):
    model = CostModel(Coefficients(1e-3, 1e-5, 0.0, knee_tokens=100, beyond_s=1e-5))
    for lengths, seconds in seen:
        model.observe(lengths, seconds)
        values = np.array(model.coefficients.values)
        assert np.isfinite(values).all()
        assert (values >= 0).all()
        assert model.predict(lengths) > 0


@given(st.data())
def test_the_least_squares_are_those_of_scipy(data):
    columns, rows = data.draw(st.integers(1, MAX_COLUMNS)), data.draw(st.integers(1, 12))
    numbers = st.floats(-100, 100).map(lambda value: round(value, 3))
    sizes = st.lists(numbers, min_size=rows * columns, max_size=rows * columns)
    matrix = np.array(data.draw(sizes)).reshape(rows, columns)
    target = np.array(data.draw(st.lists(numbers, min_size=rows, max_size=rows)))
    check_solution(matrix, target)


def test_nearly_dependent_columns_are_solved_as_exactly():
    rows = [[1.0, -49.5, 0.0, -10.0], [1.0, -50.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.016]]
    check_solution(np.array(rows), np.array([0.0, 0.0, 1.0]))


def check_solution(matrix, target):
    found = solve(matrix, target)
    assert (found >= 0).all()
    best = nnls(matrix, target)[1]
    assert np.linalg.norm(matrix @ found - target) <= best + 1e-6 * (1 + np.linalg.norm(target))


def test_too_many_columns_are_a_bug():
    with pytest.raises(ValueError, match="bug"):
        solve(np.ones((3, MAX_COLUMNS + 1)), np.ones(3))
