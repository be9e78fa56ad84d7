"""The settings of ``echelon serve``: flags, environment and TOML file.

A flag overrides the environment (``ECHELON_SERVE_PORT`` for ``--port``), which overrides the file,
which overrides the default. Ray Serve's application takes the same settings as its arguments.
"""

from __future__ import annotations

import difflib
import math
import re
import tomllib
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from echelon.errors import InvalidInput, check_positive
from echelon.messages import tr
from echelon.options import Allowance, Options, Precision
from echelon.server.limits import described, flag_of
from echelon.types import Truncation

if TYPE_CHECKING:
    from collections.abc import Iterable

PREFIX = "ECHELON_SERVE"
"""Prefix of the environment variables."""

TABLE = "serve"
"""The file's table; other tables are for other programs."""

PACKAGES = ("httptools", "msgspec", "prometheus_client", "starlette", "uvicorn")
"""Packages of the extra ``serve`` that the server needs."""

ANY_CLUSTER = "auto"
"""``--ray`` without an address: the cluster that Ray finds, else a new one on this machine."""

MAX_PORT = 65535

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#\s,]+")
"""A web origin: scheme, host and perhaps a port, without a path."""

Flag = tuple[tuple[str, ...], dict[str, Any]]


def flag(*names: str, **settings: Any) -> Flag:
    """Describe a flag, whose help shows its default; see :func:`click.option`."""
    return names, {"show_default": settings.get("default") is not None, **settings}


def name_of_flag(described: Flag) -> str:
    """The name under which Python, TOML and the environment know a flag: ``max_length``."""
    return described[0][0].partition("/")[0].removeprefix("--").replace("-", "_")


MODEL_FLAGS: tuple[Flag, ...] = (
    flag("--device", default="auto", show_default=False, help="auto, cpu, cuda, cuda:N or mps."),
    flag(
        "--precision",
        type=click.Choice(get_args(Precision)),
        default="auto",
        help="Numbers of the model's layers; auto takes the profile's choice.",
    ),
    flag("--max-length", type=int, help="Maximum tokens of a pair [the model's limit]."),
    flag(
        "--truncation",
        type=click.Choice(get_args(Truncation)),
        default="longest_first",
        help="Which text loses tokens: the longer one, or the document (only_second).",
    ),
    flag("--instruction", help="What a language model is asked to judge [its own]."),
    flag("--threads", type=int, help="CPU threads [all the process may use]."),
    flag("--revision", help="Hub branch, tag or commit."),
    flag("--label", help="Output to score, for a head with several labels."),
)
"""How a model is loaded."""

STEP_FLAGS: tuple[Flag, ...] = (
    flag("--token-budget", type=int, help="Maximum tokens of a step."),
    flag("--batch-size", type=int, help="Maximum pairs of a step."),
    flag("--profile", help="Profile written by `echelon tune`."),
    flag(
        "--allow",
        multiple=True,
        type=click.Choice(get_args(Allowance)),
        help="What may be lowered when a single pair does not fit.",
    ),
)
"""How pairs are packed into steps."""

CACHE_SIZE = "64MB"
"""Memory of the score cache in `serve` and `batch`: 125,000 scores, and little beside a model."""

CACHE_FLAGS: tuple[Flag, ...] = (
    flag(
        "--score-cache",
        default=CACHE_SIZE,
        help="Memory in which scores are kept for pairs that come again, such as 256MB; 0 keeps "
        "none.",
    ),
)
"""Scores that are used again."""

SERVER_GROUPS: dict[str, tuple[Flag, ...]] = {
    "Address": (
        flag("--host", default="127.0.0.1", help="Address to listen on."),
        flag("--port", default=8080, help="Port; 0 takes a free one."),
        flag("--tls-cert", help="Certificate chain in PEM: serve HTTPS."),
        flag("--tls-key", help="Its private key in PEM."),
        flag("--served-name", help="Model name in responses [the model's own]."),
    ),
    "Access": (
        flag("--api-keys", help="File with API keys, one a line; ECHELON_API_KEYS adds more."),
        flag(
            "--rate-limit", help="Documents per key and time, such as 50/s or 900/min [no limit]."
        ),
        flag("--cors", multiple=True, help="Web origin that may read responses [none]."),
        flag(
            "--allowed-hosts",
            multiple=True,
            help="Host name that requests may have; * allows all [names of the loopback; all "
            "where --host is another address].",
        ),
    ),
    "Limits": tuple(
        flag(flag_of(name), default=default, help=bounds)
        for name, default, bounds, _ in described()
    ),
    "Load": (
        flag("--max-requests", default=512, help="Maximum requests in the server at once."),
        flag(
            "--max-wait-s",
            type=float,
            help="Maximum predicted wait of a request, in seconds [the latency goal that "
            "--slo-p99-ms or the profile names, else 5].",
        ),
        flag(
            "--slo-p99-ms",
            type=float,
            help="Latency goal: a step takes at most half of it [none].",
        ),
        flag(
            "--fallback-max-length",
            type=int,
            help="Maximum tokens of a low-priority pair while the queue is long [no fallback].",
        ),
    ),
    "Workers": (
        flag("--workers", default=1, help="Worker processes: one per GPU, or several on a CPU."),
        flag(
            "--memory-limit-mb", type=int, help="Replace a worker that uses more memory [no limit]."
        ),
        flag(
            "--wedge-after-s",
            default=20.0,
            help="Seconds without an answer before a worker is killed and replaced.",
        ),
    ),
    "Logs and traces": (
        flag(
            "--log-format",
            type=click.Choice(["json", "text"]),
            help="Form of the log [text on a terminal, else json].",
        ),
        flag(
            "--log-level",
            type=click.Choice(["debug", "info", "warning"]),
            default="info",
            help="Lowest level that is written.",
        ),
        flag(
            "--otel/--no-otel",
            default=None,
            help="Send traces over OTLP [if OTEL_EXPORTER_OTLP_ENDPOINT is set].",
        ),
    ),
}
"""The HTTP server, its limits and its workers, by the headings of the help."""

SERVER_FLAGS: tuple[Flag, ...] = tuple(chain.from_iterable(SERVER_GROUPS.values()))

CLUSTER_FLAGS: tuple[Flag, ...] = (
    flag("--max-workers", type=int, help="Maximum workers on Ray [--workers]."),
    flag("--worker-cpus", default=1.0, help="CPUs of a worker on Ray."),
    flag(
        "--worker-gpus",
        type=float,
        help="GPUs of a worker on Ray; 0.5 lets two share one [1 where the cluster has any].",
    ),
    flag(
        "--max-delay-s", default=2.0, help="Predicted wait in seconds above which Ray adds workers."
    ),
    flag("--ingresses", default=1, help="HTTP replicas on Ray, each with its own workers."),
)
"""Settings that only a server on a Ray cluster has."""

RAY_FLAG: Flag = flag(
    "--ray",
    is_flag=False,
    flag_value=ANY_CLUSTER,
    metavar="[ADDRESS]",
    help="Score on a Ray cluster: the one at ADDRESS, or one that runs on this machine.",
)
"""``--ray [ADDRESS]``: it stands last on a command line, or takes its address after ``=``."""


def _read_file(context: click.Context, _: click.Parameter, path: str | None) -> str | None:
    """The callback of ``--config``: the file's values become defaults."""
    if path is not None:
        context.default_map = {**load(path), **(context.default_map or {})}
    return path


CONFIG_FLAG: Flag = flag(
    "--config",
    is_eager=True,
    expose_value=False,
    callback=_read_file,
    help="TOML file with a table [serve] of these settings.",
)

SETTING_GROUPS: dict[str, tuple[Flag, ...]] = {
    "Settings": (CONFIG_FLAG,),
    **SERVER_GROUPS,
    "Model": MODEL_FLAGS,
    "Steps": STEP_FLAGS,
    "Scores": CACHE_FLAGS,
    "Ray": (RAY_FLAG, *CLUSTER_FLAGS),
}
"""All flags of ``echelon serve``, by the headings of its help."""

SETTINGS: tuple[Flag, ...] = tuple(chain.from_iterable(SETTING_GROUPS.values()))

NAMES = tuple(map(name_of_flag, SETTINGS[1:]))
"""Names of the settings; ``--config`` is none."""


def load(path: str) -> dict[str, Any]:
    """Read the settings of a TOML file; refuse one that has an unknown setting."""
    try:
        content = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        problem = f"{path} cannot be read ({getattr(error, 'strerror', None) or error})"
        raise InvalidInput("--config", problem, "Give a TOML file in UTF-8.") from None
    table = content.get(TABLE, {})
    if not isinstance(table, dict):
        raise InvalidInput("--config", f"{path}: {TABLE} is no table", f"Begin with [{TABLE}].")
    values = {name.replace("-", "_"): value for name, value in table.items()}
    check_names(values, NAMES, "--config", f"{path}: ")
    return values


def check_names(values: Iterable[str], known: Iterable[str], field: str, where: str = "") -> None:
    """Refuse unknown settings; the error names the nearest known one."""
    known = list(known)
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else "See: echelon serve --help."
            raise InvalidInput(field, f"{where}unknown setting {name!r}", hint)


def complete(given: dict[str, Any]) -> dict[str, Any]:
    """All settings: the environment's, those given, the file's, and the defaults."""
    parser = click.Command(
        "serve", params=[click.Option(names, **settings) for names, settings in SETTINGS]
    )
    try:
        context = parser.make_context("serve", [], default_map=given, auto_envvar_prefix=PREFIX)
    except click.UsageError as error:
        problem = error.format_message().rstrip(".")
        raise InvalidInput("args", problem, "See: echelon serve --help.") from None
    return context.params


def split(values: dict[str, Any]) -> tuple[dict[str, Any], Options]:
    """Divide settings into those of the server and the options of the model, without its bars.

    Raises:
        InvalidInput: a setting is out of its range.
    """
    values = dict(values)
    _check_ranges(values)
    server = {name: values.pop(name) for name in map(name_of_flag, SERVER_FLAGS)}
    return server, Options.of(**values, progress=False)


def _check_ranges(values: dict[str, Any]) -> None:
    """Check what neither flags nor the parts of the server check."""
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise InvalidInput(name, tr("{value} is no number", value=value), tr("Give a number."))
    port = values["port"]
    if not 0 <= port <= MAX_PORT:
        problem = tr("{port} is no port", port=port)
        raise InvalidInput("--port", problem, tr("Give 0 to {last}.", last=MAX_PORT))
    check_positive(memory_limit_mb=values["memory_limit_mb"])
    for origin in values["cors"]:
        if origin != "*" and not _ORIGIN.fullmatch(origin):
            problem, remedy = f"{origin!r} is no origin", "Write it as https://shop.example.org."
            raise InvalidInput("--cors", problem, remedy)
