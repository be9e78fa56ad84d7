"""Measurements and the recommendation for a scenario as text, and commands to use them.

An entry is a point as the profile holds it, see :class:`echelon.tuning.sweep.MeasuredPoint`.
"""

from __future__ import annotations

import json
import math
import shlex
from datetime import datetime
from typing import TYPE_CHECKING, Any

from echelon.engine.agreement import decided
from echelon.messages import N_, listed, tr, translated
from echelon.messages.units import SPACE, UNKNOWN, duration, number, percent, size
from echelon.reports.statistics import KnownValue
from echelon.scheduling.packing import NO_BUDGET

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from echelon.profile import Profile

Entry = dict[str, Any]

RUNS_FOR = {"p95": 20, "p99": 100}
"""Runs a percentile needs so that at least one run is slower than it."""

LONGER = 4
"""Factor on the time limit that halves an interval."""

USUAL_LIMIT_S = 75.0  # of profiles that do not hold theirs

MAX_RIVALS = 3  # sizes that a sentence names

WHOLE_PERCENT = 10
"""Per cent above which an interval is shown without a decimal."""

MISSING = {
    "out_of_memory": N_("out of memory"),
    "skipped": N_("skipped"),
    "not_reached": N_("not measured in time"),
    "predicted": N_("predicted"),
}
"""Text for each status of a point that was not measured."""

TITLES = {
    "api": N_("Realtime API"),
    "offline": N_("Offline reranking"),
    "edge": N_("Small edge device"),
    "concurrent": N_("High concurrency"),
}

METRICS = {
    "p50_s": N_("metric.p50_s"),
    "p95_s": N_("metric.p95_s"),
    "p99_s": N_("metric.p99_s"),
    "requests_per_s": N_("metric.requests_per_s"),
    "documents_per_s": N_("metric.documents_per_s"),
    "memory_bytes": N_("metric.memory_bytes"),
}
"""Message ids of the numbers that are predicted and measured, in the order of the table."""

SERVED = frozenset({"api", "concurrent"})
"""Scenarios whose settings are for `echelon serve`."""


def pairs(count: int) -> str:
    """A number of pairs."""
    return tr("1 pair") if count == 1 else tr("{count} pairs", count=f"{count:,}")


def rate(pairs_per_s: float) -> str:
    """A throughput."""
    return tr("{number} pairs/s", number=number(pairs_per_s))


def tokens(count: int) -> str:
    """A number of tokens."""
    return tr("{count} tokens", count=f"{count:,}")


def measured(entry: Entry) -> bool:
    """Whether an entry was measured."""
    return "latency_s" in entry


def precision(row: dict[str, Any]) -> str:
    """A compared precision and its number of layers kept in bf16."""
    layers, name = len(row.get("keep_bf16", ())), str(row["precision"])
    if layers == 1:
        return tr("{precision}, 1 layer in bf16", precision=name)
    several = tr("{precision}, {count} layers in bf16", precision=name, count=layers)
    return several if layers else name


def spread(entry: Entry) -> str:
    """Half the width of the median's interval, the larger half; the number of runs without one."""
    if not measured(entry):
        return tr("predicted")
    half = _at_any_time(entry).relative_half
    if half is None:
        return f"n={entry['samples']}"
    share = math.ceil(1000 * half) / 10  # up: never surer than measured
    shown = f"{math.ceil(share)}" if share >= WHOLE_PERCENT else f"{share:.1f}"
    return f"±{shown}{SPACE}%"


def _at_any_time(entry: Entry) -> KnownValue:
    return KnownValue(*(entry["latency_s"][n] for n in ("median", "low", "high"))).at_any_time


def interval(entry: Entry) -> str:
    """The median's interval; a dash with too few runs for one."""
    ends = _at_any_time(entry)
    if ends.low is None or ends.high is None:
        return UNKNOWN
    return f"{duration(ends.low)} – {duration(ends.high)}"


def prediction(entry: Entry) -> str:
    """A predicted time with its interval."""
    values = {name: duration(entry["predicted_s"][name]) for name in ("median", "low", "high")}
    return tr("about {median} ({low} – {high})", **values)


def longer(profile: Profile) -> str:
    """The option with which a run is long enough to halve an interval."""
    planned = profile.data.get("measuring") or {}
    return f"--time-limit {LONGER * planned.get('time_limit_s', USUAL_LIMIT_S):.0f}"


def doubt(profile: Profile, sizes: Sequence[Entry]) -> str:
    """What is not known of a choice, and what it takes to know; empty where it is certain."""
    if not sizes:
        return ""
    shown = listed(step_of(entry) for entry in sizes[:MAX_RIVALS])
    more = "" if len(sizes) <= MAX_RIVALS else " …"
    return tr(
        "Not known: {sizes} may be as fast or faster; run echelon tune with {longer}.",
        sizes=shown + more,
        longer=longer(profile),
    )


def percentile(entry: Entry, name: str) -> str:
    """A percentile; marked ≈ with too few runs to tell it from the slowest."""
    if entry["samples"] == 1:
        return UNKNOWN
    mark = "" if entry["samples"] >= RUNS_FOR[name] else "≈ "
    return mark + duration(entry["latency_s"][name])


def step(batch_size: int | None, token_budget: int | None) -> str:
    """The limits of a step; an infinite budget is no limit."""
    parts = [tr("batch size {size}", size=f"{batch_size:,}")] if batch_size else []
    if token_budget and token_budget != NO_BUDGET:
        parts.append(tr("{count} tokens per step", count=f"{token_budget:,}"))
    return listed(parts) or tr("no limit on steps")


def step_of(entry: Entry) -> str:
    """The limits of a step of a point or of a scenario's advice."""
    return step(entry["batch_size"], entry["token_budget"])


def point(entry: Entry) -> str:
    """A point in one line: its size, then its numbers or why there are none."""
    what = listed([pairs(entry["pairs"]), step_of(entry)])
    if measured(entry):
        found = listed([latency(entry), rate(entry["pairs_per_s"]), size(entry["peak_bytes"])])
    elif "predicted_s" in entry:
        found = tr("{what}: {found}", what=tr("predicted"), found=prediction(entry))
    else:
        found = missing(entry["status"])
        if entry["reason"]:
            found = tr("{what}: {found}", what=found, found=translated(entry["reason"]))
    return tr("{what}: {found}", what=what, found=found)


def latency(entry: Entry) -> str:
    """A point's median and its certainty."""
    median = duration(entry["latency_s"]["median"])
    return tr("{value} ({certainty})", value=median, certainty=spread(entry))


def missing(name: str) -> str:
    """The text of a status."""
    return tr("ok") if name == "ok" else tr(MISSING.get(name, str(name)))


def when(created: str) -> str:
    """A time of the profile to the minute; other text as it is."""
    try:
        return f"{datetime.fromisoformat(created):%Y-%m-%d %H:%M %Z}".strip()
    except ValueError:
        return created


def machine(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Labels and values of a machine, see :mod:`echelon.tuning.machine`."""
    usable, present = (found.get(name, UNKNOWN) for name in ("usable_cpus", "cpus"))
    system = [found.get("system"), found.get("machine")]
    return [
        (tr("Processor"), str(found.get("cpu") or UNKNOWN)),
        (tr("Matrix instructions"), listed(found.get("matrix_features") or ()) or tr("none known")),
        (tr("Cores"), tr("{usable} of {present} usable", usable=usable, present=present)),
        (tr("Memory"), size(found.get("memory_bytes"))),
        (tr("GPU"), "; ".join(map(_gpu, found.get("gpus") or ())) or tr("none")),
        (tr("System"), ", ".join(part for part in system if part) or UNKNOWN),
        (tr("Python"), str(found.get("python") or UNKNOWN)),
    ]


def _gpu(gpu: Mapping[str, Any]) -> str:
    name, capability = (gpu.get(name, UNKNOWN) for name in ("name", "capability"))
    compute = tr("compute capability {capability}", capability=capability)
    return listed([str(name), size(gpu.get("memory_bytes")), compute])


def data(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Labels and values of the scored texts."""
    lengths = found.get("tokens") or {}
    names = {"mean": tr("mean"), "p50": tr("median"), "p90": "P90", "max": tr("longest")}
    known = [f"{names[name]} {lengths[name]:,.0f}" for name in names if name in lengths]
    return [
        (tr("Texts"), translated(found.get("name") or UNKNOWN)),
        (tr("Number of pairs"), f"{found['pairs']:,}" if "pairs" in found else UNKNOWN),
        (tr("Tokens per pair"), listed(known) or UNKNOWN),
        *([(tr("Measured"), planned(found))] if planned(found) else []),
    ]


def planned(found: Mapping[str, Any]) -> str:
    """What a run planned to measure in its time; empty in older profiles."""
    return translated((found.get("measuring") or {}).get("text", ""))


def python(model: str, profile_path: str, entry: Entry | None = None) -> str:
    """Python code that loads a model with its profile; an entry sets the step size."""
    option = _step_option(entry)
    more = f", {option[0]}={option[1]}" if option else ""
    # JSON is also Python's string in double quotes.
    quoted = [json.dumps(text, ensure_ascii=False) for text in (model, profile_path)]
    return f"Reranker({quoted[0]}, profile={quoted[1]}{more})"


def shell(model: str, profile_path: str, entry: Entry | None = None) -> str:
    """A command that ranks with a model and its profile; an entry sets the step size."""
    option = _step_option(entry)
    more = [f"--{option[0].replace('_', '-')}", str(option[1])] if option else []
    parts = shlex.join(["--model", model, "--profile", profile_path, *more])
    return f'echelon rank "query" --file documents.txt {parts}'


def _step_option(entry: Entry | None) -> tuple[str, int] | None:
    """The option that sets a step's size; None where the profile does."""
    for name in ("batch_size", "token_budget"):
        if entry and entry[name]:
            return name, entry[name]
    return None


# The recommendation for a scenario.


def scenario_summary(profile: Profile) -> Entry | None:
    """The recommendation as text; None where the profile has no scenario.

    ``settings`` holds labels and values, ``rows`` a metric, its predicted and measured value and
    their deviation.
    """
    found = profile.scenario
    if found is None:
        return None
    state = {True: "held", False: "missed", None: "unvalidated"}[found["held"]]
    return {
        "title": tr(TITLES[found["scenario"]]),
        "asked": _asked(found["asked"]),
        "state": state,
        "headline": _headline(found, state),
        "settings": _settings(found["chosen"]),
        "accuracy": agreement(found["accuracy"]),
        "rows": _rows(found["predicted"], found["measured"]),
        "notes": [translated(note) for note in found["notes"]],
    }


def command(profile: Profile, profile_path: str) -> str:
    """The command that uses the recommendation."""
    found = profile.scenario
    if found is None or found["scenario"] not in SERVED:
        return shell(profile.key.model, profile_path)
    workers = found["chosen"]["workers"]
    more = [] if workers == 1 else ["--device", "cuda", "--workers", str(workers)]
    return shlex.join(["echelon", "serve", profile.key.model, "--profile", profile_path, *more])


def value(name: str, amount: float | None) -> str:
    """A metric with its unit."""
    if amount is None:
        return UNKNOWN
    if name.endswith("_bytes"):
        return size(round(amount))
    return number(amount) if name.endswith("_per_s") else duration(amount)


def deviation(predicted: float | None, measured: float | None) -> str:
    """How far a measurement is from its prediction, in per cent of the prediction."""
    if not predicted or measured is None:
        return UNKNOWN
    off = measured / predicted - 1
    return f"{'−' if off < 0 else '+'}{percent(abs(off))}"


def _asked(asked: Entry) -> str:
    parts = []
    if asked["rate"] is not None:
        parts.append(tr("{rate} requests/s", rate=number(asked["rate"])))
    if asked["trace_requests"]:
        parts.append(tr("a trace of {count} requests", count=f"{asked['trace_requests']:,}"))
    if asked["slo_p99_s"] is not None:
        parts.append(tr("P99 within {goal}", goal=duration(asked["slo_p99_s"])))
    if asked["memory_limit_bytes"] is not None:
        parts.append(tr("at most {limit}", limit=size(round(asked["memory_limit_bytes"]))))
    documents = asked["documents"].replace("-", "–")
    several = tr("{documents} documents per request", documents=documents)
    parts.append(tr("1 document per request") if documents == "1" else several)
    if asked["tokens"] is not None:
        parts.append(tr("{tokens} tokens per pair", tokens=asked["tokens"].replace("-", "–")))
    return listed(parts)


def _headline(found: Entry, state: str) -> str:
    seconds = number(found["asked"]["verify_s"])
    if state == "unvalidated":
        return tr("Predicted only; nothing was validated under load.")
    how = N_("measured with the real reranker on such requests for about {seconds} s")
    if found["scenario"] in SERVED:
        how = N_("measured with the real server under this load for {seconds} s")
    how = tr(how, seconds=seconds)
    if state == "missed":
        return tr("The measurement misses the goal: {how}.", how=how)
    if found["asked"]["slo_p99_s"] is None and found["asked"]["memory_limit_bytes"] is None:
        return tr("No goal was given; {how}.", how=how)
    return tr("Validated: {how}.", how=how)


def _settings(chosen: Entry) -> list[tuple[str, str]]:
    pairs = chosen["batch_size"]
    rows = [
        (tr("Maximum tokens per step"), tokens(chosen["token_budget"])),
        (
            tr("Maximum pairs per step"),
            tr("limited by the token budget only") if pairs is None else pairs,
        ),
        (tr("Precision"), chosen["precision"]),
        (tr("Maximum length of a pair"), max_length(chosen["max_length"])),
        (tr("Workers"), str(chosen["workers"])),
    ]
    threads = chosen["threads"]
    return rows if threads is None else [*rows, (tr("Threads"), str(threads))]


def max_length(count: int | None) -> str:
    """The maximum length of a pair."""
    return tr("the model's limit") if count is None else tokens(count)


def agreement(row: Entry | None) -> str:
    """How the ranking agrees with that of fp32."""
    if row is None:
        return tr("not compared with fp32")
    overlap = percent(row["overlap"], 1)
    parts = [f"τ {row['tau']:.4f}", tr("top-10 overlap {share}", share=overlap)]
    if row["ndcg_loss"] is not None:
        parts.append(tr("nDCG@10 loss {loss}", loss=loss(row["ndcg_loss"])))
    return listed(parts)


def passed(row: Entry) -> str:
    """Whether a precision passed; where its queries did not decide, that."""
    if row["passed"]:
        return tr("yes")
    return tr("no") if decided(row) else tr("not proven")


def loss(ndcg_loss: float | None) -> str:
    """A loss of nDCG@10; a dash where it is not known."""
    return UNKNOWN if ndcg_loss is None else f"{ndcg_loss:.4f}".replace("-", "−")


def _rows(predicted: Entry, measured: Entry | None) -> list[list[str]]:
    rows = []
    for name, label in METRICS.items():
        one, other = predicted[name], None if measured is None else measured[name]
        if one is not None or other is not None:
            rows.append([tr(label), value(name, one), value(name, other), deviation(one, other)])
    return rows
