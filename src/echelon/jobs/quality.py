"""How good a ranking is by the user's own judgements, with ``ir_measures``.

Metrics are averaged over the judged queries that the input holds; each query is measured when it
is scored, so only sums are kept.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

from echelon.errors import InvalidInput
from echelon.jobs.streams import Lines, Source, need

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from echelon.jobs.rows import Id
    from echelon.jobs.writers import RankedRow

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
