"""``echelon batch``: rerank files, on this machine or on a Ray cluster."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import click

from echelon.cli.flags import LANG_FLAG, Command, example, quiet_flag, with_flags
from echelon.errors import BadRows, InvalidInput
from echelon.messages import tr
from echelon.offline.streams import RECORD_MB
from echelon.options import Options, check_count, require_packages
from echelon.progress import print_line, status
from echelon.server.settings import (
    CACHE_SIZE,
    MODEL_FLAGS,
    RAY_FLAG,
    STEP_FLAGS,
    Flag,
    flag,
    name_of_flag,
)

if TYPE_CHECKING:
    from echelon.offline.job import OfflineJob

FILE_FLAGS: tuple[Flag, ...] = (
    flag(
        "--output", "-o", required=True, help="JSONL, Parquet or TREC run; '-' is standard output."
    ),
    flag("--model", default="demo", help="Hub id, folder or 'demo'."),
    flag(
        "--input-format",
        type=click.Choice(["jsonl", "csv", "tsv", "parquet", "trec"]),
        help="[by suffix; '-' is JSONL]",
    ),
    flag(
        "--output-format",
        type=click.Choice(["jsonl", "parquet", "trec"]),
        help="[by suffix; '-' is JSONL]",
    ),
    flag("--topics", help="Queries of a TREC run: TSV, or JSONL with id and query."),
    flag("--collection", help="Documents of a TREC run: TSV, or JSONL with id and text."),
    flag("--query-column", default="query", help="Column of the queries."),
    flag("--document-column", default="document", help="Column of the documents."),
    flag("--query-id-column", help="Column to copy as query_id."),
    flag("--document-id-column", help="Column to copy as document_id."),
    flag("--top-n", type=int, help="Results to keep of each query [all]."),
    flag("--run-tag", default="echelon", help="Name in a TREC run."),
    flag("--errors", help="File for bad rows [OUTPUT.errors.jsonl]."),
    flag(
        "--max-record-mb",
        default=RECORD_MB,
        help="Maximum size of a line, record or row of the input, in MiB.",
    ),
    flag("--strict", is_flag=True, help="Stop at the first bad row."),
    flag("--restart", is_flag=True, help="Begin anew instead of resuming."),
    flag("--qrels", help="TREC judgements: print the quality before and after reranking."),
    flag(
        "--compare",
        type=click.Choice(["precision"]),
        help="With --qrels: print the quality in each precision too.",
    ),
    quiet_flag("No progress and no summary."),
)

CACHE_FLAG: Flag = flag(
    "--score-cache",
    help="Memory in which scores are kept for pairs that come again, such as 256MB; 0 keeps none "
    f"[{CACHE_SIZE}; none on Ray].",
)

WORKER_FLAGS: tuple[Flag, ...] = (
    flag("--workers", type=int, help="Workers on Ray [as many as the cluster has room for]."),
    flag(
        "--worker-cpus",
        type=float,
        help="CPUs of a worker on Ray [--threads, or all of this machine; 1 beside a GPU].",
    ),
    flag(
        "--worker-gpus",
        type=float,
        help="GPUs of a worker on Ray; 0.5 lets two share one [1 where the cluster has any].",
    ),
)


@click.command(cls=Command, epilog=example("echelon batch queries.jsonl -o ranked.jsonl"))
@click.argument("input", metavar="INPUT")
@with_flags(*FILE_FLAGS, group="Files")
@with_flags(*MODEL_FLAGS, group="Model")
@with_flags(*STEP_FLAGS, group="Steps")
@with_flags(CACHE_FLAG, group="Scores")
@with_flags(RAY_FLAG, *WORKER_FLAGS, group="Ray")
@with_flags(LANG_FLAG, group="Output")
def batch(
    *,
    quiet: bool,
    compare: str | None,
    ray: str | None,
    workers: int | None,
    worker_cpus: float | None,
    worker_gpus: float | None,
    **values: Any,
) -> None:
    """Rerank the file INPUT: JSONL of queries with documents, pairs in a table, or a TREC run.

    If the process is killed, run the same command again: it resumes, and the output is the same to
    the byte. Rows that cannot be scored are written to a file of their own.
    """
    scorer: Any
    if ray is None:
        if workers is not None:
            raise InvalidInput("--workers", "is of use on Ray only", "Add --ray.")
        from echelon.offline.scoring import WindowScorer as scorer  # noqa: N813 - one of two

        values["score_cache"] = values["score_cache"] or CACHE_SIZE
    else:
        if values["score_cache"] is not None:
            problem = "is of no use on Ray, whose workers share no memory"
            raise InvalidInput("--score-cache", problem, "Leave it out.")
        require_packages("--ray", "ray", ["ray"])
        from echelon.integrations.ray.scorer_pool import PoolRequest, RayScorerPool
        from echelon.integrations.ray.worker import connect

        request = PoolRequest(workers, worker_cpus, worker_gpus)
        scorer = partial(RayScorerPool, request=request)
        connect(ray)
    _rerank(job_of(values), scorer, quiet=quiet, compare=compare)


def _rerank(job: OfflineJob, scorer: Any, *, quiet: bool, compare: str | None) -> None:
    from echelon.offline.ir_metrics import check_comparable, compare_precisions
    from echelon.offline.progress import (
        ROWS,
        ProgressDisplay,
        number,
        print_comparison,
        print_quality,
        print_summary,
    )
    from echelon.offline.run import run
    from echelon.offline.streams import STANDARD

    if compare is not None:
        check_comparable(job)
    with ProgressDisplay(quiet=quiet) as display:
        try:
            summary = run(job, display, scorer)
        except KeyboardInterrupt:
            if STANDARD not in {job.input, job.output}:
                print_line(tr("Finished results are kept: run the same command again to resume."))
            raise
    if not quiet:
        print_summary(summary, job.output, display)
    if job.qrels is not None:
        print_quality(summary)
    if compare is not None:
        with status(tr("Comparing precisions"), shown=not quiet) as on_progress:
            qualities = compare_precisions(job, on_progress)
        print_comparison(qualities)
    if summary.counts.bad:
        problem = tr("{rows} could not be scored", rows=number(summary.counts.bad, ROWS))
        raise BadRows(problem if summary.errors is None else f"{problem}: {summary.errors}")


def job_of(values: dict[str, Any]) -> OfflineJob:
    """The job that flags describe."""
    from echelon.offline.job import OfflineJob
    from echelon.offline.readers import Columns

    check_count("top_n", values["top_n"])
    names = ("query", "document", "query_id", "document_id")
    columns = Columns(**{name: values.pop(f"{name}_column") for name in names})
    own = {
        name: values.pop(name)
        for name in ("input", *map(name_of_flag, FILE_FLAGS))
        if name in values
    }
    # The model's own bars would disturb those of the job.
    return OfflineJob(**own, columns=columns, options=Options.of(**values, progress=False))
