"""Offline jobs that are killed, and resume."""

from __future__ import annotations

import errno
import gzip
import os
import random
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from offline_jobs import (
    CountingListener,
    KillAtStep,
    ProcessKilled,
    interrupted,
    leftovers,
    make_job,
    queries,
    read_state,
    run_job,
    write_lines,
    write_state,
)
from pyarrow import parquet

from echelon.errors import InvalidInput, OutOfMemory, StorageError
from echelon.offline import resume

GUARD_S = 120.0
STRIDES = {".jsonl": 1, ".jsonl.gz": 9, ".jsonl.zst": 11, ".run": 8, ".parquet": 7}
"""Of how many durable steps a run dies at one: every format has its turn, one has them all."""


@pytest.fixture
def source(tmp_path):
    records = queries(24, documents=9)
    records.insert(7, {"id": "bad", "query": 5, "documents": []})
    records.insert(20, {"id": "bad"})
    return write_lines(tmp_path / "in.jsonl", records)


def kill_and_resume(job, killed_at):
    """A run that dies at its n-th durable step, then one that does not; whether it died."""
    died = False
    with pytest.MonkeyPatch.context() as patch:
        KillAtStep(patch, resume.os, ["fsync", "ftruncate"], killed_at)
        try:
            run_job(job)
        except ProcessKilled:
            died = True
    run_job(job)
    return died


@pytest.mark.parametrize("suffix", STRIDES)
def test_a_kill_at_any_write_changes_no_byte(fake, source, tmp_path, suffix):
    whole = tmp_path / f"whole{suffix}"
    listener = CountingListener()
    run_job(make_job(fake, source, whole), listener)
    assert listener.windows > 4
    kills = 0
    for killed_at in range(1, 90, STRIDES[suffix]):
        output = tmp_path / f"out{suffix}"
        job = make_job(fake, source, output)
        if not kill_and_resume(job, killed_at):
            break
        kills += 1
        assert output.read_bytes() == whole.read_bytes(), killed_at
        errors = Path(f"{output}.errors.jsonl")
        assert errors.read_bytes() == Path(f"{whole}.errors.jsonl").read_bytes()
        assert leftovers(tmp_path) == []
        for path in (output, errors, Path(f"{output}.job.json")):
            path.unlink()
    else:
        pytest.fail("the run never came to its end")
    assert kills > listener.windows // STRIDES[suffix]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("moment", ["replace", "unlink"])
def test_a_kill_between_the_two_moves_at_the_end_changes_no_byte(
    fake, source, tmp_path, suffix, moment
):
    whole, output = tmp_path / f"whole{suffix}", tmp_path / f"out{suffix}"
    run_job(make_job(fake, source, whole))
    job = make_job(fake, source, output)
    real = getattr(Path, moment)

    def last_act(path, *arguments, **keywords):
        result = real(path, *arguments, **keywords)
        if path.name in {f"{output.name}.part", f"{output.name}.building"}:
            raise ProcessKilled
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, moment, last_act)
        try:
            run_job(job)
        except ProcessKilled:
            pass
        else:
            assert (suffix, moment) == (".jsonl", "unlink")
    run_job(job)
    assert output.read_bytes() == whole.read_bytes()
    assert leftovers(tmp_path) == []


def test_the_second_run_scores_only_what_was_left(fake, source, tmp_path):
    output = tmp_path / "out.jsonl"
    job = make_job(fake, source, output)
    interrupted(fake, source, output)
    first = read_state(output)
    listener = CountingListener()
    summary = run_job(job, listener)
    assert first["resume_point"]["line"] > 0
    assert 0 < listener.resumed_at == first["counts"]["pairs"] == summary.resumed
    assert summary.counts.pairs > summary.resumed
    again = run_job(job)
    assert again.already
    assert again.counts == summary.counts


@pytest.mark.parametrize(
    ("change", "named"),
    [({"budget": 9}, "token_budget was 8, is 9"), ({"top_n": 2}, "top_n was None, is 2")],
)
def test_another_option_is_refused_with_the_remedy(fake, source, tmp_path, change, named):
    output = tmp_path / "out.jsonl"
    interrupted(fake, source, output)
    with pytest.raises(InvalidInput, match=named) as refused:
        run_job(make_job(fake, source, output, **change))
    assert "--restart" in str(refused.value)
    run_job(make_job(fake, source, output, restart=True, **change))


def test_another_model_is_refused(fake, toy, source, tmp_path):
    output = tmp_path / "out.jsonl"
    interrupted(fake, source, output)
    with pytest.raises(InvalidInput, match="model was 'bert', is 'roberta'"):
        run_job(make_job(toy("roberta"), source, output))


def test_another_machine_is_refused(fake, source, tmp_path):
    output = tmp_path / "out.jsonl"
    job = interrupted(fake, source, output)
    state = read_state(output)
    state["steps"]["threads"] = 2
    write_state(output, state)
    with pytest.raises(InvalidInput, match="threads was 2, is 1"):
        run_job(job)


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_a_changed_input_is_refused(fake, source, tmp_path, finished, packed):
    output, given = tmp_path / "out.jsonl", source
    if packed:
        given = tmp_path / "in.jsonl.gz"
        given.write_bytes(gzip.compress(source.read_bytes(), 0, mtime=0))
    job = make_job(fake, given, output)
    if finished:
        run_job(job)
    else:
        interrupted(fake, given, output)
    plain = source.read_bytes()
    changed = plain.replace(b'"q1"', b'"x1"')
    assert len(changed) == len(plain)
    given.write_bytes(gzip.compress(changed, 0, mtime=0) if packed else changed)
    with pytest.raises(InvalidInput, match="not the file that was read before"):
        run_job(job)
    given.write_bytes(gzip.compress(plain + b"\n", 0, mtime=0) if packed else plain + b"\n")
    with pytest.raises(InvalidInput, match="input size was"):
        run_job(job)


def test_a_full_disk_keeps_what_was_finished(fake, source, tmp_path):
    whole, output = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    run_job(make_job(fake, source, whole))
    job = make_job(fake, source, output)
    real, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resume.os, "fsync", full)
        with pytest.raises(StorageError, match=r"No space.*kept: the same command resumes"):
            run_job(job)
    listener = CountingListener()
    run_job(job, listener)
    assert listener.resumed_at > 0
    assert output.read_bytes() == whole.read_bytes()


def test_two_at_once_are_refused(fake, source, tmp_path):
    output = tmp_path / "out.jsonl"
    job = make_job(fake, source, output)
    with (
        closing(resume.JobStore(str(output), None, resumable=True)),
        pytest.raises(InvalidInput, match="another process is writing"),
    ):
        run_job(job)
    run_job(job)


def test_an_output_of_another_program_is_not_replaced(fake, source, tmp_path):
    output = tmp_path / "out.jsonl"
    output.write_text("precious")
    with pytest.raises(InvalidInput, match="exists"):
        run_job(make_job(fake, source, output))
    assert output.read_text() == "precious"
    assert leftovers(tmp_path) == []


def test_a_budget_that_the_oom_ladder_lowered_is_kept(fake, source, tmp_path):
    output = tmp_path / "out.jsonl"
    job = interrupted(fake, source, output)
    state = read_state(output)
    state["steps"]["token_budget"] = 5
    write_state(output, state)
    run_job(job)
    steps = read_state(output)["steps"]
    assert (steps["token_budget"], steps["window"]) == (5, 8 * 64)


def test_a_pair_that_does_not_fit_is_named_by_its_line(fake, source, tmp_path, monkeypatch):
    from echelon.engine import precision_check
    from echelon.models.base import FakeScorer

    monkeypatch.setattr(
        precision_check, "open_scorer", lambda _, **__: FakeScorer(4, max_tokens=130)
    )
    with pytest.raises(OutOfMemory, match=r"^(out of memory: )?line \d+, document \d+ of"):
        run_job(make_job(fake, source, tmp_path / "out.jsonl"))


def started(model, source, output):
    command = [sys.executable, "-m", "echelon", "batch", str(source), "-o", str(output)]
    command += ["--model", str(model), "--token-budget", "96", "--threads", "1", "--quiet"]
    return subprocess.Popen(command)


def test_sigkill_at_random_instants_changes_no_byte(light, tmp_path):
    source = write_lines(tmp_path / "in.jsonl", queries(450, documents=30))
    whole, output = tmp_path / "whole.parquet", tmp_path / "out.parquet"
    run_job(make_job(light, source, whole, budget=96, threads=1))
    chance = random.Random(os.urandom(8))
    kills = 0
    while kills < 3:
        seen = progress(output)
        process = started(light, source, output)
        while process.poll() is None and progress(output) == seen:
            wait_a_little(process, 0.01)
        wait_a_little(process, chance.uniform(0, 0.1))
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        assert process.wait(GUARD_S) == -signal.SIGKILL
        kills += 1
    assert kills >= 2
    process = started(light, source, output)
    assert process.wait(GUARD_S) == 0
    assert output.read_bytes() == whole.read_bytes()
    assert leftovers(tmp_path) == []
    assert parquet.read_table(output).num_rows > 1_000


def progress(output):
    """Identity of the state file, which is replaced with every window."""
    try:
        state = Path(f"{output}.job.json").stat()
    except FileNotFoundError:
        return None
    return state.st_ino, state.st_mtime_ns


def wait_a_little(process, seconds):
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return
