"""The shim card itself: what it refuses, counts, captures, defers and breaks."""

from __future__ import annotations

import gc
import json

import pytest
import shim_card
import torch
from helpers import run_python
from shim_card.faults import LOST, OUT_OF_MEMORY, Fault, error_of
from torch.nn import functional

from echelon.models.faults import is_out_of_memory

ON = torch.device("cuda", 0)


def test_torch_sees_the_cards_and_forgets_them():
    with shim_card.cards(capability=(8, 0), count=2) as machine:
        assert torch.cuda.is_available()
        assert torch.cuda.device_count() == 2
        assert torch.cuda.get_device_capability(1) == (8, 0)
        rows = torch.ones(3, 4, device="cuda:1")
        assert rows.device == torch.device("cuda", 1)
        assert rows.is_cuda
        with torch.cuda.device(1):
            assert torch.zeros(2, device="cuda").device.index == 1
        assert torch.zeros(2, device="cuda").device.index == 0
        with pytest.raises(RuntimeError, match="invalid device ordinal"):
            torch.zeros(2, device="cuda:2")
        assert machine.cards[1].peak > 0
    assert not torch.cuda.is_available()
    with pytest.raises(AssertionError, match="not compiled with CUDA"):
        torch.ones(3, device="cuda")


@pytest.mark.parametrize("inference", [False, True])
def test_numbers_are_those_of_the_cpu(machine, inference):
    del machine
    with torch.inference_mode(inference):
        rows, weight = torch.randn(5, 8), torch.randn(8, 8)
        query = torch.randn(1, 2, 6, 8)
        there = [part.to(ON) for part in (rows, weight, query)]

        def work(rows, weight, query):
            product = functional.layer_norm(functional.linear(rows, weight), (8,))
            product += 1
            product[1] = 2.0
            product[2:, 3] = 0.5
            picked = product[torch.tensor([0, 4]).to(product.device)].t().contiguous()
            mixed = functional.scaled_dot_product_attention(query, query, query)
            return picked, product[:, None, 1:3], mixed.transpose(1, 2).reshape(6, -1)

        for here, found in zip(work(rows, weight, query), work(*there), strict=True):
            assert found.device == ON
            assert found.is_contiguous() == here.is_contiguous()
            torch.testing.assert_close(found.cpu(), here)


def test_views_from_outside_of_inference_mode_are_written_to_inside(machine):
    del machine
    rows = torch.zeros(4, device=ON)
    with torch.inference_mode():
        rows.narrow(0, 1, 2).copy_(torch.ones(2))
        (rows * 1).narrow(0, 1, 2).copy_(torch.ones(2))
    rows[3:] += 2
    assert rows.tolist() == [0, 1, 1, 2]


def test_modules_move_to_a_card(machine):
    del machine
    rows, module = torch.randn(3, 4), torch.nn.Linear(4, 2)
    with torch.inference_mode():  # gradients ask a driver for its stream
        expected = module(rows)
        module.to("cuda")
        assert module.weight.device == ON
        torch.testing.assert_close(module(rows.to(ON)).cpu(), expected)


def test_host_and_cards_do_not_mix():
    with shim_card.cards(count=2):
        first = torch.ones(2, device="cuda:0")
        with pytest.raises(RuntimeError, match=r"at least two devices.*cuda:0 and cpu"):
            _ = first + torch.ones(2)
        with pytest.raises(RuntimeError, match=r"cuda:1 and cuda:0"):
            _ = first + torch.ones(2, device="cuda:1")
        with pytest.raises(TypeError, match=r"Use Tensor\.cpu\(\)"):
            first.numpy()
        assert (first + torch.tensor(1.0)).tolist() == [2, 2]
        assert first.to("cuda:1").device.index == 1


# Refusals


def flash(dtype=torch.float16, size=8, offsets=torch.int32):
    rows = torch.ones(4, 2, size, device=ON, dtype=dtype)
    ends = torch.tensor([0, 4], dtype=offsets).to(ON)
    return torch.ops.aten._flash_attention_forward(
        rows, rows, rows, ends, ends, 4, 4, 0.0, is_causal=False, return_debug_mask=False
    )


def efficient(dtype):
    rows = torch.ones(1, 4, 2, 8, device=ON, dtype=dtype)
    ends = torch.tensor([0, 4], dtype=torch.int32).to(ON)
    return torch.ops.aten._efficient_attention_forward(
        rows, rows, rows, None, ends, ends, 4, 4, 0.0, 0
    )


def scaled(dtype=torch.float8_e4m3fn):
    rows = torch.ones(16, 16, device=ON).to(dtype)
    one = torch.ones((), device=ON)
    return torch._scaled_mm(rows, rows.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)


def normed(rows, weights):
    weight = torch.ones(8, device=ON, dtype=weights)
    return functional.layer_norm(torch.ones(2, 8, device=ON, dtype=rows), (8,), weight)


@pytest.mark.parametrize(
    ("capability", "call", "message"),
    [
        ((7, 5), flash, "only supports Ampere"),
        ((8, 0), lambda: flash(torch.float32), "only support fp16 and bf16"),
        ((9, 0), lambda: flash(size=12), "multiple of 8"),
        ((9, 0), lambda: flash(size=264), "at most 256"),
        ((9, 0), lambda: flash(offsets=torch.int64), "must have dtype int32"),
        ((7, 5), lambda: efficient(torch.bfloat16), "no kernel found"),
        ((8, 0), scaled, "only supported on CUDA devices with compute capability"),
        ((9, 0), lambda: normed(torch.float16, torch.float32), "expected scalar type Half"),
        (
            (9, 0),
            lambda: torch.ones(2, 2, device=ON) @ torch.ones(2, 2, device=ON).half(),
            "same dtype",
        ),
    ],
)
def test_a_card_refuses_what_its_operators_refuse(capability, call, message):
    with shim_card.cards(capability=capability), pytest.raises(RuntimeError, match=message):
        call()


def test_a_card_takes_what_its_operators_take():
    for capability in ((8, 0), (9, 0), (12, 0)):
        with shim_card.cards(capability=capability):
            for dtype in (torch.float16, torch.bfloat16):
                flash(dtype)
                efficient(dtype)
                normed(dtype, dtype)
    with shim_card.cards(capability=(7, 5)):
        efficient(torch.float16)
        efficient(torch.float32)
    with shim_card.cards(capability=(8, 9)):
        torch.testing.assert_close(scaled().cpu().float(), torch.full((16, 16), 16.0))


# Memory


def test_each_card_has_its_own_memory():
    with shim_card.cards(count=2, memory=1 << 20) as machine:
        rows = torch.empty(1 << 17, device="cuda:1")
        view = rows[: 1 << 10]
        assert torch.cuda.memory_allocated(1) == 1 << 19
        assert torch.cuda.memory_allocated(0) == 0
        with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
            torch.empty((1 << 17) + 1, device="cuda:1")
        torch.empty(1 << 17, device="cuda:0")
        del rows
        gc.collect()
        assert machine.cards[1].allocated == 1 << 19  # the view still holds it
        del view
        gc.collect()
        assert machine.cards[1].allocated == 0
        assert torch.cuda.max_memory_allocated(1) == 1 << 19
        torch.cuda.set_per_process_memory_fraction(0.25, 1)
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(1 << 17, device="cuda:1")


# Graphs


def captured(work):
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.graph(graph, stream=stream):
        output = work()
    return graph, output


def test_a_graph_is_replayed_into_the_same_memory(machine):
    given = torch.ones(4, device=ON)
    calls = []

    def work():
        calls.append(1)
        doubled = given * 2
        doubled[1:] += 1
        return doubled.view(2, 2)

    graph, output = captured(work)
    assert output.isnan().all().item()  # a capture runs nothing
    for value in (1.0, 5.0):
        given.fill_(value)
        graph.replay()
        assert output.tolist() == [[2 * value, 2 * value + 1], [2 * value + 1] * 2]
    assert len(calls) == 1
    assert machine.counts("replay")["graph"] == 2
    held = torch.cuda.memory_allocated()
    graph.reset()
    del output
    gc.collect()
    assert torch.cuda.memory_allocated() < held


@pytest.mark.parametrize(
    "wait",
    [
        lambda rows: rows.sum().item(),
        lambda rows: rows.cpu(),
        lambda rows: rows[rows > 0],
        lambda rows: rows.nonzero(),
        lambda rows: torch.ones(4).to(rows.device),
        lambda _: torch.cuda.synchronize(),
    ],
)
def test_capture_ends_where_the_host_would_wait(machine, wait):
    rows = torch.ones(4, device=ON)
    with pytest.raises(RuntimeError, match="previous error during capture") as raised:
        captured(lambda: wait(rows))
    assert "not permitted when stream is capturing" in str(raised.value.__context__)
    assert machine.cards[0].stuck


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Fault("CUDA error: cannot do this", at="capture"), "cannot do this"),
        (Fault("CUDA error: cannot do this", at="capture end"), "cannot do this"),
        (Fault("allocator", at="allocate"), "CUDA out of memory"),
    ],
)
def test_captures_fail_on_demand(machine, fault, message):
    rows = torch.ones(4, device=ON)
    machine.faults.append(fault)
    with pytest.raises(RuntimeError, match=message):
        captured(lambda: rows * 2)


def test_waiting_is_an_error_where_debugging_says_so(machine):
    del machine
    rows, memory = torch.ones(2, device=ON), torch.ones(2, pin_memory=True)
    torch.cuda.set_sync_debug_mode("error")
    rows.copy_(memory, non_blocking=True)
    with pytest.raises(RuntimeError, match="synchronizing"):
        rows.cpu()
    with pytest.raises(RuntimeError, match="synchronizing"):
        rows.copy_(torch.ones(2))


# Deferred work


@pytest.fixture
def deferring():
    with shim_card.cards(deferred=True) as machine:
        yield machine


def test_what_is_rewritten_before_it_was_read_arrives_rewritten(deferring):
    del deferring
    memory = torch.ones(4, pin_memory=True)
    doubled = memory.to(ON, non_blocking=True) * 2
    memory.fill_(7.0)
    assert doubled.tolist() == [14.0] * 4
    plain = torch.ones(4)  # which the driver copies before it returns
    doubled = plain.to(ON, non_blocking=True) * 2
    plain.fill_(7.0)
    assert doubled.tolist() == [2.0] * 4


def test_results_are_not_there_before_somebody_waits(deferring):
    del deferring
    rows = torch.full((3,), 4.0, device=ON)
    back = rows.to("cpu", non_blocking=True)
    done = torch.cuda.Event()
    done.record()
    assert back.is_pinned()
    assert back.isnan().all()
    assert not done.query()
    done.synchronize()
    assert done.query()
    assert back.tolist() == [4.0] * 3


def test_freed_pinned_memory_is_overwritten_once_it_was_read(deferring):
    del deferring
    memory = torch.ones(4, pin_memory=True)
    raw = memory.untyped_storage().data_ptr()
    rows = memory.to(ON, non_blocking=True)
    view = (__import__("ctypes").c_uint8 * 16).from_address(raw)
    kept = bytes(view)
    del memory
    gc.collect()
    assert bytes(view) == kept  # the copy has not run yet
    assert rows.tolist() == [1.0] * 4


def test_streams_wait_only_for_what_they_are_told(deferring):
    del deferring
    side = torch.cuda.Stream()
    rows = torch.ones(2, device=ON)
    with torch.cuda.stream(side):
        rows.fill_(3.0)
    side_done = side.record_event()
    assert rows.tolist() == [1.0] * 2
    torch.cuda.current_stream().wait_event(side_done)
    assert rows.tolist() == [3.0] * 2


# Precision


@pytest.mark.parametrize(("capability", "rounds"), [((7, 5), False), ((8, 0), True)])
def test_fp32_products_lose_bits_where_tf32_is_allowed(capability, rounds):
    rows, weight = torch.randn(16, 64), torch.randn(64, 16)
    before = torch.get_float32_matmul_precision()
    with shim_card.cards(capability=capability):
        exact = rows.to(ON) @ weight.to(ON)
        try:
            torch.set_float32_matmul_precision("high")
            found = rows.to(ON) @ weight.to(ON)
        finally:
            torch.set_float32_matmul_precision(before)
        error = (found - exact).abs().max().item()
        torch.testing.assert_close(exact.cpu(), rows @ weight)
    assert (error > 1e-4) == rounds


# Faults


@pytest.mark.parametrize("words", OUT_OF_MEMORY)
def test_memory_runs_out_in_each_of_torchs_wordings(machine, words):
    machine.faults.append(Fault(words, after=2))
    rows = torch.ones(2, device=ON)  # one launch
    rows += 1
    with pytest.raises(RuntimeError) as raised:
        rows += 1
    assert str(raised.value) == OUT_OF_MEMORY[words]
    rows += 1
    assert rows.tolist() == [3.0, 3.0]


def test_the_common_wordings_are_known():
    for words in ("allocator", "runtime", "cublas", "cudnn"):
        assert is_out_of_memory(error_of(words))


@pytest.mark.parametrize("words", LOST)
def test_nothing_works_on_a_lost_card(words):
    with shim_card.cards(count=2) as machine:
        rows, other = torch.ones(2, device="cuda:0"), torch.ones(2, device="cuda:1")
        machine.faults.append(Fault(words, card=0))
        calls = (
            lambda: rows + 1,
            rows.cpu,
            lambda: torch.empty(1, device="cuda:0"),
            lambda: torch.cuda.synchronize(0),
            torch.cuda.empty_cache,
        )
        for call in calls:
            with pytest.raises(torch.AcceleratorError, match=r"^CUDA error: "):
                call()
        assert (other + 1).tolist() == [2.0, 2.0]


def test_child_processes_get_cards_too(tmp_path):
    flag = tmp_path / "flag"
    fault = {"words": "ecc", "flag": str(flag)}
    given = shim_card.environment(capability=[8, 0], count=2, faults=[fault])
    assert json.loads(given[shim_card.VARIABLE])["count"] == 2
    code = (
        "import sys, pathlib, torch\n"
        "print(torch.cuda.device_count(), torch.cuda.get_device_capability())\n"
        "rows = torch.ones(2, device='cuda:1')\n"
        "print(rows.tolist())\n"
        "pathlib.Path(sys.argv[1]).touch()\n"
        "rows += 1\n"
    )
    ran = run_python(code, flag, **given)
    assert ran.stdout.splitlines() == ["2 (8, 0)", "[1.0, 1.0]"], ran.stderr
    assert "uncorrectable ECC error" in ran.stderr
    assert not flag.exists()
