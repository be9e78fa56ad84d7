"""IR metrics on the user's judgements, with ``ir_measures``, also for each precision.

Metrics are averaged over the judged queries. Each query is measured when it is scored, so only sums
are kept.
"""

from __future__ import annotations

import math
import tempfile
from collections import defaultdict
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from echelon.errors import InvalidInput, UnsupportedModel
from echelon.models.device import candidate_precisions
from echelon.offline.readers import ID_CHARACTERS, Row
from echelon.offline.scoring import WindowScorer, windows
from echelon.offline.streams import STANDARD, Lines, digest_of
from echelon.offline.writers import ranked
from echelon.options import require_packages
from echelon.types import monotonic

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from echelon.offline.job import OfflineJob
    from echelon.offline.readers import Entry, Id, Reader
    from echelon.offline.writers import RankedRow
    from echelon.options import Precision
    from echelon.progress import Progress

MEASURES = {"nDCG@10": "nDCG@10", "MRR@10": "RR@10", "recall@10": "R@10", "recall@100": "R@100"}
"""Name of a metric → its name in ``ir_measures``."""

JUDGEMENTS = 5_000_000
"""Maximum judgements; they are in memory, with some 200 bytes each."""

GRADES = range(-(2**31), 2**31)
"""Grades that ``ir_measures`` takes."""

FORM = "Each line is: query, 0, document and grade (a whole number), with spaces between."
Sums = dict[str, Any]
"""``queries``, the number of them, and the sums of the metrics ``before`` and ``after``."""


class Judge:
    """Measures rankings against judgements: TREC qrels, held in memory."""

    def __init__(self, path: str) -> None:
        require_packages("--qrels", "files", ["ir_measures"])
        import ir_measures

        self._grades = read_qrels(path)
        self._parse = ir_measures.parse_measure
        self._evaluator = ir_measures.evaluator

    def judges(self, query: Id) -> bool:
        """Whether a query has a relevant document."""
        return any(grade > 0 for grade in self._grades.get(str(query), {}).values())

    def add(self, sums: Sums, rankings: Iterable[RankedRow]) -> None:
        """Add the metrics of the judged queries to ``sums``, before and after reranking."""
        for ranking in rankings:
            if not self.judges(ranking.row.id):
                continue
            names = [str(name) for name in ranking.row.document_ids]
            orders = {"before": names, "after": [names[i] for i in ranking.order]}
            sums["queries"] = sums.get("queries", 0) + 1
            for order, documents in orders.items():
                total = sums.setdefault(order, dict.fromkeys(MEASURES, 0.0))
                for name, value in self._measure(str(ranking.row.id), documents).items():
                    total[name] += value

    def _measure(self, query: str, documents: Sequence[str]) -> dict[str, float]:
        """Metrics of one ranking; the order is given, so the scores just count down."""
        scores = {name: float(-place) for place, name in reversed(list(enumerate(documents)))}
        measures = {self._parse(theirs): ours for ours, theirs in MEASURES.items()}
        evaluator = self._evaluator(list(measures), {query: self._grades[query]})
        found = evaluator.iter_calc({query: scores})
        return {measures[metric.measure]: metric.value for metric in found}


def means(sums: Sums, order: str) -> dict[str, float]:
    """Average the metrics of one order; empty if no query was judged."""
    queries = sums.get("queries", 0)
    return {name: total / queries for name, total in sums[order].items()} if queries else {}


def are_sums(value: Any) -> bool:
    """Whether a value read from a file is what :meth:`Judge.add` writes."""
    if value == {}:
        return True
    if value.keys() != {"queries", "before", "after"} or type(value["queries"]) is not int:
        return False
    orders = [value["before"], value["after"]]
    return 0 < value["queries"] < 2**63 and all(
        isinstance(order, dict)
        and order.keys() == MEASURES.keys()
        and all(type(total) is float and math.isfinite(total) for total in order.values())
        for order in orders
    )


def read_qrels(path: str) -> dict[str, dict[str, int]]:
    """Read judgements: query to document to grade."""
    grades: dict[str, dict[str, int]] = defaultdict(dict)
    with closing(Lines(path, "--qrels")) as lines:
        for count, line in enumerate(lines.filled()):
            if count == JUDGEMENTS:
                problem = f"{path} has more than {JUDGEMENTS:,} judgements"
                raise InvalidInput("--qrels", problem, "Leave out those of other queries.")
            try:
                query, document, grade = _judgement(line)
            except ValueError:
                problem = f"{path}:{lines.number} is no judgement"
                raise InvalidInput("--qrels", problem, FORM) from None
            grades[query][document] = grade
    if not grades:
        raise InvalidInput("--qrels", f"{path} holds no judgements", FORM)
    return dict(grades)


def _judgement(line: bytes | None) -> tuple[str, str, int]:
    """Query, document and grade of a line; ValueError if it is none."""
    query, _, document, grade = (line or b"").decode().split()
    if max(len(query), len(document)) > ID_CHARACTERS or int(grade) not in GRADES:
        raise ValueError(line)
    return query, document, int(grade)


@dataclass(frozen=True, slots=True)
class PrecisionComparison:
    """One precision on the judged queries."""

    precision: str
    quality: dict[str, float]  # metrics; empty if the precision was refused
    pairs_per_s: float = 0.0  # pairs per second, tokenizing included
    refused: str = ""  # why it cannot be used; empty if it can


def check_comparable(job: OfflineJob) -> None:
    """Refuse a comparison without judgements, or of an input that can be read only once."""
    if job.qrels is None:
        raise InvalidInput("--compare", "needs judgements", "Give --qrels FILE.")
    if job.input == STANDARD:
        raise InvalidInput("--compare", "reads the input several times", "Name a file.")


def compare_precisions(job: OfflineJob, on_progress: Progress) -> list[PrecisionComparison]:
    """Score the judged queries in each precision of the device, fp32 first."""
    check_comparable(job)
    judge = Judge(str(job.qrels))
    found: list[PrecisionComparison] = []
    with tempfile.TemporaryDirectory() as folder:
        index = Path(folder) / "index"
        try:
            names = candidate_precisions(job.options.device)
        except ImportError:  # no torch: ONNX graphs compute in what they were saved in
            names = ["fp32"]
        for name in names:
            on_progress(name, len(found), len(names))
            options = replace(job.options, precision=cast("Precision", name))
            found.append(_measured(replace(job, options=options), judge, index))
    return found


def _measured(job: OfflineJob, judge: Judge, index: Path) -> PrecisionComparison:
    name = job.options.precision
    sums: Sums = {}
    pairs = 0
    try:
        scorer = WindowScorer(job.model, job.options)
    except (InvalidInput, UnsupportedModel) as error:
        return PrecisionComparison(name, {}, refused=str(error))
    # The index is in a folder of this process; the first precision made it.
    known = digest_of("--compare", index) if index.is_file() else None
    with closing(scorer), closing(job.reader(index, known)) as reader:
        steps = scorer.steps
        ahead = windows(_judged(reader, judge), reader, steps.window, steps.max_length)
        started = monotonic()
        for scored in scorer.score(ahead):
            judge.add(sums, ranked(scored, None))
            pairs += len(scored.logits)
        seconds = monotonic() - started
    return PrecisionComparison(name, means(sums, "after") if sums else {}, pairs / seconds)


def _judged(reader: Reader, judge: Judge) -> Iterator[Entry]:
    """The reader's rows of judged queries."""
    for entry in reader.rows():
        kept = [item for item in entry if isinstance(item, Row) and judge.judges(item.id)]
        if kept:
            yield tuple(kept)
