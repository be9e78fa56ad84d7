"""``echelon models``: the families that run natively, and what one model is and needs."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from echelon.cli.flags import JSON_FLAG, LANG_FLAG, Command, example, print_json, with_flags
from echelon.server.settings import flag


@click.command(
    cls=Command,
    epilog=example("echelon models", "echelon models Qwen/Qwen3-Reranker-0.6B"),
)
@click.argument("model", required=False)
@with_flags(flag("--revision", help="Hub branch, tag or commit."), group="Model")
@with_flags(JSON_FLAG, LANG_FLAG, group="Output")
def models(*, model: str | None, revision: str | None, as_json: bool) -> None:
    """List the families that run natively, or say what MODEL is and what memory it needs.

    MODEL is a hub id, a folder or 'demo'. Of the hub, only its small files are fetched.
    """
    found = _families() if model is None else _described(model, revision)
    if as_json:
        print_json(found)
        return
    from echelon.reports.model_lines import print_families, print_model

    if model is None:
        print_families(found["families"])
    else:
        print_model(found)


def _families() -> dict[str, Any]:
    from echelon.models.families import FAMILIES

    rows = [
        {"name": family.name, "model_types": family.model_types, "known": family.known}
        for family in FAMILIES
    ]
    return {"families": rows}


def _described(model: str, revision: str | None) -> dict[str, Any]:
    from echelon.models.description import describe
    from echelon.models.hub import resolve

    folder = resolve(model, revision=revision, weights=False)
    found = describe(folder.path)
    return {"model": folder.name, **asdict(found), "weights_bytes": found.weights_bytes}
