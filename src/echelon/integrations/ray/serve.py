"""The server on Ray Serve: the same HTTP application, its workers anywhere in the cluster.

``serve run echelon.integrations.ray.serve:app model=demo`` or a YAML file under ``deploy/ray``.
Each replica
of the one deployment is a whole server (tokeniser, queue, admission) whose workers are actors: a
worker takes a step whenever it is about to be free, so the one with the fewest tokens before it is
always the next (docs/decisions/0010-ray.md).
"""

from __future__ import annotations

import logging
import signal
import threading
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import ray
from ray import serve

from echelon.errors import InvalidInput, ShuttingDown
from echelon.integrations.ray.command import SCALE
from echelon.integrations.ray.command import serve as command
from echelon.integrations.ray.worker import RayWorker, WorkerResources, abroad, connect
from echelon.options import require_packages
from echelon.scheduling.autoscaling import AutoscalingLimits
from echelon.server.app import make_app
from echelon.server.http_server import GRACE_S, KEEP_ALIVE_S
from echelon.server.settings import PACKAGES, PREFIX, check_names, house_of, split

if TYPE_CHECKING:
    import os
    from collections.abc import Callable

    from ray.serve import Application

    from echelon.engine.launch import MakeWorker, PreparedModel
    from echelon.options import Options
    from echelon.server.app import RequestIdMiddleware
    from echelon.server.context import ServerContext

logger = logging.getLogger(__name__)

NAME = "echelon"
"""The application's and the deployment's name."""

ELSEWHERE = {
    "host": "http_options of Ray Serve",
    "port": "http_options of Ray Serve",
    "header_timeout_s": "the environment of Ray Serve's proxies",
    "max_connections": "a proxy in front of Ray Serve",
    "log_format": "logging_config of Ray Serve",
    "log_level": "logging_config of Ray Serve",
    "tls_cert": "a proxy in front of Ray Serve",
    "tls_key": "a proxy in front of Ray Serve",
}
"""Settings of ``echelon serve`` that are Ray's affair here, and whose."""

NO_TLS = ("tls_cert", "tls_key")
"""What no server on Ray can have."""

BESIDE = 64
"""Requests that a replica takes in beyond those inside, to refuse them with the reason itself."""


class Ingress:
    """One replica: a server whose workers are elsewhere.

    Args:
        build: gives the server.
    """

    def __init__(self, build: Callable[[], ServerContext]) -> None:
        self._house = build()

    def __serve_build_asgi_app__(self) -> RequestIdMiddleware:
        """The application."""
        return make_app(self._house)

    async def check_health(self) -> None:
        """Whether a pair was really scored lately.

        A replica without workers is not ill: they come back, and its requests wait for them; a new
        replica would have none either, and those requests would be lost.

        Raises:
            ShuttingDown: it has workers, and none of them scores.
        """
        service = self._house.service
        if service.snapshot().workers == 0:
            return
        found = await service.ready()
        if not found.ready:
            raise ShuttingDown(f"The canary was not scored: {found.reason}")


def deploy(
    build: Callable[[], ServerContext],
    *,
    ingresses: int = 1,
    max_requests: int = 512,
    drain_s: float = 30.0,
    **more: Any,
) -> Application:
    """The application of servers that ``build`` gives.

    Args:
        build: gives a server; it runs in each replica.
        ingresses: replicas.
        max_requests: requests that one lets in; Ray's own bound is beyond it.
        drain_s: seconds that one has to answer what is inside, at its end.
        **more: other settings of the deployment.
    """
    # With a CPU of its own it could take the place of a worker that it then waits for.
    more.setdefault("ray_actor_options", {"num_cpus": 0})
    deployment = serve.deployment(
        name=NAME,
        num_replicas=ingresses,
        max_ongoing_requests=max_requests + BESIDE,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=drain_s + GRACE_S,
        **more,
    )(serve.ingress()(Ingress))
    application: Application = deployment.bind(build)
    return application


def app(settings: dict[str, Any]) -> Application:
    """The application of a model, for ``serve run`` and ``serve deploy``.

    Args:
        settings: ``model``, and what `echelon serve` has flags for, under the same names.

    Raises:
        InvalidInput: a setting is unknown or wrong.
    """
    for name in settings:
        if name in ELSEWHERE:
            raise InvalidInput(name, "is not set here", f"Set it in {ELSEWHERE[name]}.")
    return application_of(plan_of(values_of(settings)))


def values_of(settings: dict[str, Any]) -> dict[str, Any]:
    """All settings of ``echelon serve``: those given, the environment's and the defaults.

    Raises:
        InvalidInput: a setting is unknown, has a wrong value, or is missing.
    """
    import click

    known = [str(param.name) for param in command.params if param.name not in {"ray", "config"}]
    check_names(settings, known, "args")
    given = {name: value for name, value in settings.items() if name != "model"}
    try:
        context = command.make_context(
            "serve", [str(settings["model"])], default_map=given, auto_envvar_prefix=PREFIX
        )
    except KeyError:
        raise InvalidInput("args", "there is no model", "Name one: model=demo.") from None
    except click.UsageError as error:
        raise InvalidInput("args", error.format_message().rstrip("."), "Mend it.") from None
    return {name: value for name, value in context.params.items() if name != "ray"}


@dataclass(frozen=True, slots=True)
class DeploymentPlan:
    """What a server on Ray is made of; it travels to the replicas.

    Attributes:
        model: what to serve.
        options: of the model.
        door: settings of the HTTP server.
        share: what of a machine a worker has.
        scaling: between which bounds the number of workers is, and when it changes.
        ingresses: replicas.
    """

    model: str
    options: Options
    door: dict[str, Any]
    share: WorkerResources
    scaling: AutoscalingLimits
    ingresses: int

    def __call__(self) -> ServerContext:
        """The server of a replica."""
        hire = partial(_hire, self.share)
        return house_of(self.model, self.options, self.door, scaling=self.scaling, hire=hire)


def plan_of(values: dict[str, Any]) -> DeploymentPlan:
    """What the settings of ``echelon serve`` mean on Ray.

    Raises:
        InvalidInput: a value is wrong, or cannot be had on Ray.
    """
    values = dict(values)
    model = values.pop("model")
    own = {name: values.pop(name) for name in SCALE}
    door, options = split(values)
    for name in NO_TLS:
        if door[name] is not None:
            flag = f"--{name.replace('_', '-')}"
            raise InvalidInput(flag, "Ray Serve has no TLS", "Put a proxy in front that has.")
    if own["ingresses"] < 1:
        raise InvalidInput("ingresses", f"{own['ingresses']} is not positive", "Give 1 or more.")
    return DeploymentPlan(
        model=model,
        options=options,
        door=door,
        share=WorkerResources(own["worker_cpus"], own["worker_gpus"]),
        scaling=AutoscalingLimits(
            least=door["workers"],
            most=door["workers"] if own["max_workers"] is None else own["max_workers"],
            delay_s=own["max_delay_s"],
        ),
        ingresses=own["ingresses"],
    )


def application_of(plan: DeploymentPlan) -> Application:
    """The application of a plan."""
    require_packages("echelon serve", "serve", PACKAGES)
    return deploy(
        plan,
        ingresses=plan.ingresses,
        max_requests=plan.door["max_requests"],
        drain_s=plan.door["drain_s"],
    )


def _hire(
    share: WorkerResources, prepared: PreparedModel, model: str | os.PathLike[str]
) -> MakeWorker:
    opener = abroad(prepared, model, share.cpus)

    def make(number: int, ended: Callable[[], None]) -> RayWorker:
        return RayWorker(opener, share, f"worker {number}", on_end=ended)

    return make


def run_here(address: str, values: dict[str, Any]) -> None:
    """Serve on a cluster until told to end; for ``echelon serve --ray``.

    Args:
        address: the cluster's, or :data:`echelon.integrations.ray.command.HERE`.
        values: all settings of ``echelon serve``.

    Raises:
        InvalidInput: a setting is wrong, or no cluster is there.
    """
    plan = plan_of(values)
    application = application_of(plan)
    connect(address)
    told = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: told.set())
    host, port = plan.door["host"], plan.door["port"]
    http = {"host": host, "port": port, "keep_alive_timeout_s": KEEP_ALIVE_S}
    serve.start(proxy_location="EveryNode", http_options=http)
    try:
        serve.run(application, name=NAME)
        logger.warning("Serving at http://%s:%d on every machine of the cluster", host, port)
        told.wait()
    finally:
        serve.delete(NAME)
        ray.shutdown()
