"""The HTTP server as an application of Ray Serve, with workers on any machine of the cluster.

``serve run echelon.integrations.ray.serve:app model=demo``, or a YAML file under ``deploy/ray``.
Each replica of the one deployment is a complete server (tokenizer, queue, admission) whose workers
are actors: a worker takes the next step when it is about to be free, so the next step always goes
to the worker with the fewest tokens left (docs/decisions/0010-ray.md).
"""

from __future__ import annotations

import logging
import signal
import threading
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import ray
from ray import serve

from echelon.errors import InvalidInput, ShuttingDown, check_positive
from echelon.integrations.ray.worker import RayWorker, WorkerResources, connect, factory_of
from echelon.messages import asked_language, in_language
from echelon.options import require_packages
from echelon.scheduling.autoscaling import AutoscalingLimits
from echelon.server import settings as server_settings
from echelon.server.app import make_app
from echelon.server.context import server_of
from echelon.server.http_server import GRACE_S, KEEP_ALIVE_S
from echelon.server.limits import flag_of

if TYPE_CHECKING:
    import os
    from collections.abc import Callable

    from ray.serve import Application

    from echelon.engine.launch import MakeWorker, PreparedModel
    from echelon.options import Options
    from echelon.server.app import HttpMiddleware
    from echelon.server.context import ServerContext

logger = logging.getLogger(__name__)

NAME = "echelon"
"""Name of the application and of the deployment."""

SET_ELSEWHERE = {
    **dict.fromkeys(("host", "port"), "http_options of Ray Serve"),
    **dict.fromkeys(("log_format", "log_level"), "logging_config of Ray Serve"),
    **dict.fromkeys(("max_connections", "tls_cert", "tls_key"), "a proxy in front of Ray Serve"),
    "header_timeout_s": "the environment of Ray Serve's proxies",
}
"""Settings of ``echelon serve`` that Ray has its own place for, and that place."""

ANY_ADDRESS = "0.0.0.0"  # noqa: S104 - where Ray's proxies listen is set elsewhere
"""Address of an application: its proxies may be reached from anywhere, under any name."""

REFUSED_REQUESTS = 64
"""Requests that a replica takes in addition, to refuse them itself with the reason."""


class Ingress:
    """One replica: a server whose workers are actors."""

    def __init__(self, build: Callable[[], ServerContext]) -> None:
        self._context = build()

    def __serve_build_asgi_app__(self) -> HttpMiddleware:
        """The application."""
        return make_app(self._context)

    async def check_health(self) -> None:
        """Check that a pair was scored lately; raise :class:`ShuttingDown` if none was.

        A replica without workers is healthy: its requests wait until workers are back. A new
        replica would have no workers either, and the waiting requests would be lost.
        """
        service = self._context.service
        if service.snapshot().workers_up == 0:
            return
        found = await service.ready()
        if not found.ready:
            raise ShuttingDown(f"The replica is not ready: {found.reason}")


def deploy(
    build: Callable[[], ServerContext],
    *,
    ingresses: int = 1,
    max_requests: int = 512,
    drain_s: float = 30.0,
    **more: Any,
) -> Application:
    """The application whose replicas are the servers that ``build`` makes.

    Ray's own limit of requests is above ``max_requests``; ``more`` are settings of the deployment.
    """
    # With a CPU of its own it could take the place of a worker that it then waits for.
    more.setdefault("ray_actor_options", {"num_cpus": 0})
    deployment = serve.deployment(
        name=NAME,
        num_replicas=ingresses,
        max_ongoing_requests=max_requests + REFUSED_REQUESTS,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=drain_s + GRACE_S,
        **more,
    )(serve.ingress()(Ingress))
    application: Application = deployment.bind(build)
    return application


def app(settings: dict[str, Any]) -> Application:
    """The application of a model, for ``serve run`` and ``serve deploy``.

    ``settings`` are ``model``, and settings of `echelon serve` under the names of its flags.
    """
    for name in settings:
        if name in SET_ELSEWHERE:
            raise InvalidInput(name, "is not set here", f"Set it in {SET_ELSEWHERE[name]}.")
    return application_of(plan_of(values_of(settings)))


def values_of(settings: dict[str, Any]) -> dict[str, Any]:
    """All settings of ``echelon serve``: those given, the environment's and the defaults."""
    known = ["model", *(name for name in server_settings.NAMES if name != "ray")]
    server_settings.check_names(settings, known, "args")
    if "model" not in settings:
        raise InvalidInput("args", "there is no model", "Name one: model=demo.")
    given = {name: value for name, value in settings.items() if name != "model"}
    values = server_settings.complete(given)
    del values["ray"]
    values["host"] = ANY_ADDRESS
    return {"model": str(settings["model"]), **values}


@dataclass(frozen=True, slots=True)
class DeploymentPlan:
    """The settings of a server on Ray; it is sent to the replicas, which call it."""

    model: str
    options: Options
    settings: dict[str, Any]
    resources: WorkerResources
    scaling: AutoscalingLimits
    ingresses: int
    language: str | None = field(default_factory=asked_language)  # of its pages

    def __call__(self) -> ServerContext:
        """The server of a replica."""
        with in_language(self.language):
            return server_of(
                self.model,
                self.options,
                self.settings,
                scaling=self.scaling,
                worker_factory=partial(_make_workers, self.resources),
            )


def plan_of(values: dict[str, Any]) -> DeploymentPlan:
    """The deployment that the settings of ``echelon serve`` describe."""
    values = dict(values)
    model = values.pop("model")
    flags = map(server_settings.name_of_flag, server_settings.CLUSTER_FLAGS)
    own = {name: values.pop(name) for name in flags}
    settings, options = server_settings.split(values)
    for name in ("tls_cert", "tls_key"):
        if settings[name] is not None:
            raise InvalidInput(
                flag_of(name), "Ray Serve has no TLS", "Put a proxy in front that has."
            )
    check_positive(ingresses=own["ingresses"])
    workers = settings["workers"]
    max_workers = workers if own["max_workers"] is None else own["max_workers"]
    return DeploymentPlan(
        model=model,
        options=options,
        settings=settings,
        resources=WorkerResources(own["worker_cpus"], own["worker_gpus"]),
        scaling=AutoscalingLimits(workers, max_workers, delay_s=own["max_delay_s"]),
        ingresses=own["ingresses"],
    )


def application_of(plan: DeploymentPlan) -> Application:
    """The application of a plan."""
    require_packages("echelon serve", "serve", server_settings.PACKAGES)
    limits = {name: plan.settings[name] for name in ("max_requests", "drain_s")}
    return deploy(plan, ingresses=plan.ingresses, **limits)


def _make_workers(
    resources: WorkerResources, prepared: PreparedModel, model: str | os.PathLike[str]
) -> MakeWorker:
    resources = resources.on_cluster(prepared.options.device)
    factory = factory_of(prepared, model, resources)

    def make(number: int, on_end: Callable[[], None]) -> RayWorker:
        return RayWorker(factory, resources, f"worker {number}", on_end=on_end)

    return make


def run_here(address: str, values: dict[str, Any]) -> None:
    """Serve on a cluster until SIGTERM or Ctrl-C; for ``echelon serve --ray``."""
    plan = plan_of(values)
    application = application_of(plan)
    connect(address)
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    host, port = plan.settings["host"], plan.settings["port"]
    http = {"host": host, "port": port, "keep_alive_timeout_s": KEEP_ALIVE_S}
    serve.start(proxy_location="EveryNode", http_options=http)
    try:
        serve.run(application, name=NAME)
        logger.warning("Serving at http://%s:%d on every machine of the cluster", host, port)
        stopped.wait()
    finally:
        serve.delete(NAME)
        ray.shutdown()
