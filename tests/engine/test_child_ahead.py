"""The child begins the next step while a device computes one, and answers in order."""

from __future__ import annotations

import pickle
import time
from queue import SimpleQueue
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import random_batch

from echelon.engine import child
from echelon.engine.worker import unpack
from echelon.models.base import DeviceOutOfMemory


class Device:
    """A scorer whose steps end when the next message has come, or were begun long ago."""

    def __init__(self, inbox):
        self.inbox, self.log = inbox, []
        self.full = False

    def start(self, batch):
        number = len(batch.ids)
        self.log.append(("start", number))
        if number == 13:
            raise DeviceOutOfMemory("no room", crowded=True)
        return SimpleNamespace(ready=self.inbox.empty, result=lambda: self.result(number))

    def result(self, number):
        self.log.append(("result", number))
        return np.array([number], np.float32)

    def release(self):
        self.log.append("release")

    def close(self):
        self.log.append("close")


def serve(*messages):
    """What the device did and what the child answered."""
    inbox = SimpleQueue()
    for message in messages:
        inbox.put(pickle.dumps(message))
    scorer, answers = Device(inbox), []
    child._serve(SimpleNamespace(send=answers.append), inbox, scorer)
    return scorer.log, answers


def score(length):
    return ("score", random_batch([length], 50, 0))


def test_steps_are_begun_ahead_and_answered_in_order():
    log, answers = serve(score(3), score(4), score(5), ("release",), ("stop",))
    assert log == [
        *(("start", 3), ("start", 4), ("result", 3), ("start", 5), ("result", 4), ("result", 5)),
        *("release", "close"),
    ]
    assert [float(answer.content[0]) for answer in answers] == [3, 4, 5]
    assert {answer.kind for answer in answers} == {"scores"}


def test_lack_of_memory_is_said_after_the_step_that_still_runs():
    log, answers = serve(score(3), score(13), score(4), ("stop",))
    assert [answer.kind for answer in answers] == ["scores", "memory", "scores"]
    assert log.index(("result", 3)) < log.index("release")
    with pytest.raises(DeviceOutOfMemory, match="no room") as caught:
        unpack(answers[1])
    assert caught.value.crowded


def test_a_steps_seconds_begin_when_the_device_was_free(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    step = child.BegunStep(Device(SimpleQueue()), score(3)[1])
    now[0] = 103.0
    assert step.reply().seconds == pytest.approx(3.0)
    assert step.reply(free_since=102.5).seconds == pytest.approx(0.5)
