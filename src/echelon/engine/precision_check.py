"""Does a faster precision rank as the reference does? Agreement between two sets of scores. Pure.

Kendall's tau-b is Kendall (1945), "The treatment of ties in ranking problems"; nDCG is Järvelin
and Kekäläinen (2002) with gains 2^grade - 1.

The gate: a faster precision may stand in for fp32 only where it ranks as fp32 does.

Both score the same judged texts; :mod:`echelon.engine.precision_check` compares the rankings.
Tuning asks it
about every precision and keeps the answers in the profile. Whoever asks for int8 without such a
profile passes it once for each model and machine, and the answer is kept beside the models.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from echelon.data import load_texts
from echelon.engine.engine import Engine, StepLimits
from echelon.errors import InvalidInput, ProfileError, StorageError
from echelon.models.demo import home
from echelon.models.device import cpu_name
from echelon.models.kernels import kernels
from echelon.models.registry import layer_errors, may_choose_int8, open_scorer
from echelon.options import check_max_length
from echelon.profile import ProfileKey, library_versions, read_json, write_json
from echelon.scheduling.packing import pack, step_budget
from echelon.types import monotonic

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from echelon.data import Texts, Topic
    from echelon.engine.worker import ScorerFactory
    from echelon.models.base import Scorer
    from echelon.models.hub import ModelFolder
    from echelon.options import Options
    from echelon.profile import Profile
    from echelon.tokenization.pairs import EncodedPairs
    from echelon.tokenization.tokenizer import PairEncoder
    from echelon.types import FloatArray, ModelInfo

LEAST_TAU = 0.97
LEAST_OVERLAP = 0.97
MOST_NDCG_LOSS = 0.005
TOP = 10


@dataclass(frozen=True, slots=True)
class Agreement:
    """How scores of one precision agree with fp32's, means over queries.

    Attributes:
        tau: Kendall's tau-b within queries.
        overlap: share of the top ten that is the same.
        max_delta: largest difference of a logit.
        ndcg_loss: nDCG@10 of fp32 minus that of the precision; None without judgements.
    """

    tau: float
    overlap: float
    max_delta: float
    ndcg_loss: float | None

    @property
    def passed(self) -> bool:
        """Whether it may serve in place of fp32."""
        return (
            self.tau >= LEAST_TAU
            and self.overlap >= LEAST_OVERLAP
            and (self.ndcg_loss is None or self.ndcg_loss <= MOST_NDCG_LOSS)
        )


def agreement(
    reference: Sequence[FloatArray],
    candidate: Sequence[FloatArray],
    grades: Sequence[Sequence[int] | None],
) -> Agreement:
    """Compare logits query by query.

    Args:
        reference: per query, fp32 logits of its documents.
        candidate: per query, the other precision's.
        grades: per query, judged relevance of its documents, or None.
    """
    pairs = list(zip(reference, candidate, strict=True))
    losses = [
        ndcg(kept, judged) - ndcg(other, judged)
        for (kept, other), judged in zip(pairs, grades, strict=True)
        if judged is not None and any(judged)
    ]
    return Agreement(
        tau=float(np.mean([kendall_tau(a, b) for a, b in pairs])),
        overlap=float(np.mean([top_overlap(a, b) for a, b in pairs])),
        max_delta=max(float(np.abs(a - b).max(initial=0.0)) for a, b in pairs),
        ndcg_loss=float(np.mean(losses)) if losses else None,
    )


def kendall_tau(first: FloatArray, second: FloatArray) -> float:
    """Kendall's tau-b of two score lists; 1.0 where one of them has nothing to order."""
    upper = np.triu_indices(len(first), 1)
    a = np.sign(first[upper[0]] - first[upper[1]])
    b = np.sign(second[upper[0]] - second[upper[1]])
    orderable = np.sqrt(float(np.count_nonzero(a)) * float(np.count_nonzero(b)))
    return float(np.dot(a, b) / orderable) if orderable else 1.0


def top_overlap(first: FloatArray, second: FloatArray, top: int = TOP) -> float:
    """Share of the best ``top`` documents that both lists have in common."""
    size = min(top, len(first))
    best = [set(np.argsort(-scores, kind="stable")[:size].tolist()) for scores in (first, second)]
    return len(best[0] & best[1]) / size if size else 1.0


def ndcg(scores: FloatArray, grades: Sequence[int], top: int = TOP) -> float:
    """Give nDCG at ``top`` of the order that the scores give; 0.0 where nothing is relevant."""
    gains = 2.0 ** np.asarray(grades, dtype=np.float64) - 1.0
    discounts = 1.0 / np.log2(np.arange(2, len(gains) + 2))
    discounts[top:] = 0.0
    ideal = float(np.dot(np.sort(gains)[::-1], discounts))
    got = float(np.dot(gains[np.argsort(-scores, kind="stable")], discounts))
    return got / ideal if ideal else 0.0


if TYPE_CHECKING:
    Told = Callable[[str], None]


logger = logging.getLogger(__name__)

TOPICS = 8
"""Queries that precisions are compared on: about 96 pairs, seconds even for a large model."""

KEPT_SHARES = (16, 8, 4)
"""One in so many layers, the most sensitive, stays in bf16 where int8 alone does not pass. Beyond a
quarter little would be left of its speed."""


def opener(folder: ModelFolder, options: Options, keep_bf16: Sequence[str] = ()) -> ScorerFactory:
    """Opens a model in a precision, in this process or another.

    Args:
        folder: where it lies.
        options: its device, threads and label.
        keep_bf16: layers that int8 leaves in bf16.
    """
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
    """A model and the judged texts that precisions are compared on."""

    folder: ModelFolder
    options: Options
    encoder: PairEncoder
    topics: Sequence[Topic]

    @classmethod
    def of(
        cls, folder: ModelFolder, options: Options, encoder: PairEncoder, texts: Texts
    ) -> PrecisionCheck:
        """A few queries from all over the set."""
        apart = max(1, len(texts.topics) // TOPICS)
        return cls(folder, options, encoder, texts.topics[::apart][:TOPICS])

    def opener(self, keep_bf16: Sequence[str] = ()) -> ScorerFactory:
        """See :func:`opener`."""
        return opener(self.folder, self.options, keep_bf16)

    def open(self, precision: str, keep_bf16: Sequence[str] = ()) -> Scorer:
        """The model in a precision."""
        return self.opener(keep_bf16)(precision=precision)

    def encode(self, facts: ModelInfo) -> EncodedPairs:
        """All pairs of the topics."""
        options = self.options
        longest = check_max_length(
            options.max_length, facts.max_tokens, self.encoder.template.specials
        )
        pairs = [(topic.query, document) for topic in self.topics for document in topic.documents]
        return self.encoder.encode(pairs, longest, options.truncation, options.max_query_tokens)

    def score(
        self, precision: str, keep_bf16: Sequence[str] = ()
    ) -> tuple[list[FloatArray], float]:
        """Logits of each topic, and tokens a second of the second of two passes."""
        scorer = self.open(precision, keep_bf16)
        try:
            encoded = self.encode(scorer.facts)
            engine = Engine(scorer, StepLimits(step_budget(None, None, scorer.facts.device)))
            engine.run(encoded)
            started = monotonic()
            outcome = engine.run(encoded)
            seconds = monotonic() - started
        finally:
            scorer.close()
        bounds = np.cumsum([len(topic.documents) for topic in self.topics])[:-1]
        return np.split(outcome.logits, bounds), outcome.report.tokens / seconds

    def sensitive_layers(self) -> list[str]:
        """Linear layers by the error that int8 makes in them, the worst first."""
        scorer = self.open("bf16")
        facts = scorer.facts
        scorer.close()
        encoded = self.encode(facts)
        steps = pack(encoded.lengths, step_budget(None, None, facts.device))
        return list(layer_errors(self.folder.path, map(encoded.batch, steps)))


def compare(trial: PrecisionCheck, precisions: Sequence[str], told: Told) -> list[dict[str, Any]]:
    """Speed of each precision, and how its ranking agrees with that of the first one, fp32.

    Returns:
        A row each: ``precision``, ``tokens_per_s``, ``tau``, ``overlap``, ``max_delta``,
        ``ndcg_loss``, ``passed``, ``queries`` and ``keep_bf16``.
    """
    told(f"scoring with {precisions[0]}")
    reference, speed = trial.score(precisions[0])
    rows = [_row(trial, precisions[0], (), reference, reference, speed)]
    for precision in precisions[1:]:
        told(f"comparing {precision} with {precisions[0]}")
        logits, speed = trial.score(precision)
        row = _row(trial, precision, (), reference, logits, speed)
        if precision == "int8" and not row["passed"]:
            row = _relent(trial, reference, row, told)
        rows.append(row)
    return rows


def _relent(
    trial: PrecisionCheck, reference: list[FloatArray], row: dict[str, Any], told: Told
) -> dict[str, Any]:
    """int8 with ever more of its sensitive layers in bf16: the first that passes, or the last."""
    told("looking for the layers that int8 harms most")
    layers = trial.sensitive_layers()
    for share in KEPT_SHARES:
        keep = layers[: max(1, len(layers) // share)]
        told(f"comparing int8 with {len(keep)} of {len(layers)} layers in bf16")
        logits, speed = trial.score("int8", keep)
        row = _row(trial, "int8", keep, reference, logits, speed)
        if row["passed"]:
            break
    return row


def _row(
    trial: PrecisionCheck,
    precision: str,
    keep_bf16: Sequence[str],
    reference: list[FloatArray],
    logits: list[FloatArray],
    tokens_per_s: float,
) -> dict[str, Any]:
    verdict = agreement(reference, logits, [topic.grades for topic in trial.topics])
    return {
        "precision": precision,
        "tokens_per_s": tokens_per_s,
        **asdict(verdict),
        "passed": verdict.passed,
        "queries": len(trial.topics),
        "keep_bf16": list(keep_bf16),
    }


def check_precision(
    folder: ModelFolder,
    options: Options,
    encoder: PairEncoder,
    profile: Profile | None,
    told: Told = lambda _: None,
) -> list[str]:
    """Let int8 through the gate, where it was chosen, and say which layers it leaves in bf16.

    The answer is the profile's where that was measured with this model on this machine, else the
    one kept from an earlier call, else measured now.

    Raises:
        InvalidInput: int8 does not rank as fp32 does.
    """
    if options.precision != "int8" or not may_choose_int8(folder.path, options.device):
        return []
    key = ProfileKey(folder.name, folder.revision, "cpu", cpu_name(), "int8", library_versions())
    row = _from_profile(profile, key) or _kept(key)
    if row is None:
        logger.info("Comparing int8 with fp32, once for this model and machine.")
        texts = load_texts(None, language="en" if folder.name == "demo" else None)
        gated = replace(options, device="cpu")
        row = compare(PrecisionCheck.of(folder, gated, encoder, texts), ["fp32", "int8"], told)[1]
        _keep(key, row)
    require_passed(row)
    logger.info("int8 may serve: %s.", _words(row))
    kept: list[str] = row["keep_bf16"]
    return kept


def _from_profile(profile: Profile | None, key: ProfileKey) -> dict[str, Any] | None:
    if profile is None or replace(profile.key, precision="int8").differences(key):
        return None
    return next((row for row in profile.precisions if row["precision"] == "int8"), None)


def _place(key: ProfileKey) -> Path:
    """The kept answer's file; kernels and torch round differently, so they count as well."""
    question = json.dumps([asdict(key), kernels() is not None], sort_keys=True)
    return home() / "gates" / f"{hashlib.sha256(question.encode()).hexdigest()[:16]}.json"


def _kept(key: ProfileKey) -> dict[str, Any] | None:
    try:
        content = read_json(_place(key))
        return dict(content["int8"]) if content["key"] == asdict(key) else None
    except (ProfileError, KeyError, TypeError, ValueError):
        return None


def _keep(key: ProfileKey, row: dict[str, Any]) -> None:
    """Keep an answer; where that cannot be done the next process measures again."""
    path = _place(key)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"key": asdict(key), "int8": row})
    except (OSError, StorageError) as error:
        logger.warning("The comparison of int8 with fp32 cannot be kept: %s", error)


def _words(row: dict[str, Any]) -> str:
    loss = row["ndcg_loss"]
    judged = "" if loss is None else f", nDCG@10 {loss:+.4f} lower"
    layers = f", {len(row['keep_bf16'])} layers in bf16" if row["keep_bf16"] else ""
    return (
        f"Kendall's tau {row['tau']:.3f} and top-ten overlap {row['overlap']:.3f} with fp32 "
        f"over {row['queries']} queries{judged}{layers}"
    )


def require_passed(row: dict[str, Any]) -> None:
    """Refuse a precision that did not pass.

    Raises:
        InvalidInput: with what was measured and what is asked for.
    """
    if row["passed"]:
        return
    raise InvalidInput(
        "precision",
        f"{row['precision']} does not rank as fp32 does with this model ({_words(row)}; at least "
        f"{LEAST_TAU} and {LEAST_OVERLAP} are asked for, and at most {MOST_NDCG_LOSS} of nDCG@10)",
        "Use bf16 or auto. With `echelon tune --data` and --profile your own texts decide.",
    )
