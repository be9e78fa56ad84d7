"""A profile that chooses int8, and machines of a Ray cluster that have no fast int8."""

from __future__ import annotations

import logging
import os
from contextlib import closing
from dataclasses import replace

import pytest

pytest.importorskip("ray", reason="Ray is in an extra of its own")

from clusters import SHARE, cluster, machine
from profile_pairs import profile_of

from echelon.engine.launch import PreparedModel, prepare
from echelon.errors import EchelonWarning, InvalidInput
from echelon.integrations.ray.scorer_pool import PoolRequest, RayScorerPool
from echelon.integrations.ray.worker import RayWorker, factory_of
from echelon.models.device import CPU_SWITCH
from echelon.models.hub import resolve
from echelon.options import Options

ROWS = [{"precision": name, "passed": True} for name in ("fp32", "int8")]
SAID = "chooses int8, but this machine has no fast int8. fp32 is used. Run `echelon tune` again"
ONE = PoolRequest(workers=1, cpus=SHARE.cpus)


@pytest.fixture(scope="module")
def elsewhere():
    """A machine with AVX2 and nothing newer."""
    with cluster() as made:
        os.environ[CPU_SWITCH] = "avx2"  # of the machine's processes; `cluster` restores it
        with machine(made):
            del os.environ[CPU_SWITCH]
            yield


@pytest.fixture
def profile(tmp_path):
    made = profile_of()
    chosen = replace(made.settings, precision="int8", max_length=None, threads=1)
    replace(made, settings=chosen, precisions=ROWS).save(tmp_path / "chosen.json")
    return replace(made, settings=chosen, precisions=ROWS)


def prepared(bert, tmp_path, profile, **changes):
    options = Options(precision="int8", device="cpu", profile=tmp_path / "chosen.json")
    return PreparedModel(resolve(bert), options, None, profile, [], **changes)


def test_a_file_is_scored_in_the_precision_of_the_workers_machine(
    elsewhere, bert, tmp_path, profile, caplog
):
    options = Options(device="cpu", profile=tmp_path / "chosen.json")
    with closing(RayScorerPool(str(bert), options, None, ONE)) as machines:
        assert machines.steps.precision == "fp32"
    told = [line for line in caplog.messages if "int8" in line]
    assert len(told) == 1
    assert f"{tmp_path / 'chosen.json'} {SAID}" in told[0]


def test_a_precision_that_was_asked_for_is_not_replaced_there(elsewhere, bert, tmp_path, profile):
    options = Options(device="cpu", precision="int8", profile=tmp_path / "chosen.json")
    with pytest.raises(InvalidInput, match="no int8 instructions"):
        RayScorerPool(str(bert), options, None, ONE)


def test_a_servers_worker_takes_the_precision_of_its_machine(
    elsewhere, bert, tmp_path, profile, caplog
):
    caplog.set_level(logging.WARNING)
    factory = factory_of(prepared(bert, tmp_path, profile, by_profile=True), bert, SHARE)
    worker = RayWorker(factory, SHARE, "worker 7")
    try:
        assert worker.start("int8").precision == "fp32"
    finally:
        worker.kill()
    assert any(line.startswith("worker 7, on machine") and SAID in line for line in caplog.messages)


@pytest.mark.parametrize(("asked", "by_profile"), [("auto", True), ("fp32", False)])
def test_it_is_known_who_chose_the_precision(bert, tmp_path, profile, asked, by_profile):
    chosen = replace(profile, settings=replace(profile.settings, precision="fp32"))
    assert prepare(bert, Options(precision=asked), chosen).by_profile is by_profile
    assert prepare(bert, Options(precision=asked), None).by_profile is False


def test_the_factory_replaces_only_what_the_profile_chose(bert, tmp_path, profile, monkeypatch):
    monkeypatch.setenv(CPU_SWITCH, "avx2")
    chosen = prepared(bert, tmp_path, profile, by_profile=True)
    with (
        pytest.warns(EchelonWarning, match="chooses int8"),
        closing(factory_of(chosen, bert, SHARE)(precision="int8")) as scorer,
    ):
        assert scorer.info.precision == "fp32"
    with pytest.raises(InvalidInput, match="no int8 instructions"):
        factory_of(replace(chosen, by_profile=False), bert, SHARE)(precision="int8")
