"""Is what `echelon tune` says true? It runs under four conditions, and the truth is measured after.

Conditions: a quiet machine; a competing process that burns one core; a stall of ten seconds in the
middle (the process is stopped and continued); a CPU quota of half a core, by a control group where
that is permitted, else by stopping and continuing the process. Each run has 20, 60 or 120 seconds.
The truth of a condition is a long measurement of the same points, in turn, under the same lasting
load: that of the stall is the quiet machine's.

    python benchmarks/tuning_truth.py                       # all: about 20 minutes
    python benchmarks/tuning_truth.py --conditions quiet,stall --limits 20

Results are kept after each run, and runs that are there are not repeated (--again repeats them).
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import closing, contextmanager
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echelon.models.device import cpu_name, usable_cpus
from echelon.options import Options
from echelon.profile import Profile
from echelon.reports.profile_view import rivals, time_of
from echelon.reports.statistics import TIE, KnownValue, summarize, verdict
from echelon.tuning.calls import TimedCalls
from echelon.tuning.sweep import grid
from echelon.tuning.tuner import find_model
from echelon.types import monotonic

if TYPE_CHECKING:
    from collections.abc import Iterator

RESULTS = Path(__file__).parent / "results"
CONDITIONS = ("quiet", "competitor", "stall", "quota")
LIMITS = (20, 60, 120)
SIZES = {"--pairs": (5, 10, 50), "--batch-sizes": (1, 4, 16), "--token-budgets": (256, 1024, 4096)}

STALL_S, STALL_AT = 10.0, 0.4
"""Seconds of the stall, and when it begins, as a share of the time limit."""

QUOTA_CPUS = 0.5
PERIOD_S = 0.1  # of the quota
GROUP = Path("/sys/fs/cgroup/cpu/echelon-tuning-truth")
MIN_ROUNDS = 5  # of the truth
TRUTH_S = {"quiet": 60.0, "competitor": 80.0, "quota": 150.0}
Row = dict[str, Any]
Place = tuple[int, int | None, int | None]


# Conditions.


@contextmanager
def condition(name: str, process: subprocess.Popen[bytes], limit_s: float) -> Iterator[None]:
    """Hold a condition while a process runs."""
    ended = threading.Event()
    disturb = {"competitor": _compete, "stall": _stall, "quota": _limit}.get(name)
    helper = threading.Thread(target=disturb or (lambda *_: None), args=(process, limit_s, ended))
    helper.start()
    try:
        yield
    finally:
        ended.set()
        helper.join()


def _compete(_: subprocess.Popen[bytes], __: float, ended: threading.Event) -> None:
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    ended.wait()
    other.kill()
    other.wait()


def _stall(process: subprocess.Popen[bytes], limit_s: float, ended: threading.Event) -> None:
    if ended.wait(STALL_AT * limit_s):
        return
    os.kill(process.pid, signal.SIGSTOP)
    ended.wait(STALL_S)
    os.kill(process.pid, signal.SIGCONT)


def _limit(process: subprocess.Popen[bytes], _: float, ended: threading.Event) -> None:
    if quota_by() == "control group":
        (GROUP / "cgroup.procs").write_text(str(process.pid))
        ended.wait()
        return
    runs_s = PERIOD_S * QUOTA_CPUS / usable_cpus()
    while not ended.is_set():
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(PERIOD_S - runs_s)
        os.kill(process.pid, signal.SIGCONT)
        time.sleep(runs_s)


def quota_by() -> str:
    """How the quota is made on this machine."""
    try:
        GROUP.mkdir(exist_ok=True)
        (GROUP / "cpu.cfs_period_us").write_text(f"{1e6 * PERIOD_S:.0f}")
        (GROUP / "cpu.cfs_quota_us").write_text(f"{1e6 * PERIOD_S * QUOTA_CPUS:.0f}")
    except OSError:
        return "stop and continue"
    return "control group"


# Runs.


def tuned(name: str, limit_s: int, arguments: argparse.Namespace, folder: Path) -> Profile:
    """The profile of one run of the command under a condition."""
    profile = folder / "profile.json"
    sizes = [f"{flag}={','.join(map(str, some))}" for flag, some in SIZES.items()]
    command = [sys.executable, "-W", "ignore", "-m", "echelon", "tune", arguments.model, *sizes]
    command += [f"--precision={arguments.precision}", f"--threads={usable_cpus()}", "--quiet"]
    command += [f"--time-limit={limit_s}", f"--profile={profile}", f"--report={folder / 'r.html'}"]
    with subprocess.Popen(command) as process, condition(name, process, limit_s):
        if process.wait():
            raise SystemExit(f"{shlex.join(command)} failed")
    return Profile.load(profile)


def truth(name: str, arguments: argparse.Namespace, folder: Path) -> Row:
    """The median and its interval of each point under a lasting condition, in a new process."""
    out = folder / "truth.json"
    command = [sys.executable, "-W", "ignore", __file__, f"--measure={out}"]
    command += [f"--seconds={TRUTH_S[name] * arguments.truth}", f"--model={arguments.model}"]
    command += [f"--precision={arguments.precision}"]
    with subprocess.Popen(command) as process, condition(name, process, 0.0):
        if process.wait():
            raise SystemExit(f"{shlex.join(command)} failed")
    return dict(json.loads(out.read_text(encoding="utf-8")))


def measure(arguments: argparse.Namespace) -> Row:
    """Measure all points in turn for a number of seconds, at least five rounds."""
    options = Options(device="cpu", precision=arguments.precision, threads=usable_cpus())
    check, texts = find_model(arguments.model, options, None)
    with closing(check.open(arguments.precision)) as scorer:
        calls = TimedCalls(check, scorer, texts, SIZES["--pairs"], monotonic)
        pairs, batch_sizes, budgets = SIZES.values()
        points = [point for count in pairs for point in grid((count,), batch_sizes, budgets)]
        seconds: dict[str, list[float]] = {json.dumps(place(asdict(p))): [] for p in points}
        for point in points:
            calls(point)
        until = monotonic() + arguments.seconds
        while monotonic() < until or len(min(seconds.values(), key=len)) < MIN_ROUNDS:
            for point, times in zip(points, seconds.values(), strict=True):
                times.append(calls(point).seconds)
    return {name: asdict(summarize(times)) for name, times in seconds.items()}


def place(entry: Row) -> Place:
    """What tells a point from others."""
    return entry["pairs"], entry["batch_size"], entry["token_budget"]


# Judging.


def judged(profile: Profile, true: dict[Place, KnownValue]) -> Row:
    """What a profile says, compared with the truth."""
    known = [(entry, time_of(entry)) for entry in profile.points if place(entry) in true]
    stated = [(e, t) for e, t in known if t is not None and t.low is not None]
    shown = [(e, _shown(e, t), true[place(e)].value) for e, t in stated]
    held = [(e["status"] == "ok", t.low <= truth <= t.high) for e, t, truth in shown]
    claims = list(_claims(stated))
    false = [c for c in claims if _is_false(c[2], verdict(true[c[0]], true[c[1]]))]
    choices = [*profile.situations, *_budget(profile)]
    return {
        "measured": sum(entry["status"] == "ok" for entry, _ in stated),
        "predicted": sum(entry["status"] == "predicted" for entry, _ in stated),
        "measured_held": sum(inside for ok, inside in held if ok),
        "predicted_held": sum(inside for ok, inside in held if not ok),
        "claims": len(claims),
        "false": [f"{a} {said} {b}" for a, b, said in false],
        "choices": [_choice(profile, choice, true) for choice in choices],
        "warnings": [str(warning) for warning in profile.warnings],
    }


def _shown(entry: Row, time: KnownValue) -> KnownValue:
    """The interval as reports show it: that of a measured time holds at another minute too."""
    return time.at_any_time if entry["status"] == "ok" else time


def _claims(stated: list[tuple[Row, KnownValue]]) -> Iterator[tuple[Place, Place, str]]:
    """What is said of any two points of as many pairs."""
    for (one, a), (other, b) in combinations(stated, 2):
        said = verdict(a, b)
        if one["pairs"] == other["pairs"] and said != "unknown":
            yield place(one), place(other), said


def _is_false(said: str, true: str) -> bool:
    """Whether the truth surely differs; a truth that is not known contradicts nothing."""
    return true not in {said, "unknown"}


def _budget(profile: Profile) -> list[Row]:
    budget = profile.settings.token_budget
    found = [e for e in profile.points if e["token_budget"] == budget and time_of(e)]
    return found[-1:]


def _choice(profile: Profile, choice: Row, true: dict[Place, KnownValue]) -> Row:
    """Whether a chosen size is within TIE of the true best, or was said not to be known."""
    batches = choice["batch_size"] is not None and choice.get("name") != "offline"
    row = {
        p: value.value
        for p, value in true.items()
        if p[0] == choice["pairs"] and (choice.get("name") == "offline" or bool(p[1]) == batches)
    }
    mine = row.get(place(choice))
    offline = choice.get("name") == "offline"
    doubted = bool(choice.get("predicted")) or bool(rivals(profile, choice, any_unit=offline))
    off = None if mine is None else mine / min(row.values()) - 1
    within = 1 / 0.95 - 1 if choice.get("name") in {"edge", "concurrent"} else TIE
    return {
        "name": choice.get("name", "settings"),
        "size": [choice["batch_size"], choice["token_budget"]],
        "slower": off,
        "not_known": doubted,
        "right": doubted or (off is not None and off <= within),
    }


# The whole.


def main() -> None:
    """Run what is asked for and not there yet, and write the page."""
    arguments = _arguments()
    if arguments.measure:
        found = measure(arguments)
        Path(arguments.measure).write_text(json.dumps(found), encoding="utf-8")
        return
    target = Path(arguments.output)
    kept = json.loads(target.read_text(encoding="utf-8")) if target.is_file() else {}
    kept |= {
        "command": shlex.join(["python", *sys.argv]),
        "machine": {"cpu": cpu_name(), "cpus": usable_cpus()},
        "precision": arguments.precision,
        "quota": quota_by(),
    }
    names, limits = arguments.conditions.split(","), [int(n) for n in arguments.limits.split(",")]
    for name in names:
        _run(name, limits, arguments, kept, target)
    if GROUP.is_dir():
        GROUP.rmdir()
    print(page(kept))


def _run(
    name: str, limits: list[int], arguments: argparse.Namespace, kept: Row, target: Path
) -> None:
    """One condition: the runs, then the truth, then both compared."""
    lasting = "quiet" if name == "stall" else name
    runs, truths = kept.setdefault("runs", {}), kept.setdefault("truth", {})
    with tempfile.TemporaryDirectory() as folder:
        for limit in limits:
            key = f"{name} {limit}"
            if key in runs and not arguments.again:
                continue
            print(f"{key} s: tuning", flush=True)
            began = monotonic()
            profile = tuned(name, limit, arguments, Path(folder))
            seconds = profile.data["measuring"]["spent_s"], monotonic() - began
            runs[key] = {"seconds": seconds, "profile": profile.as_dict()}
            _keep(target, kept)
        if lasting not in truths or arguments.again:
            print(f"{lasting}: the truth", flush=True)
            truths[lasting] = truth(lasting, arguments, Path(folder))
    true = {tuple(json.loads(p)): KnownValue(v["median"], v["low"], v["high"])
            for p, v in truths[lasting].items()}  # fmt: skip
    for key, run in runs.items():
        if key.split()[0] == name:
            run["judged"] = judged(Profile.from_dict(run["profile"], Path(key)), true)
    _keep(target, kept)


def _keep(target: Path, kept: Row) -> None:
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if all("judged" in run for run in kept.get("runs", {}).values()):
        target.with_suffix(".md").write_text(page(kept), encoding="utf-8")


COLUMNS = (
    "condition", "limit", "took (with its start)", "measured", "held", "predicted", "held",
    "choices right", "verdicts", "false",
)  # fmt: skip


def page(kept: Row) -> str:
    """The results as Markdown."""
    rows = [(key.split(), run["seconds"], run["judged"]) for key, run in kept["runs"].items()]
    total = {
        name: sum(row[name] for _, _, row in rows)
        for name in ("measured", "measured_held", "predicted", "predicted_held", "claims")
    }
    false = [text for _, _, row in rows for text in row["false"]]
    choices = [choice for _, _, row in rows for choice in row["choices"]]
    right = sum(choice["right"] for choice in choices)
    unknown = sum(choice["not_known"] for choice in choices)
    made = f"`{kept['command']}` on {kept['machine']['cpu']} ({kept['machine']['cpus']} CPUs)"
    chosen = f"{right} of {len(choices)} ({unknown} not known)"
    held = f"{total['measured_held']} of {total['measured']} (goal 90 %)"
    predicted = f"{total['predicted_held']} of {total['predicted']}"
    lines = [
        "# Is what `echelon tune` says true?",
        "",
        f"{made}, precision {kept['precision']}; quota by {kept['quota']}.",
        "",
        f"- Chosen settings within {TIE:.0%} of the true best, or said to be not known: {chosen}.",
        f"- 95 % intervals of measured points that held the truth: {held}.",
        f"- Those of predicted points: {predicted}.",
        f"- False verdicts: {len(false)} of {total['claims']} (goal none in 200).",
        "",
        f"| {' | '.join(COLUMNS)} |",
        f"|{'---|' * len(COLUMNS)}",
    ]
    lines += [
        f"| {name} | {limit} s | {seconds[0]:.0f} s ({seconds[1]:.0f} s) "
        f"| {row['measured']} | {row['measured_held']} "
        f"| {row['predicted']} | {row['predicted_held']} "
        f"| {sum(c['right'] for c in row['choices'])} of {len(row['choices'])} "
        f"| {row['claims']} | {len(row['false'])} |"
        for (name, limit), seconds, row in rows
    ]
    lines += ["", "What the runs said of the machine:", ""]
    for (name, limit), _, row in rows:
        named = [w for w in row["warnings"] if "runs" in w or "quota" in w]
        lines += [f"- {name}, {limit} s: {' '.join(named) or 'nothing'}"]
    return "\n".join(lines) + "\n"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--conditions", default=",".join(CONDITIONS))
    parser.add_argument("--limits", default=",".join(map(str, LIMITS)), help="seconds")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--truth", type=float, default=1.0, help="factor on the truth's seconds")
    parser.add_argument("--again", action="store_true", help="repeat runs that are there")
    parser.add_argument("--output", default=str(RESULTS / "tuning_truth.json"))
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=60.0, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
