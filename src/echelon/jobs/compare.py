"""What each precision costs in accuracy, on the user's own judgements."""

from __future__ import annotations

import tempfile
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from echelon.errors import InvalidInput, UnsupportedModel
from echelon.jobs.quality import Judge, Sums, means
from echelon.jobs.rows import Row
from echelon.jobs.score import Scoring
from echelon.jobs.streams import STANDARD
from echelon.jobs.windows import windows
from echelon.jobs.writers import ranked
from echelon.models.device import candidate_precisions
from echelon.types import monotonic

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from echelon.jobs.job import Job
    from echelon.jobs.readers import Entry, Reader
    from echelon.jobs.rows import Mark
    from echelon.options import Precision


@dataclass(frozen=True, slots=True)
class Trial:
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


def check_comparable(job: Job) -> None:
    """Refuse a comparison that cannot be made.

    Raises:
        InvalidInput: no judgements, or an input that can be read only once.
    """
    if job.qrels is None:
        raise InvalidInput("--compare", "needs judgements", "Give --qrels FILE.")
    if job.input == STANDARD:
        raise InvalidInput("--compare", "reads the input several times", "Name a file.")


def compare_precisions(job: Job, told: Callable[[str], None]) -> list[Trial]:
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


def _trial(job: Job, judge: Judge, index: Path) -> Trial:
    name = job.options.precision
    sums: Sums = {}
    pairs = 0
    try:
        scoring = Scoring(job.model, job.options)
    except (InvalidInput, UnsupportedModel) as error:
        return Trial(name, {}, refused=str(error))
    with scoring, closing(job.reader(index, job.facts(index))) as reader:
        steps = scoring.steps
        ahead = windows(_Judged(reader, judge), steps.window, steps.max_length)
        started = monotonic()
        for scored in scoring.score(ahead):
            judge.add(sums, ranked(scored, None))
            pairs += len(scored.logits)
        seconds = monotonic() - started
    return Trial(name, means(sums, "after") if sums else {}, pairs / seconds)


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

    def mark(self) -> Mark:
        return self._reader.mark()

    def skip_to(self, mark: Mark) -> None:
        self._reader.skip_to(mark)

    def close(self) -> None:
        self._reader.close()
