"""How passes are captured, on a stand-in for ``torch.cuda`` that writes down what it is asked."""

from __future__ import annotations

from contextlib import contextmanager
from itertools import count

import pytest
import torch

from echelon.models.cuda_graphs import CudaRecorder


class Stream:
    def __init__(self, *_):
        self.waited_for = []

    def wait_stream(self, other):
        self.waited_for.append(other)


class Card:
    """The parts of ``torch.cuda`` that capturing uses."""

    def __init__(self, monkeypatch):
        self.log, self.pools, self.current = [], count(1), Stream()
        self.fail_at_end = False
        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: Graph(self.log))
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(self.pools))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: self.current)
        for name in ("device", "stream", "graph"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))

    @contextmanager
    def device(self, device):
        yield

    @contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def graph(self, graph, *, pool, stream, capture_error_mode):
        assert stream is self.current
        self.log.append(("begin", pool, capture_error_mode))
        yield
        self.log.append("end")
        if self.fail_at_end:
            raise RuntimeError("capture was invalidated")


class Graph:
    def __init__(self, log):
        self.log = log

    def replay(self):
        self.log.append("replay")

    def reset(self):
        self.log.append("reset")


@pytest.fixture
def card(monkeypatch):
    return Card(monkeypatch)


def working(card):
    def work():
        card.log.append("work")
        return torch.zeros(3)

    return work


def test_work_runs_once_before_it_is_captured_and_streams_wait_for_each_other(card):
    outside = card.current
    recording = CudaRecorder(torch.device("cuda", 0))(working(card))
    assert card.log == ["work", ("begin", 1, "thread_local"), "work", "end"]
    assert card.current is outside
    (aside,) = outside.waited_for
    assert aside.waited_for == [outside]
    recording.replay()
    recording.drop()
    assert card.log[-2:] == ["replay", "reset"]
    assert recording.output.shape == (3,)


def test_graphs_share_a_pool_until_the_last_is_gone(card):
    recorder = CudaRecorder(torch.device("cuda", 0))
    first, second = (recorder(working(card)) for _ in range(2))
    first.drop()
    third = recorder(working(card))
    second.drop()
    third.drop()
    recorder(working(card))
    pools = [entry[1] for entry in card.log if entry[0] == "begin"]
    assert pools == [1, 1, 1, 2]


def test_a_failed_capture_keeps_neither_pool_nor_count(card):
    recorder, outside = CudaRecorder(torch.device("cuda", 0)), card.current
    card.fail_at_end = True
    with pytest.raises(RuntimeError, match="invalidated"):
        recorder(working(card))
    assert card.current is outside
    card.fail_at_end = False
    recorder(working(card)).drop()
    recorder(working(card))
    assert [entry[1] for entry in card.log if entry[0] == "begin"] == [1, 2, 3]
