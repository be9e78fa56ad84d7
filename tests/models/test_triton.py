"""The kernels for cards: run by Triton's interpreter on CPU, and compiled ahead for each card.

In processes of their own (tests/support/triton_checks.py). Skipped where Triton is
not installed; ``make test-triton`` installs it beside the CPU build of torch.
"""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from helpers import ROOT

from echelon.models import card_kernels
from echelon.models.layers import ACTIVATIONS, Norm, Product, add_norm

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")

CHECKS = ROOT / "tests/support/triton_checks.py"


def run_checks(*arguments):
    """What the checks print last; they fail with a traceback."""
    done = subprocess.run(
        [sys.executable, CHECKS, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[-1]


@needs_triton
def test_the_kernels_compute_what_torch_does():
    assert run_checks("interpret") == "done"


@needs_triton
def test_the_kernels_compile_for_every_card():
    assert run_checks("compile", *["75", "80", "86", "89", "90", "100", "120"]) == "done"


def test_activations_have_the_codes_of_all_kernels():
    for code, function in card_kernels.GATES.items():
        named = [one for one in ACTIVATIONS.values() if one.code == code]
        rows = torch.linspace(-3, 3, 20)
        assert named
        for one in named:
            torch.testing.assert_close(one.function(rows), function(rows))


def test_without_triton_or_by_the_switch_torch_computes(monkeypatch):
    card = torch.device("cuda", 7)
    card_kernels.missing.cache_clear()
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr(card_kernels, "find_spec", lambda name: None)
    assert "not installed" in card_kernels.missing(card)
    card_kernels.missing.cache_clear()
    monkeypatch.setenv("ECHELON_KERNELS", "off")
    assert "off" in card_kernels.missing(card)
    card_kernels.missing.cache_clear()


def test_a_compiler_that_fails_is_said_once_and_is_no_error(monkeypatch, caplog):
    card_kernels.missing.cache_clear()
    monkeypatch.delenv("ECHELON_KERNELS", raising=False)
    monkeypatch.setattr(card_kernels, "find_spec", lambda name: object())

    def device(_):
        raise RuntimeError("Failed to find C compiler. Please specify via CC\nmore")

    monkeypatch.setattr(torch.cuda, "device", device)
    for _ in range(3):
        assert "Failed to find C compiler" in card_kernels.missing(torch.device("cuda", 8))
    assert len(caplog.records) == 1
    assert "Install a C compiler" in caplog.text
    card_kernels.missing.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_norms_on_a_card_are_ours_where_there_are_kernels(monkeypatch, dtype):
    """Executed on CPU, as on a card: the operator's own form there."""
    monkeypatch.setattr("echelon.models.layers.has_card_kernels", lambda rows: True)
    torch.manual_seed(0)
    product, residual = torch.randn(2, 6, 32).to(dtype)
    norm = Norm(torch.randn(32).to(dtype), torch.randn(32).to(dtype), 1e-5)
    found = add_norm(Product(product, residual=residual), norm, quantized=False).values
    expected = norm((product.float() + residual.float()).to(dtype))
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, rtol=4e-3, atol=4e-3)
