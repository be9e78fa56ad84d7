"""The scorer in a child process, with real processes and real signals."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from functools import partial

import numpy as np
import psutil
import pytest
import scorers
from scorers import Obedient, batch_of

from echelon.engine.worker import ChildWorker
from echelon.errors import InvalidInput, ModelNotFound, ScoringFailed
from echelon.models.base import DeviceOutOfMemory, FakeScorer, WorkerDied, WorkerWedged

GUARD_S = 60.0
"""No test waits so long unless something hangs."""


@pytest.fixture
def worker():
    made = ChildWorker(partial(Obedient, 1000), "worker 0")
    made.start("fp32")
    yield made
    made.stop()


def test_the_same_scores_and_info_as_in_this_process(worker):
    batch = batch_of([1, 2, 3], [4, 5])
    scored = worker.score(batch, GUARD_S)
    assert scored.logits.tolist() == FakeScorer().score(batch).tolist()
    assert scored.logits.dtype == np.float32
    assert scored.seconds > 0
    assert scored.resident_bytes > 2**20
    worker.stop()
    assert worker.start("bf16") == FakeScorer(precision="bf16").info


def test_a_second_step_may_be_sent_while_the_first_runs(worker):
    batches = [batch_of([number, scorers.NAP]) for number in range(2)]
    for batch in batches:
        worker.send(batch, GUARD_S)
    for batch in batches:
        assert worker.receive(GUARD_S).logits.tolist() == FakeScorer().score(batch).tolist()
    assert not worker.wait(0)


def test_large_steps_pass(worker):
    worker = ChildWorker(FakeScorer)
    worker.start("fp32")
    batch = batch_of(list(range(500_000)))
    for _ in range(2):
        worker.send(batch, GUARD_S)
    assert [len(worker.receive(GUARD_S).logits) for _ in range(2)] == [1, 1]
    worker.stop()


def test_out_of_memory_arrives_and_the_worker_lives_on(worker):
    pid = worker.pid
    with pytest.raises(DeviceOutOfMemory, match="1001 tokens over 1000"):
        worker.score(batch_of([1] * 1001), GUARD_S)
    worker.release()
    assert len(worker.score(batch_of([1]), GUARD_S).logits) == 1
    assert worker.pid == pid


def test_errors_of_the_scorer_arrive_and_the_worker_lives_on(worker, caplog):
    with pytest.raises(ScoringFailed, match="RuntimeError: the device is on fire"):
        worker.score(batch_of([scorers.RAISE]), GUARD_S)
    with pytest.raises(InvalidInput) as caught:
        worker.score(batch_of([scorers.REFUSE]), GUARD_S)
    assert (caught.value.field, caught.value.remedy) == ("precision", "Use another.")
    assert len(worker.score(batch_of([1]), GUARD_S).logits) == 1
    worker.stop()
    until(lambda: "worker 0: RuntimeError: the device is on fire" in caplog.text)
    assert "scorers.py" in caplog.text


def test_what_the_child_prints_goes_to_the_log(worker, caplog):
    with caplog.at_level(logging.WARNING):
        worker.score(batch_of([scorers.SAY]), GUARD_S)
        until(lambda: "worker 0: something to say" in caplog.text)


def test_a_killed_child_is_noticed_and_can_be_started_again(worker):
    worker.send(batch_of([scorers.HANG]), GUARD_S)
    worker.send(batch_of([1]), GUARD_S)
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(WorkerDied, match=r"worker 0 \(process \d+\) ended by signal 9"):
        worker.receive(GUARD_S)
    with pytest.raises(WorkerDied):
        worker.send(batch_of([1]), GUARD_S)
    worker.start("fp32")
    assert len(worker.score(batch_of([1]), GUARD_S).logits) == 1


@pytest.mark.parametrize("command", [scorers.STOP, scorers.HANG])
def test_a_wedged_child_is_killed(worker, command):
    pid = worker.pid
    with pytest.raises(WorkerWedged, match=r"gave no answer for 0\.2 s and was killed"):
        worker.score(batch_of([command]), 0.2)
    assert gone(pid)


def test_a_child_that_does_not_read_cannot_block_us(worker):
    os.kill(worker.pid, signal.SIGSTOP)
    batch = batch_of(list(range(1_000_000)))
    with pytest.raises(WorkerWedged, match=r"read nothing for 0\.2 s"):
        worker.send(batch, 0.2)


def test_memory_is_reported_after_each_step(worker):
    before = worker.score(batch_of([1]), GUARD_S).resident_bytes
    after = worker.score(batch_of([scorers.GROW]), GUARD_S).resident_bytes
    assert after - before > 100 * 2**20


def test_errors_while_opening():
    with pytest.raises(ModelNotFound, match="no such folder"):
        ChildWorker(scorers.missing).start()
    with pytest.raises(WorkerDied, match="ended with exit code 3"):
        ChildWorker(scorers.dying).start()
    with pytest.raises(WorkerWedged, match=r"did not open its model in 0\.5 s"):
        ChildWorker(scorers.hanging, start_timeout_s=0.5).start()


def test_a_stopped_child_has_gone_whatever_it_did():
    for command in (1, scorers.HANG):
        worker = ChildWorker(Obedient)
        worker.start()
        worker.send(batch_of([command]), GUARD_S)
        worker.kill() if command == scorers.HANG else worker.stop()
        assert gone(worker.pid)
        worker.stop()
        worker.stop()


def test_signals_to_all_processes_do_not_end_the_child(worker):
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(worker.pid, number)
    assert len(worker.score(batch_of([1]), GUARD_S).logits) == 1


PARENT = """
import os, signal, sys
from functools import partial
import scorers
from echelon.engine.worker import ChildWorker

worker = ChildWorker(scorers.Obedient)
worker.start()
worker.send(scorers.batch_of([int(sys.argv[1])]), 60)
print(worker.pid, "torch" in sys.modules, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("command", [1, scorers.HANG])
def test_the_child_dies_with_its_parent_and_the_parent_needs_no_torch(command):
    ran = subprocess.run(
        [sys.executable, "-c", PARENT, str(command)],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        timeout=GUARD_S,
    )
    assert ran.returncode == -signal.SIGKILL
    pid, torch = ran.stdout.split()
    assert torch == "False"
    until(lambda: gone(int(pid)))


def gone(pid: int) -> bool:
    """Whether a process has ended, reaped or not."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def until(condition) -> None:
    """Wait for something that must come."""
    guard = time.monotonic() + GUARD_S
    while not condition():
        assert time.monotonic() < guard, "it never came"
        time.sleep(0.01)
