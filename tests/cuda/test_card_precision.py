"""What ``auto`` means on a card: a half precision only where it surely ranks as fp32 does."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import shim_card
from helpers import SENTENCES
from safetensors.torch import load_file, save_file

from echelon import Reranker
from echelon.engine import card_precision, check_store
from echelon.errors import EchelonWarning, NonFiniteScore
from echelon.models.registry import card_precisions
from echelon.profile import ProfileKey

PAIRS = [("rain at the kitchen window", text) for text in SENTENCES]
UP, DOWN = "bert.encoder.layer.0.intermediate.dense", "bert.encoder.layer.0.output.dense"


@pytest.fixture(scope="module")
def overflowing(native, tmp_path_factory):
    """A BERT whose feed-forward leaves the range of fp16, and that scores as before in fp32."""
    folder = shutil.copytree(native("bert").folder, tmp_path_factory.mktemp("wide") / "wide")
    tensors = load_file(folder / "model.safetensors")
    for name in (f"{UP}.weight", f"{UP}.bias"):
        tensors[name] = (tensors[name] * 1e6).contiguous()
    tensors[f"{DOWN}.weight"] = (tensors[f"{DOWN}.weight"] / 1e6).contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def stored(home):
    return [json.loads(path.read_text()) for path in (home / check_store.STORE).iterdir()]


@pytest.mark.filterwarnings("ignore:fp32 is used")  # random weights may not prove enough
def test_the_first_use_is_checked_and_remembered_for_this_kind_of_card(
    native, home, machine, monkeypatch
):
    with Reranker(native("xlm-roberta").folder) as reranker:
        chosen = reranker.facts.precision
    rows = {content["key"]["precision"]: content for content in stored(home)}
    assert rows["fp16"]["fp16"]["passed"] == (chosen == "fp16")
    assert rows["fp16"]["key"]["device_name"] == machine.name
    monkeypatch.setattr(card_precision.Comparisons, "row", lambda *_: pytest.fail("compared again"))
    with Reranker(native("xlm-roberta").folder) as reranker:
        assert reranker.facts.precision == chosen


@pytest.mark.filterwarnings("ignore:fp32 is used")  # random weights may not prove enough
def test_another_kind_of_card_is_checked_anew(native, home):
    for capability in ((8, 0), (9, 0)):
        with shim_card.cards(capability=capability):
            Reranker(native("xlm-roberta").folder).close()
    names = {content["key"]["device_name"] for content in stored(home)}
    assert len(names) == 2


def test_where_fp16_gives_no_numbers_another_precision_is_used(overflowing, home, machine):
    del machine
    with Reranker(overflowing, precision="fp16") as reranker, pytest.raises(NonFiniteScore):
        reranker.score(PAIRS)
    with Reranker(overflowing, device="cpu", precision="fp32", threads=1) as exact:
        expected = exact.score(PAIRS)
    with pytest.warns(EchelonWarning, match="fp16 does not rank as fp32 does"):
        reranker = Reranker(overflowing)
    with reranker:
        assert reranker.facts.precision == "fp32"
        np.testing.assert_allclose(reranker.score(PAIRS), expected, rtol=0, atol=1e-4)
    rows = {content["key"]["precision"]: content for content in stored(home)}
    assert rows["fp16"]["fp16"]["failed"]
    assert rows["fp16"]["fp16"]["tau"] == 0


@pytest.mark.parametrize(
    ("passed", "chosen"), [({"fp16", "bf16"}, "fp16"), ({"bf16"}, "bf16"), (set(), "fp32")]
)
def test_the_first_that_passed_is_used(native, home, machine, monkeypatch, passed, chosen):
    del home, machine

    def row(_, precision):
        good = precision in passed
        means = {"tau": 0.9, "overlap": 0.9, "ndcg_loss": None, "proven": good, "failed": not good}
        return {"precision": precision, "passed": good, "queries": 12, "keep_bf16": []} | means

    monkeypatch.setattr(card_precision.Comparisons, "row", row)
    folder = native("bert").folder
    if chosen == "fp32":
        with pytest.warns(EchelonWarning, match=r"fp32 is used: fp16 does not .*; bf16 does not"):
            reranker = Reranker(folder)
    else:
        reranker = Reranker(folder)
    assert reranker.facts.precision == chosen
    reranker.close()


def test_what_was_asked_for_is_not_compared(native, home, machine):
    del machine
    with Reranker(native("bert").folder, precision="bf16") as reranker:
        assert reranker.facts.precision == "bf16"
    assert not (home / check_store.STORE).exists()


def test_the_familys_usual_precision_comes_first(native, machine):
    del machine
    assert card_precisions(native("qwen3").folder, "cuda") == ["bf16", "fp16"]
    assert card_precisions(native("bert").folder, "auto") == ["fp16", "bf16"]
    assert card_precisions(native("bert").folder, "cpu") == []


def test_a_row_is_stored_under_its_own_precision(home):
    key = ProfileKey("model", "revision", "cuda", "a card", "bf16", {})
    check_store.store_row(key, {"passed": True})
    assert check_store.stored_row(key) == {"passed": True}
    assert home.exists()
