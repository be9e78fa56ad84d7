"""Kernels and bytes of a layer on a card, counted on tensors without values: a budget."""

from __future__ import annotations

import sys

import pytest
from helpers import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

from card_costs import CARDS, MINILM, MODERNBERT, XLM_R_LARGE, LayerCosts, token_us

BUDGETS = {
    XLM_R_LARGE: LayerCosts(7, 11, 12_300, 25_165_824),
    MINILM: LayerCosts(7, 12, 4_620, 3_538_944),
    MODERNBERT: LayerCosts(9, 23, 26_000, 10_027_008),
}

FP8 = {XLM_R_LARGE: (12, 50_200)}


@pytest.mark.parametrize("model", BUDGETS, ids=lambda model: model.name)
def test_a_layer_costs_no_more_than_its_budget(model):
    costs, budget = LayerCosts.of(model), BUDGETS[model]
    assert costs.launches <= budget.launches
    assert costs.rest_launches <= budget.rest_launches
    assert costs.token_bytes <= budget.token_bytes
    assert costs.token_flops == budget.token_flops


@pytest.mark.parametrize("model", FP8, ids=lambda model: model.name)
def test_fp8_takes_a_launch_more_a_product_and_one_for_the_activation(model):
    costs, (launches, token_bytes) = LayerCosts.of(model, precision="fp8"), FP8[model]
    assert costs.launches <= launches
    assert costs.token_bytes <= token_bytes
    assert costs.token_flops == BUDGETS[model].token_flops


def test_without_triton_a_layer_of_xlm_r_takes_two_more():
    """And eleven, with twice the bytes, before the activation moved into the product."""
    assert LayerCosts.of(XLM_R_LARGE, kernels=False).launches <= 9


@pytest.mark.parametrize("card", CARDS)
def test_predictions_are_made_of_what_was_counted(card):
    products, passes, attention = token_us(XLM_R_LARGE, card)
    assert products > passes > attention > 0
    assert token_us(MINILM, card)[0] < products / 10
