"""What the tests on Ray share: a cluster on this machine, and servers without weights on it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil
import ray
from ray import serve
from ray.cluster_utils import Cluster
from services import LetterEncoder, scores, until
from services import run as run_guarded

from echelon.engine.child import fault_of
from echelon.engine.events import ServiceSettings
from echelon.engine.service import Service
from echelon.engine.worker import WorkerReply
from echelon.errors import DeviceLost
from echelon.integrations.ray.scorer_pool import ScorerActor
from echelon.integrations.ray.serve import NAME, deploy
from echelon.integrations.ray.worker import RayWorker, WorkerResources
from echelon.offline.scoring import Steps
from echelon.server.context import ServerContext
from echelon.server.metrics import Metrics

if TYPE_CHECKING:
    import httpx

STORE = 80 * 2**20
HEAD = {"head": 10}
SHARE = WorkerResources(cpus=2)
"""The head has no CPUs: workers go to other machines."""

GUARD_S = 300.0
"""Nothing here waits so long unless it hangs; starting actors on a busy computer takes its time."""

SYSTEM = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 300,
    "health_check_timeout_ms": 60_000,
    "health_check_failure_threshold": 8,
    "gcs_rpc_server_connect_timeout_s": 60,
    "gcs_rpc_server_reconnect_timeout_s": 600,
    "gcs_server_request_timeout_seconds": 300,
    "grpc_keepalive_time_ms": 300_000,
    "grpc_keepalive_timeout_ms": 300_000,
    "grpc_client_keepalive_timeout_ms": 300_000,
    "worker_register_timeout_seconds": 300,
    "agent_register_timeout_ms": 300_000,
    "memory_monitor_refresh_ms": 0,
    "enable_metrics_collection": False,
}
"""A machine that went refuses connections, which is noticed in three seconds, where Ray itself
takes fifteen. One that is only slow, on a busy computer or one that stalls, has eight minutes, and
no connection is given up meanwhile. Nothing is killed because others fill the memory."""

PATIENCE = {
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "300",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "300",
    "RAY_USAGE_STATS_ENABLED": "0",  # send no statistics
    **{f"RAY_{name}": str(value).lower() for name, value in SYSTEM.items()},
}
"""The same for the proxies of Ray Serve, which replaces slow ones, connections and all; and for
processes that have not yet read the settings from the head."""


@contextlib.contextmanager
def cluster():
    """A head without CPUs for workers; :func:`machine` adds some."""
    kept = dict(os.environ)
    os.environ.update(PATIENCE)
    os.environ["PYTHONPATH"] = os.pathsep.join(entry for entry in sys.path if entry)
    made = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 0,
            "resources": HEAD,
            "object_store_memory": STORE,
            "include_dashboard": False,
            "_system_config": SYSTEM,
        },
    )
    try:
        ray.init(made.address, logging_level=logging.ERROR, log_to_driver=False)
        yield made
    finally:
        serve.shutdown()
        ray.shutdown()
        made.remove_node(made.head_node, allow_graceful=False)
        os.environ.clear()
        os.environ.update(kept)


@contextlib.contextmanager
def machine(made: Cluster, workers: int = 1):
    """One more machine, with CPUs for a number of workers."""
    node = made.add_node(num_cpus=workers * SHARE.cpus, object_store_memory=STORE)
    ours = psutil.Process().children(recursive=True)
    try:
        yield node
    finally:
        if node in made.worker_nodes:
            made.remove_node(node, allow_graceful=False)
        _await_the_end_of(node)
        for process in ours:  # agents of a machine that was taken away may outlive it
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.ppid() == 1:
                    process.kill()


def _await_the_end_of(node) -> None:
    """Until Ray knows: what it still plans for that machine would fail in the test that follows."""
    ends = time.monotonic() + GUARD_S
    while any(one["NodeID"] == node.node_id and one["Alive"] for one in ray.nodes()):
        assert time.monotonic() < ends
        time.sleep(0.05)


def service(opener, *, listener=None, start_timeout_s=GUARD_S, **settings) -> Service:
    """A service whose workers are actors."""
    settings.setdefault("precision", "fp32")

    def make_worker(number, ended):
        return RayWorker(
            opener, SHARE, f"worker {number}", start_timeout_s=start_timeout_s, on_end=ended
        )

    return Service(LetterEncoder(), make_worker, ServiceSettings(**settings), listener=listener)


def run(main, made: Service):
    return run_guarded(main, made, GUARD_S)


def cut(pid: int) -> int:
    """Break the connections that this process has to an actor, as a network does; how many."""
    ports = {
        made.laddr.port
        for made in psutil.Process(pid).net_connections("tcp")
        if made.status == psutil.CONN_LISTEN
    }
    ours = [
        made
        for made in psutil.Process().net_connections("tcp")
        if made.raddr and made.raddr.port in ports
    ]
    for made in ours:
        with socket.socket(fileno=os.dup(made.fd)) as end:
            end.shutdown(socket.SHUT_RDWR)
    return len(ours)


@dataclass
class Fake:
    """Builds servers without weights; an object, so that it can travel to a replica."""

    opener: object
    workers: int = 1
    model: str = "fake"
    token_budget: int = 1500

    def __call__(self) -> ServerContext:
        metrics = Metrics()

        async def launch() -> Service:
            made = service(
                self.opener, listener=metrics, workers=self.workers, token_budget=self.token_budget
            )
            await made.start()
            return made

        return ServerContext(launch, self.model, metrics)


def actors(name: str) -> list[int]:
    """Processes of the cluster that are such actors."""
    ours = psutil.Process().children(recursive=True)
    return [process.pid for process in ours if f"ray::{name}" in " ".join(process.cmdline())]


class Lethal(ScorerActor):
    """A worker without a model that no window leaves alive."""

    def open(self, model, options, steps, profile):
        steps = Steps(512, None, 130, 2048, "fake", 1, "fp32", kernels="off")
        found = steps, ray.get_runtime_context().get_node_id(), []
        return WorkerReply("steps", found, 0.0, 0)

    def score(self, window):
        os._exit(1)


class Numb(Lethal):
    """A worker whose device is lost with its first window."""

    def score(self, window):
        return fault_of(DeviceLost("CUDA error: uncorrectable ECC error encountered"))


def serve_at(port: int) -> str:
    serve.start(http_options={"host": "127.0.0.1", "port": port}, proxy_location="HeadOnly")
    return f"http://127.0.0.1:{port}"


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def run_fake(build: Fake) -> None:
    """Deploy a server on the head: another machine may be taken away."""
    options = {"num_cpus": 0, "resources": dict.fromkeys(HEAD, 1)}
    serve.run(deploy(build, drain_s=20.0, ray_actor_options=options), name=NAME)


@contextlib.contextmanager
def deployed(build: Fake):
    """A server on the cluster, which is gone afterwards whatever happens."""
    try:
        run_fake(build)
        yield
    finally:
        serve.delete(NAME)


async def ask(client: httpx.AsyncClient, seed: int, count: int = 10) -> None:
    """One request, whose answer must be right."""
    documents = [f"document {seed} {i} " + "x" * (7 * i % 40) for i in range(count)]
    query = f"query {seed}"
    body = {"query": query, "texts": documents, "raw_scores": True}
    answer = await client.post("/rerank", json=body)
    assert answer.status_code == 200, answer.text
    found = {hit["index"]: hit["score"] for hit in answer.json()}
    right = scores([(query, document) for document in documents])
    assert found == {index: float(score) for index, score in enumerate(right)}


class Load:
    """Clients that send one request after another until stopped."""

    def __init__(self, client: httpx.AsyncClient, clients: int = 4) -> None:
        self.answered = 0
        self._client = client
        self._stop = False
        self._tasks = [asyncio.create_task(self._ask(number)) for number in range(clients)]

    async def more(self, count: int) -> None:
        """Wait for a number of further answers, or a failure."""
        goal = self.answered + count
        await until(lambda: self.answered >= goal or any(task.done() for task in self._tasks))

    async def end(self) -> None:
        self._stop = True
        await asyncio.gather(*self._tasks)

    async def _ask(self, number: int) -> None:
        while not self._stop:
            await ask(self._client, number * 1000 + self.answered)
            self.answered += 1
