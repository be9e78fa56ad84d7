"""What the tests of comparisons share: profiles to compare, and the command that compares them."""

import copy
from dataclasses import replace

from report_pages import RESULTS, make_profile

from echelon.reports.compare import compare
from echelon.reports.profile_view import ProfileView
from echelon.scheduling.cost_model import Coefficients, MemoryModel
from echelon.scheduling.fit import CostFit, FitError, MemoryFit

ERROR = FitError(0.02, 0.05, 9)


def scaled(results, factor):
    """The same sweep on a machine that takes ``factor`` times as long."""
    found = [copy.copy(measured) for measured in results]
    for measured in found:
        measured.seconds = [factor * second for second in measured.seconds]
    return found


def profile_of(factor=1.0, *, results=RESULTS, key=None, **changes):
    """A profile with models, of a machine that takes ``factor`` times as long."""
    cost = CostFit(Coefficients(0.002 * factor, 3e-5 * factor, 4e-9 * factor), "none", ERROR, 0.01)
    memory = MemoryFit(MemoryModel(5e8 * factor, 1e4 * factor, 20.0 * factor), ERROR)
    made = make_profile(scaled(results, factor), cost=cost.as_dict(), memory=memory.as_dict())
    quicker = [row | {"tokens_per_s": row["tokens_per_s"] / factor} for row in made.precisions]
    made = replace(made, precisions=quicker, key=replace(made.key, **(key or {})))
    return replace(made, **changes)


def views(a, b):
    return ProfileView.of(a, "a.json"), ProfileView.of(b, "b.json")


def compared(a, b):
    return compare(*views(a, b))


def ratios(data):
    """Every ratio in an answer, however deep."""
    if isinstance(data, list):
        return [ratio for item in data for ratio in ratios(item)]
    if not isinstance(data, dict):
        return []
    if "judgement" in data:
        return [data]
    return [ratio for item in data.values() for ratio in ratios(item)]
