"""Checks that a faster precision ranks as fp32 does before it is used instead of fp32. No torch.

Both precisions score the same judged texts. `echelon tune` checks every precision and writes the
results into the profile. int8 without such a profile is checked once for each model and machine,
and the result is stored beside the downloaded models.

Kendall's tau-b: Kendall (1945), "The treatment of ties in ranking problems". nDCG: Järvelin and
Kekäläinen (2002), with gains 2^grade - 1.
"""

from __future__ import annotations

import hashlib
import json
import logging
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from echelon.data import Texts, Topic, load_texts
from echelon.engine.engine import Engine, StepLimits
from echelon.errors import InvalidInput, ProfileError, StorageError
from echelon.models.demo import home
from echelon.models.device import cpu_name
from echelon.models.kernels import kernels
from echelon.models.registry import layer_errors, open_scorer, precisions_to_compare
from echelon.options import Options, check_max_length
from echelon.profile import Profile, ProfileKey, library_versions, read_json, write_json
from echelon.progress import Progress, no_progress
from echelon.scheduling.packing import pack, step_budget
from echelon.types import monotonic

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from echelon.engine.worker import ScorerFactory
    from echelon.models.base import Scorer
    from echelon.models.hub import ModelFolder
    from echelon.tokenization.pairs import EncodedPairs
    from echelon.tokenization.tokenizer import PairEncoder
    from echelon.types import FloatArray, ModelInfo

logger = logging.getLogger(__name__)

MIN_TAU = 0.97
MIN_OVERLAP = 0.97
MAX_NDCG_LOSS = 0.005
TOP = 10

TOPICS = 8
"""Queries that precisions are compared on: about 96 pairs, seconds even for a large model."""

BF16_SHARES = (16, 8, 4)
"""Where int8 alone does not pass, one layer in 16, 8 or 4 stays in bf16, the most sensitive first.
With more than a quarter of them little would be left of the speed of int8."""

STORE = "precision_checks"  # folder of stored results, beside the downloaded models


@dataclass(frozen=True, slots=True)
class Agreement:
    """How well the scores of a precision agree with those of fp32: means over queries."""

    tau: float  # Kendall's tau-b within queries
    overlap: float  # share of the top ten that both have
    max_delta: float  # largest difference of a logit
    ndcg_loss: float | None  # nDCG@10 of fp32 minus that of the precision; None without judgements

    @property
    def passed(self) -> bool:
        """Whether the precision may be used instead of fp32."""
        return (
            self.tau >= MIN_TAU
            and self.overlap >= MIN_OVERLAP
            and (self.ndcg_loss is None or self.ndcg_loss <= MAX_NDCG_LOSS)
        )


def agreement(
    reference: Sequence[FloatArray],
    candidate: Sequence[FloatArray],
    grades: Sequence[Sequence[int] | None],
) -> Agreement:
    """Compare logits query by query; ``grades`` is the judged relevance of each document."""
    pairs = list(zip(reference, candidate, strict=True))
    losses = [
        ndcg(exact, judged) - ndcg(other, judged)
        for (exact, other), judged in zip(pairs, grades, strict=True)
        if judged is not None and any(judged)
    ]
    return Agreement(
        tau=float(np.mean([kendall_tau(a, b) for a, b in pairs])),
        overlap=float(np.mean([top_overlap(a, b) for a, b in pairs])),
        max_delta=max(float(np.abs(a - b).max(initial=0.0)) for a, b in pairs),
        ndcg_loss=float(np.mean(losses)) if losses else None,
    )


def kendall_tau(first: FloatArray, second: FloatArray) -> float:
    """Kendall's tau-b of two score lists; 1.0 where all scores of a list are equal."""
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
    """Compute nDCG at ``top`` of the order by score; 0.0 where no document is relevant."""
    gains = 2.0 ** np.asarray(grades, dtype=np.float64) - 1.0
    discounts = 1.0 / np.log2(np.arange(2, len(gains) + 2))
    discounts[top:] = 0.0
    ideal = float(np.dot(np.sort(gains)[::-1], discounts))
    got = float(np.dot(gains[np.argsort(-scores, kind="stable")], discounts))
    return got / ideal if ideal else 0.0


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
    topics: Sequence[Topic]

    @classmethod
    def of(
        cls, folder: ModelFolder, options: Options, encoder: PairEncoder, texts: Texts
    ) -> PrecisionCheck:
        """A check on some queries, evenly spread over the texts."""
        distance = max(1, len(texts.topics) // TOPICS)
        return cls(folder, options, encoder, texts.topics[::distance][:TOPICS])

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

    def encode(self, info: ModelInfo) -> EncodedPairs:
        """Tokenize all pairs of the topics."""
        options = self.options
        pairs = [(topic.query, document) for topic in self.topics for document in topic.documents]
        return self.encoder.encode(
            pairs, self.max_length(info), options.truncation, options.max_query_tokens
        )

    def score(
        self, precision: str, keep_bf16: Sequence[str] = ()
    ) -> tuple[list[FloatArray], float]:
        """Score all topics twice: their logits, and tokens per second of the second pass."""
        with closing(self.open(precision, keep_bf16)) as scorer:
            encoded = self.encode(scorer.info)
            engine = Engine(scorer, StepLimits(step_budget(None, None, scorer.info.device)))
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
        steps = pack(encoded.lengths, step_budget(None, None, info.device))
        return list(layer_errors(self.folder.path, map(encoded.batch, steps)))


def compare_precisions(
    check: PrecisionCheck, precisions: Sequence[str], on_progress: Progress = no_progress
) -> list[dict[str, Any]]:
    """Measure the speed of each precision and its agreement with the first one, fp32.

    Returns:
        A row each: ``precision``, ``tokens_per_s``, ``tau``, ``overlap``, ``max_delta``,
        ``ndcg_loss``, ``passed``, ``queries`` and ``keep_bf16``.
    """
    first, *others = precisions
    on_progress(f"scoring with {first}")
    scored = check.score(first)
    reference = scored[0]
    rows = [_row(check, first, (), reference, scored)]
    for precision in others:
        on_progress(f"comparing {precision} with {first}")
        row = _row(check, precision, (), reference, check.score(precision))
        if precision == "int8" and not row["passed"]:
            row = _int8_with_bf16_layers(check, reference, on_progress)
        rows.append(row)
    return rows


def _int8_with_bf16_layers(
    check: PrecisionCheck, reference: list[FloatArray], on_progress: Progress
) -> dict[str, Any]:
    """Leave more and more sensitive layers in bf16: the first row that passes, or the last."""
    on_progress("looking for the layers that int8 changes most")
    layers = check.sensitive_layers()
    row: dict[str, Any] = {}
    for share in BF16_SHARES:
        keep = layers[: max(1, len(layers) // share)]
        on_progress(f"comparing int8 with {len(keep)} of {len(layers)} layers in bf16")
        row = _row(check, "int8", keep, reference, check.score("int8", keep))
        if row["passed"]:
            break
    return row


def _row(
    check: PrecisionCheck,
    precision: str,
    keep_bf16: Sequence[str],
    reference: list[FloatArray],
    scored: tuple[list[FloatArray], float],
) -> dict[str, Any]:
    logits, tokens_per_s = scored
    found = agreement(reference, logits, [topic.grades for topic in check.topics])
    return {
        "precision": precision,
        "tokens_per_s": tokens_per_s,
        **asdict(found),
        "passed": found.passed,
        "queries": len(check.topics),
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
    key = ProfileKey(folder.name, folder.revision, "cpu", cpu_name(), "int8", library_versions())
    row = _from_profile(profile, key) or _stored(key)
    if row is None:
        logger.info("Comparing int8 with fp32, once for this model and machine.")
        texts = load_texts(None, language="en" if folder.name == "demo" else None)
        check = PrecisionCheck.of(folder, replace(options, device="cpu"), encoder, texts)
        row = compare_precisions(check, ["fp32", "int8"], on_progress)[1]
        _store(key, row)
    require_passed(row)
    logger.info("int8 ranks as fp32 does: %s.", _summary(row))
    keep_bf16: list[str] = row["keep_bf16"]
    return keep_bf16


def require_passed(row: dict[str, Any]) -> None:
    """Raise :class:`InvalidInput` for a precision that did not pass: measured and required."""
    if row["passed"]:
        return
    raise InvalidInput(
        "precision",
        f"{row['precision']} does not rank as fp32 does with this model ({_summary(row)}; required "
        f"are at least {MIN_TAU} and {MIN_OVERLAP}, and a loss of at most {MAX_NDCG_LOSS} nDCG@10)",
        "Use bf16 or auto. To check it on your own texts, run `echelon tune --data` and give the "
        "profile with --profile.",
    )


def _summary(row: dict[str, Any]) -> str:
    loss = row["ndcg_loss"]
    judged = "" if loss is None else f", nDCG@10 {loss:+.4f} lower"
    layers = f", {len(row['keep_bf16'])} layers in bf16" if row["keep_bf16"] else ""
    return (
        f"Kendall's tau {row['tau']:.3f} and top-ten overlap {row['overlap']:.3f} with fp32 "
        f"over {row['queries']} queries{judged}{layers}"
    )


def _from_profile(profile: Profile | None, key: ProfileKey) -> dict[str, Any] | None:
    if profile is None or replace(profile.key, precision="int8").differences(key):
        return None
    return profile.precision_row("int8")


def _path_of(key: ProfileKey) -> Path:
    """The stored result's file; the kernels and torch round differently, so they are in the key."""
    text = json.dumps([asdict(key), kernels() is not None], sort_keys=True)
    return home() / STORE / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


def _stored(key: ProfileKey) -> dict[str, Any] | None:
    try:
        content = read_json(_path_of(key))
        return dict(content["int8"]) if content["key"] == asdict(key) else None
    except (ProfileError, KeyError, TypeError, ValueError):
        return None


def _store(key: ProfileKey, row: dict[str, Any]) -> None:
    """Store a result; where that fails, the next process measures again."""
    path = _path_of(key)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"key": asdict(key), "int8": row})
    except (OSError, StorageError) as error:
        logger.warning("The comparison of int8 with fp32 cannot be stored: %s", error)
