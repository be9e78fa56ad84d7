"""The gate: a faster precision may stand in for fp32 only where it ranks as fp32 does.

Both score the same judged texts; :mod:`echelon.tune.quality` compares the rankings. Tuning asks it
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
from echelon.engine import Engine, Limits
from echelon.errors import InvalidInput, ProfileError, StorageError
from echelon.models.demo import home
from echelon.models.device import cpu_name
from echelon.models.kernels import kernels
from echelon.models.registry import layer_errors, may_choose_int8, open_scorer
from echelon.options import check_max_length
from echelon.profile import ProfileKey, library_versions, read_json, write_json
from echelon.scheduling.packing import pack, step_budget
from echelon.tune.quality import LEAST_OVERLAP, LEAST_TAU, MOST_NDCG_LOSS, agreement
from echelon.types import monotonic

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from echelon.data import Texts, Topic
    from echelon.models.base import ModelInfo, Scorer
    from echelon.models.hub import ModelFolder
    from echelon.options import Options
    from echelon.profile import Profile
    from echelon.score.worker import Opener
    from echelon.tokenization.pairs import EncodedPairs
    from echelon.tokenization.tokenizer import PairEncoder
    from echelon.types import FloatArray

    Told = Callable[[str], None]

logger = logging.getLogger(__name__)

TOPICS = 8
"""Queries that precisions are compared on: about 96 pairs, seconds even for a large model."""

KEPT_SHARES = (16, 8, 4)
"""One in so many layers, the most sensitive, stays in bf16 where int8 alone does not pass. Beyond a
quarter little would be left of its speed."""


def opener(folder: ModelFolder, options: Options, keep_bf16: Sequence[str] = ()) -> Opener:
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
class Trial:
    """A model and the judged texts that precisions are compared on."""

    folder: ModelFolder
    options: Options
    encoder: PairEncoder
    topics: Sequence[Topic]

    @classmethod
    def of(cls, folder: ModelFolder, options: Options, encoder: PairEncoder, texts: Texts) -> Trial:
        """A few queries from all over the set."""
        apart = max(1, len(texts.topics) // TOPICS)
        return cls(folder, options, encoder, texts.topics[::apart][:TOPICS])

    def opener(self, keep_bf16: Sequence[str] = ()) -> Opener:
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
            engine = Engine(scorer, Limits(step_budget(None, None, scorer.facts.device)))
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


def compare(trial: Trial, precisions: Sequence[str], told: Told) -> list[dict[str, Any]]:
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
    trial: Trial, reference: list[FloatArray], row: dict[str, Any], told: Told
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
    trial: Trial,
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


def pass_gate(
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
        row = compare(Trial.of(folder, gated, encoder, texts), ["fp32", "int8"], told)[1]
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
