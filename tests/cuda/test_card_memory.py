"""The memory of a card made of shims, and the precision that it goes to when that is short."""

from __future__ import annotations

import pytest
import shim_card
import torch
from helpers import random_batch, vocabulary_of

from echelon.models import device
from echelon.models.base import DeviceOutOfMemory, step_did_not_fit
from echelon.models.cuda_graphs import FIRST_PAUSE
from echelon.models.memory_meters import MAX_CONTEXT_BYTES, CudaMemoryMeter, MpsMemoryMeter
from echelon.models.registry import open_scorer
from echelon.tuning.machine import MemoryMeter, meter_of

MIB = 2**20


def stub(monkeypatch, *, outside, segments=()):
    free, total = 5000 * MIB, 8000 * MIB
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, total))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: total - free - outside)
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: list(segments))


def segment(size, used, pool=(0, 0), card=0):
    return {
        "device": card, "total_size": size, "allocated_size": used, "segment_pool_id": pool,
    }  # fmt: skip


def test_graphs_and_the_context_count(machine, monkeypatch):
    meter = CudaMemoryMeter("cuda:0")
    meter.reset()
    kept = torch.ones(MIB, device="cuda")
    base = machine.cards[0].peak
    assert base >= kept.nbytes
    stub(monkeypatch, outside=0)
    assert meter.peak_bytes() == base
    stub(monkeypatch, outside=400 * MIB)
    assert meter.peak_bytes() == base + 400 * MIB
    stub(monkeypatch, outside=2000 * MIB)  # most of that is a neighbour's
    assert meter.peak_bytes() == base + MAX_CONTEXT_BYTES
    mixed = [
        segment(50 * MIB, 10 * MIB), segment(30 * MIB, 10 * MIB, (0, 1)),
        segment(70 * MIB, 0, (0, 2), card=1),
    ]  # fmt: skip
    stub(monkeypatch, outside=0, segments=mixed)
    assert meter.peak_bytes() == base + 20 * MIB  # of the graphs' pool on this card


@pytest.mark.parametrize(("outside", "crowded"), [(400, False), (2000, True)])
def test_lack_of_memory_says_whether_other_processes_hold_it(
    machine, monkeypatch, outside, crowded
):
    del machine
    stub(monkeypatch, outside=outside * MIB)

    def full():
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(DeviceOutOfMemory) as caught:
        device.guarded(full)
    assert caught.value.crowded is crowded


@pytest.mark.parametrize(
    ("capability", "half"), [((7, 5), "fp16"), ((8, 0), "bf16"), ((9, 0), "bf16")]
)
def test_a_card_goes_down_to_the_precision_that_it_multiplies(bert, monkeypatch, capability, half):
    monkeypatch.setenv("ECHELON_CUDA_GRAPHS", "off")
    with shim_card.cards(capability=capability):
        assert device.half_precision(torch.device("cuda", 0)) == half
        assert device.candidate_precisions("cuda")[1:] == ["fp16", *["bf16"] * (half == "bf16")]
        scorer = open_scorer(bert, device="cuda", precision="fp32")
        assert scorer.info.lower_precision == half
        scorer.close()


def test_each_device_has_its_meter():
    kinds = [type(meter_of(name)) for name in ("cpu", "cuda:1", "mps")]
    assert kinds == [MemoryMeter, CudaMemoryMeter, MpsMemoryMeter]


def test_a_child_backs_off_once_whatever_its_parent_asks(bert, machine):
    """The parent's request to release comes when a step that was sent ahead has run."""
    del machine
    scorer = open_scorer(bert, device="cuda", precision="fp32")
    batch = random_batch([9, 5], vocabulary_of(bert), 0, types=True)
    assert len(scorer._graphs) > 1
    step_did_not_fit(scorer)
    for _ in range(3):
        scorer.score(batch)
        scorer.release()
    assert scorer._graphs._pause == FIRST_PAUSE
    for _ in range(FIRST_PAUSE - 3):
        scorer.score(batch)
        assert len(scorer._graphs) == 0
    scorer.release()  # alone it changes nothing but memory
    scorer.score(batch)
    assert len(scorer._graphs) == 1
