"""fp32 is exact where the caller lets torch round products, and the caller's choice stays."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import shim_card
import torch
from native_models import FAMILIES

from echelon.models.exact import ieee_products
from echelon.models.registry import open_scorer

MATMUL = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)


def settings() -> list[str]:
    return [backend.fp32_precision for backend in MATMUL]


@pytest.fixture(params=["high", "medium"])
def rounding(request):
    """The caller's setting, as its backends show it."""
    torch.set_float32_matmul_precision(request.param)
    yield settings()
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("family", FAMILIES)
def test_fp32_scores_are_exact_on_a_card_that_may_round(native, opened, request, family):
    toy = native(family)
    batch = toy.batch([23, 41, 7, 60], 3)
    expected = toy.reference(batch)
    request.addfinalizer(lambda: torch.set_float32_matmul_precision("highest"))
    torch.set_float32_matmul_precision("high")
    chosen = settings()
    with shim_card.real_or_shim(capability=(8, 0)):
        scorer = opened(toy.folder, "fp32")
        for _ in range(3):  # eager, captured, replayed
            np.testing.assert_allclose(scorer.score(batch), expected, rtol=0, atol=1e-4)
    assert settings() == chosen


def test_products_on_cpu_are_exact_too(native, rounding):
    toy = native("bert")
    batch = toy.batch([23, 41, 7, 60], 3)
    scorer = open_scorer(toy.folder, device="cpu", precision="fp32", threads=1)
    found = scorer.score(batch)
    assert settings() == rounding
    torch.set_float32_matmul_precision("highest")
    np.testing.assert_array_equal(found, scorer.score(batch))


def test_the_setting_returns_when_the_last_of_several_passes_ends(rounding):
    entered, leave = threading.Event(), threading.Event()

    def hold():
        with ieee_products():
            entered.set()
            leave.wait(10)

    other = threading.Thread(target=hold)
    with ieee_products():
        other.start()
        assert entered.wait(10)
    assert settings() == ["ieee", "ieee"]
    leave.set()
    other.join(10)
    assert settings() == rounding


def test_the_setting_returns_after_an_error(rounding):
    with pytest.raises(ValueError, match="a fault"), ieee_products():
        raise ValueError("a fault")
    assert settings() == rounding
