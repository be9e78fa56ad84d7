"""int8 layers: close to fp32, and a pair's score does not depend on its neighbours."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from helpers import NATIVE, make_toy, random_batch, split

from echelon.models.device import multiplies_int8
from echelon.models.layers import ACTIVATIONS, Int8Linear, Product, Rows, activate, materialize
from echelon.models.registry import layer_errors, open_scorer

pytestmark = pytest.mark.device

needs_int8 = pytest.mark.skipif(not multiplies_int8(), reason="needs AVX-512 VNNI or AMX")


@needs_int8
@pytest.mark.parametrize("shift", [None, ACTIVATIONS["gelu"].shift])
def test_a_layer_is_near_the_exact_one(shift):
    torch.manual_seed(0)
    weight, bias = torch.randn(96, 64), torch.randn(96)
    product = Product(torch.randn(33, 64).bfloat16() * 2)
    with torch.inference_mode():
        linear = Int8Linear(weight, bias, shift)
        if shift is None:
            rows = Rows(product.values)
            exact = product.values.float() @ weight.T + bias
        else:
            rows = activate(product, "gelu", shift)
            exact = torch.nn.functional.gelu(product.values.float()) @ weight.T + bias
        error = (materialize(linear(rows)) - exact).norm() / exact.norm()
    assert error < 0.015


@needs_int8
def test_weights_without_spread():
    with torch.inference_mode():
        weight = torch.zeros(8, 32)
        weight[1] = 5
        product = materialize(
            Int8Linear(weight, torch.ones(8), None)(Rows(torch.ones(4, 32).bfloat16()))
        )
    assert torch.equal(product[:, 0], torch.ones(4).bfloat16())
    assert (product[:, 1] - 161).abs().max() <= 1


@needs_int8
def test_each_output_has_a_scale_of_its_own():
    """A thousandth as large beside the others, an output is as exact as alone."""
    torch.manual_seed(1)
    weight, rows = torch.randn(16, 64), torch.randn(20, 64).bfloat16()
    weight[3] /= 1000
    with torch.inference_mode():
        product = materialize(Int8Linear(weight, torch.zeros(16), None)(Rows(rows)))[:, 3].float()
    exact = rows.float() @ weight[3]
    assert (product - exact).norm() / exact.norm() < 0.02


@needs_int8
@pytest.mark.parametrize("family", NATIVE)
def test_scores_are_near_fp32_and_do_not_depend_on_neighbours(toy, family):
    folder = toy(family)
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    batch = random_batch([3, 50, 50, 90, 12, 7], vocabulary, 2, types=family == "bert")
    exact = open_scorer(folder, precision="fp32", threads=1).score(batch)
    scorer = open_scorer(folder, precision="int8", threads=1)
    assert scorer.info.precision == "int8"
    together = scorer.score(batch)
    alone = [scorer.score(split(batch, i))[0] for i in range(len(batch))]
    np.testing.assert_allclose(together, exact, rtol=0, atol=0.25)
    assert np.abs(together - exact).max() > 0
    np.testing.assert_allclose(together, alone, rtol=0, atol=1e-3)


@needs_int8
def test_heads_of_the_kernels_size_too(tmp_path):
    folder = make_toy(
        tmp_path, "bert", None, vocab_size=150, hidden_size=128, num_attention_heads=2
    )
    batch = random_batch([3, 50, 90, 12], 150, 4, types=True)
    exact = open_scorer(folder, precision="fp32", threads=1).score(batch)
    for precision, bound in (("bf16", 0.1), ("int8", 0.5)):
        found = open_scorer(folder, precision=precision, threads=1).score(batch)
        np.testing.assert_allclose(found, exact, rtol=0, atol=bound)


@needs_int8
def test_kept_layers_compute_in_bf16(toy):
    folder = toy("bert")
    batch = random_batch([40, 22], 150, 1, types=True)
    names = list(layer_errors(folder, [batch]))
    assert len(names) == 3 * 4 + 1  # the last layer's query projection stands alone
    bf16 = open_scorer(folder, precision="bf16", threads=1).score(batch)
    kept = open_scorer(folder, precision="int8", threads=1, keep_bf16=names).score(batch)
    none = open_scorer(folder, precision="int8", threads=1).score(batch)
    assert np.abs(kept - bf16).max() < 0.02
    assert np.abs(kept - bf16).max() < np.abs(none - bf16).max()


def spoil(folder, layer: int) -> None:
    """Give one layer inputs that eight bits cannot hold: one channel a thousand times the rest."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    root = f"bert.encoder.layer.{layer}"
    tensors[f"{root}.attention.output.LayerNorm.bias"][5] += 4000
    tensors[f"{root}.intermediate.dense.weight"][:, 5] = 0
    tensors[f"{root}.output.dense.weight"][5] = 0
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.fixture
def spoiled(tmp_path, tokenizers):
    folder = make_toy(tmp_path / "spoiled", "bert", tokenizers["bert"])
    spoil(folder, 0)
    return folder


@needs_int8
def test_the_layer_that_int8_harms_is_found(spoiled):
    errors = layer_errors(spoiled, [random_batch([40, 22, 60], 150, 1, types=True)])
    assert next(iter(errors)) == "layer.0.intermediate.dense"
    assert errors["layer.0.intermediate.dense"] > 5 * sorted(errors.values())[-3]
