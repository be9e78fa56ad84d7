"""Cards that torch cannot use are said aloud, with the driver that they need."""

from __future__ import annotations

import warnings

import pytest
import torch

from echelon.errors import EchelonWarning, InvalidInput
from echelon.models import device, drivers
from echelon.models.drivers import UnusableCard, unusable_card

pytestmark = pytest.mark.device

R550 = """NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024
GCC version:  gcc version 12.2.0
"""
R580_OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build"


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine whose torch sees no card, with a driver that says this of its version."""

    def made(told=None, *, cuda="13.0", hip=None, node="dev/nvidia0", available=False):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        files = {node: ""} if node else {}
        files |= {"proc/driver/nvidia/version": told} if told else {}
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        return tmp_path

    return made


@pytest.mark.parametrize(
    ("told", "cuda", "driver", "needed", "too_old"),
    [
        (R550, "13.0", "550.54.15", 580, True),
        (R550, "12.8", "550.54.15", 525, False),
        (R580_OPEN, "13.0", "580.65.06", 580, False),
        (None, "13.0", None, 580, False),
        ("nothing of use", "13.0", None, 580, False),
        (R550, "14.1", "550.54.15", None, False),  # a CUDA that is not out yet
    ],
)
def test_a_card_that_torch_cannot_use(machine, told, cuda, driver, needed, too_old):
    found = unusable_card(machine(told, cuda=cuda))
    assert (found.driver, found.needed, found.too_old) == (driver, needed, too_old)
    assert f"CUDA {cuda}" in str(found)


def test_the_driver_alone_says_that_there_is_a_card(machine):
    assert unusable_card(machine(R550, node=None)).too_old


def test_no_card_no_words(machine, monkeypatch):
    assert unusable_card(machine(node=None)) is None
    assert unusable_card(machine(R550, cuda=None)) is None  # a CPU build: the user's choice
    assert unusable_card(machine(R550, available=True)) is None
    root = machine(R550)
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert unusable_card(root) is None


def test_amds_cards_are_known_by_their_own_node(machine):
    found = unusable_card(machine(cuda=None, hip="7.0", node="dev/kfd"))
    assert str(found).endswith("built for ROCm 7.0, cannot use it")
    assert not found.too_old


def test_auto_says_aloud_that_it_takes_the_cpu(machine, monkeypatch):
    machine()
    card = UnusableCard("CUDA 13.0", "550.54.15", 580, "7.5")
    monkeypatch.setattr(device, "unusable_card", lambda: card)
    with pytest.warns(EchelonWarning, match="runs on the CPU") as caught:
        assert device.choose_device("auto") == torch.device("cpu")
    for word in ("driver 580 or newer", "7.5", "550.54.15", drivers.REMEDY):
        assert word in str(caught[0].message)
    with pytest.raises(InvalidInput, match=r"driver 580 or newer.*Update the driver"):
        device.choose_device("cuda:1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        device.choose_device("cpu")


def test_a_build_is_named_with_what_it_is_for(machine, monkeypatch):
    machine(cuda="13.0")
    assert drivers.accelerators() == " (CUDA 13.0)"
    machine(cuda=None, hip="7.0", available=True)
    assert drivers.accelerators() == " (ROCm 7.0)"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert drivers.untested_here() == ["cuda (ROCm)"]
    machine(cuda=None)
    assert drivers.accelerators() == ""
    assert drivers.untested_here() == []
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert drivers.untested_here() == ["mps"]
