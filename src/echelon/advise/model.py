"""The model and its texts, and what can be refused before anything long is measured."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import psutil

from echelon.advise.sending import require_texts
from echelon.data import load_texts
from echelon.engine.precision_check import PrecisionCheck
from echelon.errors import InvalidInput
from echelon.models.hub import resolve
from echelon.models.registry import require_model
from echelon.options import check_max_length
from echelon.planner.impossible import too_long
from echelon.planner.sizes import longest
from echelon.tokenization.tokenizer import PairEncoder
from echelon.tune.hardware import meter_of
from echelon.tune.words import duration, size
from echelon.types import monotonic

if TYPE_CHECKING:
    import os

    from echelon.advise.ask import Ask
    from echelon.data import Texts
    from echelon.models.base import Scorer
    from echelon.options import Options
    from echelon.profile import Profile

LOOKS = 3
"""Steps of one pair, of which the fastest counts."""

MARGIN = 4.0
"""Another precision or number of threads may be so much faster than the first look."""


@dataclass(frozen=True, slots=True)
class Model:
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
    name: str | os.PathLike[str], options: Options, data: str | os.PathLike[str] | None, ask: Ask
) -> Model:
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
        facts = scorer.facts
        specials = trial.encoder.template.specials
        limit = check_max_length(options.max_length, facts.max_tokens, specials)
        model = Model(name, trial, texts, limit)
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


def _check_memory(scorer: Scorer, ask: Ask, libraries: int, options: Options) -> None:
    limit = ask.memory_limit_bytes
    if limit is None:
        return
    meter = meter_of(scorer.facts.device)
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


def _check_goal(scorer: Scorer, ask: Ask, model: Model) -> None:
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
