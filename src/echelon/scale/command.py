"""``--ray`` of ``echelon serve``. Imports click only; Ray is loaded when it is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from echelon.api.command import config as plain_config
from echelon.api.command import serve as plain_serve
from echelon.errors import MissingDependency

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


def _extended(command: click.Command, callback: Callable[..., Any]) -> click.Command:
    """A command with the options of Ray, and what it then does."""
    return click.Command(
        command.name,
        context_settings=command.context_settings,
        callback=callback,
        params=[*command.params, ray_option(), *scale_options()],
        help=command.help,
    )


def _serve(*, model: str, ray: str | None, **values: Any) -> None:
    if ray is None:
        for name in SCALE:
            del values[name]
        run: Callable[..., Any] | None = plain_serve.callback
        if run is None:
            raise AssertionError("serve does nothing. This is a bug.")
        run(model=model, **values)
        return
    require_ray()
    from echelon.scale.serve import run_here

    run_here(ray, {"model": model, **values})


serve = _extended(plain_serve, _serve)
"""``echelon serve``, here or on Ray."""

config = _extended(plain_config, plain_config.callback or _serve)
"""``echelon config``, which knows of both."""


def require_ray() -> None:
    """See that Ray is there.

    Raises:
        MissingDependency: it is not.
    """
    from importlib.util import find_spec

    if find_spec("ray") is None:
        raise MissingDependency(
            "--ray needs ray. Install it with: pip install 'echelon-rerank[ray]'"
        )
