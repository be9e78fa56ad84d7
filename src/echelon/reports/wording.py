"""Measurements as text, and code and commands to use them.

An entry is a point as the profile holds it, see :class:`echelon.tuning.sweep.MeasuredPoint`.
"""

from __future__ import annotations

import json
import math
import shlex
from datetime import datetime
from typing import TYPE_CHECKING, Any

from echelon.messages import N_, listed, tr, translated
from echelon.messages.units import SPACE, UNKNOWN, duration, number, size
from echelon.scheduling.packing import NO_BUDGET

if TYPE_CHECKING:
    from collections.abc import Mapping

Entry = dict[str, Any]

RUNS_FOR = {"p95": 20, "p99": 100}
"""Runs a percentile needs so that at least one run is slower than it."""

WHOLE_PERCENT = 10
"""Per cent above which an interval is shown without a decimal."""

MISSING = {
    "out_of_memory": N_("out of memory"),
    "skipped": N_("skipped"),
    "not_reached": N_("not measured in time"),
}
"""Text for each status of a point that was not measured."""


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
    return (
        tr("{precision}, {count} layers in bf16", precision=name, count=layers) if layers else name
    )


def spread(entry: Entry) -> str:
    """Half the width of the median's interval, the larger half; the number of runs without one."""
    latency = entry["latency_s"]
    if latency["low"] is None or latency["high"] is None:
        return f"n={entry['samples']}"
    half = max(latency["high"] - latency["median"], latency["median"] - latency["low"])
    percent = math.ceil(1000 * half / latency["median"]) / 10  # up: never surer than measured
    places = 0 if percent >= WHOLE_PERCENT else 1
    percent = math.ceil(percent) if percent >= WHOLE_PERCENT else percent
    return f"±{percent:.{places}f}{SPACE}%"


def interval(entry: Entry) -> str:
    """The median's interval; a dash with too few runs for one."""
    low, high = entry["latency_s"]["low"], entry["latency_s"]["high"]
    return UNKNOWN if low is None or high is None else f"{duration(low)} – {duration(high)}"


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
        return tr("{what}: {found}", what=what, found=found)
    found = status = missing(entry["status"])
    if entry["reason"]:
        found = tr("{what}: {found}", what=status, found=translated(entry["reason"]))
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
    ]


def python(model: str, profile_path: str, entry: Entry | None = None) -> str:
    """Python code that loads a model with its profile; an entry sets the step size."""
    option = _step_option(entry)
    more = f", {option[0]}={option[1]}" if option else ""
    return f"Reranker({_quoted(model)}, profile={_quoted(profile_path)}{more})"


def _quoted(text: str) -> str:
    """A Python string in double quotes."""
    return json.dumps(text, ensure_ascii=False)


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
