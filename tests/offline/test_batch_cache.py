"""The score cache of a file: repeated pairs are scored once, and a resumed run changes no byte."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from offline_jobs import (
    CountingListener,
    ForgetfulScorer,
    KillAtStep,
    ProcessKilled,
    interrupted,
    leftovers,
    make_job,
    queries,
    read_lines,
    read_state,
    run_job,
    write_lines,
)

from echelon.cli import cli
from echelon.engine import precision_check
from echelon.engine.score_cache import ENTRY_BYTES
from echelon.errors import InvalidInput
from echelon.offline import resume
from echelon.types import RunReport

GUARD = 200


class NeighbourlyScorer(ForgetfulScorer):
    """A scorer whose last digits depend on the other pairs of a step, as on a real machine."""

    def score(self, batch):
        return super().score(batch) + np.float32(1e-3 * (len(batch.ids) % 17))


@pytest.fixture
def neighbourly(bert, monkeypatch):
    monkeypatch.setattr(
        precision_check, "open_scorer", lambda _, **__: NeighbourlyScorer(max_tokens=130)
    )
    return bert


@pytest.fixture
def source(tmp_path):
    """Queries of which a few come again and again, over many windows."""
    rows, chance = queries(30, documents=9, seed=3), random.Random(3)
    rows += [{**chance.choice(rows[:20]), "id": f"again{n}"} for n in range(90)]
    return write_lines(tmp_path / "in.jsonl", rows)


def cached_job(model, source, output, entries=60):
    """A job with steps of several pairs."""
    job = make_job(model, source, output, budget=90)
    return replace(job, options=replace(job.options, score_cache=entries * ENTRY_BYTES))


class Reports(CountingListener):
    def __init__(self):
        super().__init__()
        self.reports = []

    def window(self, scored):
        super().window(scored)
        self.reports.append(scored.report)

    @property
    def total(self):
        return RunReport.of(self.reports)


def test_pairs_that_come_again_are_scored_once(neighbourly, source, tmp_path):
    plain, cached = Reports(), Reports()
    run_job(make_job(neighbourly, source, tmp_path / "plain.jsonl", budget=90), plain)
    run_job(cached_job(neighbourly, source, tmp_path / "cached.jsonl", 1000), cached)
    assert cached.windows == plain.windows > 3
    assert plain.total.cached == 0
    rows = read_lines(source)
    distinct = {(row["query"], d["text"]) for row in rows for d in row["documents"]}
    assert cached.total.scored == len(distinct) < plain.total.scored
    assert cached.total.scored + cached.total.cached == plain.total.scored
    once = {}
    for row in read_lines(tmp_path / "cached.jsonl"):
        for result in row["results"]:
            query = next(r["query"] for r in rows if r["id"] == row["id"])
            once.setdefault((query, result["id"]), set()).add(result["logit"])
    assert {len(logits) for logits in once.values()} == {1}


@pytest.mark.parametrize("entries", [60, 1000])
def test_a_kill_at_any_write_changes_no_byte(neighbourly, source, tmp_path, entries):
    """Also where scores have left the cache again before the run was killed."""
    whole = tmp_path / "whole.jsonl"
    listener = Reports()
    run_job(cached_job(neighbourly, source, whole, entries), listener)
    assert listener.total.cached > 0
    kills = 0
    for killed_at in range(1, GUARD, 3):
        output = tmp_path / "out.jsonl"
        job, died = cached_job(neighbourly, source, output, entries), False
        with pytest.MonkeyPatch.context() as patch:
            KillAtStep(patch, resume.os, ["fsync", "ftruncate"], killed_at)
            try:
                run_job(job)
            except ProcessKilled:
                died = True
        if not died:
            break
        kills += 1
        run_job(job)
        assert output.read_bytes() == whole.read_bytes(), killed_at
        assert leftovers(tmp_path) == []
        assert not Path(f"{output}.scores").exists()
        for ending in ("", ".job.json"):
            Path(f"{output}{ending}").unlink()
    else:
        pytest.fail("the run never came to its end")
    assert kills > listener.windows // 3


def test_notes_that_another_program_changed_are_refused(neighbourly, source, tmp_path):
    output = tmp_path / "out.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("offline_jobs.make_job", cached_job)
        job = interrupted(neighbourly, source, output)
    notes = Path(f"{output}.scores")
    assert notes.stat().st_size == read_state(output)["scores"]["bytes"] > 0
    notes.write_bytes(notes.read_bytes()[:-1] + b"x")
    with pytest.raises(InvalidInput, match=r"out\.jsonl\.scores is not what its job wrote"):
        run_job(job)


def test_a_job_is_resumed_with_the_cache_that_it_began_with(neighbourly, source, tmp_path):
    output = tmp_path / "out.jsonl"
    interrupted(neighbourly, source, output, budget=90)
    with pytest.raises(InvalidInput, match="score_cache was None, is 30720"):
        run_job(cached_job(neighbourly, source, output))


def test_batch_caches_unless_told_otherwise(neighbourly, source, tmp_path):
    for number, (flags, size) in enumerate([([], 64_000_000), (["--score-cache", "0"], 0)]):
        output = tmp_path / f"out{number}.jsonl"
        words = ["batch", str(source), "-o", str(output), "--model", str(neighbourly), "--quiet"]
        done = CliRunner().invoke(cli, [*words, *flags])
        assert done.exit_code == 0, done.output
        assert read_state(output)["identity"]["score_cache"] == size


def test_a_cache_on_ray_is_refused(source, tmp_path):
    words = ["batch", str(source), "-o", str(tmp_path / "out.jsonl"), "--score-cache", "1MB"]
    done = CliRunner().invoke(cli, [*words, "--ray"])
    assert "--score-cache: is of no use on Ray" in str(done.exception)
