"""Lines on the terminal for ``echelon models``: the native families, and one model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from echelon.messages import N_, listed, tr
from echelon.messages.units import UNKNOWN, size

if TYPE_CHECKING:
    from collections.abc import Iterable

Row = dict[str, Any]

RUNS = {
    "native": N_("natively, without padding"),
    "transformers": N_("through transformers, with padding"),
    "onnx": N_("through ONNX Runtime"),
    "no": N_("not at all"),
}

SHOWN_LABELS = 8


def print_families(families: Iterable[Row]) -> None:
    """Print the native families, and models of each."""
    click.echo(tr("Families that run natively, without padding:"))
    for family in families:
        click.echo(f"  {family['name']} ({', '.join(family['model_types'])})")
        for name in family["known"]:
            click.echo(f"    {name}")
    click.echo(
        tr("Any other sequence classifier runs through transformers, with padding, or as ONNX.")
    )


def print_model(model: Row) -> None:
    """Print what a model is, how it runs, and what it needs."""
    click.echo(f"{model['model']} ({model['family'] or model['model_type']})")
    for name, value in _lines(model):
        click.echo(f"  {name}: {value}")


def _lines(model: Row) -> Iterable[tuple[str, str]]:
    yield tr("Runs"), tr(RUNS[model["runs"]])
    if model["reason"]:
        yield tr("Why"), model["reason"]
    if model["runs"] != "native":
        return
    labels = model["labels"]
    more = ", …" if len(labels) > SHOWN_LABELS else ""
    yield tr("Labels"), ", ".join(labels[:SHOWN_LABELS]) + more
    yield tr("Longest pair"), tr("{count} tokens", count=f"{model['max_tokens']:,}")
    if model["instruction"] is not None:
        yield tr("Instruction"), model["instruction"]
    yield tr("Memory of the weights"), _memory(model["weights_bytes"])
    yield (
        tr("Memory of the smallest step, about"),
        tr("{memory}, for one longest pair", memory=_memory(model["step_bytes"])),
    )


def _memory(by_precision: dict[str, int]) -> str:
    shown = [f"{size(count)} ({name})" for name, count in by_precision.items()]
    return listed(shown) or UNKNOWN
