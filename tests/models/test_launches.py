"""Kernels and bytes of a layer on a card, counted on tensors without values: a budget."""

from __future__ import annotations

import sys

import pytest
from helpers import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

from card_costs import MINILM, XLM_R_LARGE, LayerCosts

BUDGETS = {
    XLM_R_LARGE: LayerCosts(7, 11, 12_300, 25_165_824),
    MINILM: LayerCosts(7, 12, 4_620, 3_538_944),
}


@pytest.mark.parametrize("model", BUDGETS, ids=lambda model: model.name)
def test_a_layer_costs_no_more_than_its_budget(model):
    costs, budget = LayerCosts.of(model), BUDGETS[model]
    assert costs.launches <= budget.launches
    assert costs.rest_launches <= budget.rest_launches
    assert costs.token_bytes <= budget.token_bytes
    assert costs.token_flops == budget.token_flops
