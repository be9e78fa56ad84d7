"""``echelon batch``. Imports click only; everything else is loaded when it runs."""

from __future__ import annotations

from typing import Any

import click

from echelon.errors import BadRows
from echelon.flags import MODEL_FLAGS, STEP_FLAGS, Flag, options_of, with_flags

_FILE_FLAGS: tuple[Flag, ...] = (
    (
        ("--output", "-o"),
        {"required": True, "help": "JSONL, Parquet or TREC run; '-' is standard output."},
    ),
    (("--model",), {"default": "demo", "show_default": True, "help": "Hub id, folder or 'demo'."}),
    (
        ("--input-format",),
        {
            "type": click.Choice(["jsonl", "csv", "tsv", "parquet", "trec"]),
            "help": "[by suffix; '-' is JSONL]",
        },
    ),
    (
        ("--output-format",),
        {
            "type": click.Choice(["jsonl", "parquet", "trec"]),
            "help": "[by suffix; '-' is JSONL]",
        },
    ),
    (("--topics",), {"help": "Queries of a TREC run: TSV, or JSONL with id and query."}),
    (("--collection",), {"help": "Documents of a TREC run: TSV, or JSONL with id and text."}),
    (("--query-column",), {"default": "query", "show_default": True, "help": "Table's queries."}),
    (
        ("--document-column",),
        {"default": "document", "show_default": True, "help": "Table's documents."},
    ),
    (("--query-id-column",), {"help": "Column to copy as query_id."}),
    (("--document-id-column",), {"help": "Column to copy as document_id."}),
    (("--top-n",), {"type": int, "help": "Results to keep of each query [all]."}),
    (("--run-tag",), {"default": "echelon", "show_default": True, "help": "Name in a TREC run."}),
    (("--errors",), {"help": "File for bad rows [OUTPUT.errors.jsonl]."}),
    (("--strict",), {"is_flag": True, "help": "Stop at the first bad row."}),
    (("--restart",), {"is_flag": True, "help": "Begin anew, whatever is there."}),
    (("--qrels",), {"help": "TREC judgements: print quality before and after."}),
    (
        ("--compare",),
        {
            "type": click.Choice(["precision"]),
            "help": "With --qrels: also what each precision costs in quality.",
        },
    ),
    (("--quiet",), {"is_flag": True, "help": "No progress and no summary."}),
)


@click.command()
@click.argument("input", metavar="INPUT")
@with_flags(_FILE_FLAGS, MODEL_FLAGS, STEP_FLAGS)
def batch(*, quiet: bool, compare: str | None, **values: Any) -> None:
    """Rerank the file INPUT: JSONL of queries with documents, pairs in a table, or a TREC run.

    Killed at any instant, the same command goes on where it was, and the output is the same to the
    byte. Rows that cannot be scored go to a file of their own.
    """
    from echelon.offline.scoring import WindowScorer

    rerank_file(values, WindowScorer, quiet=quiet, compare=compare)


def rerank_file(values: dict[str, Any], scoring: Any, *, quiet: bool, compare: str | None) -> None:
    """What the command does.

    Args:
        values: of its flags.
        scoring: what scores; see :func:`echelon.offline.run.run`.
        quiet: no progress and no summary.
        compare: what to compare afterwards.
    """
    from echelon.offline.ir_metrics import check_comparable, compare_precisions
    from echelon.offline.progress import (
        ProgressDisplay,
        number,
        print_quality,
        print_trials,
        say_summary,
    )
    from echelon.offline.run import run
    from echelon.offline.streams import STANDARD
    from echelon.progress import status

    job = job_of(values)
    if compare is not None:
        check_comparable(job)
    with ProgressDisplay(quiet=quiet) as screen:
        try:
            summary = run(job, screen, scoring)
        except KeyboardInterrupt:
            if STANDARD not in {job.input, job.output}:
                click.echo("What was finished is kept: the same command goes on.", err=True)
            raise
    if not quiet:
        say_summary(summary, job.output, screen)
    if job.qrels is not None:
        print_quality(summary)
    if compare is not None:
        with status("Comparing precisions", shown=not quiet) as told:
            trials = compare_precisions(job, told)
        print_trials(trials)
    if summary.counts.bad:
        where = "" if summary.errors is None else f": {summary.errors}"
        raise BadRows(f"{number(summary.counts.bad, 'row')} could not be scored{where}")


def job_of(values: dict[str, Any]) -> Any:
    """What the flags say, as a job.

    Raises:
        InvalidInput: a value is wrong.
    """
    from echelon.offline.job import OfflineJob
    from echelon.offline.readers import Columns
    from echelon.options import check_top_n

    names = ("query", "document", "query_id", "document_id")
    columns = Columns(**{name: values.pop(f"{name}_column") for name in names})
    own = {
        name: values.pop(name)
        for name in ("input", *(_parameter(flag) for flag in _FILE_FLAGS))
        if name in values
    }
    check_top_n(own["top_n"])
    # The model's own bars would stand in the way of the job's.
    return OfflineJob(**own, columns=columns, options=options_of(values, quiet=True))


def _parameter(flag: Flag) -> str:
    return flag[0][0].removeprefix("--").replace("-", "_")
