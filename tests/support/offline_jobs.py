"""Offline jobs for tests: a model without weights, files, and a process that is killed."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

import pytest
from helpers import SENTENCES

from echelon.models.base import FakeScorer
from echelon.offline.job import OfflineJob
from echelon.offline.resume import VERSION, JobStore
from echelon.offline.run import run
from echelon.options import Options


class ForgetfulScorer(FakeScorer):
    """A fake scorer that does not remember its steps."""

    def score(self, batch):
        logits = super().score(batch)
        self.batches.clear()
        return logits


class CountingListener:
    """A job listener that only counts."""

    def __init__(self):
        self.windows = 0
        self.resumed_at = None

    def indexing(self, stage, done=0.0, total=0.0):
        """Nothing to show."""

    def resumed(self, counts, share):
        self.resumed_at = counts.pairs

    def loaded(self):
        """Nothing to show."""

    def step(self, pairs):
        """Nothing to show."""

    def window(self, scored):
        self.windows += 1


def queries(count, documents=6, seed=0):
    """Rows of JSONL."""
    chance = random.Random(seed)
    words = " ".join(SENTENCES).split()

    def text(max_words):
        return " ".join(chance.choice(words) for _ in range(chance.randint(1, max_words)))

    return [
        {
            "id": f"q{n}",
            "query": text(6),
            "documents": [
                {"id": f"d{i}", "text": text(30)} for i in range(chance.randint(0, documents))
            ],
        }
        for n in range(count)
    ]


def write_lines(path: Path, records) -> Path:
    path.write_text(
        "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records),
        encoding="utf-8",
    )
    return path


def read_lines(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def make_job(model, source, output, budget=8, threads=None, **more):
    """A job whose windows hold about twenty pairs."""
    options = Options(token_budget=budget, threads=threads)
    return OfflineJob(str(source), str(output), model=str(model), options=options, **more)


def run_job(job, listener=None):
    return run(job, listener or CountingListener())


def read_state(output):
    """The state of a job."""
    return json.loads(Path(f"{output}.job.json").read_text())[VERSION]


def write_state(output, state):
    """Replace the state of a job, with the digest that belongs to it."""
    digest = hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
    Path(f"{output}.job.json").write_text(json.dumps({VERSION: state, "sha256": digest}))


def interrupted(model, source, output, **more):
    """A job that stopped after three windows."""
    job = make_job(model, source, output, **more)
    with pytest.MonkeyPatch.context() as patch:
        KillAtStep(patch, JobStore, ["append"], 4)
        with pytest.raises(ProcessKilled):
            run_job(job)
    return job


def leftovers(folder):
    """Names of files that a finished job must not leave."""
    endings = (".part", ".index", ".new", ".building")
    return [path.name for path in Path(folder).iterdir() if path.name.endswith(endings)]


class ProcessKilled(BaseException):
    """Raised in place of a kill of the process."""


class KillAtStep:
    """Raises ProcessKilled at the n-th call of the named functions, which write to disk."""

    def __init__(self, monkeypatch, target, names, killed_at):
        self.left = killed_at
        for name in names:
            monkeypatch.setattr(target, name, self.stepping(getattr(target, name)))

    def stepping(self, original):
        def step(*arguments, **keywords):
            self.left -= 1
            if self.left == 0:
                raise ProcessKilled
            return original(*arguments, **keywords)

        return step
