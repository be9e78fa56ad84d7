"""fp8 on cards made of shims: its numbers are the CPU's emulation of the card's product."""

from __future__ import annotations

import json

import numpy as np
import pytest
import shim_card
import torch
from helpers import SENTENCES
from hypothesis import given
from hypothesis import strategies as st
from native_models import FAMILIES

from echelon import Reranker
from echelon.engine import card_precision, check_store
from echelon.errors import EchelonWarning, InvalidInput
from echelon.models import card_kernels, float8
from echelon.models.layers import Rows
from echelon.models.registry import precisions_to_compare, runs_in
from echelon.options import Options
from echelon.tuning import first_stages

PRODUCT = "aten._scaled_mm.default"


@given(
    numbers=st.lists(
        st.floats(-6e4, 6e4, width=32, allow_subnormal=False), min_size=1, max_size=40
    ),
    power=st.integers(-30, 30),
)
def test_a_code_is_wrong_by_a_sixteenth_at_most(numbers, power):
    rows = torch.tensor([numbers, [2.0**power * x for x in numbers]])
    codes, scales = card_kernels.to_float8(rows)
    found = codes.float() * scales
    smallest = 2.0**-9 * scales  # a code below the normal ones
    assert ((found - rows).abs() <= rows.abs() / 16 + smallest).all()
    assert codes.float().isfinite().all()


def test_rows_of_zeros_stay_zeros():
    codes, scales = card_kernels.to_float8(torch.zeros(3, 16))
    assert not codes.float().any()
    assert scales.isfinite().all()


@pytest.mark.parametrize("bias", [True, False])
def test_a_product_is_that_of_its_codes(machine, bias):
    chance = torch.Generator().manual_seed(0)
    weight, rows = (torch.randn(n, 32, generator=chance) for n in (48, 7))
    added = torch.randn(48, generator=chance) if bias else None
    layer = float8.Float8Linear(weight, added, torch.device("cuda", 0))
    found = layer(Rows(rows.bfloat16().cuda())).values.float().cpu()
    exact = rows @ weight.T + (0 if added is None else added)
    assert (found - exact).abs().max() <= 0.07 * exact.abs().max()
    assert machine.counts("launch")[PRODUCT] == 1
    assert layer.nbytes == 48 * 32 + 4 * 48 + (2 * 48 if bias else 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_scores_alike(native, opened, family):
    toy = native(family)
    batch = toy.batch([3, 40, 9, -1, 77, 21, 60], 1)
    expected = toy.reference(batch)
    with shim_card.cards(capability=(8, 9)) as machine:
        scorer = opened(toy.folder, "fp8")
        found = scorer.score(batch)
        multiplied = machine.counts("launch").get(PRODUCT, 0)
        assert scorer.info.precision == "fp8"
        assert getattr(scorer, "capture_failed", None) is None
    widths = json.loads((toy.folder / "config.json").read_text())
    assert (multiplied > 0) is (widths["hidden_size"] % 16 == 0)
    # Random weights separate documents little, and these are narrow rows.
    assert np.abs(found - expected).max() <= 1.5 * expected.std()
    assert np.corrcoef(found, expected)[0, 1] >= 0.8


def test_layers_of_other_widths_stay_in_bf16(native, opened, machine):
    """The product wants multiples of sixteen; 40 is none."""
    from echelon.models.float8 import fits

    assert fits([torch.zeros(48, 32)])
    assert fits([torch.zeros(40, 32), torch.zeros(24, 32)])
    assert not fits([torch.zeros(48, 32), torch.zeros(40, 32)])
    assert not fits([torch.zeros(48, 40)])
    toy = native("bert")
    bf16, fp8 = (opened(toy.folder, name).info.weights_bytes for name in ("bf16", "fp8"))
    assert fp8 < bf16
    del machine


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 6)])
def test_a_card_without_it_is_named(native, opened, capability):
    with (
        shim_card.cards(capability=capability) as machine,
        pytest.raises(InvalidInput, match=rf"{machine.name} does not multiply fp8.*8\.9"),
    ):
        opened(native("bert").folder, "fp8")


def test_amds_cards_are_refused_whatever_their_number(native, opened, machine, monkeypatch):
    """MI200 says 9.0, and MI300 wants another format of eight bits."""
    del machine
    monkeypatch.setattr(torch.version, "hip", "7.0")
    with pytest.raises(InvalidInput, match="does not multiply fp8"):
        opened(native("bert").folder, "fp8")


def test_a_processor_is_refused_before_anything_is_compared(native):
    with pytest.raises(InvalidInput, match="does not multiply fp8"):
        Reranker(native("bert").folder, device="cpu", precision="fp8")


def row(*, passed):
    def made(_, precision):
        means = {"tau": 0.9, "overlap": 0.9, "ndcg_loss": None, "proven": passed}
        more = {"failed": not passed, "passed": passed, "queries": 12, "keep_bf16": []}
        return {"precision": precision} | means | more

    return made


def test_it_is_compared_with_fp32_before_its_first_use(native, home, machine, monkeypatch):
    del machine
    monkeypatch.setattr(card_precision.Comparisons, "row", row(passed=True))
    with Reranker(native("bert").folder, precision="fp8") as reranker:
        assert reranker.facts.precision == "fp8"
        assert len(reranker.score([("rain", text) for text in SENTENCES])) == len(SENTENCES)
    (stored,) = [json.loads(p.read_text()) for p in (home / check_store.STORE).iterdir()]
    assert stored["key"]["precision"] == "fp8"
    monkeypatch.setattr(card_precision.Comparisons, "row", lambda *_: pytest.fail("again"))
    Reranker(native("bert").folder, precision="fp8").close()


def test_where_it_does_not_rank_alike_it_is_refused(native, home, machine, monkeypatch):
    del home, machine
    monkeypatch.setattr(card_precision.Comparisons, "row", row(passed=False))
    with pytest.raises(InvalidInput, match="fp8 does not rank as fp32 does"):
        Reranker(native("bert").folder, precision="fp8")


def test_a_real_comparison_decides(native, home, machine):
    del home, machine
    try:
        with Reranker(native("xlm-roberta").folder, precision="fp8") as reranker:
            assert reranker.facts.precision == "fp8"
    except InvalidInput as error:
        assert "fp8" in str(error)  # noqa: PT017 - random weights may not prove enough


def test_auto_and_tune_do_not_choose_it_unless_it_is_asked_for(native, machine):
    del machine
    folder = native("bert").folder
    assert "fp8" not in precisions_to_compare(folder, "cuda")
    assert runs_in(folder, "cuda", "fp8")
    assert not runs_in(folder, "cpu", "fp8")
    assert "fp8" in first_stages.CHECKED


def test_a_profile_of_fp8_falls_back_on_another_card(native, home, monkeypatch, tmp_path):
    """What a profile chose is replaced with a warning where the card has none."""
    del home
    from echelon.engine.launch import with_precision_there
    from echelon.models.hub import resolve

    class Chosen:
        precisions = ({"precision": "fp16", "passed": True}, {"precision": "fp8", "passed": True})

        def precision_row(self, name):
            return next((r for r in self.precisions if r["precision"] == name), None)

    del monkeypatch, tmp_path
    folder = resolve(str(native("bert").folder))
    options = Options(precision="fp8", profile="p.json")
    with shim_card.cards(capability=(9, 0)):
        assert with_precision_there(options, Chosen(), folder).precision == "fp8"
    with shim_card.cards(capability=(8, 0)), pytest.warns(EchelonWarning, match="no fast fp8"):
        assert with_precision_there(options, Chosen(), folder).precision == "fp16"
