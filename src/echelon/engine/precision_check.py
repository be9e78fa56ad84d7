"""Checks that a faster precision ranks as fp32 does before it is used instead of fp32. No torch.

Both precisions score the same judged texts, the user's first, until it is sure that they agree or
do not, or until all texts are used: then nothing is proven, and the precision is not chosen. A
GPU's fp16 and bf16 are checked as int8 is. `echelon tune` checks every precision and writes the
results into the profile. int8 without such a profile is checked once for each model and machine,
and the result is stored beside the downloaded models.
"""

from __future__ import annotations

import logging
import math
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from echelon.data import Texts, Topic, load_texts
from echelon.engine.agreement import (
    MAX_NDCG_LOSS,
    MIN_OVERLAP,
    MIN_TAU,
    NO_AGREEMENT,
    Agreement,
    agreement,
    decided,
)
from echelon.engine.check_store import store_row, stored_row
from echelon.engine.engine import Engine, StepLimits
from echelon.errors import InvalidInput, NonFiniteScore
from echelon.messages import N_, tr
from echelon.models.base import warm_runs
from echelon.models.device import cpu_name, matrix_features
from echelon.models.kernels import used_level
from echelon.models.registry import layer_errors, open_scorer, precisions_to_compare
from echelon.options import Options, check_max_length
from echelon.profile import Profile, ProfileKey, library_versions
from echelon.progress import Progress, no_progress
from echelon.scheduling.packing import pack, step_budget
from echelon.types import monotonic

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from echelon.engine.worker import ScorerFactory
    from echelon.models.base import Scorer
    from echelon.models.hub import ModelFolder
    from echelon.tokenization.pairs import EncodedPairs
    from echelon.tokenization.tokenizer import PairEncoder
    from echelon.types import FloatArray, ModelInfo

logger = logging.getLogger(__name__)

TOPICS = 12
"""Queries that precisions are compared on at first, about 144 pairs: the fewest that can prove
anything. Where they do not decide, more are added."""

BF16_SHARES = (16, 8, 4)
"""Where int8 alone does not pass, one layer in 16, 8 or 4 stays in bf16, the most sensitive first.
With more than a quarter of them little would be left of the speed of int8."""


def scorer_factory(
    folder: ModelFolder, options: Options, keep_bf16: Sequence[str] = ()
) -> ScorerFactory:
    """A function that opens the model in a precision, in this process or another."""
    return partial(
        open_scorer,
        folder.path,
        device=options.device,
        threads=options.threads,
        label=options.label,
        keep_bf16=keep_bf16,
    )


@dataclass(frozen=True, slots=True)
class PrecisionCheck:
    """A model, and the judged texts that its precisions are compared on."""

    folder: ModelFolder
    options: Options
    encoder: PairEncoder
    topics: Sequence[Topic]  # those that are always compared
    more: Sequence[Topic] = ()  # those that are added while the others do not decide

    @classmethod
    def of(
        cls, folder: ModelFolder, options: Options, encoder: PairEncoder, texts: Texts | None = None
    ) -> PrecisionCheck:
        """A check on the queries of ``texts``, if there are any, and then on the built-in ones."""
        own = () if texts is None else texts.topics
        built_in = load_texts(None, language="en" if folder.name == "demo" else None)
        topics = list(dict.fromkeys([*_spread(own), *_spread(built_in.topics)]))
        return cls(folder, options, encoder, topics[:TOPICS], topics[TOPICS:])

    @property
    def parts(self) -> Iterator[PrecisionCheck]:
        """Checks on a part of the queries each; every part doubles their number."""
        yield replace(self, more=())
        done, left = len(self.topics), self.more
        while left:
            yield replace(self, topics=left[:done], more=())
            left, done = left[done:], 2 * done

    def cut(self, max_length: int | None) -> PrecisionCheck:
        """The same with pairs of at most ``max_length`` tokens; None leaves them as they are."""
        if max_length is None:
            return self
        return replace(self, options=replace(self.options, max_length=max_length))

    def factory(self, keep_bf16: Sequence[str] = ()) -> ScorerFactory:
        """See :func:`scorer_factory`."""
        return scorer_factory(self.folder, self.options, keep_bf16)

    def open(self, precision: str, keep_bf16: Sequence[str] = ()) -> Scorer:
        """Open the model in a precision; the caller closes it."""
        return self.factory(keep_bf16)(precision=precision)

    def max_length(self, info: ModelInfo) -> int:
        """Largest number of tokens of a pair, by the options and the model."""
        specials = self.encoder.template.specials
        return check_max_length(self.options.max_length, info.max_tokens, specials)

    def asked(self, query: str, run: int) -> str:
        """The query as one that no other run asks, which is what a user's next query costs.

        A language model keeps what it computed of a query: run after run would find it. A
        classifier keeps nothing, and its query stays as it is.
        """
        return query if self.encoder.prompt is None else f"{run} {query}"

    def encode(self, info: ModelInfo, run: int | None = None) -> EncodedPairs:
        """Tokenize all pairs of the topics; with a ``run``, as :meth:`asked` in it."""
        options = self.options
        pairs = [
            (topic.query if run is None else self.asked(topic.query, run), document)
            for topic in self.topics
            for document in topic.documents
        ]
        return self.encoder.encode(
            pairs, self.max_length(info), options.truncation, options.max_query_tokens
        )

    def score(
        self, precision: str, keep_bf16: Sequence[str] = ()
    ) -> tuple[list[FloatArray], float]:
        """Score ``topics``: their logits, and tokens per second.

        Before, the first topic is scored, or on a card all of them, so that the speed is not that
        of the first steps, nor of capturing graphs.
        """
        with closing(self.open(precision, keep_bf16)) as scorer:
            encoded = self.encode(scorer.info)
            engine = Engine(scorer, StepLimits(step_budget(None, None, scorer.info.device)))
            engine.run(replace(self, topics=self.topics[:1]).encode(scorer.info))
            if warm_runs(scorer.info.device) > 1:
                for _ in range(warm_runs(scorer.info.device)):
                    engine.run(encoded)
            started = monotonic()
            outcome = engine.run(encoded)
            seconds = monotonic() - started
        bounds = np.cumsum([len(topic.documents) for topic in self.topics])[:-1]
        return np.split(outcome.logits, bounds), outcome.report.tokens / seconds

    def sensitive_layers(self) -> list[str]:
        """Linear layers by the error that int8 causes in them, the largest error first."""
        with closing(self.open("bf16")) as scorer:
            info = scorer.info
        encoded = self.encode(info)
        steps = pack(encoded.costs, step_budget(None, None, info.device))
        return list(layer_errors(self.folder.path, map(encoded.batch, steps)))


def _spread(topics: Sequence[Topic]) -> list[Topic]:
    """Topics whose first ones are evenly spread; one document cannot be ranked, so two or more."""
    ranked = [topic for topic in topics if len(topic.documents) > 1]
    distance = max(1, len(ranked) // TOPICS)
    return [topic for first in range(distance) for topic in ranked[first::distance]]


class Comparisons:
    """Compares precisions with the exact one, each on as many queries as it takes to decide.

    The exact one scores each part of the queries once, when a comparison needs it. A comparison
    ends undecided where its next part would take longer than ``limit_s`` from now allows.
    """

    def __init__(
        self, check: PrecisionCheck, exact: str = "fp32", limit_s: float = math.inf
    ) -> None:
        self._parts, self._exact = list(check.parts), exact
        self._scored: list[tuple[list[FloatArray], float]] = []
        self._end_s = monotonic() + limit_s

    def exact_row(self) -> dict[str, Any]:
        """The row of the exact precision."""
        logits, speed = self._exact_part(0)
        found = agreement(logits, logits, [topic.grades for topic in self._parts[0].topics])
        sure = replace(found, tau_low=found.tau, overlap_low=found.overlap)
        return _row(self._exact, (), sure, len(logits), speed)

    def row(
        self, precision: str, keep_bf16: Sequence[str] = (), max_length: int | None = None
    ) -> dict[str, Any]:
        """Compare a precision whose pairs are cut to ``max_length`` tokens, if that is given."""
        try:
            return self._row(precision, keep_bf16, max_length)
        except NonFiniteScore as error:
            logger.warning("%s gives no numbers with this model (%s).", precision, error)
            return _row(precision, keep_bf16, NO_AGREEMENT, 0, 0.0)

    def _row(
        self, precision: str, keep_bf16: Sequence[str], max_length: int | None
    ) -> dict[str, Any]:
        began, speed = monotonic(), 0.0
        reference: list[FloatArray] = []
        logits: list[FloatArray] = []
        grades: list[Sequence[int] | None] = []
        for number, part in enumerate(self._parts):
            reference += self._exact_part(number)[0]
            scored, pace = part.cut(max_length).score(precision, keep_bf16)
            logits, speed = logits + scored, speed or pace
            grades += [topic.grades for topic in part.topics]
            found = agreement(reference, logits, grades)
            now = monotonic()
            # The next part is as large as all parts so far.
            if found.passed or found.failed or now + (now - began) > self._end_s:
                break
        return _row(precision, keep_bf16, found, len(logits), speed)

    def _exact_part(self, number: int) -> tuple[list[FloatArray], float]:
        if number == len(self._scored):
            self._scored.append(self._parts[number].score(self._exact))
        return self._scored[number]


def compare_precisions(
    check: PrecisionCheck,
    precisions: Sequence[str],
    on_progress: Progress = no_progress,
    limit_s: float = math.inf,
) -> list[dict[str, Any]]:
    """Measure the speed of each precision and its agreement with the first one, fp32.

    Each is compared on the first queries, and on more while ``limit_s`` seconds for all allow it.

    Returns:
        A row each: ``precision``, ``tokens_per_s``, the fields of :class:`Agreement`, ``proven``,
        ``failed``, ``passed``, ``queries`` and ``keep_bf16``; where ``proven`` and ``failed`` are
        both false, the queries do not decide.
    """
    first, *others = precisions
    comparisons = Comparisons(check, first, limit_s)
    on_progress(tr("scoring with {precision}", precision=first))
    rows = [comparisons.exact_row()]
    for precision in others:
        on_progress(tr("comparing {precision} with {first}", precision=precision, first=first))
        row = comparisons.row(precision)
        if precision == "int8" and not row["passed"]:
            row = _int8_with_bf16_layers(check, comparisons, on_progress)
        rows.append(row)
    return rows


def _int8_with_bf16_layers(
    check: PrecisionCheck, comparisons: Comparisons, on_progress: Progress
) -> dict[str, Any]:
    """Leave more and more sensitive layers in bf16: the first row that passes, or the last."""
    on_progress(tr("looking for the layers that int8 changes most"))
    layers = check.sensitive_layers()
    row: dict[str, Any] = {}
    for share in BF16_SHARES:
        keep = layers[: max(1, len(layers) // share)]
        words = N_("comparing int8 with {kept} of {all} layers in bf16")
        on_progress(tr(words, kept=len(keep), all=len(layers)))
        row = comparisons.row("int8", keep)
        if row["passed"]:
            break
    return row


def _row(
    precision: str, keep_bf16: Sequence[str], found: Agreement, queries: int, tokens_per_s: float
) -> dict[str, Any]:
    return {
        "precision": precision,
        "tokens_per_s": tokens_per_s,
        **asdict(found),
        "proven": found.proven,
        "failed": found.failed,
        "passed": found.passed,
        "queries": queries,
        "keep_bf16": list(keep_bf16),
    }


def check_precision(
    folder: ModelFolder,
    options: Options,
    encoder: PairEncoder,
    profile: Profile | None,
    on_progress: Progress = no_progress,
) -> list[str]:
    """Check int8 where it was chosen; a model in another precision needs no check.

    The result is taken from the profile if that was measured with this model on this machine,
    then from an earlier check, and is measured otherwise.

    Returns:
        The layers that int8 leaves in bf16.

    Raises:
        InvalidInput: int8 does not rank as fp32 does.
    """
    if options.precision != "int8":
        return []
    if "int8" not in precisions_to_compare(folder.path, options.device)[1:]:
        return []  # an ONNX graph has one precision
    key = ProfileKey(
        folder.name,
        folder.revision,
        "cpu",
        cpu_name(),
        "int8",
        library_versions(),
        matrix_features() or None,  # the number of cores does not change the scores
        kernels=used_level(),  # each rounds differently, as torch does
    )
    row = _from_profile(profile, key) or stored_row(key)
    if row is None:
        logger.info("Comparing int8 with fp32, once for this model and machine.")
        check = PrecisionCheck.of(folder, replace(options, device="cpu"), encoder)
        row = compare_precisions(check, ["fp32", "int8"], on_progress)[1]
        store_row(key, row)
    require_passed(row)
    logger.info("int8 ranks as fp32 does: %s.", _summary(row))
    keep_bf16: list[str] = row["keep_bf16"]
    return keep_bf16


def require_passed(row: dict[str, Any]) -> None:
    """Raise :class:`InvalidInput` for a precision that did not pass: measured and required."""
    if row["passed"]:
        return
    said = "does not rank" if decided(row) else "is not proven to rank"
    raise InvalidInput(
        "precision",
        f"{row['precision']} {said} as fp32 does with this model ({_summary(row)}; required are "
        f"surely {MIN_TAU} and {MIN_OVERLAP}, and a loss of at most {MAX_NDCG_LOSS} nDCG@10)",
        "Use bf16 or auto. To check it on your own texts, run `echelon tune --data` and give the "
        "profile with --profile.",
    )


def _summary(row: dict[str, Any]) -> str:
    loss = row["ndcg_loss"]
    judged = "" if loss is None else f", nDCG@10 {loss:+.4f} lower"
    layers = f", {len(row['keep_bf16'])} layers in bf16" if row["keep_bf16"] else ""
    tau, overlap = (_sure(row, name) for name in ("tau", "overlap"))
    return (
        f"Kendall's tau {tau} and top-ten overlap {overlap} with fp32 over {row['queries']} queries"
        f"{judged}{layers}"
    )


def _sure(row: dict[str, Any], name: str) -> str:
    """A mean and its lower bound, which rows of older profiles do not have."""
    low = row.get(f"{name}_low")
    return f"{row[name]:.3f}" + ("" if low is None else f" (surely {low:.3f})")


def _from_profile(profile: Profile | None, key: ProfileKey) -> dict[str, Any] | None:
    if profile is None or replace(profile.key, precision="int8").differences(key):
        return None
    return profile.precision_row("int8")
