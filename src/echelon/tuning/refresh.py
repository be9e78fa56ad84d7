"""Updates a profile: measures again only what is out of date (`echelon tune --refresh`).

Rankings stay valid while model, device and library versions are the same. Times stay valid while
the machine is as fast as before: a few steps are measured to check it. The cost model is also out
of date where there is none or it is old, and a token budget that was reduced after running out of
memory is out of date where the full budget fits again.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from echelon.errors import ProfileError
from echelon.messages import tr
from echelon.models.base import DeviceOutOfMemory, Scorer
from echelon.models.device import processor_of
from echelon.models.registry import precisions_to_compare
from echelon.profile import Profile, apply_profile, current_key
from echelon.progress import Progress, no_progress
from echelon.scheduling.cost_model import work_of
from echelon.scheduling.fit import MAX_MEDIAN, CostFit, FitError
from echelon.scheduling.packing import NO_BUDGET
from echelon.tuning.calibration import ProbeResult, measure, models_of
from echelon.tuning.machine import meter_of
from echelon.tuning.probe_shapes import LengthRange, StepFactory
from echelon.tuning.time_plan import MEMORY
from echelon.tuning.tuner import TuningPlan, find_model, probe, tune
from echelon.types import Clock, monotonic

if TYPE_CHECKING:
    import os

    from echelon.data import Texts
    from echelon.engine.precision_check import PrecisionCheck
    from echelon.options import Options

MAX_AGE_DAYS = 30
"""Days after which a cost model is measured again, even if the spot checks agree: they are few."""

SPOTS, SPOT_SHARE = 6, 0.1
"""Shapes that check whether a cost model is still right, and their share of the sweep's time."""

FAR_OFF = 2.0
"""Multiple of the error that a cost model had when it was fitted: more means another speed."""


@dataclass(frozen=True, slots=True)
class RefreshResult:
    """An updated profile."""

    profile: Profile
    measured: list[str]  # what was measured again, and why
    kept: list[str]  # what was not measured again, and why


@dataclass(frozen=True, slots=True)
class _OpenModel:
    """The profile's model, open, and what its steps are made from."""

    check: PrecisionCheck
    scorer: Scorer
    texts: Texts
    steps: StepFactory
    clock: Clock

    def fits(self, tokens: int) -> bool:
        """Whether a step of ``tokens`` tokens fits in memory."""
        longest = self.steps.longest
        try:
            self.scorer.score(self.steps.batch((longest,) * max(1, tokens // longest)))
        except DeviceOutOfMemory:
            return False
        return True

    def error(self, fit: CostFit, tokens: int, limit_s: float) -> FitError:
        """The present error of a cost model, on some shapes of at most ``tokens`` tokens."""
        shapes = LengthRange(self.steps.longest, tokens, fit.padding).mixed(SPOTS, seed=3)
        meter = meter_of(self.scorer.info.device)

        def run(shape: tuple[int, ...]) -> None:
            self.scorer.score(self.steps.batch(shape))

        seen = measure(list(dict.fromkeys(shapes)), run, meter, self.clock, limit_s)
        predicted = [fit.coefficients.seconds(work_of(spot.lengths, fit.padding)) for spot in seen]
        return FitError.of(predicted, [spot.median_s for spot in seen])


def refresh(
    model: str | os.PathLike[str],
    options: Options,
    plan: TuningPlan,
    old: Profile,
    *,
    clock: Clock = monotonic,
    on_progress: Progress = no_progress,
) -> RefreshResult:
    """Update the profile ``old``, at the sizes that it was measured at.

    The arguments are those of :func:`echelon.tuning.tuner.tune`; the profile fills what the
    options leave open.
    """
    plan = _sizes_of(old, plan)
    check, texts = find_model(model, apply_profile(options, old), plan.data)
    on_progress(tr("checking what is out of date"))
    there = precisions_to_compare(check.folder.path, check.options.device)
    if old.key.precision == "int8" and "int8" not in there:  # it cannot be opened
        found = tune(model, options, plan, clock=clock, on_progress=on_progress)
        return RefreshResult(found, ["everything: this machine has no fast int8"], [])
    with closing(check.open(old.key.precision, old.keep_bf16)) as scorer:
        info, folder = scorer.info, check.folder
        now = current_key(folder.name, folder.revision, info, **processor_of(info.device))
        different = old.key.differences(now)
        if not different:
            steps = StepFactory(check.encoder, texts, check.max_length(scorer.info))
            opened = _OpenModel(check, scorer, texts, steps, clock)
            fresh, drifted, probed = _renew(opened, old, plan, on_progress)
    if different:
        found = tune(model, options, plan, clock=clock, on_progress=on_progress)
        return RefreshResult(found, [f"everything: {'; '.join(different)}"], [])
    if probed is not None:
        limit_s, profile = MEMORY * plan.time_limit_s, fresh.profile
        models = models_of(probed, check.factory(old.keep_bf16), limit_s)
        notes = [note for note in profile.warnings if "--refresh" not in note] + models.warnings
        profile = replace(profile, cost=models.cost, memory=models.memory, warnings=notes)
        fresh = replace(fresh, profile=profile)
    if not drifted:
        return fresh
    found = tune(model, options, plan, clock=clock, on_progress=on_progress, known=old)
    budget = fresh.profile.learned_token_budget
    return replace(fresh, profile=replace(found, learned_token_budget=budget))


def _renew(
    opened: _OpenModel, old: Profile, plan: TuningPlan, on_progress: Progress
) -> tuple[RefreshResult, bool, ProbeResult | None]:
    """Check a profile whose key is still right.

    Returns what was done, whether all times must be measured again, and probes for new models.
    """
    measured, kept = [], ["ranking agreement and threads: model, device and versions are the same"]
    profile, budget, probed = old, old.learned_token_budget, None
    reason, drifted = _out_of_date(opened, old, plan)
    if drifted:
        measured.append(f"times and the cost model: {reason}")
    elif reason:
        measured.append(f"the cost model: {reason}")
        kept.append("times of the sweep: nothing shows that the machine has changed")
        probed = probe(opened.check, opened.scorer, plan, opened.texts, opened.clock, on_progress)
    else:
        kept.append("times and the cost model: some steps took as long as predicted")
    full = old.settings.token_budget
    if budget is not None and full != NO_BUDGET:
        if opened.fits(full):
            measured.append(f"memory: steps of {full} tokens fit again, so {budget} is dropped")
            profile = replace(profile, learned_token_budget=None)
        else:
            kept.append(f"the token budget {budget}: steps of {full} tokens still do not fit")
    return RefreshResult(profile, measured, kept), drifted, probed


def _out_of_date(opened: _OpenModel, old: Profile, plan: TuningPlan) -> tuple[str, bool]:
    """Why the cost model is out of date, or an empty text; and whether all times are."""
    if old.cost is None:
        return "there was none", False
    try:
        fit = CostFit.from_dict(old.cost)
        age = (datetime.now(UTC) - datetime.fromisoformat(fit.measured)).days
    except (ProfileError, TypeError, ValueError) as damage:
        return f"it cannot be read ({damage})", False
    budgets = plan.sizes(old.key.device)["token_budgets"]
    largest = max(budgets, default=opened.steps.longest)
    error = opened.error(fit, largest, SPOT_SHARE * plan.time_limit_s)
    if error.median > max(MAX_MEDIAN, FAR_OFF * fit.error.median):
        return f"steps no longer take as long as predicted ({error.words})", True
    return (f"it is {age} days old", False) if age > MAX_AGE_DAYS else ("", False)


def _sizes_of(profile: Profile, plan: TuningPlan) -> TuningPlan:
    """The plan with the sizes that the profile was measured at."""

    def of(unit: str) -> tuple[int, ...]:
        return tuple(sorted({point[unit] for point in profile.points if point[unit]}))

    pairs, batches, budgets = of("pairs"), of("batch_size"), of("token_budget")
    if not (pairs and batches):
        return plan
    return replace(plan, pairs=pairs, batch_sizes=batches, token_budgets=budgets)
