"""The flags of ``echelon tune --scenario``. Imports click only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from echelon.cli.stress import PACKAGES as STRESS_PACKAGES
from echelon.errors import EchelonError, InvalidInput
from echelon.options import require_packages
from echelon.server.settings import PACKAGES as SERVER_PACKAGES

if TYPE_CHECKING:
    from collections.abc import Callable

    from echelon.flags import Flag
    from echelon.options import Options
    from echelon.profile import Profile
    from echelon.tuning.goal import ScenarioGoal
    from echelon.tuning.scenario_model import ScenarioModel
    from echelon.tuning.tuner import Plan

SCENARIO_FLAGS: tuple[Flag, ...] = (
    (
        ("--scenario",),
        {
            "type": click.Choice(["api", "offline", "edge", "concurrent"]),
            "help": "Choose the settings for this use, and prove them (docs/TUNE.md).",
        },
    ),
    (("--slo-p99-ms",), {"type": float, "help": "Scenario: latency that 99 % may have."}),
    (("--rate",), {"type": float, "help": "Scenario: requests a second."}),
    (("--trace",), {"help": "Scenario: CSV of requests, timestamp,documents[,tokens]."}),
    (
        ("--documents",),
        {
            "help": "Scenario: of a request, N or LOW-HIGH [api, edge 1-10; offline 50-200; "
            "concurrent 10]."
        },
    ),
    (("--tokens",), {"help": "Scenario: of a pair, N or LOW-HIGH [as in the texts]."}),
    (
        ("--memory-limit",),
        {"type": float, "metavar": "MIB", "help": "Scenario: memory of all workers, in MiB."},
    ),
    (
        ("--allow",),
        {"help": "Scenario: what may be chosen besides: precision, max_length (with commas)."},
    ),
    (
        ("--verify-s",),
        {"type": float, "help": "Scenario: seconds of the proof; 0 does without [20]."},
    ),
)
"""What a recommendation is asked for."""

VERIFY_S = 20.0


def ask_of(values: dict[str, Any]) -> ScenarioGoal | None:
    """Take the flags of a scenario out of ``values``; None where no scenario is given.

    Raises:
        InvalidInput: a value is wrong, or is given without ``--scenario``.
    """
    names = [flags[0].removeprefix("--").replace("-", "_") for flags, _ in SCENARIO_FLAGS]
    given = {name: values.pop(name) for name in names}
    scenario = given.pop("scenario")
    if scenario is not None:
        return _ask(scenario, **given)
    for name, value in given.items():
        if value is not None:
            flag = f"--{name.replace('_', '-')}"
            problem = "is for --scenario, which is not given"
            raise InvalidInput(flag, problem, "Give --scenario api, offline, edge or concurrent.")
    return None


class ScenarioFlags:
    """Recommends after a tuning run: looks at the model before it, at the profile after it.

    Args:
        ask: what for; None recommends nothing.
        name: the model, as the user gave it.
        options: as for tuning.
        plan: as for tuning.

    Raises:
        InvalidInput: what no setting of this model can do.
        MissingDependency: a package that the proof needs.
    """

    def __init__(self, ask: ScenarioGoal | None, name: str, options: Options, plan: Plan) -> None:
        self._ask = ask
        self._plan = plan
        self._model: ScenarioModel | None = None
        self.trouble: EchelonError | None = None
        if ask is not None:
            from echelon.tuning.scenario_model import look

            _require_packages(ask)
            self._model = look(name, options, plan.data, ask)

    def advised(self, profile: Profile, told: Callable[[str, float], None]) -> Profile:
        """The profile with the recommendation.

        Where there is none, or it misses its goal, ``trouble`` is the error to end with: what was
        measured is shown and kept before.
        """
        if self._ask is None or self._model is None:
            return profile
        from echelon.tuning.advisor import advise

        try:
            found = advise(self._model, profile, self._ask, self._plan, told)
        except EchelonError as error:
            self.trouble = error
            return profile
        self.trouble = found.missed
        return found.profile

    def end(self) -> None:
        """Raise the trouble, if there was any."""
        if self.trouble is not None:
            raise self.trouble


def _require_packages(ask: ScenarioGoal) -> None:
    if ask.scenario not in {"api", "concurrent"} or not ask.verify_s:
        return
    require_packages(
        f"The proof of --scenario {ask.scenario}",
        "serve,stress",
        [*SERVER_PACKAGES, *STRESS_PACKAGES],
        ", or give --verify-s 0.",
    )


def _ask(scenario: str, **given: Any) -> ScenarioGoal:
    from echelon.cli.stress import TraceFile
    from echelon.simulation.workload import sizes_of
    from echelon.tuning.goal import ScenarioGoal

    goal_ms, limit = given["slo_p99_ms"], given["memory_limit"]
    documents, tokens = given["documents"], given["tokens"]
    allow = [name.strip() for name in (given["allow"] or "").split(",")]
    fields: Any = {
        "scenario": scenario,
        "goal_s": None if goal_ms is None else goal_ms / 1000,
        "rate": given["rate"],
        "trace": () if given["trace"] is None else tuple(TraceFile(given["trace"])),
        "documents": None if documents is None else sizes_of(documents, "--documents"),
        "tokens": None if tokens is None else sizes_of(tokens, "--tokens"),
        "memory_limit_bytes": None if limit is None else limit * 2**20,
        "allow": tuple(name.replace("-", "_") for name in allow if name),
        "verify_s": VERIFY_S if given["verify_s"] is None else given["verify_s"],
    }
    return ScenarioGoal(**fields)
