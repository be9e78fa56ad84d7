"""``echelon tune --refresh``: a profile brought up to date, measuring only what is stale.

What a profile says of rankings holds as long as model, device and versions are the same. What it
says of time holds as long as the machine is as fast: some steps tell. A cost model is also stale
where there is none, or where it is old; a token budget that memory taught, where the full one fits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from echelon.data import load_texts
from echelon.engine.precision_check import PrecisionCheck
from echelon.errors import ProfileError
from echelon.models.base import DeviceOutOfMemory
from echelon.models.hub import resolve
from echelon.options import check_max_length
from echelon.profile import apply_profile, current_key
from echelon.scheduling.cost_model import work_of
from echelon.scheduling.fit import MOST_MEDIAN, CostFit, FitError
from echelon.scheduling.packing import NO_BUDGET
from echelon.tokenization.tokenizer import PairEncoder
from echelon.tuning.calibration import StepFactory, models_of
from echelon.tuning.machine import meter_of
from echelon.tuning.probes import LengthRange, measure
from echelon.tuning.tuner import probe, tune
from echelon.types import monotonic

if TYPE_CHECKING:
    import os
    from collections.abc import Callable

    from echelon.data import Texts
    from echelon.models.base import Scorer
    from echelon.options import Options
    from echelon.profile import Profile
    from echelon.tuning.calibration import Calibration, ProbeResult
    from echelon.tuning.tuner import Plan
    from echelon.types import Clock

OLD_DAYS = 30
"""Days after which a cost model is measured again, whatever the spot checks say: they look at few
shapes."""

SPOTS, SPOT_SHARE = 6, 0.1
"""Shapes that tell whether a cost model still holds, and their share of the sweep's time."""


@dataclass(frozen=True, slots=True)
class Refreshed:
    """A profile brought up to date.

    Attributes:
        profile: the new one.
        measured: what was measured again and why, in words.
        kept: what was not, and why.
    """

    profile: Profile
    measured: list[str]
    kept: list[str]


@dataclass(frozen=True, slots=True)
class _Model:
    """The profile's model, open, and what its steps are made of."""

    trial: PrecisionCheck
    scorer: Scorer
    texts: Texts
    stuff: StepFactory
    clock: Clock

    def fits(self, tokens: int) -> bool:
        """Whether a step of so many tokens fits in memory."""
        longest = self.stuff.longest
        try:
            self.scorer.score(self.stuff.batch((longest,) * max(1, tokens // longest)))
        except DeviceOutOfMemory:
            return False
        return True

    def error(self, fit: CostFit, tokens: int, limit_s: float) -> FitError:
        """How far a cost model is off now, on a few shapes."""
        shapes = LengthRange(self.stuff.longest, tokens, fit.padding).mixed(SPOTS, seed=3)
        meter = meter_of(self.scorer.info.device)

        def run(shape: tuple[int, ...]) -> None:
            self.scorer.score(self.stuff.batch(shape))

        seen = measure(list(dict.fromkeys(shapes)), run, meter, self.clock, limit_s)
        predicted = [fit.coefficients.seconds(work_of(spot.lengths, fit.padding)) for spot in seen]
        return FitError.of(predicted, [spot.median_s for spot in seen])


def refresh(
    model: str | os.PathLike[str],
    options: Options,
    plan: Plan,
    old: Profile,
    *,
    clock: Clock = monotonic,
    told: Callable[[str, float], None] = lambda *_: None,
) -> Refreshed:
    """Bring a profile up to date.

    Args:
        model: as for :func:`echelon.tuning.tuner.tune`.
        options: what the user asks for; the profile's choices fill what is open.
        plan: texts and times; sizes are the profile's own.
        old: the profile.
        clock: seconds.
        told: as for :func:`echelon.tuning.tuner.tune`.
    """
    plan = _sizes_of(old, plan)
    folder = resolve(model, revision=options.revision, progress=options.progress)
    encoder = PairEncoder(folder.path)
    texts = load_texts(plan.data, language="en" if folder.name == "demo" else None)
    trial = PrecisionCheck.of(folder, apply_profile(options, old), encoder, texts)
    told("checking what is stale", 0.0)
    scorer = trial.open(old.key.precision, _keep_bf16(old))
    try:
        now = current_key(folder.name, folder.revision, scorer.info)
        different = old.key.differences(now)
        if not different:
            specials = encoder.template.specials
            longest = check_max_length(trial.options.max_length, scorer.info.max_tokens, specials)
            opened = _Model(trial, scorer, texts, StepFactory(encoder, texts, longest), clock)
            fresh, drifted, probed = _renew(opened, old, plan, told)
    finally:
        scorer.close()
    if different:
        found = tune(model, options, plan, clock=clock, told=told)
        return Refreshed(found, [f"everything: {'; '.join(different)}"], [])
    if probed is not None:
        models = models_of(probed, trial.opener(_keep_bf16(old)))
        fresh = replace(fresh, profile=_remodelled(fresh.profile, models))
    if not drifted:
        return fresh
    found = tune(model, options, plan, clock=clock, told=told, known=old)
    budget = fresh.profile.learned_token_budget
    return replace(fresh, profile=replace(found, learned_token_budget=budget))


def _renew(
    opened: _Model, old: Profile, plan: Plan, told: Callable[[str, float], None]
) -> tuple[Refreshed, bool, ProbeResult | None]:
    """A profile whose key holds, and what is still missing.

    Returns:
        What was done; whether all times are to be measured again; and the probes of models that the
        profile has not got yet.
    """
    measured, kept = [], ["ranking agreement and threads: model, device and versions are the same"]
    profile, budget, probed = old, old.learned_token_budget, None
    why, drifted = _stale(opened, old, plan)
    if drifted:
        measured.append(f"times and the cost model: {why}")
    elif why:
        measured.append(f"the cost model: {why}")
        kept.append("times of the sweep: the machine is not known to have changed")
        probed = probe(
            opened.trial, opened.scorer, plan, opened.texts, clock=opened.clock, told=told
        )
    else:
        kept.append("times and the cost model: some steps took what it says")
    full = old.settings.token_budget
    if budget is not None and full != NO_BUDGET:
        if opened.fits(full):
            measured.append(f"memory: steps of {full} tokens fit again, so {budget} is forgotten")
            profile = replace(profile, learned_token_budget=None)
        else:
            kept.append(f"the token budget {budget}: {full} still do not fit")
    return Refreshed(profile, measured, kept), drifted, probed


def _remodelled(profile: Profile, models: Calibration) -> Profile:
    warnings = [w for w in profile.warnings if "--refresh" not in w] + models.warnings
    return replace(profile, cost=models.cost, memory=models.memory, warnings=warnings)


def _stale(opened: _Model, old: Profile, plan: Plan) -> tuple[str, bool]:
    """Why the cost model is stale, if it is; and whether all other times are as well."""
    if old.cost is None:
        return "there was none", False
    try:
        fit = CostFit.from_dict(old.cost)
        age = (datetime.now(UTC) - datetime.fromisoformat(fit.measured)).days
    except (ProfileError, TypeError, ValueError) as damage:
        return f"it cannot be read ({damage})", False
    largest = max(plan.token_budgets, default=opened.stuff.longest)
    error = opened.error(fit, largest, SPOT_SHARE * plan.time_limit_s)
    if error.median > MOST_MEDIAN:
        return f"steps no longer take what it says ({error.words})", True
    return (f"it is {age} days old", False) if age > OLD_DAYS else ("", False)


def _keep_bf16(profile: Profile) -> list[str]:
    """The layers that the profile's precision leaves in bf16."""
    rows = [row for row in profile.precisions if row["precision"] == profile.key.precision]
    kept: list[str] = rows[0].get("keep_bf16", []) if rows else []
    return kept


def _sizes_of(profile: Profile, plan: Plan) -> Plan:
    """The plan with the sizes that the profile was measured at."""

    def of(unit: str) -> tuple[int, ...]:
        return tuple(sorted({point[unit] for point in profile.points if point[unit]}))

    pairs, batches, budgets = of("pairs"), of("batch_size"), of("token_budget")
    if not (pairs and batches):
        return plan
    return replace(plan, pairs=pairs, batch_sizes=batches, token_budgets=budgets)
