"""Many machines: a Ray cluster of several nodes on this one, in which workers and nodes die."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from concurrent.futures import Future
from contextlib import closing
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import httpx
import pytest

pytest.importorskip("ray", reason="Ray is in an extra of its own")

import ray
import scorers
from clusters import (
    Fake,
    Lethal,
    Load,
    Numb,
    actors,
    cluster,
    cut,
    deployed,
    free_port,
    machine,
    run,
    run_fake,
    serve_at,
    service,
)
from offline_jobs import CountingListener, make_job, queries, read_lines, run_job, write_lines
from ray import serve
from ray.exceptions import ActorUnavailableError
from scorers import Obedient, Poisoned
from services import RecordingListener, coded, scores, submit, texts, until
from services import run as run_here
from services import service as local_service

from echelon.errors import ModelNotFound, Overloaded, ShuttingDown, WorkerLost
from echelon.integrations.ray.scorer_pool import PoolRequest, RayScorerPool
from echelon.integrations.ray.serve import NAME, Ingress
from echelon.offline.readers import Row
from echelon.offline.run import run as run_file
from echelon.offline.scoring import RowWindow
from echelon.options import Options
from echelon.reranker import Reranker
from echelon.scheduling.autoscaling import AutoscalingLimits

DOCUMENTS = ("A bird has feathers and wings.", "Stones are hard.", "The cat sleeps all day long.")

slow = partial(Obedient, pace_s=0.00002)
slower = partial(Obedient, pace_s=0.0001)


@pytest.fixture(scope="module")
def made():
    with cluster() as made, machine(made):
        yield made


async def answered(service, seeds) -> None:
    answers = await asyncio.gather(*(submit(service, texts(seed, 20)) for seed in seeds))
    for seed, answer in zip(seeds, answers, strict=True):
        assert answer.logits.tolist() == scores(texts(seed, 20))


# Workers.


def test_a_worker_elsewhere_scores_as_one_here(made):
    async def main(it):
        await answered(it, range(20))
        assert it.info.family == "fake"
        assert (await it.ready()).ready

    run(main, service(slow, token_budget=1500))


def test_trouble_elsewhere_is_dealt_with_as_here(made):
    listener = RecordingListener()

    async def main(it):
        answer = await submit(it, texts(1, 60))
        assert answer.logits.tolist() == scores(texts(1, 60))
        assert "halve_budget" in [step.rung for step in answer.ladder]
        assert isinstance(
            (await asyncio.gather(submit(it, coded(scorers.KILL)), return_exceptions=True))[0],
            WorkerLost,
        )
        await answered(it, range(3))

    run(main, service(partial(Obedient, 500), listener=listener))
    assert listener.states().count("died") == 2


def test_a_worker_whose_device_failed_is_replaced(made):
    listener = RecordingListener()
    lost = partial(Poisoned, "CUDA error: unspecified launch failure", 5)  # 3 are the warm-up

    async def main(it):
        for seed in range(3):
            await answered(it, [seed])

    run(main, service(lost, listener=listener, token_budget=1500))
    assert listener.states().count("died") == 2


def test_a_worker_that_hangs_is_replaced(made, tmp_path):
    listener = RecordingListener()

    async def main(it):
        first = asyncio.create_task(submit(it, coded(scorers.HANG)))
        await until(lambda: "wedged" in listener.states())
        first.cancel()
        await answered(it, range(3))

    run(main, service(Obedient, listener=listener, wedge_after_s=2.0))


def test_a_model_that_cannot_be_opened_elsewhere_is_told(made):
    with pytest.raises(ModelNotFound, match="no such folder"):
        run(None, service(scorers.missing))


def test_no_room_is_told_with_what_is_needed(made):
    with pytest.raises(WorkerLost, match="needs a machine with 2 CPUs and 0 GPUs"):
        run(None, service(Obedient, workers=2, start_timeout_s=2.0))


def test_a_connection_that_breaks_costs_neither_the_step_nor_the_worker(made):
    """Ray then says that the actor is unavailable, which passes; the model is not opened again."""
    listener = RecordingListener()

    async def main(it):
        supervisor = it._supervisors[0]
        pid = supervisor._worker.pid
        for seed in (1, 2):  # each while a step runs, then while nothing is asked
            answer = asyncio.create_task(submit(it, texts(seed, 20)))
            await until(lambda: supervisor._sent)
            await until(lambda: cut(pid))  # Ray connects anew when it likes
            assert (await answer).logits.tolist() == scores(texts(seed, 20))
            await until(lambda: cut(pid))
            await answered(it, range(3))
        assert supervisor._worker.pid == pid

    run(main, service(slower, listener=listener))
    assert listener.states() == ["starting", "up", "stopped"]


def test_an_actor_that_stays_out_of_reach_is_replaced(made, monkeypatch):
    """Whatever Ray tried failed: it is not known whether the machine went."""
    listener = RecordingListener()

    async def main(it):
        worker = it._supervisors[0]._worker
        pid, broken = worker.pid, Future()
        broken.set_exception(ActorUnavailableError("no route", None))
        await until(lambda: it._dispatcher._idle == 1)
        monkeypatch.setattr(worker, "send", lambda *_: worker._sent.append(broken))
        await asyncio.gather(answered(it, range(3)), restored(worker, pid))
        assert worker.pid != pid

    async def restored(worker, pid):
        await until(lambda: "died" in listener.states())
        monkeypatch.undo()

    run(main, service(slow, listener=listener))
    (event,) = (event for event in listener.of("WorkerChanged") if event.state == "died")
    assert event.detail == "worker 0: it could not be reached, nor on a second try"


def test_killed_workers_and_a_machine_that_goes_lose_nothing(made):
    listener, names = RecordingListener(), []

    async def main(it, second):
        load = asyncio.create_task(answered(it, range(220)))
        await until(lambda: {step.worker for step in listener.of("StepFinished")} == {0, 1})
        stays, goes = (supervisor._worker for supervisor in it._supervisors)
        if stays._machine == second.node_id:
            stays, goes = goes, stays
        names.extend((f"{stays.name} (process {stays.pid})", goes.name))
        os.kill(stays.pid, signal.SIGKILL)
        await until(lambda: listener.states().count("up") == 3)
        assert not load.done()
        await asyncio.to_thread(made.remove_node, second, allow_graceful=False)
        await load

    with machine(made) as second:
        run(
            partial(main, second=second),
            service(slow, listener=listener, workers=2, token_budget=300),
        )
    # A start on the machine that Ray does not yet know to have gone may fail too.
    killed, gone, *_ = (
        event.detail for event in listener.of("WorkerChanged") if event.state == "died"
    )
    assert killed.startswith(f"{names[0]} ended (")
    assert gone in {
        f"{names[1]}: its machine is lost",
        f"{names[1]}: it could not be reached, nor on a second try",
    }


# More workers and fewer.

CLIENTS, GOAL_S = 20, 1.2
"""One worker has nearly two seconds of work before it, and longer on a slow machine."""


def test_a_delay_starts_a_worker_on_another_machine_and_rest_ends_it(made):
    listener = RecordingListener()
    scaling = AutoscalingLimits(1, 2, delay_s=GOAL_S, up_s=0.5)
    stop = asyncio.Event()

    async def client(it, seed):
        while not stop.is_set():
            seed += 1000
            await answered(it, [seed])

    async def main(it):
        load = [asyncio.create_task(client(it, number)) for number in range(CLIENTS)]
        await until(lambda: {step.worker for step in listener.of("StepFinished")} == {0, 1})
        assert len({supervisor._worker._machine for supervisor in it._supervisors}) == 2
        stop.set()
        await asyncio.gather(*load)
        await split(it, listener)
        it._autoscaling.cancel()  # until now no rest was long enough, however slow the machine
        it._autoscaling = asyncio.create_task(it._autoscale(replace(scaling, down_s=1.0)))
        while it.snapshot().workers == 2:  # a little is asked now and then
            assert (await submit(it, texts(7, 1))).logits.tolist() == scores(texts(7, 1))
            await asyncio.sleep(0.05)
        await answered(it, range(3))

    with machine(made):
        run(main, service(slower, listener=listener, scaling=scaling, token_budget=1000))
    assert listener.states().count("up") == 2
    assert "died" not in listener.states()
    assert not any(step.again for step in listener.of("StepFinished"))
    assert {end.outcome for end in listener.of("RequestEnded")} == {"answered"}


async def split(it, listener):
    """A large request goes to all that are idle, where that ends sooner."""
    await until(lambda: it._dispatcher._idle == 2)
    before = len(listener.of("StepFinished"))
    await answered(it, [5])
    first, second = listener.of("StepFinished")[before:]
    assert {first.worker, second.worker} == {0, 1}
    assert first.requests == second.requests == 1


def test_a_worker_that_waits_for_room_ends_when_told(made):
    async def main(it):
        it.resize(2)
        await until(lambda: it.snapshot().workers == 2)
        await it.stop()

    run(main, service(Obedient, start_timeout_s=10_000.0))


# The server.


@pytest.fixture(scope="module")
def url(made):
    return serve_at(free_port())


def test_over_http_killed_workers_a_machine_and_an_update_lose_nothing(made, url):
    async def main(second):
        async with httpx.AsyncClient(base_url=url, timeout=120) as client:
            load = Load(client)
            await load.more(20)
            assert (await client.get("/info")).json()["model_id"] == "before"
            os.kill(actors("RemoteScorer")[0], signal.SIGKILL)
            await load.more(40)
            await asyncio.to_thread(made.remove_node, second, allow_graceful=False)
            await load.more(40)
            await asyncio.to_thread(run_fake, Fake(slow, 1, "after"))
            await load.more(20)
            assert (await client.get("/info")).json()["model_id"] == "after"
            await load.end()
            assert (await client.get("/ready")).status_code == 200

    with machine(made) as second, deployed(Fake(slow, 2, "before")):
        asyncio.run(main(second))


def test_the_command_serves_a_real_model_and_takes_it_away(made, url, bert):
    port = url.rpartition(":")[2]
    arguments = [str(bert), "--port", port, "--worker-cpus", "2", f"--ray={made.address}"]
    with subprocess.Popen(
        [sys.executable, "-m", "echelon", "serve", *arguments], stderr=subprocess.PIPE, text=True
    ) as server:
        try:
            lines = iter(server.stderr.readline, "")
            assert any(f"Serving at {url}" in line for line in lines)
            with Reranker(bert) as here, httpx.Client(base_url=url, timeout=120) as client:
                right = here.rank("what is a bird", DOCUMENTS).results
                body = {"query": "what is a bird", "documents": list(DOCUMENTS)}
                results = client.post("/v2/rerank", json=body).json()["results"]
                assert [hit["index"] for hit in results] == [hit.index for hit in right]
                assert [hit["relevance_score"] for hit in results] == pytest.approx(
                    [hit.score for hit in right], abs=1e-6
                )
        finally:
            server.send_signal(signal.SIGTERM)
        rest = server.stderr.read()
        assert server.wait() == 0, rest
    assert NAME not in serve.status().applications


# The replica's health.


def test_a_replica_without_workers_is_not_ill_and_one_whose_workers_hang_is():
    async def main(it):
        replica = Ingress(lambda: SimpleNamespace(service=it))
        await replica.check_health()
        it._dispatcher.last_scored = None
        it.clock = lambda: it._dispatcher.clock() + 10_000
        it._canary = asyncio.create_task(_refused())
        with pytest.raises(ShuttingDown, match="too many"):
            await replica.check_health()
        it._supervisors[0].up = False
        await replica.check_health()

    run_here(main, local_service())


async def _refused():
    raise Overloaded("too many", 1.0)


# Files.


class Saboteur(CountingListener):
    """Kills a worker after the second window, and takes a machine away after the fourth."""

    def __init__(self, made, second):
        super().__init__()
        self._deeds = {
            2: lambda: os.kill(actors("ScorerActor")[0], signal.SIGKILL),
            4: lambda: made.remove_node(second, allow_graceful=False),
        }

    def window(self, scored):
        super().window(scored)
        self._deeds.pop(self.windows, lambda: None)()
        self.all_done = not self._deeds


def test_a_file_that_loses_a_worker_and_a_machine_is_the_same_to_the_byte(made, bert, tmp_path):
    source = write_lines(tmp_path / "in.jsonl", queries(80))
    here = run_job(make_job(bert, source, tmp_path / "here.jsonl"))
    with machine(made) as second:
        saboteur = Saboteur(made, second)
        there = run_file(
            make_job(bert, source, tmp_path / "there.jsonl"),
            saboteur,
            partial(RayScorerPool, request=PoolRequest(workers=2, cpus=2)),
        )
    assert saboteur.all_done
    assert there.counts.pairs == here.counts.pairs > 200
    assert (tmp_path / "there.jsonl").read_bytes() == (tmp_path / "here.jsonl").read_bytes()


@pytest.mark.parametrize("actor", [Lethal, Numb])
def test_a_window_that_ends_every_worker_ends_the_job(made, bert, monkeypatch, actor):
    monkeypatch.setattr("echelon.integrations.ray.scorer_pool._ACTOR", ray.remote(actor))
    window = RowWindow((Row(7, None, "q", ("a", "b"), (None, None)),), (), None, (5, 5), None)
    request = PoolRequest(workers=1, cpus=2)
    with (
        closing(RayScorerPool(str(bert), Options(), None, request)) as machines,
        pytest.raises(WorkerLost, match="3 workers ended in turn from line 7"),
    ):
        list(machines.score([window]))


def test_a_model_that_is_not_there_ends_a_job_at_once(made, tmp_path):
    with pytest.raises(ModelNotFound):
        RayScorerPool(str(tmp_path / "nothing"), Options(), None)


def test_the_command_reranks_a_file_on_a_cluster(made, bert, tmp_path):
    source = write_lines(tmp_path / "in.jsonl", queries(3))
    arguments = ["--model", str(bert), "--worker-cpus", "2", "--quiet", f"--ray={made.address}"]
    command = [sys.executable, "-m", "echelon", "batch", source, "-o", tmp_path / "out.jsonl"]
    ran = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert [row["id"] for row in read_lines(tmp_path / "out.jsonl")] == ["q0", "q1", "q2"]
