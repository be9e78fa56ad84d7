"""The compiled kernels against the same passes in torch, and what happens without them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_ways import TESTED, use
from remote_kernels import MACHINE

from echelon.models import attention_cpu
from echelon.models.attention_cpu import AttentionLayout, attend, attend_first
from echelon.models.blocks import add_and_norm
from echelon.models.kernels import LEVELS
from echelon.models.layers import (
    ACTIVATIONS,
    Norm,
    Product,
    RmsNorm,
    activate,
    add_norm,
    materialize,
    quantize,
)
from echelon.models.rotary import Rotary, rotate, rotate_in_place

pytestmark = pytest.mark.device

NAMED = [name for name in ACTIVATIONS if name != "none"]

BF16_STEP = 2**-8
"""Half of the distance between neighbours, relative to the larger: what rounding may lose."""


@pytest.fixture(params=TESTED)
def level(request):
    with use(request.param):
        yield request.param


@pytest.fixture(params=[*TESTED, None], ids=lambda level: level or "torch")
def way(request):
    """A level of the kernels, or None for torch's own operations."""
    with use(request.param):
        yield request.param


@pytest.mark.skipif(MACHINE == "" and len(TESTED) == len(LEVELS), reason="all are tested")
def test_every_level_is_tested():
    untested = LEVELS.keys() - set(TESTED)
    if untested:
        pytest.skip(f"not built, or not for this processor: {', '.join(sorted(untested))}")


def heads(lengths: list[int], size: int, seed: int = 0) -> tuple[torch.Tensor, AttentionLayout]:
    torch.manual_seed(seed)
    rows = torch.randn(sum(lengths), 3, 2, size).bfloat16()
    offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
    return rows, AttentionLayout.of(offsets)


def exact_attention(
    rows: torch.Tensor, layout: AttentionLayout, reach: int = 2**31
) -> torch.Tensor:
    mixed = []
    for start, end in zip(layout.offsets[:-1], layout.offsets[1:], strict=True):
        query, key, value = rows[start:end].double().permute(1, 2, 0, 3)
        place = torch.arange(end - start)
        far = (place - place[:, None]).abs() > reach
        scores = query @ key.transpose(1, 2) * query.shape[-1] ** -0.5
        weights = scores.masked_fill(far, -torch.inf).softmax(-1)
        mixed.append((weights @ value).transpose(0, 1).flatten(1))
    return torch.cat(mixed)


lengths_of_a_step = st.lists(st.integers(1, 70), min_size=1, max_size=8)


@pytest.mark.parametrize("name", TESTED)
@pytest.mark.parametrize("size", [32, 64])
@settings(max_examples=40)
@given(lengths=lengths_of_a_step, seed=st.integers(0, 2**16))
def test_attention_of_any_mix_of_lengths(name, size, lengths, seed):
    rows, layout = heads(lengths, size, seed)
    exact = exact_attention(rows, layout)
    firsts = rows[layout.firsts, 0]
    one_each = torch.arange(len(lengths) + 1, dtype=torch.int32)
    with use(name):
        mixed = attention_cpu._kernel(*rows.unbind(1), layout.offsets, layout.offsets)
        first = attention_cpu._kernel(firsts, rows[:, 1], rows[:, 2], one_each, layout.offsets)
    assert (mixed - exact).abs().max() <= 0.03
    assert torch.equal(first, mixed[layout.firsts])


@pytest.mark.parametrize("name", TESTED)
@pytest.mark.parametrize("size", [32, 64])
@settings(max_examples=40)
@given(lengths=lengths_of_a_step, reach=st.integers(0, 75), seed=st.integers(0, 2**16))
def test_attention_of_rows_that_see_a_window(name, size, lengths, reach, seed):
    rows, layout = heads(lengths, size, seed)
    with use(name):
        mixed = attention_cpu.attend_by_kernel(*rows.unbind(1), layout, reach)
        all_seen = attention_cpu.attend_by_kernel(*rows.unbind(1), layout)
    assert (mixed - exact_attention(rows, layout, reach)).abs().max() <= 0.03
    if reach >= max(lengths) - 1:
        assert torch.equal(mixed, all_seen)


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("reach", [1, 64, 700])
def test_a_window_over_long_pairs(reach):
    rows, layout = heads([700, 3, 129, 64], 64)
    mixed = attention_cpu.attend_by_kernel(*rows.unbind(1), layout, reach)
    assert (mixed - exact_attention(rows, layout, reach)).abs().max() <= 0.03


@pytest.mark.usefixtures("level")
def test_what_is_far_from_a_window_is_not_read():
    rows, layout = heads([700], 64)
    seen = attention_cpu.attend_by_kernel(*rows.unbind(1), layout, 64)
    rows[200:, 1:] = torch.nan  # more than the window and what is computed at once behind row 100
    mixed = attention_cpu.attend_by_kernel(*rows.unbind(1), layout, 64)
    assert torch.equal(mixed[:100], seen[:100])
    assert mixed[200:].isnan().all()


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("length", [511, 512, 1500, *[8192] * (not MACHINE)])
def test_attention_of_long_pairs(length):
    rows, layout = heads([length, 3], 64)
    mixed = attention_cpu._kernel(*rows.unbind(1), layout.offsets, layout.offsets)
    assert (mixed - exact_attention(rows, layout)).abs().max() <= 0.03


@pytest.mark.usefixtures("level")
def test_attention_of_keys_apart_from_their_values():
    rows, layout = heads([40, 7], 64)
    query, key, value = rows.unbind(1)
    mixed = attention_cpu._kernel(query, key.clone(), value, layout.offsets, layout.offsets)
    assert (mixed - exact_attention(rows, layout)).abs().max() <= 0.03


@pytest.mark.usefixtures("level")
def test_attention_survives_scores_far_apart():
    rows, layout = heads([40], 64)
    rows[:, 0] *= 100
    rows[7, 1] *= 30
    mixed = attention_cpu._kernel(*rows.unbind(1), layout.offsets, layout.offsets)
    assert mixed.isfinite().all()
    assert (mixed - exact_attention(rows, layout)).abs().max() <= 0.03


@pytest.mark.parametrize("method", ["fused", "products"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_other_methods_compute_the_same(monkeypatch, method, dtype):
    monkeypatch.setattr(attention_cpu, "method_for", lambda *_: method)
    rows, layout = heads([5, 5, 33, 1, 60, 60, 60], 16)
    rows = rows.to(dtype)
    exact = exact_attention(rows, layout)
    bound = 1e-5 if dtype == torch.float32 else 0.03
    assert (attend(*rows.unbind(1), layout) - exact).abs().max() <= bound
    firsts = attend_first(rows[layout.firsts, 0], rows[:, 1], rows[:, 2], layout)
    assert (firsts - exact[layout.firsts]).abs().max() <= bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_pairs_are_not_multiplied_whole(monkeypatch, dtype):
    """However fast: the matrices of 8,192 tokens would take gigabytes."""
    monkeypatch.setattr(
        attention_cpu, "_probe", lambda ways, _: {way: 1.0 - (way == "products") for way in ways}
    )
    attention_cpu.fastest_method.cache_clear()
    rows = torch.zeros(1, 2, 16, dtype=dtype)
    found = {
        length: attention_cpu.method_for(rows, attention_cpu.AttentionRun(0, 0, 1, length).probe)
        for length in (8, 500, 1024, 1025, 8192)
    }
    attention_cpu.fastest_method.cache_clear()
    assert [found[length] for length in (8, 500, 1024)] == ["products"] * 3
    assert "products" not in (found[1025], found[8192])


def test_the_fastest_method_is_chosen(monkeypatch):
    seconds = {"fused": 1.0, "products": 0.5}
    monkeypatch.setattr(attention_cpu, "_probe", lambda *_: seconds)
    attention_cpu.fastest_method.cache_clear()
    assert attention_cpu.fastest_method(torch.float32, 2, 16, 32) == "products"
    seconds["products"] = 0.8  # within noise: the first of the list stays
    attention_cpu.fastest_method.cache_clear()
    assert attention_cpu.fastest_method(torch.float32, 2, 16, 32) == "fused"
    attention_cpu.fastest_method.cache_clear()


def product(width: int, seed: int, *, codes: bool, residual: bool) -> Product:
    torch.manual_seed(seed)
    rows = 37
    values = (torch.randn(rows, width) * 3).bfloat16()
    added = torch.randn(rows, width).bfloat16() if residual else None
    if not codes:
        return Product(values, residual=added)
    return Product(values, torch.rand(rows) + 0.1, torch.randn(width), added)


def norm_of(width: int) -> Norm:
    torch.manual_seed(width)
    return Norm(torch.rand(width) + 0.5, torch.randn(width), 1e-5)


def true_value(pending: Product) -> torch.Tensor:
    values = pending.values.double()
    if pending.scales is not None:
        values = values * pending.scales[:, None].double()
    for added in (pending.bias, pending.residual):
        values = values if added is None else values + added.double()
    return values


def assert_rows(rows, exact: torch.Tensor, shift: float | None) -> None:
    """Values round to bf16; codes are at most half a code (and what bf16 lost) away."""
    if rows.values is not None:
        assert ((rows.values - exact).abs() <= BF16_STEP * exact.abs() + 1e-4).all()
    if rows.codes is not None:
        zero, added = (128, 0.0) if shift is None else (0, shift)
        decoded = (rows.codes.double() - zero) * rows.scales[:, None].double() - added
        assert ((decoded - exact).abs() <= 0.51 * rows.scales[:, None] + 1e-4).all()


WIDTHS = [16, 21, 40, 384, 1000]  # no level's vectors divide 21


@pytest.mark.parametrize("codes", [True, False])
@pytest.mark.parametrize("width", WIDTHS)
def test_norm_with_residual(way, codes, width):
    pending, norm = product(width, 1, codes=codes, residual=True), norm_of(width)
    exact = torch.nn.functional.layer_norm(
        true_value(pending), (width,), norm.weight.double(), norm.bias.double(), norm.epsilon
    )
    rows = add_norm(pending, norm, quantized=codes)
    if way is None and not codes:  # torch adds the residual in bf16 first
        assert (rows.values - exact).abs().max() <= 0.1
    else:
        assert_rows(rows, exact, None)
    assert (rows.codes is not None) == codes


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("activation", NAMED)
@pytest.mark.parametrize("width", WIDTHS)
def test_activations(activation, width):
    pending = product(width, 2, codes=True, residual=False)
    exact = ACTIVATIONS[activation].function(true_value(pending))
    assert_rows(activate(pending, activation), exact, None)
    shift = ACTIVATIONS[activation].shift
    rows = activate(pending, activation, shift)
    assert rows.values is None
    assert exact.min() >= -shift
    assert_rows(rows, exact, shift)


@pytest.mark.usefixtures("way")
def test_materializing_and_quantising():
    pending = product(96, 3, codes=True, residual=False)
    exact = true_value(pending)
    assert ((materialize(pending) - exact).abs() <= BF16_STEP * exact.abs() + 1e-4).all()
    rows = torch.randn(40, 96).bfloat16()
    rows[3] = 0
    coded = quantize(rows)
    assert (coded.codes[3] == 128).all()
    assert_rows(coded, rows.double(), None)


@pytest.mark.usefixtures("way")
def test_a_rows_codes_do_not_depend_on_others():
    """However much larger the rows beside it are."""
    torch.manual_seed(5)
    rows = (torch.randn(70, 48) * torch.logspace(-2, 2, 70)[:, None]).bfloat16()
    wide, norm = Product(rows, torch.ones(70), torch.zeros(48)), norm_of(48)
    makers = {
        "quantize": lambda part: quantize(part.values),
        "activate": lambda part: activate(part, "gelu", ACTIVATIONS["gelu"].shift),
        "add_norm": lambda part: add_norm(part, norm, quantized=True),
    }
    for name, make in makers.items():
        together = make(wide)
        assert len(set(together.scales.tolist())) > 35, name
        for i in (0, 35, 69):
            alone = make(wide.part(slice(i, i + 1)))
            assert torch.equal(alone.codes[0], together.codes[i]), name
            assert alone.scales[0] == together.scales[i], name


@pytest.mark.usefixtures("level")
def test_far_values_of_the_activations():
    edges = torch.tensor([[-3e4, -200.0, -9.0, -4.3, 0.0, 4.3, 9.0, 200.0, 3e4]]).bfloat16()
    for activation in NAMED:
        exact = ACTIVATIONS[activation].function(edges.double())
        found = activate(Product(edges, torch.ones(1), torch.zeros(9)), activation).values
        assert ((found - exact).abs() <= BF16_STEP * exact.abs() + 1e-3).all(), activation


@pytest.mark.parametrize("name", TESTED)
@settings(max_examples=60)
@given(
    rows=st.integers(1, 9),
    width=st.integers(1, 200),
    kind=st.sampled_from(["plain", "bias", "rms"]),
    seed=st.integers(0, 999),
)
def test_a_sum_and_its_norm(name, rows, width, kind, seed):
    torch.manual_seed(seed)
    total, product = torch.randn(rows, width), torch.randn(rows, width).bfloat16()
    weight, bias = torch.rand(width) + 0.5, torch.randn(width) if kind == "bias" else None
    norm = RmsNorm(weight, 1e-5) if kind == "rms" else Norm(weight, bias, 1e-5)
    expected = total + product
    exact = expected.double()
    if kind != "rms":
        exact = exact - exact.mean(1, keepdim=True)
    exact = exact / (exact.square().mean(1, keepdim=True) + 1e-5).sqrt() * weight
    exact = exact if bias is None else exact + bias
    with use(name):
        found = add_and_norm(total, product, norm, torch.bfloat16)
    assert torch.equal(total, expected)
    # A row of a few equal numbers has next to no deviation, which its rounding then decides.
    assert (found - exact).abs().le(2 * BF16_STEP * exact.abs() + 1e-3).all()


@pytest.mark.parametrize("name", TESTED)
@settings(max_examples=60)
@given(
    rows=st.integers(1, 9),
    heads=st.integers(1, 4),
    half=st.integers(1, 70),
    normed=st.booleans(),
    seed=st.integers(0, 999),
)
def test_heads_are_turned(name, rows, heads, half, normed, seed):
    """Those of the view alone, where they are or elsewhere."""
    torch.manual_seed(seed)
    whole = torch.randn(rows, heads + 3, 2 * half).bfloat16()
    part = whole[:, 1 : heads + 1]
    tables = Rotary(10_000.0, 2 * half).tables(torch.arange(rows) * 7)
    norm = RmsNorm(torch.rand(2 * half) + 0.5, 1e-6) if normed else None
    wide = part.double() if norm is None else norm(part.float()).double()
    exact = wide * tables[0] + wide.roll(half, -1) * tables[1]
    with use(name):
        found = rotate(part, *tables, norm)
        assert found.is_contiguous()
        untouched = whole.clone()
        rotate_in_place(whole.unsqueeze(1)[:, :, 1 : heads + 1], *tables)
        rest = torch.tensor([0, heads + 1, heads + 2])
        assert torch.equal(whole[:, rest], untouched[:, rest])
        assert norm is not None or torch.equal(whole[:, 1 : heads + 1], found)
    size = (wide.square() + wide.roll(half, -1).square()).sqrt()
    assert (found - exact).abs().le(2 * BF16_STEP * size + 1e-6).all()


@pytest.mark.usefixtures("level")
def test_tables_of_another_type_are_turned_by_torch():
    heads = torch.randn(5, 2, 32).bfloat16()
    tables = Rotary(10_000.0, 32).tables(torch.arange(5), torch.bfloat16)
    assert torch.isfinite(rotate(heads, *tables)).all()
