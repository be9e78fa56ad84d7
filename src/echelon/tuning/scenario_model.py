"""The model and its texts, and what can be refused before anything long is measured.

Requests as texts: what is simulated in tokens is sent in texts of just so many.

A load generator that knows no more than an address cuts texts by words. Here the tokenizer is at
hand, so each pair has the length that it was simulated with.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import psutil

from echelon.data import load_texts
from echelon.engine.precision_check import PrecisionCheck
from echelon.errors import InvalidInput
from echelon.loadtest.texts import TextSource, Tokens
from echelon.models.hub import resolve
from echelon.models.registry import require_model
from echelon.options import check_max_length
from echelon.reports.wording import duration, size
from echelon.simulation.infeasible import too_long
from echelon.simulation.workload import Arrival, ObservedSize, longest
from echelon.tokenization.tokenizer import PairEncoder
from echelon.tuning.machine import meter_of
from echelon.types import monotonic

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Sequence

    from echelon.data import Texts, Topic
    from echelon.loadtest.texts import LengthPolicy
    from echelon.models.base import Scorer
    from echelon.options import Options
    from echelon.profile import Profile
    from echelon.simulation.capacity import Traffic
    from echelon.simulation.workload import KnownArrivals, SizeDistribution
    from echelon.tuning.goal import ScenarioGoal


LOOKS = 3
"""Steps of one pair, of which the fastest counts."""

MARGIN = 4.0
"""Another precision or number of threads may be so much faster than the first look."""


@dataclass(frozen=True, slots=True)
class ScenarioModel:
    """What is asked about.

    Attributes:
        name: as the user gave it.
        trial: folder, options and tokenizer, with the texts that rankings are compared on.
        texts: all texts.
        longest: tokens a pair may have.
    """

    name: str | os.PathLike[str]
    trial: PrecisionCheck
    texts: Texts
    longest: int

    @property
    def options(self) -> Options:
        """What the user asked for."""
        return self.trial.options

    def tuned(self, profile: Profile) -> PrecisionCheck:
        """The trial with the threads that tuning chose."""
        threads = profile.settings.threads
        return replace(self.trial, options=replace(self.options, threads=threads))


def look(
    name: str | os.PathLike[str],
    options: Options,
    data: str | os.PathLike[str] | None,
    ask: ScenarioGoal,
) -> ScenarioModel:
    """Open the model once and refuse what no setting of it can do.

    Raises:
        InvalidInput: lengths beyond the model, memory below its weights, or a goal below the time
            of one pair; it says what is possible instead.
        ModelError: the model is not there, damaged, or of an unsupported kind.
    """
    folder = resolve(name, revision=options.revision, progress=options.progress)
    require_model(folder.path)
    texts = load_texts(data, language="en" if folder.name == "demo" else None)
    trial = PrecisionCheck.of(folder, options, PairEncoder(folder.path), texts)
    before = psutil.Process().memory_info().rss
    scorer = trial.open(options.precision)
    try:
        facts = scorer.info
        specials = trial.encoder.template.specials
        limit = check_max_length(options.max_length, facts.max_tokens, specials)
        model = ScenarioModel(name, trial, texts, limit)
        asked = longest(ask.tokens, ask.trace)
        if asked > limit:
            raise too_long(asked, limit)
        if ask.tokens is not None:
            require_texts(texts.topics, trial.encoder, ask.tokens, ask.trace, limit)
        _check_memory(scorer, ask, before if facts.device == "cpu" else 0, options)
        _check_goal(scorer, ask, model)
    finally:
        scorer.close()
    return model


def _check_memory(scorer: Scorer, ask: ScenarioGoal, libraries: int, options: Options) -> None:
    limit = ask.memory_limit_bytes
    if limit is None:
        return
    meter = meter_of(scorer.info.device)
    meter.reset()
    held = meter.peak_bytes()
    if options.precision == "auto":  # int8 weights take a quarter of fp32's
        held = libraries + max(0, held - libraries) // 4
    if limit < held:
        raise InvalidInput(
            "--memory-limit",
            f"{size(round(limit))} are less than the {size(held)} that libraries and weights hold "
            "before a single step",
            f"Possible are more than {size(held)}, or a smaller model.",
        )


def _check_goal(scorer: Scorer, ask: ScenarioGoal, model: ScenarioModel) -> None:
    if ask.goal_s is None:
        return
    pair = model.texts.sample(1)
    encoded = model.trial.encoder.encode(pair, model.longest, model.options.truncation)
    batch = encoded.batch(np.array([0]))
    seconds = []
    for _ in range(LOOKS + 1):  # the first warms up
        began = monotonic()
        scorer.score(batch)
        seconds.append(monotonic() - began)
    one = min(seconds[1:])
    if one > MARGIN * ask.goal_s:
        raise InvalidInput(
            "--slo-p99-ms",
            f"{duration(ask.goal_s)} are far less than a step of one pair takes here, "
            f"{duration(one)} for {int(encoded.lengths[0])} tokens",
            f"Possible are more than {duration(one)}, shorter texts, or a faster machine.",
        )


SAMPLE, DOCUMENTS = 20, 10
"""Requests, and their documents, that are looked at beforehand."""

CLOSE = 0.1
"""Relative difference of the mean length up to which texts have the length asked for."""


@dataclass(frozen=True, slots=True)
class WorkloadTexts:
    """Traffic, and how to send it.

    Attributes:
        traffic: the requests in tokens.
        rate: requests a second.
        topics: texts to send.
        ruler: cuts them to length.
    """

    traffic: Traffic
    rate: float
    topics: Sequence[Topic]
    ruler: LengthPolicy

    def requests(self, duration_s: float, seed: int) -> list[Arrival]:
        """Those of the first seconds, with the lengths wanted."""
        workload = replace(self.traffic.at(self.rate), seed=seed)
        return list(workload.requests(duration_s))

    def first(self, documents: float) -> list[Arrival]:
        """Requests until they have so many documents; a trace may end before."""
        found, count = [], 0
        for request in self.traffic.at(self.rate).requests():
            found.append(request)
            count += request.documents
            if count >= documents:
                break
        return found

    def texts(self, requests: Iterable[Arrival], seed: int) -> list[tuple[str, list[str]]]:
        """Query and documents of each."""
        material = TextSource(self.topics, seed=seed, ruler=self.ruler)
        return [material.request(request) for request in requests]


def ruler_of(encoder: PairEncoder) -> LengthPolicy:
    """What measures texts as a model does."""
    return Tokens(encoder.ends, encoder.template.specials)


def require_texts(
    topics: Sequence[Topic],
    encoder: PairEncoder,
    sizes: SizeDistribution,
    trace: Sequence[KnownArrivals],
    limit: int,
) -> None:
    """Refuse lengths that no texts have.

    Args:
        topics: texts to send.
        encoder: the model's.
        sizes: tokens of a pair.
        trace: where its requests have lengths, they count instead.
        limit: tokens a pair may have.

    Raises:
        InvalidInput: what tells requests apart is longer.
    """
    told = [one.tokens for one in islice(trace, SAMPLE * DOCUMENTS) if one.tokens]
    wanted = (ObservedSize(told) if told else sizes).draw(
        np.random.default_rng(0), SAMPLE * DOCUMENTS
    )
    material = TextSource(topics, salt="0000", ruler=ruler_of(encoder))
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
            f"pairs of {mean:.0f} tokens cannot be made: with the marks that tell requests apart "
            f"they have {sent:.0f}",
            f"Give {sent:.0f} or more.",
        )
