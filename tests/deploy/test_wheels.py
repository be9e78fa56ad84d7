"""Building: a wheel is for the platform that was asked for, and none needs a compiler."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys

import pytest
from helpers import ROOT

COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")


@pytest.fixture(scope="module")
def wheels():
    spec = importlib.util.spec_from_file_location("wheels", ROOT / "scripts/wheels.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def sdist(wheels, tmp_path_factory):
    return wheels.build("sdist", ROOT, tmp_path_factory.mktemp("sdist"))


@pytest.fixture
def source(wheels, sdist, tmp_path):
    return wheels.unpack(sdist, tmp_path / "source")


def test_the_source_distribution_builds_without_a_compiler(wheels, source, tmp_path):
    wheel = wheels.build("wheel", source, tmp_path, CXX="/bin/false")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not wheels.levels_in(wheel)


@pytest.mark.skipif(
    COMPILER is None or sys.platform != "linux", reason="there is no compiler to build with"
)
def test_the_source_distribution_builds_with_a_compiler(wheels, source, tmp_path):
    wheel = wheels.build("wheel", source, tmp_path)
    assert wheel.name.endswith(f"-py3-none-linux_{os.uname().machine}.whl")
    assert "portable" in wheels.levels_in(wheel)


def test_the_pure_wheel_is_pure_where_there_is_a_compiler(wheels, source, tmp_path):
    wheel = wheels.build_wheel("any", source, tmp_path)
    assert not wheels.levels_in(wheel)
    assert wheels.audit(wheel, "any").startswith(f"{wheel.name}: ")


@pytest.mark.parametrize("tag", ["manylinux_2_28_x86_64", "manylinux_2_28_aarch64"])
def test_a_wheel_without_its_kernels_is_an_error(wheels, source, tmp_path, monkeypatch, tag):
    monkeypatch.setattr(wheels, "ZIG", "/bin/false")
    with pytest.raises(SystemExit, match=f"any.whl should be for {tag}: the kernels"):
        wheels.build_wheel(tag, source, tmp_path)


def test_a_wheel_that_is_too_large_is_an_error(wheels, tmp_path):
    wheel = tmp_path / "large-1-py3-none-any.whl"
    wheel.write_bytes(bytes(wheels.LARGEST_BYTES))
    assert wheels.audit(wheel, "any")
    wheel.write_bytes(bytes(wheels.LARGEST_BYTES + 1))
    with pytest.raises(SystemExit, match="5,000,001 bytes; at most 5,000,000"):
        wheels.audit(wheel, "any")


@pytest.mark.parametrize(
    ("found", "fits"),
    [
        ("manylinux_2_28_x86_64", True),
        ("manylinux_2_5_x86_64", True),
        ("manylinux_2_29_x86_64", False),
        ("manylinux_2_17_aarch64", False),
        ("linux_x86_64", False),
    ],
)
def test_a_wheel_may_need_an_older_glibc_but_no_newer_one(wheels, found, fits):
    assert wheels.allowed(found, "manylinux_2_28_x86_64") is fits


def test_what_fails_is_shown(wheels):
    with pytest.raises(SystemExit, match=r"(?s)failed:.*no such thing"):
        wheels.run((sys.executable, "-c", "raise SystemExit('no such thing')"))


def test_the_tools_are_of_the_versions_in_the_lock():
    done = subprocess.run(
        ["make", "--dry-run", "--always-make", "wheels"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "lock.py --select wheels > .venv-wheels/requirements.txt" in done.stdout
    assert "--require-hashes --no-deps -r .venv-wheels/requirements.txt" in done.stdout
