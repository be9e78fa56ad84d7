"""Measurements in words for people, with units and how sure they are, and what to type. Pure.

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
"""Runs below which a percentile is little else than the slowest run: one run beyond it."""

WHOLE_PERCENT = 10
"""An interval this wide does not deserve a decimal."""

MISSING = {
    "out_of_memory": N_("out of memory"),
    "skipped": N_("skipped"),
    "not_reached": N_("not measured in time"),
}
"""Words for each status without a number."""


def pairs(count: int) -> str:
    """How many pairs."""
    return tr("1 pair") if count == 1 else tr("{count} pairs", count=f"{count:,}")


def rate(pairs_per_s: float) -> str:
    """Throughput."""
    return tr("{number} pairs/s", number=number(pairs_per_s))


def tokens(count: int) -> str:
    """How many tokens."""
    return tr("{count} tokens", count=f"{count:,}")


def measured(entry: Entry) -> bool:
    """Whether an entry of the profile has numbers."""
    return "latency_s" in entry


def precision(row: dict[str, Any]) -> str:
    """A compared precision, and what of it stays in bf16."""
    kept, name = len(row.get("keep_bf16", ())), str(row["precision"])
    if not kept:
        return name
    if kept == 1:
        return tr("{precision}, 1 layer in bf16", precision=name)
    return tr("{precision}, {count} layers in bf16", precision=name, count=kept)


def spread(entry: Entry) -> str:
    """How sure the median is: the farther end of its interval, or how few runs there are."""
    latency = entry["latency_s"]
    if latency["low"] is None or latency["high"] is None:
        return f"n={entry['samples']}"
    far = max(latency["high"] - latency["median"], latency["median"] - latency["low"])
    percent = math.ceil(1000 * far / latency["median"]) / 10  # up: never surer than measured
    return (
        f"±{math.ceil(percent)}{SPACE}%" if percent >= WHOLE_PERCENT else f"±{percent:.1f}{SPACE}%"
    )


def interval(entry: Entry) -> str:
    """The median's interval; a dash where there are too few runs for one."""
    low, high = entry["latency_s"]["low"], entry["latency_s"]["high"]
    return UNKNOWN if low is None or high is None else f"{duration(low)} – {duration(high)}"


def percentile(entry: Entry, name: str) -> str:
    """A percentile, marked ≈ where the runs are too few to tell it from the slowest."""
    if entry["samples"] == 1:
        return UNKNOWN
    sure = entry["samples"] >= RUNS_FOR[name]
    return ("" if sure else "≈ ") + duration(entry["latency_s"][name])


def step(batch_size: int | None, token_budget: int | None) -> str:
    """How a step is bounded, in words; a budget without end bounds nothing."""
    parts = [tr("batch size {size}", size=f"{batch_size:,}")] if batch_size else []
    if token_budget and token_budget != NO_BUDGET:
        parts.append(tr("{count} tokens per step", count=f"{token_budget:,}"))
    return listed(parts) or tr("no limit on steps")


def step_of(entry: Entry) -> str:
    """How a point's or a situation's step is bounded."""
    return step(entry["batch_size"], entry["token_budget"])


def point(entry: Entry) -> str:
    """A point in one line."""
    what = listed([pairs(entry["pairs"]), step_of(entry)])
    if not measured(entry):
        return tr("{what}: {found}", what=what, found=status(entry))
    found = listed([latency(entry), rate(entry["pairs_per_s"]), size(entry["peak_bytes"])])
    return tr("{what}: {found}", what=what, found=found)


def latency(entry: Entry) -> str:
    """A point's median, and how sure it is."""
    median = duration(entry["latency_s"]["median"])
    return tr("{value} ({certainty})", value=median, certainty=spread(entry))


def status(entry: Entry) -> str:
    """What became of a point, with the reason if it has no number."""
    found = missing(entry["status"])
    if not entry["reason"]:
        return found
    return tr("{what}: {found}", what=found, found=translated(entry["reason"]))


def missing(name: str) -> str:
    """Words for a status."""
    return tr("ok") if name == "ok" else tr(MISSING.get(name, str(name)))


def when(created: str) -> str:
    """A time as in the profile, to the minute; what is no time stays as it is."""
    try:
        return f"{datetime.fromisoformat(created):%Y-%m-%d %H:%M %Z}".strip()
    except ValueError:
        return created


def machine(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The machine, see :mod:`echelon.tuning.machine`, as labels and values."""
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
    """The texts that were scored, as labels and values."""
    lengths = found.get("tokens") or {}
    names = {"mean": tr("mean"), "p50": tr("median"), "p90": "P90", "max": tr("longest")}
    known = [f"{names[name]} {lengths[name]:,.0f}" for name in names if name in lengths]
    return [
        (tr("Texts"), translated(found.get("name") or UNKNOWN)),
        (tr("Number of pairs"), f"{found['pairs']:,}" if "pairs" in found else UNKNOWN),
        (tr("Tokens per pair"), listed(known) or UNKNOWN),
    ]


def python(model: str, profile_path: str, entry: Entry | None = None) -> str:
    """The Python that loads a model with its profile, and an entry's step size if one is given."""
    option = _step_option(entry)
    more = f", {option[0]}={option[1]}" if option else ""
    return f"Reranker({_quoted(model)}, profile={_quoted(profile_path)}{more})"


def _quoted(text: str) -> str:
    """A Python string in the quotes that people write: JSON's, but for its surrogate pairs."""
    return json.dumps(text, ensure_ascii=False)


def shell(model: str, profile_path: str, entry: Entry | None = None) -> str:
    """The same as a command."""
    option = _step_option(entry)
    more = [f"--{option[0].replace('_', '-')}", str(option[1])] if option else []
    parts = shlex.join(["--model", model, "--profile", profile_path, *more])
    return f'echelon rank "query" --file documents.txt {parts}'


def _step_option(entry: Entry | None) -> tuple[str, int] | None:
    """The option that sets a step's size; None leaves it to the profile."""
    for name in ("batch_size", "token_budget"):
        if entry and entry[name]:
            return name, entry[name]
    return None
