"""Devices, threads, and which errors really say that memory is short."""

from __future__ import annotations

import os
import sys

import numpy as np
import pytest
import torch
from helpers import random_batch, run_python

from echelon.errors import InvalidInput, MissingDependency, install_command
from echelon.models import device
from echelon.models.base import DeviceOutOfMemory
from echelon.models.registry import open_scorer

pytestmark = pytest.mark.device

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "error",
    [RuntimeError("DefaultCPUAllocator: can't allocate memory: 3 bytes"), MemoryError("numpy")],
)
def test_a_step_without_memory_leaves_the_scorer_usable(bert, monkeypatch, error):
    scorer = open_scorer(bert, device="cpu", precision="fp32", threads=1)
    batch = random_batch([9, 12], 300, 0)
    expected = scorer.score(batch)

    def fail(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("echelon.models.encoder.finish", fail)
        with pytest.raises(DeviceOutOfMemory) as caught:
            scorer.score(batch)
    # Neither cause nor context: their tracebacks would keep the failed step's tensors alive.
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None
    scorer.release()
    np.testing.assert_array_equal(scorer.score(batch), expected)


def test_a_real_fault_of_a_step_passes_through(bert, monkeypatch):
    scorer = open_scorer(bert, device="cpu", precision="fp32", threads=1)
    fault = RuntimeError("shape '[2]' is invalid for input of size 3")

    def fail(*_):
        raise fault

    monkeypatch.setattr("echelon.models.encoder.finish", fail)
    with pytest.raises(RuntimeError) as caught:
        scorer.score(random_batch([9], 300, 0))
    assert caught.value is fault


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "cuda:1", "cuda:999", "cuda:" + "9" * 30])
def test_cuda_that_is_not_there(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InvalidInput, match=r"is not there \(0 CUDA device\(s\) found\)") as caught:
        device.choose_device(name)
    assert caught.value.field == "device"


def test_devices_that_are_there(monkeypatch):
    assert device.choose_device("cpu") == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device.choose_device("auto") == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device.choose_device("auto") == torch.device("cuda", 0)
    assert device.choose_device("cuda") == torch.device("cuda", 0)
    assert device.choose_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(InvalidInput, match="2 CUDA"):
        device.choose_device("cuda:2")


def test_precision_without_a_profile():
    assert device.choose_precision("auto", CPU) == "fp32"
    assert device.choose_precision("auto", torch.device("cuda", 0)) == "fp16"
    assert device.choose_precision("bf16", CPU) == "bf16"


@pytest.fixture
def new(monkeypatch):
    """A processor and a torch build that have everything."""
    monkeypatch.setattr(device, "has_onednn", lambda: True)
    monkeypatch.setattr(torch.ops.onednn, "qlinear_pointwise", None, raising=False)
    for name in ("_is_amx_tile_supported", "_is_vnni_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: True, raising=False)
    for name in ("_is_mkldnn_bf16_supported", "_is_mkldnn_fp16_supported"):
        monkeypatch.setattr(torch.ops.mkldnn, name, lambda: True, raising=False)
    monkeypatch.delenv(device.CPU_SWITCH, raising=False)


@pytest.mark.usefixtures("new")
def test_the_switch_limits_a_new_processor_to_avx2(monkeypatch):
    assert device.candidate_precisions("cpu") == ["fp32", "bf16", "int8"]
    assert device.has_amx()
    assert device.multiplies_half("fp16")
    monkeypatch.setenv(device.CPU_SWITCH, "avx2")
    assert device.candidate_precisions("cpu") == ["fp32"]
    assert not device.has_amx()
    assert not device.multiplies_half("fp16")
    with pytest.raises(InvalidInput, match="VNNI or AMX"):
        device.choose_precision("int8", CPU)
    monkeypatch.setenv(device.CPU_SWITCH, "")  # as if it were not there
    assert device.multiplies_int8()


@pytest.mark.parametrize("value", ["AVX2", "avx512", "off", " "])
def test_an_unknown_processor_is_refused(monkeypatch, value):
    monkeypatch.setenv(device.CPU_SWITCH, value)
    with pytest.raises(InvalidInput, match="Set it to avx2, or unset it") as caught:
        device.multiplies_int8()
    assert caught.value.field == "ECHELON_CPU"
    assert repr(value) in caught.value.problem


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": "150000 100000\n"}, 1),
        ({"cpu.max": "400000 100000\n"}, 4),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
        ({}, None),
    ],
)
def test_cpus_of_a_containers_quota(tmp_path, files, cpus):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    assert device._cgroup_cpus(tmp_path) == cpus


def test_cpus_never_exceed_the_affinity(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0}, raising=False)
    assert device.usable_cpus() == 1


def test_threads_are_set_for_the_process():
    before = torch.get_num_threads()
    try:
        assert device.set_threads(1, CPU) == 1
        assert torch.get_num_threads() == 1
        assert device.set_threads(None, CPU) == device.usable_cpus() == torch.get_num_threads()
        assert device.set_threads(3, torch.device("cuda", 0)) == 0
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["THP_MEM_ALLOC_ENABLE", "GOMP_SPINCOUNT"])
def test_torch_threads_yield_unless_the_user_set_them(monkeypatch, name):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setenv(name, "7")
    device.require_torch()
    assert os.environ[name] == "7"
    monkeypatch.delenv(name)
    device.require_torch()
    assert os.environ[name] == {"THP_MEM_ALLOC_ENABLE": "1", "GOMP_SPINCOUNT": "3000"}[name]


def test_the_processor_has_a_name():
    assert device.cpu_name()
    assert device.device_name(CPU) == device.cpu_name()


def test_without_torch_the_remedy_is_named():
    code = """
import sys
sys.modules["torch"] = None
from echelon import MissingDependency
from echelon.models.registry import open_scorer
from pathlib import Path
try:
    open_scorer(Path("/nowhere"))
except MissingDependency as error:
    print(error, error.exit_code)
"""
    ran = run_python(code)
    assert ran.stdout.strip().endswith(f"{install_command('torch')} 7"), ran.stderr
    assert MissingDependency.exit_code == 7


@pytest.mark.parametrize("platform", ["linux", "win32", "darwin"])
def test_releasing_memory_works_on_every_system(monkeypatch, platform):
    monkeypatch.setattr(sys, "platform", platform)
    device.release_memory(CPU)
