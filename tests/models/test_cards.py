"""Which card each worker gets, on machines with any number of cards, of NVIDIA, AMD or none."""

from __future__ import annotations

import pytest
import torch
from helpers import run_python

from echelon.models import cards
from echelon.models.cards import Placement, place, visible_cards

pytestmark = pytest.mark.device


@pytest.fixture
def machine(monkeypatch):
    """A machine with cards that nothing may touch."""

    def touched(*_):
        raise AssertionError("the parent process made a context")

    def with_cards(count, *, hip=False, **environment):
        monkeypatch.setattr(torch.version, "cuda", None if hip else "13.0")
        monkeypatch.setattr(torch.version, "hip", "7.0" if hip else None)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        for name in ("init", "_lazy_init", "current_device", "get_device_properties"):
            monkeypatch.setattr(torch.cuda, name, touched)
        for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)

    return with_cards


def given(device, workers, variable="CUDA_VISIBLE_DEVICES"):
    """The card of each worker, or the device where no card is chosen."""
    placed = [place(device, number) for number in range(workers)]
    return [one.environment.get(variable, one.device) for one in placed]


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_workers_take_the_cards_in_turn(machine, device):
    machine(2)
    assert given(device, 5) == ["0", "1", "0", "1", "0"]
    assert place(device, 1) == Placement(device, {"CUDA_VISIBLE_DEVICES": "1"})
    machine(1)
    assert given(device, 2) == ["0", "0"]
    machine(0)
    assert given(device, 2) == [device, device]


def test_a_number_means_one_card_for_all(machine):
    machine(2)
    assert given("cuda:1", 3) == ["1", "1", "1"]
    assert place("cuda:1", 0).device == "cuda"  # the only one that the worker sees
    assert place("cuda:2", 0) == Placement("cuda:2")  # opening says that it is not there
    assert place("cpu", 1) == Placement("cpu")


@pytest.mark.parametrize(
    ("listed", "count", "expected"),
    [
        ("2,0", 2, ["2", "0"]),
        (" 2, 0", 2, ["2", "0"]),
        ("3", 1, ["3"]),
        ("", 0, []),
        ("-1", 0, []),
        ("1,-1,0", 1, ["1"]),
        ("0,9", 1, ["0"]),  # CUDA ends the list where a card is not there
        ("GPU-8f3a,GPU-17bc", 2, ["GPU-8f3a", "GPU-17bc"]),
        ("MIG-1d2e,MIG-77aa", 1, ["MIG-1d2e", "MIG-77aa"]),  # CUDA counts one slice
    ],
)
def test_what_this_process_may_see_is_what_workers_get(machine, listed, count, expected):
    machine(count, CUDA_VISIBLE_DEVICES=listed)
    assert visible_cards() == expected
    wanted = [expected[number % len(expected)] for number in range(3)] if expected else ["cuda"] * 3
    assert given("cuda", 3) == wanted


def test_slices_are_chosen_by_number_too(machine):
    machine(1, CUDA_VISIBLE_DEVICES="MIG-1d2e,MIG-77aa")
    assert given("cuda:1", 2) == ["MIG-77aa", "MIG-77aa"]


def test_amds_cards_have_their_own_variable(machine):
    machine(2, hip=True)
    assert given("auto", 2, "HIP_VISIBLE_DEVICES") == ["0", "1"]
    machine(2, hip=True, CUDA_VISIBLE_DEVICES="4,5")
    assert given("auto", 2) == ["4", "5"]
    machine(2, hip=True, HIP_VISIBLE_DEVICES="6,7", CUDA_VISIBLE_DEVICES="4,5")
    assert given("auto", 2, "HIP_VISIBLE_DEVICES") == ["6", "7"]


def test_a_build_without_cards_counts_none(machine, monkeypatch):
    machine(3)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert visible_cards() == []
    monkeypatch.setattr(cards, "has_torch", lambda: False)
    assert place("auto", 1) == Placement("auto")


def test_without_torch_nothing_is_imported():
    code = """
import sys
sys.modules["torch"] = None
from echelon.models.cards import place
print(place("auto", 0), place("cuda", 1).device)
"""
    ran = run_python(code)
    assert ran.stdout.split() == ["Placement(device='auto',", "environment={})", "cuda"], ran.stderr
