"""What the tests of the report share: profiles to report, and pages read as a browser would."""

import json
from dataclasses import replace
from html.parser import HTMLParser

from echelon.messages import Message
from echelon.profile import Profile, ProfileKey, TunedSettings
from echelon.reports import tuning_report
from echelon.scheduling.packing import NO_BUDGET
from echelon.tuning.choice import best_batches, best_budget, scenario_advice
from echelon.tuning.sweep import MeasuredPoint, SweepPoint

# Building profiles.


def entry(pairs, seconds=(), *, status="ok", reason="", memory=2**29, predicted=None, **size):
    """One point as the sweep leaves it."""
    point = SweepPoint(pairs, **size)
    measured = MeasuredPoint(point, status, reason, list(seconds), tokens=pairs * 100)
    measured.cost_tokens, measured.steps, measured.peak_bytes = pairs * 110, 3, memory
    measured.predicted_s = predicted
    return measured


def steady(median, count=20):
    return [median * (0.96 + 0.08 * i / max(1, count - 1)) for i in range(count)]


RESULTS = (
    entry(10, steady(0.2), batch_size=1),
    entry(10, steady(0.1), batch_size=8),
    entry(50, steady(0.71, 7), batch_size=1),
    entry(50, status="predicted", predicted=(0.6, 0.55, 0.65), batch_size=4),
    entry(50, steady(0.4, 7), batch_size=8),
    entry(50, status="out_of_memory", reason="std::bad_alloc here", batch_size=16),
    entry(50, status="skipped", reason="steps of 16 already ran out of memory", batch_size=32),
    entry(50, steady(0.5), token_budget=256),
    entry(50, steady(0.31, 7), token_budget=1024, memory=None),
    entry(50, status="not_reached", reason="the time limit came first", token_budget=2048),
)

PRECISIONS = [
    {
        "precision": name,
        "tokens_per_s": rate,
        "tau": tau,
        "overlap": 1.0,
        "max_delta": 0.057,
        "ndcg_loss": loss,
        "tau_low": tau - 0.01,
        "tau_high": min(1.0, tau + 0.01),
        "overlap_low": 0.98,
        "overlap_high": 1.0,
        "proven": passed,
        "failed": not passed,
        "passed": passed,
        "queries": 8,
    }
    for name, rate, tau, loss, passed in (
        ("fp32", 5400.0, 1.0, 0.0, True),
        ("bf16", 16800.0, 0.9962, -0.0013, True),
        ("fp16", 17900.0, 0.913, None, False),
    )
]


def make_profile(results=RESULTS, **changes):
    """A profile as the tuner builds it."""
    best, budget = best_batches(results), best_budget(results)
    chosen = TunedSettings(
        precision="bf16",
        token_budget=budget.chosen.point.token_budget if budget else NO_BUDGET,
        batch_size=None if budget or not best else best[-1].chosen.point.batch_size,
        threads=2,
        max_length=None,
    )
    profile = Profile(
        key=ProfileKey("some/model", "abc123", "cpu", "A Processor", "bf16", {"torch": "2.13.0"}),
        settings=chosen,
        created="2026-11-22T13:00:09+00:00",
        machine={
            "cpu": "A Processor",
            "cpus": 4,
            "usable_cpus": 2,
            "matrix_features": ["avx2"],
            "memory_bytes": 8 * 2**30,
            "system": "Linux 6",
            "machine": "x86_64",
            "python": "3.11.7",
            "gpus": [{"name": "A Card", "memory_bytes": 2**34, "capability": "9.0"}],
        },
        data={
            "name": Message("data.built_in", {"language": "en"}),
            "pairs": 144,
            "tokens": {"mean": 118.2, "max": 420},
        },
        precisions=PRECISIONS,
        points=[measured.as_dict() for measured in results],
        best=[choice.chosen.as_dict() | choice.certainty() for choice in best],
        situations=scenario_advice(results),
        warnings=["3 of 9 points are noisy. Close other programs."],
    )
    return replace(profile, **changes)


# A recommendation for a scenario.

PREDICTED = {
    "p50_s": 0.05,
    "p95_s": 0.08,
    "p99_s": 0.1,
    "requests_per_s": 5.0,
    "documents_per_s": 27.0,
    "memory_bytes": 2.0**29,
}


def scenario_entry(**changes):
    return {
        "scenario": "api",
        "asked": {
            "slo_p99_s": 0.2,
            "rate": 5.0,
            "trace_requests": 0,
            "documents": "1-10",
            "tokens": None,
            "max_length": None,
            "memory_limit_bytes": None,
            "verify_s": 20.0,
        },
        "chosen": {
            "token_budget": 1024,
            "batch_size": None,
            "workers": 1,
            "threads": 2,
            "precision": "bf16",
            "max_length": 256,
        },
        "accuracy": {"tau": 0.9962, "overlap": 0.99, "ndcg_loss": -0.0013},
        "predicted": PREDICTED,
        "measured": PREDICTED | {"p99_s": 0.12, "memory_bytes": None},
        "held": True,
        "notes": ["<b>Only 15 answers</b>"],
    } | changes


def scenario_profile(**changes):
    return make_profile(scenario=scenario_entry(**changes))


POINTS = [
    {"rate": r, "p50_s": 0.05, "p95_s": 0.1, "p99_s": r / 20, "goodput": r, "refused": 0.0}
    for r in (1.0, 4.0, 6.0)
]


CURVE = {"rate": 5.0, "most_rate": 4.0, "requests": 300, "points": POINTS}


# Reading pages.


class Page(HTMLParser):
    """What a browser would make of the page."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.ids, self.tables, self.scripts, self.styles = [], [], [], [], []
        self.words, self.open = [], []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in {"meta", "br", "link", "img", "input"}:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in {"td", "th"}:
            self.tables[-1][-1].append("")
        elif tag in {"script", "style"}:
            (self.scripts if tag == "script" else self.styles).append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, "tags are not nested"

    def handle_data(self, data):
        here = self.open[-1] if self.open else ""
        if here in {"script", "style"}:
            (self.scripts if here == "script" else self.styles)[-1] += data
            return
        self.words.append(data)
        if "td" in self.open or "th" in self.open:
            self.tables[-1][-1][-1] += data

    @property
    def text(self):
        return "".join(self.words)

    @property
    def figures(self):
        return json.loads(self.scripts[0]) if self.scripts else {}

    def table(self, header):
        """Rows of the table with this column, as dictionaries; short rows hold gaps."""
        table = next(t for t in self.tables if header in t[0])
        return [dict(zip(table[0], row, strict=False)) for row in table[1:]]


def leave_plotly_out(request, monkeypatch):
    """A fixture's body: leave the megabytes of plotly.js out where they are not what is tested."""
    if "real_plotly" not in request.fixturenames:
        monkeypatch.setattr("echelon.reports._plotly_js", lambda: "/* plotly */")


def read(profile):
    return Page(tuning_report.render(profile))


def number_rows(page):
    return page.table("Median (P50)")


def traces(figure, meta):
    return [trace for trace in figure["data"] if trace["meta"] == meta]
