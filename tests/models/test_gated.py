"""Parts of newer transformers against plain torch: gates, rotation, and sums with norms."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from echelon.models.architecture import LayerPlan
from echelon.models.blocks import add_and_norm, blocks
from echelon.models.gated import PackedGate, StackedGate
from echelon.models.layers import ACTIVATIONS, BLOCK, Norm, Rows, prepacks
from echelon.models.loading import WeightLoader
from echelon.models.rotary import Rotary, rotate, rotate_in_place

CPU = torch.device("cpu")


def loader(precision="fp32", **plan):
    return WeightLoader(None, CPU, LayerPlan(precision, **plan), "")


def weights(*, bias):
    torch.manual_seed(4)
    tensors = {"up.weight": torch.randn(96, 32)}
    return tensors | ({"up.bias": torch.randn(96)} if bias else {})


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ["gelu", "gelu_pytorch_tanh", "silu", "relu"])
def test_gates_multiply_the_activated_half_by_the_other(activation, bias):
    tensors, rows = weights(bias=bias), torch.randn(3000, 32)
    wide = functional.linear(rows, tensors["up.weight"], tensors.get("up.bias"))
    active, gate = wide.chunk(2, -1)
    expected = ACTIVATIONS[activation].function(active) * gate
    with torch.inference_mode():
        made = loader()
        usual = made.gate(tensors, "up", activation=activation)
        assert made.loaded_bytes == 4 * sum(part.numel() for part in tensors.values())
        stacked = StackedGate(loader().linear(tensors, "up"), activation)
        apart = {
            f"{n}.{kind}": half
            for kind in ("weight", "bias")
            if f"up.{kind}" in tensors
            for n, half in zip("ab", tensors[f"up.{kind}"].chunk(2), strict=True)
        }
        of_two = loader().gate(apart, "a", "b", activation=activation)
        for found in (usual, stacked, of_two):
            torch.testing.assert_close(found(Rows(rows)), expected, rtol=1e-5, atol=1e-3)


def test_a_gate_is_in_the_products_where_that_can_be():
    packed = PackedGate if prepacks(CPU, torch.float32) else StackedGate
    assert isinstance(loader().gate(weights(bias=False), "up", activation="gelu"), packed)
    measured = loader(errors={}).gate(weights(bias=False), "up", activation="gelu")
    assert isinstance(measured, StackedGate)


def test_rows_are_divided_into_blocks_that_cover_them():
    rows = torch.zeros(1000, BLOCK // 300)
    parts = list(blocks(rows))
    assert [i for part in parts for i in range(1000)[part]] == list(range(1000))
    assert len(parts) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation_in_place_turns_the_given_parts_alone(dtype):
    torch.manual_seed(5)
    heads = torch.randn(2000, 3, 4, 64).to(dtype)
    tables = Rotary(10_000.0, 64).tables(torch.arange(2000) % 77)
    expected = [rotate(heads[:, 0], *tables), rotate(heads[:, 1], *tables), heads[:, 2].clone()]
    rotate_in_place(heads[:, :2], *tables)
    torch.testing.assert_close(heads, torch.stack(expected, 1), rtol=0, atol=0)


def test_a_sum_is_kept_and_its_norm_returned():
    torch.manual_seed(6)
    rows, product = torch.randn(3000, 128), torch.randn(3000, 128).bfloat16()
    total, norm = rows + product, Norm(torch.rand(128), torch.randn(128), 1e-5)
    with torch.inference_mode():
        kept = rows.clone()
        found = add_and_norm(kept, product, norm, torch.bfloat16)
        torch.testing.assert_close(kept, total, rtol=0, atol=0)
        torch.testing.assert_close(found, norm(total).bfloat16(), rtol=2**-7, atol=1e-6)
        unchanged = add_and_norm(kept, None, None, torch.float32)
        torch.testing.assert_close(unchanged, total, rtol=0, atol=0)
