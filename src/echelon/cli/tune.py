"""``echelon tune``: measure a model on this machine and choose its settings."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from echelon.cli.flags import (
    INTERRUPTED,
    JSON_FLAG,
    LANG_FLAG,
    Command,
    example,
    level_of,
    load_flag,
    print_json,
    quiet_flag,
    sizes_of_requests,
    trace_of,
    with_flags,
)
from echelon.cli.stress import PACKAGES as STRESS_PACKAGES
from echelon.errors import EchelonError, InvalidInput
from echelon.messages import N_, tr
from echelon.options import Options, require_packages
from echelon.progress import print_line, progress_bar
from echelon.server.limits import flag_of
from echelon.server.settings import MODEL_FLAGS, Flag, flag, name_of_flag
from echelon.server.settings import PACKAGES as SERVER_PACKAGES

if TYPE_CHECKING:
    from echelon.profile import Profile
    from echelon.progress import Progress
    from echelon.tuning.goal import ScenarioGoal
    from echelon.tuning.tuner import TuningPlan

VALIDATE_S = 20.0
"""Seconds of the validation under load, unless ``--verify-s`` says otherwise."""


def sizes(value: str) -> tuple[int, ...]:
    """Parse whole numbers separated by commas, such as ``1,2,4``."""
    try:
        return tuple(int(part) for part in value.split(",") if part.strip())
    except ValueError:
        words = tr("{value} is no list of whole numbers such as 1,2,4", value=repr(value))
        raise click.BadParameter(words) from None


def _sizes_flag(name: str, words: str) -> Flag:
    return flag(name, type=sizes, metavar="N,N", help=words)


TUNE_FLAGS: tuple[Flag, ...] = (
    _sizes_flag("--pairs", "Pairs of one call [5,10,50,100; to 1000 on a GPU]."),
    _sizes_flag("--batch-sizes", "Pairs of a step [1,2,4,8,16,32; to 256 on a GPU]."),
    _sizes_flag("--token-budgets", "Tokens of a step [256 to 8192; to 65536 on a GPU]."),
    flag("--data", help="Your own queries and documents, JSONL [built-in texts]."),
    flag("--time-limit", default=75.0, help="Seconds of all measurements, once the model is open."),
    flag("--profile", default="echelon-profile.json", help="Profile to write."),
    flag("--refresh", is_flag=True, help="Update --profile: measure only what is out of date."),
    flag("--report", default="echelon-report.html", help="Report to write."),
)

SCENARIO_FLAGS: tuple[Flag, ...] = (
    flag(
        "--scenario",
        type=click.Choice(["api", "offline", "edge", "concurrent"]),
        help="Choose the settings for this use, and validate them (docs/TUNE.md).",
    ),
    load_flag("--slo-p99-ms"),
    load_flag("--rate"),
    load_flag("--trace"),
    load_flag("--documents", " [api, edge 1-10; offline 50-200; concurrent 10]"),
    load_flag("--tokens", " [as in the texts]"),
    flag("--memory-limit", type=float, metavar="MIB", help="Memory of all workers, in MiB."),
    flag(
        "--allow",
        help="Other settings that may be chosen: precision, max_length (with commas).",
    ),
    flag("--verify-s", type=float, help="Seconds of the validation; 0 skips it [20]."),
)
"""The use for which settings are chosen."""


@click.command(
    cls=Command,
    epilog=example(
        "echelon tune BAAI/bge-reranker-v2-m3",
        "echelon tune demo --scenario api --slo-p99-ms 300 --rate 5",
    ),
)
@click.argument("model")
@with_flags(*TUNE_FLAGS, group="Measuring")
@with_flags(*MODEL_FLAGS, group="Model")
@with_flags(*SCENARIO_FLAGS, group="Scenario")
@with_flags(JSON_FLAG, quiet_flag("No progress and no table."), LANG_FLAG, group="Output")
def tune(*, model: str, as_json: bool, quiet: bool, **values: Any) -> None:
    """Find the best batch size of MODEL on this machine.

    Results are saved after every run: after an interruption, run the same command again to resume.
    With --scenario the settings are chosen for that use by simulation, and validated under its
    load.
    """
    goal = scenario_goal(values)
    target, report = Path(values.pop("profile")), Path(values.pop("report"))
    for name, path in (("--profile", target), ("--report", report)):
        _require_writable(name, path)
    refresh = target if values.pop("refresh") else None
    partial = target.with_name(f"{target.name}.partial.json")
    plan = _plan(values, partial)
    options = Options.of(**values, progress=not quiet)
    try:
        with progress_bar(tr("Tuning"), shown=not (quiet or as_json)) as (on_progress, _):
            found, missed = _tuned(model, options, plan, goal, refresh, on_progress)
    except KeyboardInterrupt:
        words = N_(
            "Interrupted. Finished measurements are kept in {file}; run the same command again to "
            "resume."
        )
        print_line(tr(words, file=partial))
        sys.exit(INTERRUPTED)
    from echelon.reports.tables import print_profile, print_scenario
    from echelon.reports.tuning_report import write_report

    # Before anything is printed: a pipe that its reader has closed ends the command.
    found.save(target)
    write_report(found, report, profile_path=str(target))
    partial.unlink(missing_ok=True)
    if as_json:
        print_json(found.as_dict())
    elif not quiet:
        print_profile(found)
        print_scenario(found)
        print_line("\n" + tr("Profile: {file}", file=target))
        print_line(tr("Report: {file}", file=report))
    if missed is not None:
        raise missed


def _require_writable(name: str, path: Path) -> None:
    """Refuse a file that cannot be written, before anything is measured."""
    folder = path.parent
    problem = None
    if not folder.is_dir():
        problem = tr("the folder {folder} does not exist", folder=folder)
    elif path.is_dir():
        problem = tr("{path} is a folder", path=path)
    elif not os.access(folder, os.W_OK):
        problem = tr("the folder {folder} cannot be written", folder=folder)
    if problem is not None:
        raise InvalidInput(name, problem, tr("Create it, or choose another file."))


def _plan(values: dict[str, Any], partial: Path) -> TuningPlan:
    from echelon.tuning.tuner import TuningPlan

    own = {name: values.pop(name) for name in ("pairs", "batch_sizes", "token_budgets", "data")}
    return TuningPlan(**own, time_limit_s=values.pop("time_limit"), partial=partial)


def _tuned(
    model: str,
    options: Options,
    plan: TuningPlan,
    goal: ScenarioGoal | None,
    refresh: Path | None,
    on_progress: Progress,
) -> tuple[Profile, EchelonError | None]:
    """The profile, and the error to end with: measurements are saved and shown before."""
    scenario = None
    if goal is not None:
        from echelon.tuning.scenario_model import open_for_scenario

        if goal.scenario in {"api", "concurrent"} and goal.verify_s:
            command = f"The validation of --scenario {goal.scenario}"
            packages = [*SERVER_PACKAGES, *STRESS_PACKAGES]
            require_packages(command, "serve,stress", packages, ", or give --verify-s 0.")
        scenario = open_for_scenario(model, options, plan.data, goal)
    if refresh is not None:
        profile = _refreshed(model, options, plan, refresh, on_progress)
    else:
        from echelon.tuning.tuner import tune as run_tuning

        profile = run_tuning(model, options, plan, on_progress=on_progress)
    if goal is None or scenario is None:
        return profile, None
    from echelon.tuning.advisor import recommend

    try:
        advice = recommend(scenario, profile, goal, plan, on_progress)
    except EchelonError as error:
        return profile, error
    return advice.profile, advice.missed


def _refreshed(
    model: str, options: Options, plan: TuningPlan, path: Path, on_progress: Progress
) -> Profile:
    """Update a profile, and print what was measured and what was kept."""
    from echelon.profile import Profile
    from echelon.tuning.refresh import refresh

    fresh = refresh(model, options, plan, Profile.load(path), on_progress=on_progress)
    if options.progress:
        for title, lines in (("Measured", fresh.measured), ("Kept", fresh.kept)):
            for line in lines:
                print_line(f"{title}: {line}.")
    return fresh.profile


def scenario_goal(values: dict[str, Any]) -> ScenarioGoal | None:
    """Take the flags of a scenario out of ``values``; None where no scenario is given."""
    given = {name: values.pop(name) for name in map(name_of_flag, SCENARIO_FLAGS)}
    if given["scenario"] is None:
        for name, value in given.items():
            if value is not None:
                remedy = "Give --scenario api, offline, edge or concurrent."
                problem = "is for --scenario, which is not given"
                raise InvalidInput(flag_of(name), problem, remedy)
        return None
    from echelon.tuning.goal import ScenarioGoal

    level, limit, verify_s = level_of(given), given["memory_limit"], given["verify_s"]
    documents, tokens = sizes_of_requests(given)
    allow = [name.strip() for name in (given["allow"] or "").split(",")]
    fields: Any = {
        "scenario": given["scenario"],
        "goal_s": None if level is None else level.latency_s,
        "rate": given["rate"],
        "trace": trace_of(given),
        "documents": documents,
        "tokens": tokens,
        "memory_limit_bytes": None if limit is None else limit * 2**20,
        "allow": tuple(name.replace("-", "_") for name in allow if name),
        "verify_s": VALIDATE_S if verify_s is None else verify_s,
    }
    return ScenarioGoal(**fields)
