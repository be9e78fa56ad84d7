"""``echelon rank``: sort documents on the command line by relevance."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from echelon.cli.flags import (
    JSON_FLAG,
    LANG_FLAG,
    Command,
    example,
    print_json,
    quiet_flag,
    unreadable,
    with_flags,
)
from echelon.errors import InvalidInput
from echelon.messages import tr
from echelon.options import Options, check_count
from echelon.server.settings import MODEL_FLAGS, STEP_FLAGS, flag

if TYPE_CHECKING:
    from collections.abc import Sequence


@click.command(
    cls=Command,
    epilog=example(
        'echelon rank "how do I reset my router?" "Hold the button." "Bananas are yellow."',
        'cat documents.txt | echelon rank "how do I reset my router?" --top-n 5',
    ),
)
@click.argument("query")
@click.argument("documents", nargs=-1)
@with_flags(
    flag("--file", help="Documents, one a line; '-' is standard input."),
    flag("--top-n", type=int, help="Results to show [all]."),
    group="Documents",
)
@with_flags(
    flag("--model", default="demo", help="Hub id, folder or 'demo'."), *MODEL_FLAGS, group="Model"
)
@with_flags(*STEP_FLAGS, group="Steps")
@with_flags(JSON_FLAG, quiet_flag("No progress."), LANG_FLAG, group="Output")
def rank(  # noqa: PLR0913 - one argument each option
    *,
    query: str,
    documents: tuple[str, ...],
    model: str,
    file: str | None,
    top_n: int | None,
    as_json: bool,
    quiet: bool,
    **values: Any,
) -> None:
    """Sort DOCUMENTS by relevance to QUERY.

    Documents are arguments, or lines of --file, or lines of standard input.
    """
    check_count("top_n", top_n)
    texts = _read_documents(documents, file)
    options = Options.of(**values, progress=not quiet)

    from echelon.reranker import Reranker

    with Reranker(model, **asdict(options)) as reranker:
        ranking = reranker.rank(query, texts, top_n)
    if as_json:
        print_json(asdict(ranking))
        return
    from echelon.reports.tables import print_ranking

    print_ranking(ranking)


def _read_documents(documents: Sequence[str], file: str | None) -> list[str]:
    if documents and file:
        raise InvalidInput("--file", tr("is given besides documents"), tr("Give one of the two."))
    if documents:
        return list(documents)
    if file is None and sys.stdin.isatty():
        raise InvalidInput(
            "documents",
            tr("is not given"),
            tr("Add them after the query, or use --file FILE."),
        )
    given = tr("standard input") if file in {None, "-"} else str(file)
    try:
        content = sys.stdin.buffer.read() if file in {None, "-"} else Path(given).read_bytes()
        text = content.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable("--file", given, error, tr("Give a file in UTF-8.")) from error
    found = [line for line in text.splitlines() if line.strip()]
    if not found:
        problem = tr("{file} holds no line of text", file=given)
        raise InvalidInput("documents", problem, tr("Give documents, one a line."))
    return found
