"""``echelon serve`` and ``echelon config``: the HTTP server and its settings."""

from __future__ import annotations

from typing import Any

import click
from click.core import ParameterSource

from echelon.cli.flags import (
    JSON_FLAG,
    LANG_FLAG,
    Command,
    example,
    lang_flag,
    print_json,
    with_flags,
)
from echelon.options import require_packages
from echelon.server.http_checks import is_loopback
from echelon.server.settings import (
    CLUSTER_FLAGS,
    PACKAGES,
    PREFIX,
    SETTING_GROUPS,
    name_of_flag,
    split,
)

ORIGINS = {
    ParameterSource.COMMANDLINE: "flag",
    ParameterSource.ENVIRONMENT: "environment",
    ParameterSource.DEFAULT_MAP: "file",
}
"""Sources of a value in words; every other source is the default."""


LANG_OF_PAGES = lang_flag("Language of help, errors and pages [ECHELON_LANG, else the browser's].")


def _with_settings(command: Any) -> Any:
    """Give a command all settings of the server, in their groups."""
    for group, flags in reversed(SETTING_GROUPS.items()):
        command = with_flags(*flags, group=group)(command)
    return command


@click.command(
    cls=Command,
    context_settings={"auto_envvar_prefix": PREFIX},
    epilog=example("echelon serve BAAI/bge-reranker-v2-m3 --profile echelon-profile.json"),
)
@click.argument("model")
@_with_settings
@with_flags(LANG_OF_PAGES, group="Output")
def serve(*, model: str, ray: str | None, **values: Any) -> None:
    """Serve MODEL over HTTP to clients of Cohere, Jina, TEI, vLLM, infinity, Voyage and NIM.

    A playground is at /, a dashboard at /dashboard; the API is described at /docs. SIGTERM or
    Ctrl-C answers the accepted requests, then ends. Each setting is also an environment variable,
    such as ECHELON_SERVE_PORT, and an entry of the --config file.
    """
    if ray is not None:
        require_packages("--ray", "ray", ["ray"])
        from echelon.integrations.ray.serve import run_here

        run_here(ray, {"model": model, **values})
        return
    require_packages("echelon serve", "serve", PACKAGES)
    import logging

    from echelon.server.context import server_of
    from echelon.server.http_server import Address, run
    from echelon.server.observability import set_up

    for name in map(name_of_flag, CLUSTER_FLAGS):
        del values[name]
    settings, options = split(values)
    address = Address(settings["host"], settings["port"], settings["tls_cert"], settings["tls_key"])
    set_up(settings["log_format"], settings["log_level"])
    logging.getLogger(__name__).info(
        "Loading %s; it is downloaded first if it is not on this machine.", model
    )
    run(server_of(model, options, settings), address, exposed=not is_loopback(address.host))


@click.command(
    cls=Command,
    context_settings={"auto_envvar_prefix": PREFIX},
    epilog=example("echelon config --port 9000"),
)
@with_flags(JSON_FLAG, LANG_FLAG, group="Output")
@_with_settings
@click.pass_context
def config(context: click.Context, /, *, as_json: bool, **values: Any) -> None:
    """Show the settings of `echelon serve`, and whether flag, environment or file gave each."""
    found = {}
    for name, value in values.items():
        source = context.get_parameter_source(name)
        origin = ORIGINS.get(source, "default") if source else "default"
        found[name] = {
            "value": list(value) if isinstance(value, tuple) else value,
            "origin": origin,
        }
    if as_json:
        print_json(found)
        return
    for name, row in found.items():
        click.echo(f"{name:20} {row['origin']:12} {'' if row['value'] is None else row['value']}")
