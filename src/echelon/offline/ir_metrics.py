"""How good a ranking is by the user's own judgements, with ``ir_measures``.

Metrics are averaged over the judged queries that the input holds; each query is measured when it
is scored, so only sums are kept.

What each precision costs in accuracy, on the user's own judgements.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from echelon.errors import InvalidInput, UnsupportedModel
from echelon.models.device import candidate_precisions
from echelon.offline.rows import Row
from echelon.offline.scoring import WindowScorer, windows
from echelon.offline.streams import STANDARD, Lines, Source, need
from echelon.offline.writers import ranked
from echelon.types import monotonic

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from echelon.offline.job import OfflineJob
    from echelon.offline.readers import Entry, Reader
    from echelon.offline.rows import Id, ResumePoint
    from echelon.offline.writers import RankedRow
    from echelon.options import Precision

MEASURES = {"nDCG@10": "nDCG@10", "MRR@10": "RR@10", "recall@10": "R@10", "recall@100": "R@100"}
"""What people call a metric → what ``ir_measures`` calls it."""

FORM = "Each line is: query, 0, document and grade, with spaces between."
Sums = dict[str, Any]
"""``queries``, and per ranking its sum of each metric."""


class Judge:
    """Measures rankings against judgements.

    Args:
        path: TREC qrels; held in memory.

    Raises:
        InvalidInput: the file cannot be read, or a line is wrong.
        MissingDependency: ir_measures is not installed.
    """

    def __init__(self, path: str) -> None:
        need("ir_measures", "--qrels")
        import ir_measures

        self._grades = read_qrels(path)
        self._parse = ir_measures.parse_measure
        self._evaluator = ir_measures.evaluator

    def __len__(self) -> int:
        return len(self._grades)

    def judges(self, query: Id) -> bool:
        """Whether a query has a relevant document."""
        return any(grade > 0 for grade in self._grades.get(str(query), {}).values())

    def add(self, sums: Sums, rankings: Iterable[RankedRow]) -> None:
        """Add the judged queries among rankings, before and after.

        Args:
            sums: what to add to.
            rankings: rows with all their documents in order.
        """
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
        """Metrics of one ranking; its order is given, so scores only count down."""
        scores = {name: float(-place) for place, name in reversed(list(enumerate(documents)))}
        measures = {self._parse(theirs): ours for ours, theirs in MEASURES.items()}
        evaluator = self._evaluator(list(measures), {query: self._grades[query]})
        found = evaluator.iter_calc({query: scores})
        return {measures[metric.measure]: metric.value for metric in found}


def means(sums: Sums, order: str) -> dict[str, float]:
    """Averages of a ranking's metrics; empty where no query was judged."""
    queries = sums.get("queries", 0)
    return {name: total / queries for name, total in sums[order].items()} if queries else {}


def read_qrels(path: str) -> dict[str, dict[str, int]]:
    """Grades by query and document.

    Raises:
        InvalidInput: the file cannot be read, or a line is wrong.
    """
    grades: dict[str, dict[str, int]] = defaultdict(dict)
    with Source(path, "--qrels") as source:
        lines = Lines(source)
        for line in lines:
            if line is not None and not line.strip():
                continue
            try:
                query, _, document, grade = (line or b"").decode().split()
                grades[query][document] = int(grade)
            except ValueError as error:
                raise InvalidInput("--qrels", f"{path}:{lines.number}: {error}", FORM) from None
    if not grades:
        raise InvalidInput("--qrels", f"{path} holds no judgements", FORM)
    return dict(grades)


@dataclass(frozen=True, slots=True)
class PrecisionComparison:
    """One precision on the judged queries.

    Attributes:
        precision: its name.
        quality: metrics; empty where it was refused.
        pairs_per_s: pairs a second, tokenising and all.
        refused: why it cannot be used; empty where it can.
    """

    precision: str
    quality: dict[str, float]
    pairs_per_s: float = 0.0
    refused: str = ""


def check_comparable(job: OfflineJob) -> None:
    """Refuse a comparison that cannot be made.

    Raises:
        InvalidInput: no judgements, or an input that can be read only once.
    """
    if job.qrels is None:
        raise InvalidInput("--compare", "needs judgements", "Give --qrels FILE.")
    if job.input == STANDARD:
        raise InvalidInput("--compare", "reads the input several times", "Name a file.")


def compare_precisions(job: OfflineJob, told: Callable[[str], None]) -> list[PrecisionComparison]:
    """Score the judged queries in each precision of the device, fp32 first.

    Args:
        job: its input is read again for each.
        told: called with the precision under way.
    """
    check_comparable(job)
    judge = Judge(str(job.qrels))
    trials = []
    with tempfile.TemporaryDirectory() as folder:
        index = Path(folder) / "index"
        for name in _candidates(job.options.device):
            told(name)
            options = replace(job.options, precision=cast("Precision", name))
            trials.append(_trial(replace(job, options=options), judge, index))
    return trials


def _candidates(device: str) -> list[str]:
    try:
        return candidate_precisions(device)
    except ImportError:  # no torch: ONNX graphs compute in what they were saved in
        return ["fp32"]


def _trial(job: OfflineJob, judge: Judge, index: Path) -> PrecisionComparison:
    name = job.options.precision
    sums: Sums = {}
    pairs = 0
    try:
        scoring = WindowScorer(job.model, job.options)
    except (InvalidInput, UnsupportedModel) as error:
        return PrecisionComparison(name, {}, refused=str(error))
    with scoring, closing(job.reader(index, job.facts(index))) as reader:
        steps = scoring.steps
        ahead = windows(_Judged(reader, judge), steps.window, steps.max_length)
        started = monotonic()
        for scored in scoring.score(ahead):
            judge.add(sums, ranked(scored, None))
            pairs += len(scored.logits)
        seconds = monotonic() - started
    return PrecisionComparison(name, means(sums, "after") if sums else {}, pairs / seconds)


class _Judged:
    """A reader's rows of judged queries."""

    def __init__(self, reader: Reader, judge: Judge) -> None:
        self._reader, self._judge = reader, judge
        self.share = None

    def __iter__(self) -> Iterator[Entry]:
        for entry in self._reader:
            kept = [item for item in entry if isinstance(item, Row) and self._judge.judges(item.id)]
            if kept:
                yield tuple(kept)

    def mark(self) -> ResumePoint:
        return self._reader.mark()

    def skip_to(self, mark: ResumePoint) -> None:
        self._reader.skip_to(mark)

    def close(self) -> None:
        self._reader.close()
