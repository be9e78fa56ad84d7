"""Which level of the kernels is chosen, what says so, and what happens without them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from helpers import run_python
from remote_kernels import build_hook

from echelon.errors import InvalidInput
from echelon.models import kernel_calls, kernels, layers
from echelon.models.device import CPU_SWITCH
from echelon.models.kernels import FASTER, LEVELS, OFF, OPERATIONS, SWITCH, Kernels
from echelon.models.layers import Product, activate
from echelon.profile import ProfileKey

pytestmark = pytest.mark.device

SAY = """
import json
from echelon.models.kernels import kernels, missing, used_level
found = kernels()
used = [found.level, *found.operations] if found else None
print(json.dumps([used_level(), missing(), used]))
"""


@pytest.fixture
def processor(monkeypatch, tmp_path):
    """Sets the processor's flags and the levels that were built."""

    def set_up(flags, built=tuple(LEVELS)):
        for level in built:
            path(level).touch()
        monkeypatch.setattr(kernels, "cpu_flags", lambda: frozenset(flags.split()))
        kernels.used_level.cache_clear()

    def path(level):
        return tmp_path / level

    monkeypatch.delenv(SWITCH, raising=False)
    monkeypatch.setattr(kernels, "path_of", path)
    yield set_up
    kernels.used_level.cache_clear()


ZEN4 = "fma avx2 avx512f avx512bw avx512vl avx512dq avx512_vnni avx512_bf16"
CASCADE_LAKE = ZEN4.removesuffix(" avx512_bf16")


@pytest.mark.parametrize(
    ("flags", "level"),
    [
        (ZEN4, "avx512bf16"),
        (CASCADE_LAKE, "avx512"),
        ("fma avx2 avx512f", "avx2"),  # Knights Landing has AVX-512 without its other parts
        ("fma avx2 avx_vnni", "avx2"),
        ("avx2", "portable"),
        ("fp asimd bf16", "neon"),
        ("", OFF),
    ],
)
def test_the_best_level_that_the_processor_runs_is_chosen(processor, monkeypatch, flags, level):
    monkeypatch.setattr(kernels, "FASTER", dict.fromkeys(LEVELS, OPERATIONS))
    processor(flags)
    assert kernels.used_level() == level


def test_a_level_that_was_not_built_is_no_choice(processor):
    processor(ZEN4, ["avx512", "portable"])
    assert kernels.possible() == ["avx512", "portable"]
    assert kernels.used_level() == "avx512"


def test_a_level_without_a_measured_gain_is_chosen_by_name_only(processor, monkeypatch):
    processor("fp asimd")
    assert kernels.used_level() == OFF
    assert "neon, none was measured faster than torch" in kernels.missing()
    monkeypatch.setenv(SWITCH, "neon")
    kernels.used_level.cache_clear()
    assert kernels.used_level() == "neon"


def test_without_any_there_is_a_reason(processor):
    processor(ZEN4, [])
    assert kernels.used_level() == OFF
    assert "not built" in kernels.missing()


@pytest.mark.parametrize("asked", ["neon", "avx512bf16", "avx9", "OFF"])
def test_an_impossible_level_is_refused_with_the_possible_ones(processor, monkeypatch, asked):
    processor(CASCADE_LAKE)
    monkeypatch.setenv(SWITCH, asked)
    with pytest.raises(InvalidInput) as caught:
        kernels.used_level()
    assert caught.value.field == SWITCH
    assert "Set it to avx512, avx2, portable or off." in str(caught.value)


def test_a_processor_limited_to_avx2_has_no_newer_level():
    done = run_python(SAY, ECHELON_CPU="avx2", **{SWITCH: ""})
    level, _, used = json.loads(done.stdout)
    assert level in {"avx2", OFF}, done.stderr
    assert used in (["avx2", *FASTER["avx2"]], None)
    done = run_python(SAY, ECHELON_CPU="avx2", **{SWITCH: "avx512"})
    assert f"avx512 does not run here under {CPU_SWITCH}=avx2. Set it to" in done.stderr


def test_the_switch_leaves_the_kernels_out():
    done = run_python(SAY, **{SWITCH: OFF})
    assert json.loads(done.stdout) == [OFF, f"{SWITCH}=off leaves them out", None], done.stderr


@pytest.mark.parametrize("level", kernels.possible())
def test_the_switch_chooses_a_level_for_all_operations(level):
    done = run_python(SAY, **{SWITCH: level})
    assert json.loads(done.stdout) == [level, None, [level, *OPERATIONS]], done.stderr


def test_only_operations_that_are_faster_use_their_kernel(monkeypatch):
    class Library:
        def __getattr__(self, name):
            raise AssertionError(f"{name} was called")

    only = Kernels("avx2", Library(), ("quantize",))
    monkeypatch.setattr(kernel_calls, "kernels", lambda: only)
    rows = torch.ones(2, 16).bfloat16()
    assert activate(Product(rows), "relu").values.equal(rows)
    with pytest.raises(AssertionError, match="echelon_quantize was called"):
        layers.quantize(rows)


def test_a_profile_of_another_level_does_not_fit():
    key = ProfileKey("model", "1", "cpu", "Zen", "bf16", {}, kernels="avx512bf16")
    changed = "the level of the compiled kernels was avx512bf16, is avx2"
    assert key.differences(replace(key, kernels="avx2")) == [changed]
    assert key.differences(replace(key, kernels=None)) == []  # unknown, as in older profiles


def test_a_kernel_without_memory_is_an_error():
    class Library:
        def echelon_quantize(self, *_):
            return 1

    with pytest.raises(MemoryError, match="scratch space of quantize"):
        Kernels("avx2", Library(), OPERATIONS).call("quantize")


def test_the_tables_name_the_same_levels_and_operations():
    hook = build_hook()
    assert {level for levels in hook.LEVELS.values() for level in levels} == LEVELS.keys()
    assert FASTER.keys() == LEVELS.keys()
    assert all(set(operations) <= set(OPERATIONS) for operations in FASTER.values())
    assert {f"echelon_{name}" for name in OPERATIONS} == kernels.SIGNATURES.keys()
    assert hook.LIBRARY == kernels.LIBRARY


@pytest.mark.parametrize("compiler", ["/nonexistent/c++", "false"])
def test_a_compiler_that_fails_is_a_reason_not_an_error(tmp_path, monkeypatch, compiler):
    hook = build_hook()
    monkeypatch.setenv("CXX", compiler)
    (tmp_path / hook.LIBRARY.format(level="avx2")).touch()  # of an earlier build
    reasons = hook._compile(tmp_path, "linux_x86_64")
    assert len(reasons) == len(hook.LEVELS["x86_64"])
    assert all(compiler in reason for reason in reasons)
    assert not list(tmp_path.iterdir())


def test_a_level_that_the_compiler_does_not_know_leaves_the_others(tmp_path):
    hook = build_hook()
    compiler = tmp_path / "old-c++"
    compiler.write_text('#!/bin/sh\ncase "$*" in *avx512bf16*) echo "unknown" >&2; exit 1;; esac\n')
    compiler.chmod(0o755)
    failures = hook.compile_kernels([str(compiler)], "x86_64", tmp_path)
    assert failures.keys() == {"avx512bf16"}
    assert "unknown" in failures["avx512bf16"]


needs_a_level = pytest.mark.skipif(not kernels.possible(), reason="no kernels were built")


@needs_a_level
def test_kernels_share_torchs_threads():
    """Two OpenMP libraries in one process would have two pools of threads that fight.

    The kernels take all of torch's threads, so that as many compute in them as in torch.
    """
    code = """
import os, torch
torch.set_num_threads(3)
from echelon.models import attention_cpu, layers
from echelon.models.kernels import kernels
rows = torch.randn(300, 64).bfloat16()
before = len(os.listdir("/proc/self/task"))
assert kernels() is not None
heads, offsets = rows.view(-1, 2, 32), torch.tensor([0, 9, 200, 300], dtype=torch.int32)
codes = layers.quantize(rows).codes
mixed = attention_cpu._kernel(heads, heads, heads, offsets, offsets)
during = len(os.listdir("/proc/self/task"))
torch.set_num_threads(1)
assert codes.equal(layers.quantize(rows).codes)
assert mixed.equal(attention_cpu._kernel(heads, heads, heads, offsets, offsets))
maps = open("/proc/self/maps").read().splitlines()
print(during - before, len({line.split()[-1] for line in maps if "omp" in line.split("/")[-1]}))
"""
    done = run_python(code, OMP_NUM_THREADS="1", **{SWITCH: kernels.possible()[0]})
    assert done.stdout == "2 1\n", done.stderr
