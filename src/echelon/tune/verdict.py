"""A report's first words: what was chosen, and what it does. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from echelon.tune import words
from echelon.tune.entries import chosen, slowest
from echelon.tune.lang import listed, tr

if TYPE_CHECKING:
    from echelon.profile import Profile
    from echelon.tune.words import Entry


def verdict(profile: Profile) -> str:
    """The chosen setting and its speed, in a sentence."""
    point = chosen(profile)
    if point is None and profile.scenario is not None:
        return tr(
            "The step was chosen by simulation for this use; the sweep below has other sizes."
        )
    if point is None:
        return tr(
            "The chosen setting has no measured point, so nothing can be said about its speed. "
            "Run echelon tune again with a higher --time-limit."
        )
    found = {
        "step": words.step_of(point),
        "precision": profile.settings.precision,
        "device": profile.key.device_name,
        "pairs": words.pairs(point["pairs"]),
        "latency": words.latency(point),
        "rate": words.rate(point["pairs_per_s"]),
    }
    rival = slowest(profile, point)
    if rival is None:
        return tr(
            "Use {step} in {precision}. On {device} it ranks {pairs} in {latency}, {rate}.", **found
        )
    return tr(
        "Use {step} in {precision}. On {device} it ranks {pairs} in {latency}, {rate}: {times} the "
        "slowest size measured ({slowest}).",
        **found,
        times=_times(point, rival),
        slowest=words.step_of(rival),
    )


def _times(point: Entry, rival: Entry) -> str:
    return tr("{count} times", count=f"{point['pairs_per_s'] / rival['pairs_per_s']:,.1f}")


def tiles(profile: Profile) -> list[tuple[str, str, str]]:
    """The verdict's figures: label, value, and what belongs to it."""
    point = chosen(profile)
    if point is None:
        return []
    called = tr("{pairs} a call", pairs=words.pairs(point["pairs"]))
    median = tr("median, {certainty}", certainty=words.spread(point))
    found = [
        (tr("Throughput"), words.rate(point["pairs_per_s"]), called),
        (tr("Latency"), words.duration(point["latency_s"]["median"]), median),
        (tr("Precision"), profile.settings.precision, _precision_note(profile)),
        (tr("Peak memory"), words.size(point["peak_bytes"]), memory_of(profile)),
    ]
    rival = slowest(profile, point)
    if rival is not None:
        rate = words.rate(rival["pairs_per_s"])
        rate = tr("{value} ({certainty})", value=rate, certainty=words.spread(rival))
        note = listed([rate, words.step_of(rival)])
        found.insert(2, (tr("Against the slowest"), _times(point, rival), note))
    return found


def _precision_note(profile: Profile) -> str:
    precision = profile.settings.precision
    rows = [row for row in profile.precisions if row["precision"] == precision]
    if not rows:
        return tr("not compared with others")
    if precision == "fp32":
        return tr("the reference")
    return tr("τ {tau} against fp32", tau=f"{rows[0]['tau']:.4f}")


def memory_of(profile: Profile) -> str:
    """Whose memory was measured."""
    if profile.key.device == "cpu":
        return tr("the process that tuned, with what it kept of other precisions and sizes")
    return tr("the GPU, model included")
