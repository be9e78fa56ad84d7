"""``--ray`` of ``echelon serve`` and ``echelon batch``. Ray is loaded when it is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from echelon.errors import InvalidInput
from echelon.offline.command import batch as plain_batch
from echelon.options import require_packages
from echelon.server.settings import config as plain_config
from echelon.server.settings import serve as plain_serve

if TYPE_CHECKING:
    from collections.abc import Callable

HERE = "auto"
"""``--ray`` without an address: the cluster that Ray finds, or else one of this machine alone."""


def ray_option() -> click.Option:
    """``--ray [ADDRESS]``; a command's last flag, or with ``=``."""
    words = "Score on a Ray cluster: the one that runs here, or at ADDRESS."
    return click.Option(
        ["--ray"], is_flag=False, flag_value=HERE, metavar="[ADDRESS]", help=words, default=None
    )


def scale_options() -> list[click.Option]:
    """What only a server on Ray has."""
    words = {
        "most": "Workers there may be on Ray [--workers].",
        "delay": "Seconds of predicted waiting beyond which Ray gets more workers.",
        "cpus": "CPUs of a worker on Ray.",
        "gpus": "GPUs of a worker on Ray; 0.5 lets two share one.",
        "ingresses": "HTTP replicas on Ray, each with workers of its own.",
    }
    return [
        click.Option(["--max-workers"], type=int, help=words["most"]),
        click.Option(["--worker-cpus"], default=1.0, show_default=True, help=words["cpus"]),
        click.Option(["--worker-gpus"], default=0.0, show_default=True, help=words["gpus"]),
        click.Option(["--max-delay-s"], default=2.0, show_default=True, help=words["delay"]),
        click.Option(["--ingresses"], default=1, show_default=True, help=words["ingresses"]),
    ]


SCALE = tuple(option.name or "" for option in scale_options())
"""Their names."""


def _extended(
    command: click.Command, callback: Callable[..., Any], options: list[click.Option]
) -> click.Command:
    """A command with options of Ray, and what it then does."""
    return click.Command(
        command.name,
        context_settings=command.context_settings,
        callback=callback,
        params=[*command.params, ray_option(), *options],
        help=command.help,
    )


def _serve(*, model: str, ray: str | None, **values: Any) -> None:
    if ray is None:
        for name in SCALE:
            del values[name]
        _call(plain_serve, model=model, **values)
        return
    require_packages("--ray", "ray", ["ray"])
    from echelon.integrations.ray.serve import run_here

    run_here(ray, {"model": model, **values})


def _config(**values: Any) -> None:
    _call(plain_config, **values)


def _batch(
    *,
    ray: str | None,
    workers: int | None,
    worker_cpus: float | None,
    worker_gpus: float,
    **values: Any,
) -> None:
    if ray is None:
        if workers is not None:
            raise InvalidInput("--workers", "is of use on Ray only", "Add --ray.")
        _call(plain_batch, **values)
        return
    require_packages("--ray", "ray", ["ray"])
    from functools import partial

    from echelon.integrations.ray.scorer_pool import PoolRequest, RayScorerPool
    from echelon.integrations.ray.worker import connect
    from echelon.offline.command import rerank_file

    wanted = PoolRequest(workers, worker_cpus, worker_gpus)
    quiet, compare = values.pop("quiet"), values.pop("compare")
    connect(ray)
    rerank_file(values, partial(RayScorerPool, wanted=wanted), quiet=quiet, compare=compare)


def _call(command: click.Command, **values: Any) -> None:
    """Do what a plain command does."""
    if command.callback is None:
        raise AssertionError(f"{command.name} does nothing. This is a bug.")
    command.callback(**values)


def _file_options() -> list[click.Option]:
    cpus = "CPUs of a worker on Ray [--threads, or all of this machine; 1 beside a GPU]."
    gpus = "GPUs of a worker on Ray; 0.5 lets two share one."
    return [
        click.Option(["--workers"], type=int, help="Workers on Ray [as many as have room]."),
        click.Option(["--worker-cpus"], type=float, help=cpus),
        click.Option(["--worker-gpus"], default=0.0, show_default=True, help=gpus),
    ]


serve = _extended(plain_serve, _serve, scale_options())
"""``echelon serve``, here or on Ray."""

config = _extended(plain_config, _config, scale_options())
"""``echelon config``, which knows of both."""

batch = _extended(plain_batch, _batch, _file_options())
"""``echelon batch``, here or on Ray."""
