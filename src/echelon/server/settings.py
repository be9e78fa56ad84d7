"""``echelon serve``'s settings out of a TOML file, under the names of its flags.

A flag overrides the environment (``ECHELON_SERVE_PORT`` for ``--port``), which overrides the file,
which overrides the default.

``echelon serve``. Imports click only; the server's packages are loaded when it runs.
"""

from __future__ import annotations

import difflib
import ipaddress
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from echelon.errors import InvalidInput
from echelon.flags import MODEL_FLAGS, STEP_FLAGS, Flag, as_keywords, options_of, with_flags
from echelon.options import require_packages

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from echelon.options import Options
    from echelon.server.context import ServerContext

PREFIX = "ECHELON_SERVE"
"""What environment variables begin with."""

TABLE = "serve"
"""The file's table; others are for other programs."""

ORIGINS = {
    ParameterSource.COMMANDLINE: "flag",
    ParameterSource.ENVIRONMENT: "environment",
    ParameterSource.DEFAULT_MAP: "file",
}
"""Where a value came from, in words; all else is the default."""


def take_file(context: click.Context, _: click.Parameter, path: str | None) -> str | None:
    """Let the file's values stand in for defaults; the callback of ``--config``.

    Raises:
        InvalidInput: the file cannot be read, or names what no flag has.
    """
    if path is not None:
        known = [p.name for p in context.command.params if p.name not in {None, "config", "model"}]
        context.default_map = load(path, [str(name) for name in known])
    return path


def load(path: str, known: Iterable[str]) -> dict[str, Any]:
    """The values of a file, by option.

    Raises:
        InvalidInput: the file cannot be read, or names what no flag has.
    """
    try:
        content = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InvalidInput("--config", f"{path} cannot be read ({error})", "Mend it.") from None
    table = content.get(TABLE, {})
    if not isinstance(table, dict):
        raise InvalidInput("--config", f"{path}: {TABLE} is no table", f"Begin with [{TABLE}].")
    values = {name.replace("-", "_"): value for name, value in table.items()}
    check_names(values, list(known), "--config", f"{path}: ")
    return values


def check_names(values: Iterable[str], known: list[str], field: str, where: str = "") -> None:
    """Refuse settings that no flag has.

    Raises:
        InvalidInput: names the nearest that there is.
    """
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else "See: echelon serve --help."
            raise InvalidInput(field, f"{where}unknown setting {name!r}", hint)


def origins(context: click.Context) -> Iterator[tuple[str, Any, str]]:
    """(name, value, where it came from) of every setting."""
    for name, value in context.params.items():
        source = context.get_parameter_source(name)
        word = "default" if source is None else ORIGINS.get(source, "default")
        yield name, list(value) if isinstance(value, tuple) else value, word


PACKAGES = ("httptools", "msgspec", "prometheus_client", "starlette", "uvicorn")

_DOOR_FLAGS: tuple[Flag, ...] = (
    (("--host",), {"default": "127.0.0.1", "help": "Address to listen on."}),
    (("--port",), {"default": 8080, "help": "Port; 0 takes a free one."}),
    (("--workers",), {"default": 1, "help": "Processes that score: one a GPU, or several a CPU."}),
    (("--served-name",), {"help": "What answers call the model [its own name]."}),
    (("--api-keys",), {"help": "File with API keys, one a line; ECHELON_API_KEYS adds more."}),
    (("--rate-limit",), {"help": "Documents for a key in a time, such as 50/s or 900/min [no]."}),
    (("--cors",), {"multiple": True, "help": "Origin whose pages may read answers [none]."}),
    (("--max-body-mb",), {"default": 32.0, "help": "Longest body, in MiB."}),
    (("--body-timeout-s",), {"default": 30.0, "help": "Seconds in which a body must come."}),
    (("--header-timeout-s",), {"default": 10.0, "help": "Seconds in which headers must come."}),
    (("--max-connections",), {"default": 768, "help": "Connections at once, idle ones too."}),
    (("--drain-s",), {"default": 30.0, "help": "Seconds to answer what is inside at the end."}),
    (("--max-requests",), {"default": 512, "help": "Requests inside at once."}),
    (("--max-documents",), {"default": 10_000, "help": "Documents of one request."}),
    (("--max-wait-s",), {"default": 30.0, "help": "Seconds a request may have to wait."}),
    (("--slo-p99-ms",), {"type": float, "help": "Latency goal: steps stay below half of it [no]."}),
    (
        ("--fallback-max-length",),
        {"type": int, "help": "Tokens a pair of low priority may have in a long queue [no]."},
    ),
    (("--memory-limit-mb",), {"type": int, "help": "A worker that holds more is replaced [no]."}),
    (
        ("--wedge-after-s",),
        {"default": 20.0, "help": "A silent worker is replaced, never sooner."},
    ),
    (("--tls-cert",), {"help": "Certificate chain in PEM: serve HTTPS."}),
    (("--tls-key",), {"help": "Its private key in PEM."}),
    (
        ("--otel/--no-otel",),
        {"default": None, "help": "Traces over OTLP [where OTEL_EXPORTER_OTLP_ENDPOINT is set]."},
    ),
    (("--log-format",), {"type": click.Choice(["json", "text"]), "default": "json"}),
    (("--log-level",), {"type": click.Choice(["debug", "info", "warning"]), "default": "info"}),
)


_FILE_FLAG: tuple[Flag, ...] = (
    (
        ("--config",),
        {
            "is_eager": True,
            "expose_value": False,
            "callback": take_file,
            "help": "TOML file with a table [serve] of these settings.",
        },
    ),
)


def _settings(command: Any) -> Any:
    """All flags of the server."""
    shown = tuple((names, {"show_default": True, **more}) for names, more in _DOOR_FLAGS)
    return with_flags(_FILE_FLAG, shown, MODEL_FLAGS, STEP_FLAGS)(command)


@click.command(context_settings={"auto_envvar_prefix": PREFIX})
@click.argument("model")
@_settings
def serve(*, model: str, **values: Any) -> None:
    """Serve MODEL over HTTP to clients of Cohere, Jina, TEI, vLLM, infinity, Voyage and NIM.

    A playground is at /, a dashboard at /dashboard; the API is described at /docs. SIGTERM or
    Ctrl-C answers what is inside, then ends. Each setting is also an environment variable, such as
    ECHELON_SERVE_PORT, and an entry of the --config file.
    """
    require_packages("echelon serve", "serve", PACKAGES)
    from echelon.server.http_server import Address, run
    from echelon.server.observability import set_up

    door, options = split(values)
    address = Address(door["host"], door["port"], door["tls_cert"], door["tls_key"])
    set_up(door["log_format"], door["log_level"])
    house = house_of(model, options, door)
    run(house, address, exposed=not is_loopback(door["host"]))


@click.command(context_settings={"auto_envvar_prefix": PREFIX})
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@_settings
@click.pass_context
def config(context: click.Context, /, *, as_json: bool, **_: Any) -> None:
    """Say what `echelon serve` would be told by flags, environment and file, and by which."""
    rows = [row for row in origins(context) if row[0] != "as_json"]
    if as_json:
        import json

        told = {name: {"value": value, "origin": origin} for name, value, origin in rows}
        click.echo(json.dumps(told, ensure_ascii=False, indent=2))
        return
    for name, value, origin in rows:
        click.echo(f"{name:20} {origin:12} {'' if value is None else value}")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _name_of(flag: str) -> str:
    return flag.partition("/")[0].removeprefix("--").replace("-", "_")


def split(values: dict[str, Any]) -> tuple[dict[str, Any], Options]:
    """What the flags say of the server, and of the model."""
    names = [_name_of(names[0]) for names, _ in _DOOR_FLAGS]
    door = {name: values.pop(name) for name in names}
    return door, options_of(values, quiet=True)


def house_of(model: str, options: Options, door: dict[str, Any], **more: Any) -> ServerContext:
    """The server that flags ask for.

    Args:
        model: what to serve.
        options: of the model.
        door: of the server.
        **more: as in :func:`echelon.engine.launch.launch`.
    """
    from functools import partial

    from echelon.engine.events import ListenerGroup
    from echelon.engine.launch import launch
    from echelon.scheduling.admission import AdmissionLimits
    from echelon.server.auth import read_keys
    from echelon.server.connection import ConnectionLimits
    from echelon.server.context import ServerContext, ServerLimits
    from echelon.server.metrics import Metrics
    from echelon.server.observability import open_traces
    from echelon.server.rolling_stats import RollingStats

    rules = ServerLimits(
        keys=read_keys(door["api_keys"], door["rate_limit"]),
        max_body_bytes=int(door["max_body_mb"] * 2**20),
        body_timeout_s=door["body_timeout_s"],
        drain_s=door["drain_s"],
        origins=door["cors"],
        limits=ConnectionLimits(door["max_connections"], door["header_timeout_s"]),
    )
    metrics, recent = Metrics(), RollingStats()
    limit, goal_ms = door["memory_limit_mb"], door["slo_p99_ms"]
    start = partial(
        launch,
        model,
        workers=door["workers"],
        bounds=AdmissionLimits(
            max_requests=door["max_requests"],
            max_documents=door["max_documents"],
            max_wait_s=door["max_wait_s"],
        ),
        memory_limit_bytes=None if limit is None else limit * 2**20,
        wedge_after_s=door["wedge_after_s"],
        goal_s=None if goal_ms is None else goal_ms / 1000,
        fallback_max_length=door["fallback_max_length"],
        listener=ListenerGroup(metrics, recent),
        **more,
        **as_keywords(options),
    )
    name = door["served_name"] or name_of(model)
    traces = open_traces(door["otel"])
    return ServerContext(
        start, name, metrics, rules, options.revision, recent=recent, traces=traces
    )


def name_of(model: str) -> str:
    """What answers call a model: a folder's own name, or the name that was given."""
    folder = Path(model).expanduser()
    return folder.resolve().name if folder.is_dir() else model
