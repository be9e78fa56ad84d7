"""A scenario's recommendation in words: what the report's card and the terminal show. Pure."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

from echelon.tune.words import UNKNOWN, duration, number, percent, shell, size

if TYPE_CHECKING:
    from echelon.tune.profile import Profile

Entry = dict[str, Any]

TITLES = {
    "api": "Realtime API",
    "offline": "Offline reranking",
    "edge": "Small edge machine",
    "concurrent": "High concurrency",
}

NUMBERS = {
    "p50_s": "P50",
    "p95_s": "P95",
    "p99_s": "P99",
    "requests_per_s": "Requests/s",
    "documents_per_s": "Documents/s",
    "memory_bytes": "Memory",
}
"""Rows of the card: numbers that are predicted and measured."""

SERVED = frozenset({"api", "concurrent"})


def card(profile: Profile) -> Entry | None:
    """What to show; None where no scenario was asked for.

    Returns:
        ``title``, ``asked``, ``state`` (``held``, ``missed`` or ``unproved``), ``verdict``,
        ``settings`` and ``accuracy`` (label and value), ``rows`` (number, predicted, measured,
        difference), ``type`` (a command) and ``notes``.
    """
    found = profile.scenario
    if found is None:
        return None
    state = {True: "held", False: "missed", None: "unproved"}[found["held"]]
    return {
        "title": TITLES[found["scenario"]],
        "asked": _asked(found["asked"]),
        "state": state,
        "verdict": _verdict(found, state),
        "settings": _settings(found["chosen"]),
        "accuracy": _accuracy(found["accuracy"]),
        "rows": _rows(found["predicted"], found["measured"]),
        "notes": found["notes"],
    }


def command(profile: Profile, profile_path: str) -> str:
    """What to type to use the recommendation."""
    found = profile.scenario
    if found is None or found["scenario"] not in SERVED:
        return shell(profile.key.model, profile_path)
    workers = found["chosen"]["workers"]
    more = [] if workers == 1 else ["--device", "cuda", "--workers", str(workers)]
    parts = ["echelon", "serve", profile.key.model, "--profile", profile_path, *more]
    return shlex.join(parts)


def value(name: str, amount: float | None) -> str:
    """A number of a prediction or a measurement with its unit."""
    if amount is None:
        return UNKNOWN
    if name.endswith("_bytes"):
        return size(round(amount))
    return number(amount) if name.endswith("_per_s") else duration(amount)


def change(said: float | None, came: float | None) -> str:
    """By how much a measurement is off its prediction."""
    if not said or came is None:
        return UNKNOWN
    off = came / said - 1
    return f"{'−' if off < 0 else '+'}{percent(abs(off))}"


def _asked(asked: Entry) -> str:
    parts = []
    if asked["rate"] is not None:
        parts.append(f"{number(asked['rate'])} requests/s")
    if asked["trace_requests"]:
        parts.append(f"a trace of {asked['trace_requests']:,} requests")
    if asked["slo_p99_s"] is not None:
        parts.append(f"P99 within {duration(asked['slo_p99_s'])}")
    if asked["memory_limit_bytes"] is not None:
        parts.append(f"at most {size(round(asked['memory_limit_bytes']))}")
    documents = asked["documents"].replace("-", "–")
    parts.append("1 document a request" if documents == "1" else f"{documents} documents a request")
    if asked["tokens"] is not None:
        parts.append(f"{asked['tokens'].replace('-', '–')} tokens a pair")
    return ", ".join(parts)


def _verdict(found: Entry, state: str) -> str:
    seconds = number(found["asked"]["verify_s"])
    if state == "unproved":
        return "Predicted only; nothing was proved under load."
    if found["scenario"] in SERVED:
        how = f"the real server under this load for {seconds} s"
    else:
        how = f"the real reranker on such requests for about {seconds} s"
    if state == "missed":
        return f"Misses the goal in reality: {how}."
    if found["asked"]["slo_p99_s"] is None and found["asked"]["memory_limit_bytes"] is None:
        return f"Measured: {how}."
    return f"Proved: {how}."


def _settings(chosen: Entry) -> list[tuple[str, str]]:
    threads, workers = chosen["threads"], chosen["workers"]
    rows = [
        ("Step", f"{chosen['token_budget']:,} tokens"),
        (
            "Pairs a step",
            "as many as fit" if chosen["batch_size"] is None else chosen["batch_size"],
        ),
        ("Precision", chosen["precision"]),
        ("Longest pair", _longest(chosen["max_length"])),
        ("Workers", str(workers)),
    ]
    if threads is not None:
        rows.append(("Threads", str(threads)))
    return rows


def _longest(most: int | None) -> str:
    return "the model's limit" if most is None else f"{most:,} tokens"


def _accuracy(found: Entry | None) -> str:
    if found is None:
        return "not compared with fp32"
    words = f"τ {found['tau']:.4f}, top-10 overlap {percent(found['overlap'], 1)}"
    loss = found["ndcg_loss"]
    if loss is not None:
        words += f", nDCG@10 loss {loss:.4f}".replace("-", "−")
    return words


def _rows(predicted: Entry, measured: Entry | None) -> list[list[str]]:
    rows = []
    for name, label in NUMBERS.items():
        said, came = predicted[name], None if measured is None else measured[name]
        if said is not None or came is not None:
            rows.append([label, value(name, said), value(name, came), change(said, came)])
    return rows
