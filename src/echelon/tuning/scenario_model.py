"""The model and the requests of a scenario, and checks before anything long is measured.

The requests are simulated in tokens and sent as texts. The model's tokenizer is available here, so
each pair has exactly the length that was simulated; a load test that only knows a URL cuts texts by
words.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import psutil

from echelon.errors import InvalidInput
from echelon.loadtest.texts import LengthPolicy, TextSource, TokenLengths
from echelon.messages.units import duration, size
from echelon.simulation.service_level import latency_too_short, memory_too_small, pairs_too_long
from echelon.simulation.workload import (
    Arrival,
    ArrivalRecord,
    ObservedSize,
    SizeDistribution,
    Workload,
    max_tokens,
)
from echelon.tuning.machine import meter_of
from echelon.tuning.tuner import find_model
from echelon.types import monotonic

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Sequence

    from echelon.data import Texts, Topic
    from echelon.engine.precision_check import PrecisionCheck
    from echelon.models.base import Scorer
    from echelon.options import Options
    from echelon.profile import Profile
    from echelon.tokenization.tokenizer import PairEncoder
    from echelon.tuning.goal import ScenarioGoal

TIMED_STEPS = 3  # steps of one pair, of which the fastest counts

MARGIN = 4.0
"""Another precision or number of threads may be faster than the first steps by this factor."""

SAMPLE, DOCUMENTS = 20, 10  # requests, and documents of each, whose lengths are checked beforehand
CLOSE = 0.1  # texts have the requested length where their mean is within this relative difference


@dataclass(frozen=True, slots=True)
class ScenarioModel:
    """The model that a recommendation is for."""

    name: str | os.PathLike[str]  # as the user gave it
    check: PrecisionCheck
    texts: Texts  # all texts; the check has some of them
    longest: int  # tokens of the longest possible pair

    @property
    def options(self) -> Options:
        """The user's options."""
        return self.check.options

    def tuned(self, profile: Profile) -> PrecisionCheck:
        """The check with the threads that tuning chose."""
        options = replace(self.options, threads=profile.settings.threads)
        return replace(self.check, options=options)


def open_for_scenario(
    name: str | os.PathLike[str],
    options: Options,
    data: str | os.PathLike[str] | None,
    goal: ScenarioGoal,
) -> ScenarioModel:
    """Open the model once and refuse goals that no setting can reach.

    Raises:
        InvalidInput: lengths beyond the model, memory below its weights, or a goal below the time
            of one pair; the error says what is possible instead.
    """
    check, texts = find_model(name, options, data)
    before = psutil.Process().memory_info().rss
    with closing(check.open(options.precision)) as scorer:
        limit = check.max_length(scorer.info)
        model = ScenarioModel(name, check, texts, limit)
        asked = max_tokens(goal.tokens, goal.trace)
        if asked > limit:
            raise pairs_too_long(asked, limit)
        if goal.tokens is not None:
            require_texts(texts.topics, check.encoder, goal.tokens, goal.trace, limit)
        _check_memory(scorer, goal, before if scorer.info.device == "cpu" else 0, options)
        _check_goal(scorer, goal, model)
    return model


def _check_memory(scorer: Scorer, goal: ScenarioGoal, libraries: int, options: Options) -> None:
    limit = goal.memory_limit_bytes
    if limit is None:
        return
    meter = meter_of(scorer.info.device)
    meter.reset()
    held = meter.peak_bytes()
    if options.precision == "auto":  # int8 weights take a quarter of fp32's
        held = libraries + max(0, held - libraries) // 4
    if limit < held:
        problem = (
            f"{size(limit)} is less than the {size(held)} that libraries and weights need before "
            "the first step"
        )
        raise memory_too_small(problem, held)


def _check_goal(scorer: Scorer, goal: ScenarioGoal, model: ScenarioModel) -> None:
    if goal.goal_s is None:
        return
    pair = model.texts.sample(1)
    encoded = model.check.encoder.encode(pair, model.longest, model.options.truncation)
    batch = encoded.batch(np.array([0]))
    seconds = []
    for _ in range(TIMED_STEPS + 1):  # the first warms up
        began = monotonic()
        scorer.score(batch)
        seconds.append(monotonic() - began)
    one = min(seconds[1:])
    if one > MARGIN * goal.goal_s:
        problem = (
            f"{duration(goal.goal_s)} is far less than a step of one pair takes here, "
            f"{duration(one)} for {int(encoded.lengths[0])} tokens"
        )
        raise latency_too_short(problem, one, "shorter texts, or a faster machine")


@dataclass(frozen=True, slots=True)
class WorkloadTexts:
    """Requests in tokens, and the texts to send them with."""

    workload: Workload
    topics: Sequence[Topic]
    length_policy: LengthPolicy  # cuts the texts to length

    def at(self, rate: float) -> WorkloadTexts:
        """The same at another rate, in requests per second."""
        return replace(self, workload=self.workload.at(rate))

    def requests(self, duration_s: float, seed: int) -> list[Arrival]:
        """The requests of the first ``duration_s`` seconds, by another seed."""
        return list(replace(self.workload, seed=seed).requests(duration_s))

    def first(self, documents: float) -> list[Arrival]:
        """The first requests that together have this many documents; a trace may be shorter."""
        found, count = [], 0
        for request in self.workload.requests():
            found.append(request)
            count += request.documents
            if count >= documents:
                break
        return found

    def texts(self, requests: Iterable[Arrival], seed: int) -> list[tuple[str, list[str]]]:
        """Query and documents of each request."""
        source = TextSource(self.topics, seed=seed, length_policy=self.length_policy)
        return [source.request(request) for request in requests]


def length_policy_of(encoder: PairEncoder) -> LengthPolicy:
    """Cuts texts by the model's own tokenizer."""
    return TokenLengths(encoder.ends, encoder.template.specials)


def require_texts(
    topics: Sequence[Topic],
    encoder: PairEncoder,
    sizes: SizeDistribution,
    trace: Sequence[ArrivalRecord],
    limit: int,
) -> None:
    """Refuse lengths below those of the marks that make each request unique.

    Lengths in a trace count instead of ``sizes``.
    """
    recorded = [one.tokens for one in islice(trace, SAMPLE * DOCUMENTS) if one.tokens]
    wanted = (ObservedSize(recorded) if recorded else sizes).draw(
        np.random.default_rng(0), SAMPLE * DOCUMENTS
    )
    material = TextSource(topics, salt="0000", length_policy=length_policy_of(encoder))
    pairs = []
    for start in range(0, len(wanted), DOCUMENTS):
        lengths = tuple(wanted[start : start + DOCUMENTS])
        query, documents = material.request(Arrival(0.0, DOCUMENTS, lengths))
        pairs += [(query, document) for document in documents]
    mean = float(np.mean(wanted))
    sent = float(encoder.encode(pairs, limit, "longest_first").lengths.mean())
    if sent > (1 + CLOSE) * mean:
        raise InvalidInput(
            "--tokens",
            f"pairs of {mean:.0f} tokens cannot be made: with the marks that make each request "
            f"unique they have {sent:.0f}",
            f"Give {sent:.0f} or more.",
        )
