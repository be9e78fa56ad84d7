"""The memory model is that of a worker, whatever the tuning process holds."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from scorers import HANG, MEBIBYTE, REFUSE, Weighty, batch_of, missing

from echelon.models.base import FakeScorer
from echelon.scheduling.cost_model import Coefficients, work_of
from echelon.scheduling.fit import MemoryFit, Probe
from echelon.tuning import calibration
from echelon.tuning.calibration import ProbeResult, models_of, worker_peaks
from echelon.tuning.machine import MemoryMeter
from echelon.tuning.probe_shapes import LengthRange, choose

COEFFICIENTS = Coefficients(2e-3, 5e-5, 4e-8)
LIMITS = LengthRange(512, 2048, "none")
MAX_TOKENS = 1000
"""Tokens beyond which a step does not fit, in the tests of what does not."""


class OneToken:
    """Steps of any shape, all of one token id."""

    def __init__(self, token: int = 1) -> None:
        self.token = token

    def batch(self, shape):
        return batch_of(*([self.token] * length for length in shape))


@pytest.fixture(scope="module")
def measured() -> ProbeResult:
    def probe(shape):
        return Probe(shape, (COEFFICIENTS.seconds(work_of(shape, "none")),) * 3, 123)

    shapes = choose(LIMITS, COEFFICIENTS, 100)
    probes, checks = [*map(probe, shapes.probes)], [*map(probe, shapes.checks)]
    return ProbeResult(probes, checks, LIMITS, OneToken(), FakeScorer().info)


def test_what_this_process_holds_does_not_count(measured):
    ballast = np.ones(512 * MEBIBYTE // 8)
    models = models_of(measured, Weighty)
    assert MemoryMeter().peak_bytes() > ballast.nbytes
    fit = MemoryFit.from_dict(models.memory)
    assert fit.model.fixed_bytes < ballast.nbytes / 2
    # The C library keeps some of what was freed, so a token costs up to half as much again.
    assert 0.8 < fit.model.token_bytes / Weighty.TOKEN_BYTES < 1.5
    assert models.cost is not None
    assert models.warnings == []
    assert all(shape["peak_bytes"] > 1000 for shape in models.cost["shapes"])


@pytest.mark.parametrize(
    "opener",
    [partial(Weighty, MAX_TOKENS), partial(Weighty, memory_tokens=MAX_TOKENS)],
    ids=["dies", "full"],
)
def test_larger_steps_are_not_tried_where_one_did_not_fit(measured, opener):
    shapes = [probe.lengths for probe in (*measured.probes, *measured.checks)]
    peaks = worker_peaks(shapes, measured.steps, opener, "fp32")
    assert set(peaks) == {shape for shape in shapes if sum(shape) <= MAX_TOKENS}
    assert MemoryFit.from_dict(models_of(measured, opener).memory).model.token_bytes > 0


@pytest.mark.parametrize(
    ("opener", "token", "why"),
    [(missing, 1, "no such folder"), (Weighty, REFUSE, "is wrong"), (Weighty, HANG, "no answer")],
)
def test_a_worker_that_cannot_be_measured_costs_the_memory_model_alone(
    measured, opener, token, why, monkeypatch
):
    monkeypatch.setattr(calibration, "STEP_TIMEOUT_S", 1.0)
    models = models_of(replace(measured, steps=OneToken(token)), opener)
    assert models.memory is None
    assert models.cost is not None
    (warning,) = models.warnings
    assert why in warning
    assert "--refresh" in warning


def test_gpu_memory_is_not_measured_again(measured):
    on_card = replace(measured.info, device="cuda:0")
    models = models_of(replace(measured, info=on_card), missing)
    assert models.warnings == []
    assert {shape["peak_bytes"] for shape in models.cost["shapes"]} == {123}


def test_a_short_time_leaves_out_steps_and_then_the_worker(measured):
    took = sum(COEFFICIENTS.seconds(work_of(probe.lengths, "none")) for probe in measured.probes)
    models = models_of(measured, Weighty, took / 2)
    peaks = [shape["peak_bytes"] for shape in models.cost["shapes"]]
    assert None in peaks
    assert MemoryFit.from_dict(models.memory).model.token_bytes > 0
    left_out = models_of(measured, missing, 0.0)
    assert left_out.memory is None
    assert "too short" in left_out.warnings[0]
